"""What scoring a task produces, and its file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hymba_align.files import write_json


@dataclass(frozen=True)
class Score:
    """A mean over problems in [0, 1] and its standard error; None where one problem gives none."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class Sample:
    """One problem: what was asked, what came back, what each match extracted from it and whether that was right."""

    doc_id: int
    question: str
    target: str
    response: str
    extracted: dict[str, str]
    correct: dict[str, bool]


@dataclass(frozen=True)
class TaskResult:
    """Scores of one checkpoint on one task. `n` of `total` problems were scored; fewer than all makes it partial.

    `ended` answers closed with the end token, instead of running into `max_new_tokens`.
    """

    task: str
    n: int
    total: int
    limit: int | None
    partial: bool
    scores: dict[str, Score]
    settings: dict[str, Any]
    versions: dict[str, str]
    wall_s: float
    ended: int = 0
    truncated_prompts: int = 0
    warnings: tuple[str, ...] = ()
    samples: list[Sample] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Writes the result as JSON; a reader sees the old file or the new one, never a part."""
        write_json(path, asdict(self))


def read_result(path: Path) -> TaskResult:
    """The result that `TaskResult.write` wrote."""
    values = json.loads(path.read_text(encoding="utf-8"))
    values["scores"] = {name: Score(**score) for name, score in values["scores"].items()}
    values["samples"] = [Sample(**sample) for sample in values["samples"]]
    values["warnings"] = tuple(values["warnings"])
    return TaskResult(**values)
