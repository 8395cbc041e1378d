"""Vega, Vega-Lite and vega-embed as one script, from the package vl-convert-python."""

import os
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from selfcorrect.recipes.foundation.atomic_files import write_text


def vega_script() -> str | None:
    """Return the script to inline; None where vl-convert-python is not installed.

    Bundling takes seconds, so the result is kept in the user's cache folder by version.
    """
    try:
        import vl_convert
    except ImportError:
        return None
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 - never raises
    path = Path(cache) / "selfcorrect" / f"vega-{version('vl-convert-python')}.js"
    with suppress(OSError, ValueError):
        return path.read_text(encoding="utf-8")
    script: str = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub has no default
    with suppress(OSError):  # a read-only home: bundle again next time
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, script)
    return script
