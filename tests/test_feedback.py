"""Feedback from data: dialogues of the usual shapes become the same prompts and pairs."""

import gzip
import json
import os
from pathlib import Path

import pytest

from selfcorrect.recipes.errors import InputError
from selfcorrect.recipes.schema import Data, Source
from selfcorrect.recipes.society.settings import SocietySettings
from selfcorrect.recipes.society.tokenizer import make_tokenizer
from selfcorrect.recipes.society.world import make_world
from selfcorrect.train.feedback import load_feedback, pair_ids, render_prompt

USER = {"role": "user", "content": "What is it?"}
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
}


def write_rows(path: Path, rows: list[dict]) -> Data:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Data(preferences=Source(path=str(path)))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_a_pair_gives_the_same_prompt_and_answers(
    tmp_path: Path, shape: str
) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", [SHAPES[shape]])
    (pair,) = load_feedback(data, 0).preferences
    assert (list(pair.prompt), pair.chosen, pair.rejected) == ([USER], "A lake.", "No.")
    assert load_feedback(data, 0).prompts == [[USER]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "a"}, "row 1: preferences need the columns chosen and rejected"),
        ({"chosen": "no turns", "rejected": "none"}, "row 1: expected turns that begin with"),
        (
            {
                "chosen": "\n\nHuman: a\n\nAssistant: b",
                "rejected": "\n\nHuman: c\n\nAssistant: d",
            },
            "row 1: chosen and rejected differ before the last turn",
        ),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: dict, message: str) -> None:
    good = {"rejected": SHAPES["text"]["rejected"], "chosen": SHAPES["text"]["chosen"]}
    path = tmp_path / "pairs.csv"
    import pandas as pd

    pd.DataFrame([good, {"rejected": None, **row}]).drop(
        columns=[] if "rejected" in row else ["rejected"]
    ).to_csv(path, index=False)
    with pytest.raises(InputError) as caught:
        load_feedback(Data(preferences=Source(path=str(path))), 0)
    assert message.split(": ", 1)[1] in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_and_empty_files_are_one_line(tmp_path: Path) -> None:
    missing = Data(preferences=Source(path=str(tmp_path / "none.jsonl")))
    with pytest.raises(InputError, match=r"data.preferences.path: no file .*none.jsonl"):
        load_feedback(missing, 0)
    (tmp_path / "broken.jsonl").write_text('{"chosen": ')
    with pytest.raises(InputError, match=r"data.preferences.path: .*broken.jsonl cannot be loaded"):
        load_feedback(Data(preferences=Source(path=str(tmp_path / "broken.jsonl"))), 0)


def test_a_limit_takes_rows_from_everywhere_and_always_the_same(tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {n}?", "chosen": "Yes.", "rejected": "No."} for n in range(200)]
    path = tmp_path / "pairs.jsonl"
    write_rows(path, rows)
    data = Data(preferences=Source(path=str(path), limit=20))
    first, again = (load_feedback(data, 1).prompts for _ in range(2))
    assert first == again and len(first) == 20
    assert any(int(p[0]["content"].split()[1][:-1]) > 100 for p in first)


def test_pairs_are_prompt_answer_and_end_of_text() -> None:
    tokenizer = make_tokenizer(make_world(SocietySettings()))
    feedback = load_feedback(Data(society=SocietySettings(pairs=50, prompts=50)), 0)
    for pair in feedback.preferences:
        prompt = tokenizer(render_prompt(tokenizer, pair.prompt))["input_ids"]
        ids = pair_ids(tokenizer, pair)
        for side in ("chosen", "rejected"):
            answer = tokenizer(getattr(pair, side))["input_ids"]
            assert ids[f"{side}_ids"] == [*prompt, *answer, tokenizer.eos_token_id]
    assert tokenizer.unk_token_id not in {
        i for p in feedback.preferences for i in pair_ids(tokenizer, p)["chosen_ids"]
    }


def test_real_hh_rlhf_dialogues_are_read_to_the_last_row(tmp_path: Path) -> None:
    folder = os.environ.get("SELFCORRECT_DATA_DIR")
    if not folder:
        pytest.skip("SELFCORRECT_DATA_DIR is not set: HH-RLHF is not read")
    packed = next((Path(folder) / "hh_rlhf").glob("*.jsonl.gz"))
    path = tmp_path / "hh.jsonl"
    path.write_bytes(gzip.decompress(packed.read_bytes()))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    same = [row for row in rows if _prompt(row["chosen"]) == _prompt(row["rejected"])]
    assert len(same) > 0.9 * len(rows) == 0.9 * 2312
    data = write_rows(tmp_path / "same.jsonl", same)
    feedback = load_feedback(data, 0)
    assert len(feedback.preferences) == len(same)
    assert all(p.prompt[-1]["role"] == "user" for p in feedback.preferences)


def _prompt(text: str) -> str:
    return text[: text.rindex("\n\nAssistant:")]
