"""Link the packages under build/typing, where type checkers and editors find them.

mypy and pyright do not read setuptools' package-dir; pyproject.toml names build/typing to both.
"""

import shutil
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """Make build/typing/selfcorrect/<package> a link to each top-level folder of code."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    target = ROOT / "build" / "typing" / "selfcorrect"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for package, folder in settings["tool"]["setuptools"]["package-dir"].items():
        if package.count(".") == 1:
            (target / package.rpartition(".")[2]).symlink_to(ROOT / folder)


if __name__ == "__main__":
    main()
