"""Tiny tokenizers and chat templates of every form, made on the spot."""

from collections.abc import Callable

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.models import BPE, Unigram, WordLevel
from transformers import PreTrainedTokenizerFast

QUESTION, ANSWER = "who was late ?", "she was ."
SPECIAL = [
    *("<pad>", "<s>", "</s>", "<unk>", "[CLS]", "[SEP]", "<|user|>", "<|assistant|>", "<|start|>"),
    *("<|channel|>", "<|message|>", "<|return|>", "<think>", "</think>", "<end_of_turn>"),
]
WORDS = (
    "who was late ? she . he the so \n \n\n Human : Assistant human assistant user final a b [ ] "
    "S E P C L 27 26 Nov 2026 2024 Jul today is <answer>"
).split(" ")


def word_level(frame: str = "$A", unregistered: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Words and punctuation marks; spaces vanish. `frame` is what every text is put into."""
    names = list(dict.fromkeys([*SPECIAL, *WORDS]))
    core = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n\n", "isolated"),
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Split(" ", "removed"),
            pre_tokenizers.Punctuation(),
        ]
    )
    tokens = [(name, i) for i, name in enumerate(names) if name in SPECIAL]
    core.post_processor = processors.TemplateProcessing(frame, None, tokens)
    return _wrapped(core, unregistered)


def pieces(model: str, scheme: str) -> PreTrainedTokenizerFast:
    """SentencePiece's pieces with a space for a mark: `scheme` is first, always, never, legacy."""
    letters = sorted({letter for word in WORDS for letter in word} | set("<|>_/"))
    words = ["▁", *(f"▁{word}" for word in WORDS if word.isalpha()), *letters]
    names = list(dict.fromkeys([*SPECIAL, *words, ":▁", "\n\n", "▁she▁"]))
    if model == "unigram":
        core = Tokenizer(
            Unigram([(name, -float(len(names) - i)) for i, name in enumerate(names)], 3)
        )
    else:
        core = Tokenizer(
            BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>", fuse_unk=False)
        )
    if scheme == "legacy":
        core.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        core.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(
            prepend_scheme=scheme, split=scheme == "first"
        )
        core.decoder = decoders.Metaspace(prepend_scheme=scheme)
    core.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return _wrapped(core)


def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE that merges over the ends of turns: colon and space, stop and line break."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(":", "Ġ"), ("Ċ", "Ċ"), (".", "Ċ"), ("Ġ", "s"), ("h", "e"), ("Ġs", "he")]
    names = [*SPECIAL, *alphabet, *(a + b for a, b in merges)]
    core = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel()
    return _wrapped(core)


def _wrapped(core: Tokenizer, unregistered: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    named = {"<pad>", "<s>", "</s>", "<unk>", *unregistered}
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=[name for name in SPECIAL if name not in named],
    )


def stripping(made: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Let special tokens take the spaces beside them, as Phi-3's do."""
    strip = {"lstrip": True, "rstrip": True, "special": True}
    made.add_special_tokens(
        {"extra_special_tokens": [AddedToken(name, **strip) for name in SPECIAL]},
        replace_extra_special_tokens=True,
    )
    return made


def lowercasing() -> PreTrainedTokenizerFast:
    """Words without capitals and accents."""
    core = word_level("<s> $A").backend_tokenizer
    core.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    return _wrapped(core)


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "words": word_level,
    "words, beginning token": lambda: word_level("<s> $A"),
    "words, beginning and end token": lambda: word_level("<s> $A </s>"),
    "words, end token": lambda: word_level("$A </s>"),
    "words, CLS and SEP": lambda: word_level("[CLS] $A [SEP]"),
    "words, CLS that no text holds": lambda: word_level("[CLS] $A [SEP]", ("[CLS]", "[SEP]")),
    "pieces, first": lambda: pieces("unigram", "first"),
    "pieces, always": lambda: pieces("unigram", "always"),
    "pieces, never": lambda: pieces("unigram", "never"),
    "pieces, legacy": lambda: pieces("bpe", "legacy"),
    "pieces, special tokens strip": lambda: stripping(pieces("unigram", "first")),
    "words, lowercase": lowercasing,
    "bytes": byte_level,
}

_TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
_OPEN = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
TEMPLATES: dict[str, str | None] = {
    "none": None,
    "zephyr": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "beginning token": "<s>" + _TURNS + _OPEN,
    "space before content": (
        "{% for m in messages %}{{ m.role }} : {{ m.content }} </s> {% endfor %}"
        "{% if add_generation_prompt %}assistant :{% endif %}"
    ),
    "reasoning in the prompt": _TURNS
    + "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}",
    "reasoning in a finished turn": (
        "{% for m in messages %}<|{{ m.role }}|>\n"
        "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n"
        "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
        "{% endif %}{% endif %}"
    ),
    "channel": (
        "{% for m in messages %}<|start|>{{ m.role }}"
        "{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>{{ m.content }}"
        "{% if loop.last and m.role == 'assistant' %}<|return|>{% else %}</s>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    ),
    "date": "today is {{ strftime_now('%d %b %Y') }}" + _TURNS + _OPEN,
    "end of turn": (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end_of_turn>\n{% endfor %}" + _OPEN
    ),
    "two ends": (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% else %}</s>{% endif %}"
    ),
    "no end": (
        "{% for m in messages %}{{ m.role }} : {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant :{% endif %}"
    ),
    "trims content": (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}</s>{% endfor %}" + _OPEN
    ),
    "refuses system turns": (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + _TURNS
        + _OPEN
    ),
}


def tokenizer_with(tokenizer: str, template: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the two tables' names."""
    made = TOKENIZERS[tokenizer]()
    made.chat_template = TEMPLATES[template]
    return made
