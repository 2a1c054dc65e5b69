"""What a run took: time, tokens and memory of every stage's training and of every scoring, time of every inspection."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hymba_align.eval.report.contents import STAGE_NAMES, STAGES, TRAINING_STAGES, Run, Scored
from hymba_align.eval.report.inspected import Inspected
from hymba_align.eval.report.words import duration, gibibytes, problems

HEAD = ("what", "time", "tokens", "tokens per second", "peak memory")
NOTE = (
    "Time is of all sessions, work that was repeated included; tokens of training are all that were read, those of scoring "
    "the ones that were generated. Memory is of one process, of scoring the one that needed most: on its GPU, or of the "
    "machine where there is none."
)
NOTHING = "–"


@dataclass(frozen=True)
class Cost:
    """What was taken; None for what was not recorded."""

    seconds: float | None
    tokens: int | None
    tokens_per_second: float | None
    peak_bytes: int | None

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """Time, tokens, tokens per second, peak memory."""
        return (
            duration(self.seconds) if self.seconds is not None else NOTHING,
            f"{self.tokens:,}" if self.tokens is not None else NOTHING,
            f"{self.tokens_per_second:,.0f}" if self.tokens_per_second else NOTHING,
            gibibytes(self.peak_bytes) if self.peak_bytes is not None else NOTHING,
        )


def rows(run: Run) -> list[tuple[str, str, str, str, str]]:
    """The cells of `HEAD` for every training, scoring and inspection, and their time together where each is known; empty where nothing was run."""
    costs = [
        (f"train {stage.upper()}", of_training(run.metrics[stage])) for stage in TRAINING_STAGES if run.metrics[stage]
    ]
    in_order = sorted(run.scored, key=lambda scored: (STAGES.index(scored.stage), run.tasks.index(scored.task)))
    costs += [(_name(scored), of_scoring(scored)) for scored in in_order]
    costs += [(f"inspect {STAGE_NAMES[one.stage]}", of_inspecting(one)) for one in run.inspected]
    found = [(name, *cost.cells) for name, cost in costs]
    times = [cost.seconds for _, cost in costs if cost.seconds is not None]
    return [*found, ("together", duration(sum(times)), "", "", "")] if 1 < len(times) == len(costs) else found


def of_training(records: list[dict[str, Any]]) -> Cost:
    """What a stage's records say that it took."""
    seconds, tokens, peak = (
        max(_numbers(records, key), default=None) for key in ("seconds", "tokens", "peak_memory_bytes")
    )
    rate = tokens / seconds if tokens is not None and seconds else None
    return Cost(seconds, int(tokens) if tokens is not None else None, rate, int(peak) if peak is not None else None)


def of_scoring(scored: Scored) -> Cost:
    """What scoring a task took; tokens per second are those of generating alone."""
    result = scored.result
    seconds, tokens = result.wall_s + result.earlier_s, result.new_tokens + result.reused_tokens
    return Cost(seconds, tokens, result.tokens_per_second, result.peak_memory_bytes)


def of_inspecting(found: Inspected) -> Cost:
    """What an inspection took: its time."""
    return Cost(found.seconds, None, None, None)


def _name(scored: Scored) -> str:
    part = f" ({problems(scored.result)})" if scored.result.partial else ""
    return f"score {STAGE_NAMES[scored.stage]}, {scored.task}{part}"


def _numbers(records: list[dict[str, Any]], key: str) -> Iterator[float]:
    for record in records:
        value = record.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield value
