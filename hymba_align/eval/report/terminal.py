"""Scores as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hymba_align.eval.report.contents import STAGE_NAMES, STAGES, Run
from hymba_align.eval.report.published import PUBLISHED_MODEL, beside, score_beside
from hymba_align.eval.report.words import of_problems, percent, problems, spaced
from hymba_align.eval.result import TaskResult

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

SHORT = {"yes": "yes", "approximately": "roughly", "no": "no"}
"""Whether the last stage's score compares with the published one"""


def run_table(run: Run) -> Table:
    """Tasks and their scores by stage, partial ones marked, the published scores beside."""
    from rich.table import Table
    from rich.text import Text

    stages = [stage for stage in STAGES if any(scored.stage == stage for scored in run.scored)]
    published = {task: found for task in run.tasks if (found := beside(run, run.of_task(task)[-1].result))}
    caption = "± is the standard error" + (f"; published: {PUBLISHED_MODEL}" if published else "")
    table = Table(title=Text(f"Scores of {run.name}, %"), caption=caption)
    table.add_column("task", min_width=17, overflow="fold")
    for stage in stages:
        table.add_column(STAGE_NAMES[stage], justify="right")
    if published:
        table.add_column("published,\ncomparable?", justify="right")
    for task in run.tasks:
        results = {scored.stage: scored.result for scored in run.of_task(task)}
        cells = [_count(results.get(stage)) for stage in stages]
        table.add_row(Text(task, style="bold"), *cells, *([""] if published else []))
        names = list(dict.fromkeys(name for result in results.values() for name in result.scores))
        for name in names:
            row = [f" {spaced(name)}", *(_score(results.get(stage), name) for stage in stages)]
            is_last = name == names[-1]
            found = published.get(task) if name == score_beside(run.of_task(task)[-1].result) else None
            beside_it = [f"{found.percent:.2f}\n{SHORT[found.verdict]}" if found else ""] if published else []
            table.add_row(*row, *beside_it, end_section=is_last)
    return table


def results_table(results: Mapping[str, TaskResult]) -> Table:
    """One checkpoint's scores by task."""
    from rich.table import Table
    from rich.text import Text

    table = Table("task", "score", caption="± is the standard error")
    table.add_column("problems", justify="right")
    table.add_column("value, %", justify="right")
    for task, result in results.items():
        names = list(result.scores)
        for name in names:
            shown = Text(task, style="bold") if name == names[0] else ""
            count = of_problems(result, name).removeprefix("n = ")
            value = Text(percent(result.scores[name]))
            table.add_row(shown, Text(spaced(name)), _marked(result, count), value, end_section=name == names[-1])
    return table


def _count(result: TaskResult | None) -> Text:
    return (
        Text()
        if result is None
        else _marked(result, problems(result).replace(" of ", "\nof ") if result.partial else f"n = {result.n:,}")
    )


def _marked(result: TaskResult, words: str) -> Text:
    from rich.text import Text

    return Text(words, style="yellow" if result.partial else "dim")


def _score(result: TaskResult | None, name: str) -> str:
    if result is None or name not in result.scores:
        return "–"
    return percent(result.scores[name])
