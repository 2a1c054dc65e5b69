"""Two processes of a launch, forked from a test's: what torchrun's two do, without six seconds of imports in each."""

from __future__ import annotations

import gc
import os
import runpy
import signal
import socket
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import NoReturn


class TwoProcesses:
    """Ranks 0 and 1 of a script that is run as `__main__`, with one argument, in the folder of its log.

    Start them before this process computes beside them. With one thread (tests/conftest.py), a fork may train.
    """

    def __init__(self, script: Path, argument: Path, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.log, self.codes = folder / "launch.log", dict[int, int]()
        self.running = {_fork(script, argument, self.log, rank, port) for rank in (0, 1)}

    def wait(self, seconds: float = 500) -> None:
        """Returns once both ended well; otherwise ends both, and fails with the end of what they said."""
        end = time.monotonic() + seconds
        try:
            while self.running and not any(self.codes.values()) and time.monotonic() < end:
                for pid in list(self.running):
                    self._collect(pid, os.WNOHANG)
                time.sleep(0.02)
        finally:
            self.stop()
        assert list(self.codes.values()) == [0, 0], f"{self.codes}: {self.log.read_text()[-6000:]}"

    def stop(self) -> None:
        """Ends those that still run."""
        for pid in list(self.running):
            os.kill(pid, signal.SIGKILL)
            self._collect(pid, 0)

    def _collect(self, pid: int, options: int) -> None:
        ended, status = os.waitpid(pid, options)
        if ended:
            self.running.remove(pid)
            self.codes[pid] = os.waitstatus_to_exitcode(status)


def _fork(script: Path, argument: Path, log: Path, rank: int, port: int) -> int:
    """The pid of a process that becomes one of two."""
    pid = os.fork()
    if not pid:
        _run(script, argument, log, rank, port)
    return pid


def _run(script: Path, argument: Path, log: Path, rank: int, port: int) -> NoReturn:
    code = 1
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = (os.fdopen(one, "w", buffering=1, closefd=False) for one in (1, 2))
        for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
            del os.environ[name]
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in ranks.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "CUDA_VISIBLE_DEVICES": ""}
        os.chdir(log.parent)
        warnings.resetwarnings()  # pytest makes them errors
        gc.freeze()
        sys.argv, sys.path = [str(script), str(argument)], [str(script.parent), *sys.path]
        runpy.run_path(str(script), run_name="__main__")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
