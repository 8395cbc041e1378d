"""Write the estimates of `selfcorrect plan` into the comments of the shipped ladders.

    python scripts/study/ladder_headers.py

Run it after a change to a recipe or to the estimate. A recipe with such a comment has the line
`# plan: OPTIONS`, with options of `selfcorrect plan`, and the line `# end of plan`; the lines
between them are replaced.
"""

import shlex
from pathlib import Path

from selfcorrect.recipes.foundation.atomic_files import write_text
from selfcorrect.recipes.load import load_recipe, shipped_recipes
from selfcorrect.recipes.schema import Recipe
from selfcorrect.scripts.commands.plan import gigabytes, hours
from selfcorrect.train.planning.devices import CPU_CORE, GPUS
from selfcorrect.train.planning.estimate import disk_of_ladder, estimate_ladder, oversized_stages
from selfcorrect.train.planning.feedback import HH_RLHF, FeedbackFacts, feedback_facts
from selfcorrect.train.planning.memory import Parallelism

BEGIN, END = "# plan: ", "# end of plan"
UTILISATION = 0.3


def options_of(text: str) -> dict[str, str] | None:
    """Return the options of a recipe's `# plan:` line; None if it has no such line."""
    line = next((line for line in text.splitlines() if line.startswith(BEGIN)), None)
    if line is None:
        return None
    words = shlex.split(line.removeprefix(BEGIN))
    return {
        key.removeprefix("--"): value for key, value in zip(words[::2], words[1::2], strict=True)
    }


def header(recipe: Recipe, options: dict[str, str]) -> list[str]:
    """Return the comment's lines: memory, hours and disk of each model, and their sums."""
    device = GPUS.get(options["device"], CPU_CORE)
    fast = "bfloat16" if device.gpu else "float32"  # not every CPU multiplies fast in bfloat16
    processes, zero = int(options.get("processes", 1)), int(options.get("zero", 0))
    parallelism = Parallelism(processes, zero, device.gpu, fast)
    ladder = estimate_ladder(recipe, portable_facts(recipe), parallelism)
    rows = [["model", "training, GB", "evaluation, GB", "training", "evaluation", "disk, GB"]]
    total = device_hours = 0.0
    for model in ladder:
        by_stage = model.hours(device, UTILISATION)
        total += sum(by_stage.values())
        device_hours += model.device_hours(device, UTILISATION)
        oversized = {stage.stage for stage in oversized_stages(model, device)}
        bytes_of = {stage.stage: stage.total for stage in model.footprints}
        evaluation = bytes_of.pop("evaluation", None)
        largest = max(bytes_of, key=lambda stage: bytes_of[stage])
        training = f"{gigabytes(bytes_of[largest])} ({largest}){' !' * (largest in oversized)}"
        measuring = "in policy"
        if evaluation is not None:
            measuring = gigabytes(evaluation) + " !" * ("evaluation" in oversized)
        times = [sum(by_stage.values()) - by_stage["evaluation"], by_stage["evaluation"]]
        disk = gigabytes(model.disk.kept)
        rows.append([model.name, training, measuring, *map(hours, times), disk])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    seeds = len(recipe.seeds)
    kept, working = disk_of_ladder(recipe, ladder)
    lines += [
        f"In all {hours(seeds * total)} one model after the other, {hours(seeds * device_hours)} "
        f"of one {device.name}, at {UTILISATION:.0%} of its peak;",
        f"disk {gigabytes(kept)} GB, and {gigabytes(working)} GB more while training.",
    ]
    if any(oversized_stages(model, device) for model in ladder):
        lines.append("! needs more than a device has: see `selfcorrect plan` with these options")
    return [f"#   {line}" for line in lines]


def portable_facts(recipe: Recipe) -> FeedbackFacts:
    """Return the facts of the feedback as on a machine without it, so that headers are the same."""
    preferences = recipe.data.preferences
    if recipe.data.society is not None or preferences is None or preferences.limit is None:
        return feedback_facts(recipe.data)
    return FeedbackFacts(preferences.limit, preferences.limit, HH_RLHF, "limit")


def renewed(path: Path) -> str | None:
    """Return a recipe's text with a fresh header; None if it has none."""
    text = path.read_text(encoding="utf-8")
    options = options_of(text)
    if options is None:
        return None
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(BEGIN))
    last = lines.index(END)
    fresh = header(load_recipe(str(path)), options)
    return "\n".join([*lines[: first + 1], *fresh, *lines[last:]]) + "\n"


def main() -> None:
    """Renew the header of every shipped recipe that has one, and print the changed files."""
    for path in shipped_recipes():
        text = renewed(path)
        if text is not None and text != path.read_text(encoding="utf-8"):
            write_text(path, text)
            print(path.name)


if __name__ == "__main__":
    main()
