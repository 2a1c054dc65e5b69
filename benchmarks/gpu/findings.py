"""What a section found, and the page and file that findings end up in."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from measure import Table


@dataclass(frozen=True)
class Finding:
    """One row of the table."""

    section: str
    what: str
    measured: str
    wanted: str = "–"
    met: bool | None = None
    """None where nothing was wanted or nothing could be judged"""
    numbers: dict[str, float] = field(default_factory=dict)
    """for the JSON file"""


def judged(
    section: str,
    what: str,
    value: float,
    shown: str,
    *,
    least: float | None = None,
    most: float | None = None,
    unit: str = "",
    smoke: bool,
    numbers: dict[str, float] | None = None,
) -> Finding:
    """A finding with the issue's goal beside it; a smoke run shows the goal and judges nothing."""
    assert (least is None) != (most is None)
    goal = least if least is not None else most
    met = value >= least if least is not None else value <= (most or 0)
    wanted = f"{'≥' if least is not None else '≤'} {goal:g}{unit}"
    return Finding(section, what, shown, wanted, None if smoke else met, {"value": value, **(numbers or {})})


def failed(section: str, what: str, error: Exception) -> Finding:
    """An error as a finding: the first line of its message."""
    text = (str(error).splitlines() or [""])[0]
    return Finding(section, what, f"failed: {type(error).__name__}: {text}", met=False)


STATES = {True: "yes", False: "**no**", None: "–"}


def page(findings: Iterable[Finding], *, smoke: bool, command: str, notes: list[str]) -> str:
    """The table as it is written beside the JSON file."""
    title = "GPU benchmarks, smoke run on the CPU at toy size" if smoke else "GPU benchmarks at the 1.5B configuration"
    if smoke:
        notes = [
            "**GPU numbers are not measured yet.** This run shows that every section works; its times say nothing.",
            *notes,
        ]
    table = Table(title, command, ("section", "what", "found", "wanted", "met"), notes)
    for one in findings:
        table.add(one.section, one.what, one.measured, one.wanted, STATES[one.met])
    return table.markdown()


def append(path: Path, finding: Finding) -> None:
    """Adds a finding to a file of JSON lines, so that a section that is stopped leaves what it found."""
    with path.open("a") as file:
        file.write(json.dumps(asdict(finding)) + "\n")


def read(path: Path) -> Iterator[Finding]:
    """The findings that `append` wrote; a line that was cut off in the middle is left out."""
    for line in path.read_text().splitlines(keepends=True) if path.is_file() else ():
        if line.endswith("\n"):
            values: dict[str, Any] = json.loads(line)
            yield Finding(**values)
