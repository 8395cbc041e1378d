"""Probe hidden states for the stereotype, with a linear probe per layer, held out by template.

The pairs are BBQ's ambiguous questions: two options that name people, one of which agrees with the
stereotype. A probe reads an option's hidden state minus the mean of its pair (hidden_states.py), so
it sees only the difference between the options, and predicts which option agrees. The negative and
the non-negative question of a block have the same two people and opposite answers. A probe that
uses only the person is right in exactly one of them, a probe that uses only the question sees no
difference, and the same holds for any sum of both: being right takes their combination.

    <checkpoint>/probe/bbq.parquet    the probes of one checkpoint, with their settings
    <run>/probe.parquet               those of all its checkpoints
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from selfcorrect.evaluate.experiments.bbq import BBQ
from selfcorrect.evaluate.measuring.cell_files import DATE, METADATA_KEY
from selfcorrect.evaluate.measuring.plan import EvaluationPlan, PlannedCell, Question
from selfcorrect.evaluate.measuring.run import recipe_plan
from selfcorrect.evaluate.measuring.sources import weights_of
from selfcorrect.evaluate.probe.linear_probe import (
    INNER_FOLDS,
    NUM_SHUFFLES,
    STRENGTHS,
    probe_layers,
)
from selfcorrect.evaluate.prompts.dialogue import reads_clock, render
from selfcorrect.evaluate.prompts.thinking import with_thinking
from selfcorrect.evaluate.prompts.tokenized import PromptTooLong, Request
from selfcorrect.evaluate.run_folder import find_checkpoints
from selfcorrect.evaluate.scoring.load_model import load_model
from selfcorrect.evaluate.statistics.files import write_table
from selfcorrect.recipes.foundation.atomic_files import atomic_file
from selfcorrect.recipes.foundation.checksums import file_has_valid_checksum
from selfcorrect.recipes.foundation.errors import InputError, RunFailure
from selfcorrect.recipes.foundation.locks import hold_lock
from selfcorrect.recipes.foundation.progress import Progress, no_progress
from selfcorrect.recipes.series import Measured

CHECKPOINT_FILE = Path("probe") / "bbq.parquet"
RUN_FILE = "probe.parquet"

# Bump when the same settings would give other numbers; older probes are then repeated.
_FORMAT = 1


@dataclass(frozen=True)
class Pairs:
    """The pairs of one condition: the two people of each ambiguous question.

    `frame` has a row per pair: `item`, `order`, `cluster` (the template), `category`, and `first`,
    whether the first of the two options agrees with the stereotype. `requests` are the prompts with
    their options; `left_out` counts the items that are not probed, by reason.
    """

    frame: pd.DataFrame
    requests: list[Request]
    left_out: dict[str, int]


# --- a run ---------------------------------------------------------------------------------------


def run_plan(
    recipe: Measured, run: Path, conditions: Sequence[str], limit: int | None, seed: int | None
) -> EvaluationPlan:
    """Plan BBQ as the recipe evaluates it; `limit` and `seed` default to the recipe's."""
    settings: dict[str, Any] = {
        "experiments": [BBQ.name],
        "conditions": list(conditions),
        "limit": recipe.evaluate.limit if limit is None else limit,
        "seed": recipe.evaluate.seed if seed is None else seed,
        "permutations": 1,
    }
    evaluate = recipe.evaluate.model_copy(update=settings)
    return recipe_plan(recipe.model_copy(update={"evaluate": evaluate}), run)


def probe_run(
    recipe: Measured,
    run: Path,
    plan: EvaluationPlan,
    *,
    folds: int = 5,
    seed: int = 0,
    progress: Progress = no_progress,
) -> pd.DataFrame:
    """Probe every checkpoint that lacks these probes; write and return the run's probe.parquet.

    The columns are those of `probe_checkpoint`, with `model`, `parameters`, `seed` and `step`.
    """
    check_plan(plan, folds)
    trusted = {model.name for model in recipe.models if model.trust_remote_code}
    tables = []
    for checkpoint in find_checkpoints(run):
        record, path = checkpoint.record, checkpoint.folder / CHECKPOINT_FILE
        if not is_probed(path, plan, folds, seed, record.weights_digest):
            name = f"{record.model} seed {record.seed} step {record.step}"
            with weights_of(checkpoint) as location:
                model, tokenizer = load_model(location, trust_remote_code=record.model in trusted)
                probe_checkpoint(
                    plan,
                    model,
                    tokenizer,
                    path,
                    folds=folds,
                    seed=seed,
                    weights=record.weights_digest,
                    progress=_with_name(progress, name),
                )
        rows = read_probe(path)[0]
        for index, column in enumerate(("model", "parameters", "seed", "step")):
            rows.insert(index, column, getattr(record, column))
        tables.append(rows)
    if not tables:
        raise InputError(f"{run}: no checkpoints to probe; train the run first")
    frame = pd.concat(tables, ignore_index=True)
    with hold_lock(run, math.inf), atomic_file(run / RUN_FILE) as temporary:
        frame.to_parquet(temporary, compression="zstd", index=False)
    return frame


def _with_name(progress: Progress, name: str) -> Progress:
    return lambda stage, done, total: progress(f"{name}, {stage}", done, total)


# --- one checkpoint ------------------------------------------------------------------------------


def probe_checkpoint(
    plan: EvaluationPlan,
    model: Any,
    tokenizer: Any,
    path: Path,
    *,
    folds: int = 5,
    seed: int = 0,
    weights: str | None = None,
    progress: Progress = no_progress,
) -> None:
    """Probe every layer of `model` under every condition of the plan, and write `path`.

    There is one row per `trained_on`, `condition`, `held_out`, `layer` and `category` (with
    "overall"): `accuracy` with its 95 % interval `low`, `high`, `baseline_accuracy`, `num_pairs`
    and `num_clusters` (templates). The file's metadata holds the settings, with `weights`, the
    digest of the model's weights.

    Raises InputError for a plan that cannot be probed, RunFailure if hidden states are not finite.
    """
    from selfcorrect.evaluate.probe.hidden_states import contrasts

    cells = check_plan(plan, folds)
    vectors: dict[str, np.ndarray] = {}
    for cell in cells:
        pairs = pairs_of(cell, tokenizer)
        try:
            vectors[cell.condition] = contrasts(
                model, tokenizer, pairs.requests, progress=_with_name(progress, cell.name)
            )
        except PromptTooLong as error:
            item = pairs.frame["item"].iloc[error.index]
            raise InputError(
                f"{cell.name}, item {item}: {error}; use a model with a longer context"
            ) from None
        except (InputError, RunFailure) as error:
            raise type(error)(f"{cell.name}: {error}") from None
    rows = probe_layers(vectors, pairs.frame, folds=folds, seed=seed, progress=progress)
    states = next(iter(vectors.values()))
    settings = {
        "weights": weights,
        "settings_digest": settings_digest(plan, folds, seed),
        "experiment": BBQ.name,
        "conditions": list(vectors),
        "folds": folds,
        "seed": seed,
        "num_layers": states.shape[1],
        "hidden_size": states.shape[2],
        "stored_as": str(states.dtype),
        "left_out": pairs.left_out,
    }
    if reads_clock(tokenizer, cells[0].style):
        settings[DATE] = cells[0].style.date
    write_table(path, rows, settings)


def settings_digest(plan: EvaluationPlan, folds: int, seed: int) -> str:
    """Return the SHA-256 of everything but the weights that determines a probe's numbers."""
    settings = [_FORMAT, plan.settings_digest, folds, seed, STRENGTHS, INNER_FOLDS, NUM_SHUFFLES]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def is_probed(
    path: Path, plan: EvaluationPlan, folds: int, seed: int, weights: str | None = None
) -> bool:
    """Return whether `path` is an undamaged file of these settings (and weights, if known)."""
    try:
        settings = read_probe(path)[1]
    except InputError:
        return False
    if weights is not None and settings.get("weights") not in (None, weights):
        return False
    if settings.get(DATE) not in (None, plan.cells[0].style.date):
        return False
    return bool(settings["settings_digest"] == settings_digest(plan, folds, seed))


def read_probe(path: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return the rows and settings of a probe file; raises InputError if missing or damaged."""
    try:
        if not file_has_valid_checksum(path):
            raise ValueError("checksum mismatch")
        table = pq.read_table(path)
        settings = json.loads(table.schema.metadata[METADATA_KEY])
        return table.to_pandas(), {**settings, "settings_digest": settings["settings_digest"]}
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
        raise InputError(
            f"{path}: missing, or not an intact probe file; run `selfcorrect probe` again"
        ) from None


# --- the pairs ------------------------------------------------------------------------------


def check_plan(plan: EvaluationPlan, folds: int) -> list[PlannedCell]:
    """Return the plan's cells; raises InputError if they cannot be probed."""
    for cell in plan.cells:
        if cell.experiment != BBQ.name:
            raise InputError(f"{cell.name}: only {BBQ.name} can be probed")
        if cell.sampling is not None:
            raise InputError(
                f"{cell.name}: probes do not support sampled reasoning; choose conditions "
                "without it, for example Q,Q+IF"
            )
    if not plan.cells:
        raise InputError("no condition to probe; name one, for example --conditions Q")
    left_out, questions = _choose_questions(plan.cells[0])
    templates = len({question.item.cluster for question in questions})
    needed = max(folds, 4)  # the training part of a fold is split by template again
    if templates < needed:
        raise InputError(
            f"{BBQ.name}: {templates} templates have ambiguous questions to probe "
            f"(left out: {_in_words(left_out)}); {folds} folds need {needed}; "
            "raise --limit or lower --folds"
        )
    return plan.cells


def pairs_of(cell: PlannedCell, tokenizer: Any) -> Pairs:
    """Return the pairs of one condition, in the order of the plan; all conditions have the same."""
    left_out, questions = _choose_questions(cell)
    style = with_thinking(tokenizer, cell.style)
    rows, requests = [], []
    for question in questions:
        facts = question.item.facts
        shown = [int(index) for index in question.order]
        people = [i for i, index in enumerate(shown) if index != facts["unknown"]]
        rows.append(
            {
                "item": question.item.id,
                "order": question.order,
                "cluster": question.item.cluster,
                "category": question.item.category,
                "first": shown[people[0]] == facts["stereotyped"],
            }
        )
        prompt = render(tokenizer, question.turns, style)
        requests.append((prompt, tuple(question.options[i] for i in people)))
    return Pairs(pd.DataFrame(rows), requests, left_out)


def _choose_questions(cell: PlannedCell) -> tuple[dict[str, int], list[Question]]:
    """Return the number of items left out by reason, and the questions to probe."""
    pooled = BBQ.overall_categories(sorted({item.category for item in cell.items}))
    left_out: dict[str, set[str]] = {}
    kept = []
    for question in cell.questions():
        item = question.item
        if item.facts["context"] != "ambiguous":
            reason = "the context decides"
        elif item.category not in pooled:
            reason = "intersectional, or a name stands for the group"
        elif item.facts["stereotyped"] is None:
            reason = "no option, or both, agree with the stereotype"
        else:
            kept.append(question)
            continue
        left_out.setdefault(reason, set()).add(item.id)
    return {reason: len(items) for reason, items in left_out.items()}, kept


def _in_words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {reason}" for reason, number in counts.items()) or "none"
