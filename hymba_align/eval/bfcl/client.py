"""bfcl-eval as a process of its own environment: problems out, verdicts back."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from hymba_align.errors import GraderError
from hymba_align.eval.bfcl.environment import BFCL_VERSION, COMMAND, bfcl_python

WORKER = Path(__file__).with_name("worker.py")
ANSWERS_PER_REQUEST = 20  # each may take a second or two (worker.py)
TIMEOUT_S = 120.0  # for a request, which takes less than 1 s
LAST_WORDS = 2000
PASSED_ON = ("PATH", "SYSTEMROOT", "TMPDIR", "TMP", "TEMP", "LD_LIBRARY_PATH")
"""Variables of ours that the grader gets: no token, no proxy, nothing that changes how Python starts"""


@dataclass(frozen=True)
class Grade:
    """The official verdict on an answer."""

    id: str
    correct: bool
    error_type: str
    error: str
    calls: str | None
    """What was decoded, as Python writes it; None where the answer holds no calls"""
    dropped_arguments: bool
    """Whether the answer has positional arguments, which the official decoder leaves out"""
    refused_code: bool
    """Whether an argument was an expression that the official decoder would have executed"""


class BFCLClient:
    """The grader's process, from `with` to its end.

    Raises: GraderError where the environment is missing or another version, where the process ends or takes too long.
    """

    def __init__(self, *, python: Path | None = None, worker: Path = WORKER, timeout_s: float = TIMEOUT_S) -> None:
        self._command = [str(python or bfcl_python()), "-I", "-B", "-X", "utf8", str(worker)]
        self._advice = f"remove {Path(self._command[0]).parents[1]} and run '{COMMAND}'"
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="hymba-align-bfcl-", ignore_cleanup_errors=True)
        root = Path(self._folder.name)
        (root / "project").mkdir()
        self._stderr: IO[str] = (root / "stderr").open("w+", encoding="utf-8", errors="replace")
        try:
            self._start(root)
            version = self._ask("its start", request="hello")["version"]
            if version != BFCL_VERSION:
                raise GraderError(
                    f"{self._command[0]} has bfcl-eval {version}, and scores are made by {BFCL_VERSION}; {self._advice}"
                )
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _start(self, root: Path) -> None:
        environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        # bfcl_eval makes folders there on import, by default inside the package.
        environment |= {"BFCL_PROJECT_ROOT": str(root / "project"), "OPENBLAS_NUM_THREADS": "1"}
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                cwd=root / "project",
                env=environment,
                text=True,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C is ours to handle
            )
        except OSError as error:
            raise GraderError(f"{self._command[0]} cannot be started ({error.strerror}); {self._advice}") from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):  # of a request that it never read
                    pipe.close()
            self._process = None
        self._stderr.close()
        self._folder.cleanup()

    def entries(self, category: str) -> list[dict[str, Any]]:
        """The problems of a category: the package's own entries, with functions as `tools` in JSON Schema.

        Each has `id`, `question` (turns of messages), `tools` and `target`; multi-turn ones also what their
        conversations start from, and `missed_tools` by turn.
        """
        entries: list[dict[str, Any]] = self._ask(f"the problems of {category}", request="entries", category=category)
        return entries

    def grade(self, category: str, answers: Mapping[str, str]) -> list[Grade]:
        """The verdicts on answers by id, in their order, of a single-turn category."""
        given, grades = iter(answers.items()), []
        while batch := dict(islice(given, ANSWERS_PER_REQUEST)):
            first, last = next(iter(batch)), next(reversed(batch))
            replies = self._ask(f"the answers to {first} to {last}", request="grade", category=category, answers=batch)
            grades += [Grade(**reply) for reply in replies]
        return grades

    def decode(self, answers: Sequence[str]) -> list[list[str] | None]:
        """The calls of each answer in a conversation as Python text, unchecked; None where it holds none."""
        calls: list[list[str] | None] = []
        for first in range(0, len(answers), ANSWERS_PER_REQUEST):
            batch = list(answers[first : first + ANSWERS_PER_REQUEST])
            calls += self._ask("the calls of answers", request="decode", answers=batch)
        return calls

    def _ask(self, what: str, **request: Any) -> Any:
        assert self._process is not None, "used outside of `with`"
        replies: queue.Queue[str] = queue.Queue()
        # In a thread, because a process that reads nothing would also keep us from writing.
        threading.Thread(target=_exchange, args=(self._process, json.dumps(request), replies), daemon=True).start()
        try:
            line = replies.get(timeout=self._timeout_s)
        except queue.Empty:
            self._process.kill()
            raise GraderError(
                f"BFCL's grader took more than {self._timeout_s:g} s over {what}; this is a bug, please report it with "
                "the answers"
            ) from None
        if not line.endswith("\n"):
            raise GraderError(f"BFCL's grader {self._how_it_ended()} over {what}{self._last_words()}")
        reply = json.loads(line)
        if "error" in reply:
            raise GraderError(f"BFCL's grader failed over {what}: {reply['error']}")
        return reply["reply"]

    def _how_it_ended(self) -> str:
        assert self._process is not None
        code = self._process.wait()
        return f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"

    def _last_words(self) -> str:
        self._stderr.flush()
        text = Path(self._stderr.name).read_text(encoding="utf-8", errors="replace").strip()
        return f"; its last words: {text[-LAST_WORDS:]}" if text else ""


def _exchange(process: subprocess.Popen[str], request: str, replies: queue.Queue[str]) -> None:
    """Puts the process's reply, or what there was of it, into the queue."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(request + "\n")
        process.stdin.flush()
        replies.put(process.stdout.readline())
    except (OSError, ValueError):  # it has ended, or we have closed it
        replies.put("")
