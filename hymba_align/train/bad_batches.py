"""A batch whose loss or gradient is not finite, on record and in words: bad_batch.json, and what messages say of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hymba_align.errors import HymbaAlignError
from hymba_align.files import read_json, write_json

BAD_BATCH = "bad_batch.json"
ROWS_IN_MESSAGE = 3


@dataclass
class BadBatches:
    """A stage's bad_batch.json: the batch that stopped it, if one did, and those that were left out.

    Losses and norms that JSON has no number for are the words `nan` and `inf`.
    """

    path: Path
    skipped: list[dict[str, Any]] = field(default_factory=list)
    stopped: dict[str, Any] | None = None

    @classmethod
    def until(cls, path: Path, step: int) -> BadBatches:
        """What was left out up to `step`, at which training goes on; later steps happen again."""
        try:
            known = read_json(path)["skipped"] if path.is_file() else []
        except (ValueError, KeyError) as error:
            raise HymbaAlignError(f"{path} is not what training wrote ({error}); remove it") from error
        return cls(path, [record for record in known if record["step"] <= step])

    def write(self) -> None:
        """Writes the file; removes it where there is nothing to say."""
        if self.stopped is None and not self.skipped:
            self.path.unlink(missing_ok=True)
        else:
            write_json(self.path, {"stopped": self.stopped, "skipped": self.skipped})


# ---- words -----------------------------------------------------------------------------------------------------------


def number_or_word(value: float) -> float | str:
    """The number, or a word where JSON has none for it."""
    return value if math.isfinite(value) else str(value)


def what_is_wrong(record: dict[str, Any]) -> str:
    """For instance `whose loss is nan in micro-batch 2 of process 0`."""
    bad = [batch for batch in record["batches"] if not batch["finite"]]
    if not bad:
        return f"whose gradient has the norm {record['gradient_norm']}"
    more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    return f"whose loss is {bad[0]['loss']} in micro-batch {bad[0]['micro_batch']} of process {bad[0]['process']}{more}"


def rows_of(record: dict[str, Any], *, only_bad: bool = False) -> list[str]:
    """Places of the rows of the step; of its micro-batches with such a loss only, where that is asked and there are any."""
    batches = record["batches"]
    if only_bad:
        batches = [batch for batch in batches if not batch["finite"]] or batches
    return list(dict.fromkeys(row for batch in batches for row in batch["rows"]))


def count(rows: list[str]) -> str:
    """How many rows, in words: `1 row`, `2,000 rows`."""
    return f"{len(rows):,} row{'' if len(rows) == 1 else 's'}"


def first_of(rows: list[str]) -> str:
    """The first few places, and how many more there are."""
    shown = ", ".join(rows[:ROWS_IN_MESSAGE])
    more = len(rows) - ROWS_IN_MESSAGE
    return f"{shown} and {more:,} more row{'' if more == 1 else 's'}" if more > 0 else shown
