"""The table that a run or an evaluation prints at its end."""

import pandas as pd
from rich.console import Console

from selfcorrect.evaluate.report.terminal import closing_table
from selfcorrect.evaluate.results import load, summarise, write_results
from tests.support.recorded_run import SMALL, Size, record_cell, record_run


def printed(table):
    """Return the table as a terminal of 100 columns shows it."""
    console = Console(width=100, record=True, file=None, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_run_table(recorded_run):
    """First and last step in at most 100 columns."""
    text = printed(closing_table(load(recorded_run, num_resamples=50)))
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 100
    steps = [line.split()[1] for line in text.splitlines() if line.split()[:1] == ["nano"]]
    assert steps == ["0", "10"]
    assert "Match stats" in text


def test_seeds_are_one_row_with_their_mean():
    """Its interval is Student's over the seeds, whose number is beside it."""
    rows = [
        {"run": "r", "model": "m", "step": step, "seed": seed, "experiment": "bbq"}
        | {"condition": "Q", "category": "overall", "metric": "bias_ambiguous"}
        | {"value": value, "low": 0.0, "high": 0.9}
        for step, values in ((0, [0.1, 0.2, 0.6]), (5, [0.4]))
        for seed, value in enumerate(values)
    ]
    lines = [line.split() for line in printed(closing_table(pd.DataFrame(rows))).splitlines()]
    assert ["m", "3", "0", "Q", ".30", "[−.36,", ".96]"] in lines  # .3 -+ 4.303 * .1528
    assert ["m", "1", "5", "Q", ".40", "[.00,", ".90]"] in lines


def test_table_of_stand_alone_models(tmp_path):
    for experiment in ("bbq", "law_school"):
        record_cell(tmp_path / "model", experiment, "Q", 0.4, SMALL)
    frame = summarise(tmp_path / "model", "org/a-rather-long-model-name-7B[1]", num_resamples=50)
    text = printed(closing_table(frame))
    first_column = "".join(line.split()[0] for line in text.splitlines()[5:] if line.strip())
    assert "org/a-rather-long-model-name-7B[1]" in first_column  # folded, never cut
    assert "…" not in text
    (line,) = [line for line in text.splitlines() if line.strip().startswith("BBQ")]
    assert line.split()[-2:] == [".90", "32"]  # option mass, prompts pooled


def test_undefined_values(tmp_path):
    run = record_run(
        tmp_path / "run", Size(models=(("one", 10),), steps=(0, 2), occupations=1, templates=2)
    )
    frame, statistics = write_results(run, num_resamples=20)
    cell = next(cell for cell in statistics["cells"] if cell["experiment"] == "winogender")
    assert cell["metrics"]["overall"]["correlation"] == {"value": None, "low": None, "high": None}
    mine = frame[(frame["metric"] == "correlation") & (frame["category"] == "overall")]
    assert mine["value"].isna().all()
    assert "–" in printed(closing_table(frame)).split("no bias;")[0]


def test_unbiased_values_in_the_caption():
    rows = [
        {"model": "m", "step": None, "seed": None, "experiment": name, "condition": "Q"}
        | {"category": "overall", "metric": metric, "value": 0.6, "low": 0.5, "high": 0.7}
        | {"num_items": 9}
        for name, metric in [("bbq", "bias_ambiguous"), ("crows_pairs", "share_stereotyped")]
    ]
    text = " ".join(printed(closing_table(pd.DataFrame(rows))).split())
    assert "0: no bias (.50 for CrowS-Pairs)" in text
    assert "0: no bias;" in " ".join(printed(closing_table(pd.DataFrame(rows[:1]))).split())


def test_sample_without_pooled_categories():
    row = {"model": "m", "step": None, "seed": None, "experiment": "bbq", "condition": "Q"}
    row |= {"category": "Religion (names)", "metric": "bias_ambiguous", "value": 0.6}
    row |= {"low": 0.5, "high": 0.7, "num_items": 9}
    text = " ".join(printed(closing_table(pd.DataFrame([row]))).split())
    assert "BBQ Q 0 0: no bias" in text and "--limit" in text
