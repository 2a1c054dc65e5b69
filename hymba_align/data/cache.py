"""Prepared data kept on disk under a key of everything that it depends on.

Nothing is ever looked up by name or date: a key holds digests of the content (rows, converter, tokenizer, template, this
package's code) and every setting, so a cache entry that is found is the one that would be made. An entry appears whole or
not at all, synced, with a record of what is in it; one that no longer holds that is made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hymba_align.data.template import backend
from hymba_align.errors import DataError
from hymba_align.files import file_digest, read_json, sync_file, sync_folder, write_json
from hymba_align.terminal import print_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDER = "hymba_align"
CONTENTS = "contents.json"
"""In every entry: size in bytes and SHA-256 of each of its files."""
LOCK = ".lock"
"""In a folder that is being filled; whoever fills it holds a lock on it, which ends with the process."""


def cached(key: Mapping[str, Any], build: Callable[[Path], None]) -> Path:
    """The folder that `build` filled for an equal key, now or earlier; it appears whole or not at all.

    It lies in the cache of `datasets` (HF_DATASETS_CACHE). One that is damaged is named on stderr and filled again.
    Raises: DataError when it cannot be written there; whatever `build` raises.
    """
    folder = cache_folder(key)
    root = folder.parent
    damage = _damage(folder)
    if folder.is_dir() and damage is None:
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        if damage is not None:
            print_words(f"prepared data in {folder} is damaged ({damage}); it is made again", stderr=True)
            shutil.rmtree(folder)
        _remove_abandoned(root)
        with _new_folder(root, folder.name[:16]) as built:
            build(built)
            _seal(built)
            os.rename(built, folder)
        sync_folder(root)
    except OSError as error:
        if not folder.is_dir():  # else another process was faster, with the same result
            raise DataError(
                f"prepared data cannot be written to {root} ({error.strerror or error}); set HF_DATASETS_CACHE to a folder "
                "with room"
            ) from error
    return folder


def _seal(built: Path) -> None:
    """Makes the files of an entry durable, and records what they hold."""
    contents = {}
    for path in sorted(path for path in built.rglob("*") if path.is_file() and path.name != LOCK):
        sync_file(path)
        contents[path.relative_to(built).as_posix()] = [path.stat().st_size, file_digest(path)]
    write_json(built / CONTENTS, contents)


def _damage(folder: Path) -> str | None:
    """What is wrong with an entry, if anything. Files that `datasets` puts beside its own are none of it."""
    if not folder.is_dir():
        return None
    try:
        for name, (size, digest_) in read_json(folder / CONTENTS).items():
            path = folder / name
            if path.stat().st_size != size or file_digest(path) != digest_:
                return f"{name} is not what was written"
    except (OSError, ValueError, TypeError) as error:
        return " ".join(str(error).split())
    return None


@contextlib.contextmanager
def _new_folder(root: Path, name: str) -> Iterator[Path]:
    """A folder to fill, gone at the end unless it was renamed; a process that is killed leaves it to `_remove_abandoned`."""
    with (
        tempfile.TemporaryDirectory(prefix=f".{name}.", dir=root, ignore_cleanup_errors=True) as built,
        open(Path(built) / f"{LOCK}.new", "w", encoding="utf-8") as lock,
    ):
        _try_to_lock(lock.fileno())
        os.rename(lock.name, Path(built) / LOCK)  # only now, so that nobody finds it unlocked
        yield Path(built)


def _remove_abandoned(root: Path) -> None:
    """Removes what processes that no longer run had begun to fill."""
    for path in root.glob(f".*/{LOCK}"):
        with contextlib.suppress(OSError), path.open("r+", encoding="utf-8") as lock:
            if _try_to_lock(lock.fileno()):
                shutil.rmtree(path.parent, ignore_errors=True)


def _try_to_lock(descriptor: int) -> bool:
    """Whether this process now holds the lock of an open file; never where the system has no such locks."""
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def cache_folder(key: Mapping[str, Any]) -> Path:
    """Where `cached` keeps what belongs to the key; it need not be there."""
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / FOLDER / digest(key)


def digest(value: Any) -> str:
    """A name for plain values: equal for equal ones."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def code_digest() -> str:
    """Changes with this package's data code and template, and with the libraries that tokenize."""
    import tokenizers
    import transformers

    content = hashlib.sha256(f"{transformers.__version__} {tokenizers.__version__}".encode())
    for path in sorted(Path(__file__).parent.rglob("*")):
        if path.suffix in (".py", ".jinja"):
            content.update(path.read_bytes())
    return content.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Changes with the vocabulary, the special tokens and the chat template."""
    parts = [backend(tokenizer).to_str(), tokenizer.special_tokens_map, tokenizer.chat_template]
    return digest([str(part) for part in parts])
