"""A folder to a repository on the Hugging Face hub, or on a server of its layout."""

from __future__ import annotations

from pathlib import Path

from dgpo.errors import DgpoError, first_line
from dgpo.runs.artifacts import MANIFEST


def push(folder: Path, repo: str, *, endpoint: str | None = None, private: bool = False) -> str:
    """Makes the repository if it is not there, and uploads the folder as one commit. Returns the commit's address.

    Our own manifest stays here: it names paths of this machine.

    Args:
        repo: `user/name`.
        endpoint: of the server; None: `HF_ENDPOINT`, or huggingface.co.

    Raises:
        DgpoError: with the reason, and what to do.
    """
    import httpx
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi(endpoint=endpoint)
    if api.endpoint != constants._HF_DEFAULT_ENDPOINT:
        # Servers of the hub's layout take files over HTTP; its chunk storage is the hub's own.
        constants.HF_HUB_DISABLE_XET = True
    try:
        repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            ignore_patterns=[MANIFEST],
            commit_message=f"Upload of {folder.name} by dgpo",
        )
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        hint = "log in with `hf auth login`, or set HF_TOKEN" if status in (401, 403) else "check name and server"
        raise DgpoError(f"{api.endpoint} refuses {repo} ({first_line(error)}): {hint}") from error
    except HFValidationError as error:
        raise DgpoError(f"export.push={repo} is no name of a repository, expected user/name") from error
    except (httpx.HTTPError, OSError, RuntimeError, ValueError) as error:
        raise DgpoError(
            f"{folder} could not be pushed to {api.endpoint} ({first_line(error)}); the same command tries again"
        ) from error
    return commit.commit_url
