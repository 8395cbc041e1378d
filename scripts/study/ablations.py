"""Tables of the study's ablations beside their reference, compared seed by seed."""

from pathlib import Path

from selfcorrect.recipes.load import load_recipe
from selfcorrect.scripts.study.findings import Results, over
from selfcorrect.scripts.study.records import read_json, table

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
        arms[folder.name] = (change, Results(read_json(statistics)))
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


def _bbq(arms: Arms, model: str, last: int) -> str:
    reference = arms[REFERENCE][1].growth(model, "Q", "Q+IF")
    rows: list[list[object]] = []
    for name, (change, results) in arms.items():
        growth = results.growth(model, "Q", "Q+IF")
        beside = over([a - b for a, b in zip(growth, reference, strict=True)])
        bias = [results.mean(model, last, "bbq", c) for c in ("Q", "Q+IF", "Q+IF+CoT")]
        right = results.mean(model, last, "bbq", "Q", "accuracy_disambiguated")
        compared = "–" if name == REFERENCE else beside
        rows.append([change, *bias, over(growth), compared, right, results.last_kl(model)])
    heads = ["change", "bias, Q", "Q+IF", "Q+IF+CoT", "growth", "beside the reference"]
    return table([*heads, "right where decided, Q", "KL"], rows)


def _others(arms: Arms, model: str, last: int) -> str:
    rows: list[list[object]] = []
    for change, results in arms.values():
        controls = [results.mean(model, last, "bbq", c) for c in ("Q+neutral", "Q+inverted")]
        law = [results.mean(model, last, "law_school", c) for c in ("Q", "Q+IF", "Q+IF+CoT")]
        pronouns = [results.mean(model, last, "winogender", c) for c in ("Q", "Q+IF")]
        rows.append([change, *controls, *law, *pronouns])
    heads = ["change", "bias, Q+neutral", "Q+inverted", "admissions, Q", "Q+IF", "Q+IF+CoT"]
    return table([*heads, "pronouns, Q", "Q+IF"], rows)
