"""PPO in two processes, under DDP and DeepSpeed's ZeRO 1 to 3, is PPO in one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from selfcorrect.recipes.schema import Launch
from selfcorrect.train.distributed.settings import process_environment, write_settings
from tests.support import ROOT
from tests.support.ppo_in_processes import CASES, CRITICS, RESUMED, ROWS, make_trainer, outcome
from tests.train.ppo.test_ppo_trainer import home  # noqa: F401  (a fixture)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def launched(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A folder with what every engine and critic came to, in two processes of one launch."""
    folder = tmp_path_factory.mktemp("launched")
    launch = Launch(processes=2)
    settings = write_settings(launch, folder / "launch", on_gpu=False)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(settings)),
            *(str(ROOT / "tests/support/ppo_in_processes.py"), str(home), str(folder)),
        ],
        capture_output=True,
        text=True,
        timeout=280,
        env={
            **process_environment(launch, 1, on_gpu=False, slot=0),
            **{"CI": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)},
        },
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def alone(home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:  # noqa: F811
    """Curves and weights of the same training in one process, which takes both shares."""
    found = {}
    for critic in CRITICS:
        trainer = make_trainer(home, tmp_path_factory.mktemp(critic), critic, 2 * ROWS)
        start = {name: t.clone() for name, t in trainer.model.state_dict().items()}
        trainer.train()
        found[critic] = (*outcome(trainer), start)
    return found


def of(launched: Path, engine: str, critic: str) -> Path:
    folder = launched / f"{engine}-{critic}"
    if not folder.is_dir():
        pytest.skip("deepspeed is not installed")
    return folder


@pytest.mark.parametrize(("engine", "critic"), CASES)
def test_two_processes_draw_the_curve_of_one(launched, alone, engine, critic) -> None:
    folder = of(launched, engine, critic)
    facts = json.loads((folder / "facts.json").read_text())
    curves, weights, start = alone[critic]
    assert facts["world"] == 2
    assert facts["stage"] == (None if engine == "ddp" else int(engine[-1]))
    assert facts["split"] == (engine == "zero3")
    assert len(set(facts["sums"])) == 1  # one model in both
    assert facts["episodes"] == 3 * 2 * 2 * ROWS
    assert len(set(curves["objective/score"])) > 1 and abs(curves["objective/kl"][-1]) > 0.1
    for name, curve in curves.items():
        assert facts["curves"][name] == pytest.approx(curve, abs=2e-4, rel=2e-4), name
    found = load_file(folder / "weights.safetensors")
    trained = {name for name in weights if not torch.equal(weights[name], start[name])}
    assert any("critic" in name for name in trained)
    assert any("critic" not in name for name in trained)
    assert trained <= set(found)
    for name in trained:
        moved = (weights[name] - start[name]).abs().max()
        assert (found[name] - weights[name]).abs().max() < 0.01 * moved, name


@pytest.mark.parametrize("critic", CRITICS)
def test_zero_2_is_zero_3(launched, critic) -> None:
    two, three = (
        load_file(of(launched, engine, critic) / "weights.safetensors")
        for engine in ("zero2", "zero3")
    )
    for name, tensor in two.items():
        if name in three:
            torch.testing.assert_close(three[name], tensor, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("engine", "critic"), RESUMED)
def test_resumed_within_a_rollout_it_ends_in_the_same_weights(launched, engine, critic) -> None:
    folder = of(launched, engine, critic)
    first, again = (load_file(folder / f"{name}.safetensors") for name in ("weights", "resumed"))
    for name, tensor in first.items():
        assert torch.equal(again[name], tensor), name


@pytest.mark.parametrize(("engine", "critic"), CASES)
def test_the_saved_policy_is_the_trained_one_without_its_critic(launched, engine, critic) -> None:
    folder = of(launched, engine, critic)
    trained = load_file(folder / "weights.safetensors")
    adapter = critic == "lora"
    saved = load_file(folder / "policy" / f"{'adapter_model' if adapter else 'model'}.safetensors")
    assert not any("critic" in name for name in saved)
    for name, tensor in saved.items():
        own = name.replace(".weight", ".default.weight") if adapter else name
        assert torch.equal(tensor, trained[own]), name
    model = AutoModelForCausalLM.from_pretrained(folder / "policy")  # as others will read it
    assert model(torch.tensor([[5, 6]])).logits.isfinite().all()
