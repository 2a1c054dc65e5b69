"""SIGTERM ends a process within its time whatever it is doing, and only then counts as a preemption."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM that can be handled")

BEGIN = """
import hashlib, os, subprocess, sys, time
from hymba_align.processes import signals

def ready():
    print("ready", flush=True)

def sleep(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.02)
"""


@contextmanager
def running(script: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """The script in a process of its own, as soon as it says that it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", BEGIN + script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path.cwd()), **environment},
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
        yield process
    finally:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen[str]) -> tuple[int, float, str]:
    """Its exit code, the seconds until then, and what it wrote to stderr."""
    began = time.monotonic()
    _, told = process.communicate(timeout=30)
    return process.returncode, time.monotonic() - began, told


def test_what_nothing_has_to_be_saved_of_is_interrupted_at_once() -> None:
    script = (
        "with signals.stop_on_sigterm():\n  try:\n    ready(); sleep(20)\n  except signals.Terminated:\n    sys.exit(3)"
    )
    with running(script) as process:
        process.terminate()
        code, seconds, _ = ended(process)
    assert code == 3
    assert seconds < 3


@pytest.mark.parametrize(
    "work", ["sleep(20)", "hashlib.pbkdf2_hmac('sha512', b'', b'', 100_000_000)"], ids=["Python", "C"]
)
def test_a_step_that_does_not_end_is_left_after_two_thirds_of_the_time(work: str) -> None:
    script = f"with signals.stop_on_sigterm(6), signals.deferred(lambda: 'checkpoint-3 is there'):\n  ready(); {work}"
    with running(script) as process:
        process.terminate()
        code, seconds, told = ended(process)
    assert code == 75
    assert 3.9 <= seconds < 5.5
    assert told == "Preempted: checkpoint-3 is there; the same command continues.\n"


def test_a_step_that_ends_may_use_the_rest_of_the_time_for_saving() -> None:
    script = (
        "with signals.stop_on_sigterm(7), signals.deferred(lambda: 'late'):\n"
        "  ready()\n  while not signals.requested(): time.sleep(0.02)\n"
        "  signals.saving(); sleep({})\nsys.exit(4)"
    )
    for seconds_to_save, wanted in ((4.8, 4), (20, 75)):  # the time without saving is 4.7 s, with it 5 s
        with running(script.format(seconds_to_save)) as process:
            process.terminate()
            code, seconds, _ = ended(process)
        assert code == wanted
        assert seconds < 6.5


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process_at_once(second: signal.Signals) -> None:
    script = (
        "signals.REPEAT_S = 0.5\nwith signals.stop_on_sigterm(), signals.deferred(lambda: ''):\n  ready(); sleep(20)"
    )
    with running(script) as process:
        process.terminate()
        time.sleep(0.1)
        process.terminate()  # a batch script and the cluster may both send it
        time.sleep(0.7)
        assert process.poll() is None
        process.send_signal(second)
        code, seconds, told = ended(process)
    assert (code, told) == (75, "Preempted: a second signal ended it at once; the same command continues.\n")
    assert seconds < 2


@pytest.mark.parametrize(
    ("environment", "rank"), [({"LOCAL_RANK": "0", "RANK": "1"}, "[rank 1] "), ({"SLURM_JOB_ID": "7"}, "")]
)
def test_a_process_of_a_launcher_or_of_a_slurm_job_takes_repeated_signals_as_one(
    environment: dict[str, str], rank: str
) -> None:
    script = "signals.REPEAT_S = 0.1\nwith signals.stop_on_sigterm(6), signals.deferred(lambda: 'late'):\n  ready(); sleep(20)"
    with running(script, **environment) as process:
        for _ in range(4):
            process.terminate()
            time.sleep(0.3)
        code, seconds, told = ended(process)
    assert (code, told) == (75, f"{rank}Preempted: late; the same command continues.\n")
    assert seconds > 2


def test_an_interruption_from_the_keyboard_stays_one() -> None:
    script = "with signals.stop_on_sigterm(), signals.deferred(lambda: ''):\n  ready(); sleep(20)"
    with running(script) as process:
        process.send_signal(signal.SIGINT)
        code, _, told = ended(process)
    assert code == -signal.SIGINT
    assert told.endswith("KeyboardInterrupt\n")


def test_a_signal_to_a_forked_data_worker_ends_the_worker_and_not_the_run() -> None:
    script = (
        "with signals.stop_on_sigterm(6):\n  child = os.fork()\n  if not child: sleep(20); os._exit(9)\n"
        "  time.sleep(0.2); os.kill(child, 15); status = os.waitpid(child, 0)[1]; time.sleep(0.2)\n"
        "  assert not signals.requested()\n  ready(); sys.exit(status)"
    )
    with running(script) as process:
        assert ended(process)[0] == signal.SIGTERM


def test_a_launcher_is_told_and_waited_for_and_killed_with_its_processes_when_the_time_is_up(tmp_path: Path) -> None:
    child = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(15, lambda *_: open(sys.argv[1] + '/told', 'w').close())\n"
        "one = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(40)'])\n"
        "open(sys.argv[1] + '/pid', 'w').write(str(one.pid))\nprint('ready', flush=True)\nwhile True: time.sleep(0.1)\n"
    )
    script = (
        f"with signals.stop_on_sigterm(2):\n  child = subprocess.Popen([sys.executable, '-c', {child!r}, {str(tmp_path)!r}])\n"
        "  with signals.forwarded_to(child): child.wait()"
    )
    with running(script) as process:
        process.terminate()
        code, seconds, _ = ended(process)
    assert code == 75
    assert 1.9 <= seconds < 4
    assert (tmp_path / "told").exists()
    time.sleep(0.2)
    grandchild = Path("/proc") / (tmp_path / "pid").read_text()
    if Path("/proc").is_dir():
        assert not grandchild.exists() or "Z" in (grandchild / "stat").read_text().split()[2]


def test_the_handlers_of_before_come_back_where_no_signal_came() -> None:
    from hymba_align.processes import signals

    before = signal.getsignal(signal.SIGTERM)
    with signals.stop_on_sigterm():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.set_wakeup_fd(-1) == -1
