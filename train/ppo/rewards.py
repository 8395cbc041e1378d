"""Rewards: loading and scoring of reward models, and a check around every reward function."""

import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForSequenceClassification
from safetensors import SafetensorError
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from selfcorrect.evaluate.scoring.load_model import ADAPTER, refuse_pickles
from selfcorrect.recipes.foundation.errors import InputError, RunFailure, first_line
from selfcorrect.train.ppo.limits import rows_per_pass
from selfcorrect.train.ppo.sparse_modules import only_positions

Prompt = str | list[dict[str, str]]
Reward = Callable[..., Any]


def load_reward_model(
    path: str | Path, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a sequence classifier with one output; an adapter is merged into its base.

    Raises InputError if there is no such model, or if it has no trained score head.
    """
    options = {
        "num_labels": 1, "dtype": dtype, "use_safetensors": True,
        "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    try:
        with refuse_pickles(path):
            if (Path(path) / ADAPTER).is_file():
                adapted = AutoPeftModelForSequenceClassification.from_pretrained(
                    str(path), **options
                )
                return adapted.merge_and_unload()
            model, report = AutoModelForSequenceClassification.from_pretrained(
                path, output_loading_info=True, **options
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"{path}: not a reward model ({first_line(error)}); give the folder of a sequence "
            "classifier"
        ) from None
    if report["missing_keys"]:
        raise InputError(
            f"{path}: not a reward model: {sorted(report['missing_keys'])[0]} is missing; train "
            "one with num_labels=1"
        )
    return model


class RewardModelScorer:
    """A sequence classifier with one output, as a reward function of TRL's trainers.

    It scores prompt and completion as token ids: the prompt as the policy saw it, then the sampled
    ids. If the completion ended, these include the end token and are followed by what the chat
    template puts after it (a newline, say), as in the conversations the model was trained on. TRL's
    own scoring of reward models drops the end token. A reward model with another tokenizer gets the
    text through its own tokenizer and template; a completion that did not end stays open.

    The score is read at the last token, whatever the tokenizers pad with. Only a model whose own
    `pad_token_id` is its end token is read before the end, as in its training.

    Args:
        model: the classifier; it is put into eval mode.
        tokenizer: the reward model's tokenizer.
        policy_tokenizer: the policy's tokenizer; None if it is the same.
        chat_template_kwargs: as in the trainer's settings.
        batch_size: largest number of rows in a forward pass.
        name: its name in metrics and errors.
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
                f"{name}: a reward model has one output, but this one has "
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
        self._trained_padding = self._config.pad_token_id
        self.shares_tokenizer = (
            self.policy_tokenizer is tokenizer
            or self.policy_tokenizer.get_vocab() == tokenizer.get_vocab()
        )

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Any],
        completion_ids: Sequence[list[int]],
        **unused: Any,
    ) -> list[float]:
        """Return the score of each row, in the given order."""
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
        """Return the token ids that the reward model reads, one list per row."""
        tokenizer = self.policy_tokenizer if self.shares_tokenizer else self.tokenizer
        completions = completion_ids
        if not self.shares_tokenizer:
            completions = [self._retokenized(ids) for ids in completion_ids]
        suffix = self._template_suffix(tokenizer) if isinstance(prompts[0], list) else []
        end = tokenizer.eos_token_id
        return [
            [*prompt, *ids, *(suffix if ids and ids[-1] == end else [])]
            for prompt, ids in zip(
                prompt_ids(prompts, tokenizer, self.chat_template_kwargs), completions, strict=True
            )
        ]

    def _retokenized(self, ids: list[int]) -> list[int]:
        """Return sampled ids of the policy's tokenizer as ids of the reward model's tokenizer."""
        text = self.policy_tokenizer.decode(ids, skip_special_tokens=True)
        retokenized = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        ended = len(ids) > 0 and ids[-1] == self.policy_tokenizer.eos_token_id
        return [*retokenized, self.tokenizer.eos_token_id] if ended else retokenized

    @staticmethod
    def _template_suffix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Return the ids that the chat template puts after the end token of an answer."""
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
        ends = [i for i, token in enumerate(ids) if token == tokenizer.eos_token_id]
        return ids[ends[-1] + 1 :] if ends else []

    def _rows_per_pass(self, rows: list[list[int]]) -> int:
        # At most vocab_size - 1, so that an id is left to pad with.
        most = min(self.batch_size, self._config.vocab_size - 1)
        if self.model.device.type != "cpu" or torch.distributed.is_initialized():
            return most  # under ZeRO-3 every rank must run the same number of passes
        tokens_per_row = sum(map(len, rows)) / len(rows)
        return min(most, rows_per_pass(self._num_weights, tokens_per_row))

    @torch.no_grad()
    def _score(self, rows: list[list[int]]) -> list[float]:
        longest = max(len(row) for row in rows)
        padding = self._padding_id({row[-1] for row in rows})
        device = self.model.device
        ids = torch.tensor([row + [padding] * (longest - len(row)) for row in rows], device=device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        mask = (torch.arange(longest, device=device) < lengths[:, None]).long()
        real = torch.nonzero(mask.flatten()).squeeze(1)
        with only_positions(self._scored_positions(ids), self.model.base_model, attended=real):
            return self.model(input_ids=ids, attention_mask=mask).logits[:, 0].float().tolist()

    def _scored_positions(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the flat position (rows,) at which transformers' classifiers read each score."""
        columns = torch.arange(ids.size(1), device=ids.device)
        last = (columns * (ids != self._config.pad_token_id)).amax(dim=1)
        return torch.arange(len(ids), device=ids.device) * ids.size(1) + last

    def _padding_id(self, last_tokens: set[int]) -> int:
        """Return the id to pad with: the model's own, or one that ends no row.

        transformers' classifiers read the score at the last token that is not `pad_token_id`,
        whatever the mask says.
        """
        if self._trained_padding is not None:
            return self._trained_padding
        unused = (i for i in range(self._config.vocab_size) if i not in last_tokens)
        self._config.pad_token_id = next(unused)
        return self._config.pad_token_id


def prompt_ids(
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: dict[str, Any],
) -> list[list[int]]:
    """Return the token ids of plain or conversational prompts, as TRL gives them to the policy."""
    if isinstance(prompts[0], str):
        return tokenizer(text=list(prompts))["input_ids"]
    return tokenizer.apply_chat_template(
        list(prompts),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        **chat_template_kwargs,
    )["input_ids"]


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
