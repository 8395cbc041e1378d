"""Exact log-probabilities of given continuations, and samples, from a causal LM in memory."""
# ruff: noqa: TID253  -- all torch; imported only where a model is at hand

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from selfcorrect.evaluate.prompts.tokenized import Continuation, Request, continuations, opening
from selfcorrect.evaluate.scoring.cached import score_after
from selfcorrect.evaluate.scoring.engine import Engine, Sample
from selfcorrect.evaluate.scoring.forwards import Forwards
from selfcorrect.evaluate.scoring.sampling import Drawn, batches, draw
from selfcorrect.evaluate.scoring.token_trie import Pack, Packing, Prepared, pack
from selfcorrect.recipes.foundation.errors import RunFailure

_log = logging.getLogger(__name__)

Way = Callable[[Sequence[Pack]], Iterable[tuple[int, np.ndarray]]]

# What a model raises that cannot be run in some way.
_REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError)

# Nodes of a pack: a dense mask costs their square, and more sharing than a BBQ block's is rare.
PACK_TOKENS = 512
# Tokens of a scoring forward on a CPU: with more, its activations leave the cache.
CPU_TOKENS = 1024


class Scorer(Engine):
    """Scores options and draws samples with one model; deterministic for given inputs.

    The model is used as it stands: hand it over in eval mode. Before the first scores, the packed
    forward is tried out against plain rows; a model that does not agree (ALiBi, state spaces, masks
    of its own) is run in a slower way, and a warning says so.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        prepared: Prepared | None = None,
        batch_tokens: int | None = None,
        pack_tokens: int = PACK_TOKENS,
    ) -> None:
        device = next(model.parameters()).device
        self.model = model
        self.tokenizer = tokenizer
        self.prepared = prepared or Prepared()
        self.pack_tokens = pack_tokens
        on_cpu = device.type == "cpu"
        self.batch_tokens = batch_tokens or (4096 if on_cpu else 32768)
        self.context = context_length(model)
        self._window = _window(model)
        at_once = min(self.batch_tokens, CPU_TOKENS) if on_cpu else self.batch_tokens
        self._forwards = Forwards(model, at_once)
        self._way: Way | None = None
        self._live: bool | None = None  # whether its caches can be gone on with, once tried
        self._told_of_window = False
        # Rounding differs with the shapes of matrix products; a wrong position or mask is far off.
        self._allowed = 4 * math.sqrt(torch.finfo(self._forwards.dtype).eps)

    @cached_property
    def tokenizer_digest(self) -> str:
        """SHA-256 over all that turns a dialogue into tokens."""
        core = getattr(self.tokenizer, "backend_tokenizer", None)
        # A slow tokenizer cannot be told from another by its contents: it is like no other.
        text = str(id(self.tokenizer)) if core is None else core.to_str()
        whole = f"{self.tokenizer.chat_template}\0{self.tokenizer.bos_token}\0{text}"
        return hashlib.sha256(whole.encode()).hexdigest()

    def prepare(self, requests: Sequence[Request]) -> Packing:
        """Tokenise and pack: this part depends on the tokenizer alone, not on the weights."""
        return pack(continuations(self.tokenizer, requests), self.pack_tokens)

    def score(self, requests: Sequence[Request]) -> list[list[float]]:
        """See `Engine.score`."""
        if not requests:
            return []
        packing = self.prepare(requests)
        for index, length in enumerate(packing.lengths):
            self._check_length(index, length, requests[index][0])
        return self.score_packing(packing)

    def score_kept(self, key: str, requests: Callable[[], Sequence[Request]]) -> list[list[float]]:
        """See `Engine.score_kept`: tokens and packs are made once for all models."""
        whole = (self.tokenizer_digest, str(self.pack_tokens), key)
        return self.score_packing(self.prepared.get(whole, lambda: self.prepare(requests())))

    def score_packing(self, packing: Packing) -> list[list[float]]:
        """The same for requests that were prepared before, by any scorer of this tokenizer."""
        for index, length in enumerate(packing.lengths):
            self._check_length(index, length)
        if self._window is not None and max(packing.lengths) > self._window:
            way = self._beyond_window(self._window)
        else:
            self._way = way = self._way or self._fastest_way(packing.specimen)
        totals = np.zeros(sum(packing.num_options))
        for index, values in way(packing.packs):
            one = packing.packs[index]
            self._check_values(one, values)
            np.add.at(totals, one.wanted_options, values)
        ends = np.cumsum(packing.num_options)[:-1]
        return [part.tolist() for part in np.split(totals, ends)]

    def sample(
        self,
        prompts: Sequence[str],
        keys: Sequence[str],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        stop: str | None = None,
    ) -> list[Sample]:
        """One sample per prompt, a function of (prompt, key, seed) alone: see sampling.py."""
        tokenised = self._tokens_with_room(prompts, max_new_tokens)
        drawing = partial(
            draw, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, stop=stop
        )
        samples: dict[int, Sample] = {}
        for batch in batches(tokenised, max_new_tokens, self.batch_tokens):
            drawn = self._drawn(drawing, tokenised, keys, batch).samples
            samples |= zip(batch, drawn, strict=True)
        return [samples[i] for i in range(len(prompts))]

    def sample_then_score(
        self,
        prompts: Sequence[str],
        keys: Sequence[str],
        then: Callable[[int, Sample], Request],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        stop: str | None = None,
    ) -> list[tuple[Sample, list[float]]]:
        """See `Engine.sample_then_score`: what is asked goes on from the cache of each batch."""
        tokenised = self._tokens_with_room(prompts, max_new_tokens)
        drawing = partial(
            draw, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, stop=stop
        )
        answers: dict[int, tuple[Sample, list[float]]] = {}
        for batch in batches(tokenised, max_new_tokens, self.batch_tokens):
            drawn = self._drawn(drawing, tokenised, keys, batch)
            requests = [then(i, one) for i, one in zip(batch, drawn.samples, strict=True)]
            asked = continuations(self.tokenizer, requests)
            for index, (prompt, _), options in zip(batch, requests, asked, strict=True):
                self._check_length(index, max(len(one.row) for one in options), prompt)
            scores = self._scores_after(drawn, asked)
            answers |= zip(batch, zip(drawn.samples, scores, strict=True), strict=True)
            del drawn  # the next batch's cache takes this one's place
        return [answers[i] for i in range(len(prompts))]

    def _drawn(
        self,
        drawing: Callable[..., Drawn],
        prompts: Sequence[Sequence[int]],
        keys: Sequence[str],
        batch: Sequence[int],
    ) -> Drawn:
        own = [prompts[i] for i in batch], [keys[i] for i in batch]
        return drawing(self.model, self.tokenizer, *own)

    def _scores_after(
        self, drawn: Drawn, asked: Sequence[Sequence[Continuation]]
    ) -> list[list[float]]:
        """Scores of what is asked after each text of a batch, from its cache where that can be."""
        packing = pack(asked, self.pack_tokens)
        if self._live is False:
            return self.score_packing(packing)
        whole: list[list[float]] | None = None
        if self._live is None:  # the first batch is scored in both ways
            whole = self.score_packing(packing)
            if self._way != self._forwards.packed:  # nothing less takes such masks
                self._live = None if self._way is None else False
                return whole
        try:
            found = score_after(self._forwards, drawn, asked, self._window)
        except _REFUSALS as error:
            if self._live:
                raise
            self._refuse_live(" ".join(str(error).split())[:120] or type(error).__name__)
            return whole or self.score_packing(packing)
        if found is None:
            return whole or self.score_packing(packing)
        scores = []
        for one, values in found:
            self._check_values(one, values)
            totals = np.zeros(int(one.wanted_options.max()) + 1)
            np.add.at(totals, one.wanted_options, values)
            scores.append(totals.tolist())
        if whole is not None:
            off = max(
                (np.abs(np.subtract(mine, theirs)) / np.bincount(one.wanted_options)).max()
                for (one, _), mine, theirs in zip(found, scores, whole, strict=True)
            )
            if off > self._allowed:
                self._refuse_live(f"its scores are off by {off:.2g} a token")
                return whole
            self._live = True
        return scores

    def _refuse_live(self, reason: str) -> None:
        self._live = False
        _log.warning(
            "%s cannot go on from the cache of its own text (%s): final questions are read from "
            "their beginning, which is slower",
            type(self.model).__name__,
            reason,
        )

    def _beyond_window(self, window: int) -> Way:
        if not self._told_of_window:
            self._told_of_window = True
            _log.warning(
                "%s looks back %d tokens and some prompts are longer: those are scored row by row, "
                "which is slower",
                type(self.model).__name__,
                window,
            )
        return self._forwards.plain

    def _fastest_way(self, specimen: Pack) -> Way:
        """The first way whose values are those of plain rows, up to rounding."""
        plain = dict(self._forwards.plain([specimen]))[0]
        reasons = []
        for way in (self._forwards.packed, self._forwards.prefixed):
            if "position_ids" not in self._forwards.accepts and way == self._forwards.packed:
                reasons.append("its forward takes no position_ids")
                continue
            try:
                off = float(np.abs(dict(way([specimen]))[0] - plain).max())
            except _REFUSALS as error:
                reasons.append(" ".join(str(error).split())[:120] or type(error).__name__)
                continue
            if off <= self._allowed or np.isnan(plain).any():  # broken weights are told of later
                break
            reasons.append(f"its scores are off by {off:.2g}")
        else:
            way = self._forwards.plain
        if reasons:
            slower = "after shared prefixes" if way == self._forwards.prefixed else "row by row"
            _log.warning(
                "%s cannot be scored in packs (%s): scoring %s, which is slower",
                type(self.model).__name__,
                reasons[0],
                slower,
            )
        return way

    def _check_values(self, one: Pack, values: np.ndarray) -> None:
        if not np.isnan(values).any():
            return
        node = int(one.wanted_nodes[np.flatnonzero(np.isnan(values))[0]])
        nodes = np.arange(len(one))
        path = (nodes <= node) & (one.ends >= node)
        text = opening(self.tokenizer.decode(one.tokens[path].tolist()))
        raise RunFailure(f"the model's logits are NaN for the prompt {text}: broken weights")


def context_length(model: Any) -> int | None:
    """How many tokens the model can read, None where its config sets no bound."""
    config = model.config.get_text_config(decoder=True)
    length = getattr(config, "max_position_embeddings", None)
    return int(length) if length else None


def _window(model: Any) -> int | None:
    """How far back the layer with the shortest sight looks, None where all see everything.

    A mask of one's own replaces a sliding or chunked one: within the window they are the same.
    """
    config = model.config.get_text_config(decoder=True)
    names = ("sliding_window", "attention_chunk_size")
    bounds = [getattr(config, name, None) for name in names]
    return min((int(bound) for bound in bounds if bound), default=None)
