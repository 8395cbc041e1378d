"""Feedback from data: dialogues of the usual shapes become the same prompts and pairs."""

import gzip
import inspect
import json
import os
import re
from pathlib import Path

import datasets
import pandas as pd
import pytest

from selfcorrect.evaluate.prompts.dialogue import AUTO
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.schema import Data, Source
from selfcorrect.recipes.society.settings import SocietySettings
from selfcorrect.recipes.society.tokenizer import make_tokenizer
from selfcorrect.recipes.society.world import make_world
from selfcorrect.train.feedback.feedback import load_feedback, pair_ids
from selfcorrect.train.ppo.prompts import policy_prompt_ids

USER = {"role": "user", "content": "What is it?"}
LAKE = {"role": "assistant", "content": "A lake."}
NO = {"role": "assistant", "content": "No."}
SYSTEM = {"role": "system", "content": "Be brief."}
WRITTEN = {
    "chosen": "\n\nHuman: What is it?\n\nAssistant: A lake.",
    "rejected": "\n\nHuman: What is it?\n\nAssistant: No.",
}
WHOLE = {"chosen": [USER, LAKE], "rejected": [USER, NO]}
SHAPES = {
    "text": {
        "chosen": "\n\nHuman: What is it?\n\nAssistant: A lake.",
        "rejected": "\n\nHuman: What is it?\n\nAssistant: No.",
    },
    "messages": {
        "chosen": [USER, {"role": "assistant", "content": "A lake."}],
        "rejected": [USER, {"role": "assistant", "content": "No."}],
    },
    "prompt and answers": {"prompt": "What is it?", "chosen": "A lake.", "rejected": "No."},
    "prompt and messages": {
        "prompt": [USER],
        "chosen": [{"role": "assistant", "content": "A lake."}],
        "rejected": [{"role": "assistant", "content": "No."}],
    },
    "text prompt and messages": {
        "prompt": "What is it?",
        "chosen": [{"role": "assistant", "content": "A lake."}],
        "rejected": [{"role": "assistant", "content": "No."}],
    },
    "HH prompt and answers": {
        "prompt": "\n\nHuman: What is it?",
        "chosen": "A lake.",
        "rejected": "No.",
    },
    "UltraFeedback: messages that repeat the prompt": {
        "prompt": "What is it?",
        "prompt_id": "af0c",
        "chosen": [USER, {"role": "assistant", "content": "A lake."}],
        "rejected": [USER, {"role": "assistant", "content": "No."}],
        "messages": [USER, {"role": "assistant", "content": "A lake."}],
        "score_chosen": 8.5,
        "score_rejected": 7.0,
    },
    "whole HH dialogues beside their prompt": {"prompt": "What is it?", **WRITTEN},
    "whole HH dialogues beside an HH prompt": {"prompt": "\n\nHuman: What is it?", **WRITTEN},
    "whole HH dialogues beside an open HH prompt": {
        "prompt": "\n\nHuman: What is it?\n\nAssistant:",
        **WRITTEN,
    }
    | {"chosen": "\n\nHuman: What is it? \n\nAssistant: A lake."},
    "whole HH dialogues beside a list of messages": {"prompt": [USER], **WRITTEN},
    "whole HH dialogues beside blanks": {"prompt": " \n", **WRITTEN},
    "an answer that names its speaker": {
        "prompt": "What is it?",
        "chosen": "\n\nAssistant: A lake.",
        "rejected": "Assistant: No.",
    },
    "HH without the first blank line": {side: text.strip("\n") for side, text in WRITTEN.items()},
    "HH with Windows line ends": {
        side: text.replace("\n", "\r\n") for side, text in WRITTEN.items()
    },
    "turns on new lines": {
        side: text.strip("\n").replace("\n\n", "\n") for side, text in WRITTEN.items()
    },
    "a prompt of turns on new lines": {
        "prompt": "Human: What is it?\nAssistant:",
        "chosen": "Human: What is it?\nAssistant: A lake.",
        "rejected": "Human: What is it?\nAssistant: No.",
    },
    "messages beside a prompt in messages": {"prompt": [USER], **WHOLE},
    "messages beside an HH prompt": {"prompt": "\n\nHuman: What is it?", **WHOLE},
    "messages beside the prompt in a format of its own": {
        "prompt": "<|user|>\nWhat is it?</s>\n<|assistant|>",
        **WHOLE,
    },
    "one side whole, the other an answer": {
        "prompt": "What is it?",
        "chosen": WRITTEN["chosen"],
        "rejected": [NO],
    },
    "texts that repeat the prompt": {
        "prompt": "What is it?",
        "chosen": "What is it? A lake.",
        "rejected": "What is it?\nNo.",
    },
}
OPEN = [USER, {"role": "assistant", "content": "It is"}]
LONG = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}]


def write_rows(path: Path, rows: list[dict]) -> Data:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Data(preferences=Source(path=str(path)))


@pytest.mark.parametrize("shape", SHAPES)
def test_pair_formats_give_the_same_prompt_and_answers(tmp_path: Path, shape: str) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", [SHAPES[shape]])
    (pair,) = load_feedback(data, 0).preferences
    assert (list(pair.prompt), pair.chosen, pair.rejected) == ([USER], "A lake.", "No.")
    assert load_feedback(data, 0).prompts == [[USER]]


def test_answers_that_begin_with_their_prompt_in_some_rows_only_are_answers(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Hi", "chosen": "Hi there.", "rejected": "Hi, you."},
        {"prompt": "What is it?", "chosen": "What is it? A lake.", "rejected": "No."},
    ]
    first, second = load_feedback(write_rows(tmp_path / "pairs.jsonl", rows), 0).preferences
    assert (first.chosen, first.rejected) == ("Hi there.", "Hi, you.")
    assert (second.chosen, second.rejected) == ("What is it? A lake.", "No.")
    rows = [{"prompt": "Hi", "chosen": "Hit me.", "rejected": "Hi you."}]  # another word
    (pair,) = load_feedback(write_rows(tmp_path / "pairs.jsonl", rows), 0).preferences
    assert (pair.chosen, pair.rejected) == ("Hit me.", "Hi you.")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": OPEN, "chosen": " a lake.", "rejected": " no."},
        {
            "prompt": OPEN,
            "chosen": [USER, {"role": "assistant", "content": "It is a lake."}],
            "rejected": [USER, {"role": "assistant", "content": "It is no."}],
        },
        {
            "prompt": "\n\nHuman: What is it?\n\nAssistant: It is",
            "chosen": "\n\nHuman: What is it?\n\nAssistant: It is a lake.",
            "rejected": "\n\nHuman: What is it?\n\nAssistant: It is no.",
        },
    ],
)
def test_dialogue_that_completes_the_open_turn_of_its_prompt(tmp_path: Path, row: dict) -> None:
    (pair,) = load_feedback(write_rows(tmp_path / "pairs.jsonl", [row]), 0).preferences
    assert (list(pair.prompt), pair.chosen, pair.rejected) == (OPEN, " a lake.", " no.")


@pytest.mark.parametrize("prompt", [[USER], "What is it?", [*LONG, USER], None])
def test_prompt_that_holds_the_last_question_of_a_longer_dialogue(
    tmp_path: Path, prompt: object
) -> None:
    row = {"prompt": prompt, "chosen": [*LONG, USER, LAKE], "rejected": [*LONG, USER, NO]}
    (pair,) = load_feedback(write_rows(tmp_path / "pairs.jsonl", [row]), 0).preferences
    assert (list(pair.prompt), pair.chosen, pair.rejected) == ([*LONG, USER], "A lake.", "No.")


@pytest.mark.parametrize("column", ["system", "system_prompt"])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "What is it?", "chosen": "A lake.", "rejected": "No."},
        {"prompt": "What is it?", **WRITTEN},
        {"prompt": [SYSTEM, USER], "chosen": [LAKE], "rejected": [NO]},
        {"prompt": [SYSTEM, USER], **WHOLE},
        {"prompt": "What is it?", **WHOLE},
        WHOLE,
        {"chosen": [SYSTEM, USER, LAKE], "rejected": [USER, NO]},
    ],
)
def test_system_message_in_a_column(tmp_path: Path, row: dict, column: str) -> None:
    rows = [{**row, column: "Be brief."}]
    (pair,) = load_feedback(write_rows(tmp_path / "pairs.jsonl", rows), 0).preferences
    assert list(pair.prompt) == [{"role": "user", "content": "Be brief.\n\nWhat is it?"}]
    assert (pair.chosen, pair.rejected) == ("A lake.", "No.")
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "What is it?", column: "Be brief."}) + "\n")
    assert prompts(tmp_path, path) == [list(pair.prompt)]


def test_pairs_with_equal_sides_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    equal = [
        {"prompt": "What is it?", "chosen": "A lake.", "rejected": " A lake.\n"},
        {"chosen": WRITTEN["chosen"], "rejected": f"{WRITTEN['chosen']}  "},
        {"prompt": [USER], "chosen": [LAKE], "rejected": [LAKE]},
        {"prompt": "What is it?", "chosen": "", "rejected": " "},
    ]
    for row in equal:
        rows = [row, row, {"prompt": row.get("prompt"), **WHOLE} if "prompt" in row else WRITTEN]
        if not isinstance(row["chosen"], list):
            rows[2] = (
                {"prompt": row["prompt"], "chosen": "A", "rejected": "B"}
                if "prompt" in row
                else WRITTEN
            )
        feedback = load_feedback(write_rows(tmp_path / "pairs.jsonl", rows), 0)
        assert len(feedback.preferences) == 1
        assert feedback.left_out == {"chosen and rejected are the same": 2}
        assert "2 of 3 pairs are left out: chosen and rejected are the same" in caplog.text
    with pytest.raises(InputError, match="chosen and rejected are the same in every pair"):
        load_feedback(write_rows(tmp_path / "pairs.jsonl", equal[:1]), 0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "a", "other": "b"}, "row 2: preferences need the columns chosen and rejected"),
        ({"chosen": "no turns", "rejected": "none"}, "row 2: chosen: expected turns that begin"),
        ({"chosen": "\n\nHuman: a", "rejected": ""}, "row 2: rejected: expected turns that begin"),
        (
            {"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a"},
            "row 2: chosen: a dialogue needs a human turn",
        ),
        ({"chosen": 3, "rejected": "x"}, "row 2: chosen: a dialogue is text or a list of messages"),
        ({"chosen": None, "rejected": "x"}, "row 2: chosen: a dialogue is text or a list"),
        ({"chosen": [], "rejected": []}, "row 2: chosen: no messages"),
        (
            {"chosen": [{"from": "human"}], "rejected": []},
            "needs the keys role and content",
        ),
        (
            {"chosen": [{"role": "gpt", "content": "x"}], "rejected": []},
            "role 'gpt': use user or assistant",
        ),
        ({"chosen": "a", "rejected": "b", "prompt": 3}, "prompt: a prompt is text or a list"),
        (
            {
                "prompt": "Who are you?",
                "chosen": "\n\nHuman: What is it?\n\nAssistant: A lake.",
                "rejected": "No.",
            },
            "chosen: the dialogue does not begin with the turns of the column prompt",
        ),
        (
            {"prompt": [USER], "chosen": [{**USER, "content": "Who?"}, LAKE], "rejected": [NO]},
            "chosen: the dialogue does not begin with the turns of the column prompt",
        ),
        (
            {
                "prompt": "What is it?",
                "chosen": "[{'role': 'user', 'content': 'x'}]",
                "rejected": "",
            },
            "chosen: a list of messages in a text column",
        ),
        (
            {"chosen": '[{"content": "x", "role": "user"}]', "rejected": "[]"},
            "chosen: a list of messages in a text column",
        ),
        (
            {"system": "Be brief.", "chosen": [SYSTEM, USER, LAKE], "rejected": [USER, NO]}
            | {"system_prompt": "Be long."},
            "system and system_prompt differ",
        ),
        (
            {"system": "Be long.", "chosen": [SYSTEM, USER, LAKE], "rejected": [USER, NO]},
            "chosen: its system message differs from the row's",
        ),
        (
            {"instruction": "What is it?", "chosen": "A lake.", "rejected": "No."},
            "chosen: expected turns that begin with a blank line and Human:, or an answer beside a",
        ),
    ],
)
def test_malformed_pair_is_named(tmp_path: Path, row: dict, message: str) -> None:
    first = row if "other" in row else SHAPES["text"]
    path = tmp_path / "pairs.jsonl"
    data = write_rows(path, [first, row] if "other" not in row else [row, row])
    with pytest.raises(InputError) as caught:
        load_feedback(data, 0)
    expected = message.replace("row 2", "row 1") if "other" in row else message
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{path}: row ")


def test_pairs_with_different_prompts_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parted = {
        "chosen": "\n\nHuman: a\n\nAssistant: b",
        "rejected": "\n\nHuman: c\n\nAssistant: d",
    }
    path = tmp_path / "pairs.jsonl"
    feedback = load_feedback(write_rows(path, [parted, SHAPES["text"], parted]), 0)
    assert [pair.chosen for pair in feedback.preferences] == ["A lake."]
    assert feedback.left_out == {"chosen and rejected differ before the last turn": 2}
    assert "2 of 3 pairs are left out" in caplog.text
    assert load_feedback(write_rows(path, [SHAPES["text"]]), 0).left_out == {}
    with pytest.raises(InputError, match="differ before the last turn in every pair"):
        load_feedback(write_rows(path, [parted, parted]), 0)


def test_consecutive_turns_of_one_speaker_are_joined(tmp_path: Path) -> None:
    start = "\n\nHuman: One.\n\nHuman: Two.\n\nAssistant: "
    rows = [{"chosen": f"{start}Yes.\n\nAssistant: Sure.", "rejected": f"{start}No."}]
    (pair,) = load_feedback(write_rows(tmp_path / "pairs.jsonl", rows), 0).preferences
    assert list(pair.prompt) == [{"role": "user", "content": "One.\n\nTwo."}]
    assert (pair.chosen, pair.rejected) == ("Yes.\n\nSure.", "No.")


def test_open_assistant_turn_stays_open(tmp_path: Path) -> None:
    row = {
        "prompt": "\n\nHuman: What is it?\n\nAssistant:",
        "chosen": " A lake.",
        "rejected": " No.",
    }
    (pair,) = load_feedback(write_rows(tmp_path / "pairs.jsonl", [row]), 0).preferences
    assert list(pair.prompt) == [USER, {"role": "assistant", "content": ""}]
    assert (pair.chosen, pair.rejected) == (" A lake.", " No.")


def test_system_message_precedes_the_first_turn(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    answers = [{"role": "assistant", "content": text} for text in ("A lake.", "No.")]
    row = {"chosen": [system, USER, answers[0]], "rejected": [system, USER, answers[1]]}
    (pair,) = load_feedback(write_rows(tmp_path / "pairs.jsonl", [row]), 0).preferences
    assert list(pair.prompt) == [{"role": "user", "content": "Be brief.\n\nWhat is it?"}]
    row["chosen"] = [USER, system, answers[0]]
    with pytest.raises(InputError, match=r"role 'system': .* only for the first message"):
        load_feedback(write_rows(tmp_path / "pairs.jsonl", [row]), 0)


# --- files -------------------------------------------------------------------------------------

PAIR = {"prompt": "What is it?", "chosen": "A lake.", "rejected": "No."}
PAIRS = [{**PAIR, "prompt": f"Question {n}?"} for n in range(3)]


def save_rows(path: Path, rows: list[dict]) -> None:
    """Write rows in the format that the file's name tells."""
    frame = pd.DataFrame(rows)
    plain = path.name.removesuffix(".gz")
    if plain.endswith(".parquet"):
        frame.to_parquet(path)
    elif plain.endswith((".csv", ".tsv")):
        frame.to_csv(path, index=False, sep="\t" if ".tsv" in plain else ",")
    elif plain.endswith(".txt"):
        frame.iloc[:, 0].to_csv(path, index=False, header=False)
    else:
        frame.to_json(path, orient="records", lines=plain.endswith(".jsonl"))


def preferences(path: object, **more: object) -> Data:
    return Data(preferences=Source.model_validate({"path": str(path), **more}))


def prompts(tmp_path: Path, path: object, **more: object) -> list:
    """The prompts of a source, beside some pair that a recipe needs as well."""
    save_rows(tmp_path / "a_pair.jsonl", [PAIR])
    pairs = Source(path=str(tmp_path / "a_pair.jsonl"))
    source = Source.model_validate({"path": str(path), **more})
    return load_feedback(Data(preferences=pairs, prompts=source), 0).prompts


PACKED = ["p.jsonl.gz", "p.json.gz", "p.csv.gz", "p.tsv.gz"]


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.csv", "p.tsv", "p.parquet", *PACKED])
def test_file_formats_give_the_same_pairs(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    save_rows(path, PAIRS)
    assert load_feedback(preferences(path), 0).prompts == [
        [{"role": "user", "content": f"Question {n}?"}] for n in range(3)
    ]


@pytest.mark.parametrize(
    "name",
    ["p.jsonl", "p.csv", "p.txt", "p.parquet", "p.tsv", "p.jsonl.gz", "p.csv.gz", "p.txt.gz"],
)
@pytest.mark.parametrize("column", ["prompt", "text", "instruction"])
def test_plain_prompts_of_every_format_are_questions(
    tmp_path: Path, name: str, column: str
) -> None:
    save_rows(tmp_path / name, [{column: "What is it?"}, {column: "Who are you?"}])
    results = prompts(tmp_path, tmp_path / name)
    assert results == [[USER], [{"role": "user", "content": "Who are you?"}]]


def test_prompts_may_be_dialogues_beside_other_columns(tmp_path: Path) -> None:
    messages = [USER, {"role": "assistant", "content": "It is"}]
    written = "\n\nHuman: What is it?\n\nAssistant: It is"
    for value in (messages, written):
        path = tmp_path / "prompts.jsonl"
        path.write_text(json.dumps({"id": 7, "text": "other", "prompt": value}) + "\n")
        assert prompts(tmp_path, path) == [messages]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "7", "instruction": "x"}, "row 2: prompts need a column prompt or text, not id, i"),
        ({"prompt": " "}, "row 2: prompt is empty"),
        ({"prompt": None}, "row 2: prompt is empty"),
        ({"text": 3}, "row 2: text: a prompt is text or a list of messages"),
    ],
)
def test_malformed_prompt_is_named(tmp_path: Path, row: dict, message: str) -> None:
    good = dict.fromkeys(row, "fine") if "id" not in row else row
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(InputError) as caught:
        prompts(tmp_path, path)
    assert (message.replace("row 2", "row 1") if "id" in row else message) in str(caught.value)


def test_numbers_and_missing_values_stay_text(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,chosen,rejected\nTwo and two?,4,5\nHow many? ,NA,null\n")
    first, second = load_feedback(preferences(path), 0).preferences
    assert (first.chosen, second.chosen, second.rejected) == ("4", "NA", "null")


def test_folder_with_splits(tmp_path: Path) -> None:
    for split, rows in (("train", PAIRS), ("test", PAIRS[:1])):
        (tmp_path / "pairs").mkdir(exist_ok=True)
        save_rows(tmp_path / "pairs" / f"{split}.jsonl.gz", rows)
    assert len(load_feedback(preferences(tmp_path / "pairs"), 0).preferences) == 3
    assert len(load_feedback(preferences(tmp_path / "pairs", split="test"), 0).preferences) == 1
    with pytest.raises(InputError, match=r"data\.preferences\.path: .*nosuch"):
        load_feedback(preferences(tmp_path / "pairs", split="nosuch"), 0)


def test_brackets_in_a_path_are_not_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "[x] * ?").mkdir()
    save_rows(tmp_path / "[x] * ?" / "pairs.jsonl", PAIRS)
    assert len(load_feedback(preferences(tmp_path / "[x] * ?" / "pairs.jsonl"), 0).prompts) == 3


GOOD = "".join(json.dumps(row) + "\n" for row in PAIRS)
BAD_FILES: dict[str, tuple[bytes, str]] = {
    "cut.jsonl": ((GOOD + '{"prompt": "Que').encode(), r"line 4: not JSON .*cut short"),
    "list.jsonl": ((GOOD + "[1]\n").encode(), r"line 4: .* object"),
    "latin.jsonl": (GOOD.encode() + b'{"prompt": "caf\xe9"}\n', r"line 4: not UTF-8 text"),
    "inside.jsonl": (
        b'{"prompt": "caf\xe9", "chosen": "a", "rejected": "b"}\n' + GOOD.encode(),
        r"line 1: not UTF-8 text",
    ),
    "latin.csv": (b"prompt,chosen,rejected\ncaf\xe9,a,b\n", r"line 2: not UTF-8 text"),
    "latin.txt": (b"one\ncaf\xe9\n", r"line 2: not UTF-8 text"),
    "empty.jsonl": (b"", r"no rows"),
    "empty.csv": (b"", r"no rows"),
    "empty.txt": (b"", r"no rows"),
    "blank.jsonl": (b"\n\n", r"no rows"),
    "header.csv": (b"prompt,chosen,rejected\n", r"no rows"),
    "twice.csv": (b"prompt,prompt,chosen,rejected\na,b,c,d\n", r"column 'prompt' appears twice"),
    "fields.csv": (b"prompt,chosen,rejected\na,b,c\na,b,c,d\n", r"line 3: 4 fields"),
    "quote.csv": (b'prompt,chosen,rejected\n"a,b,c\nd,e,f\n', r"cannot be loaded \(.*string"),
    "cut.jsonl.gz": (gzip.compress(GOOD.encode())[:-12], r"not a complete gzip file"),
    "plain.jsonl.gz": (GOOD.encode(), r"not a complete gzip file"),
    "bad.parquet": (b"PAR1 nothing", r"cannot be loaded"),
    "list.json": (b'[{"prompt": "a"},', r"cannot be loaded"),
    "table.xlsx": (b"what", r"unknown format; use \.jsonl"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_unreadable_file_is_one_line(
    tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_feedback(preferences(tmp_path / name), 0)
    line = str(caught.value)
    assert line.startswith(f"data.preferences.path: {tmp_path / name}: ") and "\n" not in line
    assert "Failed to" not in capfd.readouterr().err  # the library does not speak beside it


@pytest.mark.parametrize("path", ["none.jsonl", "none.csv.gz", "./a/b/c", "a/b/c", "/none"])
def test_missing_file_is_one_line(path: str) -> None:
    with pytest.raises(InputError, match=r"data\.preferences\.path: .*no (such )?file"):
        load_feedback(preferences(path), 0)


def test_row_of_ten_million_characters(tmp_path: Path) -> None:
    long = {**PAIR, "chosen": "word " * 2_000_000}
    save_rows(tmp_path / "pairs.jsonl", [PAIR, long, PAIR])
    answers = [
        p.chosen for p in load_feedback(preferences(tmp_path / "pairs.jsonl"), 0).preferences
    ]
    assert [len(answer) for answer in answers] == [7, 10_000_000, 7]


# --- the hub -----------------------------------------------------------------------------------

LOAD_DATASET = inspect.signature(datasets.load_dataset)


def called_with(monkeypatch: pytest.MonkeyPatch, data: Data) -> dict:
    """The call that reaches datasets.load_dataset, by its own parameters' names."""
    calls = []

    def load_dataset(*given: object, **named: object) -> datasets.Dataset:
        calls.append(LOAD_DATASET.bind(*given, **named).arguments)
        return datasets.Dataset.from_list([SHAPES["text"]])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_feedback(data, 0).preferences) == 1
    (call,) = calls
    return {key: value for key, value in call.items() if value is not None}


def test_hub_name_with_split_and_revision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "HuggingFaceH4/ultrafeedback_binarized"
    data = preferences(name, split="train_prefs", revision="3949bf5")
    expected = {"path": name, "split": "train_prefs", "revision": "3949bf5"}
    assert called_with(monkeypatch, data) == expected
    assert called_with(monkeypatch, preferences("trl-lib/ultrafeedback_binarized")) == {
        "path": "trl-lib/ultrafeedback_binarized",
        "split": "train",
    }


def test_hub_name_with_data_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    data = preferences("Anthropic/hh-rlhf", data_dir="harmless-base")
    expected = {"path": "Anthropic/hh-rlhf", "data_dir": "harmless-base", "split": "train"}
    assert called_with(monkeypatch, data) == expected


def test_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'nobody/nothing' on the Hub\nmore of it")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError) as caught:
        load_feedback(preferences("nobody/nothing"), 0)
    line = str(caught.value)
    assert line.startswith("data.preferences.path: nobody/nothing: cannot be loaded (Couldn't")
    assert "\n" not in line


def test_limit_samples_the_same_rows_from_the_whole_file(tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {n}?", "chosen": "Yes.", "rejected": "No."} for n in range(200)]
    path = tmp_path / "pairs.jsonl"
    write_rows(path, rows)
    data = Data(preferences=Source(path=str(path), limit=20))
    first, again = (load_feedback(data, 1).prompts for _ in range(2))
    assert first == again and len(first) == 20
    assert any(int(p[0]["content"].split()[1][:-1]) > 100 for p in first)


def test_pair_ids_are_prompt_answer_and_end_of_text() -> None:
    tokenizer = make_tokenizer(make_world(SocietySettings()))
    feedback = load_feedback(Data(society=SocietySettings(pairs=50, prompts=50)), 0)
    rows = pair_ids(tokenizer, feedback.preferences)
    for pair, ids in zip(feedback.preferences, rows, strict=True):
        prompt = policy_prompt_ids(tokenizer, pair.prompt, AUTO)
        for side in ("chosen", "rejected"):
            answer = tokenizer(getattr(pair, side))["input_ids"]
            assert ids[f"{side}_ids"] == [*prompt, *answer, tokenizer.eos_token_id]
    assert tokenizer.unk_token_id not in {i for row in rows for i in row["chosen_ids"]}


def test_malformed_row_of_a_sample_has_its_number_in_the_file(tmp_path: Path) -> None:
    rows = [{**PAIR, "chosen": [] if n == 150 else "Yes."} for n in range(200)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match="row 151: chosen: no messages"):
        load_feedback(preferences(path, limit=199), 0)


@pytest.fixture
def hh_rlhf() -> Path:
    folder = os.environ.get("SELFCORRECT_DATA_DIR")
    if not folder:
        pytest.skip("SELFCORRECT_DATA_DIR is not set: HH-RLHF is not read")
    return next((Path(folder) / "hh_rlhf").glob("*.jsonl.gz"))


def test_real_hh_rlhf_is_read_without_loss(hh_rlhf: Path) -> None:
    with gzip.open(hh_rlhf, "rt", encoding="utf-8") as handle:
        rows = [json.loads(line) for line in handle]
    feedback = load_feedback(preferences(hh_rlhf), 0)
    assert (len(rows), len(feedback.preferences), feedback.left_out) == (2312, 2312, {})
    for pair, row in zip(feedback.preferences, rows, strict=True):
        roles = [turn["role"] for turn in pair.prompt]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        for side in ("chosen", "rejected"):  # no word of any dialogue is lost
            said = "".join([*(turn["content"] for turn in pair.prompt), getattr(pair, side)])
            written = re.sub(r"\n\n(Human|Assistant):", "", row[side])
            assert "".join(said.split()) == "".join(written.split())
