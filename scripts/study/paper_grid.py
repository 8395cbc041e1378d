"""Estimate the paper's whole grid: GPUs, memory, hours and disk for its eight sizes.

    python scripts/study/paper_grid.py > table.md

The paper states its models' sizes but not their shapes, nor its batch sizes. Shapes here are
stand-ins of the GPT-NeoX kind with as many parameters: 1000 PPO steps of 256 prompts, all weights
trained, ZeRO-3 on the fewest GPUs (a power of two) that hold a model, and every checkpoint measured
on all of BBQ, Winogender and the law-school data in all of the paper's conditions.
"""

import argparse
from typing import Any

from selfcorrect.recipes.load import check_recipe
from selfcorrect.recipes.schema import Recipe
from selfcorrect.scripts.commands.plan import count, gigabytes
from selfcorrect.train.planning.devices import GPUS, Device
from selfcorrect.train.planning.estimate import ModelEstimate, estimate_model, oversized_stages
from selfcorrect.train.planning.feedback import HH_RLHF, FeedbackFacts
from selfcorrect.train.planning.memory import Parallelism
from selfcorrect.train.planning.model_shape import ModelShape, shape_of

# size: hidden size, layers
SIZES = {
    "810M": (1536, 24), "1.6B": (2048, 28), "3.5B": (2816, 34), "6.4B": (4096, 30),
    "13B": (5120, 40), "22B": (6144, 48), "52B": (8192, 64), "175B": (12288, 96),
}  # fmt: skip
STEPS = [0, 50, *range(100, 1001, 100)]
ROLLOUT, ROWS = 256, 2
FACTS = FeedbackFacts(160_000, 160_000, HH_RLHF, "assumed")
UTILISATION = 0.3


def grid_shape(hidden: int, layers: int) -> ModelShape:
    """Return a stand-in shape: heads of 128, and an MLP four times as wide."""
    fields = {
        "model_type": "gpt_neox", "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128, "intermediate_size": 4 * hidden, "vocab_size": 50304,
    }  # fmt: skip
    return shape_of(fields, "paper")


def grid_recipe(
    processes: int, gathers: bool, limit: int | None, conditions: list[str] | None
) -> Recipe:
    """Return one model's recipe on that many GPUs, with the same rollout batch on any number."""
    trainer = {
        "per_device_train_batch_size": ROWS,
        "steps_per_generation": max(1, ROLLOUT // (ROWS * processes)),
        "num_iterations": 1,
        "max_completion_length": 128,
        "gradient_checkpointing": True,
        "ds3_gather_for_generation": gathers,
    }
    reward = {"per_device_train_batch_size": ROWS, "bf16": True, "gradient_checkpointing": True}
    content = {
        "name": "paper",
        "models": [{"name": "m", "path": "none"}],
        "data": {"preferences": {"path": "none"}},
        "reward": {"trainer": reward},
        "policy": {"steps": 1000, "checkpoints": STEPS, "trainer": trainer},
        "evaluate": {"attach": "off", "limit": limit, "conditions": conditions},
    }
    return check_recipe(content, "paper")


def smallest(shape: ModelShape, device: Device, **evaluate: Any) -> ModelEstimate:
    """Return the estimate on the fewest GPUs whose memory holds training.

    ZeRO-3 gathers the policy for sampling if at most twice as many GPUs hold it whole.
    """
    fitting: list[ModelEstimate] = []
    for processes in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        for gathers in (True, False):
            parallelism = Parallelism(processes, 3 if processes > 1 else 0)
            recipe = grid_recipe(processes, gathers=gathers, **evaluate)
            estimate = estimate_model(recipe, "m", shape, FACTS, parallelism)
            if all(stage.stage == "evaluation" for stage in oversized_stages(estimate, device)):
                fitting.append(estimate)
    fewest = fitting[0].parallelism.processes
    gathering = [e for e in fitting if e.gathers and e.parallelism.processes <= 2 * fewest]
    return (gathering or fitting)[0]


def main() -> None:
    """Print the grid as a Markdown table, for one kind of GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=GPUS, default="h100")
    parser.add_argument("--limit", type=int, help="items per experiment; default: all")
    parser.add_argument("--conditions", help="comma-separated; default: all of the paper's")
    arguments = parser.parse_args()
    device = GPUS[arguments.device]
    conditions = arguments.conditions.split(",") if arguments.conditions else None
    print(
        "| size | stand-in | GPUs | policy whole for sampling | GB a GPU | reward, h | PPO, h "
        "| GPU-hours of training | evaluation, GPU-hours | evaluation / training FLOPs | disk, GB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    training = evaluation = disk = 0.0
    for name, sizes in SIZES.items():
        shape = grid_shape(*sizes)
        estimate = smallest(shape, device, limit=arguments.limit, conditions=conditions)
        hours = estimate.hours(device, UTILISATION)
        work = {stage.stage: stage for stage in estimate.work}
        largest = max(s.total for s in estimate.footprints if s.stage != "evaluation")
        gpus = estimate.parallelism.processes
        gpu_hours = (hours["reward"] + hours["policy"]) * gpus
        share = work["evaluation"].flops / (work["reward"].flops + work["policy"].flops)
        training, evaluation = training + gpu_hours, evaluation + hours["evaluation"]
        disk += estimate.disk.kept
        print(
            f"| {name} | {count(estimate.shape.parameters)} | {gpus} "
            f"| {'yes' if estimate.gathers else 'no'} "
            f"| {gigabytes(largest)} | {hours['reward']:.1f} | {hours['policy']:.1f} "
            f"| {gpu_hours:,.0f} | {hours['evaluation']:,.0f} | {share:.2f} "
            f"| {gigabytes(estimate.disk.kept)} |"
        )
    tokens = count(work["evaluation"].tokens / len(STEPS))
    print(f"| all | | | | | | | {training:,.0f} | {evaluation:,.0f} | | {gigabytes(disk)} |")
    print(f"\n{tokens} tokens a checkpoint and model are read or written in evaluation.")


if __name__ == "__main__":
    main()
