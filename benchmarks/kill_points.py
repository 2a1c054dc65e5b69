"""Processes that die of SIGKILL at a chosen file operation: before a file is opened for writing, renamed, removed or synced.

A process that has imported everything forks one child per kill, so that a kill costs what the work costs and no start.
Operations are those of Python's audit events (https://docs.python.org/3/library/audit_events.html) and `os.fsync`, in the
folders that are watched. What libraries in other languages write is seen when Python syncs or renames it. Linux only.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
FOLDER_ARGUMENT = {"os.rename": 2, "os.remove": 1, "os.mkdir": 2, "os.rmdir": 1, "os.link": 2, "os.symlink": 2}
"""Events that change a folder, and which argument is the descriptor of an open folder that the path is relative to, or -1."""
SYNC, SYNC_FOLDER = "os.fsync", "os.fsync(folder)"


def file_operations(work: Callable[[], object], folders: Sequence[Path], log: Path) -> list[str]:
    """What `work` does to files below the folders, in order, each as `event path`; it runs to its end in a child.

    Args:
        log: a file of this function's own, outside the folders.
    Raises: RuntimeError when the work fails.
    """
    log.unlink(missing_ok=True)
    status = in_child(lambda: _watched(work, folders, _Recorder(log)))
    if status != 0:
        raise RuntimeError(f"the work ended with {status} where nobody killed it")
    return log.read_text().splitlines() if log.exists() else []


def killed_at(work: Callable[[], object], folders: Sequence[Path], number: int, *, torn: bool = False) -> None:
    """Runs `work` in a child that is killed right before its file operation of this number, counted from 0.

    Args:
        torn: for an operation that syncs a file: half of the file is cut off first, as if the kill had come during the write.
    Raises: RuntimeError when the child does not die of the kill.
    """
    status = in_child(lambda: _watched(work, folders, _Killer(number, torn)))
    if status != -signal.SIGKILL:
        raise RuntimeError(f"operation {number} did not come: the child ended with {status}")


def in_child(work: Callable[[], object]) -> int:
    """Runs `work` in a forked child: 0, or 1 where it raised (the traceback is on stderr), or minus a signal's number."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class _Recorder:
    """Writes down every operation."""

    def __init__(self, log: Path) -> None:
        self.descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def __call__(self, event: str, path: str) -> None:
        os.write(self.descriptor, f"{event} {path}\n".encode())


class _Killer:
    """Kills its process at the operation of a number."""

    def __init__(self, number: int, torn: bool) -> None:
        self.left, self.torn = number, torn

    def __call__(self, event: str, path: str) -> None:
        if self.left:
            self.left -= 1
            return
        if self.torn:
            assert event == SYNC, f"{event} writes nothing that could be torn"
            descriptor = os.open(path, os.O_WRONLY)
            os.ftruncate(descriptor, os.stat(path).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)


def _watched(work: Callable[[], object], folders: Sequence[Path], visit: Callable[[str, str], None]) -> None:
    """Runs `work` with a hook on every file operation below the folders; the hook stays, so only in a child."""
    roots = tuple(f"{os.path.realpath(folder)}{os.sep}" for folder in folders)
    busy = False

    def seen(event: str, path: str) -> None:
        nonlocal busy
        if not busy and f"{path}{os.sep}".startswith(roots):
            busy = True  # what `visit` itself does is none of the work
            visit(event, path)
            busy = False

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and bool(arguments[2] & WRITES)
        if (writes or event in FOLDER_ARGUMENT) and isinstance(arguments[0], str | bytes | os.PathLike):
            seen(event, _absolute(event, arguments))

    sync = os.fsync

    def fsync(descriptor: int) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        path = os.readlink(f"/proc/self/fd/{number}")
        seen(SYNC_FOLDER if os.path.isdir(path) else SYNC, path)
        sync(descriptor)

    os.fsync = fsync  # type: ignore[assignment]
    sys.addaudithook(hook)
    work()


def _absolute(event: str, arguments: tuple[object, ...]) -> str:
    """The path that an audit event is about, links of its folder followed."""
    folder = arguments[FOLDER_ARGUMENT[event]] if event in FOLDER_ARGUMENT else -1
    # `rmtree` names what it removes below an open folder.
    below = os.readlink(f"/proc/self/fd/{folder}") if isinstance(folder, int) and folder >= 0 else os.getcwd()
    whole = os.path.join(below, os.fsdecode(arguments[0]))  # type: ignore[arg-type]  # checked by the caller
    return os.path.join(os.path.realpath(os.path.dirname(whole)), os.path.basename(whole))
