"""A run that is killed before any of its file operations, or in the middle of a file, ends as one that nobody killed."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest

from tests.forked import Forked, run_script

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
    script = partial(run_script, ROOT / "tests" / "stand_in_run.py", tmp_path, scenario, EVERY)
    killing = Forked(script, tmp_path / "log", errors=tmp_path / "errors")
    assert killing.wait() == 0, killing.told()
    *not_as_wanted, kills = killing.log.read_text().splitlines()
    assert not_as_wanted == []
    assert int(kills) >= at_least
