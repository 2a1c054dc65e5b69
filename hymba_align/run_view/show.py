"""A run in the terminal: states, settings, data, curves, scores, what is inside, costs, checkpoints, what to do next."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hymba_align.eval.report import cost, training
from hymba_align.eval.report.contents import STAGE_NAMES
from hymba_align.eval.report.terminal import run_table
from hymba_align.eval.report.words import seen
from hymba_align.run_view.curves import draw
from hymba_align.run_view.view import CURVES, RunView, view_run
from hymba_align.secrets import redact
from hymba_align.terminal import open_console, print_table, print_text, speaks_utf8

if TYPE_CHECKING:
    from rich.console import Console

EVERY_S = 2.0
STYLES = {"done": "green", "running": "bold cyan", "interrupted": "yellow", "to do": "dim", "damaged": "bold red"}
FACTS = (
    "loss at the end",
    "token accuracy at the end",
    "pairs preferred rightly at the end",
    "reward margin at the end",
)


def print_view(view: RunView, console: Console) -> None:
    """Prints everything there is to show of a run."""
    _print_states(view, console)
    for problem in view.problems:
        _print(console, f"Problem: {problem}", style="yellow")
    _print_pairs(console, "Settings", view.settings)
    _print_below(console, "Data", list(_data(view)))
    for stage, curves in view.curves.items():
        _print_training(view, stage, console)
        for key, name in CURVES:
            if len(curves.get(key, ())) > 1:
                console.print()
                _print(console, f"{stage.upper()}: {name}", style="dim")
                for line in draw(curves[key], width=console.width, utf8=speaks_utf8(console)):
                    console.print(line, markup=False)
    if view.run.scored:
        console.print()
        print_table(console, run_table(view.run))
    _print_inside(view, console)
    _print_costs(view, console)
    _print_paths(view, console)


def _print_states(view: RunView, console: Console) -> None:
    from rich.text import Text

    _print(console, f"{view.run.name}, in {view.run.root}", style="bold")
    if view.holder is not None:
        _print(console, f"In use by {view.holder.words}", style="cyan")
    longest = max((len(step.title) for step in view.steps), default=0)
    for step in view.steps:
        state = Text(f"{step.state:<11}", style=STYLES[step.state])
        detail = "" if step.state == "damaged" else seen(redact(step.detail))  # which is among the problems
        words = Text.assemble(f"  {step.title:<{longest}}  ", state, f"  {detail}")
        words.rstrip()
        print_text(console, words)


def _data(view: RunView) -> Iterator[str]:
    """A stage's data in a line for each of its sources, and one for each reason why rows of it are left out."""
    for stage, record in view.run.data.items():
        for source, cells in zip(record.get("sources", ()), training.source_rows(stage, record), strict=True):
            _, name, rows, kept, conversations, tokens, trained, _ = cells
            unit = "conversations" if stage == "sft" else "pairs"
            told = f"{kept} of {rows} rows, {conversations} {unit}, {tokens} tokens, {trained} of them trained on"
            yield f"{stage.upper()} {name}: {told}"
            yield from (f"  left out: {reason}" for reason in training.left_out(source))


def _print_training(view: RunView, stage: str, console: Console) -> None:
    facts = training.facts(view.run.section(stage), view.run.metrics[stage])
    shown = {name: value for name, value in facts if name in FACTS or name.startswith("validation")}
    rate = cost.of_training(view.run.metrics[stage]).tokens_per_second
    if rate:
        shown["tokens per second"] = f"{rate:,.0f}"
    _print_pairs(console, f"Training, {stage.upper()}", shown)
    for step, warning in training.log(view.run.metrics[stage]):
        _print(console, f"  step {step:,}: {warning}", style="yellow")


def _print_inside(view: RunView, console: Console) -> None:
    """The most telling of each inspection, and where all of it is."""
    for found in view.run.inspected:
        console.print()
        _print(console, f"Inside, {STAGE_NAMES[found.stage]}", style="bold")
        for text, sign in found.findings:
            _print(console, f"  {'Sign: ' if sign else ''}{text}", style="yellow" if sign else "")
        _print_whole(console, f"  {view.run.root / found.page}")


def _print_costs(view: RunView, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    rows = cost.rows(view.run)
    if not rows:
        return
    table = Table(title="Costs", title_justify="left")
    for number, name in enumerate(cost.HEAD):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print()
    print_table(console, table)


def _print_paths(view: RunView, console: Console) -> None:
    if view.checkpoints:
        console.print()
        console.print("Checkpoints", style="bold")
        for path in view.checkpoints:
            _print_whole(console, f"  {path}")
    if view.next:
        console.print()
        console.print("Next", style="bold")
        for what, command in view.next:
            line = f"  {what}: {command}"
            for part in [line] if len(line) <= console.width else [f"  {what}:", f"    {command}"]:
                _print_whole(console, part)


def _print_pairs(console: Console, title: str, pairs: Mapping[str, str]) -> None:
    """A title, and below it a name and its value in every line."""
    _print_below(console, title, [f"{name}: {value}" for name, value in pairs.items()])


def _print_below(console: Console, title: str, lines: Sequence[str]) -> None:
    """A title and the lines below it; nothing where there is none."""
    if not lines:
        return
    console.print()
    console.print(title, style="bold", markup=False)
    for line in lines:
        _print(console, f"  {line}")


def _print(console: Console, line: str, style: str = "") -> None:
    """A line of words, without secrets or characters that act."""
    from rich.text import Text

    print_text(console, Text(seen(redact(line)), style=style))


def _print_whole(console: Console, line: str) -> None:
    """A line that is copied from the terminal, which breaks it by itself."""
    console.print(seen(redact(line)), markup=False, soft_wrap=True)


def follow(root: Path, console: Console) -> RunView:
    """The view of a run when nobody works at it any more; shown again every `EVERY_S` on a terminal, else a line per change."""
    told: list[str] = []
    while True:
        view = view_run(root)
        if console.is_terminal and not console.is_dumb_terminal:
            console.clear()
            print_view(view, console)
        else:
            told = _tell_changes(view, told, console)
        if not view.is_running:
            return view
        time.sleep(EVERY_S)


def _tell_changes(view: RunView, told: list[str], console: Console) -> list[str]:
    """Prints the lines about steps that are not among those that were told; all of them."""
    lines = list(_lines(view))
    for line in lines:
        if line not in told:
            _print(console, line)
    return lines


def _lines(view: RunView) -> Iterable[str]:
    for step in view.steps:
        at = f"{step.title}: {step.state}"
        yield f"{at}, step {step.step:,} of {step.max_steps:,}" if step.step and step.max_steps else at


def show_run(root: Path, *, follows: bool = False) -> RunView:
    """The run's view, after printing it."""
    console = open_console()
    if follows:
        view = follow(root, console)
        if not console.is_terminal:
            print_view(view, console)
        return view
    view = view_run(root)
    print_view(view, console)
    return view
