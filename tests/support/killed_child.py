"""A child as the system's out-of-memory killer leaves it; light, since each child imports it."""

import os
import signal


def die(*_: object) -> None:
    """Be killed."""
    os.kill(os.getpid(), signal.SIGKILL)
