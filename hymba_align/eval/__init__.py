"""Scores of a checkpoint: adapters to the official harnesses, and the report."""

from __future__ import annotations

from hymba_align.eval.result import Sample, Score, TaskResult, read_result
from hymba_align.eval.run import TaskRun, evaluate

__all__ = ["Sample", "Score", "TaskResult", "TaskRun", "evaluate", "read_result"]
