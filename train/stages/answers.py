"""The worth of a policy's answers, where it is known: the society's raters beside the reward model.

A reward model is a stand-in for its raters. In the synthetic society their true utility of any
answer is known, so a checkpoint records both, on the same sampled answers: where the stand-in's
score rises and the raters' utility falls, the policy is overoptimised (Gao et al. 2023,
arXiv 2210.10760).
"""

# ruff: noqa: TID253  (all of this file is torch and transformers)

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from selfcorrect.evaluate.callback import gathered_weights, temporary_eval_mode
from selfcorrect.evaluate.prompts.dialogue import Style
from selfcorrect.evaluate.run_folder import AnswerWorth
from selfcorrect.evaluate.scoring.engine import Sample, Sampling
from selfcorrect.evaluate.scoring.sampling import SampledBatch, sample_batch
from selfcorrect.recipes.society.feedback import Prompt, prompts
from selfcorrect.recipes.society.world import World
from selfcorrect.train.ppo.prompts import policy_prompt_ids
from selfcorrect.train.ppo.rewards import RewardModelScorer, guarded

NUM_ANSWERS = 256


@dataclass
class AnswerSampler:
    """Sample a policy's answers to fixed prompts, and let raters and reward model judge them.

    The prompts are drawn like those of the feedback, but are others. Every checkpoint answers the
    same prompts with the same noise, and no random number of the training is used.
    """

    world: World
    initial: Any  # the policy before any feedback; KL is relative to it
    scorer: RewardModelScorer
    tokenizer: Any
    style: Style
    max_new_tokens: int

    def __post_init__(self) -> None:
        self.prompts: list[Prompt] = list(prompts(self.world, NUM_ANSWERS, "answers"))

    def __call__(self, policy: Any) -> AnswerWorth:
        """Return the mean worth of the policy's answers; the policy is left as it was."""
        messages = [list(prompt.messages) for prompt in self.prompts]
        ids = [policy_prompt_ids(self.tokenizer, prompt, self.style) for prompt in messages]
        keys = [f"answer {index}" for index in range(len(ids))]
        sampling = Sampling(self.max_new_tokens, temperature=1.0, seed=self.world.settings.seed)
        with temporary_eval_mode(policy), torch.no_grad():
            batch = sample_batch(policy, self.tokenizer, ids, keys, sampling)
            start = max(map(len, ids))
            log_ratios = log_probabilities(policy, batch, start)
            with gathered_weights(self.initial) as initial:
                log_ratios -= log_probabilities(initial, batch, start)
        texts, score = [sample.text for sample in batch.samples], guarded(self.scorer)
        written = [
            row[start : start + sample.num_tokens]
            for row, sample in zip(batch.rows, batch.samples, strict=True)
        ]
        return AnswerWorth(
            num=len(ids),
            utility=fmean(self.utilities(batch.samples)),
            score=fmean(score(messages, completions=texts, completion_ids=written)),
            kl=float(log_ratios.mean()),
        )

    def utilities(self, samples: Sequence[Sample]) -> list[float]:
        """Return the raters' utility of each answer; one that does not end is malformed."""
        raters = self.world.settings.raters
        return [
            prompt.utility_of_text("" if sample.truncated else sample.text.strip(), raters)
            for prompt, sample in zip(self.prompts, samples, strict=True)
        ]


def log_probabilities(model: Any, batch: SampledBatch, start: int) -> torch.Tensor:
    """Return the log-probability of each sample, its end token included, shape (rows,).

    Samples begin at column `start` of the batch's rows.
    """
    device = next(model.parameters()).device
    rows = torch.tensor(batch.rows, device=device)
    columns = torch.arange(rows.size(1), device=device)
    padding = torch.tensor(batch.padding, device=device)[:, None]
    lengths = torch.tensor([sample.num_tokens for sample in batch.samples], device=device)
    logits = model(
        input_ids=rows,
        attention_mask=(columns >= padding).long(),
        position_ids=(columns - padding).clamp(min=0),
    ).logits[:, start - 1 : -1]
    tokens = rows[:, start:]
    chosen = logits.float().log_softmax(-1).gather(-1, tokens[:, :, None]).squeeze(-1)
    return (chosen * (columns[: tokens.size(1)] < lengths[:, None])).sum(dim=1).cpu()
