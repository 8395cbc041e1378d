"""One rank of an SFT run with (`attached`) or without (`bare`) the evaluation callback.

Arguments: the folder with `base/`, and attached or bare. Writes what it saw to <rank>.json.
"""

import json
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from selfcorrect.evaluate.callback import SelfCorrectionCallback
from selfcorrect.train.distributed.worker import skip_inference_kernel
from tests.support.tiny_models import tiny_plan, tiny_tokenizer

PROMPTS = [
    f"the {who} told {whose} that" for who in ("doctor", "nurse") for whose in ("his", "her")
]
METRIC_KEY = "eval_winogender.Q+IF.correlation"


def main() -> None:
    """Train for two updates, save the model, and write facts.json of this rank."""
    torch.set_num_threads(1)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        skip_inference_kernel()
    folder, mode = Path(sys.argv[1]), sys.argv[2]
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
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
