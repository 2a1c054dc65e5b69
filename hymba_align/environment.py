"""The machine and the libraries that a run was made with."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import hymba_align

LIBRARIES = ("torch", "transformers", "trl", "accelerate", "deepspeed", "datasets", "peft", "lm-eval", "hymba-align")


def environment() -> dict[str, Any]:
    """What a result depends on besides the recipe; no paths and no environment variables, so no secrets either."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "gpus": _lines_of("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"),
        "git_revision": _git_revision(),
        "versions": {library: _version(library) for library in LIBRARIES},
    }


def _version(library: str) -> str | None:
    if library == "hymba-align":
        return hymba_align.__version__
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """The commit of the source tree this package runs from; None for an installed package."""
    source = Path(hymba_align.__file__).resolve().parent.parent
    if not (source / ".git").exists():
        return None
    return next(iter(_lines_of("git", "-C", str(source), "rev-parse", "HEAD")), None)


def _lines_of(*command: str) -> list[str]:
    """The output lines of a command; none where it is absent or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]
