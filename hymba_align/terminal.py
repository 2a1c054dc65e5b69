"""Where commands print: consoles that suit a terminal of any width and a log file, and tables that become lists.

NO_COLOR, FORCE_COLOR, TERM=dumb and COLUMNS are rich's; what it leaves out is here. A file has no width: rich takes 80
columns for it, and would break paths there.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

FILE_WIDTH = 1000
"""Columns of a file, so that no line in it is broken"""
RULE_WIDTH = 80
ROWS = 25  # which rich wants to know where it is told the columns


def open_console(*, stderr: bool = False, soft_wrap: bool = False, quiet: bool = False) -> Console:
    """Writes to stdout (or stderr), as wide as the terminal; to a file in whole lines, unless COLUMNS says how wide.

    Args:
        soft_wrap: leave the breaking of lines to the terminal, so that a path that is copied there stays whole.
    """
    from rich.console import Console, ConsoleDimensions

    stream = sys.stderr if stderr else sys.stdout
    made = Console(stderr=stderr, highlight=False, soft_wrap=soft_wrap, quiet=quiet)
    columns = _columns(stream, made)
    if columns is not None:
        made.size = ConsoleDimensions(columns, ROWS)
    return made


def _columns(stream: TextIO, console: Console) -> int | None:
    """How wide a console is, where rich would not know: in files, and on dumb terminals, for which it takes 80 columns."""
    if console.is_jupyter:
        return None
    said = os.environ.get("COLUMNS", "")
    if said.isdigit() and int(said) > 0:
        return int(said)
    if not stream.isatty():
        return FILE_WIDTH
    if not console.is_dumb_terminal:
        return None
    try:
        return os.get_terminal_size(stream.fileno()).columns or None
    except OSError:
        return None


def speaks_utf8(console: Console) -> bool:
    """Whether what it writes to takes every character."""
    return console.encoding.lower().replace("-", "").startswith("utf")


def print_table(console: Console, table: Table) -> None:
    """The table where the console is wide enough for its longest cells, else a list: a paragraph for each row."""
    if fits(console, table):
        console.print(table, soft_wrap=False)
    else:
        _print_list(console, table)


def fits(console: Console, table: Table) -> bool:
    """Whether the console is wide enough for the longest cells of a table."""
    from rich.measure import Measurement

    wide = console.options.update(max_width=FILE_WIDTH)
    return Measurement.get(console, wide, table).maximum <= console.width


def print_text(console: Console, text: Text | str, style: str = "") -> None:
    """Running text: broken at words on a terminal, going on at its own indent; whole in a file.

    A word that is longer than the line, such as a path, is left to the terminal, from which it is copied whole.
    """
    from rich.text import Text

    for line in (text if isinstance(text, Text) else Text(text, style=style)).split(allow_blank=True):
        for part in wrapped(console, line) if console.is_terminal else [line]:
            console.print(part, soft_wrap=True)


def wrapped(console: Console, line: Text) -> list[Text]:
    """A line in parts that fit the console, broken at spaces, each with the line's own indent."""
    indent = len(line.plain) - len(line.plain.lstrip(" "))
    rest = line[indent:]
    # Asked of the text and not of `wrap`, this leaves long words whole, and breaks at spaces all the same.
    rest.overflow = "ignore"
    return [line[:indent] + part for part in rest.wrap(console, max(console.width - indent, 1))]


def print_words(words: str, *, stderr: bool = False) -> None:
    """Prints running text, as `print_text`, where there is no console."""
    print_text(open_console(stderr=stderr), words)


def _print_list(console: Console, table: Table) -> None:
    """Each row as its first cell, with every other cell that is not empty below, behind its column's name.

    A single row has no name of its own, so all its cells are below the title.
    """
    from rich.table import Table
    from rich.text import Text

    if table.title:
        console.print(_text(table.title), style="italic", soft_wrap=True)
    names = [_one_line(column.header) for column in table.columns]
    cells = [[_one_line(cell) for cell in column.cells] for column in table.columns]
    first = 0 if table.row_count == 1 and table.title else 1
    for row in zip(*cells, strict=True):
        if first:
            console.print(Text(row[0].plain, style="bold"), soft_wrap=True)
        inside = Table.grid(padding=(0, 2, 0, 0))
        inside.add_column(style="dim", no_wrap=True)
        inside.add_column(overflow="fold")
        for name, cell in zip(names[first:], row[first:], strict=True):
            if cell.plain:
                inside.add_row(Text("  ") + name, cell)
        if inside.row_count:
            console.print(inside, soft_wrap=False)
    if table.caption:
        console.print(_text(table.caption), style="dim", soft_wrap=False)


def _one_line(cell: object) -> Text:
    text = _text(cell)
    return text if "\n" not in text.plain else type(text)(" ").join(text.split("\n"))


def _text(cell: object) -> Text:
    from rich.text import Text

    return cell if isinstance(cell, Text) else Text.from_markup(str(cell))


def print_rule(console: Console) -> None:
    """A line across the terminal, or of `RULE_WIDTH` in a file."""
    console.print("─" * min(console.width, RULE_WIDTH), style="dim", soft_wrap=False)
