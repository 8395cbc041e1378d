"""The tokens of PPO's and GRPO's prompts: those that evaluation conditions on."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl import GRPOTrainer

from selfcorrect.evaluate.prompts.dialogue import Style, beginning_ids
from selfcorrect.evaluate.prompts.stimuli import SAMPLE, Turn
from selfcorrect.evaluate.prompts.tokenized import prompt_ids, token_ids
from selfcorrect.train.feedback.feedback import ROLES, open_turns

Prompt = str | Sequence[dict[str, str]]


class DialoguePrompts(GRPOTrainer):
    """GRPOTrainer that samples from the ids of `policy_prompt_ids`, not from TRL's own."""

    style: Style

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        if self.tools or not all(map(_is_dialogue, prompts)):
            return super()._tokenize_prompts(prompts)
        ids = [policy_prompt_ids(self.processing_class, prompt, self.style) for prompt in prompts]
        return ids, None, {}


def policy_prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, style: Style
) -> list[int]:
    """Return the ids from which the policy samples an answer to a dialogue, or goes on with a text.

    A text begins with what the tokenizer puts before every text, and ends with its last word.
    """
    if isinstance(prompt, str):
        ids, first = token_ids(tokenizer, [prompt])[0], beginning_ids(tokenizer)
        return ids if ids[: len(first)] == first else [*first, *ids]
    *closed, last = open_turns(prompt)
    return prompt_ids(tokenizer, [*closed, Turn("assistant", last.text + SAMPLE)], style)


def _is_dialogue(prompt: Any) -> bool:
    return isinstance(prompt, str) or all(
        message["role"] in ROLES and isinstance(message["content"], str) for message in prompt
    )
