"""What a full disk, a file system that turned read-only, or one that went away says to the user."""

from __future__ import annotations

import contextlib
import errno
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from hymba_align.errors import Preempted, StorageError, UsageError

GB = 1e9

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
GONE = {errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT}
# The libraries that write weights have errors of their own, with the system's number in the text (safetensors, in Rust)
# or without any (torch, which says only that it wrote less than it should have).
OS_ERROR = re.compile(r"\(os error (\d+)\)|\bcode: (\d+)\b")
TORN_WRITE = re.compile(r"PytorchStreamWriter failed|inline_container\.cc.*unexpected pos", re.DOTALL)
AGAIN = "then run the same command again"
RESUMES = f"{AGAIN}: it continues from the last complete checkpoint"


@contextlib.contextmanager
def writing(folder: Path, *, needed_bytes: Callable[[], int] | None = None, resumes: str = RESUMES) -> Iterator[None]:
    """Turns what a write below `folder` can raise into a StorageError; other errors pass unchanged.

    Args:
        needed_bytes: what has to fit, where that is known.
        resumes: end of the message: how to go on afterwards.
    """
    try:
        yield
    except (StorageError, UsageError, Preempted):
        raise
    except Exception as error:
        number = _error_number(error, folder)
        if number is None:
            raise
        raise StorageError(
            _message(error, number, folder, needed_bytes() if needed_bytes is not None else None, resumes)
        ) from error


def _error_number(error: BaseException | None, folder: Path) -> int | None:
    """The system's number of a failed write, out of the error or of what caused it; None for any other error."""
    while error is not None:
        if isinstance(error, OSError):
            writes = error.errno in FULL or error.errno == errno.EROFS
            elsewhere = (
                error.filename is not None and folder.absolute() not in Path(str(error.filename)).absolute().parents
            )
            failed = writes or (error.errno in READ_ONLY | GONE and not elsewhere)
            return error.errno if failed else None
        found = OS_ERROR.search(str(error))
        if found is not None and int(found[1] or found[2]) in FULL | READ_ONLY | GONE:
            return int(found[1] or found[2])
        if TORN_WRITE.search(str(error)):
            return errno.ENOSPC
        error = error.__cause__
    return None


def _message(error: Exception, number: int, folder: Path, needed: int | None, resumes: str) -> str:
    named = getattr(error, "filename2", None) or getattr(error, "filename", None)
    where = Path(str(named)) if named is not None else folder
    if number in FULL:
        return f"{where} cannot be written ({_FULL[number]}); {_make_room(folder, number, needed)}, {resumes}"
    if number in READ_ONLY:
        what = "its file system is read-only" if number == errno.EROFS else "this user may not write there"
        return f"{where} cannot be written ({what}); make it writable, {resumes}"
    return (
        f"{where} cannot be written (the disk or the network file system failed: {errno.errorcode[number]}); have it checked, "
        f"{resumes}"
    )


_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than this process may write: ulimit -f",
}


def _make_room(folder: Path, number: int, needed: int | None) -> str:
    if number == errno.EFBIG:
        return "raise the limit"
    there = next((each for each in (folder, *folder.absolute().parents) if each.exists()), Path("/"))
    free = shutil.disk_usage(there).free
    if needed is None:
        return f"free some room ({free / GB:.3g} GB are left at {there})"
    return f"free at least {max(needed - free, 0) / GB:.3g} GB (a checkpoint takes about {needed / GB:.3g} GB, {free / GB:.3g} GB are left)"
