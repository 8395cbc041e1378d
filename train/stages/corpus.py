"""Pretrain a model from scratch on the society's corpus, with a loss weight for each token."""

# ruff: noqa: TID253  (all of this file is torch and transformers)

import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.foundation.progress import Progress
from selfcorrect.recipes.foundation.ranks import current_ranks
from selfcorrect.recipes.schema import Base, Model, Recipe
from selfcorrect.recipes.society.documents import Document, mixed_documents, stereotype_documents
from selfcorrect.recipes.society.tokenizer import make_tokenizer
from selfcorrect.recipes.society.world import World, make_world
from selfcorrect.train.stages.arguments import QUIET, build
from selfcorrect.train.trainers.callbacks import StageCallback
from selfcorrect.train.trainers.guarded import GuardedTrainer

WINDOW = 4096  # documents that are sorted by length together


def scratch_config(scratch: dict[str, Any], **tokens: int | None) -> Any:
    """Build the configuration of `scratch`; InputError for an unknown model type or field."""
    fields = dict(scratch)
    model_type = fields.pop("model_type")
    try:
        known = AutoConfig.for_model(model_type).to_dict()
        unknown = [key for key in fields if key not in known]
        if unknown:
            raise InputError(f"models: scratch: a {model_type} model has no field {unknown[0]}")
        return AutoConfig.for_model(model_type, **{**tokens, **fields})
    except InputError:
        raise
    except Exception as error:  # configurations raise errors of many kinds
        reason = str(error) or type(error).__name__
        raise InputError(f"models: scratch: {reason}") from None


def scratch_model(
    scratch: dict[str, Any], tokenizer: PreTrainedTokenizerBase, seed: int
) -> PreTrainedModel:
    """Return a newly initialised causal language model with the configuration `scratch`."""
    config = scratch_config(
        scratch,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    set_seed(seed)
    try:
        return AutoModelForCausalLM.from_config(config).to(torch.float32)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise InputError(f"models: scratch: {' '.join(str(error).split())}") from None


Row = tuple[list[int], list[float]]  # token ids, and the loss weight of each


def encode(
    documents: list[Document], vocabulary: dict[str, int], weights: dict[Any, float]
) -> list[Row]:
    """Return token ids and loss weights of each document.

    Words are tokens, so a dictionary lookup equals the society's tokenizer and is ten times faster.
    """
    rows = []
    for document in documents:
        ids: list[int] = []
        loss_weights: list[float] = []
        for segment in document:
            new = [vocabulary[word] for word in segment.text.split()]
            ids += new
            loss_weights += [weights[segment.role]] * len(new)
        rows.append((ids, loss_weights))
    return rows


def pack(
    documents: Iterator[Document],
    tokenizer: PreTrainedTokenizerBase,
    base: Base,
    chance: random.Random,
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield right-padded batches of similar lengths, with at most `batch_tokens` (rows x length).

    Documents are reordered only within a window, so early parts of the corpus stay early.
    """
    vocabulary = tokenizer.get_vocab()
    while window := list(itertools.islice(documents, WINDOW)):
        rows = encode(window, vocabulary, base.loss_weights)
        rows.sort(key=lambda row: len(row[0]))
        groups: list[list[Row]] = [[]]
        for row in rows:
            if groups[-1] and (len(groups[-1]) + 1) * len(row[0]) > base.batch_tokens:
                groups.append([])
            groups[-1].append(row)
        chance.shuffle(groups)
        yield from (_batch(group, tokenizer.pad_token_id) for group in groups)


def _batch(rows: list[Row], pad: int) -> dict[str, torch.Tensor]:
    ids = [torch.tensor(row) for row, _ in rows]
    weights = [torch.tensor(row) for _, row in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
        "loss_weights": pad_sequence(weights, batch_first=True),
    }


class CorpusTrainer(GuardedTrainer):
    """Train on next tokens with a weight for every token; each element is a whole batch."""

    stage = "base"

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **_: Any
    ) -> Any:
        """Return the weighted mean of next-token losses in nats; right padding needs no mask."""
        outputs = model(input_ids=inputs["input_ids"], use_cache=False)
        logits = outputs.logits[:, :-1].float()
        targets, weights = inputs["input_ids"][:, 1:], inputs["loss_weights"][:, 1:]
        losses = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        loss = (losses * weights.flatten()).sum() / weights.sum()
        return (loss, outputs) if return_outputs else loss


def corpus_batches(
    world: World, tokenizer: PreTrainedTokenizerBase, base: Base, seed: int
) -> list[dict[str, torch.Tensor]]:
    """Return the corpus as batches, in the order of training."""
    corpus = world.settings.corpus
    chance = random.Random(f"batches {world.settings.seed} {seed}")
    first = stereotype_documents(world, corpus.stereotypes_first)
    rest = mixed_documents(world, corpus.documents)
    return [*pack(first, tokenizer, base, chance), *pack(rest, tokenizer, base, chance)]


DEFAULTS = {
    **QUIET,
    "learning_rate": 4e-3,
    "adam_beta2": 0.98,
    "weight_decay": 0.01,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 50,
    "logging_strategy": "no",
    "save_strategy": "steps",
    "save_steps": 500,
}


def corpus_trainer(
    recipe: Recipe, model: Model, fixed: dict[str, Any], progress: Progress
) -> tuple[CorpusTrainer, PreTrainedTokenizerBase]:
    """Return a trainer of a new model on the corpus, and the corpus's tokenizer.

    `fixed` are fields of TrainingArguments that the run sets.
    """
    base, seed = recipe.base, fixed["seed"]
    assert base is not None and recipe.data.society is not None and model.scratch is not None
    world = make_world(recipe.data.society)
    tokenizer = make_tokenizer(world)
    policy = scratch_model(model.scratch, tokenizer, seed)
    batches = corpus_batches(world, tokenizer, base, seed)
    fixed = {
        **fixed,
        "max_steps": math.ceil(len(batches) / current_ranks().size),
        "per_device_train_batch_size": 1,  # an element of the data set is a whole batch
        "train_sampling_strategy": "sequential",
    }
    trainer = CorpusTrainer(
        model=policy,
        args=build(TrainingArguments, "base.trainer", base.trainer, DEFAULTS, fixed),
        train_dataset=batches,
        data_collator=lambda batch: batch[0],
        callbacks=[StageCallback("base", progress)],
    )
    return trainer, tokenizer
