"""What a run's inspections came to: the summary that the manifest of a step `inspect/<stage>` holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hymba_align.secrets import redact

PAGE = "inspect.html"
MOST_ROWS, MOST_FINDINGS, LONGEST = 20, 12, 2000


@dataclass(frozen=True)
class Inspected:
    """An inspection of a stage's checkpoint, in few words."""

    stage: str
    page: str
    """inspect.html, from the run folder"""
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    findings: tuple[tuple[str, bool], ...]
    """Sentences, and whether each is a sign that something may be wrong"""
    seconds: float | None
    read: str = ""
    """What was read, and what the checkpoint was compared with"""


def inspected(root: Path, stage: str, manifest: Mapping[str, Any]) -> Inspected | None:
    """What the manifest of the step says; None where it is not complete, or its page is gone.

    Raises: ValueError where it says it in another form than this version writes.
    """
    page = f"inspect/{stage}/{PAGE}"
    if "completed" not in manifest or not (root / page).is_file():
        return None
    try:
        details = manifest["details"]
        summary, seconds = details["summary"], details.get("seconds")
        read = _text(summary.get("read", ""))
        head = _texts(summary["head"])
        rows = tuple(_texts(row) for row in summary["rows"][:MOST_ROWS])
        findings = tuple((_text(one["text"]), bool(one["sign"])) for one in summary["findings"][:MOST_FINDINGS])
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"its summary is not as this version writes it ({type(error).__name__}: {error})") from error
    if any(len(row) != len(head) for row in rows):
        raise ValueError("its summary has rows of another length than its head")
    number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    return Inspected(stage, page, head, rows, findings, float(seconds) if number else None, read)


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list):
        raise TypeError(f"{type(values).__name__} in the place of a list")
    return tuple(map(_text, values))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} in the place of a text")
    return redact(value[:LONGEST])
