"""Jobs in several processes: progress, errors, signals, and the bytes that they leave."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from selfcorrect.evaluate.run_folder import find_checkpoints
from selfcorrect.evaluate.scoring.weights import files_digest
from selfcorrect.recipes.foundation.errors import InputError, RunFailure
from selfcorrect.recipes.load import check_recipe, load_recipe, save_recipe
from selfcorrect.scripts.commands.__main__ import main
from selfcorrect.train import job
from selfcorrect.train.distributed import parent
from selfcorrect.train.job import hold_job
from selfcorrect.train.run import prepare_run
from tests.support.ranks import HAS_DEEPSPEED, run_module
from tests.support.small_runs import SECONDS, command, digests, wait_until
from tests.support.tiny_models import tiny_model, tiny_tokenizer, write_tiny_winogender

# Stands in for accelerate: two processes with the real protocol, whose work is a few lines.
LAUNCHER = """
import subprocess, sys, time
code = '''
import os, signal, sys, time
import selfcorrect.train.distributed.worker as worker
from selfcorrect.recipes.foundation.errors import InputError, RunFailure
first = {first}
def work(run, model, seed, send):
    {work}
worker._work = work
worker.main()
'''
work = WORK
programs = [code.format(first=first, work=work) for first in (True, False)]
children = [subprocess.Popen([sys.executable, "-c", p, *sys.argv[-4:]]) for p in programs]
while any(child.poll() is None for child in children):
    if any(child.poll() for child in children):
        for child in children:
            child.terminate()
    time.sleep(0.05)
sys.exit(any(child.returncode for child in children))
"""
WAITS = "time.sleep(3000)"
# The second process is killed; the first one notices half a second later, however slow both are.
DIES = (
    "dying = run / 'dying'; "
    "first or (dying.touch(), os.kill(os.getpid(), signal.SIGKILL)); "
    "[time.sleep(0.5) for _ in iter(dying.exists, True)]; time.sleep(0.5)"
)


def run_with(work: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list:
    """Run a job whose two processes do `work`; return the reported progress."""
    script = folder / "launcher.py"
    script.write_text(LAUNCHER.replace("WORK", repr(work)))
    monkeypatch.setattr(parent, "LAUNCHER", [sys.executable, str(script)])
    recipe = load_recipe("quickstart", ["launch.processes=2"])
    save_recipe(recipe, folder / "recipe.yaml")
    reports: list = []
    parent.run_distributed(recipe, folder, "m", 0, lambda *report: reports.append(report))
    return reports


def test_progress_is_reported_whatever_libraries_print(tmp_path, monkeypatch) -> None:
    work = "print('{noise'); [send(stage='ppo', done=i, total=3) for i in range(4) if first]"
    reports = run_with(work, tmp_path, monkeypatch)
    assert reports == [("ppo", i, 3) for i in range(4)]
    assert (tmp_path / "m" / "seed-0" / "processes.log").read_text().count("{noise") == 2


@pytest.mark.parametrize(
    ("work", "kind", "message"),
    [
        (f"{WAITS} if first else exec('raise InputError(\"reward: odd\")')", InputError, "odd$"),
        (f"{WAITS} if first else exec('raise RunFailure(\"lost\")')", RunFailure, "^lost$"),
        (
            f"exec('raise ValueError(\"odd, and more\")') if first else {WAITS}",
            RunFailure,
            r"^ValueError: odd, and more; the traceback is in .*processes\.log$",
        ),
        (
            f"{DIES}; raise RuntimeError('connection closed by peer')",
            RunFailure,
            r"^a training process was killed \(out of memory\?\); run the same command again",
        ),
        ("os._exit(3)", RunFailure, "^a training process was killed"),
    ],
    ids=["input", "failure", "error", "killed", "gone"],
)
def test_error_of_one_process_ends_the_others(tmp_path, monkeypatch, work, kind, message) -> None:
    with pytest.raises(kind, match=message):
        run_with(work, tmp_path, monkeypatch)  # the other process would wait past any limit
    left = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, check=False)
    assert not left.stdout
    if "ValueError" in work:
        assert "Traceback" in (tmp_path / "m" / "seed-0" / "processes.log").read_text()


def test_job_held_by_another_process_is_left_alone(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(job, "KILLED_PROCESS_SECONDS", 0.1)
    folder = tmp_path / "m" / "seed-0"
    work = f"open({str(tmp_path / 'started')!r}, 'w')"
    with job.hold_job(folder):
        (folder / "processes.log").write_text("of the other process")
        with pytest.raises(InputError, match="is training here"):
            run_with(work, tmp_path, monkeypatch)
        assert not (tmp_path / "started").exists()
        assert (folder / "processes.log").read_text() == "of the other process"
    run_with(work, tmp_path, monkeypatch)
    assert (tmp_path / "started").exists()


def test_failure_to_start_is_one_line(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(parent, "LAUNCHER", [sys.executable, "-c", "raise SystemExit(1)"])
    recipe = load_recipe("quickstart", ["launch.processes=2"])
    with pytest.raises(RunFailure, match=r"could not start; see .*processes\.log"):
        parent.run_distributed(recipe, tmp_path, "m", 0, lambda *_: None)


# ---- whole runs --------------------------------------------------------------------------------

ENGINE = ["launch.processes=2"]  # without DeepSpeed: the same under DistributedDataParallel
if HAS_DEEPSPEED:
    ENGINE += ["launch.deepspeed=zero3"]


@pytest.mark.slow
@pytest.mark.timeout(3 * SECONDS)
def test_run_in_two_processes_survives_sigterm_and_sigkill(tmp_path, forks) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    folder = runs / "small" / "tiny" / "seed-0"
    little = ["evaluate.experiments=[bbq]", "evaluate.conditions=[Q, Q+IF+CoT]"]
    words = command(runs, *ENGINE, *little, "evaluate.limit=8")
    process = forks.start(words, tmp_path)  # asked to end: the state is saved, by both processes
    wait_until(lambda: (folder / "ppo" / "checkpoint-0" / "evaluation").is_dir(), process)
    process.send_signal(signal.SIGTERM)
    _, shown = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, shown
    assert "SIGTERM" in shown.splitlines()[-1]
    (state,) = folder.glob("ppo.work/checkpoint-*")
    assert (state / "complete").is_file()
    randoms = [*state.glob("rng_state_*.pth"), *state.glob("random-*.safetensors")]
    assert len(randoms) == 2  # a part of each process
    if len(ENGINE) > 1:
        assert len(list(state.glob("global_step*/*optim_states.pt"))) == 2

    process = forks.start(words, tmp_path)  # killed: its processes do not go on unseen
    wait_until(lambda: (folder / "ppo" / "checkpoint-2" / "checkpoint.json").is_file(), process)
    process.kill()
    process.communicate()
    with hold_job(folder):
        left = subprocess.run(["pgrep", "-f", str(folder)], capture_output=True, check=False)
        assert not left.stdout

    process = forks.start(words, tmp_path)
    shown = process.communicate(timeout=SECONDS)[1]
    assert process.returncode == 0, shown
    assert not list(folder.glob("*.work"))
    checkpoints = find_checkpoints(runs / "small")
    assert [c.record.step for c in checkpoints] == [0, 2, 4]
    last = checkpoints[-1].record
    assert (last.episodes, last.optimizer_updates) == (4 * 2 * 16, 4 * 4)  # 16 a process
    assert last.kl is not None and last.reward is not None
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    for checkpoint in checkpoints:
        assert checkpoint.record.weights_digest == files_digest(checkpoint.folder)
        _, report = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder, output_loading_info=True
        )
        assert not any(report.values()), report
    AutoModelForSequenceClassification.from_pretrained(folder / "reward")
    assert (runs / "small" / "report.html").stat().st_size > 0
    facts = json.loads((runs / "small" / "run.json").read_text())
    assert (facts["processes"], facts["deepspeed"]) == (2, "zero3" if len(ENGINE) > 1 else None)

    # What was measured inside, by both, is what the saved checkpoint says of itself.
    from selfcorrect.evaluate.measuring.run import evaluate_run

    before = digests(runs / "small")
    shutil.rmtree(checkpoints[-1].evaluation)
    run = load_recipe(str(runs / "small" / "recipe.yaml"))
    assert evaluate_run(run, runs / "small") == 1
    assert digests(runs / "small") == before

    # Another number of processes is another run.
    done = forks.call([*words, "launch.processes=1"], tmp_path)
    assert done.returncode == 2
    assert re.fullmatch(r"selfcorrect: .*was begun with launch\.processes: 2, .*\n", done.stderr)


@pytest.mark.slow
@pytest.mark.timeout(3 * SECONDS)
def test_sft_and_lora_in_two_processes(tmp_path, forks) -> None:
    """Under ZeRO-3 no process has the model whole: not to read, to merge, or to save it."""
    base = tmp_path / "tiny"
    tiny_model("llama").save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    write_tiny_winogender(tmp_path / "data")
    pairs = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"who told {who} to go {way} ?", "chosen": "she is fair", "rejected": "he he"}
        for way in ("north", "south", "east", "west")
        for who in ("doctor", "nurse", "student", "group", "man", "woman")
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer = {"per_device_train_batch_size": 4, "steps_per_generation": 1, "num_iterations": 1}
    lora = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
    content = {
        "name": "given",
        "models": [{"name": "given", "path": str(base)}],
        "data": {"preferences": {"path": str(pairs)}, "benchmarks": str(tmp_path / "data")},
        "base": {"method": "sft", "trainer": {"max_steps": 2, "learning_rate": 1e-2}},
        "reward": {"trainer": {"max_steps": 2, "learning_rate": 1e-2}, "lora": lora},
        "policy": {
            "steps": 2, "checkpoints": [0, 2], "lora": lora,
            "trainer": {**trainer, "max_completion_length": 4, "learning_rate": 1e-2},
        },
        "evaluate": {"experiments": ["winogender"], "conditions": ["Q"]},
        "launch": {"processes": 2, "threads": 1, **dict(e[7:].split("=") for e in ENGINE[1:])},
    }  # fmt: skip
    prepare_run(check_recipe(content, "given"), tmp_path / "given", here=False)
    run_module(forks, "ranks", "train", tmp_path / "given", "zero3" if HAS_DEEPSPEED else "ddp")
    seed = tmp_path / "given" / "given" / "seed-0"
    given, tuned, reward = (
        load_file(folder / "model.safetensors") for folder in (base, seed / "base", seed / "reward")
    )
    assert tuned.keys() == given.keys()
    assert any(not torch.equal(tuned[name], given[name]) for name in given)
    changed = {
        name for name in reward if name in tuned and not torch.equal(reward[name], tuned[name])
    }
    assert changed == {name for name in tuned if "q_proj" in name or "v_proj" in name}
    assert [name for name in reward if name not in tuned] == ["score.weight"]
    first, last = find_checkpoints(tmp_path / "given")
    assert last.record.parameters == sum(tensor.numel() for tensor in given.values())
    adapters = [load_file(c.folder / "adapter_model.safetensors") for c in (first, last)]
    assert any(not torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    assert not any("critic" in name for name in adapters[1])
    for checkpoint in (first, last):
        assert list(checkpoint.evaluation.glob("*.parquet"))


def test_batch_size_must_divide_among_processes(tmp_path, monkeypatch, capsys) -> None:
    runs = tmp_path / "runs"
    more = ["policy.trainer.steps_per_generation=null", "policy.trainer.generation_batch_size=24"]
    words = command(runs, "launch.processes=2", *more)
    monkeypatch.setattr(sys, "argv", ["selfcorrect", *words[3:]])
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capsys.readouterr().err
    assert ended.value.code == 2
    assert re.fullmatch(r"selfcorrect: .*24.*\n", shown), shown
    assert not list(runs.glob("small/tiny/seed-0/base*"))
