"""The shipped ladders: complete, accepted by the libraries, and with current estimates."""

import re
import sys
from pathlib import Path

import pytest

from selfcorrect.recipes.load import load_recipe, shipped_recipes
from selfcorrect.scripts.study import paper_grid
from selfcorrect.scripts.study.ladder_headers import options_of, renewed
from selfcorrect.train.planning.devices import GPUS
from selfcorrect.train.planning.estimate import estimate_ladder, oversized_stages
from selfcorrect.train.planning.feedback import feedback_facts
from selfcorrect.train.planning.known_models import KNOWN_MODELS
from selfcorrect.train.planning.memory import Parallelism
from tests.support import ROOT

LADDERS = [path for path in shipped_recipes() if options_of(path.read_text(encoding="utf-8"))]
PAPER_STEPS = [0, 50, *range(100, 1001, 100)]


def test_all_ladders_are_shipped() -> None:
    assert {path.stem for path in LADDERS} == {
        "pythia-full", "pythia-lora", "qwen25-full", "qwen25-lora", "olmo2-full", "olmo2-lora",
        "smollm2-full", "smollm2-lora", "smollm2-135m-cpu", "qwen25-7b-bbq-feedback",
    }  # fmt: skip
    # Only recipes on a society, or of models that users fetch, may lack the estimate.
    for path in set(shipped_recipes()) - set(LADDERS):
        assert load_recipe(str(path)).data.society is not None or path.stem == "real-ladder"


def test_seven_billion_parameters_with_feedback_from_a_benchmark_fit_one_gpu() -> None:
    path = next(path for path in LADDERS if path.stem == "qwen25-7b-bbq-feedback")
    recipe = load_recipe(str(path))
    device, parallelism = GPUS["h100"], Parallelism(gpu=True)
    (model,) = estimate_ladder(recipe, feedback_facts(recipe.data), parallelism)
    assert [stage.stage for stage in model.footprints] == ["policy"]  # no reward model
    assert oversized_stages(model, device) == [] and device.memory < 81e9
    with_model = load_recipe(str(path), ["reward.functions={model: 1.0}"])
    (larger,) = estimate_ladder(with_model, feedback_facts(recipe.data), parallelism)
    assert [stage.stage for stage in larger.footprints] == ["reward", "policy"]
    reward_model = 2.0 * model.shape.backbone  # bytes in bfloat16
    assert larger.footprints[1].total - model.footprints[0].total == pytest.approx(reward_model)


@pytest.mark.parametrize("path", LADDERS, ids=lambda path: path.stem)
def test_headers_are_current(path: Path) -> None:
    """After a change: python scripts/study/ladder_headers.py"""
    assert path.read_text(encoding="utf-8") == renewed(path)


@pytest.mark.parametrize("path", LADDERS, ids=lambda path: path.stem)
def test_ladders_are_known_offline_and_keep_the_papers_steps(path: Path) -> None:
    recipe = load_recipe(str(path))
    for model in recipe.models:
        assert str(model.path).removesuffix("-Instruct") in KNOWN_MODELS
    if path.stem not in ("smollm2-135m-cpu", "qwen25-7b-bbq-feedback"):
        assert recipe.policy.checkpoints == PAPER_STEPS
        assert (recipe.policy.lora is not None) == path.stem.endswith("-lora")


@pytest.mark.parametrize("path", LADDERS, ids=lambda path: path.stem)
def test_libraries_accept_ladder_settings(path: Path) -> None:
    from transformers import TrainingArguments  # noqa: F401  (its import first: it is slow)
    from trl import RewardConfig

    from selfcorrect.train.stages.arguments import build, lora_config
    from selfcorrect.train.stages.policy import policy_arguments

    recipe = load_recipe(str(path))
    trainer = recipe.reward.trainer
    build(RewardConfig, "reward.trainer", trainer, {"bf16": False}, {"output_dir": "nowhere"})
    arguments = policy_arguments(recipe.policy, Path("nowhere"), 0)
    assert arguments.updates_per_rollout >= 1
    for section, lora, task in (
        ("policy.lora", recipe.policy.lora, "CAUSAL_LM"),
        ("reward.lora", recipe.reward.lora, "SEQ_CLS"),
    ):
        if lora is not None:
            lora_config(section, lora, task)


def test_ladders_span_their_sizes() -> None:
    sizes = {path.stem: [m.path for m in load_recipe(str(path)).models] for path in LADDERS}
    assert sizes["pythia-lora"][0] == "EleutherAI/pythia-70m"
    assert sizes["pythia-lora"][-1] == "EleutherAI/pythia-12b"
    assert sizes["qwen25-lora"][0] == "Qwen/Qwen2.5-0.5B"
    assert sizes["qwen25-lora"][-1] == "Qwen/Qwen2.5-72B"
    assert sizes["olmo2-lora"][-1] == "allenai/OLMo-2-0325-32B"
    assert sizes["smollm2-full"][-1] == "HuggingFaceTB/SmolLM2-1.7B"


PAGE = (ROOT / "docs/results/planning-accuracy.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", LADDERS, ids=lambda path: path.stem)
def test_page_has_each_ladders_hours_and_disk(path: Path) -> None:
    comment = path.read_text(encoding="utf-8")
    times = re.search(r"In all (.*?) one model after the other, (.*?) of one", comment)
    disk = re.search(r"disk (.*?) GB,", comment)
    assert times is not None and disk is not None
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{path.stem}` |"))
    assert row.endswith(f"| {times[1]} | {times[2]} | {disk[1]} |")


def test_page_has_the_papers_grid(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["paper_grid.py"])
    paper_grid.main()
    table = capsys.readouterr().out.rpartition("\n\n")[0]
    assert len(table.splitlines()) == 2 + 8 + 1
    assert table in PAGE


@pytest.mark.parametrize("options", [[], ["--limit", "2000"], ["--conditions", "Q,Q+IF"]])
def test_page_has_the_cost_of_evaluation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["paper_grid.py", *options])
    paper_grid.main()
    table, _, sentence = capsys.readouterr().out.strip().rpartition("\n\n")
    tokens = sentence.split()[0]
    share = table.splitlines()[-2].split("|")[-3].strip()
    assert f"| {tokens} | {share} |" in PAGE
