"""SFT with (`attached`) and without (`bare`) the evaluation callback, in two ranks.

Argument: the folder with a folder for each parallelism, which has `base/`. Each rank writes what it
saw to <rank>.json there.
"""

import json
import sys
from pathlib import Path

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from selfcorrect.evaluate.callback import SelfCorrectionCallback
from tests.support.ranks import HAS_DEEPSPEED, set_parallelism, start_ranks
from tests.support.tiny_models import tiny_plan, tiny_tokenizer

PROMPTS = [
    f"the {who} told {whose} that" for who in ("doctor", "nurse") for whose in ("his", "her")
]
PARALLELISMS = ["ddp", "zero3"]
METRIC_KEY = "eval_winogender.Q+IF.correlation"


def train_with_and_without(folder: Path) -> None:
    """Train, with and without the callback, under each parallelism; save models and facts."""
    for parallelism in PARALLELISMS if HAS_DEEPSPEED else ["ddp"]:
        for mode in ("bare", "attached"):
            train(folder / parallelism, parallelism, mode)


def train(folder: Path, parallelism: str, mode: str) -> None:
    """Train for two updates, save the model, and write the facts of this rank."""
    set_parallelism(parallelism, folder)
    arguments = SFTConfig(
        output_dir=str(folder / "out"), max_steps=2, learning_rate=1e-2, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=True, seed=1, bf16=False, max_length=32,
        per_device_train_batch_size=2, disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=str(folder / "base"),
        args=arguments,
        train_dataset=Dataset.from_dict({"text": [f"{p} she is fair ." for p in PROMPTS] * 3}),
        processing_class=tiny_tokenizer(),
    )
    if mode == "attached":
        plan = tiny_plan(folder / "data", ["Q", "Q+IF", "Q+IF+CoT"])
        trainer.add_callback(
            SelfCorrectionCallback(
                plan, lambda step: folder / f"step-{step}", {0, 2}, trainer=trainer
            )
        )
    trainer.train()
    is_split = [hasattr(parameter, "ds_id") for parameter in trainer.model.parameters()]
    trainer.save_model(str(folder / f"saved-{mode}"))
    facts = {
        "world": trainer.accelerator.num_processes,
        "split": all(is_split),
        "logged": [entry["step"] for entry in trainer.state.log_history if METRIC_KEY in entry],
    }
    (folder / f"{trainer.accelerator.process_index}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    start_ranks(train_with_and_without, Path(sys.argv[1]))
