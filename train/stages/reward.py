"""The reward model: TRL's RewardTrainer on preference pairs, scored at the end-of-text token."""

# ruff: noqa: TID253  (all of this file is torch, transformers and trl)

import copy
import random
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.integrations.deepspeed import (
    is_deepspeed_zero3_enabled,
    unset_hf_deepspeed_config,
)
from trl import RewardConfig, RewardTrainer

from selfcorrect.evaluate.scoring.load_model import refuse_pickles
from selfcorrect.recipes.foundation.errors import InputError, RunFailure, first_line
from selfcorrect.recipes.schema import Reward
from selfcorrect.train.feedback.feedback import Feedback, Preference, pair_ids
from selfcorrect.train.ppo.rewards import load_reward_model
from selfcorrect.train.stages import JobFacts
from selfcorrect.train.stages.arguments import NO_CODE, ONE_EPOCH, build, lora_config
from selfcorrect.train.trainers.callbacks import StageCallback
from selfcorrect.train.trainers.guarded import GuardedTrainer, train_or_resume
from selfcorrect.train.trainers.state import (
    finish_stage,
    gathered_weights,
    work_folder,
    write_stage_record,
)

DEFAULTS = {
    **ONE_EPOCH, "save_steps": 100, "center_rewards_coefficient": 0.01, "eval_strategy": "no",
}  # fmt: skip


class GuardedRewardTrainer(RewardTrainer, GuardedTrainer):
    """TRL's RewardTrainer with the checks of GuardedTrainer."""

    stage = "reward"


def train_reward(
    job: JobFacts, reward: Reward, feedback: Feedback, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Fit the reward model from the base model; return at once if the stage is finished.

    With `reward.path`, that model is copied, adapters merged, with its own tokenizer. stage.json
    records the share of held-out pairs in the right order, and mean and standard deviation of the
    scores of held-out texts, by which PPO centres and scales the score.
    """
    base, folder = job.base, job.reward
    work = work_folder(folder)
    if work is None:
        return
    started = time.time()
    arguments = build(
        RewardConfig,
        "reward.trainer",
        reward.trainer,
        DEFAULTS,
        {"output_dir": str(work), "seed": job.seed, "save_total_limit": 2, **NO_CODE},
    )
    shuffled = list(feedback.preferences)
    random.Random(job.seed).shuffle(shuffled)
    num_held_out = max(1, int(len(shuffled) * reward.held_out))
    if num_held_out >= len(shuffled):
        raise InputError(f"reward: {len(shuffled)} preference pairs are too few to hold any out")
    batch = arguments.per_device_train_batch_size * 4
    if reward.path is not None:
        with finish_stage(folder, work) as new:
            if new is not None:
                facts = copy_given_model(reward.path, shuffled[:num_held_out], batch, new)
                write_stage_record(
                    new, started, folder, pairs=0, left_out=feedback.left_out, **facts
                )
        return
    pairs = [pair_ids(tokenizer, pair) for pair in shuffled]
    set_seed(job.seed)
    with refuse_pickles(base):
        model = _new_classifier(base, job.trust_remote_code)
    padding = with_own_padding(tokenizer)
    lora = lora_config("reward.lora", reward.lora, "SEQ_CLS") if reward.lora else None
    try:
        trainer = GuardedRewardTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list(pairs[num_held_out:]),
            processing_class=padding,
            peft_config=lora,
            callbacks=[StageCallback("reward", job.progress)],
        )
    except ValueError as error:  # LoRA targets that match nothing, pairs that are all too long
        raise InputError(f"reward: {first_line(error)}") from None
    train_or_resume(trainer, work)
    fitted = trainer.accelerator.unwrap_model(trainer.model)
    state = gathered_weights(trainer)
    split = is_deepspeed_zero3_enabled()
    if reward.lora and not split:
        fitted, state = fitted.merge_and_unload(), None
    facts = held_out_facts(fitted, pairs[:num_held_out], padding.pad_token_id, batch)
    with finish_stage(folder, work) as new:
        if new is not None:
            if reward.lora and split:
                fitted = merge_from_disk(base, fitted, state, new, job.trust_remote_code)
                state = None
            fitted.save_pretrained(new, state_dict=state)
            tokenizer.save_pretrained(new)
            write_stage_record(
                new,
                started,
                folder,
                pairs=len(pairs) - num_held_out,
                left_out=feedback.left_out,
                **facts,
            )


def _new_classifier(base: Path, trust_remote_code: bool) -> Any:
    """Load the base model in float32 with a new score head."""
    return AutoModelForSequenceClassification.from_pretrained(
        base,
        num_labels=1,
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
    )


def copy_given_model(
    path: str, held_out: list[Preference], batch: int, folder: Path
) -> dict[str, Any]:
    """Copy a reward model and its tokenizer into `folder`; return its facts on held-out pairs."""
    unset_hf_deepspeed_config()  # or ZeRO-3 would partition the model on loading
    model = load_reward_model(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"reward.path: {path} has no tokenizer beside it ({first_line(error)})"
        ) from None
    if model.config.pad_token_id is None:
        model.config.pad_token_id = with_own_padding(tokenizer).pad_token_id
    pairs = [pair_ids(tokenizer, pair) for pair in held_out]
    facts = held_out_facts(model, pairs, model.config.pad_token_id, batch)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"given": path, **facts}


def merge_from_disk(
    base: Path, fitted: Any, state: dict[str, Any] | None, folder: Path, trust_remote_code: bool
) -> Any:
    """Load the base from disk and merge the adapter of `fitted` into it.

    Under ZeRO-3 no process holds the whole model. `state` has the adapter's tensors, which are
    written to `folder` temporarily.
    """
    unset_hf_deepspeed_config()  # or ZeRO-3 would partition this model too
    adapter = folder / "adapter"
    fitted.save_pretrained(adapter, state_dict=state)
    plain = _new_classifier(base, trust_remote_code)
    model = PeftModel.from_pretrained(plain, adapter).merge_and_unload()
    shutil.rmtree(adapter)
    return model


def with_own_padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return the tokenizer, or a copy that pads with another token than the end-of-text token.

    transformers' classifiers score the last token that is not padding, which must be the
    end-of-text token. Any other token serves as padding.
    """
    if tokenizer.pad_token_id not in (None, tokenizer.eos_token_id):
        return tokenizer
    padding = copy.deepcopy(tokenizer)
    padding.pad_token = tokenizer.convert_ids_to_tokens(int(tokenizer.eos_token_id == 0))
    return padding


@torch.no_grad()
def held_out_facts(
    model: Any, pairs: list[dict[str, list[int]]], pad: int, batch: int
) -> dict[str, Any]:
    """Return the accuracy on held-out pairs, and mean and standard deviation of the scores."""
    model.eval()
    texts = [pair["chosen_ids"] for pair in pairs] + [pair["rejected_ids"] for pair in pairs]
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    scores = [0.0] * len(texts)
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        unpadded = [torch.tensor(texts[index], device=model.device) for index in rows]
        ids = pad_sequence(unpadded, batch_first=True, padding_value=pad)
        mask = pad_sequence([torch.ones_like(row) for row in unpadded], batch_first=True)
        batch_scores = model(input_ids=ids, attention_mask=mask).logits[:, 0].float().tolist()
        for index, score in zip(rows, batch_scores, strict=True):
            scores[index] = score
    half = len(pairs)
    is_right = [a > b for a, b in zip(scores[:half], scores[half:], strict=True)]
    mean, deviation = statistics.fmean(scores), statistics.pstdev(scores)
    if not (deviation > 0):  # also where a score is NaN
        raise RunFailure(
            "reward: the reward model gives every text the same score; train it longer"
        )
    return {
        "held_out_pairs": half,
        "held_out_accuracy": sum(is_right) / half,
        "score_mean": mean,
        "score_standard_deviation": deviation,
    }
