"""Untrusted names, texts and files stay in their folder and cannot affect terminal or page."""

import gzip
import json
import re
import sys
import tracemalloc
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console

from selfcorrect.evaluate.experiments.bbq import files
from selfcorrect.evaluate.experiments.wording import load_stimuli
from selfcorrect.evaluate.export import write_model_card
from selfcorrect.evaluate.figures.gallery import Drawing
from selfcorrect.evaluate.report.page import write_report
from selfcorrect.evaluate.report.terminal import closing_table
from selfcorrect.evaluate.report.vega import vega_script
from selfcorrect.evaluate.results import summarise
from selfcorrect.evaluate.run_folder import find_checkpoints
from selfcorrect.evaluate.statistics.bootstrap import Draws
from selfcorrect.evaluate.statistics.cells import measure_folder
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.foundation.printable import escape_controls
from selfcorrect.recipes.foundation.yaml_text import parse_yaml
from selfcorrect.recipes.load import check_recipe, load_recipe
from selfcorrect.scripts.commands.__main__ import main
from selfcorrect.train.job import run_job
from tests.support.recorded_run import Size, record_run
from tests.support.small_runs import RECIPE

LITTLE = Size(
    models=(("nano", 8192),), steps=(0, 2), templates=3, blocks=1, occupations=6, students=6
)
LAUGHS = "a0: &a0 [ha, ha, ha, ha, ha, ha, ha, ha, ha]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)


# ---- YAML --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LAUGHS, "aliases expand to too many values"),
        ("a: &a [*a]", "themselves"),
        ("a: &a {b: {c: *a}}", "themselves"),
        ("a: " + "[" * 1000, "bombs.yaml"),
        ("a: '" + "x" * 1_000_001 + "'", "the limit"),
        ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
        ("? [a, b]\n: c", "a key must be a word"),
    ],
    ids=["laughs", "self", "deeper self", "nesting", "size", "apply", "name", "list as key"],
)
def test_yaml_bombs_and_tags(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bombs.yaml"
    path.write_text(text)
    for read in (lambda: load_recipe(str(path)), lambda: load_stimuli(path)):
        with pytest.raises(InputError, match=re.escape(said)) as caught:
            read()
        assert "\n" not in str(caught.value)


def test_yaml_aliases() -> None:
    text = "a: &one {x: 1, y: [1, 2]}\nb: *one\nc: [*one, *one]\n"
    assert parse_yaml(text, "x") == yaml.safe_load(text)


@pytest.mark.parametrize("name", ["additional_metadata.csv.gz", "Age.jsonl.gz"])
def test_gzip_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(files, "LONGEST_TABLE", 1_000_000)
    (tmp_path / name).write_bytes(gzip.compress(b"x" * 50_000_000))
    read = files.read_metadata if "metadata" in name else files.read_rows
    tracemalloc.start()
    with pytest.raises(InputError, match="1,000,000 bytes"):
        read(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


# ---- paths -------------------------------------------------------------------------------------

LEAVING = ["../out", "..", ".", "/tmp/out", "a/b", "a\0b", "x" * 65, "", "a\n", "-rf", ".hidden",
           "a\\b", "\u202ea", "CON/..", "a b"]  # fmt: skip


@pytest.mark.parametrize("name", LEAVING)
def test_names_that_leave_the_folder(name: str) -> None:
    model = RECIPE["models"][0]
    for recipe in ({**RECIPE, "name": name}, {**RECIPE, "models": [{**model, "name": name}]}):
        with pytest.raises(InputError, match=r"x: (models\.0\.)?name"):
            check_recipe(recipe, "x")


@pytest.mark.parametrize("name", ["benchmarks", "figures", "recipe.yaml", "report.html"])
def test_reserved_model_names(name: str) -> None:
    with pytest.raises(InputError, match=f"the name {name} is reserved"):
        check_recipe({**RECIPE, "models": [{**RECIPE["models"][0], "name": name}]}, "x")


@pytest.mark.parametrize("experiment", ["../bbq", "/etc", "bbq/../../x"])
def test_unknown_experiments(tmp_path: Path, experiment: str) -> None:
    from selfcorrect.evaluate.measuring.plan import plan_evaluation

    with pytest.raises(InputError, match="unknown, choose from"):
        plan_evaluation(tmp_path, load_stimuli(), [experiment], None)


def test_condition_names_stay_in_the_folder(tmp_path: Path) -> None:
    from selfcorrect.evaluate.measuring.plan import plan_evaluation
    from tests.support.tiny_models import tiny_stimuli, write_tiny_winogender

    write_tiny_winogender(tmp_path)
    stimuli = tiny_stimuli()
    section = stimuli.section("winogender")
    for name in ("../../out", "/etc/passwd", "a\0b", "\u202e", "..", "con", "a/b"):
        hostile = section.model_copy(update={"conditions": {name: section.conditions["Q"]}})
        named = type(stimuli)({**stimuli.sections, "winogender": hostile})
        (cell,) = plan_evaluation(tmp_path, named, ["winogender"], [name]).cells
        assert Path(cell.file_name).name == cell.file_name
        assert re.fullmatch(r"winogender\.[A-Za-z0-9_+-]+\.parquet", cell.file_name)


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    return record_run(tmp_path / "run", LITTLE)


@pytest.mark.parametrize(
    "linked",
    [
        "nano",
        "nano/seed-0",
        "nano/seed-0/ppo/checkpoint-0",
        "nano/seed-0/ppo/checkpoint-0/evaluation",
    ],
)
def test_links_out_of_a_run(recorded: Path, tmp_path: Path, linked: str) -> None:
    place = recorded / linked
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    before = sorted((tmp_path / "elsewhere").rglob("*"))
    for act in (lambda: find_checkpoints(recorded), lambda: write_report(recorded, 10)):
        with pytest.raises(InputError, match="a link that leads out of"):
            act()
    assert sorted((tmp_path / "elsewhere").rglob("*")) == before


@pytest.mark.parametrize("name", ["run.json", "figures"])
def test_report_does_not_follow_links(recorded: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    if name == "figures":
        outside.mkdir()
    else:
        outside.write_text('{"secret": 1}')
    (recorded / name).unlink(missing_ok=True)
    (recorded / name).symlink_to(outside)
    with pytest.raises(InputError, match="a link that leads out of"):
        write_report(recorded, 10)
    assert not outside.is_dir() or not list(outside.iterdir())


@pytest.mark.parametrize("linked", ["ppo", "base.work", ""])
def test_training_does_not_follow_links(tmp_path: Path, linked: str) -> None:
    recipe = check_recipe(RECIPE, "x")
    job = tmp_path / "run" / recipe.models[0].name / "seed-0"
    (job / linked).parent.mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (job / linked).symlink_to(tmp_path / "outside")
    with pytest.raises(InputError, match="a link that leads out of"):
        run_job(recipe, tmp_path / "run", recipe.models[0].name, 0, lambda *_: None)
    assert list((tmp_path / "outside").iterdir()) == []


def test_run_behind_a_link(recorded: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(recorded)
    assert len(find_checkpoints(tmp_path / "link")) == 2


# ---- what is shown -----------------------------------------------------------------------------

ESCAPE = "\x1b[2J\x1b]0;taken\x07\u202e[red]"


def test_names_in_the_terminal_are_escaped(
    recorded: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = summarise(recorded / "nano/seed-0/ppo/checkpoint-0/evaluation", f"model{ESCAPE}")
    frame["condition"] = frame["condition"] + ESCAPE
    for table in (frame, frame.assign(step=0, run=f"run{ESCAPE}", seed=0)):
        console = Console(width=200, record=True, force_terminal=True)
        console.print(closing_table(pd.DataFrame(table)))
        shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)  # rich's own colours
        assert not set(shown) & set("\x1b\x07\u202e")
        assert "⟨U+001B⟩[2J" in shown and "[red]" in shown
    monkeypatch.setattr(sys, "argv", ["selfcorrect", "run", f"no{ESCAPE}such"])
    with pytest.raises(SystemExit):
        main()
    assert not set(capsys.readouterr().err) & set("\x1b\x07\u202e")


class Page(HTMLParser):
    """The elements and attributes of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))


MARKUP = (
    "</script><script>alert(1)</script><!--\u2028\"'>"
    "<img src=x onerror=alert(1)><a href=javascript:x>"
)


def drawn(frame: object, statistics: object, pronouns: object, folder: Path, paper: bool) -> object:
    """A figure whose title and words hold markup."""
    folder.mkdir()
    (folder / "x.svg").write_text(f"<svg>{MARKUP}</svg>")
    return [Drawing("x", f"title{MARKUP}", f"words{MARKUP}")], [f"not drawn{MARKUP}"]


def test_names_in_the_report_are_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model, category, item, sample, figure, run and its facts hold markup; a condition cannot."""
    monkeypatch.setattr("selfcorrect.evaluate.figures.gallery.draw_run", drawn)
    run = record_run(tmp_path / "[b]run <b>", LITTLE)
    for path in run.rglob("checkpoint.json"):
        record = json.loads(path.read_text())
        del record["checksum"]  # a stranger's record needs none
        path.write_text(json.dumps({**record, "model": f"nano{MARKUP}"}))
    (run / "run.json").write_text(json.dumps({f"key{MARKUP}": f"value{MARKUP}"}))
    (run / "recipe.yaml").write_text(f"name: x # {MARKUP}")
    for path in run.rglob("*.parquet"):
        table = pq.read_table(path)
        rows = table.to_pylist()
        for row in rows:
            row["item"] += MARKUP
            row["category"] += MARKUP
            row["samples"] = [f"said{MARKUP}"] if row["samples"] else None
        settings = json.loads(table.schema.metadata[b"selfcorrect"])
        settings["left_out"] = {f"reason{MARKUP}": 1}
        schema = table.schema.with_metadata({b"selfcorrect": json.dumps(settings)})
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    text = write_report(run, num_resamples=10).read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    tags = Counter(tag for tag, _ in page.elements)
    runs = [given for tag, given in page.elements if tag == "script" and "type" not in given]
    assert (len(runs), tags["img"], tags["b"]) == (2 if vega_script() else 1, 1, 0)
    assert text.count("onerror=alert") > 10 and "\u2028" not in text
    for tag, given in page.elements:
        assert not any(name.startswith("on") for name in given), (tag, given)
        target = given.get("href") or given.get("src") or "#"
        assert target.startswith(("#", "data:image/svg+xml;base64,")), target
    policy = next(given["content"] for tag, given in page.elements if "http-equiv" in given)
    assert policy and "default-src 'none'" in policy and "script-src 'sha256-" in policy


def test_model_card_metadata_are_escaped(recorded: Path, tmp_path: Path, monkeypatch) -> None:
    folder = recorded / "nano/seed-0/ppo/checkpoint-0/evaluation"
    hostile = "\n---\nlicense: other\n# \x1b[2J | <b>"
    cells = [
        replace(cell, condition=cell.condition + hostile)
        for cell in measure_folder(folder, "x", "x", None, Draws(20))
    ]
    monkeypatch.setattr("selfcorrect.evaluate.export.measure_folder", lambda *_: cells)
    path = write_model_card(folder, "evil\n---\n# title\u202e", tmp_path / "README.md")
    front, body = path.read_text(encoding="utf-8").removeprefix("---\n").split("\n---\n", 1)
    data = yaml.safe_load(front)
    assert list(data) == ["model-index"] and data["model-index"][0]["name"].startswith("evil\n---")
    assert "\u202e" not in body and "\x1b" not in body and "<b>" not in body
    rows = [line for line in body.splitlines() if " --- license" in line]
    assert len(rows) > 3 and all(row.replace("\\|", "").count("|") == 7 for row in rows)


def test_escape_controls() -> None:
    assert escape_controls("a\x1b[0m\u202eb") == "a⟨U+001B⟩[0m⟨U+202E⟩b"
