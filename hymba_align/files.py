"""Files that appear whole or not at all, and digests of what files and values hold."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from hymba_align.errors import CheckpointError
from hymba_align.recipe import is_local_path


def fingerprint(value: Any) -> str:
    """SHA-256 of the canonical JSON of a plain value: equal for equal values, whatever the order of their keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def path_digest(name: str | None) -> str | None:
    """A digest of what a local path holds now; for a hub name (and None) the name stands for itself.

    A folder counts with the files directly in it, as a checkpoint or tokenizer has them.
    """
    if name is None or not is_local_path(name):
        return name
    path = Path(name)
    if path.is_dir():
        return fingerprint({file.name: file_digest(file) for file in sorted(path.iterdir()) if file.is_file()})
    return file_digest(path) if path.is_file() else name


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises: OSError, or ValueError when it holds something else."""
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def checked_file(folder: Path, name: str, title: str | Path) -> Path | None:
    """The file of that name in a checkpoint or tokenizer folder; None where there is none.

    Raises: CheckpointError for a link that leads out of the folder, unless into the hub's cache that it belongs to.
    """
    file = folder / name
    if not file.is_symlink() and not file.is_file():
        return None
    real, home = file.resolve(), folder.resolve()
    in_cache = home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs"
    if not real.is_relative_to(home) and not in_cache:
        raise CheckpointError(
            f"{title}: {name} is a link that leads out of the folder, to {real}; put the file itself there"
        )
    return file if real.is_file() else None


def write_json(path: Path, value: Any) -> None:
    """Writes JSON that appears whole or not at all."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """The text of a JSON file that people may read."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Writes text that appears whole or not at all, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Makes the content of a file durable, whoever wrote it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Makes what was created, renamed or removed in a folder durable, where the system lets a folder be opened for it."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
