"""The worth of a policy's answers, where it is known: the society's raters beside the reward model.

A reward model is a stand-in for its raters. In the synthetic society their true utility of any
answer is known, so a checkpoint records both, on the same sampled answers: where the stand-in's
score rises and the raters' utility falls, the policy is overoptimised (Gao et al. 2023,
arXiv 2210.10760).
"""

# ruff: noqa: TID253  (all of this file is torch and transformers)

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

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
            log_ratios = log_probabilities(policy, batch)
            with gathered_weights(self.initial) as initial:
                log_ratios -= log_probabilities(initial, batch)
        texts, score = [sample.text for sample in batch.samples], guarded(self.scorer)
        written = [row[len(prompt) :] for prompt, row in zip(ids, batch.rows, strict=True)]
        utilities = self.utilities(batch.samples)
        scores = score(messages, completions=texts, completion_ids=written)
        return AnswerWorth(
            num=len(ids),
            utility=fmean(utilities),
            score=fmean(scores),
            kl=float(log_ratios.mean()),
            utility_error=stdev(utilities) / len(ids) ** 0.5,
            score_error=stdev(scores) / len(ids) ** 0.5,
        )

    def utilities(self, samples: Sequence[Sample]) -> list[float]:
        """Return the raters' utility of each answer; one that does not end is malformed."""
        raters = self.world.settings.raters
        return [
            prompt.utility_of_text("" if sample.truncated else sample.text.strip(), raters)
            for prompt, sample in zip(self.prompts, samples, strict=True)
        ]


def log_probabilities(model: Any, batch: SampledBatch) -> torch.Tensor:
    """Return the log-probability of each sample, its end token included, shape (rows,)."""
    device = next(model.parameters()).device
    rows = pad_sequence([torch.tensor(row) for row in batch.rows], batch_first=True).to(device)
    ends = torch.tensor([len(row) for row in batch.rows], device=device)[:, None]
    starts = ends - torch.tensor([[sample.num_tokens] for sample in batch.samples], device=device)
    columns = torch.arange(rows.size(1), device=device)
    first = int(starts.min())
    logits = model(input_ids=rows, attention_mask=(columns < ends).long()).logits[:, first - 1 : -1]
    chosen = logits.float().log_softmax(-1).gather(-1, rows[:, first:, None]).squeeze(-1)
    is_sample = ((columns >= starts) & (columns < ends))[:, first:]
    return (chosen * is_sample).sum(dim=1).cpu()
