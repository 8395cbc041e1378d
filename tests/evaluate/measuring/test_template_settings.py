"""Arguments and date, which a chat template reads besides the dialogue, are fixed and recorded."""

import datetime
import json

import pandas as pd
import pytest
from tokenizers.processors import TemplateProcessing
from transformers.utils import chat_template_utils

from selfcorrect.evaluate.measuring.cell_files import read_settings, recorded_date
from selfcorrect.evaluate.measuring.measure import measure
from selfcorrect.evaluate.measuring.run import as_trained, recipe_plan, run_date, run_style
from selfcorrect.evaluate.run_folder import CheckpointRecord
from selfcorrect.recipes.foundation.checksums import write_record
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.load import load_recipe, training_digest
from selfcorrect.scripts.commands.evaluate import template_arguments, template_date
from tests.support.tiny_models import CHAT_TEMPLATE, WORDS, tiny_model, tiny_plan, tiny_tokenizer

DAY, LATER = "2024-07-26", "2024-07-27"
DATED = "{{ strftime_now('%d %B') }} " + CHAT_TEMPLATE


def tokenizer_with(template):
    tokenizer = tiny_tokenizer([*WORDS, "26", "27", "July"])
    tokenizer.chat_template = template
    return tokenizer


def set_today(monkeypatch, date):
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime.fromisoformat(date)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


def measured(tmp_path, template, out="out", **settings):
    tokenizer = tokenizer_with(template)
    plan = tiny_plan(tmp_path / "data", ["Q", "Q+IF+CoT"], **settings)
    paths = measure(plan, tiny_model(vocabulary=len(tokenizer)), tokenizer, tmp_path / out)
    return [pd.read_parquet(path) for path in paths], [read_settings(path) for path in paths], paths


def test_rows_do_not_depend_on_the_day_of_the_measurement(tmp_path, monkeypatch):
    set_today(monkeypatch, DAY)
    first, settings, _ = measured(tmp_path, DATED, date=DAY)
    set_today(monkeypatch, LATER)
    again, _, _ = measured(tmp_path, DATED, "again", date=DAY)
    other, _, _ = measured(tmp_path, DATED, "other", date=LATER)
    for frame, same, different in zip(first, again, other, strict=True):
        pd.testing.assert_frame_equal(frame, same)
        assert not frame["logprobs"].equals(different["logprobs"])
    assert {s["chat_template_date"] for s in settings} == {DAY}


def test_cells_of_another_date_are_measured_again(tmp_path):
    _, _, paths = measured(tmp_path, DATED, date=DAY)
    times = [path.stat().st_mtime_ns for path in paths]
    measured(tmp_path, DATED, date=DAY)
    assert [path.stat().st_mtime_ns for path in paths] == times
    _, settings, _ = measured(tmp_path, DATED, date=LATER)
    assert {s["chat_template_date"] for s in settings} == {LATER}
    assert all(path.stat().st_mtime_ns > time for path, time in zip(paths, times, strict=True))


@pytest.mark.parametrize("changed", ["template", "vocabulary", "frame"])
def test_cells_of_another_template_or_tokenizer_are_measured_again(tmp_path, changed):
    """The weights are the same: the folder of a model was edited between two evaluations."""
    plan = tiny_plan(tmp_path / "data", ["Q", "Q+IF+CoT"])
    tokenizer = tokenizer_with(CHAT_TEMPLATE)
    model = tiny_model(vocabulary=len(tokenizer))
    paths = measure(plan, model, tokenizer, tmp_path / "out")
    times = [path.stat().st_mtime_ns for path in paths]
    first = [pd.read_parquet(path)["logprobs"] for path in paths]
    tokenizer("the answer", padding="max_length", max_length=9, truncation=True)
    measure(plan, model, tokenizer, tmp_path / "out")
    assert [path.stat().st_mtime_ns for path in paths] == times

    other = tokenizer_with(CHAT_TEMPLATE)
    if changed == "template":
        other.chat_template = "please " + CHAT_TEMPLATE
    elif changed == "vocabulary":
        swapped = {"was": "is", "is": "was"}
        other = tiny_tokenizer([swapped.get(word, word) for word in [*WORDS, "26", "27", "July"]])
        other.chat_template = CHAT_TEMPLATE
    else:
        frame = TemplateProcessing("<unk> $A", None, [("<unk>", 3)])
        other.backend_tokenizer.post_processor = frame
        other.chat_template = tokenizer.chat_template = None
        paths = measure(plan, model, tokenizer, tmp_path / "out")
        first = [pd.read_parquet(path)["logprobs"] for path in paths]
    measure(plan, model, other, tmp_path / "out")
    for path, logprobs in zip(paths, first, strict=True):
        assert not pd.read_parquet(path)["logprobs"].equals(logprobs)


def test_a_template_without_date_is_measured_once(tmp_path):
    _, settings, paths = measured(tmp_path, CHAT_TEMPLATE, date=DAY)
    times = [path.stat().st_mtime_ns for path in paths]
    measured(tmp_path, CHAT_TEMPLATE, date=LATER)
    assert [path.stat().st_mtime_ns for path in paths] == times
    assert not any("chat_template_date" in s for s in settings)


def test_arguments_reach_the_template_and_are_recorded(tmp_path):
    template = CHAT_TEMPLATE + "{% if polite %}please {% endif %}"
    plain, settings, _ = measured(tmp_path, template)
    assert not any("chat_template_kwargs" in s for s in settings)
    polite, settings, _ = measured(tmp_path, template, chat_template_kwargs={"polite": True})
    assert all(s["chat_template_kwargs"] == {"polite": True} for s in settings)
    assert not plain[0]["logprobs"].equals(polite[0]["logprobs"])
    with pytest.raises(InputError, match=r"chat_template_kwargs\.tokenize: .*remove the key"):
        tiny_plan(tmp_path / "data", ["Q"], chat_template_kwargs={"tokenize": True})


def test_models_of_one_output_get_the_same_date(tmp_path):
    assert recorded_date(tmp_path) is None
    measured(tmp_path, DATED, "evaluations/first/0a", date=DAY)
    measured(tmp_path, CHAT_TEMPLATE, "evaluations/second/0b", date=LATER)
    out = tmp_path / "evaluations"
    assert recorded_date(out) == DAY
    assert template_date(None, out) == DAY and template_date(LATER, out) == LATER
    with pytest.raises(InputError, match=r"--date tomorrow: write YYYY-MM-DD"):
        template_date("tomorrow", out)


def test_template_arguments_of_the_command_line_are_yaml():
    given = ["enable_thinking=false", "date_string=26 Jul 2024", "level=2"]
    assert template_arguments(given) == {
        "enable_thinking": False,
        "date_string": "26 Jul 2024",
        "level": 2,
    }
    with pytest.raises(InputError, match="write NAME=VALUE"):
        template_arguments(["enable_thinking"])


def test_date_of_a_run_is_that_of_its_start(tmp_path):
    recipe = load_recipe("quickstart")
    assert run_date(recipe, tmp_path) == datetime.date.today().isoformat()
    write_record(tmp_path / "run.json", {"chat_template_date": DAY})
    assert run_date(recipe, tmp_path) == DAY
    assert run_date(recipe, tmp_path / "new", stages_from=tmp_path) == DAY
    given = load_recipe("quickstart", [f"chat_template_date={LATER}"])
    assert run_date(given, tmp_path) == LATER
    polite = load_recipe("quickstart", ["chat_template_kwargs={polite: true}"])
    assert run_style(polite, tmp_path).arguments == {"polite": True}
    for cell in recipe_plan(polite, tmp_path).cells:
        assert (cell.style.date, cell.style.arguments) == (DAY, {"polite": True})
    digests = {training_digest(r, r.models[0].name, 0) for r in (recipe, given, polite)}
    assert len(digests) == 3
    assert json.loads(polite.model_dump_json())["chat_template_kwargs"] == {"polite": True}


def test_checkpoint_is_asked_as_it_was_trained(tmp_path):
    facts = {
        **{"model": "m", "parameters": 1, "seed": 0, "step": 0, "episodes": 0, "tokens": 0},
        **{"optimizer_updates": 0, "kl": None, "reward": None, "recipe_digest": "", "versions": {}},
    }
    keys = {"chat_template_kwargs": {"polite": True}, "chat_template_date": DAY}
    CheckpointRecord(**facts, **keys).write(tmp_path)
    plan = tiny_plan(tmp_path / "data", ["Q"], date=LATER, chat_template_kwargs={"polite": False})
    trained = as_trained(plan, tmp_path).cells[0].style
    assert (trained.arguments, trained.date) == ({"polite": True}, DAY)
    given = as_trained(plan, tmp_path, arguments=False, date=False).cells[0].style
    assert given == as_trained(plan, tmp_path / "data").cells[0].style == plan.cells[0].style
