"""The paper's whole grid on paper: GPUs, memory, hours and disk for its eight sizes.

    python scripts/study/paper_grid.py > table.md

The paper names its sizes but not their shapes, its feedback but not its batches. Shapes here are
stand-ins of the GPT-NeoX kind with as many parameters; 1000 PPO steps of 256 prompts, all weights
trained, ZeRO-3 on the fewest GPUs (a power of two) that hold a model; every checkpoint measured on
the whole of BBQ, Winogender and the law-school data in all of the paper's conditions.
"""

import argparse
from typing import Any

from selfcorrect.recipes.load import check_recipe
from selfcorrect.recipes.schema import Recipe
from selfcorrect.scripts.commands.plan import count, gigabytes
from selfcorrect.train.planning.devices import GPUS, Device, ModelPlan, does_not_fit, plan_model
from selfcorrect.train.planning.feedback import HH_RLHF, FeedbackFacts
from selfcorrect.train.planning.memory import Engine
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
    """A stand-in: heads of 128 and an MLP four times as wide."""
    fields = {
        "model_type": "gpt_neox", "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128, "intermediate_size": 4 * hidden, "vocab_size": 50304,
    }  # fmt: skip
    return shape_of(fields, "paper")


def grid_recipe(
    processes: int, gathers: bool, limit: int | None, conditions: list[str] | None
) -> Recipe:
    """One model's run on that many GPUs; the rollout batch is the same on any number."""
    trainer: dict[str, Any] = {
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
        "ppo": {"steps": 1000, "checkpoints": STEPS, "trainer": trainer},
        "evaluate": {"attach": "off", "limit": limit, "conditions": conditions},
    }
    return check_recipe(content, "paper")


def smallest(shape: ModelShape, device: Device, **asked: Any) -> ModelPlan:
    """The plan on the fewest GPUs whose memory holds training; evaluation is planned apart.

    ZeRO-3 puts the policy together for sampling where at most twice as many GPUs hold it.
    """
    fitting: list[ModelPlan] = []
    for processes in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        for gathers in (True, False):
            engine = Engine(processes, 3 if processes > 1 else 0)
            recipe = grid_recipe(processes, gathers=gathers, **asked)
            plan = plan_model(recipe, "m", shape, FACTS, engine)
            if all(stage.stage == "evaluation" for stage in does_not_fit(plan, device)):
                fitting.append(plan)
    fewest = fitting[0].engine.processes
    near = [plan for plan in fitting if plan.gathers and plan.engine.processes <= 2 * fewest]
    return (near or fitting)[0]


def main() -> None:
    """Print the grid as a Markdown table, on one kind of GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=GPUS, default="h100")
    parser.add_argument("--limit", type=int, help="items an experiment; default: all")
    parser.add_argument("--conditions", help="comma-separated; default: all of the paper's")
    given = parser.parse_args()
    device = GPUS[given.device]
    asked = given.conditions.split(",") if given.conditions else None
    print(
        "| size | stand-in | GPUs | policy whole for sampling | GB a GPU | reward, h | PPO, h "
        "| GPU-hours of training | evaluation, GPU-hours | evaluation / training FLOPs | disk, GB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    training = measuring = disk = 0.0
    for name, (hidden, layers) in SIZES.items():
        plan = smallest(grid_shape(hidden, layers), device, limit=given.limit, conditions=asked)
        spent = plan.hours(device, UTILISATION)
        work = {one.stage: one for one in plan.works}
        most = max(s.total for s in plan.footprints if s.stage != "evaluation")
        hours = (spent["reward"] + spent["ppo"]) * plan.engine.processes
        share = work["evaluation"].flops / (work["reward"].flops + work["ppo"].flops)
        training, measuring = training + hours, measuring + spent["evaluation"]
        disk += plan.disk.kept
        print(
            f"| {name} | {count(plan.shape.parameters)} | {plan.engine.processes} "
            f"| {'yes' if plan.gathers else 'no'} "
            f"| {gigabytes(most)} | {spent['reward']:.1f} | {spent['ppo']:.1f} | {hours:,.0f} "
            f"| {spent['evaluation']:,.0f} | {share:.2f} | {gigabytes(plan.disk.kept)} |"
        )
    tokens = count(work["evaluation"].tokens / len(STEPS))
    print(f"| all | | | | | | | {training:,.0f} | {measuring:,.0f} | | {gigabytes(disk)} |")
    print(f"\n{tokens} tokens a checkpoint and model are read or written in evaluation.")


if __name__ == "__main__":
    main()
