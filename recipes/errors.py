"""What a person did wrong, or what went wrong while running: both end in one clear line."""


class InputError(Exception):
    """The user's input is wrong (exit 2). The message is one line: file, key, remedy."""


class RunFailure(Exception):
    """Something failed while running (exit 1). The message is one line: what, where, remedy."""
