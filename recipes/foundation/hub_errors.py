"""Errors of the Hugging Face hub and its client, each as one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from selfcorrect.recipes.foundation.errors import (
    InputError,
    RunFailure,
    is_from_network,
    machine_fault,
    reason_of,
)


@contextmanager
def hub_errors(repo: str, action: Literal["upload", "download"]) -> Iterator[None]:
    """Raise InputError or RunFailure, in one line, in place of the hub client's errors.

    A RunFailure may pass by itself: the hub cannot be reached, limits requests, or answers with
    something else than its API, such as a login page.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    login = "run `hf auth login`, or set HF_TOKEN to a token that may "
    login += "write" if action == "upload" else "read it"
    try:
        yield
    except (InputError, RunFailure):
        raise
    except LocalTokenNotFoundError:
        raise InputError(f"{repo}: no token of the Hugging Face hub; {login}") from None
    except HFValidationError as error:
        raise InputError(f"{repo}: not a name of a repository ({_words(error)})") from None
    except OfflineModeIsEnabled:
        raise InputError(f"{repo}: HF_HUB_OFFLINE is set; unset it to {action}") from None
    except LocalEntryNotFoundError as error:
        raise RunFailure(f"{repo}: the hub cannot be reached ({_words(error)})") from None
    except HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else 0
        if action == "download":
            if isinstance(error, RevisionNotFoundError):
                raise InputError(f"{repo}: no such revision on the hub") from None
            if isinstance(error, GatedRepoError):
                raise InputError(
                    f"{repo}: its owners ask for consent; accept the terms on the hub and {login}"
                ) from None
            if isinstance(error, RepositoryNotFoundError):
                raise InputError(
                    f"{repo}: no such model on the hub; check the name, or, if it is private, "
                    f"{login}"
                ) from None
            if code == 429:
                raise RunFailure(f"{repo}: the hub limits the number of requests (429)") from None
        if code in (401, 403):
            raise InputError(f"{repo}: the hub refuses the token ({code}); {login}") from None
        raise RunFailure(f"{repo}: the hub refuses the {action} ({_words(error)})") from None
    except Exception as error:  # the client may be any of three libraries
        if machine_fault(error) is not None:
            raise
        if type(error).__module__.partition(".")[0] == "json":
            raise RunFailure(
                f"{repo}: the answer is not the hub's (a login page of the network?)"
            ) from None
        if is_from_network(error):
            raise RunFailure(f"{repo}: the hub cannot be reached ({_words(error)})") from None
        if isinstance(error, OSError) and error.errno is None:  # a broken transfer
            raise RunFailure(f"{repo}: the {action} failed ({_words(error)})") from None
        raise


def _words(error: BaseException) -> str:
    return reason_of(error)[:200]
