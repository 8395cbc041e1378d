"""Series over steps, KL and sizes: points with their resamples, and lines through them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from selfcorrect.evaluate.experiments import get_experiment
from selfcorrect.evaluate.statistics.comparisons import UNINSTRUCTED, Cell

EXPECTED = "expected_"  # prefix of the same metric from probabilities instead of choices


@dataclass(frozen=True)
class Quantity:
    """A "metric" under a condition, or the "effect" of the condition on that metric."""

    name: str
    condition: str
    metric: str


@dataclass(frozen=True)
class Point:
    """A quantity at one checkpoint: values of shape (1 + R,), and the items behind them."""

    values: np.ndarray
    population: bytes


@dataclass(frozen=True)
class Line:
    """Points to fit: x of shape (P,), y of shape (P, 1 + R).

    `left_out` names points that are missing or undefined; `undefined_because` says why there is no
    line, None where there is one.
    """

    x: np.ndarray
    y: np.ndarray
    left_out: list[str]
    undefined_because: str | None
    population: bytes = b""

    def slopes(self) -> np.ndarray:
        """Return the least-squares slope of the data and of every resample, shape (1 + R,)."""
        centred = self.x - self.x.mean()
        slopes: np.ndarray = centred @ self.y / (centred @ centred)
        return slopes


class Series:
    """The cells of one experiment in one run, over models, seeds, steps and conditions."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.run, self.experiment = cells[0].run, cells[0].experiment
        self.headline = get_experiment(self.experiment).headline
        self.cells = {(c.model, c.seed, c.condition, c.step): c for c in cells}
        self.parameters = {cell.model: cell.parameters for cell in cells}
        self.models = sorted(self.parameters, key=lambda model: self.parameters[model])
        self.conditions = list(dict.fromkeys(cell.condition for cell in cells))
        self.judged = {cell.condition: cell.judged for cell in cells}
        self._steps: dict[tuple[str, int], set[int]] = {}
        for cell in cells:
            self._steps.setdefault((cell.model, cell.seed), set()).add(cell.step)
        self.degrees = min(cell.replicates.degrees for cell in cells)

    def seeds(self, model: str | None = None) -> list[int]:
        """Return the training seeds of a model, or of all models."""
        return sorted({seed for name, seed in self._steps if model in (None, name)})

    def steps(self, model: str, seed: int) -> list[int]:
        """Return the evaluated steps of one training run."""
        return sorted(self._steps.get((model, seed), ()))

    def metrics(self) -> list[str]:
        """Return the headline metric, and the same from probabilities where it is measured."""
        measured = {name for cell in self.cells.values() for name in cell.replicates.metrics}
        return [name for name in (self.headline, EXPECTED + self.headline) if name in measured]

    def quantities(self) -> list[Quantity]:
        """Return each condition's metrics, and each condition's effect on them."""
        return [
            Quantity(name, condition, metric)
            for metric in self.metrics()
            for condition in self.conditions
            for name in ("metric", "effect")
            if name == "metric" or (condition != UNINSTRUCTED and UNINSTRUCTED in self.conditions)
        ]

    def judges(self, quantity: Quantity) -> bool:
        """Whether a test of it counts in a family: headline metrics, and effects against a bias."""
        against = quantity.name == "metric" or self.judged[quantity.condition]
        return quantity.metric == self.headline and against

    def point(self, quantity: Quantity, model: str, seed: int, step: int) -> Point | str:
        """Return the quantity at one checkpoint, or the reason why it has none."""
        names = [quantity.condition]
        if quantity.name == "effect":
            names = [UNINSTRUCTED, quantity.condition]
        replicates = []
        for name in names:
            cell = self.cells.get((model, seed, name, step))
            if cell is None or quantity.metric not in cell.replicates.metrics:
                return f"{name} not measured"
            if np.isnan(cell.replicates.metrics[quantity.metric][0]):
                return f"undefined under {name}"
            replicates.append(cell.replicates)
        if replicates[0].population != replicates[-1].population:
            return f"{' and '.join(names)} measured on different items"
        values = [cell.metrics[quantity.metric] for cell in replicates]
        difference = values[0] if len(values) == 1 else values[0] - values[1]
        return Point(difference, replicates[0].population)

    def common_step(self, quantity: Quantity) -> int | None:
        """Return the last step that all training runs share, of those that have the quantity."""
        measured = [
            {
                step
                for step in self.steps(model, seed)
                if isinstance(self.point(quantity, model, seed, step), Point)
            }
            for model in self.models
            for seed in self.seeds(model)
        ]
        measured = [steps for steps in measured if steps]
        return max(set.intersection(*measured), default=None) if measured else None


def split_into_series(cells: Sequence[Cell]) -> Iterator[Series]:
    """Yield the cells of each run and experiment as a Series."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.run, cell.experiment), []).append(cell)
    for group in groups.values():
        yield Series(group)


def over_training(
    series: Series, quantity: Quantity, model: str, seed: int, against: str = "step"
) -> Line:
    """Return the quantity over the kept steps of one training run; x is "step" or "sqrt_kl"."""
    points: list[tuple[str, float | str, Point | str]] = []
    for step in series.steps(model, seed):
        point = series.point(quantity, model, seed, step)
        x: float | str = float(step)
        if against == "sqrt_kl" and isinstance(point, Point):
            x = _sqrt_kl(series.cells[model, seed, quantity.condition, step])
        points.append((f"step {step}", x, point))
    return _line(points, "checkpoints")


def _sqrt_kl(cell: Cell) -> float | str:
    if cell.step == 0:
        return 0.0  # before the first update the policy is the initial policy
    if cell.kl is None or np.isnan(cell.kl):
        return "no KL recorded"
    if cell.kl < 0:
        return f"estimate of the KL below zero ({cell.kl:.2g})"
    return float(np.sqrt(cell.kl))


def over_sizes(series: Series, quantity: Quantity, seed: int, step: int | None) -> Line:
    """Return the quantity at `step` over log10 of the parameters, of one seed's training runs."""
    if step is None:
        reason = "no step at which all training runs were measured"
        return Line(np.empty(0), np.empty((0, 1)), [], reason)
    return _line(
        [
            (
                model,
                float(np.log10(series.parameters[model])),
                series.point(quantity, model, seed, step),
            )
            for model in series.models
        ],
        "model sizes",
    )


def slopes_over_sizes(series: Series, quantity: Quantity, seed: int) -> Line:
    """Return the slopes over steps over log10 of the parameters, of one seed's training runs."""
    points: list[tuple[str, float | str, Point | str]] = []
    for model in series.models:
        line = over_training(series, quantity, model, seed)
        point: Point | str = f"no slope over steps ({line.undefined_because})"
        if line.undefined_because is None:
            point = Point(line.slopes(), line.population)
        points.append((model, float(np.log10(series.parameters[model])), point))
    return _line(points, "model sizes")


def _line(points: Sequence[tuple[str, float | str, Point | str]], kind: str) -> Line:
    """Fit (label, x, y) points; x or y may be the reason why there is none."""
    left_out, x, kept = [], [], list[Point]()
    for label, position, point in points:
        if isinstance(point, str):
            left_out.append(f"{label}: {point}")
        elif isinstance(position, str):
            left_out.append(f"{label}: {position}")
        else:
            x.append(position)
            kept.append(point)
    reason = None
    if len({point.population for point in kept}) > 1:
        reason = "measured on different items (another limit or data set)"
    elif len(set(x)) < 2:
        reason = f"needs two {kind}, has {len(set(x))}"
    if reason is not None:
        return Line(np.array(x), np.empty((0, 1)), left_out, reason)
    y = np.stack([point.values for point in kept])
    return Line(np.array(x), y, left_out, None, kept[0].population)
