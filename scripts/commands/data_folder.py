"""The folder of benchmarks and feedback sets, and the option that names it."""

import os
from pathlib import Path
from typing import Annotated

import typer

from selfcorrect.recipes.foundation.errors import InputError

DataDir = Annotated[
    Path | None,
    typer.Option(
        help="Folder with bbq/, winogender/, ... [default: $SELFCORRECT_DATA_DIR, or "
        "selfcorrect/data in the user's cache folder]."
    ),
]


def default_data_dir() -> Path:
    """Return the folder of $SELFCORRECT_DATA_DIR, or the one in the user's cache folder."""
    named = os.environ.get("SELFCORRECT_DATA_DIR")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(named) if named else cache / "selfcorrect" / "data"


def existing_data_dir(given: Path | None) -> Path:
    """Return the given or the default folder; raises InputError if it does not exist."""
    folder = given or default_data_dir()
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such data folder; give --data-dir, or run `selfcorrect data fetch bbq`"
        )
    return folder
