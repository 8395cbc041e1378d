"""The documentation site builds without warnings, from the schema and docstrings as they are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from selfcorrect.recipes.schema import Recipe
from tests.support import ROOT

pytest.importorskip("mkdocs")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; warnings, such as a dead link, fail the build."""
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_every_key_of_a_recipe_has_a_row(site: Path) -> None:
    page = (site / "reference" / "recipe" / "index.html").read_text(encoding="utf-8")
    schema = Recipe.model_json_schema()
    sections = [schema, *schema["$defs"].values()]
    keys = {key for section in sections for key in section.get("properties", {})}
    assert len(keys) > 60
    assert not [key for key in sorted(keys) if f"<code>{key}</code>" not in page]


def test_the_python_api_is_documented(site: Path) -> None:
    page = (site / "reference" / "python" / "index.html").read_text(encoding="utf-8")
    for name in (
        "train.run.run_recipe",
        "evaluate.callback.SelfCorrectionCallback",
        "evaluate.results.load",
        "evaluate.experiments.base.Experiment",
        "train.ppo.trainer.PPOTrainer",
    ):
        assert f'id="selfcorrect.{name}"' in page, name


def test_the_glossary_is_that_of_contributing(site: Path) -> None:
    page = (site / "glossary" / "index.html").read_text(encoding="utf-8")
    assert page.count("<tr>") > 20 and "rollout batch" in page


def test_the_diagram_of_a_ppo_step_is_that_of_the_trainer(site: Path) -> None:
    page = (site / "architecture" / "index.html").read_text(encoding="utf-8")
    assert page.count('class="mermaid"') == 2 and "_compute_loss" in page


def test_pages_load_nothing_from_font_servers(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert "fonts.googleapis" not in text and "fonts.gstatic" not in text, page
