"""What policies answer to PPO's own prompts: sampled from a run, read, counted, and shown."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from selfcorrect.evaluate.scoring.engine import Sample
from selfcorrect.recipes.load import check_recipe
from selfcorrect.recipes.schema import Recipe
from selfcorrect.scripts.study import real_answers, real_models
from selfcorrect.scripts.study.records import read_json
from selfcorrect.train.feedback.feedback import load_feedback
from selfcorrect.train.run import prepare_run, train_run
from tests.support.feedback_runs import recipe_content, write_bbq, write_model


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    data, model = write_bbq(tmp_path_factory.mktemp("data")), tmp_path_factory.mktemp("model")
    return check_recipe(recipe_content(data, write_model(model)), "small")


@pytest.fixture(scope="module")
def run(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run") / "small"
    prepare_run(recipe, run)
    train_run(recipe, run)
    return run


def answering(kind: str, text: str, truncated: bool = False) -> Any:
    """Sample every prompt's answer of that meaning, with `text` after it."""

    def sample_batch(model: Any, tokenizer: Any, ids: Any, keys: list[str], *_: Any) -> Any:
        samples = []
        for key in keys:
            case = PROMPTS[int(key.split()[1])].case
            wanted = kind if case.row.ambiguous else "right"
            (label,) = [one for one in case.labels if case.meaning(one) == wanted]
            samples.append(Sample(f" {label}{text}", truncated, 3))
        return SimpleNamespace(samples=samples)

    return sample_batch


PROMPTS: list[Any] = []


@pytest.mark.parametrize(
    "text, truncated, well_formed",
    [("", False, True), ("", True, False), (" because", False, False)],
)
def test_answers_are_counted_by_request_context_meaning_and_form(
    recipe, run, monkeypatch, text, truncated, well_formed
) -> None:
    PROMPTS[:] = load_feedback(recipe.data, 0).rated
    monkeypatch.setattr(real_answers, "sample_batch", answering("undecided", text, truncated))
    checkpoint = real_answers.find_checkpoints(run)[0]
    counts = pd.DataFrame(real_answers.count_answers(checkpoint, PROMPTS, 4))
    assert set(counts["well_formed"]) == {well_formed}
    by_context = counts.groupby(["context", "meaning"])["number"].sum().to_dict()
    ambiguous = sum(prompt.case.row.ambiguous for prompt in PROMPTS)
    assert by_context == {
        ("ambiguous", "undecided"): ambiguous, ("decided", "right"): 24 - ambiguous,
    }  # fmt: skip
    by_request = counts.groupby("request")["number"].sum()
    assert by_request["fair"] == sum(prompt.request.kind == "fair" for prompt in PROMPTS)


def test_a_run_is_sampled_once_and_each_checkpoint_with_the_same_noise(run, monkeypatch) -> None:
    real_answers.main([str(run)])
    answers = read_json(run / "answers.json")
    assert list(answers) == ["tiny seed 0 step 0", "tiny seed 0 step 2"]
    assert {sum(row["number"] for row in rows) for rows in answers.values()} == {24}
    monkeypatch.setattr(real_answers, "count_answers", None)  # calling it would fail
    real_answers.main([str(run)])
    assert read_json(run / "answers.json") == answers


def test_page_gives_shares_of_what_can_be_read(tmp_path) -> None:
    rows = [
        ("fair", "ambiguous", "undecided", True, 3),
        ("fair", "ambiguous", "stereotype", False, 1),
        ("fair", "ambiguous", real_answers.NO_ANSWER, False, 4),
        ("plain", "ambiguous", "stereotype", True, 5),
        ("plain", "decided", "right", True, 2),
        ("plain", "decided", "wrong", True, 6),
    ]
    names = ("request", "context", "meaning", "well_formed", "number")
    counted = {"tiny seed 0 step 40": [dict(zip(names, row, strict=True)) for row in rows]}
    (tmp_path / "answers.json").write_text(json.dumps(counted))
    ladder = [real_models.Checkpoint("tiny", 0, step, None, None) for step in (0, 40)]
    heads, _, row = real_models._answers(tmp_path, ladder).splitlines()
    cells = dict(zip(heads.split(" | "), row.split(" | "), strict=True))
    assert cells["step"] == "40"
    assert (cells["well-formed"], cells["readable"]) == ("16 of 21", "17 of 21")
    assert cells["right, decided"] == "2 of 8"
    assert (cells["undecided, fair"], cells["undecided, plain"]) == ("3 of 4", "0 of 5")
    assert cells["stereotype, plain"] == "5 of 5"
    assert cells["undecided, inverted"] == "0 of 0"
    assert real_models._answers(tmp_path / "none", ladder) == "Not measured."
