"""The code blocks of the tutorial and of README's Python example run, in a run of tiny models."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from selfcorrect.recipes.load import load_recipe
from selfcorrect.scripts.commands.__main__ import app
from tests.support import ROOT

FENCE = re.compile(r'^```(\w*)(?: title="([\w.]+)")?\n(.*?)^```', re.MULTILINE | re.DOTALL)
TUTORIAL = FENCE.findall((ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8"))
README = FENCE.findall((ROOT / "README.md").read_text(encoding="utf-8"))
# The quickstart with its largest model alone and the same steps, but less data, smaller batches,
# and one experiment.
SMALLER = [
    "data.society.corpus.documents=600",
    "data.society.corpus.stereotypes_first=200",
    "data.society.pairs=200",
    "data.society.prompts=100",
    "data.society.blocks_per_template=1",
    "policy.checkpoints=[0, 60]",
    "policy.trainer.per_device_train_batch_size=4",
    "policy.trainer.steps_per_generation=1",
    "policy.trainer.num_iterations=1",
    "evaluate.experiments=[bbq]",
    "evaluate.limit=16",
    "launch.jobs=1",
]

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("few_answers")]


def run_block(language: str, block: str) -> None:
    """Run a block of shell commands or of Python, in the working directory."""
    if language == "python":
        exec(compile(block, "block", "exec"), {"__name__": "tutorial"})
    elif language == "sh":
        for line in block.replace("\\\n", " ").splitlines():
            command, *arguments = shlex.split(line, comments=True)
            if command == "./scripts/quickstart":
                command, arguments = "selfcorrect", ["run", "quickstart"]
            assert command == "selfcorrect", line
            done = CliRunner().invoke(app, arguments, catch_exceptions=False)
            assert done.exit_code == 0, f"{line}\n{done.output}"


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Exception]:
    """Run the tutorial's blocks in order; return the exception of each block that failed.

    A file called quickstart takes precedence over the recipe that ships, so the commands run as
    they are printed.
    """
    failed: dict[int, Exception] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("tutorial"))
        small: dict[str, Any] = load_recipe("quickstart", SMALLER).model_dump(mode="json")
        small["models"] = small["models"][-1:]
        Path("quickstart").write_text(yaml.safe_dump(small), encoding="utf-8")
        for index, (language, title, block) in enumerate([*TUTORIAL, *README]):
            if title:
                Path(title).write_text(block, encoding="utf-8")
            elif index < len(TUTORIAL) or language == "python":  # README's commands: test_pages
                try:
                    run_block(language, block)
                except Exception as error:
                    failed[index] = error
    return failed


@pytest.mark.parametrize("index", range(len(TUTORIAL)))
def test_tutorial_block_runs(failures: dict[int, Exception], index: int) -> None:
    if index in failures:
        raise failures[index]


def test_readme_python_runs(failures: dict[int, Exception]) -> None:
    blocks = [i for i, (language, _, _) in enumerate(README, len(TUTORIAL)) if language == "python"]
    assert blocks
    for index in blocks:
        if index in failures:
            raise failures[index]


def test_quickstart_script_runs_the_shipped_recipe() -> None:
    """The tutorial's first command is replaced above by what the script executes."""
    script = (ROOT / "scripts" / "quickstart").read_text(encoding="utf-8")
    assert script.rstrip().endswith('selfcorrect run recipes/quickstart.yaml "$@"')
