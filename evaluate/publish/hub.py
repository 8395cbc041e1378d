"""Push results and checkpoints to the Hugging Face hub, only when asked to."""

from pathlib import Path

from selfcorrect.recipes.foundation.hub_errors import hub_errors


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
    with hub_errors(repo, "upload"):
        url = api.create_repo(repo, repo_type=kind, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            repo_type=kind,
            folder_path=folder,
            commit_message="Upload by selfcorrect",
        )
    return str(url)
