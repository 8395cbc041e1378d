"""Writes what `selfcorrect plan` says into the comments of the shipped ladders.

    python scripts/study/ladder_headers.py          after a change to a recipe or to the plan

A recipe that wants it has the line `# plan: OPTIONS`, the options of `selfcorrect plan`, and then
`# end of plan`; what stands between is replaced.
"""

import shlex
from pathlib import Path

from selfcorrect.recipes.foundation.atomic_files import write_text
from selfcorrect.recipes.load import load_recipe, shipped_recipes
from selfcorrect.recipes.schema import Recipe
from selfcorrect.scripts.commands.plan import device_hours, disk_of, gigabytes, hours, plan_ladder
from selfcorrect.train.planning.devices import CPU_CORE, GPUS, ModelPlan, does_not_fit
from selfcorrect.train.planning.feedback import HH_RLHF, FeedbackFacts, feedback_facts
from selfcorrect.train.planning.memory import Engine

BEGIN, END = "# plan: ", "# end of plan"
UTILISATION = 0.3


def options_of(text: str) -> dict[str, str] | None:
    """The options behind `# plan:`; None where a recipe has no such line."""
    line = next((line for line in text.splitlines() if line.startswith(BEGIN)), None)
    if line is None:
        return None
    words = shlex.split(line.removeprefix(BEGIN))
    return {
        key.removeprefix("--"): value for key, value in zip(words[::2], words[1::2], strict=True)
    }


def header(recipe: Recipe, options: dict[str, str]) -> list[str]:
    """The comment's lines: machine, memory, hours and disk of every model, and in all."""
    device = GPUS.get(options["device"], CPU_CORE)
    engine = Engine(int(options.get("processes", 1)), int(options.get("zero", 0)), device.gpu)
    plans = plan_ladder(recipe, facts_anywhere(recipe), engine)
    rows = [("model", "training, GB", "evaluation, GB", "training", "evaluation", "disk, GB")]
    total = paid = 0.0
    for plan in plans:
        spent = plan.hours(device, UTILISATION)
        total += sum(spent.values())
        paid += device_hours(plan, spent)
        short = {stage.stage for stage in does_not_fit(plan, device)}
        needs = {stage.stage: stage.total for stage in plan.footprints}
        measuring = needs.pop("evaluation", None)
        most = max(needs, key=lambda stage: needs[stage])
        rows.append(
            (
                plan.name,
                f"{gigabytes(needs[most])} ({most}){' !' * (most in short)}",
                "in ppo"
                if measuring is None
                else gigabytes(measuring) + " !" * ("evaluation" in short),
                hours(sum(spent.values()) - spent["evaluation"]),
                hours(spent["evaluation"]),
                gigabytes(plan.disk.kept),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return [f"#   {line}" for line in [*lines, *_sums(recipe, plans, total, paid, device.name)]]


def _sums(
    recipe: Recipe, plans: list[ModelPlan], total: float, paid: float, device: str
) -> list[str]:
    seeds = len(recipe.seeds)
    kept, working = disk_of(recipe, plans)
    lines = [
        f"In all {hours(seeds * total)} one model after the other, {hours(seeds * paid)} of one "
        f"{device}, at {UTILISATION:.0%} of its peak;",
        f"disk {gigabytes(kept)} GB, and {gigabytes(working)} GB more while training.",
    ]
    if any(does_not_fit(plan, GPUS.get(device, CPU_CORE)) for plan in plans):
        lines.append("! needs more than a device has: see `selfcorrect plan` with these options")
    return lines


def facts_anywhere(recipe: Recipe) -> FeedbackFacts:
    """The feedback as if it were not here: a header must not depend on whose machine writes it."""
    given = recipe.data.preferences
    if recipe.data.society is not None or given is None or given.limit is None:
        return feedback_facts(recipe.data)
    return FeedbackFacts(given.limit, given.limit, HH_RLHF, "limit")


def renewed(path: Path) -> str | None:
    """A recipe's text with a fresh header; None where it has none."""
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
    """Renew the header of every shipped recipe that has one."""
    for path in shipped_recipes():
        text = renewed(path)
        if text is not None and text != path.read_text(encoding="utf-8"):
            write_text(path, text)
            print(path.name)


if __name__ == "__main__":
    main()
