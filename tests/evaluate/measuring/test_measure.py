"""Evaluation files: their contents, when cells are measured again, and errors."""

import itertools
import json
import math
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from selfcorrect.evaluate.experiments import EXPERIMENTS
from selfcorrect.evaluate.measuring import cell_files
from selfcorrect.evaluate.measuring import measure as measuring
from selfcorrect.evaluate.measuring.cell_files import Origin, read_cell
from selfcorrect.evaluate.measuring.measure import measure, measure_with
from selfcorrect.evaluate.measuring.plan import EvaluationPlan, Question, plan_evaluation
from selfcorrect.evaluate.prompts.dialogue import Style
from selfcorrect.evaluate.prompts.items import Item, LoadedItems
from selfcorrect.evaluate.prompts.stimuli import Condition, Turn
from selfcorrect.evaluate.prompts.tokenized import tokenizer_digest
from selfcorrect.evaluate.scoring import packed
from selfcorrect.evaluate.scoring.engine import DRAWS, Engine, Sampling
from selfcorrect.evaluate.scoring.load_model import load_model
from selfcorrect.evaluate.scoring.weights import weights_digest
from selfcorrect.evaluate.statistics.bootstrap import Draws, bootstrap
from selfcorrect.recipes.foundation.errors import InputError, RunFailure
from selfcorrect.recipes.foundation.ranks import Ranks
from tests.support.tiny_models import (
    TINY_CONDITIONS,
    save_model,
    tiny_model,
    tiny_plan,
    tiny_stimuli,
    tiny_tokenizer,
    write_tiny_winogender,
)

torch.set_num_threads(1)

CONTRACT = [
    *("item cluster category weight order options".split()),
    *("logprobs probabilities mass draw samples truncated prompt".split()),
]


@pytest.fixture
def cells(tmp_path) -> EvaluationPlan:
    return tiny_plan(tmp_path / "data")


def test_cell_files_hold_the_documented_columns_and_metadata(tmp_path, cells):
    paths = measure(cells, tiny_model(), tiny_tokenizer(), tmp_path / "out")
    names = ["Q", "Q+IF", "Q+IF+CoT", "Match_stats"]
    assert [path.name for path in paths] == [f"winogender.{name}.parquet" for name in names]
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"prompts", *(path.name for path in paths)}
    for path, condition, cell in zip(paths, TINY_CONDITIONS, cells.cells, strict=True):
        frame, metadata = read_cell(path)
        assert (tmp_path / "out" / "prompts" / metadata.pop("prompts")).is_file()
        assert metadata == {
            "experiment": "winogender",
            "condition": condition,
            "settings_digest": cell.settings_digest,
            "origin": {
                "weights": weights_digest(tiny_model()),
                "engine": "packed",
                "tokenizer": tokenizer_digest(tiny_tokenizer()),
                "draws": DRAWS if condition == "Q+IF+CoT" else None,
                "dtype": "float32",
                "version": None,
            },
            "num_items": 6,
            "left_out": cell.loaded.left_out,
            "judged": True,
        }
        older = metadata["origin"].copy()  # without `draws`: text was drawn in another way
        del older["draws"]
        for engine, is_valid in [("packed", condition != "Q+IF+CoT"), ("vllm", True)]:
            origin = Origin(older["weights"], engine).of(cell)
            assert origin.made({**older, "engine": engine}) == is_valid
        facts = ["occupation", "percent_female", "case", "number_leak"]
        assert list(frame.columns) == CONTRACT + facts
        assert list(frame["item"]) == [item.id for item in cell.items]
        assert list(frame["order"]) == ["012"] * 6
        assert list(frame["options"][0]) == [" he", " she", " they"]
        for row in frame.itertuples():
            exact = [math.exp(value) for value in row.logprobs]
            assert row.mass == pytest.approx(sum(exact))
            assert list(row.probabilities) == pytest.approx([p / sum(exact) for p in exact])
        sampled = condition == "Q+IF+CoT"
        assert set(frame["draw"]) == {0}
        assert [len(s) for s in frame["samples"].dropna()] == [1] * 6 * sampled
        assert frame["truncated"].notna().all() == sampled
        if not sampled:
            assert frame["samples"].isna().all() and frame["truncated"].isna().all()


def test_scores_are_those_of_the_rendered_dialogue(tmp_path, cells):
    model, tokenizer = tiny_model(), tiny_tokenizer(chat=True)
    [path] = measure(EvaluationPlan(cells.cells[:1]), model, tokenizer, tmp_path / "out")
    frame, _ = read_cell(path)
    prompt = "<s><|user|>who went ? the doctor told the man that _ went home .</s><|assistant|>"
    prompt += "the doctor told the man that"
    tokens = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logs = torch.log_softmax(model(torch.tensor([tokens])).logits[0, -1].double(), -1)
    expected = [float(logs[tokenizer.convert_tokens_to_ids(w)]) for w in ("he", "she", "they")]
    assert list(frame["logprobs"][0]) == pytest.approx(expected, abs=1e-5)


def test_sample_is_part_of_the_final_prompt(tmp_path, cells):
    model, tokenizer = tiny_model(), tiny_tokenizer(chat=True)
    prompts: list[str] = []
    seen = model.register_forward_pre_hook(
        lambda _, args, kwargs: prompts.extend(tokenizer.batch_decode(kwargs["input_ids"])),
        with_kwargs=True,
    )
    [path] = measure(EvaluationPlan([cells.cells[2]]), model, tokenizer, tmp_path / "out")
    seen.remove()
    frame, _ = read_cell(path)
    for row in frame.itertuples():
        words = tokenizer.decode(
            tokenizer("because" + row.samples[0], add_special_tokens=False).input_ids
        )
        finals = [text for text in prompts if f"<|assistant|> {words} </s> <|user|> who" in text]
        assert finals, row.samples


def test_sample_and_scores_do_not_depend_on_other_items(tmp_path, cells):
    model, tokenizer = tiny_model(sharpness=3), tiny_tokenizer()
    cell = cells.cells[2]
    alone = replace(cell, loaded=LoadedItems(cell.items[4:5]))
    frames = []
    for index, part in enumerate([cell, alone]):
        [path] = measure(EvaluationPlan([part]), model, tokenizer, tmp_path / str(index))
        frames.append(read_cell(path)[0])
    together, single = frames[0].iloc[4], frames[1].iloc[0]
    assert list(together["samples"]) == list(single["samples"])
    assert list(together["logprobs"]) == pytest.approx(list(single["logprobs"]), abs=1e-5)


def test_measured_cells_are_skipped_and_others_measured_again(tmp_path, cells):
    model, tokenizer, out = tiny_model(), tiny_tokenizer(), tmp_path / "out"
    paths = measure(cells, model, tokenizer, out)
    first = {path: path.read_bytes() for path in paths}

    times = {path: path.stat().st_mtime_ns for path in paths}
    measure(cells, tiny_model(), tokenizer, out)
    assert {path: path.stat().st_mtime_ns for path in paths} == times
    measure(cells, tiny_model(seed=1), tokenizer, out)  # never another model's answers
    assert all(path.read_bytes() != first[path] for path in paths)
    measure(cells, model, tokenizer, out)
    assert {path: path.read_bytes() for path in paths} == first
    times = {path: path.stat().st_mtime_ns for path in paths}

    damaged, foreign, cut, kept = paths
    damaged.write_bytes(first[damaged][:200])
    foreign.write_bytes(b"not parquet")
    middle = bytearray(first[cut])
    middle[40:80] = bytes(40)  # the footer is intact, a column is not
    cut.write_bytes(middle)
    measure(cells, model, tokenizer, out)
    assert {path: path.read_bytes() for path in paths} == first
    assert kept.stat().st_mtime_ns == times[kept]

    measure(tiny_plan(tmp_path / "data", seed=5), model, tokenizer, out)
    changed = [path for path in paths if path.read_bytes() != first[path]]
    assert changed == [cut]  # the seed matters to samples alone, with all items taken


def test_settings_digest_covers_every_setting_but_not_the_folder(tmp_path, cells):
    same = tiny_plan(tmp_path / "elsewhere")
    assert same.settings_digest == cells.settings_digest
    plain, _, chain, _ = cells.cells
    assert plain.settings_digest != cells.cells[1].settings_digest
    other_item = replace(plain.items[0], options=(" he", " her", " they"))
    changed_condition = Condition(dialogue=[Turn("human", "?"), Turn("assistant", "")])
    section = plain.section.model_copy(
        update={"conditions": {**plain.section.conditions, "Q": changed_condition}}
    )
    variants = [
        replace(plain, loaded=LoadedItems([other_item, *plain.items[1:]])),
        replace(plain, loaded=LoadedItems(plain.items, {"why": 1})),
        replace(plain, section=section),
        replace(plain, style=Style("plain")),
        replace(plain, sampling=Sampling(6, 1.0, 0, 1)),
    ]
    digests = {cell.settings_digest for cell in [plain, *variants]}
    assert len(digests) == 1 + len(variants)
    for changed in ({"seed": 1}, {"max_new_tokens": 7}, {"temperature": 0.5}, {"samples": 2}):
        sampled = tiny_plan(tmp_path / "data", ["Q+IF+CoT"], **changed).cells[0]
        assert sampled.settings_digest != chain.settings_digest


# --- orders, draws, rounds ---------------------------------------------------------------------


def write_tiny_bbq(data_dir: Path) -> None:
    """One block of four, its options "doctor", "not", "nurse" in this order."""
    rows = []
    for index in range(4):
        answers = {f"ans{i}": word for i, word in enumerate(("doctor", "not", "nurse"))}
        tags = {"ans0": ["doctor", "old"], "ans1": ["not", "unknown"], "ans2": ["nurse", "nonOld"]}
        rows.append(
            {
                **{"example_id": index, "question_index": "1", "category": "Age"},
                "question_polarity": "neg" if index < 2 else "nonneg",
                "context_condition": "ambig" if index % 2 == 0 else "disambig",
                "additional_metadata": {"stereotyped_groups": ["old"]},
                **{"context": "the doctor and the nurse went home .", "question": "who is late ?"},
                **{"answer_info": tags, "label": 1 if index % 2 == 0 else 0, **answers},
            }
        )
    (data_dir / "bbq").mkdir(parents=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (data_dir / "bbq" / "Age.jsonl").write_text(text, encoding="utf-8")


def test_permuted_options_are_shown_scored_and_counted_in_order(tmp_path):
    write_tiny_bbq(tmp_path)
    model, tokenizer = tiny_model(sharpness=3), tiny_tokenizer()
    letters, texts = measure(
        plan_evaluation(tmp_path, tiny_stimuli(), ["bbq"], None, permutations=6),
        model,
        tokenizer,
        tmp_path / "out",
    )
    for path in (letters, texts):
        frame, metadata = read_cell(path)
        assert len(frame) == 4 * 6 and metadata["num_items"] == 4
        first = frame[frame["item"] == "Age/0"]
        assert sorted(first["order"]) == ["012", "021", "102", "120", "201", "210"]
    frame, _ = read_cell(texts)
    words = ("doctor", "not", "nurse")
    for row in frame.itertuples():
        shown = [words[int(digit)] for digit in row.order]
        assert list(row.options) == [f" {word}" for word in shown]
        prompt = "<s>" if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else ""
        listed = " ".join(f"{label} {word}" for label, word in zip("abc", shown, strict=True))
        prompt += f"\n\nHuman: the doctor and the nurse went home . who is late ? {listed}"
        tokens = tokenizer(f"{prompt}\n\nAssistant:", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logs = torch.log_softmax(model(torch.tensor([tokens])).logits[0, -1].double(), -1)
        expected = [float(logs[tokenizer.convert_tokens_to_ids(word)]) for word in shown]
        assert list(row.logprobs) == pytest.approx(expected, abs=1e-5)
    # A model that always says "the first one shown" has no preference left over all orders.
    frame["logprobs"] = [np.array([-0.1, -5.0, -5.0])] * len(frame)
    tally = EXPERIMENTS["bbq"].tally(frame)
    values = bootstrap(tally, EXPERIMENTS["bbq"].compute, None, Draws(1)).replicates.metrics
    assert values["share_option_0"][0] == 1.0
    assert values["share_unknown_ambiguous"][0] == pytest.approx(1 / 3)


def test_draws_are_rows_with_different_samples(tmp_path):
    model, tokenizer = tiny_model(sharpness=2), tiny_tokenizer()
    three = tiny_plan(tmp_path / "data", ["Q", "Q+IF+CoT"], samples=3, max_new_tokens=12)
    plain, sampled = (
        read_cell(path)[0] for path in measure(three, model, tokenizer, tmp_path / "three")
    )
    assert len(plain) == 6 and len(sampled) == 18  # nothing is drawn where nothing is written
    assert list(sampled["draw"][:6]) == [0, 1, 2, 0, 1, 2]
    texts = [samples[0] for samples in sampled["samples"]]
    assert len(set(texts)) > 12
    single = tiny_plan(tmp_path / "data", ["Q+IF+CoT"], samples=1, max_new_tokens=12)
    [path] = measure(single, model, tokenizer, tmp_path / "one")
    first = [samples[0] for samples in read_cell(path)[0]["samples"]]
    assert first == [text for text, draw in zip(texts, sampled["draw"], strict=True) if draw == 0]


def test_rounds_of_samples_follow_each_other_in_the_dialogue(tmp_path):
    model, tokenizer = tiny_model(sharpness=2), tiny_tokenizer(chat=True)
    prompts: list[str] = []
    seen = model.register_forward_pre_hook(
        lambda _, args, kwargs: prompts.extend(tokenizer.batch_decode(kwargs["input_ids"])),
        with_kwargs=True,
    )
    cells = tiny_plan(tmp_path / "data", ["reviews 2"])
    [path] = measure(cells, model, tokenizer, tmp_path / "out")
    seen.remove()
    frame, _ = read_cell(path)
    for row in frame.itertuples():
        first, second = row.samples
        words = tokenizer.decode(tokenizer(first, add_special_tokens=False).input_ids)
        more = tokenizer.decode(tokenizer("because" + second, add_special_tokens=False).input_ids)
        opened = f"<|assistant|> {words} </s> <|user|> who ? </s> <|assistant|> {more} </s>"
        assert any(" ".join(opened.split()) in " ".join(text.split()) for text in prompts)
    assert any(first != second for first, second in frame["samples"])


def test_custom_chat_template_is_used_and_checked(tmp_path):
    template = tmp_path / "custom.jinja"
    template.write_text(
        "{% for message in messages %}{{ message.role[0] }} : {{ message.content }} . "
        "{% endfor %}{% if add_generation_prompt %}a :{% endif %}"
    )
    cells = tiny_plan(tmp_path / "data", ["Q"], style=str(template))
    model, tokenizer, prompts = tiny_model(), tiny_tokenizer(chat=True), []
    seen = model.register_forward_pre_hook(
        lambda _, args, kwargs: prompts.extend(tokenizer.batch_decode(kwargs["input_ids"])),
        with_kwargs=True,
    )
    measure(cells, model, tokenizer, tmp_path / "out")
    seen.remove()
    assert any(text.startswith("<unk> : who went ? the doctor told") for text in prompts)
    other = tiny_plan(tmp_path / "data", ["Q"])
    assert cells.settings_digest != other.settings_digest
    template.write_text("hello")
    for style, fragment in [
        (str(template), "does not use `messages`"),
        (str(tmp_path / "none.jinja"), "cannot be read"),
        ("chatty", r"style 'chatty': use auto, chat, plain"),
    ]:
        with pytest.raises(InputError, match=fragment):
            tiny_plan(tmp_path / "data", ["Q"], style=style)


def test_condition_of_one_experiment_is_skipped_for_the_others(tmp_path):
    write_tiny_winogender(tmp_path)
    (tmp_path / "law_school").mkdir()
    (tmp_path / "law_school" / "law_data.csv").write_text(
        ",race,sex,LSAT,UGPA\n0,Black,1,40,3.1\n1,white,2,41,3.2\n", encoding="utf-8"
    )
    names = ["winogender", "law_school"]
    planned = plan_evaluation(tmp_path, tiny_stimuli(), names, ["Q", "Match stats"])
    assert [cell.name for cell in planned.cells] == [
        "winogender Q",
        "winogender Match stats",
        "law_school Q",
    ]


def test_unknown_conditions_and_experiments_are_refused_with_a_list(tmp_path):
    with pytest.raises(InputError, match=r"'Q\+CoT'.*Q, Q\+IF, Q\+IF\+CoT, Match stats"):
        tiny_plan(tmp_path / "data", ["Q", "Q+CoT"])
    with pytest.raises(InputError, match=r"stereoset.*bbq, winogender, law_school"):
        plan_evaluation(tmp_path, tiny_stimuli(), ["stereoset"], ["Q"])


def test_prompt_beyond_the_context_names_the_item(tmp_path, cells):
    with pytest.raises(InputError, match=r"winogender Q, item doctor/1: .* context holds 12"):
        measure(cells, tiny_model(context=12), tiny_tokenizer(), tmp_path / "out")
    chain = EvaluationPlan([cells.cells[2]])
    with pytest.raises(InputError, match=r"CoT, item .*lower max_new_tokens \(6\)"):
        measure(chain, tiny_model(context=40), tiny_tokenizer(), tmp_path / "out")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_nan_logits_name_the_cell_and_leave_no_file(tmp_path, cells):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[3, 0] = math.nan
    with pytest.raises(RunFailure, match=r"winogender Q, .*NaN"):
        measure(cells, model, tiny_tokenizer(), tmp_path / "out")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_probabilities_are_null_when_no_option_is_possible(tmp_path):
    from selfcorrect.evaluate.measuring.measure import _Draw, _row

    item = Item("i", "c", "k", 1.0, {}, (" a", " b"), {"fact": 1})
    draw = _Draw(Question(item, "01", item.options, list), 0)
    row = _row(draw, [-math.inf, -math.inf])
    assert row["probabilities"] is None and row["mass"] == 0.0
    tiny = _row(draw, [-2000.0, -2000.0])  # mass underflows, the shares do not
    assert tiny["probabilities"] == [0.5, 0.5]


def test_model_in_training_mode_is_refused(tmp_path, cells):
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        measure(cells, tiny_model().train(), tiny_tokenizer(), tmp_path)


def test_progress_counts_items(tmp_path, cells):
    calls: list[tuple[str, int, int]] = []
    measure(
        EvaluationPlan(cells.cells[:1]),
        tiny_model(),
        tiny_tokenizer(),
        tmp_path,
        lambda *call: calls.append(call),
    )
    assert calls == [("winogender Q", 0, 6), ("winogender Q", 6, 6)]


class Stopped(BaseException):
    """End an evaluation as Ctrl-C does."""


@pytest.mark.parametrize("condition", ["Q", "Q+IF+CoT"])
def test_interrupted_evaluation_resumes_bitwise(tmp_path, cells, monkeypatch, condition):
    monkeypatch.setattr(packed, "MOST_ITEMS", 2)  # six items in three slices
    plan = EvaluationPlan([cell for cell in cells.cells if cell.condition == condition])
    model, tokenizer = tiny_model(), tiny_tokenizer()
    uninterrupted = measure(plan, model, tokenizer, tmp_path / "whole")

    def stop(name: str, done: int, total: int) -> None:
        if done == 4:
            raise Stopped

    with pytest.raises(Stopped):
        measure(plan, model, tokenizer, tmp_path / "out", stop)
    assert not (tmp_path / "out" / uninterrupted[0].name).exists()
    again: list[int] = []
    measure(plan, model, tokenizer, tmp_path / "out", lambda *call: again.append(call[1]))
    assert again == [4, 6]
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").glob("*.p*")} == {
        path.name: path.read_bytes() for path in uninterrupted
    }


@pytest.mark.parametrize("limit", [("_PART_ITEMS", 2), ("_PART_SECONDS", 0.0)])
def test_unusable_parts_are_not_resumed_from(tmp_path, cells, monkeypatch, limit):
    monkeypatch.setattr(packed, "MOST_ITEMS", 2)
    # Parts are written after a number of items, or after a time, as a killed process leaves them.
    monkeypatch.setattr(measuring, *limit)
    pair = EvaluationPlan([cells.cells[0], cells.cells[1]])
    tokenizer = tiny_tokenizer()
    uninterrupted = measure(pair, tiny_model(), tokenizer, tmp_path / "whole")

    def stop(*call: object) -> None:
        if call[1] == 4:
            raise Stopped

    def resumed_at(model: object) -> int:
        calls: list[int] = []
        measure(pair, model, tokenizer, tmp_path / "out", lambda *call: calls.append(call[1]))
        return calls[0]

    def leave_parts() -> list[Path]:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        with pytest.raises(Stopped):
            measure(pair, tiny_model(), tokenizer, tmp_path / "out", stop)
        return sorted((tmp_path / "out").glob(".*/*.parquet"))

    parts = leave_parts()
    assert [part.name for part in parts] == 2 * [
        "000000000-000000002.parquet",
        "000000002-000000004.parquet",
    ]
    parts[3].unlink()  # the other cell of the pair has one more
    assert resumed_at(tiny_model()) == 2
    leave_parts()
    assert resumed_at(tiny_model(seed=1)) == 0  # another model's
    first = leave_parts()[0]
    first.write_bytes(first.read_bytes()[:-20])  # its end is missing
    assert resumed_at(tiny_model()) == 0
    first = leave_parts()[0]
    damaged = bytearray(first.read_bytes())
    damaged[60] ^= 0xFF  # the footer is intact, a column is not
    first.write_bytes(damaged)
    assert resumed_at(tiny_model()) == 0
    first = leave_parts()[0]
    with pytest.raises(RunFailure, match="damaged while"):
        measure(
            *(pair, tiny_model(), tokenizer, tmp_path / "out"),
            lambda *_: first.write_bytes(damaged),
        )
    assert resumed_at(tiny_model()) == 0
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").glob("*.p*")} == {
        path.name: path.read_bytes() for path in uninterrupted
    }


def test_damaged_cell_file_is_an_input_error(tmp_path):
    path = tmp_path / "winogender.Q.parquet"
    path.write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match="damaged"):
        read_cell(path)
    pd.DataFrame({"a": [1]}).to_parquet(path)
    with pytest.raises(InputError, match="not an evaluation file"):
        read_cell(path)
    assert pq.read_table(path).num_rows == 1


# --- loading -----------------------------------------------------------------------------------


def test_missing_folder_never_becomes_a_hub_lookup(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in ("./none", "/none/there", "runs/none", "a/b/c", "none/", "~/none"):
        with pytest.raises(InputError, match="model folder not found"):
            load_model(path)
    with pytest.raises(InputError, match=r"runs: .*no config\.json"):
        load_model("runs")
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(InputError, match=r"not a model; give"):
        load_model(tmp_path / "file.txt")


def test_pickled_weights_are_refused(tmp_path):
    folder = save_model(tmp_path / "model", tiny_model())
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="safetensors"):
        load_model(folder)


def test_damaged_weights_are_a_one_line_error(tmp_path):
    folder = save_model(tmp_path / "model", tiny_model())
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(InputError, match="cannot load the model") as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_tokenizer_of_another_model_is_refused(tmp_path):
    folder = save_model(tmp_path / "model", tiny_model(vocabulary=20))
    with pytest.raises(InputError, match="use the model's own tokenizer"):
        load_model(folder)


def test_moved_adapter_finds_its_base_beside_it(tmp_path):
    from peft import LoraConfig, get_peft_model

    base = save_model(tmp_path / "here" / "base", tiny_model())
    model, _ = load_model(base)
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapter = tmp_path / "here" / "ppo" / "checkpoint-1"
    get_peft_model(model, config).save_pretrained(adapter)
    (tmp_path / "here").rename(tmp_path / "there")
    moved = tmp_path / "there" / "ppo" / "checkpoint-1"
    loaded, tokenizer = load_model(moved)
    assert not loaded.training and tokenizer.eos_token == "</s>"
    (tmp_path / "there" / "base" / "config.json").unlink()
    with pytest.raises(InputError, match=r"base model .* neither there nor beside"):
        load_model(moved)


class Clock(threading.local):
    """Seconds that pass only where a test says so, in each thread on its own."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds


class TimedEngine(Engine):
    """Scores that depend on the text alone; each request takes `seconds` of the clock."""

    context = None

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.tokenizer, self.clock, self.seconds = tiny_tokenizer(), clock, seconds

    def score(self, requests):
        scores = []
        for number, (prompt, options) in enumerate(requests, 1):
            self.clock.seconds += self.seconds
            scores.append([-len(prompt) / 7 - len(option) for option in options])
            if self.on_progress:
                self.on_progress(number / len(requests))
        return scores

    def sample(self, prompts, keys, sampling, stop=None):
        raise AssertionError("nothing is sampled here")


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    """Ranks that are threads of one process."""

    values: list = field(default_factory=list)
    barrier: threading.Barrier | None = None

    def gather(self, make):
        self.values[self.rank] = make()
        self.barrier.wait(timeout=60)
        gathered = list(self.values)
        self.barrier.wait(timeout=60)
        return gathered


@pytest.mark.parametrize("seconds", [0.0, 2.0, 45.0])
def test_parts_and_progress_follow_the_clock_but_the_files_do_not(
    tmp_path, cells, monkeypatch, seconds
):
    """Little is lost and progress shown; a kill, another speed and ranks change no byte."""
    clock = Clock()
    monkeypatch.setattr(measuring, "time", clock)
    monkeypatch.setattr(cell_files, "_GROUP_ROWS", 16)
    loaded = cells.cells[0].loaded
    items = [replace(loaded.items[i % 6], id=f"item {i}") for i in range(40)]
    pair = [replace(cell, loaded=LoadedItems(items)) for cell in cells.cells[:2]]
    plan = EvaluationPlan(pair)

    def measured(name: str, engine: TimedEngine, progress=None) -> list[bytes]:
        paths = measure_with(plan, engine, tmp_path / name, Origin("weights"), progress)
        return [path.read_bytes() for path in paths]

    (tmp_path / "slow").mkdir()
    expected = measured("at once", TimedEngine(clock, 0.001))
    reports: list[tuple[float, float]] = []

    def report(_: str, done: float, total: int) -> None:
        reports.append((clock.seconds, done))
        parts = (tmp_path / "slow").glob(".*Q.parquet.parts/*.parquet")
        on_disk = max((int(part.stem.rpartition("-")[2]) for part in parts), default=0)
        # Each item has two requests. What a kill loses now took at most two minutes, or one item.
        assert (done - on_disk) * 2 * seconds <= max(120.0, 2 * seconds)
        if done >= 25 and not (tmp_path / "killed").exists():  # kill -9: nothing more is written
            shutil.copytree(tmp_path / "slow", tmp_path / "killed")

    clock.seconds = 0.0
    assert measured("slow", TimedEngine(clock, seconds), report) == expected
    assert [done for _, done in reports] == sorted(done for _, done in reports)
    moves = [after - before for (before, _), (after, _) in itertools.pairwise(reports)]
    assert max(moves) <= max(5.0, seconds)
    assert measured("killed", TimedEngine(clock, 0.3)) == expected

    barrier, values = threading.Barrier(2), [None, None]

    def measure_rank(rank: int) -> None:
        ranks = ThreadRanks(rank, 2, values, barrier)
        engine = TimedEngine(clock, seconds * (1 + rank))  # and each has a clock of its own
        measure_with(plan, engine, tmp_path / "ranks", Origin("weights"), ranks=ranks)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(measure_rank, range(2)))
    assert [(tmp_path / "ranks" / c.file_name).read_bytes() for c in pair] == expected


def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path):
    """Its remedy is not to delete it: the fault may be a permission, or too many open files."""
    (tmp_path / "bbq.Q.parquet").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        read_cell(tmp_path / "bbq.Q.parquet")
