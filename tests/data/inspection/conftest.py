"""The check over a handful of rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hymba_align.data.inspection.check import check_data
from hymba_align.data.inspection.findings import CheckReport
from hymba_align.recipe import DataSection
from tests.data.inspection.checked_rows import write


@pytest.fixture
def report(small: Any, tmp_path: Path) -> Callable[..., CheckReport]:
    """Checks rows of SFT, or of DPO where they are preferences."""

    def run(*rows: Any, max_length: int = 64, benchmarks: Any = (), tokenizer: Any = small, **keys: Any) -> CheckReport:
        stage: Any = "dpo" if any(isinstance(row, dict) and "chosen" in row for row in rows) else "sft"
        path = write(tmp_path / "d.jsonl", *rows)
        return check_data(DataSection(path=path, **keys), stage, tokenizer, max_length, seed=0, benchmarks=benchmarks)

    return run
