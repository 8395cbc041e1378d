"""Exact log-probabilities of given continuations, and samples, from a causal LM in memory."""
# ruff: noqa: TID253  -- all torch; imported only where a model is at hand

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch

from selfcorrect.evaluate.prompts.tokenized import (
    Continuation,
    Request,
    continuations,
    opening,
    tokenizer_digest,
)
from selfcorrect.evaluate.scoring.cached import score_after, sizes_after
from selfcorrect.evaluate.scoring.engine import Engine, Sample, Sampling, T
from selfcorrect.evaluate.scoring.forwards import (
    Forwards,
    largest_error,
    log_probabilities,
    reported_forwards,
)
from selfcorrect.evaluate.scoring.limits import (
    BATCH_TOKENS,
    CALL_FLOPS,
    CPU_SCORING_TOKENS,
    MOST_ITEMS,
    PACK_TOKENS,
    SMALL_BATCH_TOKENS,
    SMALL_MODEL,
    SMALL_PACK_TOKENS,
    SMALL_SCORING_TOKENS,
)
from selfcorrect.evaluate.scoring.precision import device_of, is_out_of_memory
from selfcorrect.evaluate.scoring.sampling import (
    SampledBatch,
    batches,
    sample_alone,
    sample_batch,
    sample_slots,
)
from selfcorrect.evaluate.scoring.slots import error_of_slots
from selfcorrect.evaluate.scoring.token_trie import Pack, Packing, PackingCache, pack, trie
from selfcorrect.evaluate.scoring.trials import UNSUPPORTED, Checks, Trials, Ways, reason_of
from selfcorrect.recipes.foundation.errors import InputError, RunFailure

logger = logging.getLogger(__name__)


class PackedEngine(Engine):
    """Score options and draw samples with one model; deterministic for given inputs.

    The model must be in eval mode. A row's scores are those of the model reading it alone. Faster
    forwards are compared with that before they are used (`trials.Ways`); where they differ (ALiBi,
    state spaces, windows, masks that a model builds itself), a slower one runs, with a warning.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        packings: PackingCache | None = None,
        batch_tokens: int | None = None,
        pack_tokens: int | None = None,
    ) -> None:
        self.device_kind = "cpu" if device_of(model).type == "cpu" else "gpu"
        on_cpu = self.device_kind == "cpu"
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        is_small = on_cpu and self.num_parameters < SMALL_MODEL
        self.model = model
        self.tokenizer = tokenizer
        self.packings = packings or PackingCache()
        self.pack_tokens = pack_tokens or (SMALL_PACK_TOKENS if is_small else PACK_TOKENS)
        default = SMALL_BATCH_TOKENS if is_small else BATCH_TOKENS[self.device_kind]
        self.batch_tokens = batch_tokens or default
        self.context = context_length(model)
        scoring_tokens = SMALL_SCORING_TOKENS if is_small else CPU_SCORING_TOKENS
        forward_tokens = min(self.batch_tokens, scoring_tokens) if on_cpu else self.batch_tokens
        self._forwards = Forwards(model, forward_tokens)
        types = f"{self._forwards.dtype} {self._forwards.device}"
        trials = self.packings.of_model(model, types, Trials)
        self._ways = Ways(self._forwards, self.context, type(model).__name__, trials)
        self._continues_cache = trials.continues_cache
        self._in_slots = trials.in_slots
        self._batched = (trials.in_mixed_batches, trials.in_even_batches)

    @cached_property
    def tokenizer_digest(self) -> str:
        """A key for the packings of tokenizers that make the same tokens of a dialogue."""
        digest = tokenizer_digest(self.tokenizer)
        # A slow tokenizer's contents cannot be compared: it equals no other tokenizer.
        is_slow = getattr(self.tokenizer, "backend_tokenizer", None) is None
        return f"{digest}{id(self.tokenizer)}" if is_slow else digest

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
        return self.score_packing(
            self.kept(f"{self.pack_tokens}|{key}", lambda: self.prepare(requests()))
        )

    def kept(self, key: str, make: Callable[[], T]) -> T:
        """See `Engine.kept`."""
        return self.packings.get((self.tokenizer_digest, key), make)

    def recent(
        self, keys: Sequence[tuple[str, ...]], make: Callable[[list[int]], Sequence[T]]
    ) -> list[T]:
        """See `Engine.recent`."""
        return self.packings.recent([(self.tokenizer_digest, *key) for key in keys], make)

    def items_at_once(self, tokens: float, is_sampled: bool) -> int:
        """See `Engine.items_at_once`: the number depends on the model and its device alone.

        It fills a batch at least. Conditions share about half of their prompts' tokens.
        """
        least = self.batch_tokens if is_sampled else 2 * self._forwards.batch_tokens
        most = CALL_FLOPS[self.device_kind] / (2 * self.num_parameters)
        return max(1, min(int(max(least, most) / tokens), MOST_ITEMS))

    @contextmanager
    def _progress(self, num_forwards: float) -> Iterator[None]:
        """Report progress by the forwards in the block, unless a block around it does."""
        report, self.on_progress = self.on_progress, None
        try:
            with reported_forwards(self.model, num_forwards, report):
                yield
        finally:
            self.on_progress = report

    def _num_steps(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> float:
        """Return how many forwards samples take at most."""
        longest = max(map(len, prompts), default=0) + max_new_tokens
        num_rows = max(1, self.batch_tokens // longest)
        return math.ceil(len(prompts) / num_rows) * (max_new_tokens + 1)

    def score_packing(self, packing: Packing) -> list[list[float]]:
        """Score prepared requests; `packing` may come from any engine with this tokenizer."""
        for index, length in enumerate(packing.lengths):
            self._check_length(index, length)
        totals = np.zeros(sum(packing.num_options))
        remaining = packing.packs
        with self._progress(sum(map(len, remaining)) / self._forwards.batch_tokens):
            while remaining:
                remaining = self._score_packs(remaining, totals)
        ends = np.cumsum(packing.num_options)[:-1]
        return [part.tolist() for part in np.split(totals, ends)]

    def _score_packs(self, packs: Sequence[Pack], totals: np.ndarray) -> list[Pack]:
        """Add the packs' values to the totals; return the packs whose forward raised an error."""
        failed: list[Pack] = []
        try:
            assigned = self._ways.assign(packs)
        except (*UNSUPPORTED, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise InputError(
                "a single prompt does not fit in memory beside the model; free memory, use another "
                "device, or hold the weights in bfloat16"
            ) from None
        for way, indices in assigned:
            left = set(indices)
            self._forwards.reset()
            try:
                for index, values in self._ways.run(way, [packs[i] for i in indices]):
                    tree = packs[indices[index]]
                    self._check_values(tree, values)
                    np.add.at(totals, tree.wanted_options, values)
                    left.discard(indices[index])
            except (*UNSUPPORTED, MemoryError) as error:
                if is_out_of_memory(error):
                    self._halve_batches(max(len(packs[i]) for i in left))
                elif way is self._ways.alone:
                    raise
                else:
                    self._ways.give_up(way, error)
                failed += [packs[i] for i in sorted(left)]
        return failed

    def _halve_batches(self, least: int) -> None:
        """Halve the tokens of a forward; InputError if it holds no more than `least` already."""
        tokens = self._forwards.batch_tokens
        if tokens <= least:
            raise InputError(
                f"a forward of {tokens} tokens does not fit in memory; free memory, use another "
                "device, or hold the weights in bfloat16"
            )
        self.batch_tokens = self._forwards.batch_tokens = max(tokens // 2, 1)
        logger.warning(
            "out of memory: forwards now hold %d tokens instead of %d; --batch-tokens %d avoids "
            "the attempt",
            tokens // 2,
            tokens,
            tokens // 2,
        )

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
        with self._progress(self._num_steps(tokenised, sampling.max_new_tokens)):
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
        with self._progress(self._num_steps(tokenised, sampling.max_new_tokens)):
            for batch, sampled in self._sampled_batches(tokenised, keys, sampling, stop):
                requests = [then(i, s) for i, s in zip(batch, sampled.samples, strict=True)]
                tries = self._tries(requests)
                for index, (prompt, _), (options, _) in zip(batch, requests, tries, strict=True):
                    self._check_length(index, max(len(option.row) for option in options), prompt)
                scores = self._scores_after(sampled, [t for t, _ in tries], [t for _, t in tries])
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
        left = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
        self._forwards.reset()  # after what was scored before
        while left:
            try:
                yield from self._sample_in_slots(prompts, keys, left, sampling, stop)
                for batch in batches(prompts, left, sampling.max_new_tokens, self.batch_tokens):
                    for rows, sampled in self._sample(prompts, keys, batch, sampling, stop):
                        yield rows, sampled
                        del sampled
                        left = [index for index in left if index not in rows]
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._halve_batches(len(prompts[left[0]]) + sampling.max_new_tokens)

    def _sample_in_slots(
        self,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[str],
        left: list[int],
        sampling: Sampling,
        stop: str | None,
    ) -> Iterator[tuple[list[int], SampledBatch]]:
        """Yield samples as they end, and remove them from `left` (longest first).

        Some stay for a model that takes no masks with its cache, or that is wrong with them.
        """
        longest = len(prompts[left[0]]) + sampling.max_new_tokens
        num_slots = min(len(left), max(1, self.batch_tokens // longest))
        checks, size = self._in_slots, (longest, num_slots)
        if "position_ids" not in self._forwards.accepts:
            return
        if not checks.knows(size) and not checks.may_try:
            return
        order = list(left)
        try:
            if not checks.knows(size):
                error = error_of_slots(self._forwards, prompts[left[0]], num_slots, longest)
                if error > self._ways.tolerance:
                    self._refuse(checks, f"its log-probabilities are off by {error:.2g}")
                    return
                checks.note(size)
            for rows, sampled in sample_slots(
                self._forwards,
                self.tokenizer,
                [prompts[i] for i in order],
                [keys[i] for i in order],
                sampling,
                stop,
                num_slots=num_slots,
            ):
                batch = [order[row] for row in rows]
                yield batch, sampled
                del sampled
                for index in batch:
                    left.remove(index)
        except torch.OutOfMemoryError:
            raise
        except UNSUPPORTED as error:
            self._refuse(checks, reason_of(error))

    def _sample(
        self,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[str],
        batch: list[int],
        sampling: Sampling,
        stop: str | None,
    ) -> Iterator[tuple[list[int], SampledBatch]]:
        """Yield the samples of a batch, or of parts of it, as the model would write them alone."""
        lengths = {len(prompts[i]) for i in batch}
        checks = self._batched[len(lengths) == 1]
        batch_prompts, batch_keys = [prompts[i] for i in batch], [keys[i] for i in batch]
        size = (max(lengths) + sampling.max_new_tokens, max(lengths) - min(lengths))
        if checks.knows(size) or checks.may_try:
            self._forwards.reset()
            sampled = sample_batch(
                self.model, self.tokenizer, batch_prompts, batch_keys, sampling, stop
            )
            error = 0.0 if checks.knows(size) else self._error_of(sampled, batch_prompts)
            if error <= self._ways.tolerance:
                checks.note(size)
                yield batch, sampled
                return
            del sampled
            self._refuse(checks, f"its log-probabilities are off by {error:.2g}")
        if len(lengths) > 1:
            for length in sorted(lengths, reverse=True):
                equal = [i for i in batch if len(prompts[i]) == length]
                yield from self._sample(prompts, keys, equal, sampling, stop)
            return
        for index, prompt, key in zip(batch, batch_prompts, batch_keys, strict=True):
            yield (
                [index],
                sample_alone(self._forwards, self.tokenizer, prompt, key, sampling, stop),
            )

    def _error_of(self, sampled: SampledBatch, prompts: Sequence[Sequence[int]]) -> float:
        """Return how far log-probabilities of written tokens are off those of plain forwards.

        Compared are the samples after the shortest and the longest prompt, and the longest sample.
        """
        written = [sample.num_tokens for sample in sampled.samples]
        rows = range(len(prompts))
        compared = {
            min(rows, key=lambda row: (len(prompts[row]), -written[row])),
            max(rows, key=lambda row: (len(prompts[row]), written[row])),
            max(rows, key=lambda row: written[row]),
        }
        worst = 0.0
        for row in compared:
            start, count = len(prompts[row]), written[row]
            tokens = sampled.rows[row]
            self._forwards.reset()
            logits = self._forwards.row_logits(tokens[:-1], np.arange(start - 1, start + count - 1))
            alone = log_probabilities(logits, np.arange(count), np.array(tokens[start:]))
            errors = np.abs(alone - sampled.log_probabilities[row][:count])
            worst = max(worst, largest_error(errors[None], self._forwards))
        return worst

    def _tries(self, requests: Sequence[Request]) -> list[tuple[list[Continuation], Pack]]:
        """Return the options of each request as tokens, and their trie."""

        def make(missing: list[int]) -> list[tuple[list[Continuation], Pack]]:
            tokenised = continuations(self.tokenizer, [requests[i] for i in missing])
            return [(options, trie(options)) for options in tokenised]

        return self.recent([("request", prompt, *options) for prompt, options in requests], make)

    def _scores_after(
        self,
        sampled: SampledBatch,
        requests: Sequence[Sequence[Continuation]],
        tries: Sequence[Pack],
    ) -> list[list[float]]:
        """Score the request after each sample, continuing from the batch's cache if possible."""
        size = sizes_after(sampled, requests)
        expected: list[list[float]] | None = None
        if not self._continues_cache.knows(size):  # a larger batch than before: both ways
            expected = self.score_packing(pack(requests, self.pack_tokens))
            if not self._continues_cache.may_try or not self._ways.packed.within.row:
                return expected  # a model without packs takes no such masks
        try:
            scored = score_after(self._forwards, sampled, requests, tries)
        except torch.OutOfMemoryError:
            raise
        except UNSUPPORTED as error:
            self._refuse(self._continues_cache, reason_of(error))
            scored = None
        if scored is None:
            return expected or self.score_packing(pack(requests, self.pack_tokens))
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
            if error_per_token > self._ways.tolerance:
                self._refuse(
                    self._continues_cache, f"its scores are off by {error_per_token:.2g} a token"
                )
                return expected
            self._continues_cache.note(size)
        return scores

    def _refuse(self, checks: Checks, reason: str) -> None:
        """Count a failure of a faster way, and warn of the first one."""
        checks.failures += 1
        if checks.failures > 1:
            return
        name = type(self.model).__name__
        if checks is self._in_slots:
            logger.info("%s is sampled in batches of fixed rows (%s)", name, reason)
        elif checks is self._continues_cache:
            logger.warning(
                "%s cannot continue from the cache of its own text (%s): final questions are "
                "scored from the start of the dialogue, which is slower",
                name,
                reason,
            )
        else:
            logger.warning(
                "%s writes other texts beside others than alone (%s): %s, which is slower",
                name,
                reason,
                "batches hold prompts of one length"
                if checks is self._batched[0]
                else "texts are written one by one, without a cache",
            )

    def _check_values(self, tree: Pack, values: np.ndarray) -> None:
        if not np.isnan(values).any():
            return
        node = int(tree.wanted_nodes[np.flatnonzero(np.isnan(values))[0]])
        nodes = np.arange(len(tree))
        path = (nodes <= node) & (tree.ends >= node)
        text = opening(self.tokenizer.decode(tree.tokens[path].tolist()))
        raise RunFailure(f"the model's logits are NaN for the prompt {text}: broken weights")


def context_length(model: Any) -> int | None:
    """Return the model's context length in tokens, None if its config sets no bound."""
    config = model.config.get_text_config(decoder=True)
    length = getattr(config, "max_position_embeddings", None)
    return int(length) if length else None
