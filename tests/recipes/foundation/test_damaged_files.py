"""Damaged files are reported or recomputed, and odd input ends in one line.

These are samples; the full drills are tests/drills/damage.py and fuzz.py.
"""

import hashlib
import logging
import random
import shutil
from pathlib import Path

import pytest

from selfcorrect.evaluate.data import catalogue
from selfcorrect.evaluate.data.catalogue import warn_if_unpublished
from selfcorrect.evaluate.measuring.inputs import check_inputs
from selfcorrect.recipes.foundation.atomic_files import write_text
from selfcorrect.recipes.foundation.checksums import MARK, digests, read_record, write_record
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.load import load_recipe, save_recipe
from selfcorrect.scripts.commands import report as command
from selfcorrect.train.run import prepare_run, train_run
from tests.drills import damage, fuzz_files, fuzz_targets
from tests.drills.damage_inputs import recipe_on, write_pairs
from tests.drills.damage_readers import all_kinds
from tests.drills.damage_run import adapter_run, small_run
from tests.drills.fuzz import run_target

pytestmark = pytest.mark.usefixtures("few_answers")
MUTATIONS_A_KIND = 2
EXAMPLES = 15


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train two small runs; small.work keeps the training states of the first."""
    runs = tmp_path_factory.mktemp("damage") / "runs"
    adapter_run(runs, small_run(runs))
    return runs


def test_flipped_bit_in_a_record_is_refused_or_harmless(tmp_path: Path) -> None:
    path, facts = tmp_path / "record.json", {"step": 12, "kl": 0.5, "note": "é\n"}
    write_record(path, facts)
    data = path.read_bytes()
    refused = 0
    for at in range(len(data)):
        for bit in range(8):
            path.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
            try:
                assert read_record(path, "copy it again") == facts
            except InputError as error:
                refused += 1
                assert str(path) in str(error) and str(error).endswith("copy it again")
    harmless = len(data) * 8 - refused
    assert harmless <= 8 * len(MARK)  # a file without the mark counts as one without checksum
    path.write_text('{"step": 1}')
    assert read_record(path, "") == {"step": 1}  # of an older version


def test_damaged_files_of_every_kind_are_reported_or_recomputed(runs: Path, tmp_path: Path) -> None:
    copies = shutil.copytree(runs, tmp_path / "runs")
    room = tmp_path / "room"
    room.mkdir()
    run = copies / "small"
    every = list(all_kinds(run, copies / "adapter", copies / "small.work", room))
    roots = [run, copies / "adapter", copies / "small.work", room]

    def sampled(kind, flips, chance, all_of=damage.mutations):
        return random.Random(kind.name).sample(list(all_of(kind, flips, chance)), MUTATIONS_A_KIND)

    failures: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(damage, "mutations", sampled)
        table = damage.drill(every, roots, 4, 1, failures.append)
    assert not failures
    assert len(table) > 80
    states = [name for name in table if name.startswith("training state")]
    assert len(states) >= 13
    assert all(table[name]["recomputed"] == MUTATIONS_A_KIND for name in states)
    assert table["checkpoint: model.safetensors"]["named"] == MUTATIONS_A_KIND


def test_drill_detects_a_reader_that_accepts_damage(tmp_path: Path) -> None:
    path, other = tmp_path / "a.txt", tmp_path / "b.txt"
    path.write_text("right")
    other.write_text("wrong")
    kind = damage.Kind("text", path, other, lambda: path.read_text(errors="replace"))
    failures: list[str] = []
    table = damage.drill([kind], [tmp_path], 2, 0, failures.append)["text"]
    assert table["silent"] > 5 and table["traceback"] == 1  # a folder
    assert len(failures) == table["silent"] + table["traceback"]


def test_run_resumed_past_damage_is_bitwise_equal(
    runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, run = runs / "small", tmp_path / "small"
    job = run / "tiny" / "seed-0"
    shutil.copytree(whole, run)
    shutil.copytree(runs / "small.work", job / "ppo.work")
    (job / "ppo" / "stage.json").unlink()
    shutil.rmtree(job / "ppo" / "checkpoint-3")
    flip(job / "ppo.work" / "checkpoint-8" / "optimizer.safetensors")
    flip(job / "ppo" / "checkpoint-2" / "model.safetensors")
    flip(run / "benchmarks" / "winogender" / "templates.tsv")
    recipe = load_recipe(str(run / "recipe.yaml"))
    prepare_run(recipe, run)
    train_run(recipe, run, lambda *_: None)
    messages = "\n".join(caplog.messages)
    for name in ("optimizer.safetensors", "checkpoint-2/model.safetensors", "templates.tsv"):
        assert f"{name}: damaged or replaced" in messages
    assert weights_and_cells(run) == weights_and_cells(whole)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def weights_and_cells(run: Path) -> dict[str, str]:
    names = (".safetensors", ".parquet", ".tsv")
    return {name: digest for name, digest in digests(run).items() if name.endswith(names)}


def test_damaged_results_are_recomputed(runs: Path, tmp_path: Path, monkeypatch, caplog):
    run = shutil.copytree(runs / "small", tmp_path / "small")
    from selfcorrect.evaluate.results import write_results

    write_results(run, num_resamples=20)
    page = run / "report.html"
    write_text(page, "a report")
    drawn: list[Path] = []

    def draw(given: list[Path], *_: object) -> Path:
        drawn.extend(given)
        write_results(run, num_resamples=20)
        return page

    monkeypatch.setattr(command, "_write", draw)
    command.show([run], redraw=False)
    assert not drawn
    flip(run / "results.parquet")
    command.show([run], redraw=False)
    assert drawn == [run] and "results.parquet: damaged" in caplog.text
    command.show([run], redraw=False)
    assert drawn == [run]


def test_changed_feedback_ends_the_run_and_a_changed_benchmark_is_logged_once(
    runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pairs, run = tmp_path / "pairs.jsonl", tmp_path / "run"
    benchmarks = shutil.copytree(runs / "small" / "benchmarks", tmp_path / "benchmarks")
    write_pairs(pairs, "lazy")
    recipe = recipe_on(tmp_path, pairs, benchmarks, benchmarks / "stimuli.yaml")
    check_inputs(recipe, run, training=True)
    check_inputs(recipe, run, training=True)
    assert not caplog.messages
    flip(benchmarks / "winogender" / "templates.tsv")
    check_inputs(recipe, run, training=False)
    check_inputs(recipe, run, training=False)
    (line,) = caplog.messages
    assert line.startswith("data.benchmarks: winogender/templates.tsv has changed since")
    write_pairs(pairs, "rude")
    check_inputs(recipe, run, training=False)
    with pytest.raises(InputError, match=r"data\.preferences\.path: pairs\.jsonl has changed"):
        check_inputs(recipe, run, training=True)


def test_unpublished_benchmark_file_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "_warned", set())
    (tmp_path / "winogender").mkdir()
    (tmp_path / "winogender" / "templates.tsv").write_text("mine\n")
    warn_if_unpublished(tmp_path, ["bbq"])
    assert not caplog.messages
    warn_if_unpublished(tmp_path, ["bbq", "winogender"])
    warn_if_unpublished(tmp_path, ["bbq", "winogender"])
    (line,) = caplog.messages
    assert "templates.tsv: differs from the published file" in line


def test_edited_recipe_of_a_run_is_used_with_one_warning(
    runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "recipe.yaml"
    saved = (runs / "small" / "recipe.yaml").read_text()
    path.write_text(saved)
    load_recipe(str(path))
    assert not caplog.messages
    path.write_text(saved.replace("limit: 16", "limit: 17"))
    for _ in range(2):
        recipe = load_recipe(str(path))
    assert recipe.evaluate.limit == 17
    (line,) = caplog.messages
    assert line.startswith(f"{path}: edited or damaged")
    save_recipe(recipe, path)
    assert load_recipe(str(path)) == recipe and len(caplog.messages) == 1
    path.write_text(saved.replace("limit: 16", "limmit: 16"))
    with pytest.raises(InputError, match="limmit: unknown key"):
        load_recipe(str(path))


def test_checksum_mark_of_earlier_versions_is_still_verified(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    text = '{"seal": "selfcorrect-seal:' + "0" * 64 + '", "step": 1}\n'
    digest = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(text.replace("0" * 64, digest))
    assert read_record(path, "") == {"step": 1}
    path.write_text(path.read_text().replace('"step": 1', '"step": 2'))
    with pytest.raises(InputError, match="checksum mismatch"):
        read_record(path, "")


def test_odd_input_ends_in_success_or_one_line(
    runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoTokenizer

    caplog.set_level(logging.ERROR)
    checkpoint = runs / "small" / "tiny" / "seed-0" / "ppo" / "checkpoint-2"
    chat, plain = (AutoTokenizer.from_pretrained(checkpoint) for _ in range(2))
    plain.chat_template = None
    targets = [
        *fuzz_targets.recipe_targets(tmp_path),
        *fuzz_targets.dialogue_targets(plain, chat),
        *fuzz_targets.option_targets(tmp_path),
        *fuzz_files.file_targets(tmp_path, checkpoint, runs / "small" / "benchmarks"),
    ]
    counts = {target[0]: run_target(target, EXAMPLES) for target in targets}
    assert len(counts) > 35
    assert all(counted.total() >= EXAMPLES for counted in counts.values())
    assert sum(counted["read"] for counted in counts.values()) > 100


def test_fuzzing_detects_a_reader_that_raises() -> None:
    from hypothesis import strategies as st

    with pytest.raises(ZeroDivisionError):
        run_target(("breaks", st.integers(0, 3), lambda number: 1 // number), 20)


@pytest.mark.parametrize("kind", [InputError, damage.RunFailure])
def test_error_message_is_one_line_whatever_it_quotes(kind: type[Exception]) -> None:
    assert str(kind("a:\n b\r\n\tc")) == "a: b c"
