"""Values that Ganguli et al. 2023 (arXiv 2302.07459) published, to draw beside our results.

TABLE holds numbers that the paper states, READ_OFF approximate values read off its figures. All are
of proprietary models, with one RLHF run per size and without error bars. A step in the paper is
another amount of feedback than a step here, so the values are no target for ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass

CITATION = "Ganguli et al. 2023"
LARGEST = 175_000_000_000  # parameters of the model behind TABLE and the figures against steps
SIZES = (
    810_000_000,
    1_600_000_000,
    3_500_000_000,
    6_400_000_000,
    13_000_000_000,
    22_000_000_000,
    52_000_000_000,
    LARGEST,
)
AGAINST_SIZE = "figure of metric against model size"
AGAINST_STEPS = "figure of metric against RLHF steps"


@dataclass(frozen=True, slots=True)
class Published:
    """One published value, under this project's names of experiment, condition and metric.

    `exact` is False for a value read off a figure, whose `steps` can be approximate too (where a
    curve reaches zero). `source` names the paper's figure.
    """

    experiment: str
    condition: str
    metric: str
    parameters: int
    steps: int
    value: float
    exact: bool
    source: str

    @property
    def in_words(self) -> str:
        """The value as in "Q 0.1845 (175B, 800 steps)" or "Q about -0.15 (52B, 800 steps)"."""
        size = f"{self.parameters / 1e9:.3g}B"
        return (
            f"{self.condition} {'' if self.exact else 'about '}{self.value:g} "
            f"({size}, {self.steps} steps)"
        )


def _stated(
    experiment: str, metric: str, steps: int, values: Mapping[str, float]
) -> list[Published]:
    return [
        Published(experiment, condition, metric, LARGEST, steps, value, True, AGAINST_SIZE)
        for condition, value in values.items()
    ]


def _about(
    experiment: str, condition: str, metric: str, parameters: int, steps: int, value: float
) -> Published:
    source = AGAINST_STEPS if parameters == LARGEST else AGAINST_SIZE
    return Published(experiment, condition, metric, parameters, steps, value, False, source)


TABLE: tuple[Published, ...] = (
    *_stated("bbq", "bias_ambiguous", 800, {"Q": 0.1845, "Q+IF": 0.1056, "Q+IF+CoT": 0.0301}),
    *_stated(
        "winogender",
        "correlation",
        50,
        {"Q": 0.402, "Q+IF": 0.159, "Q+IF+CoT": -0.009, "Match stats": 0.916},
    ),
    *_stated("law_school", "difference", 800, {"Q": -0.031, "Q+IF": 0.047, "Q+IF+CoT": 0.071}),
)
"""Stated numbers: the 175B model after 800 (BBQ, law school) or 50 (Winogender) steps."""

READ_OFF: tuple[Published, ...] = (
    # Without an instruction, the bias is near zero up to 22B and rises from there.
    *(_about("bbq", "Q", "bias_ambiguous", size, 800, 0.0) for size in SIZES[:6]),
    _about("law_school", "Q", "difference", 52_000_000_000, 800, -0.15),
    _about("law_school", "Q+IF", "difference", 52_000_000_000, 800, 0.05),
    _about("law_school", "Q", "difference", LARGEST, 50, -0.15),
    _about("law_school", "Q+IF", "difference", LARGEST, 50, -0.15),
    _about("law_school", "Q+IF", "difference", LARGEST, 600, 0.0),
    _about("law_school", "Q+IF", "difference", LARGEST, 1000, 0.10),
    _about("law_school", "Q+IF+CoT", "difference", LARGEST, 200, 0.0),
)
"""Values read off curves: approximate, and at zero crossings the steps are approximate too."""


def published_against_steps(experiment: str, metric: str) -> list[Published]:
    """Return the values of the largest model at different steps; empty for other metrics."""
    return [row for row in _of(experiment, metric) if row.parameters == LARGEST]


def published_against_size(experiment: str, metric: str) -> list[Published]:
    """Return the values at the steps of the figure against size; empty for other metrics."""
    steps = {row.steps for row in TABLE if row.experiment == experiment}
    return [row for row in _of(experiment, metric) if row.steps in steps]


def _of(experiment: str, metric: str) -> list[Published]:
    rows = (*TABLE, *READ_OFF)
    return [row for row in rows if (row.experiment, row.metric) == (experiment, metric)]
