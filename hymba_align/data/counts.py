"""What became of rows: counted chunk by chunk, kept per source, described for people."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from hymba_align.data.reading.examples import Lost
from hymba_align.data.reading.schemas import Schema, unread_columns
from hymba_align.recipe import TrainingStage
from hymba_align.secrets import shown

if TYPE_CHECKING:
    from hymba_align.data.settings import Settings

REASONS_SHOWN = 6
FILES_SHOWN = 10


def name_files(names: Sequence[str]) -> str:
    """The first of several files by name, and the number of the others."""
    more = len(names) - FILES_SHOWN
    return ", ".join(names[:FILES_SHOWN]) + (f" and {more:,} more" if more > 0 else "")


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
    """Or texts, or pairs."""
    for_validation: int = 0
    """Of these conversations."""
    trained_tokens: int = 0
    total_tokens: int = 0
    lost: list[Lost] = field(default_factory=list)
    cut: list[Lost] = field(default_factory=list)
    """Parts of conversations that over_long cut away."""
    columns: set[str] = field(default_factory=set)
    """Of the rows as the file has them."""
    unread_columns: set[str] = field(default_factory=set)
    """Of the rows that a converter gives: those that their schemas do not read."""
    unread_keys: set[str] = field(default_factory=set)
    """Keys of turns that hold something and are not read."""

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

    def to_json(self) -> dict[str, Any]:
        """Plain values, from which `of_json` makes equal counts."""
        return {name: sorted(value) if isinstance(value, set) else value for name, value in asdict(self).items()}

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> Counts:
        """The counts that `to_json` gave."""
        counts = cls()
        for name, value in values.items():
            empty = getattr(counts, name)
            made = set(value) if isinstance(empty, set) else value
            setattr(counts, name, [Lost(**one) for one in value] if isinstance(empty, list) else made)
        return counts


@dataclass(frozen=True)
class SourceCounts:
    """What became of one source's rows, each counted once however often the source is repeated.

    A row is lost when nothing of it can be used; where a row gives several examples, `lost` names each that cannot.
    `cut` names the parts of conversations that over_long cut away, in conversations that were kept.
    """

    name: str
    schema: str
    stage: TrainingStage
    repeat: int
    rows_read: int
    rows_kept: int
    rows_not_chosen: int
    rows_passed_over: int
    conversations: int
    for_validation: int
    trained_tokens: int
    total_tokens: int
    lost: tuple[Lost, ...] = ()
    cut: tuple[Lost, ...] = ()
    files_passed_over: tuple[str, ...] = ()
    ignored_columns: tuple[str, ...] = ()
    """Of the file, or, behind a converter, of the rows that it gives."""
    unread_keys: tuple[str, ...] = ()
    """Keys of turns that nothing reads."""

    @classmethod
    def of(
        cls, settings: Settings, schema: Schema | None, counts: Counts, files_passed_over: Sequence[str] = ()
    ) -> SourceCounts:
        """Counts with what is known about the source; `schema` is None where a converter decides row by row."""
        source = settings.source
        unread = unread_columns(counts.columns, schema, source) if schema is not None else counts.unread_columns
        return cls(
            name=shown(source.path),
            schema=schema.name if schema is not None else f"by {source.convert}",
            stage=settings.stage,
            repeat=source.repeat,
            **{name: value for name, value in vars(counts).items() if isinstance(value, int)},
            lost=tuple(counts.lost),
            cut=tuple(counts.cut),
            files_passed_over=tuple(files_passed_over),
            ignored_columns=tuple(sorted(unread)),
            unread_keys=tuple(sorted(counts.unread_keys)),
        )

    def left_out(self) -> list[str]:
        """Why rows are not in the data, each reason with its count."""
        return [*self._passed_over(), *describe_losses(self.lost)]

    def _passed_over(self) -> list[str]:
        """Rows that were left out as the source asks."""
        parts = []
        if self.rows_not_chosen:
            parts.append(f"{self.rows_not_chosen:,} not chosen by keep_fraction")
        if self.rows_passed_over:
            parts.append(f"{self.rows_passed_over:,} passed over by the converter")
        return parts

    def summary(self) -> str:
        """The source's name and what became of its rows, in one line; and an indented one for each reason why some are lost."""
        unit = "conversation" if self.stage == "sft" else "pair"
        made = f"{self.conversations:,} {unit}{'s' if self.conversations != 1 else ''}"
        parts = [f"{self.rows_kept:,} of {self.rows_read:,} rows kept in {made}"]
        if self.repeat > 1:
            parts[0] += f", {self.repeat} times"
        if self.for_validation:
            parts.append(f"{self.for_validation:,} of them for validation")
        parts += self._passed_over()
        if self.cut:
            parts.append(f"{len(self.cut):,} shortened (first {self.cut[0].place}: {self.cut[0].reason})")
        parts.append(f"{self.trained_tokens:,} of {self.total_tokens:,} tokens trained on")
        if self.files_passed_over:
            parts.append(f"files passed over: {name_files(self.files_passed_over)}")
        if self.ignored_columns:
            parts.append(f"columns not used: {', '.join(self.ignored_columns)}")
        if self.unread_keys:
            parts.append(f"keys of turns not used: {', '.join(self.unread_keys)}")
        return "\n  ".join([f"{self.name}: {'; '.join(parts)}", *describe_losses(self.lost)])


def nothing_left(sources: Sequence[SourceCounts]) -> str:
    """Why no row is left for training, in one sentence."""
    names, read = ", ".join(source.name for source in sources), sum(source.rows_read for source in sources)
    why = [reason for source in sources for reason in source.left_out()]
    held_out = sum(source.for_validation for source in sources)
    why += [f"{held_out:,} for validation"] if held_out else []
    return f"{names}: none of the {read:,} rows is left for training: {'; '.join(why)}"


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
    """Reasons with their counts and first places; those beyond a handful in one sum, but for what over_long could save."""
    groups = losses_by_reason(lost)
    told = [*groups[:REASONS_SHOWN], *(group for group in groups[REASONS_SHOWN:] if group[1][0].overlong)]
    parts = [f"{len(group):,} lost ({reason}, first {group[0].place})" for reason, group in told]
    rest = sum(len(group) for _, group in groups) - sum(len(group) for _, group in told)
    return [*parts, *([f"{rest:,} lost for other reasons"] if rest else [])]
