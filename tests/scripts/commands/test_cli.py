"""The command line: models side by side, recipes, and one line for every mistake."""

import json
import os
from pathlib import Path

import pytest

from selfcorrect.recipes.society.benchmarks import write_benchmarks
from selfcorrect.recipes.society.settings import SocietySettings
from selfcorrect.recipes.society.tokenizer import make_tokenizer
from selfcorrect.recipes.society.world import make_world
from tests.support.command import run_command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data/` (the society's benchmarks) and two models of different weights."""
    from selfcorrect.train.stages.corpus import scratch_model

    folder = tmp_path_factory.mktemp("models")
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


def evaluate_arguments(folder: Path, *more: str) -> list[str]:
    data = folder / "data"
    given = ["--data-dir", str(data), "--stimuli", str(data / "stimuli.yaml")]
    return ["evaluate", *more, *given, "--max-new-tokens", "4", "--limit", "16"]


def test_two_models_side_by_side(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [
        *evaluate_arguments(folder, str(folder / "one"), str(folder / "two")),
        "--out",
        str(tmp_path),
    ]
    assert run_command(monkeypatch, *arguments) == 0
    output = capsys.readouterr().out
    assert "one" in output and "two" in output and "Q+IF+CoT" in output and "Match stats" in output
    files = sorted(path for path in tmp_path.rglob("*.parquet") if path.parent.name != "prompts")
    assert len(files) == 2 * 10
    before = {path: path.stat().st_mtime_ns for path in files}
    assert run_command(monkeypatch, *arguments) == 0  # nothing is measured twice
    assert {path: path.stat().st_mtime_ns for path in files} == before


def test_experiment_is_measured_under_all_its_conditions(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*evaluate_arguments(folder, str(folder / "one")), "--out", str(tmp_path)]
    assert run_command(monkeypatch, *arguments, "--experiments", "bbq") == 0
    assert len(list(tmp_path.glob("*/*/bbq.*.parquet"))) == 3


def test_other_weights_of_the_same_name_are_measured_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    model = tmp_path / "model"
    for source in ("one", "two"):
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(folder / source, model)
        arguments = [*evaluate_arguments(folder, str(model)), "--out", str(tmp_path / "out")]
        assert run_command(monkeypatch, *arguments, "--experiments", "winogender") == 0
    assert len(list((tmp_path / "out").rglob("winogender.Q.parquet"))) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./none"], "none"),
        (["{folder}/one", "--data-dir", "{folder}/none"], "no such data folder"),
        (["{folder}/one", "--data-dir", "{folder}/one"], "bbq"),
        (["{folder}/one", "--experiments", "bbk"], "bbk"),
        (["{folder}/one", "--conditions", "Z"], "condition 'Z'"),
        (["{folder}/one", "--out", "{folder}/one/config.json"], "a file; name another folder"),
        (["{folder}/one", "--stimuli", "{folder}/one/config.json"], "config.json"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    words = [word.replace("{folder}", str(folder)) for word in arguments]
    monkeypatch.chdir(tmp_path)
    assert run_command(monkeypatch, *evaluate_arguments(folder), *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1 and error.startswith("selfcorrect: ")
    assert not list(tmp_path.iterdir())


def test_recipes_list_show_and_schema(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(monkeypatch, "recipes", "list") == 0
    assert "quickstart" in capsys.readouterr().out
    assert run_command(monkeypatch, "recipes", "show", "quickstart") == 0
    assert "name: quickstart" in capsys.readouterr().out
    assert run_command(monkeypatch, "recipes", "schema") == 0
    assert "properties" in json.loads(capsys.readouterr().out)
    assert run_command(monkeypatch, "recipes", "show", "none") == 2


def test_report_needs_a_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(monkeypatch, "report", str(tmp_path)) == 2
    assert "not a run folder" in capsys.readouterr().err


@pytest.mark.slow
def test_published_benchmarks_are_scored(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = os.environ.get("SELFCORRECT_DATA_DIR")
    if not folder:
        pytest.skip("SELFCORRECT_DATA_DIR is not set: the published files are not scored")
    save_byte_level_model(tmp_path / "bytes")
    arguments = ["evaluate", str(tmp_path / "bytes"), "--data-dir", folder, "--limit", "24"]
    more = ["--max-new-tokens", "8", "--out", str(tmp_path / "out")]
    assert run_command(monkeypatch, *arguments, *more) == 0
    output = capsys.readouterr().out
    assert "BBQ" in output and "Winogender" in output
    assert len(list((tmp_path / "out").glob("*/*/*.parquet"))) == 10


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
