"""What records depend on besides their rows, and the columns that all records have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from hymba_align.data.rendering import LossOn, Rendered
from hymba_align.errors import RenderError
from hymba_align.recipe import SourceSection, TrainingStage

LONGER_REMEDY = "raise max_length, or set data.over_long to say what becomes of such rows"


@dataclass(frozen=True)
class Settings:
    """What a record depends on besides its row: the source's keys, the data section's, and the stage's."""

    source: SourceSection
    stage: TrainingStage
    loss_on: LossOn
    over_long: Literal["drop", "truncate", "split"]
    validation_fraction: float
    max_length: int
    seed: int


def too_long(rendered: Rendered | RenderError, max_length: int) -> str:
    """Why something does not fit, and what to do."""
    if isinstance(rendered, RenderError):
        return f"{rendered}; {LONGER_REMEDY}"
    return f"longer than max_length={max_length}: it has {len(rendered.input_ids):,} tokens; {LONGER_REMEDY}"


def bookkeeping_columns() -> dict[str, Any]:
    """Where a record comes from, and which side it is on."""
    from datasets import Value

    return {"place": Value("string"), "validation": Value("bool")}
