"""A folder that appears whole or not at all, where nothing else lies."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from hymba_align.errors import StorageError, UsageError
from hymba_align.files import sync_file, sync_folder
from hymba_align.run.storage import AGAIN, writing

GB = 1e9
SLACK = 1.02  # tokenizer, configuration and card beside the weights


def check_output(output: Path, needed_bytes: int) -> None:
    """Raises UsageError where something is in the way of a new folder, StorageError where the disk is too small for it."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UsageError(f"{output} is there already, and is no folder; name a new folder")
    if output.is_dir() and any(output.iterdir()):
        raise UsageError(f"{output} is not empty, and nothing is written over; name a new folder")
    around = next(parent for parent in (output.absolute(), *output.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(around).free
    if free < needed_bytes * SLACK:
        raise StorageError(
            f"{output} needs {needed_bytes * SLACK / GB:,.1f} GB, and its disk has {free / GB:,.1f} GB left; make room, or name a "
            "folder on another disk"
        )


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its name at the end, durable, with the user's own file modes.

    Raises: StorageError where it cannot be written; whatever is raised inside removes it.
    """
    temporary = output.absolute().with_name(f".{output.absolute().name}.{os.getpid()}.tmp")
    with writing(output.absolute().parent, resumes=AGAIN):
        temporary.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            _make_durable(temporary)
            temporary.rename(output.absolute())  # onto an empty folder too
            sync_folder(output.absolute().parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _make_durable(folder: Path) -> None:
    """Files get the mode that the user's umask gives: safetensors writes 0600."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            path.chmod(mode)
            sync_file(path)
    sync_folder(folder)
