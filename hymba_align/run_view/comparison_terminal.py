"""A comparison in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hymba_align.eval.report import cost
from hymba_align.eval.report.contents import STAGE_NAMES
from hymba_align.eval.report.words import of_problems, percent, seen, signed, spaced
from hymba_align.run_view.compare import ABSENT, Comparison, Curves, Differing, ScoreRow
from hymba_align.run_view.curves import draw
from hymba_align.secrets import redact
from hymba_align.terminal import RULE_WIDTH, open_console, print_table, print_text, speaks_utf8

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

LEAST_BESIDE = 36
"""Columns that a curve needs, at least, to stand beside another"""
GAP = 2


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Prints all of it: settings and machines that differ, curves, scores, costs."""
    from rich.text import Text

    console = console if console is not None else open_console()
    for label, view in zip(comparison.labels, comparison.views, strict=True):
        console.print(Text.assemble((seen(label), "bold"), f"  {view.run.root}"), soft_wrap=True)
        for problem in view.problems:
            print_text(console, Text(f"  Problem: {seen(redact(problem))}", style="yellow"))
    _print_differing(console, "Settings that differ", comparison.settings_in_short, comparison.labels)
    _print_differing(console, "Environment that differs", comparison.environment_in_short, comparison.labels)
    for curves in comparison.curves:
        _print_curves(console, curves)
    _print_scores(console, comparison)
    _print_costs(console, comparison)


def _print_differing(console: Console, title: str, rows: Sequence[Differing], labels: Sequence[str]) -> None:
    console.print()
    if not rows:
        console.print(f"{title}: none", style="dim")
        return
    _print_rows(console, title, ("key", *labels), [(row.key, *row.values) for row in rows])


def _print_curves(console: Console, curves: Curves) -> None:
    """The runs' curves over the same axes: beside each other where there is room, else below each other."""
    everything = [point for points in curves.points.values() for point in points]
    if len(everything) < 2:
        return
    x_range = min(x for x, _ in everything), max(x for x, _ in everything)
    y_range = min(y for _, y in everything), max(y for _, y in everything)
    room = min(console.width, 2 * RULE_WIDTH if console.is_terminal else RULE_WIDTH)
    beside = (room + GAP) // (LEAST_BESIDE + GAP) >= len(curves.points)
    width = (room + GAP) // len(curves.points) - GAP if beside else room
    drawn = {
        label: draw(points, width=width, utf8=speaks_utf8(console), x_range=x_range, y_range=y_range)
        for label, points in curves.points.items()
    }
    console.print()
    console.print(f"{curves.stage.upper()}: {curves.name}", style="bold", markup=False)
    blocks = [[seen(label)[:width], *lines] for label, lines in drawn.items()]
    if beside:
        blocks = [["".join(f"{cell:<{width + GAP}}" for cell in row).rstrip() for row in zip(*blocks, strict=True)]]
    for block in blocks:
        for line in block:
            console.print(line, markup=False, soft_wrap=True)


def _print_scores(console: Console, comparison: Comparison) -> None:
    console.print()
    if not comparison.scores:
        console.print("Scores: none yet", style="dim")
        return
    head = score_head(comparison.labels)
    rows = [score_cells(row) for row in comparison.scores]
    caption = "± is the standard error, that of a difference over the same problems"
    _print_rows(console, "Scores, %", head, rows, right=True, caption=caption)


def score_head(labels: Sequence[str]) -> tuple[str, ...]:
    """Titles of the columns that `score_cells` fills."""
    return ("score", *labels, *(f"{label} − {labels[0]}" for label in labels[1:]))


def score_cells(row: ScoreRow) -> tuple[str, ...]:
    """A score's name, its value in each run, and what each later run has more than the first."""
    cells = []
    for result in row.results:
        if result is None or row.score not in result.scores:
            cells.append(ABSENT)
        else:
            partial = f" ({of_problems(result, row.score)})" if result.partial else ""
            cells.append(f"{percent(result.scores[row.score])}{partial}")
    changes = [found if isinstance(found, str) else signed(found) for found in row.differences]
    return (f"{row.task} {STAGE_NAMES[row.stage]}, {spaced(row.score)}", *cells, *changes)


def cost_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """What every step took, one line for each thing that was measured, in each run."""
    rows = []
    for row in comparison.costs:
        cells = [found.cells if found is not None else (ABSENT,) * 4 for found in row.costs]
        for number, name in enumerate(cost.HEAD[1:]):
            values = [each[number] for each in cells]
            if any(value != ABSENT for value in values):
                rows.append((f"{row.what}: {name}", *values))
    return rows


def _print_costs(console: Console, comparison: Comparison) -> None:
    rows = cost_rows(comparison)
    if rows:
        console.print()
        _print_rows(console, "Costs", ("what", *comparison.labels), rows, right=True)


def _print_rows(
    console: Console,
    title: str,
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: bool = False,
    caption: str | None = None,
) -> None:
    print_table(console, _table(title, head, rows, right, caption))


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], right: bool, caption: str | None) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", caption=caption)
    for number, name in enumerate(head):
        table.add_column(Text(seen(name)), justify="right" if right and number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(seen(redact(cell))) for cell in row))
    return table
