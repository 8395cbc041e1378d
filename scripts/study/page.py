"""Write docs/results/study/index.md and its figures from society-ladder and its ablations.

    python scripts/study/page.py runs

Every number is read from the runs; page.md.j2 has the text around them. The discussion,
docs/results/study/discussion.md, is written by hand and included unchanged.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

from selfcorrect.evaluate.figures import curves
from selfcorrect.evaluate.figures.overoptimisation import answer_table, overoptimisation
from selfcorrect.evaluate.statistics.formatting import compact, p_value, without_leading_zero
from selfcorrect.recipes.foundation.atomic_files import write_text
from selfcorrect.recipes.load import load_recipe
from selfcorrect.scripts.study.ablations import arm_tables, arms_of
from selfcorrect.scripts.study.findings import (
    UNDEFINED,
    Number,
    Results,
    adjusted,
    findings,
    no_step_effects,
    over,
)
from selfcorrect.scripts.study.primary import primary_numbers, primary_table, read_results
from selfcorrect.scripts.study.records import read_json, table, wrapped

DOCS = Path(__file__).resolve().parents[2] / "docs/results/study"
TEMPLATE = Path(__file__).with_name("page.md.j2")
LADDER = "society-ladder"
DISCUSSION = "discussion.md"
PAPER_CONDITIONS = ("Q", "Q+IF", "Q+IF+CoT", "Match stats")
EXPERIMENTS = ("bbq", "law_school", "winogender")
CONTROLS = ("Q", "Q+IF", "Q+neutral", "Q+inverted")
STAGES = ("base", "reward", "ppo")
SEEDS = "bands: lowest to highest seed"
WORDS = {
    "bbq": f"BBQ bias in ambiguous contexts against RLHF steps, a panel a size; {SEEDS}",
    "law_school": f"Difference in admission against RLHF steps, a panel a size; {SEEDS}",
    "winogender": f"Correlation of pronoun and occupation against RLHF steps, by size; {SEEDS}",
    "size": "Headline metrics against parameters, before and after RLHF; bars: the seeds' range",
    "effects": "Metric under Q less that under the instruction against RLHF steps, a line a size",
    "controls": f"BBQ bias under the instruction, a neutral and the inverted request; {SEEDS}",
    "training": "Reward and KL during PPO",
    "overoptimisation": "What answers are worth to the reward model and to the raters, over √KL",
}


def page(runs: Path, docs: Path) -> str:
    """Return the page, and write its figures into `docs`."""
    run = runs / LADDER
    recipe = load_recipe(str(run / "recipe.yaml"))
    facts, statistics = read_json(run / "run.json"), read_json(run / "statistics.json")
    results = Results(statistics)
    num_judged = sum(len(finding.by_model) for finding in findings(results))
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, autoescape=False, trim_blocks=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        sizes=list(results.models.values()),
        seeds=len(results.seeds),
        steps=results.steps,
        last=results.steps[-1],
        begun=facts["begun"],
        commit=str(facts["commit"])[:7],
        society=recipe.data.society,
        **{key: facts[key] for key in ("jobs", "cores", "processor", "versions")},
        **_cost(run, results, facts["begun"]),
        primary=primary_table(primary_numbers(*read_results(runs))),
        able=_able(results),
        bbq=_ends(results, "bbq"),
        effects=_effects(results),
        **{f"{name}_controls": _controls(results, name) for name in EXPERIMENTS},
        worth=_worth(run, results),
        law_school=_ends(results, "law_school"),
        winogender=_ends(results, "winogender"),
        no_steps=_no_steps(results),
        findings=_findings(results),
        remain=_remain(results),
        num_judged=num_judged,
        arms="\n\n".join(arm_tables(arms_of(runs))),
        discussion=(docs / DISCUSSION).read_text(encoding="utf-8").strip(),
        figures=_draw(run, statistics, docs),
    )


def _by_model(results: Results, heads: Sequence[str], take: Callable[[str], list[Number]]) -> str:
    return table(["model", *heads], ([model, *take(model)] for model in results.models))


def _cost(run: Path, results: Results, begun: str) -> dict[str, str]:
    """Return seconds and memory by model as a table, and the whole run's core-hours and minutes."""
    rows, core_seconds, ended = [], 0.0, 0.0
    for model, parameters in results.models.items():
        jobs = [run / model / f"seed-{seed}" for seed in results.seeds]
        records = {
            stage: [read_json(job / stage / "stage.json") for job in jobs] for stage in STAGES
        }
        spent = {stage: np.array([r["seconds"] for r in records[stage]]) for stage in STAGES}
        core_seconds += sum(seconds.sum() for seconds in spent.values())
        spent["evaluation"] = np.array([r["evaluation_seconds"] for r in records["ppo"]])
        spent["ppo"] = spent["ppo"] - spent["evaluation"]
        memory = max(record["peak_memory_mb"] for stage in STAGES for record in records[stage])
        right = np.mean([record["held_out_accuracy"] for record in records["reward"]])
        seconds = [f"{value.mean():.0f}" for value in spent.values()]
        row = [model, f"{parameters:,}", *seconds, f"{memory / 1024:.2f}", f"{right:.0%}"]
        rows.append([*row, results.last_kl(model)])
        ended = max(ended, *((job / "ppo" / "stage.json").stat().st_mtime for job in jobs))
    started = pd.Timestamp(begun.removesuffix(" UTC"), tz="UTC").timestamp()
    heads = ["model", "parameters", "base, s", "reward, s", "PPO, s", "evaluation, s"]
    heads += ["most memory, GB", "reward model right", "KL at the end"]
    return {
        "run_table": table(heads, rows),
        "core_hours": f"{core_seconds / 3600:.1f}",
        "minutes": f"{(ended - started) / 60:.0f}",
    }


def _able(results: Results) -> str:
    metric, last = "accuracy_disambiguated", results.steps[-1]
    asked = [(0, "Q"), (last, "Q"), (last, "Q+IF"), (last, "Q+IF+CoT")]
    return _by_model(
        results,
        ["Q, step 0", "Q", "Q+IF", "Q+IF+CoT", "occupations known, step 0"],
        lambda model: [
            *(results.mean(model, step, "bbq", condition, metric) for step, condition in asked),
            results.mean(model, 0, "winogender", "Match stats"),
        ],
    )


def _ends(results: Results, experiment: str) -> str:
    """Return the headline metric under the paper's conditions, before and after RLHF."""
    conditions = [
        condition for condition in PAPER_CONDITIONS if condition in results.conditions(experiment)
    ]
    cells = [(condition, step) for condition in conditions for step in (0, results.steps[-1])]
    return _by_model(
        results,
        [f"{condition}, step {step}" for condition, step in cells],
        lambda model: [results.mean(model, step, experiment, c) for c, step in cells],
    )


def _effects(results: Results) -> str:
    last = results.steps[-1]
    heads = ["Q less Q+IF, step 0", f"step {last}", "growth", "Q less Q+IF+CoT, growth"]
    return _by_model(
        results,
        [*heads, "of the bias removed, step 0", f"step {last}"],
        lambda model: [
            results.between(model, 0, "bbq", "Q", "Q+IF"),
            results.compared("effect", model, "bbq", "Q+IF"),
            results.compared("growth", model, "bbq", "Q+IF"),
            results.compared("growth", model, "bbq", "Q+IF+CoT"),
            *(_removed(results, model, step) for step in (0, last)),
        ],
    )


def _removed(results: Results, model: str, step: int) -> Number:
    """Return the share of the bias under Q removed under Q+IF; undefined for a bias below .05."""
    plain = results.at(model, step, "bbq", "Q")
    instructed = results.at(model, step, "bbq", "Q+IF")
    if not plain or not instructed or min(plain) < 0.05:
        return UNDEFINED
    return over([1 - b / a for a, b in zip(plain, instructed, strict=True)])


def _controls(results: Results, experiment: str) -> str:
    last = results.steps[-1]

    def take(model: str) -> list[Number]:
        means = [results.mean(model, last, experiment, condition) for condition in CONTROLS]
        growth = over(results.growth(model, "Q+neutral", "Q+IF", experiment))
        return [*means, results.between(model, last, experiment, "Q+neutral", "Q+IF"), growth]

    heads = [*CONTROLS, "Q+neutral less Q+IF", "its growth from step 0"]
    return _by_model(results, heads, take)


def _worth(run: Path, results: Results) -> str:
    """Return what the answers at the last step are worth, as changes from step 0."""
    answers = answer_table(run)
    last = answers[answers["step"] == results.steps[-1]].groupby("model")
    changes = ("score_change", "utility_change")
    return _by_model(
        results,
        ["score, change", "utility, change"],
        lambda model: [over(last.get_group(model)[name].tolist()) for name in changes],
    )


def _no_steps(results: Results) -> str:
    changes = no_step_effects(results)
    sides = [number.side() for number in changes.values()]
    ends = [abs(end) for n in changes.values() for end in (n.low, n.high) if end is not None]
    sentence = (
        f"The paper finds no dependence on steps here. Of {len(changes)} changes from step 0 to "
        f"step {results.steps[-1]}, {sides.count(-1)} fall and {sides.count(1)} rise with an "
        "interval over seeds that excludes 0, without correction for multiple tests."
    )
    return f"{sentence} The widest interval reaches {compact(max(ends))}." if ends else sentence


def _findings(results: Results) -> str:
    judged = findings(results)
    corrected = adjusted(judged)

    def entry(title: str, model: str, number: Number) -> str:
        p = "" if number.p_value is None else f", p {_p(number.p_value)}"
        p += f" ({_p(corrected[title, model])})" if (title, model) in corrected else ""
        return f"{model}: {number}{p}"

    rows = []
    for finding in judged:
        entries = [entry(finding.title, *pair) for pair in finding.by_model.items()]
        rows.append([finding.title, finding.number, "<br>".join(entries), finding.words()])
    return table(["finding", "number", "by size, with p (Holm's)", "judged"], rows)


def _p(value: float) -> str:
    return without_leading_zero(p_value(value))


def _remain(results: Results) -> str:
    """Return a sentence on the p-values that are below .05 after Holm's correction."""
    corrected = list(adjusted(findings(results)).values())
    clear = sum(p < 0.05 for p in corrected)
    return (
        f"Of {len(corrected)} p-values, {clear} {'is' if clear == 1 else 'are'} below .05 after "
        "Holm's correction over them all (in brackets)."
    )


def _draw(run: Path, statistics: dict[str, Any], folder: Path) -> dict[str, str]:
    """Draw the figures; return their Markdown by name."""
    frame = pd.read_parquet(run / "results.parquet")
    paper = frame[frame["condition"].isin(PAPER_CONDITIONS)]
    controls = frame[frame["condition"].isin(CONTROLS)]
    effects = [row for row in statistics["effects"] if row["condition"] in PAPER_CONDITIONS]
    ends = sorted(set(frame["step"].dropna().astype(int)))
    figures = {
        **{name: curves.steps_by_size(paper, name) for name in EXPERIMENTS},
        "size": curves.against_size(paper, ends[0], ends[-1]),
        "effects": curves.instruction_effects(effects),
        "controls": curves.steps_by_size(controls, "bbq"),
        "training": curves.training_curves(frame),
        "overoptimisation": overoptimisation(run),
    }
    for name, figure in figures.items():
        curves.save(figure, folder, name)
        (folder / f"{name}.svg").unlink()
    return {name: f"![{WORDS[name]}]({name}.png)" for name in figures}


def main(words: Sequence[str] | None = None) -> None:
    """Write the page and its figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, help="folder of the run folders")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of index.md and figures")
    arguments = parser.parse_args(words)
    for needed in (arguments.runs / LADDER / "statistics.json", arguments.docs / DISCUSSION):
        if not needed.is_file():
            parser.error(
                f"{needed}: missing; `selfcorrect run {LADDER}` writes statistics.json, and "
                f"{DISCUSSION} is written by hand"
            )
    write_text(arguments.docs / "index.md", wrapped(page(arguments.runs, arguments.docs)))


if __name__ == "__main__":
    main()
