"""Exact log-probabilities of given continuations, and samples, from a causal LM in memory."""
# ruff: noqa: TID253  -- all torch; imported only where a model is at hand

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from selfcorrect.evaluate.prompts.tokenized import Continuation, Request, continuations, opening
from selfcorrect.evaluate.scoring.cached import score_after
from selfcorrect.evaluate.scoring.engine import Engine, Sample, Sampling
from selfcorrect.evaluate.scoring.forwards import Forwards
from selfcorrect.evaluate.scoring.limits import BATCH_TOKENS, CPU_SCORING_TOKENS, PACK_TOKENS
from selfcorrect.evaluate.scoring.sampling import SampledBatch, batches, sample_batch
from selfcorrect.evaluate.scoring.token_trie import Pack, Packing, PackingCache, pack
from selfcorrect.recipes.foundation.errors import RunFailure

logger = logging.getLogger(__name__)

Forward = Callable[[Sequence[Pack]], Iterable[tuple[int, np.ndarray]]]  # a method of `Forwards`

# What a model can raise that does not support a kind of forward.
_UNSUPPORTED = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError)


class PackedEngine(Engine):
    """Score options and draw samples with one model; deterministic for given inputs.

    The model must be in eval mode. Before the first scores, the packed forward is compared with
    plain rows. A model for which they differ (ALiBi, state spaces, masks that it builds itself) is
    run by a slower forward, with a warning.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        packings: PackingCache | None = None,
        batch_tokens: int | None = None,
        pack_tokens: int = PACK_TOKENS,
    ) -> None:
        on_cpu = next(model.parameters()).device.type == "cpu"
        self.model = model
        self.tokenizer = tokenizer
        self.packings = packings or PackingCache()
        self.pack_tokens = pack_tokens
        self.batch_tokens = batch_tokens or BATCH_TOKENS["cpu" if on_cpu else "gpu"]
        self.context = context_length(model)
        self._window = _window(model)
        forward_tokens = min(self.batch_tokens, CPU_SCORING_TOKENS) if on_cpu else self.batch_tokens
        self._forwards = Forwards(model, forward_tokens)
        self._forward: Forward | None = None  # the fastest correct one; None: not tried yet
        self._continues_cache: bool | None = None  # None: not tried yet
        self._warned_of_window = False
        # Rounding differs with the shapes of matrix products; a wrong position or mask is far off.
        self._tolerance = 4 * math.sqrt(torch.finfo(self._forwards.dtype).eps)

    @cached_property
    def tokenizer_digest(self) -> str:
        """SHA-256 over everything that turns a dialogue into tokens."""
        core = getattr(self.tokenizer, "backend_tokenizer", None)
        # A slow tokenizer's contents cannot be compared: it equals no other tokenizer.
        contents = str(id(self.tokenizer)) if core is None else core.to_str()
        text = f"{self.tokenizer.chat_template}\0{self.tokenizer.bos_token}\0{contents}"
        return hashlib.sha256(text.encode()).hexdigest()

    def prepare(self, requests: Sequence[Request]) -> Packing:
        """Tokenise and pack requests, which depends on the tokenizer but not on the weights."""
        return pack(continuations(self.tokenizer, requests), self.pack_tokens)

    def score(self, requests: Sequence[Request]) -> list[list[float]]:
        if not requests:
            return []
        packing = self.prepare(requests)
        for index, length in enumerate(packing.lengths):
            self._check_length(index, length, requests[index][0])
        return self.score_packing(packing)

    def score_kept(self, key: str, requests: Callable[[], Sequence[Request]]) -> list[list[float]]:
        """See `Engine.score_kept`: tokens and packs are made once for all models."""
        full_key = (self.tokenizer_digest, str(self.pack_tokens), key)
        return self.score_packing(self.packings.get(full_key, lambda: self.prepare(requests())))

    def score_packing(self, packing: Packing) -> list[list[float]]:
        """Score prepared requests; `packing` may come from any engine with this tokenizer."""
        for index, length in enumerate(packing.lengths):
            self._check_length(index, length)
        if self._window is not None and max(packing.lengths) > self._window:
            forward: Forward = self._forwards.plain
            if not self._warned_of_window:
                self._warned_of_window = True
                logger.warning(
                    "%s has a sliding window of %d tokens and some prompts are longer: those are "
                    "scored row by row, which is slower",
                    type(self.model).__name__,
                    self._window,
                )
        else:
            self._forward = forward = self._forward or self._fastest_forward(packing.specimen)
        totals = np.zeros(sum(packing.num_options))
        for index, values in forward(packing.packs):
            self._check_values(packing.packs[index], values)
            np.add.at(totals, packing.packs[index].wanted_options, values)
        ends = np.cumsum(packing.num_options)[:-1]
        return [part.tolist() for part in np.split(totals, ends)]

    def sample(
        self,
        prompts: Sequence[str],
        keys: Sequence[str],
        sampling: Sampling,
        stop: str | None = None,
    ) -> list[Sample]:
        """See `Engine.sample`; each sample is a function of (prompt, key, seed) alone."""
        tokenised = self.check_room(prompts, sampling.max_new_tokens)
        samples: dict[int, Sample] = {}
        for batch, sampled in self._sampled_batches(tokenised, keys, sampling, stop):
            samples |= zip(batch, sampled.samples, strict=True)
            del sampled  # frees its cache before the next batch needs the memory
        return [samples[i] for i in range(len(prompts))]

    def sample_then_score(
        self,
        prompts: Sequence[str],
        keys: Sequence[str],
        then: Callable[[int, Sample], Request],
        sampling: Sampling,
        stop: str | None = None,
    ) -> list[tuple[Sample, list[float]]]:
        """See `Engine.sample_then_score`; scoring continues from the cache of each batch."""
        tokenised = self.check_room(prompts, sampling.max_new_tokens)
        answers: dict[int, tuple[Sample, list[float]]] = {}
        for batch, sampled in self._sampled_batches(tokenised, keys, sampling, stop):
            requests = [then(i, s) for i, s in zip(batch, sampled.samples, strict=True)]
            tokenised_requests = continuations(self.tokenizer, requests)
            for index, (prompt, _), options in zip(
                batch, requests, tokenised_requests, strict=True
            ):
                self._check_length(index, max(len(option.row) for option in options), prompt)
            scores = self._scores_after(sampled, tokenised_requests)
            answers |= zip(batch, zip(sampled.samples, scores, strict=True), strict=True)
            del sampled  # frees its cache before the next batch needs the memory
        return [answers[i] for i in range(len(prompts))]

    def _sampled_batches(
        self,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[str],
        sampling: Sampling,
        stop: str | None,
    ) -> Iterator[tuple[list[int], SampledBatch]]:
        """Yield (prompt indices, their samples), and keep no reference to either."""
        for batch in batches(prompts, sampling.max_new_tokens, self.batch_tokens):
            batch_prompts, batch_keys = [prompts[i] for i in batch], [keys[i] for i in batch]
            yield (
                batch,
                sample_batch(self.model, self.tokenizer, batch_prompts, batch_keys, sampling, stop),
            )

    def _scores_after(
        self, sampled: SampledBatch, requests: Sequence[Sequence[Continuation]]
    ) -> list[list[float]]:
        """Score the request after each sample, continuing from the batch's cache if possible."""
        packing = pack(requests, self.pack_tokens)
        if self._continues_cache is False:
            return self.score_packing(packing)
        expected: list[list[float]] | None = None
        if self._continues_cache is None:  # the first batch is scored in both ways
            expected = self.score_packing(packing)
            if self._forward != self._forwards.packed:  # the other forwards mean: no such masks
                self._continues_cache = None if self._forward is None else False
                return expected
        try:
            scored = score_after(self._forwards, sampled, requests, self._window)
        except _UNSUPPORTED as error:
            if self._continues_cache:
                raise
            self._stop_continuing(_reason(error))
            scored = None
        if scored is None:
            return expected or self.score_packing(packing)
        scores = []
        for tree, values in scored:
            self._check_values(tree, values)
            totals = np.zeros(int(tree.wanted_options.max()) + 1)
            np.add.at(totals, tree.wanted_options, values)
            scores.append(totals.tolist())
        if expected is not None:
            error_per_token = max(
                (np.abs(np.subtract(row, expected_row)) / np.bincount(tree.wanted_options)).max()
                for (tree, _), row, expected_row in zip(scored, scores, expected, strict=True)
            )
            if error_per_token > self._tolerance:
                self._stop_continuing(f"its scores are off by {error_per_token:.2g} a token")
                return expected
            self._continues_cache = True
        return scores

    def _stop_continuing(self, reason: str) -> None:
        self._continues_cache = False
        logger.warning(
            "%s cannot continue from the cache of its own text (%s): final questions are scored "
            "from the start of the dialogue, which is slower",
            type(self.model).__name__,
            reason,
        )

    def _fastest_forward(self, specimen: Pack) -> Forward:
        """Return the first forward whose values equal those of plain rows, up to rounding."""
        plain = dict(self._forwards.plain([specimen]))[0]
        reasons = []
        for forward in (self._forwards.packed, self._forwards.prefixed):
            if "position_ids" not in self._forwards.accepts and forward == self._forwards.packed:
                reasons.append("its forward takes no position_ids")
                continue
            try:
                error = float(np.abs(dict(forward([specimen]))[0] - plain).max())
            except _UNSUPPORTED as refusal:
                reasons.append(_reason(refusal))
                continue
            if error <= self._tolerance or np.isnan(plain).any():  # NaN is reported later
                break
            reasons.append(f"its scores are off by {error:.2g}")
        else:
            forward = self._forwards.plain
        if reasons:
            logger.warning(
                "%s cannot be scored in packs (%s): scoring %s, which is slower",
                type(self.model).__name__,
                reasons[0],
                "with cached prefixes" if forward == self._forwards.prefixed else "row by row",
            )
        return forward

    def _check_values(self, tree: Pack, values: np.ndarray) -> None:
        if not np.isnan(values).any():
            return
        node = int(tree.wanted_nodes[np.flatnonzero(np.isnan(values))[0]])
        nodes = np.arange(len(tree))
        path = (nodes <= node) & (tree.ends >= node)
        text = opening(self.tokenizer.decode(tree.tokens[path].tolist()))
        raise RunFailure(f"the model's logits are NaN for the prompt {text}: broken weights")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def context_length(model: Any) -> int | None:
    """Return the model's context length in tokens, None if its config sets no bound."""
    config = model.config.get_text_config(decoder=True)
    length = getattr(config, "max_position_embeddings", None)
    return int(length) if length else None


def _window(model: Any) -> int | None:
    """Smallest sliding window of any layer, None if all attend fully.

    Our explicit mask would override it, so longer prompts are not packed.
    """
    config = model.config.get_text_config(decoder=True)
    bounds = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((int(bound) for bound in bounds if bound), default=None)
