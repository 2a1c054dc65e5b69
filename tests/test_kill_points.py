"""A run that is killed before any of its file operations, or in the middle of a file, ends as one that nobody killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

EVERY = "7"
"""1 takes minutes"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="open files are found in /proc")


@pytest.mark.parametrize(
    ("scenario", "at_least"),
    [
        ("from nothing", 40),
        ("with inputs that had a result before", 12),
    ],
)
def test_a_run_killed_at_any_file_operation_ends_as_one_that_nobody_killed(
    tmp_path: Path, scenario: str, at_least: int
) -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "stand_in_run.py"), str(tmp_path), scenario, EVERY],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *not_as_wanted, kills = done.stdout.splitlines()
    assert not_as_wanted == []
    assert int(kills) >= at_least
