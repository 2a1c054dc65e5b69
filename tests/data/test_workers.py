from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hymba_align.data.workers import AHEAD_PER_WORKER, WORTH_PROCESSES, ordered_map
from hymba_align.errors import HymbaAlignError


def slow_for_early_items(item: int) -> tuple[int, int]:
    time.sleep(0.02 if item % 3 == 0 else 0)
    return item, os.getpid()


def raise_at_seven(item: int) -> int:
    if item == 7:
        raise KeyError("seven")
    return item


def test_results_come_in_the_order_of_the_items_whatever_the_number_of_processes() -> None:
    for workers in (1, 2, 3):
        results = list(ordered_map(slow_for_early_items, range(20), workers))
        assert [item for item, _ in results] == list(range(20))
        assert len({process for _, process in results}) == workers
        assert (os.getpid() in {process for _, process in results}) == (workers == 1)


def test_a_few_items_start_no_process() -> None:
    results = ordered_map(slow_for_early_items, range(WORTH_PROCESSES - 1), 2)
    assert {process for _, process in results} == {os.getpid()}


def test_no_more_than_a_few_items_are_read_ahead_of_the_reader() -> None:
    read = 0

    def counted() -> Iterator[int]:
        nonlocal read
        for item in itertools.count():
            read = item + 1
            yield item

    results = ordered_map(slow_for_early_items, counted(), 2)
    for _ in range(10):
        next(results)
    assert read <= 10 + 2 * AHEAD_PER_WORKER + 1
    results.close()  # type: ignore[attr-defined]


def die_at_seven(item: int) -> int:
    if item == 7:
        os._exit(9)
    return item


def test_a_process_that_is_killed_is_one_sentence() -> None:
    with pytest.raises(
        HymbaAlignError, match=r"^a process that prepared data was killed, .*; set data.workers to less than 2"
    ):
        list(ordered_map(die_at_seven, range(20), 2))


def test_what_a_process_raises_reaches_the_reader() -> None:
    results = ordered_map(raise_at_seven, range(20), 2)
    with pytest.raises(KeyError, match="seven"):
        list(results)


WAITING = """
import os, time
from hymba_align.data.workers import ordered_map
for process in ordered_map(lambda item: os.getpid(), range(20), 2):
    print(process, flush=True)
    time.sleep(0.05)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the system ends them on Linux only")
def test_workers_end_with_a_parent_that_is_killed() -> None:
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", WAITING]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        workers = {int(parent.stdout.readline()) for _ in range(6)}
        assert parent.pid not in workers
        assert all(Path(f"/proc/{worker}").exists() for worker in workers)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    deadline = time.monotonic() + 10
    while any(_runs(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_runs(worker) for worker in workers)


def _runs(process: int) -> bool:
    """Whether a process is there and not merely waiting for somebody to read its exit code."""
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"
