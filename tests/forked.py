"""Processes forked from a test's, which start without six seconds of imports: of a script, of a command, or two of a launch."""

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
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NoReturn

Work = Callable[[], object]
"""What a process does; a number that it returns is the process's exit code"""


class Forked:
    """A process that does some work in the folder of its log, where what it and its own processes say is.

    Start it before this process computes with several threads; with one (tests/conftest.py), a fork may train. What a
    library reads from the environment at its import is as it was here.
    """

    def __init__(
        self, work: Work, log: Path, environment: Mapping[str, str] | None = None, *, errors: Path | None = None
    ) -> None:
        self.log, self.errors = log, errors or log
        self.code: int | None = None
        """A signal's number below zero for a process that one has ended; None while it runs"""
        self.pid = os.fork()
        if not self.pid:
            _become(work, log, self.errors, environment or {})

    def told(self) -> str:
        """The end of what was said, for a failure."""
        return "".join(path.read_text()[-6000:] for path in dict.fromkeys((self.log, self.errors)) if path.exists())

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self._collect(os.WNOHANG)

    def wait(self, seconds: float = 280) -> int:
        """The exit code; fails with the end of what was said where it does not come in time."""
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                self.stop()
                raise AssertionError(f"not done in {seconds} s: {self.told()}")
            time.sleep(0.02)
        assert self.code is not None
        return self.code

    def stop(self) -> None:
        """Ends it, if it still runs."""
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)
            self._collect(0)

    def _collect(self, options: int) -> int | None:
        if self.code is None:
            ended, status = os.waitpid(self.pid, options)
            self.code = os.waitstatus_to_exitcode(status) if ended else None
        return self.code


class TwoProcesses:
    """Ranks 0 and 1 of a script that is run as `__main__`, with its arguments, in a folder: what torchrun's two do."""

    def __init__(self, script: Path, argument: Path, folder: Path, *more: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.log = folder / "launch.log"
        work = partial(run_script, script, argument, *more)
        self._ranks = [Forked(work, self.log, _rank(rank, port)) for rank in (0, 1)]

    def wait(self, seconds: float = 500) -> None:
        """Returns once both ended well; otherwise ends both, and fails with the end of what they said."""
        end = time.monotonic() + seconds
        try:
            while None in (codes := [rank.poll() for rank in self._ranks]) and not any(codes):
                if time.monotonic() > end:
                    break
                time.sleep(0.02)
        finally:
            self.stop()
        codes = [rank.code for rank in self._ranks]
        assert codes == [0, 0], f"{codes}: {self.log.read_text()[-6000:]}"

    def stop(self) -> None:
        """Ends those that still run."""
        for rank in self._ranks:
            rank.stop()


def run_script(script: Path, *arguments: object) -> None:
    """Runs a script in this process as `python SCRIPT ARGUMENTS` would; work for a process of its own."""
    sys.argv, sys.path = [str(script), *map(str, arguments)], [str(script.parent), *sys.path]
    runpy.run_path(str(script), run_name="__main__")


def _rank(rank: int, port: int) -> dict[str, str]:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    return {name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1"}


def _become(work: Work, log: Path, errors: Path, environment: Mapping[str, str]) -> NoReturn:
    code = 1
    try:
        for path, descriptor in ((log, 1), (errors, 2)):
            with path.open("ab") as file:
                os.dup2(file.fileno(), descriptor)
        sys.stdout, sys.stderr = (os.fdopen(one, "w", buffering=1, closefd=False) for one in (1, 2))
        for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
            del os.environ[name]
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", **environment}
        os.chdir(log.parent)
        warnings.resetwarnings()  # pytest makes them errors
        gc.freeze()
        result = work()
        code = result if isinstance(result, int) else 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
