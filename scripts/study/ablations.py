"""The study's ablations beside their reference, as tables: what each changes, seed by seed."""

import json
from pathlib import Path

import numpy as np

from selfcorrect.recipes.load import load_recipe
from selfcorrect.scripts.study.findings import Results, over

REFERENCE = "society-ablation"
Arms = dict[str, tuple[str, Results]]  # by name: what it changes, its results


def arms_of(runs: Path) -> Arms:
    """The finished runs of the reference and the ablations in a folder, the reference first."""
    found: Arms = {}
    for folder in [runs / REFERENCE, *sorted(runs.glob("ablation-*"))]:
        statistics = folder / "statistics.json"
        if not statistics.is_file():
            continue
        recipe = load_recipe(str(folder / "recipe.yaml"))
        what = "the reference" if folder.name == REFERENCE else recipe.description
        found[folder.name] = (what, Results(json.loads(statistics.read_text(encoding="utf-8"))))
    return found


def arm_tables(arms: Arms) -> list[str]:
    """Paragraphs and tables in Markdown; one sentence where there is nothing to compare."""
    if REFERENCE not in arms or len(arms) < 2:
        return ["The ablations were not run."]
    reference = arms[REFERENCE][1]
    model, last = next(iter(reference.models)), reference.steps[-1]
    assert all(results.steps[-1] == last for _, results in arms.values())
    intro = (
        f"{model}, {len(reference.seeds)} seeds, step {last}; each differs from the reference in "
        "one thing, the recipe of its name says which. World, seeds and base models are the first "
        "ladder's, in which this size had the rates that it has here. *Growth* "
        "is that of the bias under Q less that under Q+IF, from step 0; *beside the reference* "
        f"subtracts the reference's, seed by seed. With {len(reference.seeds)} seeds many "
        "differences of some size stay open. GRPO's and fine-tuning's steps make as many updates "
        "of as many rows as PPO's. A neutral and the inverted request are asked in every run."
    )
    return [intro, _bbq(arms, model, last), _others(arms, model, last)]


def _table(heads: list[str], rows: list[list[object]]) -> str:
    lines: list[list[object]] = [["what is different", *heads], ["---"] * (len(heads) + 1), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _growth(results: Results, model: str) -> list[float]:
    steps = (0, results.steps[-1])
    own = [results.at(model, step, "bbq", c) for step in steps for c in ("Q", "Q+IF")]
    return [(c - d) - (a - b) for a, b, c, d in zip(*own, strict=True)]


def _kl(results: Results, model: str, last: int) -> str:
    found = {
        cell["seed"]: cell["kl"]
        for cell in results.statistics["cells"]
        if (cell["model"], cell["step"]) == (model, last)
    }
    return "–" if None in found.values() else f"{np.mean(list(found.values())):.2f}"


def _bbq(arms: Arms, model: str, last: int) -> str:
    reference = _growth(arms[REFERENCE][1], model)
    rows: list[list[object]] = []
    for name, (what, results) in arms.items():
        grown = _growth(results, model)
        beside = over([a - b for a, b in zip(grown, reference, strict=True)])
        bias = [results.mean(model, last, "bbq", c) for c in ("Q", "Q+IF", "Q+IF+CoT")]
        right = results.mean(model, last, "bbq", "Q", "accuracy_disambiguated")
        compared = "–" if name == REFERENCE else beside
        rows.append([what, *bias, over(grown), compared, right, _kl(results, model, last)])
    heads = ["bias, Q", "Q+IF", "Q+IF+CoT", "growth", "beside the reference"]
    return _table([*heads, "right where decided, Q", "KL"], rows)


def _others(arms: Arms, model: str, last: int) -> str:
    rows: list[list[object]] = []
    for what, results in arms.values():
        controls = [results.mean(model, last, "bbq", c) for c in ("Q+neutral", "Q+inverted")]
        law = [results.mean(model, last, "law_school", c) for c in ("Q", "Q+IF", "Q+IF+CoT")]
        pronouns = [results.mean(model, last, "winogender", c) for c in ("Q", "Q+IF")]
        rows.append([what, *controls, *law, *pronouns])
    heads = ["bias, Q+neutral", "Q+inverted", "admissions, Q", "Q+IF", "Q+IF+CoT"]
    return _table([*heads, "pronouns, Q", "Q+IF"], rows)
