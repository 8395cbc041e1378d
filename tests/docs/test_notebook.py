"""The notebook that draws the paper's figures runs from its first cell to its last."""

import json
import sys
from types import ModuleType
from typing import Any

import pytest

from selfcorrect.evaluate.results import write_results
from tests.support import ROOT
from tests.support.recorded_run import Size, record_run

NOTEBOOK = ROOT / "docs" / "examples" / "figures.ipynb"
SMALL = Size(steps=(0, 2, 10), templates=3, blocks=1, occupations=8, students=8)
FIGURES = ("steps", "size", "categories-bbq", "map-bbq", "map-effects-bbq", "effects", "runs-bbq")


def test_notebook_draws_the_figures_of_a_run(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_results(record_run(tmp_path / "runs" / "quickstart", SMALL), 20)
    monkeypatch.chdir(tmp_path)
    shown: list[str] = []
    ipython = ModuleType("IPython.display")  # so that the test needs no Jupyter
    monkeypatch.setattr(ipython, "Image", lambda filename: filename.stem, raising=False)
    monkeypatch.setattr(ipython, "display", shown.append, raising=False)
    monkeypatch.setitem(sys.modules, "IPython.display", ipython)
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    namespace: dict[str, Any] = {"__name__": "notebook"}
    for number, source in enumerate(code):
        exec(compile(source, f"{NOTEBOOK.name}, code cell {number}", "exec"), namespace)
    assert tuple(shown) == FIGURES
    files = {path.name for path in (tmp_path / "figures").iterdir()}
    assert files == {f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")}


def test_notebook_is_stored_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    outputs = [cell["outputs"] for cell in cells if cell["cell_type"] == "code"]
    assert outputs and not any(outputs)
