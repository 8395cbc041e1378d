"""Rewards: a reward model that sees what it was trained on, and a guard around every reward."""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selfcorrect.recipes.foundation.errors import InputError, RunFailure
from selfcorrect.train.ppo.forward import token_work_at
from selfcorrect.train.ppo.limits import rows_per_pass

Prompt = str | list[dict[str, str]]
Reward = Callable[..., Any]


class RewardModelScorer:
    """A sequence classifier with one output, as a reward function of TRL's trainers.

    It scores prompt and completion as token ids: the prompt as the policy saw it, then the sampled
    ids with the end token where the completion ended, and behind it whatever the chat template puts
    there (a newline, say), as in the conversations the model was trained on. TRL's own scoring of
    reward models drops the end token. A reward model with another tokenizer gets the text again
    through its own tokenizer and template; a completion that did not end is then left open.

    The last token is the one scored, whatever the tokenizers pad with. Only a model whose own
    `pad_token_id` is its end token is scored before the end, as it was when it was trained.

    Args:
        model: the classifier; put into evaluation mode here.
        tokenizer: the reward model's tokenizer.
        policy_tokenizer: the policy's; None where it is the same one.
        chat_template_kwargs: as in the trainer's settings.
        batch_size: most rows of a forward pass.
        name: what metrics and errors call it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        policy_tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        batch_size: int = 64,
        name: str = "reward_model",
    ) -> None:
        if model.config.num_labels != 1:
            raise InputError(
                f"{name}: a reward model has one output, this one has "
                f"{model.config.num_labels} labels; train it with num_labels=1"
            )
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.policy_tokenizer = policy_tokenizer or tokenizer
        self.chat_template_kwargs = chat_template_kwargs or {}
        self.batch_size = batch_size
        self.__name__ = name
        self._num_weights = model.num_parameters(exclude_embeddings=True)
        self._config = model.config.get_text_config()  # DeepSpeed's wrapper has another config
        self._own_padding = self._config.pad_token_id
        same = self.policy_tokenizer is tokenizer
        self.shares_tokenizer = same or self.policy_tokenizer.get_vocab() == tokenizer.get_vocab()

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Any],
        completion_ids: Sequence[list[int]],
        **unused: Any,
    ) -> list[float]:
        """Scores of the rows, in the order given."""
        rows = self.token_ids(prompts, completion_ids)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        scores = [0.0] * len(rows)
        size = self._rows_per_pass(rows)
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            for i, score in zip(batch, self._score([rows[i] for i in batch]), strict=True):
                scores[i] = score
        return scores

    def token_ids(
        self, prompts: Sequence[Prompt], completion_ids: Sequence[list[int]]
    ) -> list[list[int]]:
        """What the reward model reads, one list a row."""
        if self.shares_tokenizer:
            tokenizer = self.policy_tokenizer
            heads = prompt_ids(prompts, tokenizer, self.chat_template_kwargs)
            tails = completion_ids
        else:
            tokenizer = self.tokenizer
            heads = prompt_ids(prompts, tokenizer, self.chat_template_kwargs)
            tails = [self._again(ids) for ids in completion_ids]
        closing = self._closing(tokenizer) if isinstance(prompts[0], list) else []
        end = tokenizer.eos_token_id
        return [
            [*head, *tail, *(closing if tail and tail[-1] == end else [])]
            for head, tail in zip(heads, tails, strict=True)
        ]

    def _again(self, ids: list[int]) -> list[int]:
        """Sampled ids of the policy's tokenizer as ids of the reward model's."""
        text = self.policy_tokenizer.decode(ids, skip_special_tokens=True)
        again = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        ended = len(ids) > 0 and ids[-1] == self.policy_tokenizer.eos_token_id
        return [*again, self.tokenizer.eos_token_id] if ended else again

    @staticmethod
    def _closing(tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Ids that the chat template puts behind the end token of an answer."""
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
        ends = [i for i, token in enumerate(ids) if token == tokenizer.eos_token_id]
        return ids[ends[-1] + 1 :] if ends else []

    def _rows_per_pass(self, rows: list[list[int]]) -> int:
        # Fewer than there are ids, so that one is left to pad with.
        most = min(self.batch_size, self._config.vocab_size - 1)
        alone = not torch.distributed.is_initialized()  # others must make as many passes (ZeRO-3)
        if self.model.device.type == "cpu" and alone:
            tokens_a_row = sum(map(len, rows)) / len(rows)
            return min(most, rows_per_pass(self._num_weights, tokens_a_row))
        return most

    @torch.no_grad()
    def _score(self, rows: list[list[int]]) -> list[float]:
        width = max(len(row) for row in rows)
        fill = self._padding({row[-1] for row in rows})
        device = self.model.device
        ids = torch.tensor([row + [fill] * (width - len(row)) for row in rows], device=device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        mask = (torch.arange(width, device=device) < lengths[:, None]).long()
        real = torch.nonzero(mask.flatten()).squeeze(1)
        with token_work_at(self._scored_places(ids), self.model.base_model, before=real):
            return self.model(input_ids=ids, attention_mask=mask).logits[:, 0].float().tolist()

    def _scored_places(self, ids: torch.Tensor) -> torch.Tensor:
        """Where in the flattened rows transformers' classifiers read the score, one place a row."""
        columns = torch.arange(ids.size(1), device=ids.device)
        last = (columns * (ids != self._config.pad_token_id)).amax(dim=1)
        return torch.arange(len(ids), device=ids.device) * ids.size(1) + last

    def _padding(self, last_tokens: set[int]) -> int:
        """The id to pad with: the model's own, or one that ends no row.

        transformers' classifiers score the last token that is not `pad_token_id`, mask or no mask.
        """
        if self._own_padding is not None:
            return self._own_padding
        unused = (i for i in range(self._config.vocab_size) if i not in last_tokens)
        self._config.pad_token_id = next(unused)
        return self._config.pad_token_id


def prompt_ids(
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: dict[str, Any],
) -> list[list[int]]:
    """Token ids of plain or conversational prompts, as TRL gives them to the policy."""
    if isinstance(prompts[0], str):
        return tokenizer(text=list(prompts))["input_ids"]
    return tokenizer.apply_chat_template(
        list(prompts),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        **chat_template_kwargs,
    )["input_ids"]


def reward_name(reward: Reward) -> str:
    """What metrics and errors call a reward function."""
    return getattr(reward, "__name__", type(reward).__name__)


def guarded(reward: Reward) -> Reward:
    """The reward function, its answer checked: one finite number for every completion.

    The wrapped function raises RunFailure, naming the reward and the first bad row.
    """
    name = reward_name(reward)

    if inspect.iscoroutinefunction(reward):

        async def checked_later(prompts: Sequence[Prompt], **columns: Any) -> list[float]:
            return _checked(name, await reward(prompts=prompts, **columns), len(prompts))

        checked_later.__name__ = name
        return checked_later

    def checked(prompts: Sequence[Prompt], **columns: Any) -> list[float]:
        return _checked(name, reward(prompts=prompts, **columns), len(prompts))

    checked.__name__ = name
    return checked


def _checked(name: str, answer: Any, wanted: int) -> list[float]:
    try:
        rewards = list(answer)
    except TypeError:
        raise RunFailure(
            f"reward {name!r} returned {type(answer).__name__}, not a list of "
            "numbers; return one number for each completion"
        ) from None
    if len(rewards) != wanted:
        raise RunFailure(
            f"reward {name!r} returned {len(rewards)} rewards for {wanted} "
            "completions; return one number for each completion"
        )
    for row, reward in enumerate(rewards):
        if reward is None or not math.isfinite(reward):
            raise RunFailure(
                f"reward {name!r} returned {reward} for completion {row} of {wanted}; "
                "every completion needs a finite number"
            )
    return [float(reward) for reward in rewards]
