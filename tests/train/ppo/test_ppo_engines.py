"""PPO in two processes, under DDP and DeepSpeed's ZeRO 1 to 3, equals PPO in one."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support.fork_server import ForkServer
from tests.support.ppo_in_processes import (
    ALWAYS,
    CASES,
    MAX_GRAD_NORM,
    RESUMED,
    ROWS,
    curves_and_weights,
    make_greedy_trainer,
)
from tests.support.ppo_models import CRITICS, assert_same_weights, copy_weights
from tests.support.ranks import HAS_DEEPSPEED, run_module

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
MATRIX = [
    pytest.param(*case, marks=[] if case in ALWAYS else [pytest.mark.matrix]) for case in CASES
]


@pytest.fixture(scope="module")
def launched(
    models: Path,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
    forks: ForkServer,
) -> Path:
    """A folder with the outcome of each parallelism and critic that is asked for, in two ranks."""
    folder = tmp_path_factory.mktemp("launched")
    cases = CASES if request.config.getoption("--matrix") else ALWAYS
    names = ["-".join(case) for case in cases if case[0] == "ddp" or HAS_DEEPSPEED]
    run_module(forks, "ppo_in_processes", models, folder, *names)
    return folder


@pytest.fixture(scope="module")
def single(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Curves, weights and first weights of the same training in one process, by critic."""
    outcomes = {}
    for critic in CRITICS:
        trainer = make_greedy_trainer(models, tmp_path_factory.mktemp(critic), critic, 2 * ROWS)
        start = copy_weights(trainer)
        trainer.train()
        outcomes[critic] = (*curves_and_weights(trainer), start)
    return outcomes


def outcome(launched: Path, parallelism: str, critic: str) -> Path:
    folder = launched / f"{parallelism}-{critic}"
    if not folder.is_dir():
        pytest.skip("deepspeed is not installed")
    return folder


@pytest.mark.parametrize(("parallelism", "critic"), MATRIX)
def test_two_processes_draw_the_curves_of_one(launched, single, parallelism, critic) -> None:
    folder = outcome(launched, parallelism, critic)
    facts = json.loads((folder / "facts.json").read_text())
    curves, weights, start = single[critic]
    assert facts["world"] == 2
    assert facts["stage"] == (None if parallelism == "ddp" else int(parallelism[-1]))
    assert facts["split"] == (parallelism == "zero3")
    assert len(set(facts["sums"])) == 1  # both processes have the same model
    assert facts["episodes"] == 3 * 2 * 2 * ROWS
    assert len(set(curves["objective/score"])) > 1 and abs(curves["objective/kl"][-1]) > 0.1
    assert max(curves["grad_norm"]) > MAX_GRAD_NORM[critic]  # else clipping would not show
    for name, curve in curves.items():
        assert facts["curves"][name] == pytest.approx(curve, abs=2e-4, rel=2e-4), name
    distributed = load_file(folder / "weights.safetensors")
    trained = {name for name in weights if not torch.equal(weights[name], start[name])}
    assert any("critic" in name for name in trained)
    assert any("critic" not in name for name in trained)
    assert trained <= set(distributed)
    for name in trained:
        moved = (weights[name] - start[name]).abs().max()
        assert (distributed[name] - weights[name]).abs().max() < 0.01 * moved, name


@pytest.mark.parametrize(
    ("parallelism", "critic"), [case for case in MATRIX if "zero2" in case.values]
)
def test_zero_2_equals_zero_3(launched, parallelism, critic) -> None:
    zero2, zero3 = (
        load_file(outcome(launched, stage, critic) / "weights.safetensors")
        for stage in (parallelism, "zero3")
    )
    common = zero2.keys() & zero3.keys()
    assert any("critic" in name for name in common)
    for name in common:
        torch.testing.assert_close(zero3[name], zero2[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("parallelism", "critic"), RESUMED)
def test_run_resumed_within_a_rollout_ends_bitwise_equal(launched, parallelism, critic) -> None:
    folder = outcome(launched, parallelism, critic)
    weights, resumed = (
        load_file(folder / f"{name}.safetensors") for name in ("weights", "resumed")
    )
    assert_same_weights(weights, resumed)


@pytest.mark.parametrize(("parallelism", "critic"), MATRIX)
def test_saved_policy_is_the_trained_one_without_its_critic(launched, parallelism, critic) -> None:
    folder = outcome(launched, parallelism, critic)
    trained = load_file(folder / "weights.safetensors")
    adapter = critic == "lora"
    saved = load_file(folder / "policy" / f"{'adapter_model' if adapter else 'model'}.safetensors")
    assert saved and not any("critic" in name for name in saved)
    for name, tensor in saved.items():
        trained_name = name.replace(".weight", ".default.weight") if adapter else name
        assert torch.equal(tensor, trained[trained_name]), name
    model = AutoModelForCausalLM.from_pretrained(folder / "policy")  # as users will load it
    assert model(torch.tensor([[5, 6]])).logits.isfinite().all()


def test_whitening_in_two_processes_equals_whitening_the_complete_batch(launched) -> None:
    for rank in range(2):
        facts = json.loads((launched / f"whitening.{rank}.json").read_text())
        assert facts["gap"] < 1e-5
        assert facts["reduced"] == pytest.approx(facts["single"], abs=1e-6)
