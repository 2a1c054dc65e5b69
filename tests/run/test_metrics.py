"""What reads metrics.jsonl, after a crash too."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hymba_align.errors import RunFolderError
from hymba_align.run.metrics import append_metrics, read_metrics

RECORD = {"step": 2, "loss": 0.25, "note": "é"}


@given(cut=st.integers(min_value=1))
def test_a_last_line_cut_anywhere_is_left_out_and_those_before_it_stay(
    cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    stage_dir = tmp_path_factory.mktemp("stage")
    append_metrics(stage_dir, {"step": 1})
    append_metrics(stage_dir, RECORD)
    path = stage_dir / "metrics.jsonl"
    whole = path.read_text()
    last = len(whole) - whole.index("\n") - 1
    keep = len(whole) - cut % last
    path.write_text(whole[:keep])
    assert read_metrics(stage_dir) == [{"step": 1}, *([RECORD] if keep >= len(whole) - 1 else [])]


def test_a_broken_line_before_the_last_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(RunFolderError) as raised:
        read_metrics(tmp_path)
    assert str(raised.value) == (
        f"{tmp_path}/metrics.jsonl:2: not a JSON object (Unterminated string starting at); remove the line, or the file "
        "to begin a new one"
    )


def test_a_stage_that_never_logged_has_no_records(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
