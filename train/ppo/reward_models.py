"""Reward models: a causal language model's trunk with a linear score head, for every family.

transformers has such classifiers for some families only, and they look for the end of a text by
its padding token. The classifier of this file is made from the family's causal model and reads its
score at the last token of the attention mask. Its weights have the names that transformers gives
them (`score.weight` beside the trunk), so both read each other's files.
"""

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.modeling_utils import set_zero3_state
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIER_NAMES,
)

from selfcorrect.evaluate.scoring.load_model import (
    ADAPTER,
    base_of,
    check_no_pickles,
    load_adapter,
    refuse_pickles,
)
from selfcorrect.evaluate.scoring.packed import context_length
from selfcorrect.evaluate.scoring.precision import loading_options
from selfcorrect.recipes.foundation.errors import InputError, is_from_outside, reason_of
from selfcorrect.recipes.foundation.ranks import best_device
from selfcorrect.train.ppo.sparse_modules import only_positions


class ScoredTrunk(PreTrainedModel):
    """A causal language model with a linear head that scores a text, in place of its LM head.

    `_scored` combines it with the class of a family's causal model, so it loads what that loads.
    """

    _tied_weights_keys = None  # the head that shared the embeddings is gone
    _keep_in_fp32_modules_strict: ClassVar = ["score"]  # 8 bits would tie most pairs of texts

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        lm_head = super().get_output_embeddings()
        if self.base_model is self:  # some families name their trunk differently
            trunks = (n for n, child in self.named_children() if isinstance(child, PreTrainedModel))
            self.base_model_prefix = next(trunks)
        heads = [name for name, child in self.named_children() if child is not self.base_model]
        # Where more lies between the trunk and its LM head, that head's input is another state.
        is_direct = [self.get_submodule(name) for name in heads] == [lm_head]
        hidden_size = config.get_text_config().hidden_size
        size = lm_head.in_features if is_direct else hidden_size
        for name in heads:
            delattr(self, name)
        self.num_labels = config.num_labels
        self.score = nn.Linear(size, config.num_labels, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if module is not self:  # some families initialise their LM head here
            super()._init_weights(module)

    def get_output_embeddings(self) -> None:
        """Return None: there is no LM head."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        labels: None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Return scores (rows, num_labels), read at each row's last attended token."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        hidden = self.base_model(**{k: v for k, v in inputs.items() if v is not None})[0]
        dtype = next(self.score.parameters()).dtype  # float32, but under DeepSpeed
        with torch.autocast(hidden.device.type, enabled=False):
            scores = self.score(hidden.to(dtype))
        if attention_mask is None:
            return SequenceClassifierOutput(logits=scores[:, -1])
        rows = torch.arange(len(scores), device=scores.device)
        return SequenceClassifierOutput(logits=scores[rows, last_attended(attention_mask)])


def last_attended(mask: Tensor) -> Tensor:
    """Return the column (rows,) of each row's last attended token, wherever it is padded."""
    return (torch.arange(mask.size(1), device=mask.device) * (mask != 0)).amax(dim=1)


@functools.cache
def _scored(causal: type[PreTrainedModel], name: str) -> type[PreTrainedModel]:
    # transformers looks up what a class supports in the file of its module.
    return type(name, (ScoredTrunk, causal), {"__module__": causal.__module__})


def _scored_class(config: Any, trust_remote_code: bool) -> tuple[type[PreTrainedModel], Any] | None:
    """Return class and configuration of the reward model of a causal family, or None."""
    comes_with_code = "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    if type(config) not in AutoModelForCausalLM._model_mapping and not comes_with_code:
        return None
    with torch.device("meta"), set_zero3_state():  # ZeRO-3 would split it as it is made
        causal = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    name = type(causal).__name__
    for ending in ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"):
        name = name.removesuffix(ending)
    known = CLASSIFIER_NAMES.get(causal.config.model_type)
    name = known or f"{name}ForSequenceClassification"
    return _scored(type(causal), name), causal.config  # type: ignore[arg-type]  # of the cache


def check_family(config: Any) -> None:
    """Raise InputError if no reward model can be made of a causal model with this configuration."""
    try:
        found = _scored_class(config, trust_remote_code=False)
        if found is not None:
            kind, text_config = found
            with torch.device("meta"):
                kind(text_config)
    except Exception as error:  # models raise errors of many kinds
        if is_from_outside(error):
            raise
        raise InputError(
            f"no reward model can be made of the type {config.model_type} ({reason_of(error)})"
        ) from None
    if found is None:
        raise InputError(f"no causal language model of the type {config.model_type} is known")


def new_reward_model(
    base: str | Path, trust_remote_code: bool = False, dtype: str = "float32"
) -> PreTrainedModel:
    """Return a reward model: the trunk of the causal model `base` in `dtype`, and a new head.

    Raises InputError if `base` is no causal language model of text.
    """
    with refuse_pickles(base):
        loaded = _load_scored(base, dtype, trust_remote_code)
    if loaded is None:
        raise InputError(f"{base}: a reward model is made from a causal language model")
    return loaded[0]


def load_reward_model(
    path: str | Path, dtype: str = "float32", trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a sequence classifier with one output; an adapter is merged into its base.

    Raises InputError if there is no such model, or if it has no trained score head.
    """
    adapter = Path(path) / ADAPTER
    try:
        with refuse_pickles(path):
            if adapter.is_file():
                base = base_of(adapter)
                check_no_pickles(base)
                held = "bfloat16" if dtype == "4bit" else dtype  # 4 bits would lose the adapter
                model, _ = _load(base, held, trust_remote_code)
                return load_adapter(model, str(path)).merge_and_unload()
            model, missing = _load(path, dtype, trust_remote_code)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if is_from_outside(error):
            raise
        raise InputError(
            f"{path}: not a reward model ({reason_of(error)}); give the folder of a sequence "
            "classifier"
        ) from None
    if missing:
        raise InputError(
            f"{path}: not a reward model: {missing[0]} is missing; train one with num_labels=1"
        )
    return model


Loaded = tuple[PreTrainedModel, list[str]]  # with the names of weights that the files do not have


def _load(path: str | Path, dtype: str, trust_remote_code: bool) -> Loaded:
    """Load a scored trunk, or transformers' classifier of the family if the files hold another."""
    loaded = _load_scored(path, dtype, trust_remote_code)
    if loaded is not None and "score.weight" not in loaded[1]:
        return loaded
    options = {"use_safetensors": True, "trust_remote_code": trust_remote_code}
    options |= loading_options(dtype, best_device(), ("score", "classifier"))
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=1, output_loading_info=True, **options
        )
    except ValueError:
        if loaded is None:
            raise
        return loaded  # a causal family without another classifier
    return model, sorted(report["missing_keys"])


def _load_scored(path: str | Path, dtype: str, trust_remote_code: bool) -> Loaded | None:
    """Load a folder or hub id as a scored trunk; None if it is not of a causal family."""
    trust = {"trust_remote_code": trust_remote_code}
    found = _scored_class(AutoConfig.from_pretrained(path, **trust), trust_remote_code)
    if found is None:
        return None
    kind, config = found
    config.num_labels = 1
    held = loading_options(dtype, best_device(), ("score",))
    model, report = kind.from_pretrained(
        path, config=config, use_safetensors=True, output_loading_info=True, **held, **trust
    )
    if dtype != "float32":
        # The head is held in float32, and copied: as loaded it keeps the whole file in memory, and
        # beside a trunk in 4 bits it is bfloat16.
        model.score.weight.data = model.score.weight.data.to(torch.float32, copy=True)
    return model, sorted(report["missing_keys"])


def has_linear_score(folder: Path) -> bool:
    """Return whether a saved reward model is a scored trunk, which a critic can start from.

    An encoder's classifier reads all of a text at once: it cannot value a text's beginning.
    """
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            if "score.weight" in file.keys():  # noqa: SIM118
                return True
    return False


def longest_row(model: PreTrainedModel, tokenizer: Any = None) -> int | None:
    """Return the number of tokens that a reward model can read, None if there is no bound.

    Classifiers of other kinds read less than their positions (RoBERTa), as their tokenizers say.
    """
    context = context_length(model)
    if tokenizer is None or isinstance(model, ScoredTrunk):
        return context
    return min(context or tokenizer.model_max_length, tokenizer.model_max_length)


def without_unread_end(
    model: PreTrainedModel, tokenizer: Any, rows: Sequence[Sequence[int]]
) -> list[Sequence[int]]:
    """Return rows as a given model has learned to read them.

    If other tools trained it with its end token as padding, they read the token before, and it was
    never trained at the end. The models of this project are saved with another padding.
    """
    padding = model.config.get_text_config().pad_token_id
    if not isinstance(model, ScoredTrunk) or padding != tokenizer.eos_token_id:
        return list(rows)
    ends = [
        max((i for i, token in enumerate(row, 1) if token != padding), default=1) for row in rows
    ]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


@torch.no_grad()
def score_rows(
    model: Any, rows: Sequence[Sequence[int]], rows_per_pass: int, sparse: bool = False
) -> list[float]:
    """Return the score of each row of token ids, read at its last token.

    A classifier with another head reads the text in its own way, so its rows are not padded: only
    rows of equal length share a pass. `sparse` runs token-wise modules at positions in use only.
    """
    inner = getattr(model, "module", model)  # within DeepSpeed's engine
    if isinstance(inner, PeftModel):
        inner = inner.get_base_model()
    is_padded = isinstance(inner, ScoredTrunk)
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    groups = [order]
    if not is_padded:
        groups = [list(group) for _, group in groupby(order, key=lambda row: len(rows[row]))]
        if inner.config.pad_token_id is None or torch.distributed.is_initialized():
            rows_per_pass = 1  # some take no batch; ranks must run the same number of passes
    scores = [0.0] * len(rows)
    for group in groups:
        for start in range(0, len(group), rows_per_pass):
            batch = group[start : start + rows_per_pass]
            read = _score(model, inner, [rows[row] for row in batch], sparse and is_padded)
            for row, score in zip(batch, read, strict=True):
                scores[row] = score
    return scores


def _score(model: Any, inner: Any, rows: list[Sequence[int]], sparse: bool) -> list[float]:
    longest, device = max(map(len, rows)), inner.device
    padding = max(inner.config.get_text_config().pad_token_id or 0, 0)  # attended by no token
    padded = [[*row, *[padding] * (longest - len(row))] for row in rows]
    ids = torch.tensor(padded, device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    mask = (torch.arange(longest, device=device) < lengths[:, None]).long()
    inputs = {"input_ids": ids, "attention_mask": mask}
    only_used: AbstractContextManager[None] = nullcontext()
    if sparse:
        attended = torch.nonzero(mask.flatten()).squeeze(1)
        ends = torch.arange(len(rows), device=device) * longest + lengths - 1
        only_used = only_positions(ends, inner.base_model, attended=attended, inputs=inputs)
    with only_used:
        scores: list[float] = model(**inputs).logits[:, 0].float().tolist()
    return scores
