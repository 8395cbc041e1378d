"""DPO on preference pairs by TRL's DPOTrainer, on token ids that evaluation and PPO read too."""

# ruff: noqa: TID253  (all of this file is torch, transformers and trl)

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

from selfcorrect.evaluate.callback import temporary_eval_mode
from selfcorrect.evaluate.prompts.dialogue import Style
from selfcorrect.evaluate.prompts.tokenized import answer_ids, turn_end
from selfcorrect.evaluate.scoring.packed import context_length
from selfcorrect.recipes.foundation.errors import InputError, RunFailure
from selfcorrect.train.feedback.feedback import Preference, open_turns
from selfcorrect.train.feedback.kept_rows import keep_rows, too_long
from selfcorrect.train.ppo.critic import language_model_of
from selfcorrect.train.ppo.forward import IGNORED
from selfcorrect.train.ppo.noise import checkpoint_in_eval, hold_in_eval
from selfcorrect.train.ppo.sparse_modules import rounding_error
from selfcorrect.train.stages.base import RowCounter
from selfcorrect.train.stages.reward import SAME

SIDES = ("chosen", "rejected")
# The values of DPOConfig.loss_type, which TRL reads only when it computes the first loss.
LOSSES = (
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair",
    "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft",
)  # fmt: skip


class PairTrainer(DPOTrainer, RowCounter):
    """TRL's DPOTrainer on tokenised pairs; the reference is the policy before any feedback.

    Raises RunFailure if a log-probability is not the model's own, or if those of policy and
    reference differ before the first update.
    """

    def __init__(self, model: Any, args: DPOConfig, **kwargs: Any) -> None:
        has_adapter = kwargs.get("peft_config") is not None  # without it, the base is the reference
        reference = None if has_adapter else copy.deepcopy(model).eval()
        super().__init__(model, reference, args, **kwargs)
        self.language_model = language_model_of(self.accelerator.unwrap_model(self.model))
        if args.disable_dropout:  # of every kind, not only modules called dropout
            hold_in_eval(self.language_model)
        self._is_checked = False

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset  # the rows are token ids

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        checkpoint_in_eval(self.language_model)
        is_first = not (self._is_checked or self.state.global_step)
        if is_first:
            self._check_head(model, inputs)
        loss = super()._compute_loss(model, inputs, return_outputs)
        if is_first:
            self._is_checked = True
            if self.beta and self.args.disable_dropout:
                rewards = [self._metrics["train"][f"rewards/{side}"][-1] for side in SIDES]
                tokens = float(inputs["completion_mask"].sum()) / len(inputs["completion_mask"])
                difference = max(map(abs, rewards)) / (self.beta * tokens)
                self._check_equal(difference, "policy and reference")
        return loss

    @torch.no_grad()
    def _check_head(self, model: Any, inputs: dict[str, Any]) -> None:
        """Compare the log-probabilities of TRL's fused head with those of the model's own."""
        ids, mask = inputs["input_ids"], inputs["completion_mask"]
        given = {"input_ids": ids, "attention_mask": inputs["attention_mask"], "use_cache": False}
        with temporary_eval_mode(model), self.accelerator.autocast():
            labels = ids.masked_fill(mask == 0, IGNORED)
            fused = model(**given, labels=labels, fused_lm_head=True).log_probs
            logits = model(**given).logits[:, -ids.size(1) : -1].float()
        scored = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0] * mask[:, 1:]
        difference = (fused.sum(dim=1) - scored.sum(dim=1)).abs().sum() / mask[:, 1:].sum()
        self._check_equal(float(difference), "TRL's fused head and the model's own")

    def _check_equal(self, difference: float, passes: str) -> None:
        precisions = {"bf16": torch.bfloat16, "fp16": torch.float16}
        dtype = precisions.get(self.accelerator.mixed_precision, self.language_model.dtype)
        if difference > rounding_error(dtype):
            name = self.language_model.config.model_type
            raise RunFailure(
                f"{self.step_label}: no weight has changed yet, but log-probabilities of {passes} "
                f"differ by {difference:.2g} nats a token for {name}; use another policy.method"
            )


def pair_rows(
    tokenizer: PreTrainedTokenizerBase, preferences: Sequence[Preference], style: Style
) -> list[dict[str, list[int]]]:
    """Tokenise pairs for DPOTrainer: the prompt's ids, and those of each answer and its end.

    They are the ids of SFT's rows, for both sides.
    """
    end = turn_end(tokenizer, style)
    rows = []
    for pair in preferences:
        turns = open_turns(pair.prompt)
        row: dict[str, list[int]] = {}
        for side in SIDES:
            prompt, answer = answer_ids(tokenizer, turns, getattr(pair, side), style, end)
            row |= {"prompt_ids": prompt, f"{side}_ids": answer + end.ids}
        rows.append(row)
    return rows


def usable_pairs(
    rows: list[dict[str, list[int]]], max_length: int | None, policy: PreTrainedModel
) -> tuple[list[dict[str, list[int]]], dict[str, int]]:
    """Return the pairs that DPO can learn from, and the number left out by reason.

    TRL would cut longer ones. Raises InputError if none is left.
    """
    context = context_length(policy)

    def reason_against(row: dict[str, list[int]]) -> str | None:
        if row["chosen_ids"] == row["rejected_ids"]:
            return SAME
        longest = max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        return too_long(len(row["prompt_ids"]) + longest, max_length, context)

    kept, left_out = keep_rows("policy", "pairs", rows, reason_against)
    if not kept:
        raise InputError(f"policy: no pair can be trained on: {'; '.join(left_out)}")
    return kept, left_out
