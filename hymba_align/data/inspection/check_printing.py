"""A check's report drawn for a terminal. Texts of the data are shown with their control characters made visible."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from hymba_align.data.counts import name_files
from hymba_align.data.inspection.preview import visible
from hymba_align.terminal import FILE_WIDTH, fits, print_table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from hymba_align.data.inspection.findings import CheckReport, Finding, SourceReport

PLACES_SHOWN = 3
FIXES_SHOWN = 10  # of one kind
INDENT = 2
COLUMN_GAP, EDGES = 3, 2
LEAST_NAME = 16  # columns for a source's name
OPTIONS = {  # what the command line has for a benchmark that is not at hand
    "GSM8K": "name GSM8K's test.jsonl with --gsm8k",
    "GPQA": "get dataset.zip from github.com/idavidrein/gpqa and name it with --gpqa",
}


def print_report(
    report: CheckReport,
    packing: Sequence[str],
    console: Console,
    name: str,
    notes: Sequence[str] = (),
    *,
    comparisons: bool = True,
) -> None:
    """Prints one stage's report: counts, lengths, findings by kind, what was not compared, packing, and the verdict.

    Args:
        notes: sentences on what the report is about, which stand first.
        comparisons: False where `print_comparisons` follows, once for several stages.
    """
    from rich.text import Text

    title = "supervised fine-tuning (SFT)" if report.stage == "sft" else "preferences (DPO)"
    console.print(Text(visible(f"{name}: {title}"), style="bold"))
    for note in notes:
        _print(console, note, style="yellow")
    sources = _sources_table(report, console.width)
    print_table(console, sources if fits(console, sources) else _sources_table(report, FILE_WIDTH))
    for fact in _facts(report):
        _print(console, fact)
    if report.lengths is not None and report.lengths.percentiles:
        print_table(console, _lengths_table(report))
    for kind, count in report.counts.items():
        console.print()
        found = report.of_kind(kind)
        style = "bold red" if set(found) & set(report.refused) else "bold yellow"
        console.print(Text(f"{kind}: {count:,}", style=style))
        for line, indent, line_style in _finding_lines(found):
            _print(console, line, indent, line_style)
    if comparisons and (report.compared or report.not_compared):
        console.print()
        print_comparisons(report, console)
    if packing:
        console.print()
        console.print(Text("Packing", style="bold"))
        for line in packing:
            _print(console, line)
    console.print()
    _print(console, verdict(report), style="bold green" if report.allowed else "bold red")


def print_comparisons(report: CheckReport, console: Console) -> None:
    """Prints which test sets the rows were compared with, and which were not at hand."""
    for benchmark in report.compared:
        short = f" ({benchmark.too_short:,} of them are too short for it)" if benchmark.too_short else ""
        _print(console, f"Compared with {benchmark.name}: {benchmark.items:,} test items{short}")
    for missing in report.not_compared:
        fix = OPTIONS.get(missing.name, missing.fix)
        _print(console, f"Not compared with {missing.name}: {missing.reason}; {fix}", style="yellow")


def verdict(report: CheckReport) -> str:
    """Whether training would run on this data, and which findings it would pass over."""
    harmless = {kind: sum(not one.loses_row for one in report.of_kind(kind)) for kind in report.counts}
    passed = ", ".join(f"{kind} {count:,}" for kind, count in harmless.items() if count)
    return f"{report.stage.upper()}: {report.verdict()}" + (f" (not stopped by {passed})" if passed else "")


def _sources_table(report: CheckReport, width: int) -> Table:
    from rich.text import Text

    columns = ("rows", "lost", "pairs" if report.stage == "dpo" else "conversations", "turns", "tokens", "trained")
    numbers = [_numbers(source) for source in report.sources]
    widest = [max(map(len, column)) for column in zip(columns, *numbers, strict=True)]
    room = max(LEAST_NAME, width - sum(widest) - COLUMN_GAP * len(columns) - EDGES)
    table = _table()
    table.add_column("source", overflow="fold", min_width=LEAST_NAME)
    for column in columns:
        table.add_column(column, justify="right")
    for source, (rows, lost, *others) in zip(report.sources, numbers, strict=True):
        name = shorten_path(visible(source.name), room)
        schema = f"\n{visible(source.schema)}".rstrip("\n")
        table.add_row(
            Text.assemble(name, (schema, "dim")), rows, Text(lost, style="red" if lost != "0" else ""), *others
        )
    return table


def _numbers(source: SourceReport) -> list[str]:
    return [
        f"{source.rows:,}",
        f"{_lost(source):,}",
        f"{source.conversations:,}{f' x {source.repeat}' if source.repeat > 1 else ''}",
        f"{sum(source.turns.values()):,}",
        f"{source.total_tokens:,}",
        f"{100 * source.trained_tokens / source.total_tokens:.1f} %" if source.total_tokens else "",
    ]


def shorten_path(path: str, width: int) -> str:
    """A path in at most so many columns: its end, by whole folders as far as they fit."""
    from rich.cells import cell_len, chop_cells

    if cell_len(path) <= width:
        return path
    parts = path.split("/")
    for start in range(1, len(parts)):
        end = "/".join(["…", *parts[start:]])
        if cell_len(end) <= width:
            return end
    return f"…{chop_cells(path[::-1], width - 1)[0][::-1]}"


def _table(title: str | None = None) -> Table:
    from rich import box
    from rich.table import Table

    return Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD, pad_edge=False)


def _lost(source: SourceReport) -> int:
    return source.rows - source.rows_kept - source.rows_not_chosen - source.rows_passed_over


def _facts(report: CheckReport) -> Iterator[str]:
    for source in report.sources:
        if source.rows_not_chosen:
            yield f"{source.name}: {source.rows_not_chosen:,} rows were not chosen by keep_fraction"
        if source.rows_passed_over:
            yield f"{source.name}: {source.rows_passed_over:,} rows were passed over by the converter"
        if source.ignored_columns:
            yield f"{source.name}: columns not used: {', '.join(source.ignored_columns)}"
        if source.unread_keys:
            yield f"{source.name}: keys of turns not used: {', '.join(source.unread_keys)}"
        if source.passed_over:
            yield f"{source.name}: files passed over: {name_files(source.passed_over)}"
    if report.trained_share is not None and len(report.sources) > 1:
        yield f"Together, {100 * report.trained_share:.1f} % of the tokens are trained on"
    if report.validation_conversations:
        yield f"{report.validation_conversations:,} conversations are kept for validation"
    if report.short_rows:
        rows = "1 row is" if report.short_rows == 1 else f"{report.short_rows:,} rows are"
        yield f"{rows} too short to be searched for near duplicates"
    if report.lengths is not None and report.lengths.uncounted:
        yield f"{report.lengths.uncounted:,} rows are so much longer than max_length that their tokens were not counted"


def _lengths_table(report: CheckReport) -> Table:
    assert report.lengths is not None, "the caller has looked"
    table = _table(f"Tokens per row (max_length {report.max_length:,})")
    for percent in report.lengths.percentiles:
        table.add_column("longest" if percent == 100 else f"{percent} %", justify="right")
    table.add_row(*(f"{tokens:,}" for tokens in report.lengths.percentiles.values()))
    return table


def _finding_lines(found: Sequence[Finding]) -> Iterator[tuple[str, int, str]]:
    """Lines with indent and style: of each fix the first few places, then the fix once."""
    by_fix: dict[str, list[Finding]] = {}
    for finding in found:
        by_fix.setdefault(finding.fix, []).append(finding)
    groups = sorted(by_fix.items(), key=lambda group: -len(group[1]))
    for fix, group in groups[:FIXES_SHOWN]:
        for finding in group[:PLACES_SHOWN]:
            yield f"{finding.place}: {finding.message}", INDENT, ""
        if len(group) > PLACES_SHOWN:
            yield f"and {len(group) - PLACES_SHOWN:,} more", INDENT, "dim"
        yield f"-> {fix}", 2 * INDENT, ""
    rest = sum(len(group) for _, group in groups[FIXES_SHOWN:])
    if rest:
        yield f"and {rest:,} of other sorts; --output FILE writes all", INDENT, "dim"


def _print(console: Console, line: str, indent: int = 0, style: str = "") -> None:
    """One line; on a terminal it is broken at words, and goes on at its indent."""
    from rich.padding import Padding
    from rich.text import Text

    text = Text(visible(line), style=style)
    if console.is_terminal:
        console.print(Padding(text, (0, 0, 0, indent)))
    else:
        console.print(Text(" " * indent) + text, soft_wrap=True)
