"""Base and reward models are copied from another run only if training would make the same."""

import json
import shutil
from pathlib import Path

import pytest

from selfcorrect.recipes.foundation.checksums import write_record
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.load import load_recipe, save_recipe
from selfcorrect.recipes.schema import Recipe
from selfcorrect.train.run import prepare_run, run_recipe
from selfcorrect.train.stages.reuse import STAGES, copy_stages, reusable_stages
from tests.support.small_runs import SMALL

pytestmark = pytest.mark.usefixtures("few_answers")
QUICK = ["policy.steps=1", "policy.checkpoints=[0, 1]", "evaluate.attach=off"]


def recipe_with(*more: str) -> Recipe:
    return load_recipe("quickstart", [*SMALL, *QUICK, "data.society.corpus.documents=200", *more])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "small"
    run_recipe(recipe_with(), folder, evaluate=False)
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
        ("data.society.requests={plain: 1, task: 1}", ["base"]),
        ("reward.trainer.learning_rate=2e-3", ["base"]),
    ],
)
def test_equal_stages_are_copied_and_the_others_trained(
    source: Path, tmp_path: Path, difference: str, taken: list[str]
) -> None:
    run = tmp_path / "arm"
    recipe = recipe_with("name=arm", difference)
    run_recipe(recipe, run, stages_from=source, evaluate=False)
    for stage in ("base", "reward"):
        assert (stage_bytes(run, stage) == stage_bytes(source, stage)) == (stage in taken)
    facts = json.loads((run / "run.json").read_text())
    commit = json.loads((source / "run.json").read_text())["commit"]
    names = [f"tiny/seed-0/{stage}" for stage in taken]
    assert facts["taken"] == [{"from": "small", "commit": commit, "stages": names}]
    # The run trains to its end, and finished stages are not copied twice.
    policy = run / "tiny/seed-0" / recipe.policy.method
    assert (policy / "checkpoint-1/model.safetensors").is_file()
    assert copy_stages(recipe, run, source, reusable_stages(recipe, source)) == []


@pytest.mark.slow
def test_copied_stage_equals_a_trained_one_bitwise(source: Path, tmp_path: Path) -> None:
    recipe = recipe_with("name=alone", "data.society.raters.share=0.0")
    run_recipe(recipe, tmp_path / "alone", evaluate=False)
    assert stage_bytes(tmp_path / "alone", "base").keys() == stage_bytes(source, "base").keys()
    for name, content in stage_bytes(source, "base").items():
        if name.endswith(".safetensors"):
            assert stage_bytes(tmp_path / "alone", "base")[name] == content


@pytest.mark.slow
@pytest.mark.parametrize(
    ("difference", "key"),
    [
        ("data.society.seed=1", "data.society.seed"),
        ("data.society.corpus.stereotyped=0.8", "data.society.corpus.stereotyped"),
        ("data.society.corpus.requests={plain: 1}", "data.society.corpus.requests.plain"),
        ("base.batch_tokens=999", "base.batch_tokens"),
    ],
)
def test_different_base_models_are_refused_before_anything_is_written(
    source: Path, tmp_path: Path, difference: str, key: str
) -> None:
    with pytest.raises(InputError, match=f"because of {key}$"):
        run_recipe(
            recipe_with("name=arm", difference),
            tmp_path / "arm",
            stages_from=source,
            evaluate=False,
        )
    assert not (tmp_path / "arm").exists()


@pytest.mark.slow
def test_source_without_run_json_is_usable(source: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(source, tmp_path / "copy", ignore=shutil.ignore_patterns("run.json"))
    recipe, run = recipe_with("name=arm"), tmp_path / "arm"
    prepare_run(recipe, run)
    names = ["tiny/seed-0/base", "tiny/seed-0/reward"]
    assert copy_stages(recipe, run, copy, reusable_stages(recipe, copy)) == names
    taken = json.loads((run / "run.json").read_text())["taken"]
    assert taken == [{"from": "small", "commit": None, "stages": names}]


@pytest.mark.parametrize(
    ("template", "stages", "is_refused"),
    [
        ("{{ strftime_now('%d %b') }}", ["base", "reward"], True),
        ("{{ strftime_now('%d %b') }}", ["base"], False),  # pretrained on text without a template
        ("{{ messages }}", ["base", "reward"], False),
    ],
)
def test_stages_with_another_date_are_refused(
    tmp_path: Path, template: str, stages: list[str], is_refused: bool
) -> None:
    """Their texts hold the day on which the other run began."""
    recipe = recipe_with("name=arm")
    run, source = tmp_path / "arm", tmp_path / "source"
    for folder, day in ((run, "2024-07-26"), (source, "2024-07-27")):
        save_recipe(recipe, folder / "recipe.yaml")
        write_record(folder / "run.json", {"chat_template_date": day})
    for stage in STAGES:
        write_record(source / "tiny/seed-0" / stage / "stage.json", {"files": {}})
    (source / "tiny/seed-0/base/chat_template.jinja").write_text(template)
    if is_refused:
        with pytest.raises(InputError, match=r"date 2024-07-27, but .* with 2024-07-26"):
            copy_stages(recipe, run, source, stages)
        assert not list(run.glob("tiny/*/*"))
        write_record(run / "run.json", {"chat_template_date": "2024-07-27"})
    names = [f"tiny/seed-0/{stage}" for stage in stages]
    assert copy_stages(recipe, run, source, stages) == names
    write_record(source / "run.json", {"chat_template_date": "2024-07-29"})
    assert copy_stages(recipe, run, source, stages) == []  # all is here


@pytest.mark.slow
def test_damaged_stage_is_refused(source: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(source, damaged)
    weights = damaged / "tiny/seed-0/base/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    recipe, run = recipe_with("name=arm"), tmp_path / "arm"
    prepare_run(recipe, run)
    with pytest.raises(InputError, match=r"model\.safetensors.*leave out --stages-from"):
        copy_stages(recipe, run, damaged, ["base"])
    assert not (run / "tiny/seed-0/base").exists()


def test_source_must_be_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run folder"):
        reusable_stages(recipe_with(), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("difference", ["seeds=[1]", "models.0.scratch.hidden_size=12"])
def test_model_of_another_shape_or_seed_is_not_copied(
    source: Path, tmp_path: Path, difference: str
) -> None:
    recipe, run = recipe_with("name=arm", difference), tmp_path / "arm"
    prepare_run(recipe, run)
    assert copy_stages(recipe, run, source, reusable_stages(recipe, source)) == []
    assert not list(run.glob("tiny/*/base"))
    assert "taken" not in json.loads((run / "run.json").read_text())


@pytest.mark.slow
def test_trainer_keys_of_a_model_equal_those_of_the_recipe_bitwise(
    tmp_path: Path,
) -> None:
    keys = {
        "base": "learning_rate=2e-3",
        "reward": "learning_rate=3e-4",
        "policy": "num_iterations=1",
    }
    of_all = recipe_with(*(f"{stage}.trainer.{key}" for stage, key in keys.items()))
    of_one = recipe_with(*(f"models.0.trainer.{stage}.{key}" for stage, key in keys.items()))
    run_recipe(of_all, tmp_path / "all", evaluate=False)
    run_recipe(of_one, tmp_path / "one", evaluate=False)
    for stage in ("base", "reward", "ppo/checkpoint-1"):
        weights = (
            tmp_path / run / "tiny/seed-0" / stage / "model.safetensors" for run in ("all", "one")
        )
        first, second = (path.read_bytes() for path in weights)
        assert first == second


def test_wrong_trainer_key_of_a_model_is_one_line(tmp_path: Path) -> None:
    recipe = recipe_with("models.0.trainer.policy.learning_rat=1e-3")
    with pytest.raises(
        InputError, match=r"^models\.0\.trainer: policy\.trainer\.learning_rat: unknown key"
    ):
        run_recipe(recipe, tmp_path / "run", evaluate=False)
    assert not (tmp_path / "run").exists()
