"""The console on which commands print tables."""

from rich.console import Console


def table_console(width: int, fit: bool = True) -> Console:
    """Return a console on stdout that is as wide as the terminal, or `width` columns without one.

    With `fit=False` it has at least `width` columns: a narrow terminal then wraps lines, where rich
    would cut numbers.
    """
    console = Console()
    if console.is_terminal and (fit or console.width >= width):
        return console
    return Console(width=width)
