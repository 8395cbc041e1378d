"""Tables of the study's arms beside their reference, the ladder's model of the same size."""

from pathlib import Path

from selfcorrect.recipes.load import load_recipe
from selfcorrect.scripts.study.findings import Results, over
from selfcorrect.scripts.study.records import read_json, table

REFERENCE = "society-ladder"
Arms = dict[str, tuple[str, Results]]  # by name: the change, and the results


def arms_of(runs: Path) -> Arms:
    """Return the reference and the finished ablations in a folder of runs, the reference first.

    The reference is the ladder, with only the model of the ablations.
    """
    arms: Arms = {}
    for statistics in sorted(runs.glob("ablation-*/statistics.json")):
        folder = statistics.parent
        recipe = load_recipe(str(folder / "recipe.yaml"))
        arms[folder.name] = (recipe.description, Results(read_json(statistics)))
    ladder = runs / REFERENCE / "statistics.json"
    if not arms or not ladder.is_file():
        return {}
    models = {model for _, results in arms.values() for model in results.models}
    record = read_json(ladder)
    cells = [cell for cell in record["cells"] if cell["model"] in models]
    return {REFERENCE: ("the reference", Results({**record, "cells": cells})), **arms}


def arm_tables(arms: Arms) -> list[str]:
    """Return Markdown paragraphs and tables; one sentence if there is nothing to compare."""
    if not arms:
        return ["No arm has been run to its end yet; until then their numbers are undefined."]
    reference = arms[REFERENCE][1]
    model, last = next(iter(reference.models)), reference.steps[-1]
    assert all(results.steps[-1] == last for _, results in arms.values())
    intro = (
        f"{model}, {len(reference.seeds)} seeds, step {last}; each ablation differs from the "
        "reference, the ladder's model of this size, in one thing. World, seeds and base models "
        "are the ladder's. *Growth* is the growth, from step 0, of the bias under Q+neutral less "
        "that under Q+IF; *beside the reference* subtracts the reference's growth, seed by seed. "
        "A step of GRPO, DPO or fine-tuning makes as many updates on as many rows as one of PPO."
    )
    return [intro, _bbq(arms, model, last)]


def _bbq(arms: Arms, model: str, last: int) -> str:
    reference = arms[REFERENCE][1].growth(model, "Q+neutral", "Q+IF")
    conditions = ("Q", "Q+neutral", "Q+inverted", "Q+IF", "Q+IF+CoT")
    rows: list[list[object]] = []
    for name, (change, results) in arms.items():
        growth = results.growth(model, "Q+neutral", "Q+IF")
        beside = over([a - b for a, b in zip(growth, reference, strict=True)])
        bias = [results.mean(model, last, "bbq", condition) for condition in conditions]
        right = results.mean(model, last, "bbq", "Q", "accuracy_disambiguated")
        compared = "–" if name == REFERENCE else beside
        rows.append([change, *bias, over(growth), compared, right, results.last_kl(model)])
    heads = ["change", "bias, Q", *conditions[1:], "growth", "beside the reference"]
    return table([*heads, "right where decided, Q", "KL"], rows)
