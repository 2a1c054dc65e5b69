"""One run at a time in one folder, also when several machines share it, and never a lock that outlives its holder.

Two locks of the library filelock, because neither is enough alone:

- `flock` on .lock. The kernel gives it back when the process ends, however it ends. It holds between the processes of
  one machine, and between machines where the file system passes it on: NFS (4, or 3 with lockd), GPFS, BeeGFS, Lustre
  mounted with `flock`. NFS gives back the locks of a machine that died after its own lease, about 90 s.
- a lease, .lease: a file that names its holder, who renews it every LEASE_S / 3. It holds wherever a file system can
  create a file exclusively, so also where `flock` reaches one machine only (Lustre's `localflock`, NFS mounted with
  `nolock`). A contender on the same machine sees at once whether its holder lives; one on another machine watches it
  for LEASE_S by its own clock, and takes it when it was not renewed.

So a live holder blocks everybody. A dead one blocks nobody on its own machine, and others for at most LEASE_S (or NFS's
lease). A holder that could not renew for almost LEASE_S, because the file system was gone, ends: another may have begun.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hymba_align.errors import HymbaAlignError, InUseError, RunFolderError
from hymba_align.files import read_json
from hymba_align.run.storage import RESUMES, writing
from hymba_align.terminal import print_words

if TYPE_CHECKING:
    from filelock import BaseFileLock, LeaseCompromise, SoftFileLease

LOCK, LEASE = ".lock", ".lease"
LEASE_S = 60.0
NO_FOLDER = {errno.ENOTDIR, errno.ENOENT, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}
NO_FLOCK = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}


@contextlib.contextmanager
def held(folder: Path, *, lease_s: float = LEASE_S, resumes: str = RESUMES) -> Iterator[None]:
    """Holds a folder for this process alone; it is made when absent, and removed again if nothing came into it.

    Args:
        lease_s: seconds without a sign of life after which a holder on another machine counts as dead; the same for all.
        resumes: end of the message where the folder cannot be written: how to go on afterwards.
    Raises:
        RunFolderError: another process holds it; who, and what to do. Or no folder can be of that name.
        StorageError: the folder cannot be written.
    """
    from filelock import FileLock, SoftFileLease

    with _naming(folder):
        existed = folder.is_dir()
        if folder.exists() and not existed:
            raise RunFolderError(f"{folder} is a file, and a folder is needed there; name another")
    with contextlib.ExitStack() as stack:
        with writing(folder, resumes=resumes):
            lock = FileLock(folder / LOCK, fallback_to_soft=False, thread_local=False)
            if not existed:
                stack.callback(_remove_if_empty, folder)
            if not _flocked_in(folder, lock):
                raise InUseError(_in_use(folder))
            stack.callback(_give_back, lock)
            lease = SoftFileLease(folder / LEASE, lease_duration=lease_s, thread_local=False, on_compromise=_leave)
            _take(lease, folder, lease_s)
            stack.callback(_end_lease, lease)
            (folder / LOCK).write_text(json.dumps(_this_process()), encoding="utf-8")
        yield


def check_free(folder: Path) -> None:
    """Raises RunFolderError where another process on this machine holds the folder now; writes nothing."""
    from filelock import FileLock

    if not (folder / LOCK).is_file():
        return
    lock = FileLock(folder / LOCK, fallback_to_soft=False, thread_local=False)
    with writing(folder), contextlib.suppress(FileNotFoundError):  # its holder has just removed the folder again
        if not _flocked(lock):
            raise InUseError(_in_use(folder))
    if lock.is_locked:
        lock.release()


@dataclass(frozen=True)
class Holder:
    """The process that works in a folder."""

    pid: int
    host: str
    since: str | None

    @property
    def words(self) -> str:
        """`process 12 on host, since ...`."""
        return f"process {self.pid} on {self.host}{f', since {self.since}' if self.since else ''}"


def holder(folder: Path) -> Holder | None:
    """The process that holds the folder now, going by its lease alone: no lock is tried, so nobody who begins is disturbed."""
    from filelock import SoftFileLease

    owner = SoftFileLease(folder / LEASE, lease_duration=LEASE_S, thread_local=False).owner
    try:
        renewed = (folder / LEASE).stat().st_mtime
        record = read_json(folder / LOCK)
    except (OSError, ValueError):
        return None
    if owner is None or time.time() - renewed > LEASE_S:
        return None
    host = _host(owner.hostname)
    if host == socket.gethostname() and not _lives(owner.pid):
        return None
    return Holder(
        owner.pid, host, str(record["since"]) if record.get("pid") == owner.pid and "since" in record else None
    )


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        return True
    return True


def _flocked_in(folder: Path, lock: BaseFileLock) -> bool:
    """`_flocked` in a folder that is made, and made again when another process, which came to nothing, removes it."""
    while True:
        with _naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            return _flocked(lock)
        except FileNotFoundError:
            continue


@contextlib.contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Raises RunFolderError where no folder can be of that name, whatever is free or allowed."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_FOLDER:
            raise
        raise RunFolderError(f"{folder} cannot be made a folder ({os.strerror(error.errno)}); name another") from error


def _flocked(lock: BaseFileLock) -> bool:
    """Whether this process has the kernel's lock, or the file system has none, where the lease decides alone."""
    from filelock import Timeout

    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise
    return True


def _take(lease: SoftFileLease, folder: Path, lease_s: float) -> None:
    """Takes the lease; one of another machine only after watching it for `lease_s`."""
    from filelock import Timeout

    try:
        lease.acquire(timeout=0)
        return
    except Timeout:
        owner = lease.owner
    if owner is not None:
        told = f"{folder} was last used by process {owner.pid} on {_host(owner.hostname)}; "
        print_words(f"{told}waiting {lease_s:.0f} s to see whether it still runs", stderr=True)
    try:
        lease.acquire(timeout=lease_s + 2 * lease_s / 3, poll_interval=min(0.5, lease_s / 10))
    except Timeout:
        raise InUseError(_in_use(folder, lease)) from None


def _in_use(folder: Path, lease: SoftFileLease | None = None) -> str:
    """Who holds the folder, since when, and what to do."""
    try:
        record = read_json(folder / LOCK)
    except (OSError, ValueError):
        record = {}
    owner = lease.owner if lease is not None else None
    if owner is not None and owner.pid != record.get("pid"):
        record = {"pid": owner.pid, "host": _host(owner.hostname)}
    by = f"process {record['pid']} on {record['host']}" if {"pid", "host"} <= record.keys() else "another process"
    since = f", since {record['since']}" if "since" in record else ""
    return (
        f"{folder} is in use by {by}{since}; wait for it, end it there (the same command then continues), "
        "or write to another folder"
    )


def _host(recorded: str) -> str:
    """The host in filelock's notation, which adds a container's process namespace."""
    return recorded.split("?")[0]


def _this_process() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}


def _end_lease(lease: SoftFileLease) -> None:
    with contextlib.suppress(OSError):  # of a file system that turned read-only: nobody renews it now, so it runs out
        lease.release()


def _give_back(lock: BaseFileLock) -> None:
    """Removes the lock file while it is still locked: who waits for it sees that its name is gone, and begins again."""
    if lock.is_locked:
        with contextlib.suppress(OSError):
            os.unlink(lock.lock_file)
        lock.release()


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _leave(lost: LeaseCompromise) -> None:
    """Ends the process, from the thread that renews the lease: another machine may write to the folder by now."""
    reason = f": {lost.error}" if lost.error is not None else ""
    told = f"Error: {lost.lock_file} could not be renewed ({lost.reason}{reason}), so another run may have begun there"
    os.write(2, f"{told}; run the same command again, which continues\n".encode())
    os._exit(HymbaAlignError.exit_code)
