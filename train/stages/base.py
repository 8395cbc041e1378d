"""The policy before any feedback: trained from scratch on the society's corpus, or fine-tuned."""

# ruff: noqa: TID253  (all of this file is torch and transformers)

import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)
from trl import SFTConfig, SFTTrainer

from selfcorrect.evaluate.scoring.load_model import load_model
from selfcorrect.recipes.foundation.atomic_files import atomic_folder
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.foundation.progress import Progress
from selfcorrect.recipes.foundation.ranks import current_ranks
from selfcorrect.recipes.schema import Base, Model, Recipe
from selfcorrect.train.feedback.feedback import Preference, pair_ids, render_prompt
from selfcorrect.train.stages import JobFacts
from selfcorrect.train.stages.arguments import NO_CODE, ONE_EPOCH, build
from selfcorrect.train.stages.corpus import corpus_trainer
from selfcorrect.train.trainers.callbacks import StageCallback
from selfcorrect.train.trainers.guarded import GuardedTrainer, train_or_resume
from selfcorrect.train.trainers.state import (
    finish_stage,
    gathered_weights,
    num_parameters,
    work_folder,
    write_stage_record,
)

SFT_DEFAULTS = {**ONE_EPOCH, "save_steps": 200, "packing": False}


def train_base(job: JobFacts, recipe: Recipe, model: Model, preferences: list[Preference]) -> None:
    """Make the policy of step 0 in `job.base`; return at once if the stage is finished.

    A given model is saved there as plain safetensors, whatever its own format. The folder appears
    complete or not at all.
    """
    folder = job.base
    work = work_folder(folder)
    if work is None:
        return
    started = time.time()
    fixed = {"output_dir": str(work), "seed": job.seed, "save_total_limit": 2}
    if recipe.base is None:
        with finish_stage(folder, work) as new:
            if new is not None:
                policy, tokenizer = load_given_model(model)
                policy.save_pretrained(new)
                tokenizer.save_pretrained(new)
                write_stage_record(new, started, folder, parameters=policy.num_parameters())
        return
    if recipe.base.method == "pretrain":
        trainer, tokenizer = corpus_trainer(recipe, model, fixed, job.progress)
    else:
        trainer, tokenizer = _sft_trainer(recipe.base, model, preferences, fixed, job.progress)
    train_or_resume(trainer, work)
    policy = trainer.accelerator.unwrap_model(trainer.model)
    state = gathered_weights(trainer)
    with finish_stage(folder, work) as new:
        if new is not None:
            policy.save_pretrained(new, state_dict=state)
            tokenizer.save_pretrained(new)
            write_stage_record(new, started, folder, parameters=num_parameters(policy))


class _BaseSFTTrainer(SFTTrainer, GuardedTrainer):
    """TRL's SFTTrainer with the checks of GuardedTrainer."""

    stage = "base"


def _sft_trainer(
    base: Base,
    model: Model,
    preferences: list[Preference],
    fixed: dict[str, Any],
    progress: Progress,
) -> tuple[Trainer, PreTrainedTokenizerBase]:
    """Return a trainer on the preferred answers, whose loss leaves out the prompts."""
    copy = Path(fixed["output_dir"]) / "given"
    ranks = current_ranks()
    if ranks.size == 1:
        policy, tokenizer = load_given_model(model)
    elif ranks.rank == 0 and not copy.is_dir():
        with atomic_folder(copy) as new:  # rank 0 alone downloads and converts
            for part in load_given_model(model):
                part.save_pretrained(new)
    ranks.barrier()
    fixed = {**fixed, **NO_CODE}
    arguments = build(SFTConfig, "base.trainer", base.trainer, SFT_DEFAULTS, fixed)
    if ranks.size > 1:  # after the settings: under ZeRO-3 each rank keeps its part of the weights
        trust = {"trust_remote_code": model.trust_remote_code}
        policy = AutoModelForCausalLM.from_pretrained(
            copy, dtype=torch.float32, use_safetensors=True, **trust
        )
        tokenizer = AutoTokenizer.from_pretrained(copy, **trust)
    trainer = _BaseSFTTrainer(
        model=policy,
        args=arguments,
        train_dataset=Dataset.from_list(preferred_rows(tokenizer, preferences)),
        processing_class=tokenizer,
        callbacks=[StageCallback("base", progress)],
    )
    return trainer, tokenizer


def preferred_rows(
    tokenizer: PreTrainedTokenizerBase, preferences: list[Preference]
) -> list[dict[str, list[int]]]:
    """Tokenize prompts with their preferred answers for SFTTrainer; the mask is 1 on answers."""
    rows = []
    for pair in preferences:
        prompt = render_prompt(tokenizer, pair.prompt)
        ids = pair_ids(tokenizer, pair)["chosen_ids"]
        num_prompt = len(tokenizer(prompt)["input_ids"])
        mask = [0] * num_prompt + [1] * (len(ids) - num_prompt)
        rows.append({"input_ids": ids, "completion_mask": mask})
    return rows


def padding_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a padding token other than the end-of-text token, if the vocabulary has one.

    transformers' classifiers score the last token that is not padding: with the same token for
    both, a reward model would never see the end of a text.
    """
    pads = [token for token in tokenizer.get_added_vocab() if "pad" in token.lower()]
    candidates = [*pads, tokenizer.unk_token, tokenizer.bos_token]
    return next((t for t in candidates if t and t != tokenizer.eos_token), tokenizer.eos_token)


def load_given_model(model: Model) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the given model in float32, with a padding token; GGUF weights are dequantized."""
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
        # transformers treats a model read from GGUF as quantized, and refuses to save or train it.
        # Its weights were dequantized on reading: move them into an ordinary model.
        if hasattr(policy.config, "quantization_config"):
            del policy.config.quantization_config
        plain = AutoModelForCausalLM.from_config(policy.config)
        plain.load_state_dict(policy.state_dict())
        plain.generation_config = policy.generation_config
        policy = plain.to(torch.float32)
    return policy, tokenizer
