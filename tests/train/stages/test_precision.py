"""Frozen weights in bfloat16: held, recorded and measured in it; what learns stays float32."""

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open

from selfcorrect.evaluate.measuring.cell_files import read_settings
from selfcorrect.evaluate.measuring.run import evaluate_run, is_measured, recipe_plan
from selfcorrect.evaluate.run_folder import find_checkpoints
from selfcorrect.evaluate.scoring.precision import SMALL, num_parameters, resolved
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.load import load_recipe, training_digest
from selfcorrect.recipes.schema import Precision, Recipe
from selfcorrect.train.ppo.trainer import PPOTrainer
from selfcorrect.train.run import prepare_run, train_run
from selfcorrect.train.stages.corpus import scratch_config
from selfcorrect.train.trainers.guarded import leave_casts_to_autocast
from tests.support.ppo_models import assert_same_weights
from tests.support.small_runs import FEW
from tests.support.tiny_models import tiny_model

pytestmark = pytest.mark.slow

Trained = tuple[Recipe, Path, tuple[PPOTrainer, Any]]  # with the reward model
LORA = "{r: 2, target_modules: all-linear}"
SETTINGS = [
    *FEW, f"policy.lora={LORA}", f"reward.lora={LORA}", "precision.frozen=bfloat16",
    "evaluate.attach=inline", "evaluate.conditions=[Q]", "evaluate.experiments=[bbq]",
    "policy.steps=2", "policy.checkpoints=[0, 2]",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A finished LoRA run on a bfloat16 base, with its trainer and reward model."""
    run = tmp_path_factory.mktemp("precision") / "small"
    recipe, trainers = load_recipe("quickstart", SETTINGS), []
    with pytest.MonkeyPatch.context() as patch:
        made = PPOTrainer.__init__

        def keep(self: PPOTrainer, *args: Any, **kwargs: Any) -> None:
            made(self, *args, **kwargs)
            trainers.append((self, kwargs["reward_funcs"][0].model))

        patch.setattr(PPOTrainer, "__init__", keep)
        train_run(recipe, run, plan=prepare_run(recipe, run))
    return recipe, run, trainers[0]


@pytest.mark.parametrize("autocast", [True, False])
def test_adapters_read_inputs_as_they_are_without_a_change_to_numbers(autocast: bool) -> None:
    """Autocast casts what it multiplies: peft's cast before it, left out here, is undone there."""
    outcomes = []
    for leave in (leave_casts_to_autocast, lambda _: None):
        torch.manual_seed(0)
        config = LoraConfig(target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(tiny_model("llama").to(torch.bfloat16), config)
        leave(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=torch.arange(12)[None], labels=torch.arange(12)[None]).loss
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert {g.dtype for g in gradients.values()} == {torch.float32}
        outcomes.append({**gradients, "loss": loss.detach()})
    assert_same_weights(*outcomes)


def test_what_learns_is_float32_on_a_bfloat16_base(
    trained: Trained,
) -> None:
    """Base and reward model are bfloat16; adapters, optimizer and heads float32; one base."""
    _, run, (trainer, rater) = trained
    policy = trainer.language_model
    assert trainer.accelerator.mixed_precision == "bf16"
    types = {p.requires_grad: p.dtype for n, p in policy.named_parameters() if "norm" not in n}
    assert types == {True: torch.float32, False: torch.bfloat16}
    moments = [t for state in trainer.optimizer.state.values() for t in state.values()]
    assert {t.dtype for t in moments} == {torch.float32}
    shared = {id(p) for p in policy.parameters() if not p.requires_grad}
    frozen = [p for p in trainer.critic.parameters() if not p.requires_grad]
    assert frozen and all(id(p) in shared for p in frozen)
    assert rater.score.weight.dtype == torch.float32
    assert rater.base_model.embed_tokens.weight.dtype == torch.bfloat16
    with safe_open(run / "tiny" / "seed-0" / "reward" / "model.safetensors", "pt") as saved:
        assert {saved.get_slice(name).get_dtype() for name in saved.keys()} == {"F32"}  # noqa: SIM118


def test_types_are_recorded_and_cells_of_others_are_measured_again(
    trained: Trained, tmp_path: Path
) -> None:
    """Attached files are those of the saved weights; another type replaces them."""
    recipe, source, _ = trained
    run = tmp_path / "small"
    shutil.copytree(source, run)
    recorded = json.loads((run / "run.json").read_text())
    assert recorded["precision"] == {"frozen": "bfloat16", "trained": "float32"}
    assert recorded["auto_precision"] in ("float32", "bfloat16")
    types = {"frozen": "bfloat16", "trained": "float32", "computed": "bfloat16"}
    plan, checkpoints = recipe_plan(recipe, run), find_checkpoints(run)
    assert all(checkpoint.record.precision == types for checkpoint in checkpoints)
    inline = {c.key: pd.read_parquet(c.evaluation / "bbq.Q.parquet") for c in checkpoints}
    for checkpoint in checkpoints:
        settings = read_settings(checkpoint.evaluation / "bbq.Q.parquet")
        assert settings["origin"]["dtype"] == "bfloat16"
        assert is_measured(checkpoint, plan, "packed")
    assert evaluate_run(recipe, run) == 0
    for checkpoint in checkpoints:
        shutil.rmtree(checkpoint.evaluation)
    assert evaluate_run(recipe, run) == len(checkpoints)
    for checkpoint in checkpoints:
        offline = pd.read_parquet(checkpoint.evaluation / "bbq.Q.parquet")
        pd.testing.assert_frame_equal(offline, inline[checkpoint.key], rtol=0.05, atol=0.05)
    other = load_recipe(str(run / "recipe.yaml"), ["evaluate.dtype=float32", "evaluate.attach=off"])
    assert evaluate_run(other, run) == len(checkpoints)
    assert (
        read_settings(checkpoints[0].evaluation / "bbq.Q.parquet")["origin"]["dtype"] == "float32"
    )
    assert not is_measured(checkpoints[0], plan, "packed")


def test_small_models_stay_float32_where_bfloat16_is_fast() -> None:
    """So the society's recipes have the same bytes on every machine."""
    for name in ("quickstart", "society-ladder", "society-ablation"):
        recipe = load_recipe(name)
        for model in recipe.models:
            assert model.scratch is not None
            parameters = num_parameters(
                scratch_config({**model.scratch, "vocab_size": 4096}), False
            )
            assert resolved(recipe.precision.frozen, parameters, "bfloat16") == "float32"
        explicit = recipe.model_copy(update={"precision": Precision(frozen="float32")})
        assert training_digest(recipe, model.name, 0) != training_digest(explicit, model.name, 0)
    assert resolved("auto", SMALL, "bfloat16") == "bfloat16"
    assert resolved("auto", SMALL, "float32") == "float32"


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["precision.frozen=4bit"], "precision.frozen: 4bit needs a CUDA GPU"),
        (["precision.frozen=float16"], "precision.frozen: a CPU does not compute in float16"),
        (["precision.frozen=int8"], "precision.frozen"),
        (["precision.trained=bfloat16"], "precision.trained: bfloat16 cannot pretrain"),
        (["evaluate.dtype=bfloat16", "evaluate.attach=inline"], "evaluate.dtype: bfloat16"),
    ],
)  # fmt: skip
def test_types_that_cannot_be_had_are_refused(
    overrides: list[str], key: str, tmp_path: Path
) -> None:
    """One line before anything is written."""
    if torch.cuda.is_available() and "CPU" in key + "CUDA":
        pytest.skip("needs a machine without a GPU")
    with pytest.raises(InputError, match=key):
        prepare_run(load_recipe("quickstart", [*FEW, *overrides]), tmp_path / "run")
    assert not (tmp_path / "run").exists()
