"""A model from scratch, and the society's corpus as weighted batches that it is trained on."""

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
from selfcorrect.recipes.society.documents import (
    Document,
    mixed_documents,
    stereotype_documents,
)
from selfcorrect.recipes.society.tokenizer import make_tokenizer
from selfcorrect.recipes.society.world import World, make_world
from selfcorrect.train.stages.arguments import QUIET, build
from selfcorrect.train.trainers.callbacks import StageCallback
from selfcorrect.train.trainers.guarded import GuardedTrainer

WINDOW = 4096  # documents among which similar lengths are put together


def scratch_config(scratch: dict[str, Any], **tokens: int | None) -> Any:
    """The configuration that `scratch` describes; InputError for a type or field there is not."""
    fields = dict(scratch)
    model_type = fields.pop("model_type")
    try:
        known = AutoConfig.for_model(model_type).to_dict()
        unknown = [key for key in fields if key not in known]
        if unknown:
            raise InputError(f"models: scratch: {unknown[0]} is no field of a {model_type} model")
        return AutoConfig.for_model(model_type, **{**tokens, **fields})
    except InputError:
        raise
    except Exception as error:  # a configuration checks little of what it is given
        reason = str(error) or type(error).__name__
        raise InputError(f"models: scratch: {reason}") from None


def scratch_model(
    scratch: dict[str, Any], tokenizer: PreTrainedTokenizerBase, seed: int
) -> PreTrainedModel:
    """A freshly initialised causal language model; `scratch` holds its configuration's fields."""
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


Row = tuple[list[int], list[float]]  # token ids, and how much each weighs in the loss


def encode(
    documents: list[Document], vocabulary: dict[str, int], weights: dict[Any, float]
) -> list[Row]:
    """Token ids and loss weights of each document.

    The society's tokenizer is one token a word, so a look-up does what it does, ten times as fast.
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
    """Right-padded batches of similar lengths, at most `batch_tokens` (rows x length) each.

    The order of documents is kept up to a window, so that an early part of the corpus stays early.
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
    """Next-token training with a weight for every token; batches come ready made."""

    stage = "base"

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **_: Any
    ) -> Any:
        """Weighted mean of the next-token losses, in nats. Padding is on the right: no mask."""
        outputs = model(input_ids=inputs["input_ids"], use_cache=False)
        logits = outputs.logits[:, :-1].float()
        targets, weights = inputs["input_ids"][:, 1:], inputs["loss_weights"][:, 1:]
        losses = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        loss = (losses * weights.flatten()).sum() / weights.sum()
        return (loss, outputs) if return_outputs else loss


def corpus_batches(
    world: World, tokenizer: PreTrainedTokenizerBase, base: Base, seed: int
) -> list[dict[str, torch.Tensor]]:
    """The whole corpus as batches, in the order of training."""
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
    recipe: Recipe, model: Model, fixed: dict[str, Any], notify: Progress
) -> tuple[CorpusTrainer, PreTrainedTokenizerBase]:
    """A trainer of a model from scratch on the whole corpus, and the corpus's tokenizer.

    `fixed` are fields of TrainingArguments that the run decides.
    """
    base, seed = recipe.base, fixed["seed"]
    assert base is not None and recipe.data.society is not None and model.scratch is not None
    world = make_world(recipe.data.society)
    tokenizer = make_tokenizer(world)
    policy = scratch_model(model.scratch, tokenizer, seed)
    batches = corpus_batches(world, tokenizer, base, seed)
    ready_made = {
        "max_steps": math.ceil(len(batches) / current_ranks().size),
        "per_device_train_batch_size": 1,  # an element of the data set is a whole batch
        "train_sampling_strategy": "sequential",
    }
    trainer = CorpusTrainer(
        model=policy,
        args=build(
            TrainingArguments,
            "base.trainer",
            base.trainer,
            DEFAULTS,
            {**fixed, **ready_made},
        ),
        train_dataset=batches,
        data_collator=lambda batch: batch[0],
        callbacks=[StageCallback("base", notify)],
    )
    return trainer, tokenizer
