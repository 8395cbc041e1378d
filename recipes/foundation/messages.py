"""The one way out for messages: loggers named `selfcorrect.*`, which the commands send to stderr.

Code logs through `logging.getLogger(__name__)`. In another program these records go where that
program sends its own; the commands and their child processes call `log_to_stderr`.
"""

import logging
import sys

from selfcorrect.recipes.foundation.printable import escape_controls


class _OneLine(logging.Formatter):
    """Formats a record as one line, in which quoted names and texts cannot control the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return f"selfcorrect: {escape_controls(' '.join(record.getMessage().split()))}"


class _Stderr(logging.Handler):
    """Writes to the current `sys.stderr`, which tests and notebooks replace."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(self.format(record) + "\n")
        sys.stderr.flush()


def log_to_stderr() -> None:
    """Send this package's log records, from INFO on, to stderr, one escaped line each."""
    logger = logging.getLogger("selfcorrect")
    if not any(isinstance(handler, _Stderr) for handler in logger.handlers):
        handler = _Stderr()
        handler.setFormatter(_OneLine())
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
