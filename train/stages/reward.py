"""The reward model: TRL's RewardTrainer on preference pairs, scored at the last token."""

# ruff: noqa: TID253  (all of this file is torch, transformers and trl)

import random
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed
from transformers.integrations.deepspeed import (
    is_deepspeed_zero3_enabled,
    unset_hf_deepspeed_config,
)
from trl import RewardConfig, RewardTrainer

from selfcorrect.recipes.foundation.errors import InputError, RunFailure, is_from_outside, reason_of
from selfcorrect.recipes.schema import Reward
from selfcorrect.train.feedback.feedback import Feedback, pair_ids
from selfcorrect.train.feedback.kept_rows import NOT_REACHED, keep_rows, too_long
from selfcorrect.train.ppo.reward_models import (
    load_reward_model,
    longest_row,
    new_reward_model,
    score_rows,
    without_unread_end,
)
from selfcorrect.train.stages import JobFacts
from selfcorrect.train.stages.arguments import (
    NO_CODE,
    ONE_EPOCH,
    build,
    computed_in,
    lora_config,
)
from selfcorrect.train.trainers.callbacks import StageCallback
from selfcorrect.train.trainers.guarded import GuardedTrainer, train_or_resume
from selfcorrect.train.trainers.state import (
    finish_stage,
    gathered_weights,
    rows_drawn,
    work_folder,
    write_stage_record,
)

DEFAULTS = {
    **ONE_EPOCH, "save_steps": 100, "center_rewards_coefficient": 0.01, "eval_strategy": "no",
}  # fmt: skip
SAME = "both sides are the same tokens"
Pairs = list[dict[str, list[int]]]


class GuardedRewardTrainer(RewardTrainer, GuardedTrainer):
    """TRL's RewardTrainer with the checks of GuardedTrainer."""

    stage = "reward"


def train_reward(
    job: JobFacts, reward: Reward, feedback: Feedback, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Fit the reward model from the base model; return at once if the stage is finished.

    With `reward.path`, that model is copied, adapters merged, with its own tokenizer. stage.json
    records the number of pairs used and of those left out, the share of held-out pairs in the right
    order, and mean and standard deviation of the scores of held-out texts, by which PPO centres and
    scales the score.
    """
    base, folder = job.base, job.reward
    work = work_folder(folder)
    if work is None:
        return
    started = time.time()
    has_adapter = reward.lora is not None
    arguments = build(
        RewardConfig,
        "reward.trainer",
        reward.trainer,
        {**DEFAULTS, **computed_in(job.frozen, has_adapter, reward.trainer)},
        {"output_dir": str(work), "seed": job.seed, "save_total_limit": 2, **NO_CODE},
    )
    batch = arguments.per_device_train_batch_size * 4
    shuffled = list(feedback.preferences)
    random.Random(job.seed).shuffle(shuffled)
    if reward.path is not None:
        with finish_stage(folder, work) as new:
            if new is not None:
                model, given_tokenizer = load_given_model(reward.path)
                num_held_out = max(1, int(len(shuffled) * reward.held_out))
                pairs = pair_ids(given_tokenizer, shuffled[:num_held_out], job.style)
                pairs, left_out = usable_pairs(pairs, None, longest_row(model, given_tokenizer))
                if not pairs:
                    raise _too_few(left_out)
                facts = held_out_facts(model, as_trained(model, given_tokenizer, pairs), batch)
                model.save_pretrained(new)
                given_tokenizer.save_pretrained(new)
                facts |= {"given": reward.path, "left_out": {**feedback.left_out, **left_out}}
                write_stage_record(new, started, folder, pairs=0, **facts)
        return
    set_seed(job.seed)
    held = job.frozen if has_adapter else job.trained
    model = new_reward_model(base, job.trust_remote_code, held)
    pairs, left_out = usable_pairs(
        pair_ids(tokenizer, shuffled, job.style), arguments.max_length, longest_row(model)
    )
    num_held_out = max(1, int(len(pairs) * reward.held_out))
    if num_held_out >= len(pairs):
        raise _too_few(left_out, len(pairs))
    lora = lora_config("reward.lora", reward.lora, "SEQ_CLS") if reward.lora else None
    try:
        trainer = GuardedRewardTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list(pairs[num_held_out:]),
            processing_class=tokenizer,
            peft_config=lora,
            callbacks=[StageCallback("reward", job.progress)],
        )
    except ValueError as error:  # LoRA targets that match nothing
        raise InputError(f"reward: {reason_of(error)}") from None
    train_or_resume(trainer, work)
    num_pairs = rows_drawn(trainer)
    if num_pairs < len(pairs) - num_held_out:
        left_out[NOT_REACHED] = len(pairs) - num_held_out - num_pairs
    fitted = trainer.accelerator.unwrap_model(trainer.model)
    state = gathered_weights(trainer)
    # Merged into weights of 16 or 4 bits, an adapter would lose its smallest changes.
    from_disk = has_adapter and (is_deepspeed_zero3_enabled() or held != "float32")
    if has_adapter and not from_disk:
        fitted, state = fitted.merge_and_unload(), None
    facts = held_out_facts(fitted, pairs[:num_held_out], batch)
    with finish_stage(folder, work) as new:
        if new is not None:
            if from_disk:
                fitted = merge_from_disk(base, fitted, state, new, job.trust_remote_code)
                state = None
            # Other tools read the score at the last token that is not `pad_token_id`.
            ends = {ids[-1] for pair in pairs for ids in pair.values()}
            unused = (i for i in (tokenizer.pad_token_id, *range(len(ends) + 1)) if i not in ends)
            fitted.config.get_text_config().pad_token_id = next(unused)
            fitted.save_pretrained(new, state_dict=state)
            tokenizer.save_pretrained(new)
            facts |= {"left_out": {**feedback.left_out, **left_out}}
            write_stage_record(new, started, folder, pairs=num_pairs, **facts)


def usable_pairs(
    pairs: Pairs, max_length: int | None, context: int | None
) -> tuple[Pairs, dict[str, int]]:
    """Return the pairs that a reward model can learn from, and the number left out by reason.

    TRL drops pairs longer than `max_length` without a word, and scores the others only.
    """

    def reason_against(pair: dict[str, list[int]]) -> str | None:
        chosen, rejected = pair["chosen_ids"], pair["rejected_ids"]
        if chosen == rejected:
            return SAME
        return too_long(max(len(chosen), len(rejected)), max_length, context)

    return keep_rows("reward", "pairs", pairs, reason_against)


def _too_few(left_out: dict[str, int], left: int = 0) -> InputError:
    reasons = "".join(f"; {count} are left out: {reason}" for reason, count in left_out.items())
    return InputError(f"reward: {left} preference pairs are too few to hold any out{reasons}")


def load_given_model(path: str) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load the reward model of `reward.path` and its tokenizer."""
    unset_hf_deepspeed_config()  # or ZeRO-3 would partition the model on loading
    model = load_reward_model(path)
    try:
        return model, AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if is_from_outside(error):
            raise
        raise InputError(
            f"reward.path: {path} has no tokenizer beside it ({reason_of(error)})"
        ) from None


def as_trained(model: Any, tokenizer: PreTrainedTokenizerBase, pairs: Pairs) -> Pairs:
    """Return pairs as a given reward model has learned to read them."""
    sides = {
        side: without_unread_end(model, tokenizer, [pair[side] for pair in pairs])
        for side in ("chosen_ids", "rejected_ids")
    }
    return [dict(zip(sides, row, strict=True)) for row in zip(*sides.values(), strict=True)]


def merge_from_disk(
    base: Path, fitted: Any, state: dict[str, Any] | None, folder: Path, trust_remote_code: bool
) -> Any:
    """Load the base from disk and merge the adapter of `fitted` into it.

    Under ZeRO-3 no process holds the whole model, or it holds rounded weights. `state` has the
    adapter's tensors (None: they are in `fitted`), which are written to `folder` temporarily.
    """
    unset_hf_deepspeed_config()  # or ZeRO-3 would partition this model too
    adapter = folder / "adapter"
    fitted.save_pretrained(adapter, state_dict=state)
    plain = new_reward_model(base, trust_remote_code)
    model = PeftModel.from_pretrained(plain, adapter).merge_and_unload()
    shutil.rmtree(adapter)
    return model


def held_out_facts(model: Any, pairs: Pairs, batch: int) -> dict[str, Any]:
    """Return the accuracy on held-out pairs, and mean and standard deviation of the scores."""
    texts = [pair["chosen_ids"] for pair in pairs] + [pair["rejected_ids"] for pair in pairs]
    scores = score_rows(model.eval(), texts, batch)
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
