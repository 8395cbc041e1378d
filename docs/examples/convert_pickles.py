"""Convert published steps whose weights are pickles into folders that `selfcorrect evaluate` reads.

python docs/examples/convert_pickles.py EleutherAI/pythia-70m 'step{step}' 0,1,512 --out pythia-70m
selfcorrect evaluate 'pythia-70m/step{step}' --data-dir data

A pickle may run code when it is loaded. torch refuses all but tensors here (weights_only), which
`selfcorrect` itself does not rely on: convert only what you trust, or in a container.
"""

# ruff: noqa: TID253, D103
import argparse
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer

FILES = ["pytorch_model*.bin*", "*.json", "*.txt", "*.model", "*.jinja"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="name on the hub")
    parser.add_argument("revision", help="its branches, with {step}")
    parser.add_argument("steps", help="comma-separated")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    for step in options.steps.split(","):
        revision = options.revision.replace("{step}", step)
        folder = options.out / revision
        if folder.exists():
            continue  # converted before
        fetched = snapshot_download(options.model, revision=revision, allow_patterns=FILES)
        model = AutoModelForCausalLM.from_pretrained(fetched, dtype="auto", use_safetensors=False)
        partial = folder.with_name(f".{folder.name}")  # not a step yet
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(fetched).save_pretrained(partial)
        partial.rename(folder)


if __name__ == "__main__":
    main()
