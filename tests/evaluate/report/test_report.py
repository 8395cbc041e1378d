"""The report's page, its tables, and the comparison of several runs."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pandas as pd
import pytest

from selfcorrect.evaluate.figures import gallery
from selfcorrect.evaluate.report import experiment_tables
from selfcorrect.evaluate.report.comparison import (
    differences,
    group_runs,
    grouping_notes,
    name_runs,
)
from selfcorrect.evaluate.report.page import write_comparison, write_report
from selfcorrect.evaluate.report.tables import CheckpointColumns, result_tables
from selfcorrect.evaluate.report.trend_tables import threshold_table, trend_table
from selfcorrect.evaluate.report.vega import vega_script
from selfcorrect.evaluate.report.verdict import series_of
from selfcorrect.evaluate.results import load
from selfcorrect.evaluate.statistics.files import read_results
from selfcorrect.recipes.foundation.checksums import flatten
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.foundation.printable import escape_controls
from tests.support.recorded_run import SMALL, Size, record_cell, record_run

BIAS = "bias_ambiguous"
FEW = Size(models=(("nano", 8192),), steps=(0, 10), templates=3, blocks=1, students=8)


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of script and style."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.text, self._inside = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside.append(tag)

    def handle_endtag(self, tag):
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data):
        if not {"script", "style"} & set(self._inside):
            self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = record_run(tmp_path_factory.mktemp("report") / "a <b> & run", SMALL)
    (run / "recipe.yaml").write_text("name: x  # </pre><script>alert(1)</script>\n")
    return run


@pytest.fixture
def no_figures(monkeypatch):
    """Draw no figures, which take most of a report's time."""
    monkeypatch.setattr(gallery, "draw_run", lambda *_: ([], []))


@pytest.fixture(scope="module")
def drawn():
    """What drawing the figures of `page` returned."""
    return []


@pytest.fixture(scope="module")
def page(run, drawn):
    draw_run = gallery.draw_run

    def draw(*arguments):
        drawn.append(draw_run(*arguments))
        return drawn[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gallery, "draw_run", draw)
        return Page(write_report(run, num_resamples=50).read_text(encoding="utf-8"))


def test_report_is_self_contained(run, page):
    assert all(image["src"].startswith("data:image/svg+xml;base64,") for image in page.all("img"))
    assert len(page.all("img")) == 1  # the main figure, for readers without the script
    assert page.all("link") == []
    assert not any("src" in script for script in page.all("script"))
    targets = [link["href"] for link in page.all("a")]
    assert all(target.startswith("#") for target in targets)
    identifiers = {attributes.get("id") for _, attributes in page.tags}
    assert {target[1:] for target in targets} <= identifiers
    assert (run / "results.parquet").is_file()
    assert (run / "statistics.json").is_file()
    assert (run / "figures" / "size.png").is_file()
    assert (run / "figures" / "sizes-bbq.pdf").read_bytes().startswith(b"%PDF")


def test_hostile_text_is_escaped(page):
    # The library and the page's own script; everything else is data.
    types = [script.get("type") for script in page.all("script")]
    assert types[0] == "application/json" and set(types[1:]) <= {"text/plain", None}
    assert types.count(None) == (2 if vega_script() else 1)
    text = "".join(page.text)
    assert "</pre><script>alert(1)</script>" in text
    assert "a <b> & run" in text
    assert "\u202e" not in text
    assert "\x07" not in text


def test_content_security_policy(page):
    (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv")]
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy


def test_control_and_bidi_characters():
    assert escape_controls("a\x00b\u200fc\u2066d\te\nf") == "a⟨U+0000⟩b⟨U+200F⟩c⟨U+2066⟩d\te\nf"
    assert escape_controls("a\u2028b\u2029") == "a⟨U+2028⟩b⟨U+2029⟩"
    assert escape_controls("\ud800") == "⟨U+D800⟩"


def test_images_have_alternative_text(page):
    assert all("Q+IF" in image["alt"] or "Reward" in image["alt"] for image in page.all("img"))


def test_page_without_javascript(page):
    """Tables are there; controls that need the script are not."""
    assert all("hidden" in place for place in page.all("div") if place.get("id") == "browser")
    in_browser = [button["data-part"] for button in page.all("button")]
    assert in_browser == ["previous", "next"]  # headers and filters get theirs from the script
    assert len(page.all("noscript")) == (2 if vega_script() else 1)  # figure, texts
    tables = [table for table in page.all("table") if table.get("class") == "sorts"]
    identifiers = {attributes.get("id") for _, attributes in page.tags}
    assert {table["aria-labelledby"] for table in tables} <= identifiers


def test_metric_without_any_value():
    """It has no column but is named above the table."""
    metrics = {
        "share_stereotyped": {"value": 0.5, "low": 0.4, "high": 0.6},
        "expected_share_stereotyped": {"value": 0.4, "low": 0.3, "high": 0.5},
        "share_unparsed": {"value": None, "low": None, "high": None},
    }
    place = {"run": "r", "model": "m", "parameters": 1, "seed": 0, "step": 0, "num_items": 3}
    place |= {"num_texts": 0, "num_truncated": 0}
    cell = {**place, "experiment": "crows_pairs", "condition": "Q", "metrics": {"overall": metrics}}
    first, variants = result_tables([cell])
    assert len(first.columns) == len(first.rows[0]) == 7
    assert "Undefined everywhere: " in first.note
    assert len(variants.columns) == len(variants.rows[0]) == 7
    assert [cell.sort for cell in variants.rows[0]][-1] == 0.4


def test_left_out_pairs_and_items(tmp_path, no_figures):
    run = record_run(
        tmp_path / "run",
        Size(models=(("one", 10),), steps=(0,), templates=3, blocks=1, samples=False),
    )
    assert "differ too early" not in write_report(run, num_resamples=20).read_text()
    for seed, count in ((0, 3), (1, 5)):
        folder = run / "one" / f"seed-{seed}" / "reward"
        folder.mkdir(parents=True)
        (folder / "stage.json").write_text(
            json.dumps({"left_out": {"they differ too early": count}})
        )
    page = Page(write_report(run, num_resamples=20).read_text(encoding="utf-8"))
    text = " ".join(" ".join(page.text).split())
    assert "Feedback they differ too early 3 or 5" in text
    assert "no stereotyped group matches" in text


def test_column_of_truncated_texts():
    place = {"run": "r", "model": "m", "parameters": 1, "seed": 0, "step": 0, "num_items": 3}
    cells = [
        {
            **{**place, "experiment": "crows_pairs", "condition": condition},
            **{"metrics": {"overall": {}}, "num_texts": texts, "num_truncated": cut},
        }
        for condition, texts, cut in [("Q", 0, 0), ("Q+CoT", 1200, 7)]
    ]
    [table, _] = result_tables(cells)
    column = table.columns.index("Texts cut off")
    assert [row[column].text for row in table.rows] == ["–", "7 of 1,200"]


def test_run_without_run_json_or_samples(tmp_path):
    size = Size(models=(("one", 10),), steps=(0,), templates=3, blocks=1, samples=False)
    run = record_run(tmp_path / "run", size)
    (run / "run.json").unlink()
    page = Page(write_report(run, num_resamples=20).read_text(encoding="utf-8"))
    text = " ".join(page.text)
    assert "There is no run.json" in text
    assert "Not drawn: Metric against model size: metric against model size needs two" in text
    assert "nothing can be told about training" in text
    assert "Open markers" not in text
    (run / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"run\.json: not readable as JSON"):
        write_report(run, num_resamples=20)


def test_published_values_are_explained(tmp_path):
    run = record_run(tmp_path / "run", FEW)
    page = Page(write_report(run, num_resamples=20, paper=True).read_text(encoding="utf-8"))
    assert re.search("Open markers .*Ganguli et al. 2023", " ".join(page.text))


def test_flatten_records():
    record = {"a": {"b": 1, "c": None}, "d": [1, 2], "e": [{"f": True}], "g": {}}
    assert list(flatten(record)) == [
        ("a.b", "1"),
        ("a.c", "–"),
        ("d", "1, 2"),
        ("e[0].f", "True"),
        ("g", "{}"),
    ]


def test_trend_and_threshold_tables():
    """Cells without a value give the reason."""
    place = {"run": "r", "model": "m", "parameters": 1, "seed": 0, "experiment": "bbq"}
    head = {**place, "condition": "Q", "metric": "bias_ambiguous"}
    trend = {**head, "quantity": "metric", "against": "sqrt_kl", "unit": "items", "num_seeds": 1,
             "num_points": 3, "value": -0.00012345, "low": -0.0002, "high": 0.0001,
             "p_adjusted": 0.0004, "undefined_because": None}  # fmt: skip
    nothing = {"value": None, "low": None, "high": None, "p_adjusted": None}
    reached = {**head, "threshold": 0.0, "starts": "above", "value": "not reached", "low": 12.5,
               "high": "not reached", "share_reached": 0.3, "last": 60.0,
               "undefined_because": None}  # fmt: skip
    rows = [
        trend,
        {**trend, **nothing, "model": None, "undefined_because": "one size only"},
        {**trend, **nothing, "seed": None, "unit": "seeds", "undefined_because": "one seed"},
        {**trend, "metric": "expected_bias_ambiguous"},
    ]
    crossings = [
        reached,
        {**reached, "value": 4.0, "low": None, "high": None},
        {**reached, "value": None, "undefined_because": "two steps are needed"},
    ]
    columns = CheckpointColumns([{**place, "step": 0}])
    trends, thresholds = trend_table(rows, columns), threshold_table(crossings, columns)
    texts = [[cell.text for cell in row] for row in trends.rows]
    assert texts[0] == ["metric", "√KL (nats)", "m", "0", "Q", "3",
                        "−0.000123 [−0.0002, 0.0001]", "items", "< 0.001"]  # fmt: skip
    assert texts[1][2] == "all sizes" and texts[1][6] == "undefined: one size only"
    assert len(texts) == 2 and "one training seed" in trends.note
    texts = [[cell.text for cell in row][-4:] for row in thresholds.rows]
    assert texts[0] == ["above", "not reached", "12.500 to not reached", "0.300"]
    assert texts[1][1:3] == ["4", "–"] and texts[2][1] == "undefined: two steps are needed"
    at = [row[-3].sort for row in thresholds.rows]
    assert at[1] < at[0] and at[2] is None  # not reached: later than any step
    assert all(len(row) == len(thresholds.columns) for row in thresholds.rows)
    assert all(len(row) == len(trends.columns) for row in trends.rows)


def test_long_tables_are_cut_with_a_note(statistics, monkeypatch):
    def tables():
        series = [s for s in series_of(statistics) if s.experiment == "bbq"]
        return {t.name: t for t in experiment_tables.experiment_tables(statistics, "bbq", series)}

    complete = tables()
    monkeypatch.setattr(experiment_tables, "MOST_CELLS", 100)
    for name, table in tables().items():
        most = 100 // len(table.columns)
        assert table.rows == complete[name].rows[:most]
        cut = len(complete[name].rows) > most
        assert (f"of {len(complete[name].rows):,} rows" in table.note) == cut
    assert any(len(table.rows) > 10 for table in complete.values())


def test_page_without_the_library_shows_the_main_figure(run, page, drawn, monkeypatch):
    monkeypatch.setattr(gallery, "draw_run", lambda *_: drawn[0])  # the files are in the run
    monkeypatch.setattr("selfcorrect.evaluate.report.page.vega_script", lambda: None)
    text = write_report(run, num_resamples=20).read_text(encoding="utf-8")
    assert len(re.findall("<noscript>[^<]*<img", text)) == 0
    page = Page(text)
    assert len(page.all("img")) == 1 and "install vl-convert-python" in " ".join(page.text)
    monkeypatch.setattr("selfcorrect.evaluate.report.page.vega_script", lambda: "let vega = 1;")
    text = write_report(run, num_resamples=20).read_text(encoding="utf-8")
    assert re.search("<noscript>[^<]*<img", text) and "<script>let vega = 1;</script>" in text
    digest = base64.b64encode(hashlib.sha256(b"let vega = 1;").digest()).decode()
    assert f"'sha256-{digest}'" in text


def test_library_is_bundled_once_per_version(tmp_path, monkeypatch):
    vl_convert = pytest.importorskip("vl_convert", reason="pip install vl-convert-python")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    script = vega_script()
    assert script and "vegaEmbed" in script and "</script" not in script.lower()
    monkeypatch.setattr(vl_convert, "javascript_bundle", lambda: "again")
    assert vega_script() == script
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nothing")  # cannot be written: bundled each time
    assert vega_script() == "again"


def test_models_without_training(tmp_path):
    """What `selfcorrect evaluate MODEL MODEL` leaves: the same page, with what exists."""
    out = tmp_path / "evaluations"
    for model, bias in (("base <b>", 0.6), ("chat", 0.2)):
        for experiment, condition in [("bbq", "Q"), ("bbq", "Q+IF"), ("winogender", "Q")]:
            left = bias * (0.3 if condition == "Q+IF" else 1)
            record_cell(out / model / "0123456789ab", experiment, condition, left, SMALL)
    prompts = out / "chat/0123456789ab/prompts"  # no model of its own
    record_cell(prompts, "bbq", "Q", 0.1, SMALL)
    page = Page(write_report(out, num_resamples=200).read_text(encoding="utf-8"))
    text = " ".join(" ".join(page.text).split())
    assert text.count("measured without training, so nothing can be told about RLHF") == 2
    assert "Asked to avoid bias, the model (base <b>) answers BBQ" in text
    assert "undefined in a cell" not in text and "No training is logged here" in text
    assert "Model Quantity Value p, corrected Detectable" in text and "Q minus Q+IF" in text
    statistics = json.loads((out / "statistics.json").read_text())
    effects = {row["model"]: row for row in statistics["effects"] if row["metric"] == BIAS}
    plain, asked = (
        next(
            cell["metrics"]["overall"][BIAS]["value"]
            for cell in statistics["cells"]
            if (cell["model"], cell["experiment"], cell["condition"])
            == ("base <b>", "bbq", condition)
        )
        for condition in ("Q", "Q+IF")
    )
    assert effects["base <b>"]["value"] == pytest.approx(plain - asked) and plain > asked
    assert statistics["growth"] == statistics["trends"] == statistics["missing"] == []
    (image,) = page.all("img")
    assert f"BBQ, base <b>: Q {plain:.2f}; Q+IF {asked:.2f}" in image["alt"]
    assert set(read_results(out / "results.parquet")["model"]) == {"base <b>", "chat"}
    of_one = Page(write_report(out / "chat", num_resamples=20).read_text(encoding="utf-8"))
    assert " ".join(of_one.text).count("measured without training") == 1
    assert set(load(out, num_resamples=2)["model"]) == {"base <b>", "chat"}  # reports are no model
    for folder in (out / "chat" / "0123456789ab", tmp_path):
        with pytest.raises(InputError, match=r"no recipe\.yaml"):
            write_report(folder)


# --- several runs ---------------------------------------------------------------------------------

RECIPE = """\
name: {name}
seeds: [{seed}]
models: [{{name: nano, path: x}}, {{name: small, path: y}}]
data: {{preferences: {{path: z}}}}
reward: {{}}
policy: {{steps: 10, checkpoints: [0, 10], trainer: {{learning_rate: {rate}}}}}
launch: {{jobs: {jobs}}}
"""


def write_run(folder, seed=0, rate="1.0e-5"):
    run = record_run(folder, replace(FEW, seeds=(seed,)))
    recipe = RECIPE.format(name=folder.name, seed=seed, jobs=seed + 1, rate=rate)
    (run / "recipe.yaml").write_text(recipe.replace(", {name: small, path: y}", ""))
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds of one recipe, another recipe, and one of the same name in another folder."""
    folder = tmp_path_factory.mktemp("several")
    two = write_run(folder / "x" / "two", seed=1)
    recipe = (two / "recipe.yaml").read_text()
    (two / "recipe.yaml").write_text(recipe.replace("policy:", "ppo:"))  # as in older versions
    return [
        write_run(folder / "x" / "one", seed=0),
        two,
        write_run(folder / "x" / "three", rate="1.0e-3"),
        write_run(folder / "y" / "one", seed=0),
    ]


def test_labels_of_runs(runs, tmp_path):
    assert list(name_runs(runs)) == ["x/one", "two", "three", "y/one"]
    with pytest.raises(InputError, match="given twice"):
        name_runs([runs[0], runs[0].parent / "." / "one"])
    with pytest.raises(InputError, match=r"no recipe\.yaml"):
        name_runs([runs[0], tmp_path])


def test_grouping_of_seeds(runs, tmp_path):
    """Runs are seeds of one recipe if recipes agree and seeds differ."""
    groups = group_runs(name_runs(runs))
    assert [group.label for group in groups] == ["x/one + two", "three", "y/one"]
    notes = grouping_notes(groups)
    assert notes[0].startswith("x/one + two ") and "seeds of one recipe" in notes[0]
    assert notes[1].startswith("x/one + two, y/one ") and "share a seed" in notes[1]
    assert len(notes) == 2
    unreadable = [write_run(tmp_path / name, seed) for seed, name in enumerate("ab")]
    for run in unreadable:
        (run / "recipe.yaml").write_text("{")
    assert len(group_runs(name_runs(unreadable))) == 2


def test_differences_between_recipes(runs):
    rows = dict(differences(name_runs(runs[:3]), "recipe.yaml"))
    assert rows == {
        "name": ["one", "two", "three"],
        "seeds": ["0", "1", "0"],
        "policy.trainer.learning_rate": ["1e-05", "1e-05", "0.001"],
        "launch.jobs": ["1", "2", "1"],
    }
    assert differences(name_runs(runs[:1]), "recipe.yaml") == []


def test_comparison_of_several_runs(runs, tmp_path):
    """The runs' folders are not changed."""
    before = {path for run in runs for path in run.rglob("*")}
    path = write_comparison(runs, tmp_path / "out", num_resamples=20)
    assert {path for run in runs for path in run.rglob("*")} == before
    page = Page(path.read_text(encoding="utf-8"))
    text = " ".join(" ".join(page.text).split())
    assert "x/one + two count as seeds of one recipe" in text
    assert "Keys in which the recipes differ" in text and "policy.trainer.learning_rate" in text
    frame = pd.read_parquet(tmp_path / "out" / "results.parquet")
    assert set(frame["run"]) == {"x/one + two", "three", "y/one"}
    assert set(frame[frame["run"] == "x/one + two"]["seed"]) == {0, 1}
    statistics = json.loads((tmp_path / "out" / "statistics.json").read_text())
    assert {row["run"] for row in statistics["effects"]} == set(frame["run"])
    cells = [cell for cell in statistics["cells"] if cell["experiment"] == "law_school"]
    table = result_tables(cells)[0]
    assert table.columns[:3] == ["Run", "Model", "Parameters"]
    assert {row[0].text for row in table.rows} == set(frame["run"])
    (size,) = [note for note in page.text if "Metric against model size" in note]
    assert "needs two sizes" in size
    assert "y/one" in page.all("img")[0]["alt"]
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(identifiers)) == len(identifiers)


def test_comparison_refuses_bad_folders(runs, tmp_path):
    with pytest.raises(InputError, match="is a run; choose another folder"):
        write_comparison(runs[:2], runs[0])
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "recipe.yaml").write_text("name: x")
    with pytest.raises(InputError, match="no checkpoint has been evaluated"):
        write_comparison([runs[0], empty], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unfinished_run(tmp_path, no_figures):
    run = write_run(tmp_path / "run")
    page = write_report(run, num_resamples=20).read_text(encoding="utf-8")
    assert "is not finished" not in page
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("steps: 10", "steps: 40").replace(
        "[0, 10]", "[0, 2, 10, 40]"))  # fmt: skip
    text = write_report(run, num_resamples=20).read_text(encoding="utf-8")
    assert "run is not finished: 2 of 4 checkpoints measured so far." in text
    more = recipe.replace("models: [", "models: [{name: large, path: z}, ")
    (run / "recipe.yaml").write_text(more)
    text = write_report(run, num_resamples=20).read_text(encoding="utf-8")
    assert "2 of 4 checkpoints measured so far, none of large." in text


def test_unfinished_seeds_of_one_recipe(tmp_path, monkeypatch):
    """Runs that count as seeds of one recipe each say that they are not finished."""
    monkeypatch.setattr(gallery, "draw_runs", lambda *_: ([], []))
    runs = [write_run(tmp_path / name, seed) for seed, name in enumerate(("one", "two"))]
    for run in runs:
        recipe = (run / "recipe.yaml").read_text()
        (run / "recipe.yaml").write_text(recipe.replace("[0, 10]", "[0, 5, 10]"))
    text = write_comparison(runs, tmp_path / "out", num_resamples=20).read_text(encoding="utf-8")
    for name in ("one", "two"):
        assert f"{name} is not finished: 2 of 3 checkpoints measured so far." in text
