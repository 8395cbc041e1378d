"""Rows that a stage can use, and a count, by reason, of those that it leaves out."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

Row = TypeVar("Row")
NOT_REACHED = "training ends before their turn (max_steps or num_train_epochs)"

logger = logging.getLogger(__name__)


def keep_rows(
    stage: str, kind: str, rows: Sequence[Row], reason_against: Callable[[Row], str | None]
) -> tuple[list[Row], dict[str, int]]:
    """Return the rows without a reason to leave them out, and the number of others by reason.

    A warning names the stage and the kind of rows, such as "reward" and "pairs".
    """
    kept: list[Row] = []
    left_out: Counter[str] = Counter()
    for row in rows:
        if reason := reason_against(row):
            left_out[reason] += 1
        else:
            kept.append(row)
    for reason, count in left_out.items():
        logger.warning("%s: %d of %d %s are left out: %s", stage, count, len(rows), kind, reason)
    return kept, dict(left_out)


def too_long(num_tokens: int, max_length: int | None, context: int | None) -> str | None:
    """Return why a row of `num_tokens` is too long, or None; a limit of None is no limit."""
    if max_length is not None and num_tokens > max_length:
        return f"longer than max_length, {max_length} tokens"
    if context is not None and num_tokens > context:
        return f"longer than the model's context, {context} tokens"
    return None
