"""How tests read a source: its rows with their places, and the sentence with which it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hymba_align.data.reading.sources import (
    open_source,
    parse_row,
)
from hymba_align.errors import DataError
from hymba_align.recipe import SourceSection

QA = {"question": "q", "answer": "a"}
LINES = b'{"a": 1}\n\n{"a": 2}\n'


def lines(*rows: Any) -> bytes:
    return "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows).encode()


def section(path: Path | str, **keys: Any) -> SourceSection:
    return SourceSection(path=str(path), **keys)


def read(path: Path | str, **keys: Any) -> list[tuple[str, Any]]:
    """Places and rows; of a row that cannot be used, the sentence about it."""
    found: list[tuple[str, Any]] = []
    for chunk in open_source(section(path, **keys)).chunks():
        for raw in chunk:
            try:
                found.append((raw.place, parse_row(raw)))
            except DataError as error:
                found.append((raw.place, str(error)))
    return found


def rows_of(path: Path | str, **keys: Any) -> list[Any]:
    return [row for _, row in read(path, **keys)]


def refusal(path: Path | str, **keys: Any) -> str:
    with pytest.raises(DataError) as raised:
        read(path, **keys)
    assert "\n" not in str(raised.value)
    return str(raised.value)
