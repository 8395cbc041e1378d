"""Every shipped recipe loads; every mistake is one line that names file, key and remedy."""

import copy
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from selfcorrect.recipes.foundation.checksums import flatten
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.foundation.yaml_text import parse_yaml
from selfcorrect.recipes.load import (
    apply_override,
    check_recipe,
    file_schema,
    load_recipe,
    recipe_text,
    shipped_recipes,
    training_digest,
)
from selfcorrect.recipes.schema import Recipe

SMALL = {
    "name": "small",
    "models": [{"name": "tiny", "scratch": {"model_type": "llama", "hidden_size": 8}}],
    "data": {"society": {"seed": 3}},
    "base": {"method": "pretrain"},
    "reward": {},
    "policy": {"steps": 4, "checkpoints": [0, 2, 4]},
}

# Overrides of SMALL, and a part of the message.
WRONG = [
    ("policy.stepz=4", "policy.stepz: unknown key; did you mean steps?"),
    ("data.society.raters.shares=1", "data.society.raters.shares: unknown key; did you mean share"),
    ("policy.checkpoints=[0, 9]", "checkpoints asks for step 9 but the run ends at steps: 4"),
    ("policy.checkpoints=[]", "policy: checkpoints is empty"),
    ("policy.checkpoints=[2, 0]", "policy: checkpoints must be in rising order"),
    ("policy.checkpoints={every: 0}", "checkpoints: every must be a whole number"),
    ("policy.steps=many", "policy.steps: Input should be a valid integer"),
    ("name=../elsewhere", "name: String should match pattern"),
    ("models.0.path=x", "models.0: give either path or scratch"),
    ("data.society.feedback_categories=24", "data.society: feedback_categories must be below"),
    ("data.society=null", "data: give either society, feedback or preferences"),
    ("base=null", "tiny: scratch and base.method: pretrain"),
    ("evaluate.experiments=[]", "evaluate.experiments: List should have at least 1 item"),
    ("evaluate.permutations=2", "evaluate.permutations: Input should be 1, 3 or 6"),
    (
        "models.0.trainer.bass={}",
        "models.0.trainer.bass: Input should be 'base', 'reward' or 'policy'",
    ),
    ("seeds=[1, 1]", "seeds: a seed is given twice"),
    ("models.3.name=x", "models.3.name: 3 is not a position in a list of 1"),
    ("policy.steps.x=1", "policy.steps.x: steps is a value, not a section"),
    ("policy.steps", "write key=value"),
]


@pytest.mark.parametrize(("override", "message"), WRONG)
def test_wrong_recipe_is_one_line(tmp_path: Path, override: str, message: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    with pytest.raises(InputError) as caught:
        load_recipe(str(path), [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b\n", "line 2 duplicate key 'name'"),
        ("name: [a\n", "line 2"),
        ("- a\n- b\n", "not a recipe"),
        ("name: !!python/object/apply:os.system [ls]\n", "line 1"),
    ],
)
def test_wrong_yaml_is_one_line_and_runs_nothing(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_recipe(str(path))
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_from_merges_changes_into_the_parent(tmp_path: Path) -> None:
    write(tmp_path / "small.yaml", yaml.safe_dump(SMALL))
    child = write(
        tmp_path / "other.yaml",
        "from: small.yaml\nname: other\nseeds: [4, 5]\n"
        "data: {society: {raters: {share: 0.0}}}\nppo: {checkpoints: [0, 4]}\n",
    )
    recipe = load_recipe(str(child), ["policy.trainer.beta=0.1"])
    assert (recipe.name, recipe.seeds, recipe.policy.checkpoints) == ("other", [4, 5], [0, 4])
    assert recipe.data.society is not None
    assert (recipe.data.society.seed, recipe.data.society.raters.share) == (3, 0.0)
    assert (recipe.policy.steps, recipe.policy.trainer) == (4, {"beta": 0.1})
    assert load_recipe(str(write(tmp_path / "q.yaml", "from: quickstart\nname: q\n"))).name == "q"
    third = write(tmp_path / "third.yaml", "from: other.yaml\nname: third\nseeds: [6]\n")
    assert load_recipe(str(third)) == recipe.model_copy(
        update={"name": "third", "seeds": [6], "policy": load_recipe(str(child)).policy}
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("from: nowhere.yaml", "a.yaml: from: nowhere.yaml: no such recipe file"),
        ("from: [quickstart]", "a.yaml: from: give the name of another recipe"),
        ("from: b.yaml", "b.yaml: from: a.yaml is itself made from this recipe; name another"),
        ("from: a.yaml", "a.yaml: from: a.yaml is itself made from this recipe"),
        (
            "from: quickstart\nppo: {stepz: 1}",
            "a.yaml: policy.stepz: unknown key; did you mean steps",
        ),
    ],
)
def test_wrong_from_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path / "b.yaml", "from: a.yaml\nname: b\n")
    with pytest.raises(InputError) as caught:
        load_recipe(str(write(tmp_path / "a.yaml", f"name: a\n{text}\n")))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_missing_recipe_lists_the_shipped_ones() -> None:
    with pytest.raises(
        InputError, match=r"nowhere\.yaml: no such recipe file; shipped.*quickstart"
    ):
        load_recipe("nowhere.yaml")


@pytest.mark.parametrize("path", shipped_recipes(), ids=lambda path: path.stem)
def test_shipped_recipe_loads_and_round_trips(path: Path) -> None:
    recipe = load_recipe(str(path))
    assert recipe.name == path.stem
    again = Recipe.model_validate(yaml.safe_load(recipe_text(recipe)))
    assert again == recipe


def test_trainer_keys_of_one_model() -> None:
    content = copy.deepcopy(SMALL)
    content["models"].append(copy.deepcopy(content["models"][0]) | {"name": "large"})
    apply_override(content, "base.trainer.learning_rate=4e-3")
    apply_override(content, "base.trainer.warmup_steps=7")
    apply_override(content, "models.1.trainer.base.learning_rate=1e-3")
    apply_override(content, "models.1.trainer.policy={beta: 0.2}")
    recipe = check_recipe(content, "x")
    assert recipe.of("tiny") == recipe
    large = recipe.of("large")
    assert large.base is not None
    assert large.base.trainer == {"learning_rate": 1e-3, "warmup_steps": 7}
    assert (large.policy.trainer, recipe.policy.trainer) == ({"beta": 0.2}, {})
    assert large.reward == recipe.reward
    assert training_digest(recipe, "large", 0) != training_digest(recipe, "tiny", 0)


def test_trainer_keys_of_one_model_need_their_stage() -> None:
    with pytest.raises(InputError, match=r"trainer\.base, but the recipe has no base"):
        load_recipe("smollm2-lora", ["models.0.trainer.base.learning_rate=1e-3"])


ABLATIONS = [path for path in shipped_recipes() if path.stem.startswith("ablation-")]


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_ablation_differs_from_its_reference_in_one_setting(path: Path) -> None:
    ours, reference = (
        dict(flatten(load_recipe(str(name)).model_dump(mode="json")))
        for name in (path, "society-ablation")
    )
    changed = {key for key in {**ours, **reference} if ours.get(key) != reference.get(key)}
    assert {"name", "description"} <= changed
    changed -= {"name", "description"}
    if ours["policy.method"] == "dpo":
        changed -= {"policy.trainer.beta"}  # which is not the same quantity there
    requests = "data.society.requests"  # one setting, several keys
    assert len({requests if key.startswith(requests) else key for key in changed}) == 1


def test_ablations_are_those_of_the_study() -> None:
    assert len(ABLATIONS) == 12
    ladder, reference = load_recipe("society-ladder"), load_recipe("society-ablation")
    assert reference.models[0] in ladder.models
    assert (reference.data, reference.seeds) == (ladder.data, ladder.seeds)
    assert reference.policy.trainer == ladder.policy.trainer
    assert set(reference.policy.checkpoints) <= set(ladder.policy.checkpoints)


@pytest.mark.parametrize(("name", "percent"), [("fair-0", 0), ("fair-1", 1), ("fair-5", 5)])
def test_doses_of_fairness_are_those_of_their_names(name: str, percent: int) -> None:
    reference, dose = (
        load_recipe(recipe).data.society.requests
        for recipe in ("society-ablation", f"ablation-{name}")
    )
    assert sum(dose.values()) == pytest.approx(1) == sum(reference.values())
    assert reference["fair"] + reference["reasoned"] == pytest.approx(0.25)
    assert dose["fair"] + dose["reasoned"] == pytest.approx(percent / 100)
    others = [dose[kind] / reference[kind] for kind in ("plain", "neutral", "inverted", "task")]
    assert others == pytest.approx([others[0]] * 4)


def test_study_uses_neither_world_nor_seeds_that_were_looked_at() -> None:
    quickstart, ladder = load_recipe("quickstart"), load_recipe("society-ladder")
    ours, theirs = (recipe.data.society.model_dump() for recipe in (quickstart, ladder))
    assert ours.pop("seed") == 0 and theirs.pop("seed") not in (0, 20261125, 20261126)
    assert ours == theirs
    assert len(ladder.seeds) == 10 and not set(ladder.seeds) & {0, 1, 2, 3, 4, 5, 6}
    assert ladder.models[:3] == quickstart.models
    assert ladder.policy.checkpoints == [0, 1, 2, 4, 8, 16, 32, 64, 128]


def test_yaml_1_2_floats() -> None:
    assert parse_yaml("[1e-5, 1.5e3, -2E4]", "x") == [1e-5, 1500.0, -20000.0]


def test_attach_off_is_a_word_not_false() -> None:
    content = copy.deepcopy(SMALL)
    apply_override(content, "evaluate.attach=off")
    assert check_recipe(content, "x").evaluate.attach == "off"


def test_overrides_reach_lists_and_new_sections() -> None:
    content = copy.deepcopy(SMALL)
    apply_override(content, "models.0.name=other")
    apply_override(content, "policy.trainer.learning_rate=1e-4")
    assert content["models"][0]["name"] == "other"
    assert check_recipe(content, "x").policy.trainer == {"learning_rate": 1e-4}


@pytest.mark.parametrize(
    ("asked", "steps", "kept"),
    [
        ("{every: 10}", 25, [0, 10, 20, 25]),
        ("powers of two", 20, [0, 1, 2, 4, 8, 16, 20]),
        ("powers of two", 16, [0, 1, 2, 4, 8, 16]),
        ("[0, 50, 100]", 100, [0, 50, 100]),
    ],
)
def test_checkpoints_are_resolved_to_steps(asked: str, steps: int, kept: list[int]) -> None:
    content = copy.deepcopy(SMALL)
    apply_override(content, f"policy.checkpoints={asked}")
    apply_override(content, f"policy.steps={steps}")
    assert check_recipe(content, "x").policy.checkpoints == kept


def test_digest_covers_exactly_what_decides_the_weights() -> None:
    def digest(*overrides: str) -> str:
        content = copy.deepcopy(SMALL)
        for override in overrides:
            apply_override(content, override)
        return training_digest(check_recipe(content, "x"), "tiny", 0)

    assert digest() == digest("evaluate.limit=10", "launch.jobs=2", "policy.checkpoints=[0]")
    for change in ("policy.steps=5", "data.society.seed=4", "reward.held_out=0.2"):
        assert digest() != digest(change)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40), st.text(max_size=40))
def test_any_override_is_applied_or_refused_in_one_line(key: str, value: str) -> None:
    content = copy.deepcopy(SMALL)
    try:
        apply_override(content, f"{key}={value}")
        check_recipe(content, "x")
    except InputError as error:
        assert str(error)


def test_schema_is_json_and_refuses_unknown_keys() -> None:
    schema = json.loads(json.dumps(file_schema()))
    assert schema["additionalProperties"] is False
    assert {"models", "data", "policy", "from"} <= set(schema["properties"])
    required = [one["required"] for one in schema["anyOf"]]
    assert required == [["from", "name"], ["name", "models", "data", "reward", "policy"]]
    assert not any("required" in section for section in schema["$defs"].values())


def test_old_section_ppo_is_read_as_policy(tmp_path: Path) -> None:
    """Recipes of older versions stay readable; `replaced_by` is refused with the remedy."""
    content = {key: value for key, value in SMALL.items() if key != "policy"}
    old = {**SMALL["policy"], "replaced_by": None}
    assert check_recipe({**content, "ppo": old}, "x") == check_recipe(SMALL, "x")
    saved = tmp_path / "recipe.yaml"
    saved.write_text(yaml.safe_dump({**content, "ppo": old}))
    for asked in ("ppo.steps=7", "policy.steps=7"):
        assert load_recipe(str(saved), [asked]).policy.steps == 7
    child = tmp_path / "child.yaml"
    child.write_text("from: quickstart\nname: child\nppo: {steps: 70}\n")
    assert load_recipe(str(child), ["ppo.trainer.beta=0.1"]).policy.steps == 70
    with pytest.raises(InputError, match=r"x: ppo: .* give only policy"):
        check_recipe({**SMALL, "ppo": old}, "x")
    with pytest.raises(InputError, match=r"policy\.method: write policy: \{method: grpo\}"):
        check_recipe({**content, "ppo": {**old, "replaced_by": {"method": "grpo"}}}, "x")
