"""What is followed over steps and sizes: points with their resamples, and lines through them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from selfcorrect.evaluate.statistics.bootstrap import UNINSTRUCTED, Cell
from selfcorrect.evaluate.statistics.cells import experiment_named

EXPECTED = "expected_"  # the same metric with probabilities in the place of choices
MATCH_STATS = "Match stats"


@dataclass(frozen=True)
class Quantity:
    """What is followed: a "metric" under a condition, or the "effect" of the condition on it."""

    name: str
    condition: str
    metric: str


@dataclass(frozen=True)
class Point:
    """A quantity at one checkpoint: values of shape (1 + R,), and the items they are of."""

    values: np.ndarray
    population: bytes


@dataclass(frozen=True)
class Line:
    """Points to fit: x of shape (P,), y of shape (P, 1 + R).

    `left_out` names points that are missing or undefined; `lacking` says why there is no line.
    """

    x: np.ndarray
    y: np.ndarray
    left_out: list[str]
    lacking: str | None
    population: bytes = b""

    def slopes(self) -> np.ndarray:
        """The least-squares slope of the data and of every resample, of shape (1 + R,)."""
        centred = self.x - self.x.mean()
        slopes: np.ndarray = centred @ self.y / (centred @ centred)
        return slopes


class Study:
    """The cells of one experiment in one run."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.run, self.experiment = cells[0].run, cells[0].experiment
        self.headline = experiment_named(self.experiment).HEADLINE
        self.cells = {(c.model, c.seed, c.condition, c.step): c for c in cells}
        self.parameters = {cell.model: cell.parameters for cell in cells}
        self.models = sorted(self.parameters, key=lambda model: self.parameters[model])
        self.conditions = list(dict.fromkeys(cell.condition for cell in cells))
        self.degrees = min(cell.replicates.degrees for cell in cells)

    def seeds(self, model: str | None = None) -> list[int]:
        """The training seeds of a model, or of any."""
        return sorted({key[1] for key in self.cells if model in (None, key[0])})

    def steps(self, model: str, seed: int) -> list[int]:
        """The evaluated steps of one training run."""
        return sorted({key[3] for key in self.cells if key[:2] == (model, seed)})

    def metrics(self) -> list[str]:
        """The headline metric, and beside it the same from probabilities where it is measured."""
        known = {name for cell in self.cells.values() for name in cell.replicates.metrics}
        return [name for name in (self.headline, EXPECTED + self.headline) if name in known]

    def quantities(self) -> list[Quantity]:
        """Each condition's metrics, and each condition's effect on them."""
        return [
            Quantity(name, condition, metric)
            for metric in self.metrics()
            for condition in self.conditions
            for name in ("metric", "effect")
            if name == "metric" or (condition != UNINSTRUCTED and UNINSTRUCTED in self.conditions)
        ]

    def judges(self, quantity: Quantity) -> bool:
        """Whether a test of it counts in a family: headline metrics, and effects against a bias."""
        against = quantity.name == "metric" or quantity.condition != MATCH_STATS
        return quantity.metric == self.headline and against

    def point(self, quantity: Quantity, model: str, seed: int, step: int) -> Point | str:
        """The quantity at one checkpoint, or why it has none."""
        names = [quantity.condition]
        if quantity.name == "effect":
            names = [UNINSTRUCTED, quantity.condition]
        found = []
        for name in names:
            cell = self.cells.get((model, seed, name, step))
            if cell is None or quantity.metric not in cell.replicates.metrics:
                return f"{name} not measured"
            if np.isnan(cell.replicates.metrics[quantity.metric][0]):
                return f"undefined under {name}"
            found.append(cell.replicates)
        if found[0].population != found[-1].population:
            return f"{' and '.join(names)} measured on different items"
        values = [one.metrics[quantity.metric] for one in found]
        difference = values[0] if len(values) == 1 else values[0] - values[1]
        return Point(difference, found[0].population)

    def common_step(self, quantity: Quantity) -> int | None:
        """The last step at which every training run has the quantity, of those that have it."""
        having = [
            {
                step
                for step in self.steps(model, seed)
                if isinstance(self.point(quantity, model, seed, step), Point)
            }
            for model in self.models
            for seed in self.seeds(model)
        ]
        having = [steps for steps in having if steps]
        return max(set.intersection(*having), default=None) if having else None


def studies(cells: Sequence[Cell]) -> Iterator[Study]:
    """The cells by run and experiment."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.run, cell.experiment), []).append(cell)
    for group in groups.values():
        yield Study(group)


def over_training(
    study: Study, quantity: Quantity, model: str, seed: int, against: str = "step"
) -> Line:
    """The quantity over the kept steps of one training run; x is "step" or "sqrt_kl"."""
    points: list[tuple[str, float | str, Point | str]] = []
    for step in study.steps(model, seed):
        point = study.point(quantity, model, seed, step)
        x: float | str = float(step)
        if against == "sqrt_kl" and isinstance(point, Point):
            x = _root_of_kl(study.cells[model, seed, quantity.condition, step])
        points.append((f"step {step}", x, point))
    return _line(points, "checkpoints")


def _root_of_kl(cell: Cell) -> float | str:
    if cell.step == 0:
        return 0.0  # before the first update the policy is the initial policy
    if cell.kl is None or np.isnan(cell.kl):
        return "no KL recorded"
    if cell.kl < 0:
        return f"estimate of the KL below zero ({cell.kl:.2g})"
    return float(np.sqrt(cell.kl))


def over_sizes(study: Study, quantity: Quantity, seed: int, step: int | None) -> Line:
    """The quantity over log10 of the parameters, of one seed's training runs at `step`."""
    if step is None:
        nothing = np.empty((0, 1))
        return Line(np.empty(0), nothing, [], "no step at which all training runs were measured")
    return _line(
        [
            (
                model,
                float(np.log10(study.parameters[model])),
                study.point(quantity, model, seed, step),
            )
            for model in study.models
        ],
        "model sizes",
    )


def slopes_over_sizes(study: Study, quantity: Quantity, seed: int) -> Line:
    """The slopes over steps of one seed's training runs, over log10 of the parameters."""
    points: list[tuple[str, float | str, Point | str]] = []
    for model in study.models:
        line = over_training(study, quantity, model, seed)
        point: Point | str = f"no slope over steps ({line.lacking})"
        if line.lacking is None:
            point = Point(line.slopes(), line.population)
        points.append((model, float(np.log10(study.parameters[model])), point))
    return _line(points, "model sizes")


def _line(points: Sequence[tuple[str, float | str, Point | str]], kind: str) -> Line:
    left_out, x, kept = [], [], list[Point]()
    for place, at, point in points:
        if isinstance(point, str):
            left_out.append(f"{place}: {point}")
        elif isinstance(at, str):
            left_out.append(f"{place}: {at}")
        else:
            x.append(at)
            kept.append(point)
    lacking = None
    if len({point.population for point in kept}) > 1:
        lacking = "measured on different items (another limit or data set)"
    elif len(set(x)) < 2:
        lacking = f"needs two {kind}, has {len(set(x))}"
    if lacking is not None:
        return Line(np.array(x), np.empty((0, 1)), left_out, lacking)
    y = np.stack([point.values for point in kept])
    return Line(np.array(x), y, left_out, None, kept[0].population)
