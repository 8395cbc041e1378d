"""The policy before any feedback: trained from scratch on the society's corpus, or fine-tuned."""

# ruff: noqa: TID253  (all of this file is torch and transformers)

import itertools
import math
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassError
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from selfcorrect.evaluate.models import load_model
from selfcorrect.evaluate.processes import joined
from selfcorrect.recipes.errors import InputError
from selfcorrect.recipes.schema import Base, Model, Recipe
from selfcorrect.recipes.society.documents import (
    Document,
    mixed_documents,
    stereotype_documents,
)
from selfcorrect.recipes.society.tokenizer import make_tokenizer
from selfcorrect.recipes.society.world import World, make_world
from selfcorrect.recipes.whole_files import whole_folder
from selfcorrect.train.arguments import NO_CODE, QUIET, build
from selfcorrect.train.feedback import Preference, pair_ids, render_prompt
from selfcorrect.train.finite import FiniteTrainer
from selfcorrect.train.stage import (
    Notify,
    StageCallback,
    finishing,
    is_finished,
    num_parameters,
    train_on,
    whole_state,
    write_record,
)

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


class CorpusTrainer(FiniteTrainer):
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


PRETRAIN_DEFAULTS = {
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
SFT_DEFAULTS = {
    **QUIET,
    "num_train_epochs": 1,
    "logging_strategy": "no",
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "steps",
    "save_steps": 200,
    "packing": False,
}


def train_base(
    recipe: Recipe,
    model: Model,
    preferences: list[Preference],
    folder: Path,
    seed: int,
    notify: Notify,
) -> None:
    """Make the policy of step 0 in `folder`, whole or not at all; nothing to do where it stands.

    A given model is saved there as plain safetensors, whatever it came as.
    """
    work = folder.with_name(f"{folder.name}.work")
    if is_finished(folder):
        shutil.rmtree(work, ignore_errors=True)  # killed before it came to that
        return
    started = time.time()
    fixed = {"output_dir": str(work), "seed": seed, "save_total_limit": 2}
    if recipe.base is None:
        with finishing(folder, work) as new:
            if new is not None:
                policy, tokenizer = given_model(model)
                policy.save_pretrained(new)
                tokenizer.save_pretrained(new)
                write_record(new, started, folder, parameters=policy.num_parameters())
        return
    if recipe.base.method == "pretrain":
        trainer, tokenizer = _pretrainer(recipe, model, fixed, notify)
    else:
        trainer, tokenizer = _fine_tuner(recipe.base, model, preferences, fixed, notify)
    train_on(trainer, work)
    policy = trainer.accelerator.unwrap_model(trainer.model)
    state = whole_state(trainer)
    with finishing(folder, work) as new:
        if new is not None:
            policy.save_pretrained(new, state_dict=state)
            tokenizer.save_pretrained(new)
            write_record(new, started, folder, parameters=num_parameters(policy))


def _pretrainer(
    recipe: Recipe, model: Model, fixed: dict[str, Any], notify: Notify
) -> tuple[Trainer, PreTrainedTokenizerBase]:
    base, seed = recipe.base, fixed["seed"]
    assert base is not None and recipe.data.society is not None and model.scratch is not None
    world = make_world(recipe.data.society)
    tokenizer = make_tokenizer(world)
    policy = scratch_model(model.scratch, tokenizer, seed)
    batches = corpus_batches(world, tokenizer, base, seed)
    ready_made = {
        "max_steps": math.ceil(len(batches) / joined().size),
        "per_device_train_batch_size": 1,  # an element of the data set is a whole batch
        "train_sampling_strategy": "sequential",
    }
    trainer = CorpusTrainer(
        model=policy,
        args=build(
            TrainingArguments,
            "base.trainer",
            base.trainer,
            PRETRAIN_DEFAULTS,
            {**fixed, **ready_made},
        ),
        train_dataset=batches,
        data_collator=lambda batch: batch[0],
        callbacks=[StageCallback("base", notify)],
    )
    return trainer, tokenizer


class _FineTuner(SFTTrainer, FiniteTrainer):
    """TRL's; see FiniteTrainer."""

    stage = "base"


def _fine_tuner(
    base: Base,
    model: Model,
    preferences: list[Preference],
    fixed: dict[str, Any],
    notify: Notify,
) -> tuple[Trainer, PreTrainedTokenizerBase]:
    """TRL's SFTTrainer on the preferred answers; the prompt is not learned from."""
    copy = Path(fixed["output_dir"]) / "given"
    processes = joined()
    if processes.size == 1:
        policy, tokenizer = given_model(model)
    elif processes.rank == 0 and not copy.is_dir():
        with whole_folder(copy) as new:  # no two download or convert
            for part in given_model(model):
                part.save_pretrained(new)
    processes.wait()
    fixed = {**fixed, **NO_CODE}
    arguments = build(SFTConfig, "base.trainer", base.trainer, SFT_DEFAULTS, fixed)
    if processes.size > 1:  # after the settings: under ZeRO-3 each keeps its part of what it reads
        trust = {"trust_remote_code": model.trust_remote_code}
        policy = AutoModelForCausalLM.from_pretrained(
            copy, dtype=torch.float32, use_safetensors=True, **trust
        )
        tokenizer = AutoTokenizer.from_pretrained(copy, **trust)
    rows = []
    for pair in preferences:
        prompt = render_prompt(tokenizer, pair.prompt)
        ids = pair_ids(tokenizer, pair)["chosen_ids"]
        num_prompt = len(tokenizer(prompt)["input_ids"])
        rows.append({"input_ids": ids, "completion_mask": [0] * num_prompt})
        rows[-1]["completion_mask"] += [1] * (len(ids) - num_prompt)
    trainer = _FineTuner(
        model=policy,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[StageCallback("base", notify)],
    )
    return trainer, tokenizer


def padding_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """A token to pad with that is not the end-of-text token, if the vocabulary has one to spare.

    transformers' classifiers score the last token that is not padding: were both the same, a reward
    model would never see that a text has ended.
    """
    named = [token for token in tokenizer.get_added_vocab() if "pad" in token.lower()]
    spare = [*named, tokenizer.unk_token, tokenizer.bos_token]
    return next((t for t in spare if t and t != tokenizer.eos_token), tokenizer.eos_token)


def given_model(model: Model) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The recipe's given model in float32, with a padding token; GGUF becomes plain weights."""
    assert model.path is not None
    policy, tokenizer = load_model(
        model.path,
        revision=model.revision,
        gguf_file=model.gguf_file,
        trust_remote_code=model.trust_remote_code,
        dtype="float32",
        device="cpu",
    )
    if tokenizer.eos_token is None:
        raise InputError(f"models: {model.name}: its tokenizer has no end-of-text token")
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        tokenizer.pad_token = padding_token(tokenizer)
    policy.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if model.gguf_file is not None:
        # A model read from GGUF counts as quantized, and is neither saved nor trained: its weights,
        # which were made plain in reading, move into a model that knows nothing of it.
        if hasattr(policy.config, "quantization_config"):
            del policy.config.quantization_config
        plain = AutoModelForCausalLM.from_config(policy.config)
        plain.load_state_dict(policy.state_dict())
        plain.generation_config = policy.generation_config
        policy = plain.to(torch.float32)
    return policy, tokenizer
