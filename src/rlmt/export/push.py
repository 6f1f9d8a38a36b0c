"""Uploads an exported folder to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from rlmt.errors import UserError, first_line

_REFUSED = {
    401: "the hub refuses the token; log in again with `hf auth login`",
    403: "the hub refuses the token; use a repository of your own, and a token that may write to it",
}


def open_repository(repo: str, public: bool) -> None:
    """Creates a repository, or checks an existing one, before anything is exported.

    Args:
        repo: Name, as USER/NAME.
        public: Whether everyone may read it.

    Raises:
        UserError: There is no token, the name is none, the hub refuses or cannot be reached, or the repository is
            public and `public` is not set.
    """
    if get_token() is None:
        raise UserError(f"--push {repo}: no Hugging Face token was found; run `hf auth login`, or set HF_TOKEN.")
    try:
        api = HfApi()
        created = api.create_repo(repo, private=not public, exist_ok=True).repo_id
        is_private = bool(api.model_info(created).private)
    except HFValidationError as error:
        raise UserError(f"--push {repo}: is not the name of a repository; pass USER/NAME.") from error
    except Exception as error:
        raise _reported(repo, error, "") from error
    if not (public or is_private):
        raise UserError(f"--push {repo}: the repository exists and is public; add --public true, or pass another one.")


def upload(folder: Path, repo: str) -> str:
    """Uploads all files of a folder in one commit.

    Args:
        folder: The exported folder.
        repo: Name of an open repository.

    Returns:
        URL of the repository.

    Raises:
        UserError: The hub refuses or cannot be reached; the folder stays as it is.
    """
    api = HfApi()
    try:
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload a model trained with rlmt")
    except Exception as error:
        later = f"; {folder} is complete, and `hf upload {repo} {folder}` uploads it later"
        raise _reported(repo, error, later) from error
    return f"{api.endpoint}/{repo}"


def _reported(repo: str, error: Exception, later: str) -> Exception:
    """The error of a request as one line; an error of another kind as it is."""
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        reason = _REFUSED.get(status, f"the hub answered with status {status} ({first_line(error)})")
        return UserError(f"--push {repo}: {reason}{later}.")
    if isinstance(error, OSError | RuntimeError | ValueError) or type(error).__module__.startswith("httpx"):
        return UserError(
            f"--push {repo}: the hub cannot be reached ({first_line(error)}){later or '; try again later'}."
        )
    return error
