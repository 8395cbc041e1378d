"""Errors of the Hugging Face hub and its client, each as one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import shorten
from typing import Literal

from selfcorrect.recipes.foundation.errors import (
    InputError,
    RunFailure,
    is_from_network,
    machine_fault,
    raised_in,
    reason_of,
)

Action = Literal["upload", "download"]


@contextmanager
def hub_errors(repo: str, action: Action) -> Iterator[None]:
    """Raise InputError or RunFailure, in one line, in place of the hub client's errors.

    A RunFailure may pass by itself: the hub cannot be reached, limits requests, or answers with
    something else than its API, such as a login page. Errors of this machine, of its files and of
    our own code stay as they are.
    """
    try:
        yield
    except (InputError, RunFailure):
        raise
    except Exception as error:  # the client may be any of three libraries
        is_ours = raised_in(error).startswith("selfcorrect.")
        is_of_file = isinstance(error, OSError) and error.filename is not None
        if machine_fault(error) is not None or is_of_file or is_ours:
            raise
        raise _one_line(_first_cause(error), repo, action) from None


def _first_cause(error: BaseException) -> BaseException:
    """Return why the client says that it has no local copy, if there is a reason."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    while isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _one_line(error: BaseException, repo: str, action: Action) -> InputError | RunFailure:
    from huggingface_hub.errors import (
        FileMetadataError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    words = shorten(reason_of(error), 200, placeholder=" ...")
    login = "run `hf auth login`, or set HF_TOKEN to a token that may "
    login += "write" if action == "upload" else "read it"
    if isinstance(error, LocalTokenNotFoundError):
        return InputError(f"{repo}: no token of the Hugging Face hub; {login}")
    if isinstance(error, HFValidationError):
        return InputError(f"{repo}: not a name of a repository ({words})")
    if isinstance(error, OfflineModeIsEnabled):
        return InputError(f"{repo}: HF_HUB_OFFLINE is set; unset it to {action}")
    if isinstance(error, HfHubHTTPError):
        code = error.response.status_code if error.response is not None else 0
        if action == "download":
            if isinstance(error, RevisionNotFoundError):
                return InputError(f"{repo}: no such revision on the hub")
            if isinstance(error, GatedRepoError):
                return InputError(
                    f"{repo}: its owners ask for consent; accept the terms on the hub and {login}"
                )
            if isinstance(error, RepositoryNotFoundError):
                return InputError(
                    f"{repo}: no such model on the hub; check the name, or, if it is private, "
                    f"{login}"
                )
            if code == 429:
                return RunFailure(f"{repo}: the hub limits the number of requests (429)")
        if code in (401, 403):
            return InputError(f"{repo}: the hub refuses the token ({code}); {login}")
        return RunFailure(f"{repo}: the hub refuses the {action} ({words})")
    if isinstance(error, LocalEntryNotFoundError) or is_from_network(error):
        return RunFailure(f"{repo}: the hub cannot be reached ({words})")
    is_json = type(error).__module__.partition(".")[0] == "json"
    if is_json or isinstance(error, FileMetadataError | KeyError | TypeError | AttributeError):
        return RunFailure(f"{repo}: the answer is not the hub's (a login page of the network?)")
    return RunFailure(f"{repo}: the {action} failed ({words})")  # such as a broken transfer
