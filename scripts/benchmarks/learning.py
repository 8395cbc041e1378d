"""Compare what PPO and TRL's GRPO learn on two problems, with three seeds each.

    OMP_NUM_THREADS=1 python scripts/benchmarks/learning.py --docs docs/results
    OMP_NUM_THREADS=1 python scripts/benchmarks/learning.py --bf16

1. `toy`: the prompt states a number k, and a random tiny Llama answers with up to four tokens; the
   reward is 1 - |target tokens among them - k| / 4. All answers are enumerated, so a policy's
   objective E[reward] - beta KL, and its maximum over all policies, are exact.
2. `society`: base and reward model from the project's stages, smaller than in quickstart.yaml.

All methods have the same number of completions and updates, learning rate and KL coefficient.
Results are written to a temporary folder, and with --docs, figure and table to that folder too.
"""

# ruff: noqa: TID253  (all of this file is torch, transformers and trl)

import datetime
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback
from trl import GRPOConfig

from selfcorrect.evaluate.prompts.dialogue import AUTO
from selfcorrect.recipes.foundation.atomic_files import write_json
from selfcorrect.scripts.benchmarks.learning_problems import Problem, society, toy
from selfcorrect.scripts.benchmarks.learning_report import draw, publish, tables
from selfcorrect.train.job import quiet_libraries
from selfcorrect.train.ppo import PPOConfig, PPOTrainer
from selfcorrect.train.ppo.prompts import DialoguePrompts
from selfcorrect.train.stages.arguments import QUIET

STEPS = (100, 40)
METHODS: dict[str, dict[str, Any]] = {
    "PPO, separate critic": {"critic": "separate"},
    "PPO, shared critic": {"critic": "shared"},
    "GRPO": {},
    # Dividing by the group's standard deviation would scale the reward but not the KL.
    "GRPO, unscaled": {"scale_rewards": "none"},
}
SAME = {
    **QUIET, "per_device_train_batch_size": 32, "steps_per_generation": 2, "num_iterations": 2,
    "gradient_accumulation_steps": 1, "per_device_eval_batch_size": 128, "num_generations_eval": 1,
    "lr_scheduler_type": "constant", "adam_epsilon": 1e-5, "disable_dropout": True,
    "gradient_checkpointing": False, "use_cpu": True, "save_strategy": "no",
}  # fmt: skip
UPDATES = 4  # per step of 64 completions: two minibatches, twice
EXACT_EVERY = 5  # steps


class MeasuredGRPO(DialoguePrompts):
    """TRL's GRPO on PPO's prompt ids, logging the same estimate of the sequence KL.

    TRL's own template would close an answer that a prompt has begun.
    """

    style = AUTO

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        ratio = batch["old_per_token_logps"] - batch["ref_per_token_logps"]
        kl = (ratio * batch["completion_mask"]).sum(dim=1).mean().item()
        self._metrics["train" if self.model.training else "eval"]["objective/kl"].append(kl)
        return batch


class EveryStep(TrainerCallback):
    """Records CPU seconds of each step, and the exact figures of the policy after it."""

    def __init__(self, exact: Callable[[Any], dict[str, float]] | None) -> None:
        self.exact = exact
        self.steps: list[dict[str, float]] = []
        self.since = time.process_time()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the first step's clock."""
        self.since = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Record a step after its last optimizer update."""
        if state.global_step % UPDATES:
            return
        figures = {"cpu_seconds": time.process_time() - self.since}
        if self.exact and state.global_step % (EXACT_EVERY * UPDATES) == 0:
            figures |= self.exact(given["model"])
        self.steps.append(figures)
        self.since = time.process_time()


def train(
    problem: Problem, method: str, seed: int, folder: Path, bf16: bool = False
) -> dict[str, Any]:
    """Train one run; return figures of every step, and of held-out prompts before and after."""
    raw: list[float] = []  # mean score of each rollout batch, before it is shaped
    ppo = method.startswith("PPO")

    def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        scores = problem.reward(completion_ids=completion_ids, **columns)
        raw.append(fmean(scores))
        return scores if ppo or problem.shape is None else problem.shape(scores, completion_ids)

    config: dict[str, Any] = dict(METHODS[method])
    if ppo:
        config |= problem.ppo_settings
        if config["critic"] == "shared":
            config.pop("critic_path", None)
    else:
        config["num_generations"] = 4
    settings = {"output_dir": str(folder), "seed": seed, "max_steps": problem.steps * UPDATES}
    settings["bf16"] = bf16
    callback = EveryStep(problem.exact)
    trainer = (PPOTrainer if ppo else MeasuredGRPO)(
        model=AutoModelForCausalLM.from_pretrained(problem.policy, dtype=torch.float32),
        reward_funcs=[reward],
        args=(PPOConfig if ppo else GRPOConfig)(
            **{**SAME, **problem.same, **settings, "logging_steps": UPDATES, **config}
        ),
        train_dataset=Dataset.from_dict({"prompt": problem.prompts}),
        processing_class=problem.tokenizer,
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    before = held_out_figures(trainer, problem, raw)
    raw.clear()
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    rows = zip(log, raw, callback.steps, strict=True)
    steps = [step_figures(entry, score, more) for entry, score, more in rows]
    after = held_out_figures(trainer, problem, raw)
    return {"method": method, "seed": seed, "steps": steps, "before": before, "after": after}


def step_figures(entry: dict[str, Any], score: float, more: dict[str, float]) -> dict[str, Any]:
    """Return one step's figures; its rollout batch is sampled before its updates."""
    return {
        "score": score,
        "kl": entry["objective/kl"],
        "explained_variance": entry.get("value/explained_variance"),
        "entropy": entry["entropy"],
        "ended_by_eos": 1 - entry["completions/clipped_ratio"],
        **more,
    }


def held_out_figures(trainer: Any, problem: Problem, raw: list[float]) -> dict[str, float]:
    """Return exact figures, or mean score and KL over one completion per held-out prompt."""
    if problem.exact:
        return problem.exact(trainer.model)
    done = len(raw)
    figures = trainer.evaluate(Dataset.from_dict({"prompt": problem.held_out}))
    return {"score": fmean(raw[done:]), "kl": figures["eval_objective/kl"]}


# ---- the benchmark -------------------------------------------------------------------------------


def bench(
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results [default: a temporary folder].")
    ] = None,
    docs: Annotated[
        Path | None, typer.Option(help="Folder with ppo-learning.md, for figure and tables.")
    ] = None,
    steps: Annotated[
        tuple[int, int], typer.Option(help="Steps of the toy and the society.")
    ] = STEPS,
    seeds: Annotated[int, typer.Option(help="Number of seeds, from 0.")] = 3,
    bf16: Annotated[
        bool, typer.Option(help="Multiply in bfloat16; trained weights stay in float32.")
    ] = False,
) -> None:
    """Train every method on both problems; print, save and draw the results."""
    quiet_libraries()
    torch.set_num_threads(1)
    out = out or Path(tempfile.mkdtemp(prefix="bench-learning-"))
    results: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores, CPU only",
        "problems": {},
    }
    for name, make, num_steps in zip(("toy", "society"), (toy, society), steps, strict=True):
        start = time.process_time()
        problem = make(out / name, num_steps)
        facts = {**problem.facts, "preparation_cpu_seconds": time.process_time() - start}
        runs = []
        for seed in range(seeds):
            for method in METHODS:
                runs.append(train(problem, method, seed, out / "work", bf16))
                print(".", end="", flush=True)
        results["problems"][name] = {"facts": facts, "settings": problem.same, "runs": runs}
    results["cpu_seconds"] = time.process_time()
    print(f"\n\n{tables(results)}\n\n{out}")
    write_json(out / "learning.json", results)
    draw(results, out)
    if docs is not None:
        publish(results, docs, out)


if __name__ == "__main__":
    typer.run(bench)
