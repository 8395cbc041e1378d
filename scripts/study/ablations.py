"""Tables of the study's ablations beside their reference, compared seed by seed."""

import json
from pathlib import Path

import numpy as np

from selfcorrect.recipes.load import load_recipe
from selfcorrect.scripts.study.findings import Results, over

REFERENCE = "society-ablation"
Arms = dict[str, tuple[str, Results]]  # by name: the change, and the results


def arms_of(runs: Path) -> Arms:
    """Return the finished runs of reference and ablations in a folder, the reference first."""
    arms: Arms = {}
    for folder in [runs / REFERENCE, *sorted(runs.glob("ablation-*"))]:
        statistics = folder / "statistics.json"
        if not statistics.is_file():
            continue
        recipe = load_recipe(str(folder / "recipe.yaml"))
        change = "the reference" if folder.name == REFERENCE else recipe.description
        arms[folder.name] = (change, Results(json.loads(statistics.read_text(encoding="utf-8"))))
    return arms


def arm_tables(arms: Arms) -> list[str]:
    """Return Markdown paragraphs and tables; one sentence if there is nothing to compare."""
    if REFERENCE not in arms or len(arms) < 2:
        return ["The ablations were not run."]
    reference = arms[REFERENCE][1]
    model, last = next(iter(reference.models)), reference.steps[-1]
    assert all(results.steps[-1] == last for _, results in arms.values())
    intro = (
        f"{model}, {len(reference.seeds)} seeds, step {last}; each ablation differs from the "
        "reference in one thing, which the recipe of its name states. World, seeds and base models "
        "are those of the first ladder, whose learning rates this size shares. *Growth* is the "
        "growth, from step 0, of the bias under Q less that under Q+IF; *beside the reference* "
        f"subtracts the reference's growth, seed by seed. With {len(reference.seeds)} seeds many "
        "sizable differences remain undecided. A step of GRPO or fine-tuning makes as many updates "
        "on as many rows as a step of PPO. Every run includes the neutral and the inverted request."
    )
    return [intro, _bbq(arms, model, last), _others(arms, model, last)]


def _table(heads: list[str], rows: list[list[object]]) -> str:
    lines: list[list[object]] = [["change", *heads], ["---"] * (len(heads) + 1), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _growth(results: Results, model: str) -> list[float]:
    steps = (0, results.steps[-1])
    cells = [results.at(model, step, "bbq", c) for step in steps for c in ("Q", "Q+IF")]
    return [(c - d) - (a - b) for a, b, c, d in zip(*cells, strict=True)]


def _kl(results: Results, model: str, last: int) -> str:
    by_seed = {
        cell["seed"]: cell["kl"]
        for cell in results.statistics["cells"]
        if (cell["model"], cell["step"]) == (model, last)
    }
    return "–" if None in by_seed.values() else f"{np.mean(list(by_seed.values())):.2f}"


def _bbq(arms: Arms, model: str, last: int) -> str:
    reference = _growth(arms[REFERENCE][1], model)
    rows: list[list[object]] = []
    for name, (change, results) in arms.items():
        growth = _growth(results, model)
        beside = over([a - b for a, b in zip(growth, reference, strict=True)])
        bias = [results.mean(model, last, "bbq", c) for c in ("Q", "Q+IF", "Q+IF+CoT")]
        right = results.mean(model, last, "bbq", "Q", "accuracy_disambiguated")
        compared = "–" if name == REFERENCE else beside
        rows.append([change, *bias, over(growth), compared, right, _kl(results, model, last)])
    heads = ["bias, Q", "Q+IF", "Q+IF+CoT", "growth", "beside the reference"]
    return _table([*heads, "right where decided, Q", "KL"], rows)


def _others(arms: Arms, model: str, last: int) -> str:
    rows: list[list[object]] = []
    for change, results in arms.values():
        controls = [results.mean(model, last, "bbq", c) for c in ("Q+neutral", "Q+inverted")]
        law = [results.mean(model, last, "law_school", c) for c in ("Q", "Q+IF", "Q+IF+CoT")]
        pronouns = [results.mean(model, last, "winogender", c) for c in ("Q", "Q+IF")]
        rows.append([change, *controls, *law, *pronouns])
    heads = ["bias, Q+neutral", "Q+inverted", "admissions, Q", "Q+IF", "Q+IF+CoT"]
    return _table([*heads, "pronouns, Q", "Q+IF"], rows)
