"""What is printed: in narrow terminals, in files, without colours, where there is no UTF-8."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hymba_align.terminal import open_console, print_rule, print_table, print_words

SETTINGS = ("COLUMNS", "NO_COLOR", "FORCE_COLOR", "TERM")
LONG = "runs/a-name/" + "sub/" * 40 + "model.safetensors"

Printed = Callable[[int], str]


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> Printed:
    """What a table comes to on a terminal of so many columns; 0: in a file."""

    def on(columns: int) -> str:
        from rich.table import Table
        from rich.text import Text

        stream = Terminal() if columns else io.StringIO()
        monkeypatch.setattr(sys, "stdout", stream)
        if columns:
            monkeypatch.setenv("COLUMNS", str(columns))
        table = Table(title="Plan", caption="of two steps")
        for name in ("step", "data", "state"):
            table.add_column(name)
        table.add_row("sft", "short", Text("first\nsecond"))
        table.add_row("dpo", LONG, "")
        print_table(open_console(), table)
        return stream.getvalue()

    return on


def test_in_a_file_no_line_is_broken_and_nothing_is_coloured(printed: Printed) -> None:
    out = printed(0)

    assert f"│ dpo  │ {LONG} │" in out
    assert "\x1b" not in out


def test_a_table_that_is_too_wide_is_a_list(printed: Printed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")  # so that it is text alone

    lines = printed(50).splitlines()

    assert lines[:4] == [
        "Plan",
        "sft",
        f"{'  data   short':<{len(lines[2])}}",
        f"{'  state  first second':<{len(lines[3])}}",
    ]
    assert "│" not in "".join(lines)
    assert lines[-1].strip() == "of two steps"
    assert max(map(len, lines)) <= 50
    assert LONG in "".join(line.removeprefix("  data   ").strip() for line in lines[5:-1])


def test_a_table_that_fits_stays_one(printed: Printed) -> None:
    assert "│ dpo" in printed(400)


def test_columns_says_how_wide_a_file_is(printed: Printed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")

    assert max(map(len, printed(0).splitlines())) <= 60


def test_no_color_takes_the_colours_away(printed: Printed, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.text import Text

    def shown() -> str:
        stream = Terminal()
        monkeypatch.setattr(sys, "stdout", stream)
        open_console().print(Text("red", style="red"))
        return stream.getvalue()

    monkeypatch.setenv("TERM", "xterm")
    coloured = shown()
    monkeypatch.setenv("NO_COLOR", "1")

    assert coloured == "\x1b[31mred\x1b[0m\n"
    assert shown() == "red\n"


def test_force_color_colours_a_file_and_still_breaks_no_line(printed: Printed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")

    out = printed(0)

    assert "\x1b[1m" in out
    assert LONG in out


def test_a_dumb_terminal_is_as_wide_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    leader, follower = pty.openpty()
    with os.fdopen(leader, "rb", buffering=0), os.fdopen(follower, "w") as stream:
        import fcntl
        import struct
        import termios

        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 50, 0, 0))
        monkeypatch.setattr(sys, "stdout", stream)
        assert open_console().width == 50


def test_a_rule_is_no_longer_than_a_line_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", stream := io.StringIO())

    print_rule(open_console())

    assert stream.getvalue() == "─" * 80 + "\n"


def test_running_text_breaks_at_words_and_leaves_a_path_whole(
    printed: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = f"left out\n  1 lost (the conversation has no messages, first {LONG}) and more"

    def shown(stream: io.StringIO) -> list[str]:
        monkeypatch.setattr(sys, "stdout", stream)
        print_words(words)
        return [line.rstrip() for line in stream.getvalue().splitlines()]

    in_a_file = shown(io.StringIO())
    monkeypatch.setenv("COLUMNS", "30")

    assert shown(Terminal()) == [
        "left out",
        "  1 lost (the conversation has",
        "  no messages, first",
        f"  {LONG})",
        "  and more",
    ]
    assert in_a_file == words.splitlines()


def test_where_there_is_no_utf_8_commands_print_what_they_can(tmp_path: Path) -> None:
    (tmp_path / "sft").mkdir()
    (tmp_path / "recipe.yaml").write_text("name: demo\nbase: {model: naïve}\nsft: {trainer: {}}\n", encoding="utf-8")
    records = "".join(f'{{"step": {step}, "loss": {9 - step}}}\n' for step in range(1, 8))
    (tmp_path / "sft" / "metrics.jsonl").write_text(records)
    command = [sys.executable, "-m", "hymba_align", "show", str(tmp_path)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}

    done = subprocess.run(command, capture_output=True, timeout=60, check=False, env=environment)

    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.isascii()
    assert b"base: na?ve\n" in done.stdout
    assert b"###" in done.stdout
