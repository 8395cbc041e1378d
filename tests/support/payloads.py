"""Model folders, and pickles that create a file when they are loaded."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from selfcorrect.train.ppo import PPOConfig, PPOTrainer
from tests.support.tiny_models import tiny_model, tiny_tokenizer


class Payload:
    """An object whose unpickling creates a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.mark), "w")


def write_pickle(path: Path, mark: Path) -> None:
    """Write a weight file that creates `mark` when it is unpickled."""
    torch.save({"weight": Payload(mark)}, path)


def model_folder(folder: Path, model: Any = None) -> Path:
    """Save a tiny model, or `model`, with its tokenizer."""
    (model or tiny_model()).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def train_policy_of(path: Path) -> None:
    """Give a model folder to PPOTrainer as its policy."""
    arguments = PPOConfig(str(path / "out"), use_cpu=True, report_to="none", max_steps=1)
    PPOTrainer(
        str(path),
        lambda completions, **_: [0.0] * len(completions),
        arguments,
        train_dataset=Dataset.from_dict({"prompt": ["the doctor"] * 8}),
        processing_class=tiny_tokenizer(),
    )
