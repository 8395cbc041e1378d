"""Where the time of a PPO step goes, phase by phase, and how many tokens a second it makes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

PHASES = ("generate", "score", "train")


class PhaseClock(TrainerCallback):
    """Wall seconds of this process. As a callback it adds the optimizer's own step to "train"."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)  # since training began
        self._logged = dict(self._seconds)
        self._finished: tuple[int, float] = (0, 0.0)  # tokens and seconds of whole PPO steps
        self._updating = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block as this phase, less the phases within it."""
        start, before = time.perf_counter(), sum(self._seconds.values())
        try:
            yield
        finally:
            within = sum(self._seconds.values()) - before
            self._seconds[name] += time.perf_counter() - start - within

    def since_last_log(self) -> dict[str, float]:
        """Seconds of each phase since the last call."""
        spent = {name: s - self._logged[name] for name, s in self._seconds.items()}
        self._logged = dict(self._seconds)
        return spent

    def tokens_per_second(self, tokens: int) -> float | None:
        """Tokens a second since the last call, in all phases together; None where none were added.

        `tokens` counts from the start of the run. To be called when a PPO step is finished.
        """
        seconds = sum(self._seconds.values())
        before, self._finished = self._finished, (tokens, seconds)
        added = tokens - before[0]
        return added / (seconds - before[1]) if added else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave out the tokens of the run that this one resumes."""
        self._finished = (int(state.num_input_tokens_seen), sum(self._seconds.values()))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The optimizer's step begins."""
        self._updating = time.perf_counter()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The optimizer's step is done."""
        self._seconds["train"] += time.perf_counter() - self._updating
