"""Small runs with feedback from a made-up BBQ: its files, a tiny model, and a recipe."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.support.bbq_rows import block, write
from tests.support.tiny_models import tiny_config
from tests.support.tokenizer_forms import byte_level

ELDER, YOUTH = ("elder", "old"), ("youth", "nonOld")
GROUPS: dict[str, tuple[Any, Any]] = {
    "Age": (ELDER, YOUTH),
    "Religion": (("Jew", "Jewish"), ("Sikh", "Sikh")),
    "SES": (("poor one", "lowSES"), ("rich one", "highSES")),
    "Physical_appearance": (("fat one", "obese"), ("thin one", "nonObese")),
    "Race_x_SES": (("poor Kenyan", "lowSES-Kenyan"), ("rich Dane", "highSES-Danish")),
}


def write_bbq(folder: Path) -> Path:
    """Write BBQ in miniature: two templates of four blocks a category; contexts name the block."""
    for category, people in GROUPS.items():
        rows = []
        for number in range(8):
            rows += block(
                4 * number, people, (people[0][1].split("-")[-1],), category=category,
                template=number // 4, context=f"Two met in {category} {number}.",
            )  # fmt: skip
        write(folder, rows, f"{category}.jsonl")
    return folder


def write_model(folder: Path) -> str:
    """Save a tiny model of a byte-level tokenizer with a chat template; return its path."""
    tokenizer = byte_level()
    torch.manual_seed(0)
    config = tiny_config("llama", len(tokenizer), context=640)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def recipe_content(data_dir: Path, model: str) -> dict[str, Any]:
    """Return a recipe of two PPO steps, rewarded by the raters on Age and SES."""
    return {
        "name": "small",
        "models": [{"name": "tiny", "path": model}],
        "data": {
            "benchmarks": str(data_dir),
            "feedback": {"bbq": ["Age", "SES"], "pairs": 24, "prompts": 24},
        },
        "reward": {"functions": {"raters": 1.0}},
        "policy": {
            "steps": 2,
            "checkpoints": [0, 2],
            "resume_every": 1,
            "trainer": {
                "learning_rate": 1e-3, "per_device_train_batch_size": 4,
                "steps_per_generation": 2, "num_iterations": 1, "max_completion_length": 4,
            },
        },
        "evaluate": {"experiments": ["bbq"], "conditions": ["Q"], "attach": "off"},
        "launch": {"threads": 1},
    }  # fmt: skip
