"""What a check of the data found, as plain data: check.py fills it in, the command line prints it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from hymba_align.data.inspection.contamination import NotCompared
from hymba_align.data.reading.examples import Lost

Kind = Literal[
    "unusable source",
    "cannot be prepared",
    "malformed row",
    "another schema",
    "wrong role",
    "empty answer",
    "malformed tool call",
    "control token",
    "nothing trained",
    "no wrong answer",
    "equal answers",
    "prefix rewritten",
    "over-long",
    "empty user turn",
    "call without result",
    "repeated user turn",
    "exact duplicate",
    "near duplicate",
    "contamination",
]
KINDS: tuple[Kind, ...] = get_args(Kind)  # in the order in which they are shown
PERCENTILES = (1, 5, 25, 50, 75, 90, 95, 99)

# What a reason says, and the kind that it is of; the first that fits counts, "malformed row" where none does.
REASONS: tuple[tuple[str, Kind], ...] = (
    (r"^the row has the columns of ", "another schema"),
    (r"chosen equals rejected", "equal answers"),
    (r"rewrites the prompt", "prefix rewritten"),
    (r"is the control token", "control token"),
    (r"no token of it is trained on", "nothing trained"),
    (r"####", "no wrong answer"),
    (r"the assistant's, is empty|column '(?!question|prompt|instruction|text|messages)\w+' is empty", "empty answer"),
    (r"\brole\b|system message after|no assistant turn|the assistant answers|must (begin|end) with", "wrong role"),
    (r"a tool's result|only the assistant", "wrong role"),
    (r"tool.call|the call\b|function_call|^(the )?tools\b", "malformed tool call"),
)
OF_NO_ROW: tuple[Kind, ...] = ("unusable source", "cannot be prepared")
NO_FIX = "correct or remove the row"


@dataclass(frozen=True)
class Finding:
    """Something to look at: where it is, what it is, what to do. `loses_row`: nothing of the row would be trained on."""

    kind: Kind
    place: str
    message: str
    fix: str
    loses_row: bool

    @classmethod
    def of_loss(cls, lost: Lost) -> Finding:
        """From a row that cannot be used; its reason ends with what to do."""
        message, separator, fix = lost.reason.rpartition("; ")
        return cls(
            kind_of(lost),
            lost.place,
            message if separator else lost.reason,
            fix if separator else NO_FIX,
            loses_row=True,
        )


def kind_of(lost: Lost) -> Kind:
    """The kind of finding that a lost row is."""
    if lost.overlong:
        return "over-long"
    what = lost.reason.rpartition("; ")[0] or lost.reason
    return next((kind for pattern, kind in REASONS if re.search(pattern, what)), "malformed row")


@dataclass(frozen=True)
class SourceReport:
    """What one source holds. Turns are those of all readable rows; tokens those of one epoch's training side.

    `schema` is empty, and tokens 0, where the source could not be prepared.
    """

    name: str
    schema: str
    rows: int
    rows_kept: int
    conversations: int
    turns: Mapping[str, int]
    trained_tokens: int
    total_tokens: int
    repeat: int = 1
    rows_not_chosen: int = 0
    rows_passed_over: int = 0
    ignored_columns: tuple[str, ...] = ()
    unread_keys: tuple[str, ...] = ()
    passed_over: tuple[str, ...] = ()
    """Files of its folder that are not read."""


@dataclass(frozen=True)
class Lengths:
    """Tokens per row, each row as a conversation of its own before anything is cut (of a pair, its longer side).

    `percentiles` by their numbers, and 100 for the longest; `uncounted` rows are so long that their tokens were not
    counted, and are in none of the numbers.
    """

    percentiles: Mapping[int, int]
    uncounted: int = 0


@dataclass(frozen=True)
class Compared:
    """A benchmark that the rows were compared with: its items, and how many of them are too short for it."""

    name: str
    items: int
    too_short: int


@dataclass(frozen=True)
class CheckReport:
    """Everything that a check of a stage's data found; `findings` by kind, then as the rows are read."""

    stage: Literal["sft", "dpo"]
    max_length: int
    bad_rows: Literal["refuse", "drop"]
    over_long: Literal["refuse", "drop", "truncate", "split"]
    sources: tuple[SourceReport, ...]
    lengths: Lengths | None
    findings: tuple[Finding, ...]
    compared: tuple[Compared, ...] = ()
    not_compared: tuple[NotCompared, ...] = ()
    validation_conversations: int = 0
    short_rows: int = 0
    """Rows of fewer than five words, which were compared for exact duplicates only."""
    counts: Mapping[Kind, int] = field(init=False)

    def __post_init__(self) -> None:
        found = Counter(finding.kind for finding in self.findings)
        object.__setattr__(self, "counts", {kind: found[kind] for kind in KINDS if found[kind]})

    @property
    def rows(self) -> int:
        """Rows of all sources."""
        return sum(source.rows for source in self.sources)

    @property
    def rows_lost(self) -> int:
        """Rows that cannot be used, as far as they could be read; of a row that gives several examples, each counts."""
        return sum(one.loses_row and one.kind not in OF_NO_ROW for one in self.findings)

    @property
    def refused(self) -> tuple[Finding, ...]:
        """The findings that would stop the run, because rows would be lost and the section does not let them go."""
        return tuple(finding for finding in self.findings if finding.loses_row and not self._lets_go(finding))

    def _lets_go(self, finding: Finding) -> bool:
        if finding.kind in OF_NO_ROW:
            return False
        return (self.over_long if finding.kind == "over-long" else self.bad_rows) != "refuse"

    @property
    def allowed(self) -> bool:
        """Whether training would run on this data."""
        return not self.refused

    @property
    def exit_code(self) -> int:
        """1 where rows would be lost and the section does not allow it."""
        return 0 if self.allowed else 1

    @property
    def trained_share(self) -> float | None:
        """Of one epoch's tokens, those under the loss; None where there are none."""
        total = sum(source.repeat * source.total_tokens for source in self.sources)
        return sum(source.repeat * source.trained_tokens for source in self.sources) / total if total else None

    def of_kind(self, kind: Kind) -> tuple[Finding, ...]:
        """The findings of one kind."""
        return tuple(finding for finding in self.findings if finding.kind == kind)

    def to_json(self) -> dict[str, Any]:
        """Everything as values that `json.dumps` takes."""
        content = asdict(self)
        if self.lengths is not None:
            content["lengths"]["percentiles"] = {str(at): tokens for at, tokens in self.lengths.percentiles.items()}
        derived = {"rows": self.rows, "rows_lost": self.rows_lost, "allowed": self.allowed}
        return {**content, **derived, "trained_share": self.trained_share}

    def verdict(self) -> str:
        """Whether training would run, in one sentence."""
        if self.allowed:
            return (
                f"{self.rows_lost:,} of {self.rows:,} rows are lost, as the recipe allows"
                if self.rows_lost
                else "no row is lost"
            )
        keys = [
            *(["data.over_long"] if any(finding.kind == "over-long" for finding in self.refused) else []),
            *(["data.bad_rows: drop"] if any(_is_bad_row(finding) for finding in self.refused) else []),
        ]
        rows = sum(finding.kind not in OF_NO_ROW for finding in self.refused)
        lost = [f"{rows:,} {'row' if rows == 1 else 'rows'} would be lost"] if rows else []
        whole = any(finding.kind in OF_NO_ROW for finding in self.refused)
        lost += ["not all of the data can be read or prepared"] if whole else []
        what = f"{' and '.join(lost)}, so training would stop"
        settings = f", or set {' and '.join(keys)}" if keys else ""
        return f"{what}; correct what is named above{settings}"


def _is_bad_row(finding: Finding) -> bool:
    return finding.kind not in ("over-long", *OF_NO_ROW)
