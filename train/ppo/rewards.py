"""Rewards: a reward model's score, the raters' own rule, and a check around every function."""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selfcorrect.evaluate.prompts.dialogue import AUTO, Style
from selfcorrect.evaluate.prompts.tokenized import (
    TurnEnd,
    answer_ids,
    continued_ids,
    end_of_text_id,
    turn_end,
)
from selfcorrect.recipes.foundation.errors import InputError, RunFailure
from selfcorrect.recipes.society.raters import RatedPrompt
from selfcorrect.recipes.society.settings import Raters
from selfcorrect.train.feedback.feedback import open_turns
from selfcorrect.train.ppo.limits import rows_per_pass
from selfcorrect.train.ppo.prompts import Prompt, policy_prompt_ids
from selfcorrect.train.ppo.reward_models import longest_row, score_rows, without_unread_end

Reward = Callable[..., Any]


class RewardModelScorer:
    """A sequence classifier with one output, as a reward function of TRL's trainers.

    It scores prompt and completion as token ids, in the form of the pairs that a reward model is
    fitted on (`feedback.pair_ids`): the prompt, then the sampled ids. If the completion ended, by
    whichever token, the template's end of a turn stands for that token, with what follows it (a
    newline, say). TRL's own scoring of reward models drops the end token. A reward model with
    another tokenizer gets the text through its own tokenizer and template; a completion that did
    not end stays open.

    The score is read at the last token, whatever that is and whatever the tokenizers pad with; a
    classifier with a head of another kind reads the text in its own way (`reward_models`).

    Args:
        model: the classifier; it is put into eval mode.
        tokenizer: the reward model's tokenizer.
        policy_tokenizer: the policy's tokenizer; None if it is the same.
        style: how dialogues are written.
        batch_size: largest number of rows in a forward pass.
        name: its name in metrics and errors.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        policy_tokenizer: PreTrainedTokenizerBase | None = None,
        style: Style = AUTO,
        batch_size: int = 64,
        name: str = "reward_model",
    ) -> None:
        if model.config.num_labels != 1:
            raise InputError(
                f"{name}: a reward model has one output, but this one has "
                f"{model.config.num_labels} labels; train it with num_labels=1"
            )
        self.model = model.eval()
        self._classifier = model  # DeepSpeed puts an engine around `self.model`
        self.tokenizer = tokenizer
        self.policy_tokenizer = policy_tokenizer or tokenizer
        self.style = style
        # The trainer adds the end tokens of the policy's generation settings.
        ends = turn_end(self.policy_tokenizer, style).ids[-1:]
        self.end_ids = {self.policy_tokenizer.eos_token_id, *ends}
        self.batch_size = batch_size
        self.__name__ = name
        self._num_weights = model.num_parameters(exclude_embeddings=True)
        self.shares_tokenizer = self.policy_tokenizer is tokenizer or (
            self.policy_tokenizer.get_vocab() == tokenizer.get_vocab()
            and self.policy_tokenizer.chat_template == tokenizer.chat_template
        )

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Any],
        completion_ids: Sequence[list[int]],
        **unused: Any,
    ) -> list[float]:
        """Return the score of each row, in the given order."""
        read = self.token_ids(prompts, completion_ids)
        rows = without_unread_end(self._classifier, self.tokenizer, read)
        self._check_lengths(rows)
        return score_rows(self.model, rows, self._rows_per_pass(rows), sparse=True)

    def token_ids(
        self, prompts: Sequence[Prompt], completion_ids: Sequence[list[int]]
    ) -> list[list[int]]:
        """Return the token ids that the reward model reads, one list per row."""
        end, policy_end = (
            turn_end(tokenizer, self.style) for tokenizer in (self.tokenizer, self.policy_tokenizer)
        )
        rows = []
        for prompt, ids in zip(prompts, completion_ids, strict=True):
            ended = bool(ids) and ids[-1] in self.end_ids
            row = self._read(prompt, _without_end(ids, policy_end) if ended else ids, end)
            if ended:  # a text has no turns, which a template could end
                closing = end_of_text_id(self.tokenizer)
                text_end = [] if closing is None else [closing]
                row += text_end if isinstance(prompt, str) else [*end.ids, *end.rest]
            rows.append(row)
        return rows

    def _read(self, prompt: Prompt, written: list[int], end: TurnEnd) -> list[int]:
        """Return the ids of a prompt and of the ids that the policy wrote after it."""
        ids = policy_prompt_ids(self.tokenizer, prompt, self.style)
        if self.shares_tokenizer:
            return [*ids, *written]
        policy = self.policy_tokenizer
        if isinstance(prompt, str):
            text = _written_text(policy, policy_prompt_ids(policy, prompt, self.style), written)
            return [*ids, *continued_ids(self.tokenizer, prompt, text)]
        answer = written_answer(policy, prompt, written, self.style)
        prompt_ids, ids = answer_ids(self.tokenizer, open_turns(prompt), answer, self.style, end)
        return [*prompt_ids, *ids]

    def longest_row(self) -> int | None:
        """Return the number of tokens that the reward model can read, None if unbounded."""
        return longest_row(self._classifier, self.tokenizer)

    def _check_lengths(self, rows: Sequence[Sequence[int]]) -> None:
        longest = max(map(len, rows))
        context = self.longest_row()
        if context is not None and longest > context:
            raise InputError(
                f"{self.__name__}: a prompt with its completion has {longest} tokens, but the "
                f"reward model reads {context}; shorten the prompts or max_completion_length"
            )

    def _rows_per_pass(self, rows: Sequence[Sequence[int]]) -> int:
        if self.model.device.type != "cpu" or torch.distributed.is_initialized():
            return self.batch_size  # under ZeRO-3 every rank must run the same number of passes
        tokens_per_row = sum(map(len, rows)) / len(rows)
        return min(self.batch_size, rows_per_pass(self._num_weights, tokens_per_row))


class RatersRule:
    """The simulated raters' utility of completions, as a reward function of TRL's trainers."""

    __name__ = "raters"

    def __init__(
        self,
        prompts: Sequence[RatedPrompt[Any]],
        raters: Raters,
        tokenizer: PreTrainedTokenizerBase,
        style: Style = AUTO,
    ) -> None:
        self.raters, self.tokenizer, self.style = raters, tokenizer, style
        self.end = turn_end(tokenizer, style)
        self.end_ids = {tokenizer.eos_token_id, *self.end.ids[-1:]}
        self._rated = {_key(prompt.messages): prompt for prompt in prompts}

    def __call__(
        self, prompts: Sequence[Prompt], completion_ids: Sequence[list[int]], **unused: Any
    ) -> list[float]:
        """Return the utility of each row, in the given order."""
        return [
            self._utility(prompt, list(ids))
            for prompt, ids in zip(prompts, completion_ids, strict=True)
        ]

    def _utility(self, prompt: Prompt, ids: list[int]) -> float:
        assert not isinstance(prompt, str)
        ended = bool(ids) and ids[-1] in self.end_ids
        written = _without_end(ids, self.end) if ended else ids
        text = written_answer(self.tokenizer, prompt, written, self.style).strip()
        return self._rated[_key(prompt)].utility_of_text(text, self.raters, ended=ended)


def _key(messages: Sequence[dict[str, str]]) -> tuple[tuple[str, str], ...]:
    return tuple((message["role"], message["content"]) for message in messages)


class WeightedSum:
    """Several reward functions as one: the sum of their values times their weights."""

    __name__ = "weighted_sum"

    def __init__(self, rewards: Sequence[Reward], weights: Sequence[float]) -> None:
        self.rewards, self.weights = list(rewards), list(weights)

    def __call__(self, *args: Any, **columns: Any) -> list[float]:
        """Return the sum of each row, in the given order."""
        values = [guarded(reward)(*args, **columns) for reward in self.rewards]
        return [
            sum(weight * value for weight, value in zip(self.weights, row, strict=True))
            for row in zip(*values, strict=True)
        ]


def written_answer(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[dict[str, str]],
    written: list[int],
    style: Style,
) -> str:
    """Return the text of the ids that a policy wrote as the answer to a dialogue.

    A channel or reasoning block that its template writes is not part of the answer.
    """
    turns, given = open_turns(prompt), policy_prompt_ids(tokenizer, prompt, style)
    lead = answer_ids(tokenizer, turns, "", style, turn_end(tokenizer, style))[1]
    num_lead = len(lead) if written[: len(lead)] == lead else 0
    text = _written_text(tokenizer, given + written[:num_lead], written[num_lead:])
    return text if turns[-1].text else text.lstrip()


def _without_end(ids: list[int], end: TurnEnd) -> list[int]:
    """Return a completion without its end: all that the template writes, or the end token alone."""
    has_all = bool(end.ids) and ids[-len(end.ids) :] == end.ids
    return ids[: -len(end.ids) if has_all else -1]


def _written_text(tokenizer: PreTrainedTokenizerBase, given: list[int], ids: list[int]) -> str:
    """Return the text of `ids` after those given: a decoder drops the space of a first word."""
    keep = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    before = tokenizer.decode(given, **keep)
    return tokenizer.decode(given + ids, **keep).removeprefix(before)


def guarded(reward: Reward) -> Reward:
    """Wrap a reward function so that it returns one finite number for each completion.

    The wrapped function raises RunFailure that names the reward and the first bad row.
    """
    name = getattr(reward, "__name__", type(reward).__name__)

    if inspect.iscoroutinefunction(reward):

        async def checked_async(prompts: Sequence[Prompt], **columns: Any) -> list[float]:
            return _checked(name, await reward(prompts=prompts, **columns), len(prompts))

        checked_async.__name__ = name
        return checked_async

    def checked(prompts: Sequence[Prompt], **columns: Any) -> list[float]:
        return _checked(name, reward(prompts=prompts, **columns), len(prompts))

    checked.__name__ = name
    return checked


def _checked(name: str, returned: Any, num_completions: int) -> list[float]:
    try:
        rewards = list(returned)
    except TypeError:
        raise RunFailure(
            f"reward {name!r} returned {type(returned).__name__}, not a list of numbers; return "
            "one number per completion"
        ) from None
    if len(rewards) != num_completions:
        raise RunFailure(
            f"reward {name!r} returned {len(rewards)} rewards for {num_completions} completions; "
            "return one number per completion"
        )
    for row, reward in enumerate(rewards):
        if reward is None or not math.isfinite(reward):
            raise RunFailure(
                f"reward {name!r} returned {reward} for completion {row} of {num_completions}; "
                "return a finite number for every completion"
            )
    return [float(reward) for reward in rewards]
