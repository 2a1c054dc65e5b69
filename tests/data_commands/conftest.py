"""`hymba-align data` in this process, with datasets' files out of the user's cache and BFCL's data out of sight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hymba_align.cli import main
from tests.data_commands.rows import TOKENIZER, Run


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HYMBA_ALIGN_BFCL", str(tmp_path / "no bfcl"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """`hymba-align data ...` in this process: exit code, stdout, stderr."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        code = main(["data", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def small() -> Any:
    from hymba_align.data.template import load_tokenizer

    return load_tokenizer(TOKENIZER)
