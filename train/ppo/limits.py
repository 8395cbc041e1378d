"""How many rows share one forward pass on a CPU; free of torch, for the memory estimate."""

import math

# A CPU gains little from many rows in one pass, and few rows of similar length need less padding.
# These are as few as keep a pass busy: whatever its size, a pass costs some milliseconds.
MIN_ROWS_PER_PASS = 16
MIN_FLOPS_PER_PASS = 2e8


def rows_per_pass(num_weights: int, tokens_per_row: float, save_memory: bool = False) -> int:
    """Return how many rows of similar length share a forward pass; half as many to save memory."""
    flops_per_row = 2 * num_weights * max(tokens_per_row, 1)
    min_rows = MIN_ROWS_PER_PASS // 2 if save_memory else MIN_ROWS_PER_PASS
    return max(min_rows, math.ceil(MIN_FLOPS_PER_PASS / flops_per_row))
