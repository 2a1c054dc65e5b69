"""What became of rows: counted chunk by chunk, kept per source, described for people."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from hymba_align.data.reading.examples import Lost

REASONS_SHOWN = 6


@dataclass
class Counts:
    """What became of rows. Tokens are those of the training side; every other number counts both sides."""

    rows_read: int = 0
    rows_kept: int = 0
    rows_not_chosen: int = 0
    """Left out by keep_fraction."""
    rows_passed_over: int = 0
    """For which the converter gave None."""
    conversations: int = 0
    trained_tokens: int = 0
    total_tokens: int = 0
    lost: list[Lost] = field(default_factory=list)
    cut: list[Lost] = field(default_factory=list)
    """Parts of conversations that over_long cut away."""
    columns: set[str] = field(default_factory=set)

    def add(self, other: Counts) -> None:
        """Adds another chunk's counts to these."""
        for name in vars(self):
            value = getattr(other, name)
            if isinstance(value, int):
                setattr(self, name, getattr(self, name) + value)
            elif isinstance(value, list):
                getattr(self, name).extend(value)
            else:
                getattr(self, name).update(value)


@dataclass(frozen=True)
class SourceCounts:
    """What became of one source's rows, each counted once however often the source is repeated.

    A row is lost when nothing of it can be used; where a row gives several examples, `lost` names each that cannot.
    `cut` names the parts of conversations that over_long cut away, in conversations that were kept.
    """

    name: str
    schema: str
    repeat: int
    rows_read: int
    rows_kept: int
    rows_not_chosen: int
    rows_passed_over: int
    conversations: int
    trained_tokens: int
    total_tokens: int
    lost: tuple[Lost, ...] = ()
    cut: tuple[Lost, ...] = ()
    ignored_columns: tuple[str, ...] = ()


def losses_by_reason(lost: Iterable[Lost]) -> list[tuple[str, list[Lost]]]:
    """Lost rows grouped by what is wrong with them, most frequent first; numbers of turns and tokens aside."""
    groups: dict[str, list[Lost]] = {}
    for one in lost:
        groups.setdefault(common_reason(one.reason), []).append(one)
    return sorted(groups.items(), key=lambda group: -len(group[1]))


def common_reason(reason: str) -> str:
    """What is wrong, without what to do and without the numbers in which rows with the same fault differ."""
    what = reason.split("; ")[0]
    return re.sub(
        r" at (column|byte) \d+|: (it|its longer side) has [\d,]+ .*", "", re.sub(r"\b(turn|token) \d+", r"a \1", what)
    )


def describe_losses(lost: Iterable[Lost]) -> list[str]:
    """Reasons with their counts and first places; those beyond a handful in one sum."""
    groups = losses_by_reason(lost)
    parts = [f"{len(group):,} lost ({reason}, first {group[0].place})" for reason, group in groups[:REASONS_SHOWN]]
    rest = sum(len(group) for _, group in groups[REASONS_SHOWN:])
    return [*parts, *([f"{rest:,} lost for other reasons"] if rest else [])]


def summarise(source: SourceCounts) -> str:
    """What became of a source's rows, in one line."""
    parts = [f"{source.rows_kept:,} of {source.rows_read:,} rows kept in {source.conversations:,} conversations"]
    if source.repeat > 1:
        parts[0] += f", {source.repeat} times"
    if source.rows_not_chosen:
        parts.append(f"{source.rows_not_chosen:,} not chosen by keep_fraction")
    if source.rows_passed_over:
        parts.append(f"{source.rows_passed_over:,} passed over by the converter")
    parts += describe_losses(source.lost)
    if source.cut:
        parts.append(f"{len(source.cut):,} shortened (first {source.cut[0].place}: {source.cut[0].reason})")
    parts.append(f"{source.trained_tokens:,} of {source.total_tokens:,} tokens trained on")
    if source.ignored_columns:
        parts.append(f"columns not used: {', '.join(source.ignored_columns)}")
    return "; ".join(parts)
