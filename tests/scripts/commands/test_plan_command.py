"""`selfcorrect plan`: its tables, its errors, and that it loads no torch."""

import subprocess
import sys

import pytest

from tests.support.command import run_command


def test_tables_and_remedies(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--device", "cpu", "--price-per-hour", "2"]
    assert run_command(monkeypatch, "plan", "quickstart", *options) == 0
    output = capsys.readouterr().out
    for words in ("width-64", "reward: learning", "all (h200)", "price", "more while training"):
        assert words in output
    override = "policy.trainer.per_device_train_batch_size=64"
    assert run_command(monkeypatch, "plan", "pythia-full", override) == 0
    output = capsys.readouterr().out
    assert "pythia-1b: policy needs" in output
    assert "pythia-1b: fits with policy.trainer." in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quickstart", "--device", "tpu"], "--device tpu"),
        (["quickstart", "--utilisation", "0"], "--utilisation"),
        (["quickstart", "--price-per-hour", "nan"], "--price-per-hour"),
        (["quickstart", "--zero", "2"], "give --processes 2 or more"),
        (["quickstart", "--zero", "7", "--processes", "2"], "--zero 7"),
        (["quickstart", "--zero", "3", "--processes", "2"], "evaluate.attach=off"),
        (["ablation-grpo", "--processes", "2"], "--processes 2"),
        (["pythia-full", "models.0.path=./none"], "models.0.path: no model folder ./none"),
        (["pythia-full", "data.preferences.limit=null"], "set data.preferences.limit"),
        (["pythia-full", "policy.trainer.optim=adafactor"], "policy.trainer.optim"),
        (["pythia-lora", "policy.lora.target_modules=[nothing]"], "policy.lora.target_modules"),
        (["pythia-full", "policy.trainer.critic=lora"], "policy.trainer.critic"),
        (["pythia-full", "policy.trainer.generation_batch_size=12"], "not a multiple of"),
    ],
)
def test_bad_input_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert run_command(monkeypatch, "plan", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_plan_loads_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['selfcorrect', 'plan', 'pythia-full']\n"
        "from selfcorrect.scripts.commands.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
