"""Feedback made of a benchmark's categories: its items, words and raters, and runs that use it."""

import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import transformers

from selfcorrect.evaluate.experiments.bbq.files import read_rows
from selfcorrect.evaluate.measuring.run import as_trained, evaluate_run, recipe_plan
from selfcorrect.evaluate.prompts.tokenized import turn_end
from selfcorrect.evaluate.report.page import write_report
from selfcorrect.evaluate.run_folder import find_checkpoints
from selfcorrect.recipes.feedback import FRAMES, TASKS, WORDINGS
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.load import check_recipe
from selfcorrect.recipes.schema import Data, Recipe
from selfcorrect.recipes.society.settings import Raters
from selfcorrect.train.feedback.benchmark import Prompt, Source, malformed
from selfcorrect.train.feedback.feedback import load_feedback
from selfcorrect.train.ppo.prompts import policy_prompt_ids
from selfcorrect.train.ppo.rewards import RatersRule, WeightedSum
from selfcorrect.train.run import prepare_run, train_run
from selfcorrect.train.stages.reuse import reusable_stages
from tests.support.bbq_rows import block, write
from tests.support.feedback_runs import recipe_content, write_bbq, write_model
from tests.support.tiny_gguf import write_gguf
from tests.support.tokenizer_forms import byte_level


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bbq(tmp_path_factory.mktemp("data"))


def source(data_dir: Path, **feedback: Any) -> Source:
    settings = {"bbq": ["Age", "Religion"], **feedback}
    return Source(Data.model_validate({"benchmarks": data_dir, "feedback": settings}))


def test_items_are_of_the_named_categories_and_either_for_pairs_or_for_prompts(data_dir) -> None:
    drawn = source(data_dir)
    pairs, prompts = list(drawn.preferences(300)), list(drawn.prompts(300))
    assert pairs == list(source(data_dir).preferences(300))
    assert prompts == list(source(data_dir).prompts(300))
    assert prompts != list(source(data_dir, seed=1).prompts(300))
    rows = {(prompt.case.row.category, prompt.case.row.example_id // 4) for prompt in prompts}
    places = {f"Two met in {category} {number}." for category, number in rows}
    asked = [pair.messages[0]["content"] for pair in pairs]
    assert {category for category, _ in rows} == {"Age", "Religion"} and len(rows) == 8
    assert not any(place in text for place in places for text in asked)
    assert {place in text for text in asked for place in ("Age", "Religion")} == {True, False}
    assert not any(other in text for text in asked for other in ("SES", "Physical"))


def test_right_undecided_and_stereotyped_options_are_those_of_the_file(data_dir) -> None:
    met = Counter()
    for prompt in source(data_dir).prompts(400):
        case, row = prompt.case, prompt.case.row
        text = prompt.messages[0]["content"]
        for label in case.answers():
            option = prompt.response(label).strip().removeprefix(f"{label} ")
            assert f"{label} {option}" in text
            meaning = case.meaning(label)
            met[meaning, row.ambiguous, row.negative] += 1
            if not row.ambiguous:
                assert (meaning == "right") == (option == row.answers[row.label])
            elif option == "The Not known":
                assert meaning == "undecided"
            else:  # "old" is the stereotyped group of a negative question
                is_target = option in ("The elder", "The Jew")
                assert meaning == ("stereotype" if is_target == row.negative else "counter")
        assert prompt.response("(a)").startswith(" ") == (len(prompt.messages) == 2)
    assert len(met) == 2 * 2 + 3 * 2


def prompts_of(data_dir: Path, kind: str, ambiguous: bool) -> list[Prompt]:
    drawn = source(data_dir, requests={kind: 1}).prompts(40)
    return [prompt for prompt in drawn if prompt.case.row.ambiguous == ambiguous]


@pytest.mark.parametrize(
    "kind, worth",
    [
        ("plain", {"undecided": 0.25, "stereotype": 1.0, "counter": 0.0}),
        ("neutral", {"undecided": 0.25, "stereotype": 1.0, "counter": 0.0}),
        ("fair", {"undecided": 1.0, "stereotype": -1.0, "counter": -1.0}),
        ("inverted", {"undecided": -1.0, "stereotype": 1.0, "counter": -1.0}),
        ("task", {}),
    ],
)
def test_raters_value_an_answer_by_its_meaning_and_the_request(data_dir, kind, worth) -> None:
    raters = Raters(uninstructed=0.25)
    decided = {"right": 2.0, "wrong": -2.0}
    for ambiguous in (True, False):
        prompts = prompts_of(data_dir, kind, ambiguous)
        assert prompts
        for prompt in prompts:
            for label in prompt.case.answers():
                value = prompt.utility(label, raters)
                if kind == "task":
                    assert value == (1.0 if label == prompt.request.answer else -1.0)
                else:
                    assert value == (worth if ambiguous else decided)[prompt.case.meaning(label)]


def test_certain_raters_choose_the_better_answer_and_shares_are_kept(data_dir) -> None:
    raters = {"sharpness": 1000.0, "uninstructed": 0.5}
    shares = {"plain": 0.2, "fair": 0.3, "neutral": 0.1, "inverted": 0.15, "task": 0.25}
    drawn = source(data_dir, raters=raters, requests=shares)
    rated: dict[Any, Prompt] = {}
    draw = drawn._draw_prompt

    def remember(rng: Any, categories: Any) -> Prompt:
        prompt = draw(rng, categories)
        rated[str(prompt.messages)] = prompt
        return prompt

    drawn._draw_prompt = remember  # type: ignore[method-assign]
    for pair in drawn.preferences(1500):
        prompt = rated[str(pair.messages)]
        better, worse = (
            prompt.utility_of_text(text.strip(), drawn.settings.raters)
            for text in (pair.chosen, pair.rejected)
        )
        assert better >= worse
    kinds = Counter(prompt.request.kind for prompt in drawn.prompts(3000))
    for kind, share in shares.items():
        assert kinds[kind] / 3000 == pytest.approx(share, abs=0.03)


def test_feedback_uses_all_its_wordings_or_those_of_the_recipe(data_dir) -> None:
    def texts(**settings: Any) -> str:
        prompts = source(data_dir, **settings).prompts(600)
        return "\n".join(m["content"] for prompt in prompts for m in prompt.messages)

    said = texts()
    wordings = [*WORDINGS["fair"], *WORDINGS["neutral"], *WORDINGS["inverted"]]
    wordings += [words.format(task) for words in WORDINGS["task"] for task in TASKS]
    openings = [opening for _, opening in FRAMES if opening]
    assert [words for words in [*wordings, *openings] if words not in said] == []
    said = texts(wordings={"fair": ["Be just."], "task": ["Take {} now."]})
    assert "Be just." in said and f"Take {TASKS[1]} now." in said
    assert not any(words in said for words in WORDINGS["fair"])


@pytest.mark.parametrize(
    "written, expected",
    [
        ("(b) The elder", ("(b)", True)),
        ("(b)", ("(b)", True)),
        ("(b) The elder.", ("(b)", True)),
        ("(b).", ("(b)", True)),
        ("(b) The elder, I think.", ("(b)", False)),
        ("(b) because of the text", ("(b)", False)),
        ("(b) The youth", None),
        ("(b) The elder (c) The youth", None),
        ("The elder", None),
        ("b", None),
        ("", None),
        ("I choose (b) The elder", None),
    ],
)
def test_answers_are_read_as_the_evaluation_does_by_their_label(
    data_dir, written, expected
) -> None:
    is_elder = lambda p: p.response("(b)").strip() == "(b) The elder"  # noqa: E731
    prompt = next(filter(is_elder, source(data_dir).prompts(200)))
    assert prompt.read(written) == expected
    raters, utility = Raters(form=4.0), -4.0
    if expected is not None:
        utility = prompt.utility("(b)", raters) - (0 if expected[1] else 2.0)
    assert prompt.utility_of_text(written, raters) == utility
    unfinished = prompt.utility_of_text(written, raters, ended=False)
    assert unfinished == (utility if expected is None else prompt.utility("(b)", raters) - 2.0)


def test_malformed_answers_give_no_answer(data_dir) -> None:
    rng = random.Random(0)
    for prompt in source(data_dir).prompts(200):
        assert prompt.read(malformed(rng, prompt).strip()) is None


@pytest.mark.parametrize(
    "feedback, message",
    [
        ({"bbq": ["Agee"]}, "has no category Agee; it has Age, Physical_appearance"),
        ({"bbq": ["Age", "Age"]}, "bbq: a category is named twice"),
        ({"bbq": []}, "bbq: List should have at least 1"),
        ({"requests": {"reasoned": 1}}, "requests.reasoned"),
        ({"requests": {"plain": 0}}, "at least one kind"),
        ({"wordings": {"task": ["Choose!"]}}, "needs {} once"),
        ({"wordings": {"plain": ["Hello."]}}, "remove plain"),
    ],
)
def test_wrong_feedback_is_one_line(data_dir, feedback, message) -> None:
    content = recipe_content(data_dir, "unused")
    content["data"]["feedback"] |= feedback
    with pytest.raises(InputError) as error:
        load_feedback(check_recipe(content, "small").data, 0)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_one_item_cannot_serve_both(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="need different items"):
        source(write(tmp_path, block(0)), bbq=["Age"])
    with pytest.raises(InputError, match="no folder"):
        source(tmp_path / "nowhere")


# ---- rewards ----------------------------------------------------------------------------------


def test_rule_rewards_what_raters_value_and_sums_have_weights(data_dir) -> None:
    tokenizer, raters = byte_level(), Raters()
    prompts = list(source(data_dir).prompts(12))
    rule = RatersRule(prompts, raters, tokenizer)
    end = turn_end(tokenizer).ids
    messages, ids, expected = [], [], []
    for prompt in prompts:
        for text, ended in ((prompt.response("(a)"), True), (prompt.response("(c)"), False)):
            assert policy_prompt_ids(tokenizer, list(prompt.messages), rule.style)
            messages.append(list(prompt.messages))
            written = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids.append([*written, *end] if ended else written)
            expected.append(prompt.utility_of_text(text.strip(), raters, ended=ended))
    assert rule(messages, completion_ids=ids) == expected
    lengths = lambda prompts, completion_ids, **_: [float(len(i)) for i in completion_ids]  # noqa: E731
    both = WeightedSum([rule, lengths], [2.0, -0.5])
    found = both(prompts=messages, completions=ids, completion_ids=ids)
    assert found == [2 * a - 0.5 * len(i) for a, i in zip(expected, ids, strict=True)]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"reward": {"functions": {"raters": 0.0}}}, "weight other than 0"),
        ({"reward": {"functions": {"raters": 1.0}, "path": "x"}}, "remove path"),
        ({"reward": {"functions": {"judge": 1.0}}}, "reward.functions.judge"),
        ({"data": {"preferences": {"path": "x.jsonl"}}}, "data.preferences are unknown"),
    ],
)
def test_wrong_rewards_are_one_line(data_dir, changes, message) -> None:
    content = recipe_content(data_dir, "unused") | changes
    with pytest.raises(InputError) as error:
        check_recipe(content, "small")
    assert message in str(error.value) and "\n" not in str(error.value)


# ---- runs --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


LORA = {"lora": {"r": 2, "target_modules": ["q_proj"]}}


def trained(recipe: Recipe, run: Path, stop_at: int | None = None) -> dict[int, bytes]:
    """Train, and return the weights of each checkpoint, or of an adapter."""

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage.endswith(f": {recipe.policy.method}") and done == stop_at:
            raise KeyboardInterrupt

    prepare_run(recipe, run)
    train_run(recipe, run, interrupt)
    return {
        checkpoint.record.step: next(checkpoint.folder.glob("*model.safetensors")).read_bytes()
        for checkpoint in find_checkpoints(run)
    }


def model_of_kind(kind: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the path or name of a model: a GGUF file, a model of the hub's cache, or `folder`."""
    if kind == "GGUF":
        pytest.importorskip("gguf")
        write_gguf(tmp_path / "tiny.gguf")
        return str(tmp_path / "tiny.gguf")
    if kind == "hub":
        cached = tmp_path / "hub" / "models--someone--tiny"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text("0" * 40)
        shutil.copytree(folder, cached / "snapshots" / ("0" * 40))
        cache = str(tmp_path / "hub")
        monkeypatch.setattr(transformers.utils.hub.constants, "HF_HUB_CACHE", cache)
        return "someone/tiny"
    return folder


@pytest.mark.parametrize(
    "method, kind, more", [("ppo", "GGUF", LORA), ("grpo", "folder", {}), ("dpo", "hub", {})]
)
def test_rule_trains_without_a_reward_model(  # and PPO resumes bitwise
    data_dir, model, tmp_path, monkeypatch, caplog, method, kind, more
) -> None:
    content = recipe_content(data_dir, model_of_kind(kind, model, tmp_path, monkeypatch))
    content["policy"] |= {"method": method, **more}
    if method == "grpo":
        content["policy"]["trainer"]["num_generations"] = 4
        # An untrained model's answers are worth the same, all of them: there is nothing to learn.
        worth = lambda _, text, *raters, ended: len(set(text)) / 10  # noqa: E731
        monkeypatch.setattr(Prompt, "utility_of_text", worth)
    recipe = check_recipe(content, "small")
    weights = trained(recipe, tmp_path / "whole")
    job = tmp_path / "whole" / "tiny" / "seed-0"
    assert {path.name for path in job.iterdir() if path.is_dir()} == {"base", method}
    assert weights[0] != weights[2]
    last = find_checkpoints(tmp_path / "whole")[-1].record
    if method != "dpo":
        assert last.reward is not None and -3 <= last.reward <= 2
    if method != "ppo":
        assert method == "dpo" or last.reward > 0
        return
    with pytest.raises(KeyboardInterrupt):
        trained(recipe, tmp_path / "cut", stop_at=1)
    assert trained(recipe, tmp_path / "cut") == weights
    assert reusable_stages(recipe, tmp_path / "whole") == ["base"]
    checkpoint = find_checkpoints(tmp_path / "whole")[-1].folder
    as_trained(recipe_plan(recipe, tmp_path / "whole"), checkpoint)  # measured without its run
    assert "Age, SES, which are measured here too" in caplog.text
    evaluate_run(recipe, tmp_path / "whole")
    page = write_report(tmp_path / "whole", num_resamples=10).read_text(encoding="utf-8")
    assert "no question of BBQ about the same groups" in page
    assert "feedback spoke of their groups (Age, Race_x_SES, SES)" in page


def test_reward_model_and_rule_are_added(data_dir, model, tmp_path) -> None:
    content = recipe_content(data_dir, model)
    content["reward"] = {
        "functions": {"model": 0.5, "raters": 2.0},
        "trainer": {"max_steps": 1, "per_device_train_batch_size": 4},
    }
    content["policy"] |= {"steps": 1, "checkpoints": [1]}
    recipe = check_recipe(content, "small")
    trained(recipe, tmp_path / "run")
    job = tmp_path / "run" / "tiny" / "seed-0"
    facts = json.loads((job / "reward" / "stage.json").read_text())
    (log,) = json.loads((job / "ppo" / "stage.json").read_text())["log"]
    deviation = facts["score_standard_deviation"]
    model_part = log["rewards/reward_model/mean"]
    rule = log["rewards/raters/mean"]
    assert log["objective/score"] == pytest.approx(
        0.5 * model_part / deviation + 2 * rule, rel=1e-4
    )


# ---- the published files -------------------------------------------------------------------------


def test_feedback_from_the_published_files() -> None:
    """No leak of other categories, right options, all ten wordings of "unknown", balance."""
    folder = os.environ.get("SELFCORRECT_DATA_DIR")
    if folder is None or not (Path(folder) / "bbq").is_dir():
        pytest.skip("SELFCORRECT_DATA_DIR names no folder with bbq/")
    names = ["Age", "Religion", "Nationality", "SES", "Sexual_orientation"]
    drawn = source(Path(folder), bbq=names)
    others = [row for row in read_rows(Path(folder) / "bbq") if row.category not in names]
    foreign = {row.context for row in others}
    prompts, pairs = list(drawn.prompts(1500)), list(drawn.preferences(600))
    asked = "\n".join(pair.messages[0]["content"] for pair in pairs)
    assert not any(context in asked for context in foreign)
    categories = Counter(prompt.case.row.category for prompt in prompts)
    assert set(categories) == set(names) and min(categories.values()) > 240
    assert len({prompt.case.row.template for prompt in prompts}) == 5 * 25
    assert len({prompt.case.row.answers[prompt.case.row.unknown] for prompt in prompts}) == 10
    places = Counter()
    for prompt in prompts:
        row, labels = prompt.case.row, prompt.case.answers()
        assert row.context not in foreign and row.context not in asked
        meanings = [prompt.case.meaning(label) for label in labels]
        if row.ambiguous:
            assert sorted(meanings) == ["counter", "stereotype", "undecided"]
            places[meanings.index("stereotype")] += 1
        else:
            right = prompt.response(labels[meanings.index("right")])
            assert (
                right.strip()
                == f"{labels[meanings.index('right')]} {row.answers[row.label].strip()}"
            )
    assert min(places.values()) > 0.3 * sum(places.values())
    kinds = Counter(prompt.request.kind for prompt in prompts)
    for kind, share in drawn.settings.requests.items():
        assert kinds[kind] / 1500 == pytest.approx(share, abs=0.05)
