"""Non-finite numbers stop every stage before they are saved; the last good state resumes."""

import hashlib
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from selfcorrect.recipes.foundation.errors import RunFailure
from selfcorrect.recipes.load import check_recipe, load_recipe
from selfcorrect.recipes.schema import Recipe
from selfcorrect.train.feedback.feedback import Preference
from selfcorrect.train.job import run_job
from selfcorrect.train.ppo.rewards import RewardModelScorer
from selfcorrect.train.ppo.trainer import PPOTrainer
from selfcorrect.train.run import prepare_run
from selfcorrect.train.stages import JobFacts
from selfcorrect.train.stages.base import FineTuningTrainer, train_base
from selfcorrect.train.stages.corpus import CorpusTrainer
from selfcorrect.train.stages.reward import GuardedRewardTrainer
from selfcorrect.train.trainers.guarded import GuardedTrainer
from tests.support.small_runs import FEW

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("few_answers")]

TRAINERS = {"base": CorpusTrainer, "reward": GuardedRewardTrainer, "ppo": PPOTrainer}
LATER = {"base": ("reward", "ppo"), "reward": ("ppo",), "ppo": ()}


class StageEnded(Exception):
    """Raised when the stage under test has ended."""


def train(recipe: Recipe, run: Path, last: str = "ppo") -> None:
    def stop_after_last(stage: str, done: int, total: int) -> None:
        if stage in LATER[last]:
            raise StageEnded

    with suppress(StageEnded):
        run_job(recipe, run, "tiny", 0, stop_after_last)


def digest(stage: Path) -> dict[str, str]:
    return {
        str(path.relative_to(stage)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in stage.rglob("*.safetensors")
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    run = tmp_path_factory.mktemp("finite") / "small"
    recipe = load_recipe("quickstart", FEW)
    prepare_run(recipe, run)
    train(recipe, run)
    return run


@pytest.fixture
def before(finished: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of the run as it stands before a stage."""

    def make(stage: str) -> Path:
        run = tmp_path / "small"
        shutil.copytree(finished, run)
        for name in (stage, *LATER[stage]):
            shutil.rmtree(run / "tiny" / "seed-0" / name)
        return run

    return make


def nan_loss(patch: pytest.MonkeyPatch, stage: str) -> None:
    """From the fourth pass on, the loss is NaN."""
    name = "_compute_loss" if stage == "ppo" else "compute_loss"
    change_loss(patch, TRAINERS[stage], name, lambda loss: loss * math.nan)


def infinite_gradient(patch: pytest.MonkeyPatch, stage: str) -> None:
    """From the fourth pass on, the loss is a number and its gradient overflows."""

    def change(loss: torch.Tensor) -> torch.Tensor:
        if loss.requires_grad:
            loss.register_hook(lambda gradient: gradient * math.inf)
        return loss

    name = "_compute_loss" if stage == "ppo" else "compute_loss"
    change_loss(patch, TRAINERS[stage], name, change)


def change_loss(patch: pytest.MonkeyPatch, kind: type, name: str, change: Callable) -> None:
    inner, calls = getattr(kind, name), iter(range(10**6))

    def changed(self: object, *args: object, **kwargs: object) -> object:
        loss = inner(self, *args, **kwargs)
        if next(calls) < 3:
            return loss
        return (change(loss[0]), *loss[1:]) if isinstance(loss, tuple) else change(loss)

    patch.setattr(kind, name, changed)


def overflowing_answers(patch: pytest.MonkeyPatch, stage: str) -> None:
    """The third update leaves weights that are finite, and answers that are not."""
    inner = GuardedTrainer.check_model

    def changed(self: GuardedTrainer) -> None:
        if self.state.global_step >= 3:
            with torch.no_grad():
                self.accelerator.unwrap_model(self.model).get_output_embeddings().weight.fill_(3e38)
        inner(self)

    patch.setattr(GuardedTrainer, "check_model", changed)


def nan_weight(patch: pytest.MonkeyPatch, stage: str) -> None:
    """The third update leaves a NaN, where the next loss would be the first to show it."""
    inner = GuardedTrainer.check_model

    def changed(self: GuardedTrainer) -> None:
        if self.state.global_step >= 3:
            with torch.no_grad():
                next(iter(self.model.parameters())).view(-1)[-1] = math.nan
        inner(self)

    patch.setattr(GuardedTrainer, "check_model", changed)


def infinite_reward(patch: pytest.MonkeyPatch, stage: str) -> None:
    """The reward of the third PPO step is infinite."""
    inner, calls = RewardModelScorer.__call__, iter(range(10**6))

    def changed(self: RewardModelScorer, *args: object, **kwargs: object) -> list[float]:
        scores = inner(self, *args, **kwargs)
        return [math.inf, *scores[1:]] if next(calls) >= 2 else scores

    patch.setattr(RewardModelScorer, "__call__", changed)


CASES = [
    ("base", nan_loss, "base: update 4: the loss is nan"),
    ("base", infinite_gradient, "base: update 4: the gradient norm is"),
    ("base", overflowing_answers, "base: after update 3: the model's logits are not finite"),
    ("reward", nan_loss, "reward: update 4: the loss is nan"),
    ("reward", nan_weight, "reward: after update 3: the weight .* is not finite"),
    ("ppo", nan_loss, "ppo step 1: the loss is nan"),
    ("ppo", infinite_gradient, "ppo step 1: the gradient norm is"),
    ("ppo", overflowing_answers, "ppo: after update 4: the model's logits are not finite"),
    ("ppo", nan_weight, "ppo: after update 4: the weight .* is not finite"),
    ("ppo", infinite_reward, "reward 'reward_model' returned inf for completion 0"),
]


@pytest.fixture
def fault() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.mark.parametrize(("stage", "inject", "said"), CASES)
def test_non_finite_numbers_stop_the_stage_which_resumes_bitwise(
    finished: Path,
    before: Callable,
    fault: pytest.MonkeyPatch,
    stage: str,
    inject: Callable,
    said: str,
) -> None:
    run, recipe = before(stage), load_recipe("quickstart", FEW)
    job = run / "tiny" / "seed-0"
    inject(fault, stage)
    with pytest.raises(RunFailure, match=said) as caught:
        train(recipe, run)
    assert "\n" not in str(caught.value)
    assert not (job / stage / "stage.json").exists()
    for path in job.rglob("*.safetensors"):
        assert all(t.isfinite().all() for t in load_file(path).values() if t.is_floating_point())
    if inject is nan_loss or inject is infinite_reward:  # the others leave the same states
        fault.undo()
        train(recipe, run, stage)
        assert digest(job / stage) == digest(finished / "tiny" / "seed-0" / stage)


@pytest.mark.parametrize("rate", ["1e6", "1e30"])
@pytest.mark.parametrize("stage", ["base", "reward", "ppo"])
def test_huge_learning_rate_never_saves_a_non_finite_model(
    before: Callable, stage: str, rate: str
) -> None:
    """A million may leave numbers, however poor; 1e30 cannot, and stops the stage."""
    run = before(stage)
    recipe = load_recipe("quickstart", [*FEW, f"{stage}.trainer.learning_rate={rate}"])
    if rate == "1e30":
        with pytest.raises(RunFailure, match=r"not finite|is nan|is inf|is -inf"):
            train(recipe, run, stage)
        assert not (run / "tiny" / "seed-0" / stage / "stage.json").exists()
    else:
        with suppress(RunFailure):
            train(recipe, run, stage)
    for path in (run / "tiny" / "seed-0").rglob("*.safetensors"):
        assert all(t.isfinite().all() for t in load_file(path).values() if t.is_floating_point())


def test_non_finite_loss_stops_sft(
    finished: Path, tmp_path: Path, fault: pytest.MonkeyPatch
) -> None:
    base = {"method": "sft", "trainer": {"max_steps": 6, "save_steps": 1}}
    model = {"name": "given", "path": str(finished / "tiny" / "seed-0" / "base")}
    data = {"preferences": {"path": "unused"}, "benchmarks": "unused"}
    rest = {"reward": {}, "policy": {"steps": 1, "checkpoints": [1]}}
    recipe = check_recipe({"name": "x", "models": [model], "data": data, "base": base, **rest}, "x")
    pairs = [Preference([{"role": "user", "content": "who was lazy ?"}], "unknown", "the")] * 8
    change_loss(fault, FineTuningTrainer, "compute_loss", lambda loss: loss * math.nan)
    with pytest.raises(RunFailure, match="base: update 4: the loss is nan"):
        train_base(JobFacts(tmp_path, 0), recipe, recipe.models[0], pairs)
    assert not (tmp_path / "base").exists()
    assert (tmp_path / "base.work" / "checkpoint-3" / "complete").is_file()
