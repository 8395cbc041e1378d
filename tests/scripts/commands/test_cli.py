"""The command: models side by side on benchmark files, recipes, and one line for every mistake."""

import json
import os
import sys
from pathlib import Path

import pytest

from selfcorrect.recipes.society.benchmarks import write_benchmarks
from selfcorrect.recipes.society.settings import SocietySettings
from selfcorrect.recipes.society.tokenizer import make_tokenizer
from selfcorrect.recipes.society.world import make_world
from selfcorrect.scripts.commands.__main__ import main


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data/` (the society's benchmarks) and two models of different weights."""
    from selfcorrect.train.stages.corpus import scratch_model

    folder = tmp_path_factory.mktemp("place")
    world = make_world(SocietySettings(blocks_per_template=1))
    write_benchmarks(world, folder / "data")
    tokenizer = make_tokenizer(world)
    for name, seed in (("one", 1), ("two", 2)):
        fields = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
        model = scratch_model({"model_type": "llama", **fields, **heads}, tokenizer, seed)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["selfcorrect", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def evaluate(place: Path, *more: str) -> list[str]:
    data = place / "data"
    given = ["--data-dir", str(data), "--stimuli", str(data / "stimuli.yaml")]
    return ["evaluate", *more, *given, "--max-new-tokens", "4", "--limit", "16"]


def test_two_models_side_by_side(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*evaluate(place, str(place / "one"), str(place / "two")), "--out", str(tmp_path)]
    assert call(monkeypatch, *arguments) == 0
    shown = capsys.readouterr().out
    assert "one" in shown and "two" in shown and "Q+IF+CoT" in shown and "Match stats" in shown
    files = sorted(tmp_path.rglob("*.parquet"))
    assert len(files) == 2 * 10
    before = {path: path.stat().st_mtime_ns for path in files}
    assert call(monkeypatch, *arguments) == 0  # nothing is measured twice
    assert {path: path.stat().st_mtime_ns for path in files} == before


def test_one_experiment_is_asked_under_all_the_conditions_that_it_has(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*evaluate(place, str(place / "one")), "--out", str(tmp_path)]
    assert call(monkeypatch, *arguments, "--experiments", "bbq") == 0
    assert len(list(tmp_path.rglob("bbq.*.parquet"))) == 3


def test_other_weights_under_the_same_name_are_measured_anew(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    model = tmp_path / "model"
    for source in ("one", "two"):
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(place / source, model)
        arguments = [*evaluate(place, str(model)), "--out", str(tmp_path / "out")]
        assert call(monkeypatch, *arguments, "--experiments", "winogender") == 0
    assert len(list((tmp_path / "out").rglob("winogender.Q.parquet"))) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["./none"], "none"),
        (["{place}/one", "--data-dir", "{place}/none"], "no such data folder"),
        (["{place}/one", "--data-dir", "{place}/one"], "bbq"),
        (["{place}/one", "--experiments", "bbk"], "bbk"),
        (["{place}/one", "--conditions", "Z"], "condition 'Z'"),
        (["{place}/one", "--stimuli", "{place}/one/config.json"], "config.json"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    more: list[str],
    message: str,
) -> None:
    given = [word.replace("{place}", str(place)) for word in more]
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *evaluate(place), *given) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1 and shown.startswith("selfcorrect: ")
    assert not list(tmp_path.iterdir())


def test_recipes_are_listed_shown_and_have_a_schema(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "recipes", "list") == 0
    assert "quickstart" in capsys.readouterr().out
    assert call(monkeypatch, "recipes", "show", "quickstart") == 0
    assert "name: quickstart" in capsys.readouterr().out
    assert call(monkeypatch, "recipes", "schema") == 0
    assert "properties" in json.loads(capsys.readouterr().out)
    assert call(monkeypatch, "recipes", "show", "none") == 2


def test_a_report_of_no_run_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "report", str(tmp_path)) == 2
    assert "not a run folder" in capsys.readouterr().err


@pytest.mark.slow
def test_the_published_files_are_scored_by_any_model(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = os.environ.get("SELFCORRECT_DATA_DIR")
    if not folder:
        pytest.skip("SELFCORRECT_DATA_DIR is not set: the published files are not scored")
    save_byte_level_model(tmp_path / "bytes")
    arguments = ["evaluate", str(tmp_path / "bytes"), "--data-dir", folder, "--limit", "24"]
    more = ["--max-new-tokens", "8", "--out", str(tmp_path / "out")]
    assert call(monkeypatch, *arguments, *more) == 0
    shown = capsys.readouterr().out
    assert "BBQ" in shown and "Winogender" in shown
    assert len(list((tmp_path / "out").rglob("*.parquet"))) == 10


def save_byte_level_model(folder: Path) -> None:
    """A model of few weights that can read any text: one token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from selfcorrect.train.stages.corpus import scratch_model

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {character: number for number, character in enumerate(["<pad>", "<eos>", *alphabet])}
    core = Tokenizer(models.BPE(vocab=words, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    fields = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    scratch_model({"model_type": "llama", **fields, **heads}, tokenizer, 0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
