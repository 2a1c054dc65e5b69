"""Where calls of a model run: a process that can compute, and answer through a pipe, and nothing else.

BFCL's official executor of multi-turn categories evaluates Python. It runs in `executor.py`, and every request in a
process of its own with

- a seccomp filter that allows memory, clocks, reading and writing what is open, and the end. No file can be opened, read or
  written, no socket made, no process started, no other process reached;
- limits of memory, CPU time, wall time and output, and none of core dumps;
- a network without interfaces, where the kernel allows that to its user;
- an empty folder, which is removed afterwards, and an environment that holds none of our variables.

It ends with its parent. It tries at its start what must fail, and is refused where something does not. There is no way
to run calls without it: elsewhere than on Linux, and without seccomp, the multi-turn categories cannot be scored.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import select
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hymba_align.errors import GraderError

EXECUTOR = Path(__file__).with_name("executor.py")
MACHINES = ("x86_64", "aarch64")
GRACE_S = 30
"""Added to a request's wall time before the whole sandbox is taken for dead, and most seconds of its start"""
WITHOUT = "or leave them out with eval.bfcl.categories"
NO_ANSWER = "no answer"
ENTRY_KEYS = ("id", "initial_config", "involved_classes")


@dataclass(frozen=True)
class Limits:
    """Of one request: the calls of a conversation so far, or its grading."""

    wall_s: int = 60
    cpu_s: int = 10
    memory_bytes: int = 1 << 30
    """Address space, of which Python and bfcl-eval take 0.15 GB"""
    output_bytes: int = 16 << 20


@dataclass(frozen=True)
class Executed:
    """Results of a step's calls, in their order; None with the reason where the sandbox ended them."""

    results: list[str] | None
    failure: str = ""


@dataclass(frozen=True)
class Verdict:
    """The official checker's verdict on a conversation."""

    valid: bool
    error_type: str
    error: str


class Sandbox:
    """The sandbox, from `with` to its end; its process starts with the first request.

    Args:
        python: of BFCL's environment.

    Raises: GraderError where calls cannot be confined.
    """

    def __init__(self, python: Path, *, limits: Limits | None = None) -> None:
        self._python, self._limits = python, limits or Limits()
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""
        self.own_network = False
        """Whether the kernel gave it a network of its own, besides refusing sockets"""
        self.starts = 0

    @property
    def executor(self) -> Path:
        """The program that it runs."""
        return EXECUTOR

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def prove(self) -> None:
        """Starts it, so that a machine where calls cannot be confined is known early. Raises: GraderError."""
        self._start()

    def execute(self, entry: Mapping[str, Any], steps: Sequence[Sequence[str]]) -> Executed:
        """Results of the last step's calls, after all earlier steps' of the conversation. All must be checked calls."""
        answer = self._ask("execute", entry=_needed(entry), steps=steps)
        results = answer.get("results")
        if not isinstance(results, list) or len(results) != len(steps[-1]):
            return Executed(None, answer.get("failed", NO_ANSWER))
        return Executed(results)

    def grade(self, entry: Mapping[str, Any], turns: Sequence[Sequence[Sequence[str]]] | str) -> Verdict:
        """The official verdict on a conversation: the checked calls of each step of each turn.

        Args:
            entry: with the ground truth as `target`.
            turns: a text instead says why the conversation came to no end, which the official checker counts as wrong.
        """
        answer = self._ask("grade", entry=_needed(entry), turns=turns, ground_truth=entry["target"])
        if answer.keys() != {"valid", "error_type", "error"}:
            return Verdict(False, "sandbox", answer.get("failed", NO_ANSWER))
        return Verdict(answer["valid"], answer["error_type"], answer["error"])

    # ---- the process ---------------------------------------------------------------------------------------------

    def _ask(self, what: str, **request: Any) -> dict[str, Any]:
        """The answer. A sandbox that died is started again, once: no request can end it, and each is complete in itself."""
        line = json.dumps({"do": what, **request}).encode() + b"\n"
        for _ in range(2):
            process = self._process if self._process is not None and self._process.poll() is None else self._start()
            answer = self._exchange(process, line, self._limits.wall_s + GRACE_S)
            if answer is not None:
                return answer
            self._stop()
        raise GraderError(
            f"the sandbox that runs BFCL's multi-turn calls ended twice over a request to {what}; start again, the answers "
            "so far are kept"
        )

    def _start(self) -> subprocess.Popen[bytes]:
        """A sandbox that has proved itself. Raises: GraderError."""
        self._stop()
        if platform.system() != "Linux" or platform.machine() not in MACHINES:
            raise GraderError(
                f"BFCL's multi-turn categories run calls that a model wrote, which hymba-align confines on Linux "
                f"(x86-64, ARM) only, and this is {platform.system()} on {platform.machine()}; score them there, {WITHOUT}"
            )
        self._folder = tempfile.TemporaryDirectory(prefix="hymba-align-sandbox-", ignore_cleanup_errors=True)
        root = Path(self._folder.name)
        for name in ("empty", "package"):
            (root / name).mkdir()
        arguments = [str(os.getpid()), json.dumps(asdict(self._limits))]
        with (root / "stderr").open("wb") as stderr:
            process = subprocess.Popen(
                [str(self._python), "-s", "-B", str(self.executor), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=root / "empty",
                env=_environment(root),
                start_new_session=True,  # Ctrl-C is ours to handle
            )
        self._process = process
        self.starts += 1
        hello = self._exchange(process, b"", GRACE_S)
        if hello is None or "refused" in hello:
            said = (root / "stderr").read_text(encoding="utf-8", errors="replace").strip().splitlines()
            why = hello["refused"] if hello else said[-1] if said else "it ended without a word"
            self._stop()
            raise GraderError(
                f"BFCL's multi-turn categories run calls that a model wrote, which cannot be confined here ({why}); score "
                f"them where seccomp works, {WITHOUT}"
            )
        self.own_network = hello["own_network"]
        return process

    def _exchange(self, process: subprocess.Popen[bytes], line: bytes, seconds: float) -> dict[str, Any] | None:
        """The next line that the process writes; None where it ends before, or takes too long."""
        assert process.stdin is not None
        assert process.stdout is not None
        end = time.monotonic() + seconds
        try:
            process.stdin.write(line)  # read at once: it does nothing else between two requests
            process.stdin.flush()
        except BrokenPipeError:
            return None
        while b"\n" not in self._unread:
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))
            part = os.read(process.stdout.fileno(), 1 << 16) if ready else b""
            if not part:
                return None
            self._unread += part
        first, self._unread = self._unread.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(first)
        return answer

    def _stop(self) -> None:
        if self._process is None:
            return
        self._process.kill()  # its children go with it
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # a request that it never read
                pipe.close()
        self._process, self._unread = None, b""
        self._folder.cleanup()


def _needed(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: entry[key] for key in ENTRY_KEYS}


def _environment(root: Path) -> dict[str, str]:
    """All variables of the sandbox: no token, no proxy, and what makes two runs of it alike."""
    return {
        "BFCL_PROJECT_ROOT": str(root / "package"),  # bfcl-eval makes folders there when it is imported
        "HOME": str(root / "package"),
        "LC_ALL": "C.UTF-8",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",  # why Python is not started with -I, which would not read it
        "PYTHONSAFEPATH": "1",
        "TZ": "UTC",  # one of the official classes formats local times
        **({"LD_LIBRARY_PATH": path} if (path := os.environ.get("LD_LIBRARY_PATH")) else {}),
    }
