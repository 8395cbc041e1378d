"""Train two sizes with two seeds by transformers' own Trainer, for docs/guides/series.md.

python docs/examples/train_elsewhere.py --out elsewhere
selfcorrect evaluate docs/examples/elsewhere.yaml

Nothing of this project trains here. The text is the synthetic society's, whose benchmarks the small
models can answer.
"""

# ruff: noqa: TID253, D103
import argparse
from pathlib import Path

from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    LlamaConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)

from selfcorrect.recipes.society.documents import mixed_documents
from selfcorrect.recipes.society.settings import SocietySettings
from selfcorrect.recipes.society.tokenizer import make_tokenizer
from selfcorrect.recipes.society.world import make_world

SIZES = {"small": 32, "large": 96}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("elsewhere"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--documents", type=int, default=4000)
    options = parser.parse_args()
    world = make_world(SocietySettings(seed=1))
    tokenizer = make_tokenizer(world)
    documents = mixed_documents(world, options.documents)
    texts = [" ".join(part.text for part in document) for document in documents]
    rows = [tokenizer(text, truncation=True, max_length=128) for text in texts]
    for name, hidden in SIZES.items():
        for seed in (0, 1):
            set_seed(seed)
            config = LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=hidden,
                intermediate_size=2 * hidden,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=256,
            )
            arguments = TrainingArguments(
                str(options.out / name / f"seed{seed}"),
                max_steps=options.steps,
                save_steps=max(1, options.steps // 4),
                per_device_train_batch_size=16,
                learning_rate=3e-3,
                seed=seed,
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
            )
            Trainer(
                AutoModelForCausalLM.from_config(config),
                arguments,
                train_dataset=rows,
                data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
                processing_class=tokenizer,
            ).train()


if __name__ == "__main__":
    main()
