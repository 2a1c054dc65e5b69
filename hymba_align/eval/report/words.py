"""How numbers are written, on the terminal and in both reports alike."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from hymba_align.data.inspection.preview import visible
from hymba_align.eval.report.differences import Difference
from hymba_align.eval.result import Score, TaskResult

NEVER_CALL = "_never_call"
"""How the score of a model that never calls a function is named, which stands beside one on irrelevance"""


def seen(value: Any) -> str:
    """A text without characters that act instead of being seen; line breaks stay, unmarked."""
    return visible(str(value)).replace("↵\n", "\n")


def percent(score: Score) -> str:
    """A score in percent with its standard error, such as `87.6 ± 1.2`."""
    error = f" ± {100 * score.stderr:.1f}" if score.stderr is not None else ""
    return f"{100 * score.value:.1f}{error}"


def problems(result: TaskResult) -> str:
    """How many problems a result is over; fewer than all are marked."""
    return f"partial: {result.n:,} of {result.total:,}" if result.partial else f"{result.n:,}"


def of_problems(result: TaskResult, score: str) -> str:
    """Over how many problems one score of a result is, marked where the result is partial."""
    n = result.scores[score].n
    if not result.partial:
        return f"n = {n:,}"
    return f"partial: {n:,} of {result.total:,}" if n == result.n else f"partial: n = {n:,}"


def signed(difference: Difference) -> str:
    """A difference in percentage points with its standard error, such as `+3.2 ± 1.1`."""
    error = f" ± {100 * difference.stderr:.1f}" if difference.stderr is not None else ""
    return f"{100 * difference.value:+.1f}{error}".replace("-", "−")


def first_upper(words: str) -> str:
    """The words as the beginning of a sentence; `after SFT` keeps its capitals."""
    return words[:1].upper() + words[1:]


def spaced(name: str) -> str:
    """A score's name as words; `irrelevance_never_call` is of a model that never calls a function."""
    base = name.removesuffix(NEVER_CALL)
    return base.replace("_", " ") + (" (never calls)" if base != name else "")


def gibibytes(count: int) -> str:
    """Bytes in GiB, such as `1.25 GiB`."""
    return f"{count / 2**30:,.2f} GiB"


def moment(written: str) -> str:
    """A time in ISO 8601 to the minute, such as `2026-11-21 23:02 UTC`; what is no such time, or has no zone, as it is."""
    try:
        found = datetime.fromisoformat(written)
    except ValueError:
        return written
    return f"{found.astimezone(UTC):%Y-%m-%d %H:%M} UTC" if found.tzinfo is not None else written


def cut_offs(result: TaskResult) -> str:
    """How many answers were cut off, and where, such as `3 of 200 answers at 512 new tokens`."""
    allowed = result.generation.get("max_new_tokens")
    return f"{result.cut_off:,} of {result.n:,} answers{f' at {allowed} new tokens' if allowed else ''}"


def duration(seconds: float) -> str:
    """A time as people say it: `42 s`, `3 min 5 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"
