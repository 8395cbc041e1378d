"""The smallest recipes, and runs of them, that several test files share."""

import hashlib
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 900  # limit of a subprocess: a busy machine may be many times slower than an idle one

RECIPE: dict[str, Any] = {
    "name": "small",
    "models": [{"name": "tiny", "scratch": {"model_type": "llama", "hidden_size": 8}}],
    "data": {"society": {"seed": 3}},
    "base": {"method": "pretrain"},
    "reward": {},
    "policy": {"steps": 4, "checkpoints": [0, 2, 4]},
}
TINY = (
    "{model_type: llama, hidden_size: 8, intermediate_size: 16, num_hidden_layers: 1, "
    "num_attention_heads: 2, num_key_value_heads: 2, max_position_embeddings: 128}"
)
# Overrides of the quickstart: a run of all stages in seconds.
SMALL = [
    "name=small",
    f"models=[{{name: tiny, scratch: {TINY}}}]",
    "data.society.corpus.documents=800",
    "data.society.corpus.stereotypes_first=200",
    "data.society.pairs=200",
    "data.society.prompts=100",
    "data.society.blocks_per_template=1",
    "base.trainer.save_steps=5",
    "reward.trainer.save_steps=3",
    "policy.steps=4",
    "policy.checkpoints=[0, 2, 4]",
    "policy.resume_every=1",
    "policy.trainer.per_device_train_batch_size=8",
    "evaluate.conditions=[Q, Q+IF+CoT, Match stats]",
    "evaluate.limit=24",
    "launch.jobs=1",
    "launch.threads=1",
]
# The same with even less data, a training state at every update, and no evaluation.
FEW = [
    *SMALL,
    "data.society.corpus.documents=80",
    "data.society.corpus.stereotypes_first=20",
    "data.society.pairs=80",
    "base.trainer.save_steps=1",
    "reward.trainer.save_steps=1",
    "policy.steps=3",
    "policy.checkpoints=[0, 1, 3]",
    "evaluate.attach=off",
]


def command(runs: Path, *more: str, name: str = "run") -> list[str]:
    """Return the command line `selfcorrect <name> quickstart` of the small recipe."""
    words = [sys.executable, "-m", "selfcorrect.scripts.commands", name, "quickstart"]
    return [*words, *SMALL, *more, "--runs-dir", str(runs)]


def call(words: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and return its output."""
    options = {"capture_output": True, "text": True, "timeout": SECONDS, "check": False, **options}
    return subprocess.run(words, **options)


def wait_until(reached: Callable[[], bool], process: Any) -> None:
    """Wait until `reached`; fail with the error output if the process ends before."""
    deadline = time.monotonic() + SECONDS
    while not reached() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, process.stderr and process.stderr.read()
    assert reached()


def digests(run: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of weights and every parquet file, by path in the run."""
    files = [*run.rglob("*.safetensors"), *run.rglob("*.parquet")]
    assert files
    return {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
