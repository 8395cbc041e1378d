"""The paper's published values, under this project's names."""

from selfcorrect.evaluate.experiments import get_experiment
from selfcorrect.evaluate.figures.paper import (
    LARGEST,
    READ_OFF,
    SIZES,
    TABLE,
    published_against_size,
    published_against_steps,
)


def test_stated_numbers_are_of_the_largest_model():
    values = {(row.experiment, row.steps, row.condition): row.value for row in TABLE}
    assert values == {
        ("bbq", 800, "Q"): 0.1845,
        ("bbq", 800, "Q+IF"): 0.1056,
        ("bbq", 800, "Q+IF+CoT"): 0.0301,
        ("winogender", 50, "Q"): 0.402,
        ("winogender", 50, "Q+IF"): 0.159,
        ("winogender", 50, "Q+IF+CoT"): -0.009,
        ("winogender", 50, "Match stats"): 0.916,
        ("law_school", 800, "Q"): -0.031,
        ("law_school", 800, "Q+IF"): 0.047,
        ("law_school", 800, "Q+IF+CoT"): 0.071,
    }
    assert {row.parameters for row in TABLE} == {LARGEST} == {175_000_000_000}
    assert all(row.exact for row in TABLE)


def test_values_read_off_figures_are_marked_and_never_double_a_stated_one():
    assert not any(row.exact for row in READ_OFF)
    assert all("about" in row.in_words for row in READ_OFF)
    places = [(r.experiment, r.condition, r.parameters, r.steps) for r in (*TABLE, *READ_OFF)]
    assert len(set(places)) == len(places)
    assert {row.parameters for row in READ_OFF} <= set(SIZES)


def test_published_metrics_are_headline_metrics():
    for row in (*TABLE, *READ_OFF):
        assert row.metric == get_experiment(row.experiment).headline


def test_published_values_against_steps_and_size():
    law = published_against_steps("law_school", "difference")
    assert {row.parameters for row in law} == {LARGEST}
    assert sorted({row.steps for row in law}) == [50, 200, 600, 800, 1000]
    by_size = published_against_size("law_school", "difference")
    assert {row.steps for row in by_size} == {800}
    assert {row.parameters for row in by_size} == {52_000_000_000, LARGEST}
    assert {row.steps for row in published_against_size("winogender", "correlation")} == {50}
    assert published_against_steps("bbq", "accuracy_ambiguous") == []
    assert published_against_size("crows_pairs", "share_stereotyped") == []


def test_published_values_in_words():
    (stated,) = [row for row in TABLE if row.value == 0.1845]
    assert stated.in_words == "Q 0.1845 (175B, 800 steps)"
    (read,) = [row for row in READ_OFF if row.parameters == SIZES[0]]
    assert read.in_words == "Q about 0 (0.81B, 800 steps)"
