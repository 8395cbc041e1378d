"""Compute which change of Winogender's r can be detected with 60 and with 299 occupations.

    python scripts/benchmarks/correlation_power.py [--data-dir FOLDER] [--cells FOLDER]
        [--simulations 1000] [--resamples 500] [--seed 0]

The data folder needs winogender/ and winogenerated/, whose shares of women are used. p(female) of
an occupation under Q and under Q+IF is a line over its share plus noise, such that the population's
correlations are r and r - change; the noise of the two conditions is correlated, since they ask
about the same sentences. --cells names a folder of evaluation files (winogenerated.Q.parquet and
winogenerated.Q+IF.parquet): r and the correlation of the noise are then also those measured there.
A change is found if the paired test of `statistics.json` (resampled occupations, two-sided, 5 %)
has p < .05. Printed is the change that is found in four of five simulations, interpolated.
"""

import argparse
from pathlib import Path

import numpy as np

from selfcorrect.evaluate.experiments import get_experiment
from selfcorrect.evaluate.experiments.wording import load_stimuli
from selfcorrect.evaluate.measuring.cell_files import read_cell
from selfcorrect.evaluate.statistics.bootstrap import Draws
from selfcorrect.evaluate.statistics.significance import POWER, wald_p
from selfcorrect.scripts.commands.data_folder import default_data_dir

# r under Q, and the correlation of the two conditions' noise: the paper's 175B model, and
# assumptions about the noise, from hardly to strongly shared.
SETTINGS = ((0.4, 0.5), (0.4, 0.8), (0.6, 0.5), (0.6, 0.8))
CHANGES = np.arange(0.02, 0.62, 0.02)


def main() -> None:
    """Print a row per setting and number of occupations."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", type=Path, default=default_data_dir())
    parser.add_argument("--cells", type=Path)
    parser.add_argument("--simulations", type=int, default=1000)
    parser.add_argument("--resamples", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    settings = list(SETTINGS)
    if arguments.cells is not None:
        settings.append(measured_setting(arguments.cells))
    print("| experiment | occupations | r under Q | correlation of the noise | detectable change |")
    print("|---|---|---|---|---|")
    for r, shared in settings:
        for name in ("winogender", "winogenerated"):
            shares = occupation_shares(name, arguments.data_dir)
            change = detectable_change(
                shares, r, shared, arguments.simulations, arguments.resamples, arguments.seed
            )
            shown = f"{change:.2f}" if change is not None else f"more than {CHANGES[-1]:.2f}"
            print(f"| {name} | {len(shares)} | {r:.2f} | {shared:.2f} | {shown} |")


def occupation_shares(name: str, data_dir: Path) -> np.ndarray:
    """Return the share of women of each occupation of an experiment."""
    items = get_experiment(name).load(data_dir, load_stimuli().section(name), None, 0).items
    shares = {item.cluster: float(str(item.facts["percent_female"])) / 100 for item in items}
    return np.array(list(shares.values()))


def measured_setting(folder: Path) -> tuple[float, float]:
    """Return r under Q, and the correlation of the conditions' distances from their lines."""
    residuals, r = [], 0.0
    for condition in ("Q", "Q+IF"):
        frame, _ = read_cell(folder / f"winogenerated.{condition}.parquet")
        frame["female"] = [row[1] for row in frame["probabilities"]]
        jobs = frame.groupby("cluster")[["female", "percent_female"]].mean()
        x, y = jobs["percent_female"].to_numpy(), jobs["female"].to_numpy()
        slope, intercept = np.polyfit(x, y, 1)
        residuals.append(y - slope * x - intercept)
        if condition == "Q":
            r = float(np.corrcoef(x, y)[0, 1])
    return r, float(np.corrcoef(*residuals)[0, 1])


def detectable_change(
    shares: np.ndarray, r: float, shared: float, simulations: int, resamples: int, seed: int
) -> float | None:
    """Return the change of r that is found with probability POWER, None if none of CHANGES is."""
    before = (0.0, 0.05)  # nothing to find: the test's own level
    for change in CHANGES:
        power = share_found(shares, r, float(change), shared, simulations, resamples, seed)
        if power >= POWER:
            smaller, less = before
            return smaller + (change - smaller) * (POWER - less) / (power - less)
        before = (float(change), power)
    return None


def share_found(
    shares: np.ndarray,
    r: float,
    change: float,
    shared: float,
    simulations: int,
    resamples: int,
    seed: int,
) -> float:
    """Return in which share of simulations the paired test finds the change."""
    generator = np.random.default_rng(seed)
    num = len(shares)
    x = (shares - shares.mean()) / shares.std()
    noise = generator.standard_normal((3, simulations, num))
    first = np.sqrt(shared) * noise[0] + np.sqrt(1 - shared) * noise[1]
    second = np.sqrt(shared) * noise[0] + np.sqrt(1 - shared) * noise[2]
    weights = Draws(resamples, seed).weights("occupations", np.ones(num))
    after = r - change
    under_q = correlations(x, r * x + np.sqrt(1 - r**2) * first, weights)
    under_request = correlations(x, after * x + np.sqrt(1 - after**2) * second, weights)
    differences = under_q - under_request
    errors = differences[1:].std(axis=0, ddof=1)
    p_values = [wald_p(d, e, num - 1) for d, e in zip(differences[0], errors, strict=True)]
    return float(np.mean(np.array(p_values) < 0.05))


def correlations(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return Pearson's r of x (jobs,) with each row of y (S, jobs), under each row of weights.

    Shape (resamples, S).
    """
    n = weights.sum(axis=1, keepdims=True)
    mean_x, square_x = (weights @ x)[:, None] / n, (weights @ x**2)[:, None] / n
    mean_y, square_y, product = weights @ y.T / n, weights @ (y**2).T / n, weights @ (x * y).T / n
    return (product - mean_x * mean_y) / np.sqrt((square_x - mean_x**2) * (square_y - mean_y**2))


if __name__ == "__main__":
    main()
