"""Figures: the values they draw, the gaps they leave, and the reasons they give."""

from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from selfcorrect.evaluate.figures import curves, gallery, runs
from selfcorrect.evaluate.figures.details import (
    beside_the_bias,
    by_category,
    clusters_against_fact,
    scatter_columns,
)
from selfcorrect.evaluate.figures.maps import effects_by_size_and_step, size_by_steps
from selfcorrect.evaluate.figures.panels import (
    ABOUT,
    LOOKS,
    STATED,
    condition_looks,
    step_axis,
)
from selfcorrect.evaluate.figures.paper import LARGEST
from selfcorrect.evaluate.figures.paper_points import PUBLISHED
from selfcorrect.evaluate.figures.select import NothingToDraw
from selfcorrect.evaluate.results import load_items, write_results
from selfcorrect.recipes.foundation.errors import InputError
from tests.support.recorded_run import Size, record_run

SMALL = Size(steps=(0, 2, 10), templates=4, blocks=1, occupations=10, students=10)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return record_run(tmp_path_factory.mktemp("figures") / "run", SMALL)


@pytest.fixture(scope="module")
def results(run):
    return write_results(run, 50)


@pytest.fixture(scope="module")
def pronouns(run):
    return load_items(run, "winogender", columns=scatter_columns("winogender"))


def headline(frame, experiment, **where):
    """The overall rows of the experiment's headline metric, in the order of the steps."""
    metric = {"bbq": "bias_ambiguous", "winogender": "correlation", "law_school": "difference"}
    rows = frame[(frame["experiment"] == experiment) & (frame["category"] == "overall")]
    rows = rows[rows["metric"] == metric[experiment]]
    for name, value in where.items():
        rows = rows[rows[name] == value]
    return rows.sort_values(["parameters", "step"])


def line_of(ax, label):
    (line,) = [line for line in ax.get_lines() if line.get_label() == label]
    return line


def test_against_steps_draws_the_values_of_the_table(results):
    frame, _ = results
    figure = curves.against_steps(frame, "small")
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles == ["BBQ", "Winogender", "Law school admission"]
    mine = frame[
        (frame["model"] == "small")
        & (frame["metric"] == "correlation")
        & (frame["category"] == "overall")
        & (frame["condition"] == "Match stats")
    ].sort_values("step")
    line = line_of(figure.axes[1], "Match stats")
    assert list(line.get_xdata()) == [0, 2, 10]
    np.testing.assert_allclose(line.get_ydata(), mine["value"].astype(float))


def test_models_share_the_y_axis_of_an_experiment(results):
    frame, _ = results
    spans = [
        [ax.get_ylim() for ax in curves.against_steps(frame, model).axes]
        for model in ("nano", "small")
    ]
    assert spans[0] == spans[1]


def test_missing_and_undefined_values_are_gaps(results):
    frame, _ = results
    frame = frame.copy()
    here = (frame["step"] == 2) & (frame["model"] == "small") & (frame["condition"] == "Q+IF")
    frame.loc[here & (frame["experiment"] == "winogender"), ["value", "low", "high"]] = np.nan
    frame = frame[~(here & (frame["experiment"] == "bbq"))]
    bbq, winogender, _ = curves.against_steps(frame, "small").axes
    for ax in (bbq, winogender):
        assert np.isnan(line_of(ax, "Q+IF").get_ydata()[1])
        assert np.isfinite(line_of(ax, "Q").get_ydata()).all()


def test_against_size_defaults_to_the_last_common_step(results):
    frame, _ = results
    frame = frame[~((frame["model"] == "small") & (frame["step"] == 10))]
    figure = curves.against_size(frame)
    assert "After 2 RLHF steps" in figure.get_suptitle()
    mine = frame[
        (frame["step"] == 2)
        & (frame["metric"] == "bias_ambiguous")
        & (frame["condition"] == "Q")
        & (frame["category"] == "overall")
    ].sort_values("parameters")
    values = line_of(figure.axes[0], "Q").get_ydata()
    np.testing.assert_allclose(values, mine["value"].astype(float))


def test_several_seeds_are_drawn_as_mean_and_range(tmp_path):
    size = Size(models=(("nano", 8192),), seeds=(0, 1), steps=(0, 10), templates=4, blocks=1)
    frame, _ = write_results(record_run(tmp_path / "run", size), 20)
    ax = curves.against_steps(frame, "nano").axes[1]
    rows = frame[
        (frame["metric"] == "correlation")
        & (frame["category"] == "overall")
        & (frame["condition"] == "Q+IF")
        & (frame["step"] == 10)
    ]
    assert len(rows) == 2
    assert line_of(ax, "Q+IF").get_ydata()[-1] == pytest.approx(rows["value"].mean())
    band = ax.collections[1].get_paths()[0].vertices
    assert {rows["value"].min(), rows["value"].max()} <= set(band[:, 1])


def test_paper_conditions_differ_in_colour_and_marker():
    assert len({look["color"] for look in LOOKS.values()}) == len(LOOKS)
    assert len({look["marker"] for look in LOOKS.values()}) == len(LOOKS)


def test_figures_of_a_run_repeat_to_the_byte(run, results, tmp_path):
    frame, statistics = results
    drawn, notes = gallery.draw_run(frame, statistics, run, tmp_path)
    assert notes == []
    names = [drawing.name for drawing in drawn]
    experiments = ["bbq", "winogender", "law_school"]
    assert names == [
        *(f"sizes-{name}" for name in experiments), "steps-small", "size", "effects",
        *(f"map-{kind}{name}" for name in experiments for kind in ("", "effects-")),
        "beside-bbq", "categories-bbq", "beside-winogender", "beside-law_school",
        "occupations", "training",
    ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
        + [f"sizes-{name}.pdf" for name in experiments]
    )
    first = (tmp_path / "size.svg").read_bytes(), (tmp_path / "size.png").read_bytes()
    curves.save(curves.against_size(frame, 0, 10), tmp_path, "size")
    assert ((tmp_path / "size.svg").read_bytes(), (tmp_path / "size.png").read_bytes()) == first
    assert all("undefined" not in drawing.alt for drawing in drawn)
    assert "Match stats" in drawn[1].alt


def test_missing_figures_have_a_reason(tmp_path):
    size = Size(models=(("one", 10),), steps=(0,), templates=3, blocks=1)
    frame, statistics = write_results(record_run(tmp_path / "run", size), 20)
    for path in (tmp_path / "run").rglob("winogender.*.parquet"):
        path.unlink()
    drawn, notes = gallery.draw_run(frame, statistics, tmp_path / "run", tmp_path / "figures")
    assert drawn == []
    assert any("Metric against model size: metric against model size needs two" in n for n in notes)
    reasons = " ".join(notes)
    for reason in ("two sizes and two steps or more", "needs two categories and two steps",
                   "no rows of single occupations", "record neither"):  # fmt: skip
        assert reason in reasons
    with pytest.raises(NothingToDraw, match="two steps"):
        curves.against_steps(frame, "one")


# --- size by steps --------------------------------------------------------------------------------


def test_map_of_size_by_steps(results):
    frame, statistics = results
    figure = size_by_steps(frame, "winogender")
    panels = [ax for ax in figure.axes if ax.get_title(loc="left")]
    assert [ax.get_title(loc="left") for ax in panels] == ["Q", "Q+IF", "Q+IF+CoT", "Match stats"]
    expected = headline(frame, "winogender", condition="Q+IF")["value"].to_numpy(dtype=float)
    (mesh,) = panels[1].collections
    np.testing.assert_allclose(np.asarray(mesh.get_array()), expected.reshape(2, 3))
    assert [text.get_text() for text in panels[0].get_yticklabels()] == ["8.2k", "509k"]
    assert [text.get_text() for text in panels[0].get_xticklabels()] == ["0", "2", "10"]
    low, high = mesh.get_clim()
    assert low == -high  # the colour in the middle is the value of no bias
    assert not any(list(ax.patches) for ax in panels)
    words = curves.in_words(figure)
    assert f"small (509k) {expected[3]:.3f}" in words
    effects = effects_by_size_and_step(statistics["effects"], "bbq")
    titles = [ax.get_title(loc="left") for ax in effects.axes if ax.get_title(loc="left")]
    assert titles == ["Q − Q+IF", "Q − Q+IF+CoT"]


def test_map_hatches_missing_and_undefined_cells(results):
    frame, _ = results
    frame = frame.copy()
    gone = (frame["step"] == 2) & (frame["model"] == "small") & (frame["condition"] == "Q")
    nan = (frame["step"] == 10) & (frame["model"] == "nano") & (frame["condition"] == "Q")
    frame.loc[nan, ["value", "low", "high"]] = np.nan
    figure = size_by_steps(frame[~gone], "bbq")
    ax = figure.axes[0]
    assert np.ma.getmaskarray(ax.collections[0].get_array()).ravel().tolist() == [
        False, False, True, False, True, False,
    ]  # fmt: skip
    places = {patch.get_xy(): patch.get_hatch() for patch in ax.patches}
    assert set(places) == {(2, 0), (1, 1)}
    assert len(set(places.values())) == 2
    assert legend_of(figure) == ["not measured", "undefined"]
    assert not figure.axes[1].patches
    assert "nano (8.2k) " in curves.in_words(figure)
    assert " to undefined" in curves.in_words(figure)


def test_map_marks_effects_that_exclude_zero(results):
    _, statistics = results
    rows = [
        {**row, "excludes_zero": row["model"] == "small" and row["step"] == 10}
        for row in statistics["effects"]
    ]
    figure = effects_by_size_and_step(rows, "bbq")
    assert legend_of(figure) == ["95 % interval excludes zero"]
    for ax in figure.axes[:2]:
        (dots,) = ax.get_lines()
        assert (list(dots.get_xdata()), list(dots.get_ydata())) == ([2.5], [1.5])
    without = [{**row, "excludes_zero": None} for row in rows]
    assert effects_by_size_and_step(without, "bbq").legends == []


def test_map_of_several_seeds_is_their_mean(tmp_path):
    size = Size(seeds=(0, 1), steps=(0, 10), templates=4, blocks=1, students=10)
    frame, _ = write_results(record_run(tmp_path / "run", size), 20)
    gone = (frame["step"] == 10) & (frame["model"] == "nano") & (frame["seed"] == 1)
    figure = size_by_steps(frame[~gone], "winogender")
    shown = figure.axes[0].collections[0].get_array()
    rows = headline(frame, "winogender", condition="Q", model="small", step=10)
    assert shown[1, 1] == pytest.approx(rows["value"].mean())
    assert np.ma.getmaskarray(shown).ravel().tolist() == [False, True, False, False]


# --- one experiment in detail ---------------------------------------------------------------------


def test_metrics_beside_the_bias(results):
    frame, _ = results
    figure = beside_the_bias(frame, "bbq")
    labels = [ax.get_label() for ax in figure.axes]
    assert labels[:2] == ["nano, Bias, ambiguous", "nano, Accuracy, ambiguous"]
    assert len(labels) == 10
    rows = frame[
        (frame["metric"] == "accuracy_disambiguated")
        & (frame["category"] == "overall")
        & (frame["model"] == "small")
        & (frame["condition"] == "Q")
    ].sort_values("step")
    drawn = line_of(figure.axes[7], "Q").get_ydata()
    np.testing.assert_allclose(drawn, rows["value"].astype(float))
    assert figure.axes[7].get_ylim() == (-0.03, 1.03)


def test_categories_have_a_panel_each(results):
    frame, _ = results
    figure = by_category(frame, "bbq", "nano")
    titles = [" ".join(ax.get_title(loc="left").split()) for ax in figure.axes]
    assert titles == ["Age", "Race_x_gender (not in overall)", "Religion"]
    rows = frame[
        (frame["model"] == "nano")
        & (frame["category"] == "Religion")
        & (frame["metric"] == "bias_ambiguous")
        & (frame["condition"] == "Q+IF")
    ].sort_values("step")
    drawn = line_of(figure.axes[2], "Q+IF").get_ydata()
    np.testing.assert_allclose(drawn, rows["value"].astype(float))
    with pytest.raises(NothingToDraw, match="'huge': not in the table; choose from nano, small"):
        by_category(frame, "bbq", "huge")
    with pytest.raises(NothingToDraw, match="needs two categories"):
        by_category(frame, "winogender")
    with pytest.raises(NothingToDraw, match="stereoset: not measured"):
        by_category(frame, "stereoset")
    with pytest.raises(InputError, match="experiment 'nonsense': unknown"):
        by_category(frame, "nonsense")


def test_names_from_data_are_drawn_literally(results, tmp_path):
    frame, _ = results
    names = {"Age": "a$\\frac{$b\x07\u202e", "Religion": "<!-- ]]> & $"}
    hostile = frame.assign(
        category=frame["category"].replace(names), condition=frame["condition"] + " $_{"
    )
    curves.save(by_category(hostile, "bbq"), tmp_path, "hostile")
    ElementTree.parse(tmp_path / "hostile.svg")
    text = (tmp_path / "hostile.svg").read_text(encoding="utf-8")
    assert "\u202e" not in text and "\x07" not in text
    curves.save(size_by_steps(hostile, "bbq"), tmp_path, "hostile")
    ElementTree.parse(tmp_path / "hostile.svg")


def test_scatter_of_occupations(results, pronouns):
    frame, _ = results
    figure = clusters_against_fact(frame, pronouns, "winogender")
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles[0] == "Q, step 0" and titles[-1] == "Match stats, step 10"
    assert len(titles) == 8
    ax = figure.axes[titles.index("Q+IF, step 10")]
    equality, dots = ax.get_lines()
    assert (list(equality.get_xdata()), list(equality.get_ydata())) == ([0, 100], [0, 1])
    r = np.corrcoef(dots.get_xdata(), dots.get_ydata())[0, 1]
    (row,) = headline(frame, "winogender", model="small", step=10, condition="Q+IF").itertuples()
    assert r == pytest.approx(row.value)
    assert len(dots.get_xdata()) == 10
    assert ax.texts[0].get_text().startswith(f"r = {row.value:.2f} [".replace("-", "−"))
    assert "Q+IF, step 10: r = " in curves.in_words(figure)
    missing = pronouns[(pronouns["condition"] != "Q") | (pronouns["step"] != 10)]
    ax = clusters_against_fact(frame, missing, "winogender").axes[4]
    assert [text.get_text() for text in ax.texts] == ["not measured"]
    undefined = frame.assign(value=np.nan, low=np.nan, high=np.nan)
    figure = clusters_against_fact(undefined, pronouns, "winogender")
    assert figure.axes[0].texts[0].get_text() == "r undefined"
    with pytest.raises(NothingToDraw, match="bbq: has no figure of single clusters"):
        clusters_against_fact(frame, pronouns, "bbq")


def test_training_curves_draw_reward_against_sqrt_kl(results):
    frame, _ = results
    mine = frame[frame["model"] == "small"].drop_duplicates("step").sort_values("step")
    line = line_of(curves.training_curves(frame).axes[2], "small (509k)")
    assert np.isnan(line.get_xdata()[0])  # step 0 records neither
    np.testing.assert_allclose(line.get_xdata()[1:], np.sqrt(mine["kl"].to_numpy()[1:]))
    np.testing.assert_allclose(line.get_ydata()[1:], mine["reward"].to_numpy()[1:])
    below = frame.assign(kl=frame["kl"].where(frame["step"] != 2, -0.01))
    line = line_of(curves.training_curves(below).axes[2], "small (509k)")
    assert np.isnan(line.get_xdata()[1]) and np.isfinite(line.get_xdata()[2])


def test_steps_by_size_and_chosen_steps(results):
    frame, _ = results
    figure = curves.steps_by_size(frame, "law_school")
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["nano (8.2k)", "small (509k)"]
    expected = headline(frame, "law_school", model="nano", condition="Q")["value"].astype(float)
    np.testing.assert_allclose(line_of(figure.axes[0], "Q").get_ydata(), expected)
    assert len({ax.get_ylim() for ax in figure.axes}) == 1
    chosen = curves.against_size(frame, 2, 0)
    titles = [ax.get_title(loc="left") for ax in chosen.axes]
    assert titles[0] == "BBQ, step 0" and titles[3] == "BBQ, step 2"
    expected = headline(frame, "bbq", step=2, condition="Q")["value"].astype(float)
    np.testing.assert_allclose(line_of(chosen.axes[3], "Q").get_ydata(), expected)
    with pytest.raises(NothingToDraw, match="step 7: not measured; choose from 0, 2"):
        curves.against_size(frame, 7)


def test_single_orders_of_the_options_are_not_drawn(results):
    frame, _ = results
    other = frame.assign(order="120", value=99.0)
    figure = curves.against_steps(pd.concat([other, frame.assign(order="all")]), "small")
    assert figure.axes[0].get_ylim()[1] < 2


# --- several runs ---------------------------------------------------------------------------------


def two_runs(frame):
    """`nano` in both runs, `small` in the second alone; the second kept other steps."""
    one = frame[frame["model"] == "nano"].assign(run="one")
    two = frame[frame["step"] != 2].assign(run="two", value=frame["value"] / 2)
    return pd.concat([one, two])


def test_two_runs_are_refused_in_figures_of_one_run(results):
    frame, _ = results
    both = two_runs(frame)
    for draw in (curves.against_steps, curves.against_size,
                 lambda rows: size_by_steps(rows, "bbq"),
                 lambda rows: by_category(rows, "bbq")):  # fmt: skip
        with pytest.raises(NothingToDraw, match=r"nano, seed 0 appears twice .* one, two; draw"):
            draw(both)
    with pytest.raises(NothingToDraw, match="two run folders have this name"):
        curves.against_steps(both.assign(run="same"))


def test_steps_by_run(results):
    frame, _ = results
    figure = runs.steps_by_run(two_runs(frame), "winogender")
    labels = [" ".join(ax.get_label().split()) for ax in figure.axes]
    assert labels[0] == "nano (8.2k), Q" and labels[4] == "in one run only, Q"
    assert legend_of(figure) == ["one", "two", "two: small (509k)"]
    first = line_of(figure.axes[0], "one")
    expected = headline(frame, "winogender", model="nano", condition="Q")["value"].astype(float)
    np.testing.assert_allclose(first.get_ydata(), expected)
    second = line_of(figure.axes[0], "two")
    assert list(second.get_xdata()) == [0, 10]  # its own steps: no gap where it kept none
    np.testing.assert_allclose(second.get_ydata(), expected.to_numpy()[[0, 2]] / 2)
    assert first.get_color() != second.get_color()


def test_size_by_run_takes_each_runs_last_common_step(results):
    frame, _ = results
    rows = two_runs(frame)
    rows = rows[(rows["run"] != "one") | (rows["step"] != 10)]
    figure = runs.size_by_run(rows)
    assert legend_of(figure) == ["one (step 2)", "two (step 10)"]
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    line = line_of(figure.axes[titles.index("BBQ, Q+IF")], "two (step 10)")
    expected = headline(frame, "bbq", step=10, condition="Q+IF")["value"].astype(float) / 2
    np.testing.assert_allclose(line.get_ydata(), expected)


def test_figures_of_several_runs(results, tmp_path):
    frame, statistics = results
    both = [{**row, "run": run} for run in ("one", "two") for row in statistics["effects"]]
    drawn, notes = gallery.draw_runs(two_runs(frame), {"effects": both}, tmp_path)
    assert notes == []
    names = [drawing.name for drawing in drawn]
    assert names == [
        "steps-bbq", "steps-winogender", "steps-law_school", "size",
        "effects-bbq", "effects-winogender", "effects-law_school", "training",
    ]  # fmt: skip
    assert all((tmp_path / f"{name}.svg").is_file() for name in names)
    assert "nano (8.2k), Q − Q+IF" in drawn[4].alt


# --- the paper's values ---------------------------------------------------------------------------


def published(ax):
    """{(x, y): line} of the paper's markers in one panel or strip."""
    lines = [line for line in ax.get_lines() if str(line.get_label()).startswith(PUBLISHED)]
    return {(line.get_xdata()[0], line.get_ydata()[0]): line for line in lines}


def legend_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_published_values_are_drawn_on_request(results):
    frame, _ = results
    for draw in (lambda **how: curves.against_steps(frame, "small", **how),
                 lambda **how: curves.against_size(frame, **how)):  # fmt: skip
        without, beside = draw(), draw(paper=True)
        assert not any(published(ax) or ax.child_axes for ax in without.axes)
        assert STATED not in legend_of(without)
        assert legend_of(beside)[-2:] == [STATED, ABOUT]
        assert legend_of(beside)[:-2] == legend_of(without)
        assert "175B (proprietary)" in STATED
        for ours, both in zip(without.axes, beside.axes, strict=True):
            assert both.get_xlim() == ours.get_xlim()  # ours is not squashed
            for ax in (both, *both.child_axes):
                low, high = both.get_ylim()
                assert ax.get_ylim() == (low, high)
                for (_, value), line in published(ax).items():
                    assert low <= value <= high
                    assert line.get_markerfacecolor() == "none"
                    assert line.get_linestyle() == "None"


def test_published_values_beyond_the_axis_get_a_strip(results):
    frame, _ = results
    bbq, _, law = curves.against_steps(frame, "small", paper=True).axes
    (strip,) = bbq.child_axes
    assert published(bbq) == {}
    assert {y for _, y in published(strip)} == {0.1845, 0.1056, 0.0301}
    assert [tick.get_text() for tick in strip.get_xticklabels()] == ["800"]
    assert published(strip)[0.0, 0.1845].get_markeredgecolor() == LOOKS["Q"]["color"]
    (strip,) = law.child_axes
    ticks = [tick.get_text() for tick in strip.get_xticklabels()]
    assert ticks == ["50", "200", "600", "800", "1000"]
    stated, read = published(strip)[3.0, 0.071], published(strip)[4.0, 0.1]
    assert stated.get_markersize() > read.get_markersize()


def test_published_values_within_the_axis(results):
    frame, _ = results
    stretched = frame.assign(step=frame["step"].replace({2: 50, 10: 1000}))
    figure = curves.against_steps(stretched, "small", paper=True)
    assert not any(ax.child_axes for ax in figure.axes)
    assert {x for x, _ in published(figure.axes[0])} == {800}
    assert {x for x, _ in published(figure.axes[1])} == {50}
    large = frame["parameters"].replace({509_000: 400_000_000_000})
    bbq = curves.against_size(frame.assign(parameters=large), paper=True).axes[0]
    assert (LARGEST, 0.1845) in published(bbq) and not bbq.child_axes


def test_published_values_only_of_conditions_drawn(results):
    frame, _ = results
    figure = curves.against_steps(frame[frame["condition"] == "Q+IF"], "small", paper=True)
    (strip,) = figure.axes[0].child_axes
    assert {y for _, y in published(strip)} == {0.1056}
    words = curves.in_words(figure)
    assert "Published by Ganguli et al. 2023: Q+IF 0.1056 (175B, 800 steps)." in words
    assert "0.1845" not in words


def test_step_labels_do_not_overlap():

    figure = Figure(figsize=(2.2, 2))
    ax = figure.subplots()
    step_axis(ax, pd.Series([0, 50, *range(100, 1001, 100)]))
    figure.draw_without_rendering()
    labels = [label for label in ax.get_xticklabels() if label.get_text()]
    boxes = [label.get_window_extent() for label in labels]
    assert [labels[0].get_text(), labels[-1].get_text()] == ["0", "1000"]
    assert all(one.x1 < other.x0 for one, other in pairwise(boxes))


def test_other_conditions_have_distinct_looks():
    names = [*LOOKS, *(f"Q+IF paraphrase {n}" for n in range(1, 6)), "Q+neutral", "IF+Q", "mine"]
    looks = condition_looks(names)
    drawn = {(look["color"], look["marker"], str(look["linestyle"])) for look in looks.values()}
    assert len(drawn) == len(names)
    assert all(looks[name] == LOOKS[name] for name in LOOKS)
