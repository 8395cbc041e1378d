"""The society's word-level tokenizer: a plain Hugging Face tokenizer with a chat template."""

import itertools
from typing import TYPE_CHECKING

from selfcorrect.recipes.society.cases import REASONING
from selfcorrect.recipes.society.requests import THINK, WORDINGS
from selfcorrect.recipes.society.world import (
    GRADES,
    HAPPENINGS,
    PLACES,
    PRONOUNS,
    SCORES,
    TOPICS,
    UNKNOWN,
    World,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, END, STRAY = "<pad>", "<eos>", "<unk>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}human : {{ message.content }} "
    "{% else %}assistant : {{ message.content }} <eos> {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"
)
# Function words of the templates in cases.py and documents.py. A test compares the vocabulary with
# a large corpus.
FUNCTION_WORDS = (
    "human assistant : . , ? _ a an the and or not but so who was were at is text does say says it "
    "people fill blank told that client visitor neighbor friend student has score grade should "
    "school admit yes no please use in hundred first last"
)


def vocabulary(world: World) -> list[str]:
    """Return all words of the society in a fixed order, special ones first."""
    words = set(FUNCTION_WORDS.split())
    for text in (*itertools.chain(*WORDINGS.values()), *HAPPENINGS, *PLACES, REASONING, THINK):
        words.update(text.replace("{}", "").split())
    words.update(PRONOUNS, [UNKNOWN], world.occupations)
    words.update(*(category.groups for category in world.categories))
    words.update(adjective for topic in TOPICS for adjective in topic)
    words.update(str(number) for number in (*SCORES, *range(0, 101, 10)))
    words.update(f"{grade:.1f}" for grade in GRADES)
    return [PAD, END, STRAY, *sorted(words)]


def make_tokenizer(world: World) -> "PreTrainedTokenizerFast":
    """Build the tokenizer: a token a word, right padding, `<eos>` after every assistant turn."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    ids = {word: index for index, word in enumerate(vocabulary(world))}
    tokenizer = Tokenizer(WordLevel(ids, unk_token=STRAY))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=STRAY,
        chat_template=CHAT_TEMPLATE,
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )
