"""What the benchmarks share: sides that take turns, medians of ratios, one form of table, one way to end.

A benchmark calls `alternate` on the sides it compares, puts medians into a `Table` and ends with `finish`. Nothing
heavy is imported here, so that a benchmark of start-up time may use it too.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

LIBRARIES = {
    "torch": "torch",
    "triton": "triton",
    "transformers": "transformers",
    "tokenizers": "tokenizers",
    "datasets": "datasets",
    "trl": "trl",
    "mamba_ssm": "mamba-ssm",
    "causal_conv1d": "causal-conv1d",
    "flash_attn": "flash-attn",
}
"""Modules that a header names when they are loaded, with the names of their distributions."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds what every timed benchmark takes: --output, --rounds, --threads."""
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds; medians are reported (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")


def alternate(sides: Mapping[str, Callable[[], object]], *, rounds: int = 5, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds per call of each side, one entry per round.

    The sides take turns within each round, so that what else the machine does meets all of them; every second round
    runs backwards, so that no side always follows the same one.

    Args:
        sides: what is timed, by name.
        rounds: timed calls of each side.
        warmup: untimed calls of each side before the first round.
    """
    if not sides or rounds < 1 or warmup < 0:
        raise ValueError(
            f"alternate: {len(sides)} sides, {rounds} rounds, {warmup} warm-up calls; it takes at least 1, 1, 0"
        )
    for side in sides.values():
        for _ in range(warmup):
            side()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in reversed(list(sides)) if turn % 2 else sides:
            start = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """Median over the rounds of slow / fast in the same round: how many times faster the second is."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


@dataclass
class Table:
    """A page with one table: what is measured, by which command, on what, and the rows."""

    title: str
    command: str
    """As a reader would type it."""
    columns: tuple[str, ...] | list[str]
    notes: str | list[str] | tuple[str, ...] = ()
    """Paragraphs above the table: sizes, what the sides are, what limits a result."""
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def add(self, *cells: object) -> None:
        """Appends a row.

        Raises:
            ValueError: not one cell per column.
        """
        if len(cells) != len(self.columns):
            raise ValueError(f"table {self.title!r} has {len(self.columns)} columns; the row {cells} has {len(cells)}")
        self.rows.append(tuple(map(str, cells)))

    def markdown(self) -> str:
        """The page; its second paragraph names command, date, hardware and versions."""
        lines = [f"# {self.title}", "", f"`{self.command}`, {datetime.date.today()}, {hardware()}. {versions()}."]
        for note in [self.notes] if isinstance(self.notes, str) else self.notes:
            lines += ["", note]
        lines += ["", _row(self.columns), "|" + "---|" * len(self.columns), *map(_row, self.rows)]
        return "\n".join(lines) + "\n"


def _row(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def hardware() -> str:
    """Processor, cores that this process may use, and where torch is loaded its threads and the GPUs it sees."""
    torch = sys.modules.get("torch")
    words = [processor(), f"{cores()} cores"]
    if torch is not None:
        words.append(f"{torch.get_num_threads()} threads of torch")
        if torch.cuda.is_available():
            names = [torch.cuda.get_device_name(device) for device in range(torch.cuda.device_count())]
            words += [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
    return ", ".join(words)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def processor() -> str:
    """Model name of the processor as Linux tells it, else the architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.machine()


def versions() -> str:
    """Python and the libraries that are loaded, with their versions."""
    found = [f"Python {platform.python_version()}"]
    for module, distribution in LIBRARIES.items():
        if module in sys.modules:
            # torch's own name for itself says which build it is
            version = getattr(sys.modules[module], "__version__", None) or metadata.version(distribution)
            found.append(f"{distribution} {version}")
    return ", ".join(found)


def finish(table: Table, output: Path | None, missed: list[str]) -> None:
    """Prints the table and writes it where asked.

    Raises:
        SystemExit: with 1 and the names of what was missed, if anything was.
    """
    page = table.markdown()
    print(page)
    if output is not None:
        output.write_text(page)
    if missed:
        raise SystemExit("missed: " + "; ".join(missed))
