"""Wall time of each phase of a PPO step, and tokens per second."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

PHASES = ("generate", "score", "train")


class PhaseTimer(TrainerCallback):
    """Wall seconds of this process; as a callback it adds the optimizer's own time to "train"."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)  # since training began
        self._logged = dict(self._seconds)
        self._last_step: tuple[int, float] = (0, 0.0)  # tokens and seconds up to its end
        self._optimizer_start = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block's time as this phase, without the phases inside it."""
        start, before = time.perf_counter(), sum(self._seconds.values())
        try:
            yield
        finally:
            inner = sum(self._seconds.values()) - before
            self._seconds[name] += time.perf_counter() - start - inner

    def since_last_log(self) -> dict[str, float]:
        """Return the seconds of each phase since the last call."""
        spent = {name: s - self._logged[name] for name, s in self._seconds.items()}
        self._logged = dict(self._seconds)
        return spent

    def tokens_per_second(self, tokens: int) -> float | None:
        """Return tokens per second over all phases since the last call; None without new tokens.

        `tokens` counts from the start of the run. Call this at the end of a PPO step.
        """
        seconds = sum(self._seconds.values())
        (tokens_before, seconds_before), self._last_step = self._last_step, (tokens, seconds)
        added = tokens - tokens_before
        return added / (seconds - seconds_before) if added else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave out the tokens of the run that this one resumes."""
        self._last_step = (int(state.num_input_tokens_seen), sum(self._seconds.values()))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note the start of the optimizer's step."""
        self._optimizer_start = time.perf_counter()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Add the optimizer's step to "train"."""
        self._seconds["train"] += time.perf_counter() - self._optimizer_start
