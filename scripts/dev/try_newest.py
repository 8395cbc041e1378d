"""Install the newest release of everything and say what breaks.

    python scripts/dev/try_newest.py FOLDER [--tests "tests/train/ppo tests/evaluate/scoring"]

FOLDER gets a virtual environment with the newest releases that pyproject.toml allows; its tests
run. Then the newest release of each library with an upper bound is installed over the allowed one,
its own requirements included, and the tests run again. Prints a line for each try, with the first
failure; the exit code is 1 if one fails.
"""

import argparse
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = (
    "tests/train/ppo/test_trl_contract.py tests/train/ppo/test_ppo_step.py tests/evaluate/scoring"
)


def bounded_libraries() -> list[str]:
    """Return the names of the libraries to which pyproject.toml sets an upper bound."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    return [re.split(r"[^A-Za-z0-9_.-]", line)[0] for line in lines if "<" in line]


def call(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository; keep its output."""
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def fails(python: str, requirement: str, tests: list[str]) -> bool:
    """Install a requirement, run the tests, print the outcome; return whether anything failed."""
    pip = call(python, "-m", "pip", "install", "--quiet", "--upgrade", requirement)
    done = pip if pip.returncode else call(python, "-m", "pytest", "-q", "-x", *tests)
    versions = call(python, "-m", "pip", "list", "--format=freeze").stdout
    name = requirement.partition("[")[0]
    version = re.search(rf"(?im)^{re.escape(name)}==(\S+)", versions)
    wrong = re.search(r"(?m)^(FAILED|ERROR|E  ).*", done.stdout) or re.search(
        r"ERROR.*", done.stderr
    )
    outcome = "passes" if not done.returncode else wrong.group() if wrong else done.stdout[-300:]
    print(f"{requirement} {version.group(1) if version else ''}: {outcome.strip()}", flush=True)
    return bool(done.returncode)


def main() -> None:
    """Try what pyproject.toml allows, then each library beyond its bound."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tests", default=TESTS)
    arguments = parser.parse_args()
    tests, python = arguments.tests.split(), str(arguments.folder / "bin" / "python")
    call(sys.executable, "-m", "venv", str(arguments.folder))
    failures = [fails(python, ".[dev]", tests)]
    for name in bounded_libraries():
        failures.append(fails(python, name, tests))
        call(python, "-m", "pip", "install", "--quiet", "--upgrade", ".[dev]")  # back in bounds
    sys.exit(any(failures))


if __name__ == "__main__":
    main()
