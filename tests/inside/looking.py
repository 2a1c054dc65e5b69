"""The command `inspect` on a small checkpoint, as its tests call it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hymba_align.cli import main
from hymba_align.inside import result
from hymba_align.inside.inspecting import InspectSettings, inspect_checkpoint
from hymba_align.recipe import DataSection

ROWS = "data/arithmetic/test.jsonl"
FEW = ("--data", ROWS, "--documents", "3", "--max-length", "96")


def inspect(*words: object, parts: str = "fusion") -> int:
    return main(["inspect", *map(str, words), "--parts", parts])


def files_below(folder: Path) -> list[str]:
    """Everything but what a lock leaves."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(name for path in found if not (name := path.relative_to(folder).as_posix()).startswith("."))


def look(checkpoint: Path, **asked: Any) -> result.Inspection:
    """Some parts, over a few rows."""
    settings = {"data": DataSection(path=ROWS), "documents": 3, "max_length": 96, **asked}
    return inspect_checkpoint(InspectSettings(str(checkpoint), **settings), lambda line: None)
