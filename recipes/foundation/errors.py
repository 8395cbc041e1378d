"""What a person did wrong, or what went wrong while running: both end in one clear line."""


class _OneLine(Exception):
    """Whatever is quoted in the message, line breaks in it become spaces."""

    def __init__(self, message: object = "") -> None:
        super().__init__(" ".join(str(message).split()))


class InputError(_OneLine):
    """The user's input is wrong (exit 2). The message is one line: file, key, remedy."""


class RunFailure(_OneLine):
    """Something failed while running (exit 1). The message is one line: what, where, remedy."""
