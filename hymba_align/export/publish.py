"""An exported folder as a repository of the Hugging Face hub, through its own client."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from hymba_align.checkpoint_checks import first_line
from hymba_align.errors import HymbaAlignError, UsageError
from hymba_align.hub import is_network_error
from hymba_align.secrets import redact

if TYPE_CHECKING:
    from huggingface_hub import HfApi

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
MESSAGE = "Model exported by hymba-align"


def check_push(repository: str) -> None:
    """Raises UsageError where a push cannot begin: no name, no network by choice, no token. Asks the hub nothing."""
    from huggingface_hub import constants, get_token

    if REPOSITORY.fullmatch(repository) is None:
        raise UsageError("--push needs a repository of the hub as OWNER/NAME, such as my-name/my-hymba")
    if constants.is_offline_mode():
        raise UsageError(f"{repository} cannot be pushed to: HF_HUB_OFFLINE is set; unset it, or leave --push out")
    if not get_token():
        raise UsageError(
            f"{repository} cannot be pushed to without a token that may write: set the environment variable HF_TOKEN, or run "
            "'hf auth login'"
        )


def push(folder: Path, repository: str, *, private: bool, api: HfApi | None = None) -> str:
    """The address of the hub repository to which a folder was uploaded, in one commit; made where it is not there.

    Raises: UsageError for a public repository where a private one was asked for, HymbaAlignError for what the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    client = api if api is not None else HfApi(library_name="hymba-align")
    try:
        client.create_repo(repository, private=private or None, exist_ok=True)
        if private and not client.repo_info(repository).private:
            raise UsageError(f"{repository} is there and public, and --private was asked for; nothing was uploaded")
        commit = client.upload_folder(repo_id=repository, folder_path=folder, commit_message=MESSAGE)
    except Exception as error:
        if not isinstance(error, (HfHubHTTPError, OfflineModeIsEnabled, OSError)) and not is_network_error(error):
            raise
        raise HymbaAlignError(
            f"{folder} is written, and could not be pushed to {repository}: {redact(first_line(error))}; push it later with "
            f"'hf upload {repository} {folder}'"
        ) from error
    return str(commit.repo_url)
