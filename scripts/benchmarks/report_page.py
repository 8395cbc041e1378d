"""Measure how long the report of a large run takes to write and to open.

    python scripts/benchmarks/report_page.py runs/quickstart --out /tmp/large

The run is made up: the evaluation files of a finished run stand in for those of 10 sizes with 10
seeds and 11 steps (as links, so that they take no space), and its training logs for theirs. Opening
is measured in headless Chromium: until the page has loaded, until the main figure is drawn, and
from opening the section of texts until the first one is shown. Needs selenium, chromium and
chromium-driver.
"""

import argparse
import json
import os
import resource
import shutil
import time
from pathlib import Path
from typing import Any

from selfcorrect.evaluate.measuring.cell_files import read_settings
from selfcorrect.evaluate.report.page import write_report
from selfcorrect.evaluate.run_folder import STAGE_RECORD, find_checkpoints

SECONDS = 300


def multiply(run: Path, out: Path, sizes: int, seeds: int, steps: int, conditions: set[str]) -> int:
    """Write the made-up run into `out` and return its number of evaluation files."""
    out.mkdir(parents=True)
    shutil.copy(run / "recipe.yaml", out)
    largest = find_checkpoints(run)[-1].record
    sources = [c for c in find_checkpoints(run) if c.record.model == largest.model]
    stage = sources[0].folder.parent / STAGE_RECORD
    number = 0
    for size in range(sizes):
        for seed in range(seeds):
            job = out / f"size-{size}" / f"seed-{seed}" / "ppo"
            for step in range(steps):
                source = sources[step * len(sources) // steps]
                folder = job / f"checkpoint-{step}"
                (folder / "evaluation").mkdir(parents=True)
                made_up: dict[str, Any] = {
                    "model": f"size-{size}", "parameters": 10_000 * 3**size, "seed": seed,
                    "step": step, "weights_digest": None, "files": None,
                }  # fmt: skip
                source.record.model_copy(update=made_up).write(folder)
                for path in source.evaluation.glob("*.parquet"):
                    if read_settings(path)["condition"] in conditions:
                        os.link(path, folder / "evaluation" / path.name)
                        number += 1
            if stage.is_file():
                shutil.copy(stage, job)
    return number


def open_page(page: Path) -> dict[str, float]:
    """Return the seconds until the page has loaded, drawn its figure, and shown the first text."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or "google-chrome"
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    driver.set_page_load_timeout(SECONDS)
    driver.set_script_timeout(SECONDS)
    until = (
        "const wait = () => ({}) ? arguments[0](performance.now()) : setTimeout(wait, 5); wait();"
    )
    try:
        driver.get(page.as_uri())
        drawn = driver.execute_async_script(
            until.format("document.querySelector('#main-figure svg path')")
        )
        timing = driver.execute_script(
            "return performance.getEntriesByType('navigation')[0].loadEventEnd"
        )
        started = driver.execute_script(
            "document.getElementById('texts').open = true; return performance.now()"
        )
        shown = driver.execute_async_script(
            until.format("document.querySelector('#browser [data-part=table] tbody')")
        )
    finally:
        driver.quit()
    # The figure may be drawn before Selenium asks, so this is at most too long.
    return {
        "loaded": timing / 1000,
        "figure drawn": drawn / 1000,
        "texts shown": (shown - started) / 1000,
    }


def main() -> None:
    """Make the run, write its report, open it three times, and print the seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=11)
    parser.add_argument("--conditions", default="Q,Q+IF")
    parser.add_argument("--resamples", type=int, default=200)
    given = parser.parse_args()
    if not given.out.exists():
        conditions = set(given.conditions.split(","))
        files = multiply(given.run, given.out, given.sizes, given.seeds, given.steps, conditions)
        print(f"{files:,} evaluation files")
    page = given.out / "report.html"
    if not page.is_file():
        started = time.monotonic(), time.process_time()
        write_report(given.out, given.resamples)
        wall, cpu = time.monotonic() - started[0], time.process_time() - started[1]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        print(f"written in {wall:.0f} s ({cpu:.0f} s of CPU), {peak:.2f} GB at the peak")
    print(f"{page.stat().st_size / 1e6:.1f} MB")
    for _ in range(3):
        print(json.dumps({name: round(value, 2) for name, value in open_page(page).items()}))


if __name__ == "__main__":
    main()
