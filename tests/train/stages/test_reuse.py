"""Base and reward models of another run: taken where they would be the same, and nowhere else."""

import json
from pathlib import Path

import pytest

from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.load import load_recipe
from selfcorrect.recipes.schema import Recipe
from selfcorrect.scripts.commands.train import train_ladder
from selfcorrect.train.run import open_run
from selfcorrect.train.stages.reuse import reusable, take_stages
from tests.drills.kill import RECIPE as SMALL

QUICK = ["policy.steps=1", "policy.checkpoints=[0, 1]", "evaluate.attach=off"]


def recipe_with(*more: str) -> Recipe:
    return load_recipe("quickstart", [*SMALL, *QUICK, "data.society.corpus.documents=200", *more])


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other") / "small"
    train_ladder(recipe_with(), folder)
    return folder


def stage_bytes(run: Path, stage: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (run / "tiny/seed-0" / stage).iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("difference", "taken"),
    [
        ("policy.trainer.beta=0.1", ["base", "reward"]),
        ("policy.method=sft", ["base", "reward"]),
        ("data.society.raters.share=0.0", ["base"]),
        ("data.society.held_out=false", ["base"]),
        ("reward.trainer.learning_rate=2e-3", ["base"]),
    ],
)
def test_what_would_be_the_same_is_taken_and_the_rest_is_trained(
    other: Path, tmp_path: Path, difference: str, taken: list[str]
) -> None:
    run = tmp_path / "arm"
    recipe = recipe_with("name=arm", difference)
    train_ladder(recipe, run, stages_from=other)
    for stage in ("base", "reward"):
        assert (stage_bytes(run, stage) == stage_bytes(other, stage)) == (stage in taken)
    facts = json.loads((run / "run.json").read_text())
    commit = json.loads((other / "run.json").read_text())["commit"]
    names = [f"tiny/seed-0/{stage}" for stage in taken]
    assert facts["taken"] == [{"from": "small", "commit": commit, "stages": names}]
    # The run trains to its end, and what is there is not taken twice.
    assert (run / "tiny/seed-0/ppo/checkpoint-1/model.safetensors").is_file()
    assert take_stages(recipe, run, other, reusable(recipe, other)) == []


@pytest.mark.slow
def test_what_is_taken_is_what_training_gives(other: Path, tmp_path: Path) -> None:
    recipe = recipe_with("name=alone", "data.society.raters.share=0.0")
    train_ladder(recipe, tmp_path / "alone")
    assert stage_bytes(tmp_path / "alone", "base").keys() == stage_bytes(other, "base").keys()
    for name, content in stage_bytes(other, "base").items():
        if name.endswith(".safetensors"):
            assert stage_bytes(tmp_path / "alone", "base")[name] == content


@pytest.mark.slow
@pytest.mark.parametrize(
    ("difference", "key"),
    [
        ("data.society.seed=1", "data.society.seed"),
        ("data.society.corpus.stereotyped=0.8", "data.society.corpus.stereotyped"),
        ("base.batch_tokens=999", "base.batch_tokens"),
    ],
)
def test_other_base_models_are_refused_before_anything_is_written(
    other: Path, tmp_path: Path, difference: str, key: str
) -> None:
    with pytest.raises(InputError, match=f"differs in {key}$"):
        train_ladder(recipe_with("name=arm", difference), tmp_path / "arm", stages_from=other)
    assert not (tmp_path / "arm").exists()


@pytest.mark.slow
def test_a_run_copied_without_its_facts_still_gives_its_models(other: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(other, tmp_path / "copy", ignore=shutil.ignore_patterns("run.json"))
    recipe, run = recipe_with("name=arm"), tmp_path / "arm"
    open_run(recipe, run)
    names = ["tiny/seed-0/base", "tiny/seed-0/reward"]
    assert take_stages(recipe, run, copy, reusable(recipe, copy)) == names
    taken = json.loads((run / "run.json").read_text())["taken"]
    assert taken == [{"from": "small", "commit": None, "stages": names}]


@pytest.mark.slow
def test_a_damaged_model_is_not_taken(other: Path, tmp_path: Path) -> None:
    import shutil

    damaged = tmp_path / "damaged"
    shutil.copytree(other, damaged)
    weights = damaged / "tiny/seed-0/base/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    recipe, run = recipe_with("name=arm"), tmp_path / "arm"
    open_run(recipe, run)
    with pytest.raises(InputError, match=r"model\.safetensors.*leave --stages-from out"):
        take_stages(recipe, run, damaged, ["base"])
    assert not (run / "tiny/seed-0/base").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run"):
        reusable(recipe_with(), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("difference", ["seeds=[1]", "models.0.scratch.hidden_size=12"])
def test_a_model_of_another_shape_or_seed_is_left_where_it_is(
    other: Path, tmp_path: Path, difference: str
) -> None:
    recipe, run = recipe_with("name=arm", difference), tmp_path / "arm"
    open_run(recipe, run)
    assert take_stages(recipe, run, other, reusable(recipe, other)) == []
    assert not list(run.glob("tiny/*/base"))
    assert "taken" not in json.loads((run / "run.json").read_text())


@pytest.mark.slow
def test_a_models_own_trainer_keys_train_what_the_same_keys_of_the_recipe_train(
    tmp_path: Path,
) -> None:
    keys = {
        "base": "learning_rate=2e-3",
        "reward": "learning_rate=3e-4",
        "policy": "num_iterations=1",
    }
    of_all = recipe_with(*(f"{stage}.trainer.{key}" for stage, key in keys.items()))
    of_one = recipe_with(*(f"models.0.trainer.{stage}.{key}" for stage, key in keys.items()))
    train_ladder(of_all, tmp_path / "all")
    train_ladder(of_one, tmp_path / "one")
    for stage in ("base", "reward", "ppo/checkpoint-1"):
        weights = (
            tmp_path / run / "tiny/seed-0" / stage / "model.safetensors" for run in ("all", "one")
        )
        first, second = (path.read_bytes() for path in weights)
        assert first == second


def test_a_models_own_wrong_key_is_one_line_that_names_the_model(tmp_path: Path) -> None:
    recipe = recipe_with("models.0.trainer.policy.learning_rat=1e-3")
    with pytest.raises(
        InputError, match=r"^models\.0\.trainer: policy\.trainer\.learning_rat: unknown key"
    ):
        train_ladder(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
