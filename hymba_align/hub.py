"""What the Hugging Face hub gives out, told in seconds: its own client asks for a minute where there is no network."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

Kind = Literal["model", "dataset"]
TIMEOUT_S = 3.0
CLIENTS = ("httpx", "httpcore", "httpx2", "httpcore2", "requests")
"""Packages through which versions of huggingface_hub speak; their errors have no common base"""


def is_forbidden() -> bool:
    """Whether HF_HUB_OFFLINE forbids to ask the hub."""
    from huggingface_hub.constants import ENV_VARS_TRUE_VALUES

    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ENV_VARS_TRUE_VALUES


def is_cached(name: str, kind: Kind) -> bool:
    """Whether the cache holds a version of a repository."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}" / "snapshots"
    return folder.is_dir() and any(folder.iterdir())


def hub_problem(name: str, kind: Kind) -> str | None:
    """Why a repository cannot be had, asked once with a short timeout; None if it can."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().repo_info(name, repo_type=kind, timeout=TIMEOUT_S)
    except (HfHubHTTPError, OSError, RuntimeError) as error:
        return f"the hub does not give it out: {(str(error).strip() or type(error).__name__).splitlines()[0][:200]}"
    except Exception as error:
        if not is_network_error(error):
            raise
        return f"the hub does not answer within {TIMEOUT_S:.0f} s: {type(error).__name__}"
    return None


def is_network_error(error: Exception) -> bool:
    """Whether an error is one of those with which the hub's client reports its network."""
    return type(error).__module__.partition(".")[0] in CLIENTS


@contextmanager
def cache_alone() -> Iterator[None]:
    """Lets `datasets` read what is in its cache and ask nobody, as HF_HUB_OFFLINE does for a whole process, silently."""
    from datasets import config
    from datasets.utils import logging

    before, verbosity = config.HF_HUB_OFFLINE, logging.get_verbosity()
    config.HF_HUB_OFFLINE = True
    logging.set_verbosity_error()
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before
        logging.set_verbosity(verbosity)
