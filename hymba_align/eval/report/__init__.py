"""A run's report: scores by stage beside the published ones, the data, how training went, sample answers.

contents (what the folder holds) ← differences, published, samples, training, cost, words, inert ← markdown, html, terminal
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hymba_align.eval.report.contents import read_run
from hymba_align.files import write_text

if TYPE_CHECKING:
    from rich.table import Table

    from hymba_align.eval.result import TaskResult

__all__ = ["load_results", "score_table", "write_report"]


def write_report(run_root: Path) -> Path:
    """The path of report.md, written with report.html from what the run folder holds so far."""
    from hymba_align.eval.report.html import html
    from hymba_align.eval.report.markdown import markdown

    run = read_run(run_root)
    write_text(run_root / "report.html", html(run))
    path = run_root / "report.md"
    write_text(path, markdown(run))
    return path


def score_table(run_root: Path) -> Table:
    """The same scores for the terminal."""
    from hymba_align.eval.report.terminal import run_table

    return run_table(read_run(run_root))


def load_results(run_root: Path) -> list[tuple[str, str, TaskResult]]:
    """(stage, task, result) of every result file that can be used, in the order of the stages."""
    return [(scored.stage, scored.task, scored.result) for scored in read_run(run_root).scored]
