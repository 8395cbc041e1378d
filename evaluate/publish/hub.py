"""Push results and checkpoints to the Hugging Face hub, only when asked to."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selfcorrect.recipes.foundation.errors import InputError, RunFailure


def push_folder(
    folder: Path, repo: str, *, kind: str, private: bool = True, endpoint: str | None = None
) -> str:
    """Upload all files of `folder` in one commit, and return the repository's address.

    `kind` is "model" or "dataset". A repository that does not exist is created. The token is that
    of `hf auth login` or of HF_TOKEN. Raises InputError for a missing or refused token or a wrong
    name, RunFailure if the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint)
    with _one_line(repo):
        url = api.create_repo(repo, repo_type=kind, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            repo_type=kind,
            folder_path=folder,
            commit_message="Upload by selfcorrect",
        )
    return str(url)


@contextmanager
def _one_line(repo: str) -> Iterator[None]:
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    login = "run `hf auth login`, or set HF_TOKEN to a token that may write"
    try:
        yield
    except LocalTokenNotFoundError:
        raise InputError(f"{repo}: no token of the Hugging Face hub; {login}") from None
    except HFValidationError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{repo}: not a name of a repository ({reason})") from None
    except HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else 0
        if code in (401, 403):
            raise InputError(f"{repo}: the hub refuses the token ({code}); {login}") from None
        reason = " ".join(str(error).split())[:200]
        raise RunFailure(f"{repo}: the hub refuses the upload ({reason})") from None
    except OfflineModeIsEnabled:
        raise InputError(f"{repo}: HF_HUB_OFFLINE is set; unset it to push") from None
    except Exception as error:  # the hub's client may be any of three libraries
        library = type(error).__module__.partition(".")[0]
        if library not in ("httpx", "httpx2", "requests") and not isinstance(error, OSError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise RunFailure(f"{repo}: the hub cannot be reached ({reason})") from None
