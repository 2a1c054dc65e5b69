"""Copies the committed tables into docs/performance.md: python benchmarks/collect.py."""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
DOCUMENT = FOLDER.parent / "docs" / "performance.md"
MARK = "<!-- tables -->"
TABLES = (
    "scan_cpu",
    "sft_step",
    "exact_packing",
    "sft_memory",
    "row_length",
    "dpo_step",
    "shared_shots",
    "generation",
    "eval",
    "cache_bytes",
    "startup",
)
"""In the order in which the document shows them."""


def collected(document: str) -> str:
    """The document with the tables as they are now between its two marks, which are made of one the first time."""
    before, *_, after = document.split(MARK)
    parts = [section(name) for name in TABLES if (FOLDER / f"{name}.md").is_file()]
    return f"{before}{MARK}\n\n" + "\n".join(parts) + f"\n{MARK}{after}"


def section(name: str) -> str:
    """Heading, source and the tables of a page, without its notes."""
    page = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
    title = page.splitlines()[0].removeprefix("# ")
    tables = re.findall(r"(?:^\|.*\n)+", page, flags=re.MULTILINE)
    return f"### {title}\n\n[benchmarks/{name}.md](../benchmarks/{name}.md)\n\n" + "\n".join(tables)


if __name__ == "__main__":
    DOCUMENT.write_text(collected(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
