"""Scores and costs as plain values, for --json."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from hymba_align.eval.result import TaskResult


def plain_result(result: TaskResult) -> dict[str, Any]:
    """A result without its samples: scores in [0, 1] by name, the first of them the task's headline, and what they took."""
    return {
        "n": result.n,
        "total": result.total,
        "partial": result.partial,
        "headline": result.headline,
        "scores": {name: asdict(score) for name, score in result.scores.items()},
        "cut_off": result.cut_off,
        "warnings": list(result.warnings),
        "seconds": result.wall_s + result.earlier_s,
        "new_tokens": result.new_tokens + result.reused_tokens,
        "tokens_per_second": result.tokens_per_second,
        "peak_memory_bytes": result.peak_memory_bytes,
        "command": result.command,
    }
