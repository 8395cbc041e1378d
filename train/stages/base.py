"""The policy before any feedback: trained from scratch on the society's corpus, or fine-tuned."""

# ruff: noqa: TID253  (all of this file is torch and transformers)

import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)
from trl import SFTConfig, SFTTrainer

from selfcorrect.evaluate.prompts.dialogue import AUTO, Style
from selfcorrect.evaluate.prompts.tokenized import answer_ids, turn_end
from selfcorrect.evaluate.scoring.load_model import load_model
from selfcorrect.evaluate.scoring.packed import context_length
from selfcorrect.evaluate.scoring.precision import cast_weights
from selfcorrect.evaluate.scoring.sampling import end_tokens
from selfcorrect.recipes.foundation.atomic_files import atomic_folder
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.foundation.ranks import current_ranks
from selfcorrect.recipes.schema import Base, Model, Recipe
from selfcorrect.train.feedback.feedback import Preference, open_turns
from selfcorrect.train.feedback.kept_rows import NOT_REACHED, keep_rows, too_long
from selfcorrect.train.stages import JobFacts
from selfcorrect.train.stages.arguments import NO_CODE, ONE_EPOCH, build
from selfcorrect.train.stages.corpus import corpus_trainer
from selfcorrect.train.trainers.callbacks import StageCallback
from selfcorrect.train.trainers.guarded import GuardedTrainer, train_or_resume
from selfcorrect.train.trainers.state import (
    finish_stage,
    gathered_weights,
    num_parameters,
    rows_drawn,
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
        trainer, tokenizer = _sft_trainer(job, recipe.base, model, preferences, fixed)
    train_or_resume(trainer, work)
    facts = trainer.row_facts() if isinstance(trainer, FineTuningTrainer) else {}
    policy = trainer.accelerator.unwrap_model(trainer.model)
    state = gathered_weights(trainer)
    with finish_stage(folder, work) as new:
        if new is not None:
            policy.save_pretrained(new, state_dict=state)
            tokenizer.save_pretrained(new)
            facts |= {"parameters": num_parameters(policy)}
            write_stage_record(new, started, folder, **facts)


class RowCounter(GuardedTrainer):
    """A trainer that counts the rows it uses; `left_out` are those that it was never given."""

    left_out: dict[str, int]

    def row_facts(self) -> dict[str, Any]:
        """Return the number of rows trained on, and of those left out, by reason, for a record."""
        num_rows, left_out = rows_drawn(self), dict(self.left_out)
        if num_rows < len(self.train_dataset):
            left_out[NOT_REACHED] = len(self.train_dataset) - num_rows
        return {"rows": num_rows, "left_out": left_out}


class FineTuningTrainer(SFTTrainer, RowCounter):
    """TRL's SFTTrainer on preferred answers."""

    stage = "base"


def _sft_trainer(
    job: JobFacts,
    base: Base,
    model: Model,
    preferences: list[Preference],
    fixed: dict[str, Any],
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
    if job.trained != "float32":
        cast_weights(policy, job.trained)
    rows = preferred_rows(tokenizer, preferences, job.style)
    rows, left_out = usable_rows(rows, arguments.max_length, policy, "base")
    trainer = FineTuningTrainer(
        model=policy,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[StageCallback("base", job.progress)],
    )
    trainer.left_out = left_out
    return trainer, tokenizer


def usable_rows(
    rows: list[dict[str, list[int]]], max_length: int | None, policy: PreTrainedModel, stage: str
) -> tuple[list[dict[str, list[int]]], dict[str, int]]:
    """Return the rows that fit, and the number left out by reason.

    TRL would cut the others, and a policy would learn answers without an end. Raises InputError if
    none fits.
    """
    context = context_length(policy)
    kept, left_out = keep_rows(
        stage,
        "preferred answers",
        rows,
        lambda row: too_long(len(row["input_ids"]), max_length, context),
    )
    if not kept:
        reasons = "; ".join(left_out) or "there are none"
        raise InputError(f"{stage}: no preferred answer can be trained on: {reasons}")
    return kept, left_out


def preferred_rows(
    tokenizer: PreTrainedTokenizerBase, preferences: list[Preference], style: Style = AUTO
) -> list[dict[str, list[int]]]:
    """Tokenise prompts with their preferred answers for SFTTrainer; the mask is 1 on answers.

    The answer is all that the policy has to write after the prompt from which PPO samples, up to
    the token that ends the turn.
    """
    end = turn_end(tokenizer, style)
    rows = []
    for pair in preferences:
        turns = open_turns(pair.prompt)
        prompt, answer = answer_ids(tokenizer, turns, pair.chosen, style, end)
        mask = [0] * len(prompt) + [1] * len(answer + end.ids)
        rows.append({"input_ids": prompt + answer + end.ids, "completion_mask": mask})
    return rows


def load_given_model(model: Model) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the given model in float32, with a padding token.

    Adapters are merged into their base, and GGUF weights are dequantized.
    """
    assert model.path is not None
    policy, tokenizer = load_model(
        model.path,
        revision=model.revision,
        gguf_file=model.gguf_file,
        trust_remote_code=model.trust_remote_code,
        dtype="float32",
        device="cpu",
    )
    is_adapted = isinstance(policy, PeftModel)
    if is_adapted:
        policy = merged(policy, f"models: {model.name}")
    if tokenizer.eos_token is None:
        raise InputError(f"models: {model.name}: its tokenizer has no end-of-text token")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    policy.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if policy.can_generate():  # TRL reads the end tokens there; the chat template may have its own
        policy.generation_config.eos_token_id = sorted(end_tokens(policy, tokenizer))
        policy.generation_config.pad_token_id = tokenizer.pad_token_id  # or -1 refuses to be saved
    is_gguf = model.gguf_file is not None or Path(model.path).suffix == ".gguf"
    if is_gguf or is_adapted:
        # transformers treats a model read from GGUF as quantized, and refuses to save or train it.
        # Its weights were dequantized on reading: move them into an ordinary model. An adapter may
        # have doubled layers, which share their weights until then.
        if hasattr(policy.config, "quantization_config"):
            del policy.config.quantization_config
        plain = AutoModelForCausalLM.from_config(
            policy.config, trust_remote_code=model.trust_remote_code
        )
        plain.load_state_dict(policy.state_dict())
        plain.generation_config = policy.generation_config
        policy = plain.to(torch.float32)
    return policy, tokenizer


@torch.no_grad()
def merged(adapted: PeftModel, key: str) -> PreTrainedModel:
    """Return the base model with its adapter merged; InputError if that cannot be exact."""
    ids = torch.arange(min(16, adapted.get_input_embeddings().weight.shape[0]))[None]
    expected = adapted(input_ids=ids).logits
    try:
        policy = adapted.merge_and_unload()
        difference = (policy(input_ids=ids).logits - expected).abs().mean() / expected.std()
        is_exact = bool(difference < 1e-3)
    except (AttributeError, NotImplementedError, ValueError):
        is_exact = False
    if not is_exact:
        kind = adapted.peft_config["default"].peft_type.value
        raise InputError(
            f"{key}: its adapter (type {kind}) cannot be merged into the base model, and so not be "
            "trained further; give a whole model, or an adapter such as LoRA"
        )
    return policy
