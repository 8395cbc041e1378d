"""Write docs/results/real-models/index.md from the runs that its announcement names.

    python scripts/study/real_models.py runs

Every number is read from the runs; real_models.md.j2 has the text around them, and the discussion,
docs/results/real-models/discussion.md, is written by hand. A model or run that was not measured is
named as missing.
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from scipy.stats import ttest_ind

from selfcorrect.evaluate.experiments import get_experiment
from selfcorrect.evaluate.experiments.tally import OVERALL
from selfcorrect.evaluate.figures.training_log import training_log
from selfcorrect.evaluate.run_folder import STAGE_RECORD
from selfcorrect.evaluate.statistics.bootstrap import (
    UNDEFINED,
    Draws,
    Estimate,
    estimate,
    standard_error,
)
from selfcorrect.evaluate.statistics.cells import MeasuredCell, measure_run
from selfcorrect.evaluate.statistics.formatting import (
    compact,
    compact_with_interval,
    p_value,
    without_leading_zero,
)
from selfcorrect.evaluate.statistics.significance import correct, wald_p
from selfcorrect.recipes.foundation.atomic_files import write_text
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.scripts.study.real_answers import FILE, NO_ANSWER, name_of
from selfcorrect.scripts.study.records import read_json, table, wrapped

DOCS = Path(__file__).resolve().parents[2] / "docs/results/real-models"
TEMPLATE = Path(__file__).with_name("real_models.md.j2")
UNTRAINED = "real-models"
LADDER = "real-ladder"
REQUESTS = ("Q", "Q+IF", "Q+neutral", "Q+inverted", "Q+unknown")
CHANCE = 1 / 3  # of three options
REWARDS = 10  # steps at the start and the end of training whose rewards are compared
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Checkpoint:
    """The cells of one checkpoint, by experiment and condition."""

    model: str
    seed: int
    step: int
    kl: float | None
    reward: float | None
    cells: dict[tuple[str, str], MeasuredCell] = field(default_factory=dict)

    def shown(self, experiment: str, condition: str, metric: str = "") -> str:
        """Return a metric (default: the headline metric) with its interval."""
        cell = self.cells.get((experiment, condition))
        metric = metric or get_experiment(experiment).headline
        found = cell and cell.bootstrap.estimates[OVERALL].get(metric)
        return _shown(found) if found else NOT_MEASURED

    def specific_effect(self, experiment: str = "bbq") -> np.ndarray | None:
        """Return the resamples of the headline metric under Q+neutral less that under Q+IF."""
        neutral, instructed = (self.cells.get((experiment, c)) for c in ("Q+neutral", "Q+IF"))
        if neutral is None or instructed is None:
            return None
        headline = get_experiment(experiment).headline
        minuend, subtrahend = (
            cell.bootstrap.replicates.metrics[headline] for cell in (neutral, instructed)
        )
        difference: np.ndarray = minuend - subtrahend
        return difference


def page(runs: Path, docs: Path) -> str:
    """Return the page as Markdown."""
    facts = read_json(runs / UNTRAINED / "run.json")
    letters = checkpoints_of(runs / UNTRAINED)
    texts = checkpoints_of(runs / f"{UNTRAINED}-text")
    reasoning = checkpoints_of(runs / f"{UNTRAINED}-reasoning")
    ladder = checkpoints_of(runs / LADDER)
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, autoescape=False, trim_blocks=True
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        facts=facts,
        missing=[name for name in facts["models"] if name not in {c.model for c in letters}],
        able=_able(letters, texts),
        bias=_by_request(letters, "bbq"),
        abstaining=_by_request(letters, "bbq", "share_unknown_ambiguous"),
        winogender=_by_request(letters, "winogender"),
        winogenerated=_by_request(letters, "winogenerated"),
        law_school=_by_request(letters, "law_school"),
        texts=_rows(texts, ["Q text", "Q+IF text"]),
        reasoning=_rows(reasoning, ["Q+CoT", "Q+IF+CoT"]),
        growth=_growth(ladder),
        steps=_steps(ladder),
        cost=_cost(runs / LADDER),
        answers=_answers(runs / LADDER, ladder),
        discussion=(docs / "discussion.md").read_text(encoding="utf-8").strip(),
    )


def checkpoints_of(run: Path) -> list[Checkpoint]:
    """Return the measured checkpoints of a run by size, seed and step; none without the folder."""
    if not run.is_dir():
        return []
    found: dict[tuple[str, int, int], Checkpoint] = {}
    for cells in measure_run(run, Draws()):
        for cell in cells:
            record = cell.record
            if record is None:
                raise InputError(f"{run}: holds models without a checkpoint.json")
            key = record.model, record.seed, record.step
            checkpoint = found.setdefault(key, Checkpoint(*key, record.kl, record.reward))
            checkpoint.cells[cell.experiment, cell.condition] = cell
    return list(found.values())


def _shown(found: Estimate) -> str:
    return compact_with_interval(found._asdict())


def _of(resamples: np.ndarray | None) -> Estimate:
    return UNDEFINED if resamples is None else estimate({"": resamples})[""]


def _rows(checkpoints: Iterable[Checkpoint], conditions: Sequence[str]) -> str:
    """Return BBQ's bias, accuracy and option mass by model and condition."""
    metrics = ("", "accuracy_disambiguated", "option_mass")
    heads = ["model", "condition", "bias", "decided questions right", "option mass"]
    return _table(
        heads,
        (
            [c.model, condition, *(c.shown("bbq", condition, metric) for metric in metrics)]
            for c in checkpoints
            for condition in conditions
        ),
    )


def _able(letters: Sequence[Checkpoint], texts: Sequence[Checkpoint]) -> str:
    by_text = {checkpoint.model: checkpoint for checkpoint in texts}

    def row(checkpoint: Checkpoint) -> list[str]:
        cell = checkpoint.cells.get(("bbq", "Q"))
        shown = [checkpoint.shown("bbq", "Q", m) for m in ("accuracy_disambiguated", "option_mass")]
        able = NOT_MEASURED
        if cell:
            able = _ability(cell.bootstrap.estimates[OVERALL]["accuracy_disambiguated"])
        other = by_text.get(checkpoint.model)
        right = "accuracy_disambiguated"
        text = other.shown("bbq", "Q text", right) if other else NOT_MEASURED
        return [checkpoint.model, *shown, able, text]

    heads = ["model", "decided questions right, by letters", "option mass", "above chance (.33)?"]
    return _table([*heads, "right, by text"], map(row, letters))


def _ability(accuracy: Estimate) -> str:
    return "yes" if accuracy.low > CHANCE else "no"


def _by_request(letters: Sequence[Checkpoint], experiment: str, metric: str = "") -> str:
    """Return a metric by model and request; for the headline metric the specific effect too."""
    # Some experiments have no such condition.
    requests = [r for r in REQUESTS if any((experiment, r) in c.cells for c in letters)]
    heads = ["model", *requests, *([] if metric else ["Q+neutral less Q+IF"])]
    return _table(
        heads,
        (
            [
                checkpoint.model,
                *(checkpoint.shown(experiment, request, metric) for request in requests),
                *([] if metric else [_shown(_of(checkpoint.specific_effect(experiment)))]),
            ]
            for checkpoint in letters
            if any(name == experiment for name, _ in checkpoint.cells)
        ),
    )


def growths(ladder: Sequence[Checkpoint]) -> list[dict[str, Any]]:
    """Return the growth of the specific effect of each finished job, with Holm's p over models.

    Holm's correction is over the models of each seed. A job is finished if it was measured at the
    last step of any; keys: model, run (the seed), steps, effects, growth, p_value, p_adjusted.
    """
    end = max((checkpoint.step for checkpoint in ladder), default=0)
    jobs: dict[tuple[str, int], list[Checkpoint]] = {}
    for checkpoint in ladder:
        jobs.setdefault((checkpoint.model, checkpoint.seed), []).append(checkpoint)
    rows: list[dict[str, Any]] = []
    for (model, seed), checkpoints in jobs.items():
        first, last = checkpoints[0], checkpoints[-1]
        before, after = first.specific_effect(), last.specific_effect()
        if first is last or last.step < end or before is None or after is None:
            continue
        degrees = last.cells["bbq", "Q+IF"].bootstrap.replicates.degrees
        growth = after - before
        p = wald_p(float(growth[0]), standard_error(growth), degrees)
        rows.append(
            {
                "model": model,
                "run": str(seed),
                "family": "growth",
                "steps": (first.step, last.step),
                "effects": (_of(before), _of(after)),
                "growth": _of(growth),
                "p_value": None if np.isnan(p) else p,
            }
        )
    correct(rows)
    return rows


def _growth(ladder: Sequence[Checkpoint]) -> str:
    def row(found: dict[str, Any]) -> list[str]:
        first, last = found["steps"]
        ps = [found["p_value"], found["p_adjusted"]]
        return [
            found["model"],
            found["run"],
            f"{first} to {last}",
            *map(_shown, (*found["effects"], found["growth"])),
            *("–" if p is None else without_leading_zero(p_value(p)) for p in ps),
        ]

    heads = ["model", "seed", "steps", "specific effect, first", "last", "growth", "p", "Holm's p"]
    return _table(heads, map(row, growths(ladder)))


def _steps(ladder: Sequence[Checkpoint]) -> str:
    columns: list[tuple[str, Callable[[Checkpoint], object]]] = [
        ("model", lambda c: c.model),
        ("seed", lambda c: c.seed),
        ("step", lambda c: c.step),
        ("KL", lambda c: compact(c.kl)),
        *((r, lambda c, r=r: c.shown("bbq", r)) for r in REQUESTS),  # type: ignore[misc]
        ("specific effect", lambda c: _shown(_of(c.specific_effect()))),
        ("option mass, Q", lambda c: c.shown("bbq", "Q", "option_mass")),
        ("right, Q", lambda c: c.shown("bbq", "Q", "accuracy_disambiguated")),
        ("right, Q+IF", lambda c: c.shown("bbq", "Q+IF", "accuracy_disambiguated")),
        ("unknown, Q", lambda c: c.shown("bbq", "Q", "share_unknown_ambiguous")),
        ("unknown, Q+IF", lambda c: c.shown("bbq", "Q+IF", "share_unknown_ambiguous")),
        ("Winogender r, Q", lambda c: c.shown("winogender", "Q")),
        ("Winogender r, Q+IF", lambda c: c.shown("winogender", "Q+IF")),
    ]
    heads = [name for name, _ in columns]
    return _table(heads, ([take(c) for _, take in columns] for c in ladder))


def _cost(run: Path) -> str:
    """Return hours, memory and rewards of each finished job."""
    log = training_log(run)
    rows = []
    for (model, seed), steps in log.groupby(["model", "seed"]):
        record = run / str(model) / f"seed-{seed}" / "ppo" / STAGE_RECORD
        if not record.is_file():
            continue
        stage = read_json(record)
        hours = [stage["seconds"] - stage["evaluation_seconds"], stage["evaluation_seconds"]]
        memory = stage["peak_memory_mb"] / 1024
        rewards = steps.sort_values("step")["reward"].to_numpy()
        first, last = rewards[:REWARDS], rewards[-REWARDS:]
        interval = ttest_ind(last, first, equal_var=False).confidence_interval()
        change = Estimate(last.mean() - first.mean(), interval.low, interval.high)
        row = [model, seed, *(f"{seconds / 3600:.1f}" for seconds in hours), f"{memory:.1f}"]
        rows.append([*row, compact(first.mean()), compact(last.mean()), _shown(change)])
    heads = ["model", "seed", "PPO, hours", "measuring, hours", "most memory, GB"]
    return _table([*heads, f"reward, first {REWARDS} steps", f"last {REWARDS}", "change"], rows)


def _answers(run: Path, ladder: Iterable[Checkpoint]) -> str:
    """Return what the policies' sampled answers to PPO's own prompts mean (real_answers.py)."""
    counted = read_json(run / FILE) if (run / FILE).is_file() else {}
    shares = [  # of the answers that can be read: request, context, meaning
        *((kind, "ambiguous", "undecided") for kind in ("plain", "fair", "neutral", "inverted")),
        *((kind, "ambiguous", "stereotype") for kind in ("plain", "inverted")),
    ]

    def row(checkpoint: Checkpoint) -> list[object]:
        identity = checkpoint.model, checkpoint.seed, checkpoint.step
        answers = pd.DataFrame(counted[name_of(*identity)])
        readable = answers[answers["meaning"] != NO_ANSWER]
        decided = readable[readable["context"] == "decided"]
        counts = [(readable[readable["well_formed"]], answers), (readable, answers)]
        counts.append((decided[decided["meaning"] == "right"], decided))
        for kind, context, meaning in shares:
            group = readable[(readable["request"] == kind) & (readable["context"] == context)]
            counts.append((group[group["meaning"] == meaning], group))
        return [*identity, *(_count(chosen, group) for chosen, group in counts)]

    heads = ["model", "seed", "step", "well-formed", "readable", "right, decided"]
    heads += [f"{meaning}, {kind}" for kind, _, meaning in shares]
    known = [c for c in ladder if name_of(c.model, c.seed, c.step) in counted]
    return _table(heads, map(row, known))


def _count(chosen: pd.DataFrame, group: pd.DataFrame) -> str:
    return f"{chosen['number'].sum()} of {group['number'].sum()}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table, or a sentence where nothing was measured."""
    rows = list(rows)
    return table(heads, rows) if rows else f"{NOT_MEASURED.capitalize()}."


def main(words: Sequence[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, help="folder of the run folders")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of index.md")
    arguments = parser.parse_args(words)
    for needed in (arguments.runs / UNTRAINED / "run.json", arguments.docs / "discussion.md"):
        if not needed.is_file():
            parser.error(
                f"{needed}: missing; `selfcorrect evaluate {UNTRAINED}` writes run.json, and "
                "discussion.md is written by hand"
            )
    write_text(arguments.docs / "index.md", wrapped(page(arguments.runs, arguments.docs)))


if __name__ == "__main__":
    main()
