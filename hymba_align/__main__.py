"""`python -m hymba_align`, which is how launchers start the command line."""

from __future__ import annotations

from hymba_align.cli import entry_point

if __name__ == "__main__":
    entry_point()
