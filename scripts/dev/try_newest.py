"""Install the newest release of everything and say what breaks.

    python scripts/dev/try_newest.py FOLDER [--tests "tests/train/ppo tests/evaluate/scoring"]

FOLDER gets a virtual environment with the newest releases that pyproject.toml allows; its tests
run. Then the newest release of each library with an upper bound is installed over the allowed one,
its own requirements included, and the tests run again. Prints for each try the versions that it
changed, and what failed; the exit code is 1 if anything did. An environment that is there already
is brought up to date.
"""

import argparse
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ALLOWED = ".[dev,lm-eval]"
TESTS = (
    "tests/train/ppo/test_trl_contract.py tests/train/ppo/test_ppo_step.py tests/evaluate/scoring"
)
SHOWN = 20  # failures, each on its line


def bounded_libraries() -> list[str]:
    """Return the names of the libraries to which pyproject.toml sets an upper bound."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    return [re.split(r"[^A-Za-z0-9_.-]", line)[0] for line in lines if "<" in line]


def call(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository; keep its output."""
    wide = {**os.environ, "COLUMNS": "300"}  # pytest cuts reasons off
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=wide)


def install(python: str, requirement: str) -> subprocess.CompletedProcess[str]:
    """Install the newest release of a library, and for what is allowed that of all it needs."""
    strategy = "eager" if requirement == ALLOWED else "only-if-needed"  # one library beyond
    newest = ("--upgrade", "--upgrade-strategy", strategy)
    return call(python, "-m", "pip", "install", "--quiet", *newest, requirement)


def versions(python: str) -> dict[str, str]:
    """Return the version of each installed library by name."""
    lines = call(python, "-m", "pip", "list", "--format=freeze").stdout.splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def fails(python: str, requirement: str, tests: list[str]) -> bool:
    """Install a requirement, run the tests, print the outcome; return whether anything failed."""
    before = versions(python)
    done = install(python, requirement)
    if done.returncode:
        reasons = re.findall(r"(?m)^ERROR: (.*)", done.stderr) or [done.stderr[-300:].strip()]
        print(f"{requirement}: cannot be installed: {' '.join(reasons)}", flush=True)
        return True
    done = call(python, "-m", "pytest", "-rfE", "--tb=no", *tests)  # -q is pyproject.toml's
    changed = [f"{name} {v}" for name, v in versions(python).items() if before.get(name) != v]
    new = ", ".join(changed) if len(changed) < SHOWN else f"{len(changed)} libraries"
    print(f"{requirement} ({new or 'nothing new'}): ", end="")
    failures = re.findall(r"(?m)^(?:FAILED|ERROR) .*", done.stdout)
    count = re.findall(r"(?m)^.*\b(?:passed|failed|errors?)\b.* in .*", done.stdout)
    print(count[-1].strip("= ") if count else (done.stdout + done.stderr)[-300:].strip())
    for line in failures[:SHOWN]:
        print(f"    {line}")
    if len(failures) > SHOWN:
        print(f"    and {len(failures) - SHOWN} more")
    sys.stdout.flush()
    return bool(done.returncode)


def main() -> None:
    """Try what pyproject.toml allows, then each library beyond its bound."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tests", default=TESTS)
    arguments = parser.parse_args()
    tests, python = arguments.tests.split(), str(arguments.folder.absolute() / "bin" / "python")
    if not Path(python).exists():
        call(sys.executable, "-m", "venv", str(arguments.folder))
    failures = [fails(python, ALLOWED, tests)]
    for name in bounded_libraries():
        failures.append(fails(python, name, tests))
        install(python, ALLOWED)  # back in bounds
    sys.exit(any(failures))


if __name__ == "__main__":
    main()
