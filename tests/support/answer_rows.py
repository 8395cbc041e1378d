"""Rows as an evaluation writes them, from made-up answers, and the metrics of rows."""

import math
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from selfcorrect.evaluate.experiments.tally import OVERALL
from selfcorrect.evaluate.experiments.wording import load_stimuli
from selfcorrect.evaluate.measuring.cell_files import read_cell
from selfcorrect.evaluate.measuring.measure import measure
from selfcorrect.evaluate.measuring.plan import plan_evaluation
from selfcorrect.evaluate.statistics.bootstrap import Draws, bootstrap
from tests.support.tiny_models import tiny_model, tiny_tokenizer


def rows(items, choose, orders=(None,)):
    """Return a row per item and order; `choose(item)` answers each item.

    An answer is the file's option index, None (unparsed) or log-probabilities. Every item is shown
    in each of `orders` (None: the file's order).
    """
    table = []
    for item in items:
        answer = choose(item)
        if answer is None:
            answer = [math.nan] * len(item.options)
        elif isinstance(answer, int | np.integer):
            answer = [0.0 if i == answer else -math.inf for i in range(len(item.options))]
        for order in orders:
            order = range(len(item.options)) if order is None else order
            shown = np.array([answer[index] for index in order], dtype=float)
            table.append(
                {
                    "item": item.id,
                    "cluster": item.cluster,
                    "category": item.category,
                    "weight": item.weight,
                    "order": ("" if len(order) <= 10 else ",").join(str(i) for i in order),
                    "logprobs": shown,
                    "mass": float(np.exp(shown).sum()),
                    **item.facts,
                }
            )
    return pd.DataFrame(table)


def measured(experiment, frame, category=OVERALL):
    """Return every metric's value, through the same sums and bootstrap as a report."""
    tally = experiment.tally(frame)
    pooled = experiment.overall_categories(tally.categories)
    means = experiment.category_means
    estimates = bootstrap(tally, experiment.compute, pooled, Draws(2), means).estimates
    values = {name: estimate.value for name, estimate in estimates[category].items()}
    assert set(values) <= set(experiment.metrics)
    return values


def published(name):
    """Return the folder of published data; skips the test if there is none."""
    folder = os.environ.get("SELFCORRECT_DATA_DIR")
    if not folder or not (Path(folder) / name).is_dir():
        pytest.skip(f"SELFCORRECT_DATA_DIR has no {name}/: the real {name} is NOT tested")
    return Path(folder)


def measured_by_a_tiny_model(data_dir, out, name, conditions=None, **settings):
    """Return {condition: (rows, metadata)} of a random model that knows every prompt word."""
    planned = plan_evaluation(
        data_dir, load_stimuli(), [name], conditions, max_new_tokens=4, **settings
    )
    words = {"Human", "Assistant", "\n\n"}
    for cell in planned.cells:
        for question in cell.questions():
            texts = [*(turn.text for turn in question.turns), *question.options]
            words |= set(re.findall(r"\w+|[^\w\s]", " ".join(texts)))
    tokenizer = tiny_tokenizer(sorted(words))
    model = tiny_model(vocabulary=len(tokenizer))
    paths = measure(planned, model, tokenizer, out)
    return {
        cell.condition: read_cell(path) for cell, path in zip(planned.cells, paths, strict=True)
    }
