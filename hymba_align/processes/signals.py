"""SIGTERM: what a cluster sends before it takes the machine back.

The first SIGTERM is noted. Where work is cut into steps that can be saved (`deferred`), it is acted on at the end of the
step; where other processes do the work (`forwarded_to`), they are told; anywhere else it is raised at once, like Ctrl-C.
In every case the process is gone before the cluster kills it: a thread watches the time, also while the main thread is
inside a long call of C code, where Python runs no signal handler. A second SIGTERM, or Ctrl-C after it, ends the process
at once. Processes of a launcher or of a Slurm job take repeated SIGTERMs as one, because both send them repeatedly.

Exit code 75 (EX_TEMPFAIL: try again later).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType

from hymba_align.errors import Preempted

GRACE_S = 30.0
"""From SIGTERM to SIGKILL, by Slurm's default (KillWait) and by that of torch's launcher."""
STEP_SHARE = 2 / 3
"""Of that time, for the step under way; the rest is for saving."""
MARGIN_S = 2.0
"""Kept for exiting"""
REPEAT_S = 5.0
"""SIGTERMs closer together than this are one: a batch script and Slurm itself may both send it."""


REPEATS = ("LOCAL_RANK", "SLURM_JOB_ID")
"""Set where a launcher or a cluster sends SIGTERM again, however late, and nobody means anything by it."""


class Terminated(KeyboardInterrupt):
    """SIGTERM came where nothing has to be saved. Libraries let it pass and tidy up, as they do for Ctrl-C."""


@dataclass
class _State:
    """What this process knows of SIGTERM; there is one per process, as there is one set of handlers."""

    received_at: float | None = None  # time.monotonic()
    grace_s: float = GRACE_S
    is_acted_on: bool = False
    is_deferred: bool = False
    is_saving: bool = False
    child: subprocess.Popen[bytes] | None = None
    on_expiry: Callable[[], str] = field(default=lambda: "what was under way did not stop in time")

    def note(self) -> None:
        """Keeps the time of the first SIGTERM."""
        if self.received_at is None:
            self.received_at = time.monotonic()

    def leaves_at(self) -> float:
        """When the process ends, whatever it is doing; a launcher's processes get the whole time before it does."""
        assert self.received_at is not None
        if self.child is not None:
            return self.received_at + self.grace_s
        ends = self.grace_s - MARGIN_S
        return self.received_at + (ends if self.is_saving else min(ends, STEP_SHARE * self.grace_s))


_state = _State()
_forgets_at_fork = False


def requested() -> bool:
    """Whether SIGTERM has come."""
    return _state.received_at is not None


def raise_if_requested() -> None:
    """Raises Terminated when SIGTERM came while it was deferred."""
    if requested():
        raise Terminated


@contextlib.contextmanager
def stop_on_sigterm(grace_s: float = GRACE_S) -> Iterator[None]:
    """Handles SIGTERM as this module says; outside the main thread, where Python takes no handlers, it does nothing.

    Args:
        grace_s: seconds from SIGTERM to SIGKILL on this cluster.
    """
    global _state, _forgets_at_fork
    if threading.current_thread() is not threading.main_thread() or sys.platform == "win32":
        yield
        return
    _state = _State(grace_s=grace_s)
    if not _forgets_at_fork:
        os.register_at_fork(after_in_child=_forget)
        _forgets_at_fork = True
    woken, wakes = socket.socketpair()
    wakes.setblocking(False)
    watch = threading.Thread(target=_watch, args=(woken, _state), name="sigterm", daemon=True)
    watch.start()
    earlier_fd = signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
    earlier = {number: signal.signal(number, _handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            # A process that is on its way out with 75 must not end as killed by a repeated SIGTERM.
            signal.signal(number, signal.SIG_IGN if requested() else handler)
        signal.set_wakeup_fd(earlier_fd)
        wakes.close()
        watch.join(timeout=1)
        woken.close()


def end_soon(seconds: float = 5.0) -> None:
    """Ends this process, which has saved all it had to, even if a library's tidying up at exit does not."""

    def end() -> None:
        time.sleep(seconds)
        os._exit(Preempted.exit_code)

    threading.Thread(target=end, name="end soon", daemon=True).start()


def allow(grace_s: float) -> None:
    """Sets the seconds from SIGTERM to SIGKILL, once the recipe that names them is read."""
    _state.grace_s = grace_s


@contextlib.contextmanager
def deferred(on_expiry: Callable[[], str]) -> Iterator[None]:
    """Within, SIGTERM is only noted, and `on_expiry` says what was saved should the time run out."""
    earlier, _state.on_expiry, _state.is_deferred = _state.on_expiry, on_expiry, True
    try:
        yield
    finally:
        _state.on_expiry, _state.is_deferred, _state.is_saving = earlier, False, False


def saving() -> None:
    """Says that the step has ended and that its checkpoint is being written, which may take the rest of the time."""
    _state.is_saving = True


@contextlib.contextmanager
def forwarded_to(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """Within, SIGTERM goes to a launcher, whose processes save what they have; the caller waits for it."""
    _state.child = child
    try:
        if requested():
            child.terminate()
        yield
    finally:
        _state.child = None


def _handle(number: int, frame: FrameType | None) -> None:
    """Runs in the main thread, between two steps of the interpreter."""
    del frame
    if number == signal.SIGINT and not _state.is_acted_on:
        raise KeyboardInterrupt
    if not _state.is_acted_on:
        _state.is_acted_on = True
        _state.note()
        if _state.child is not None:
            _state.child.terminate()
        elif not _state.is_deferred:
            raise Terminated
        return
    repeated = time.monotonic() - (_state.received_at or 0.0) < REPEAT_S or any(name in os.environ for name in REPEATS)
    if number == signal.SIGINT or not repeated:
        _leave(_state, "a second signal ended it at once")


def _watch(woken: socket.socket, state: _State) -> None:
    """Waits for SIGTERM, which C code writes to the socket at once, and then for the time to run out."""
    while signal.SIGTERM not in (numbers := woken.recv(64)):
        if not numbers:  # closed: nobody waits for signals any more
            return
    state.note()
    while time.monotonic() < state.leaves_at():
        woken.settimeout(0.1)
        with contextlib.suppress(TimeoutError):
            if not woken.recv(64):
                return
    _leave(state, state.on_expiry())


def _leave(state: _State, why: str) -> None:
    """Ends this process, and those that it launched, without another word to anybody."""
    rank = f"[rank {os.environ['RANK']}] " if "LOCAL_RANK" in os.environ and "RANK" in os.environ else ""
    os.write(2, f"{rank}Preempted: {why}; the same command continues.\n".encode())
    if state.child is not None:
        _kill_family(state.child.pid)
    os._exit(Preempted.exit_code)


def _kill_family(process: int) -> None:
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process)
        for each in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


def _forget() -> None:
    """Of a forked child: signals to data workers are theirs, and must not count as the parent's."""
    if signal.getsignal(signal.SIGTERM) is not _handle:
        return
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
