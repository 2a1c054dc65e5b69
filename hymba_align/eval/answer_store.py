"""Answers on disk, so that an interrupted evaluation goes on where it stopped.

Every process appends to a file of its own, `<task>.answers-<rank>.jsonl`, one JSON object per line with the key of what was
asked, and the seconds that all sessions took up to there. A line counts once it has its line break. A killed process loses nothing that was appended; a power cut may lose
what was appended in the last `SYNC_S` seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from hymba_align.eval.sharing import Processes
from hymba_align.files import sync_folder
from hymba_align.run.storage import AGAIN, writing

SYNC_S = 5.0
"""Most seconds between two times that appended answers are forced onto the disk"""
RESUMES = f"{AGAIN}: it continues from the answers already given"

FIELDS = ({"text", "tokens", "cut_off"}, {"log_likelihood", "is_greedy"})
"""Of an answer, and of a score"""

Record = dict[str, Any]


class AnswerStore:
    """What was answered, by key: by earlier sessions in however many processes, and by this one.

    All processes of an evaluation make one together, and then hold the same answers.

    Args:
        path: of the files, without `.answers-<rank>.jsonl`; None keeps nothing, not even in memory.
        processes: of this evaluation.
    """

    def __init__(self, path: Path | None, processes: Processes) -> None:
        self.path, self.rank = path, processes.rank
        self.known: dict[str, Record] = {}
        self.earlier: frozenset[str] = frozenset()
        """Keys that earlier sessions answered"""
        self.earlier_s = 0.0
        """Seconds that earlier sessions took, each up to its last answer"""
        self._began = time.monotonic()
        self._appends = False
        self._file: IO[bytes] | None = None
        self._synced = 0.0
        if path is not None:
            for found in processes.gather(_read_all(path)):  # nobody appends before all have read
                assert isinstance(found, tuple)
                self.known.update(found[0])
                self.earlier_s = max(self.earlier_s, found[1])
            self.earlier = frozenset(self.known)

    @contextlib.contextmanager
    def appending(self) -> Iterator[None]:
        """`add` is called within; afterwards all that was added survives a power cut. Raises: StorageError."""
        if self.path is None:
            yield
            return
        self._appends = True
        try:
            yield
            if self._file is not None:
                with self._writing():
                    os.fsync(self._file.fileno())
        finally:
            self._appends = False
            if self._file is not None:
                self._file.close()
                self._file = None

    def add(self, key: str, record: Record) -> None:
        """Keeps one answer, in this process's file."""
        if self.path is None:
            return
        assert self._appends, "answers are added within `appending`"
        self.known[key] = record
        seconds = round(self.earlier_s + time.monotonic() - self._began, 3)
        line = (json.dumps({"key": key, "seconds": seconds, **record}) + "\n").encode()
        with self._writing():
            if self._file is None:  # with the first answer: an interruption before it leaves no file
                self._file = _open_whole(answer_file(self.path, self.rank))
                sync_folder(self.path.parent)
                self._synced = time.monotonic()
            while line:  # a nearly full disk takes a part
                line = line[self._file.write(line) :]
            if time.monotonic() - self._synced > SYNC_S:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        assert self.path is not None
        return writing(self.path.parent, resumes=RESUMES)

    def take(self, records: dict[str, Record]) -> None:
        """Keeps in memory what other processes have in their files."""
        if self.path is not None:
            self.known.update(records)

    def remove(self) -> None:
        """Removes the files; call it once the result of the task is on the disk."""
        if self.path is not None:
            remove_answers(self.path)


def answer_file(path: Path, rank: int) -> Path:
    """The file of one process."""
    return path.with_name(f"{path.name}.answers-{rank}.jsonl")


def answer_files(path: Path) -> list[Path]:
    """All files of answers, whichever processes wrote them."""
    return sorted(file for file in path.parent.glob(f"{path.name}.answers-*.jsonl") if file.is_file())


def remove_answers(path: Path) -> None:
    """Removes all files of answers; those that another process removes meanwhile are no error."""
    files = answer_files(path)
    for file in files:
        file.unlink(missing_ok=True)
    if files:
        sync_folder(path.parent)


def _read_all(path: Path) -> tuple[dict[str, Record], float]:
    """Answers by key, and the seconds they took. What a kill or a power cut left of a line counts as not answered."""
    found: dict[str, Record] = {}
    took = 0.0
    for file in answer_files(path):
        for line in file.read_bytes().split(b"\n")[:-1]:  # what follows the last line break is torn
            try:
                record = json.loads(line)
                key, seconds = record.pop("key"), float(record.pop("seconds"))
            except (ValueError, AttributeError, KeyError, TypeError):
                continue
            if set(record) in FIELDS:
                found[key] = record
                took = max(took, seconds)
    return found, took


def _open_whole(file: Path) -> IO[bytes]:
    """The file, to append lines to without a buffer; a torn last line is cut off."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_file():
        os.truncate(file, file.read_bytes().rfind(b"\n") + 1)
    return file.open("ab", buffering=0)
