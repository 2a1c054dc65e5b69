"""One progress display for a whole run, of training and scoring alike.

On a terminal it is one line that stays in its place and fits the width. Everywhere else (a log file, a pipe, a notebook,
whose stream is no terminal either) it is a line every few percent, with the time in front and no control characters.

Where a step stands in its run travels in an environment variable (`Place`), because the processes that train or score are
often others than the one that planned.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm

VARIABLE = "HYMBA_ALIGN_PLACE"
LINES = 20
"""Of a step, where the output is no terminal"""
LONGEST_SILENCE_S = 600.0
"""Then there is a line all the same, at the next news"""
REDRAWN_AFTER_S = 0.1
BETWEEN_LINES_S = 1.0
"""Of counts in a log: answers come by the batch, and a line for each of one batch would fill it"""
SOON_S = 600.0
"""An end that is nearer is told by the time that is left, where there is no room for both"""
WIDTH = 80
"""Of a terminal that does not tell its own"""


# ---- where a step stands in its run ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Later:
    """What is known of a step that is still to come: text tokens that it trains on, or how long one like it took."""

    tokens: int | None = None
    seconds: float | None = None
    at_least: bool = False
    """Whether the step does more than that, as DPO does for its reference"""


@dataclass(frozen=True)
class Place:
    """A step's place in its run: its number from 1 among `of`, and the steps after it."""

    number: int = 1
    of: int = 1
    what: str = ""
    """The step in words, such as `score base`"""
    later: tuple[Later, ...] = ()

    def numbered(self, name: str) -> str:
        """`[2/5] SFT`; the name alone where it is the only step."""
        return f"[{self.number}/{self.of}] {name}" if self.of > 1 else name

    def seconds_after(self, tokens_per_second: float | None) -> tuple[float, bool]:
        """How long the later steps take, as far as that is known, and whether it is known of all.

        Training steps are taken to be as fast per token as the one that runs.
        """
        seconds, known = 0.0, True
        for step in self.later:
            known &= not step.at_least
            if step.seconds is not None:
                seconds += step.seconds
            elif step.tokens is not None and tokens_per_second:
                seconds += step.tokens / tokens_per_second
            else:
                known = False
        return seconds, known


@contextlib.contextmanager
def at(place: Place) -> Iterator[None]:
    """Within, this process and those that it starts show their progress as that of a step at this place."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = json.dumps(asdict(place))
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def current_place() -> Place:
    """The place that `at` set, in this process or the one that started it; that of an only step otherwise."""
    values = json.loads(os.environ.get(VARIABLE) or "{}")
    return Place(**{**values, "later": tuple(Later(**step) for step in values.get("later", ()))})


# ---- words -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Field:
    """A part of the line: in full, in short, and how early it goes where there is no room; 0 never goes."""

    long: str
    short: str
    goes: int = 0


def fitted(fields: Sequence[Field], width: int) -> str:
    """The fields in a line of at most `width` characters: in full, else in short, else without those that go first."""
    line = "  ".join(field.long for field in fields)
    kept = list(fields)
    while len(line) > width:
        line = "  ".join(field.short for field in kept)
        last = max(range(len(kept)), key=lambda place: kept[place].goes)
        if kept[last].goes == 0:
            break
        if len(line) > width:
            del kept[last]
    return line[:width]


def duration(seconds: float) -> str:
    """`0:07`, `12:40`, `1:02:03`, `2 d 03:00`."""
    whole = int(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def clock(moment: float, now: float) -> str:
    """The local time of a moment: `12:40`, `Tue 12:40` within a week, `24 Nov 12:40` later (seconds since 1970)."""
    then, today = datetime.fromtimestamp(moment), datetime.fromtimestamp(now)
    if then.date() == today.date():
        return f"{then:%H:%M}"
    return f"{then:%a %H:%M}" if (then.date() - today.date()).days < 7 else f"{then.day} {then:%b %H:%M}"


def ends(left_s: float, now: float, of: str = "", *, at_least: bool = False) -> Field:
    """When the step, or the run, ends: an estimate, or the earliest moment where not every step's length is known.

    Args:
        of: run; stage for a step that others come after; empty for one that stands alone.
    """
    when, left = clock(now + left_s, now), duration(left_s)
    long = f"{'run ' if of == 'run' else ''}ends {'after' if at_least else 'about'} {when} (in {left})"
    short = f"in {'over ' if at_least else '~'}{left}" if left_s < SOON_S else f"{'after ' if at_least else '~'}{when}"
    name = {"run": "all", "stage": "stage ends"}.get(of, "ends")
    return Field(long, f"{name} {short}", 3 if of == "run" else 2)


# ---- speed -----------------------------------------------------------------------------------------------------------


class Pace:
    """How long what is left takes, from what this session did. Its first unit does not count where there are more: it compiles.

    Units that are made side by side end side by side, so the first `together` of them tell nothing yet.
    """

    def __init__(self, done: int, together: int = 1) -> None:
        self.first = self.last = (done, time.monotonic())
        self._warm_at, self._is_warm = done + together, False

    def now_at(self, done: int) -> None:
        """Notes how many units are done now."""
        if done <= self.last[0]:
            return
        self.last = (done, time.monotonic())
        if not self._is_warm and done >= self._warm_at:
            self._cold, self._is_warm = self.first, True
            self.first = self.last

    def left_s(self, total: int) -> float | None:
        """Seconds until `total` units are done; None before the first (of those made together, all) are."""
        if not self._is_warm:
            return None
        first = self.first if self.last[0] > self.first[0] else self._cold
        per_unit = (self.last[1] - first[1]) / (self.last[0] - first[0])
        return max(0.0, per_unit * (total - self.last[0]) - (time.monotonic() - self.last[1]))


# ---- the display -----------------------------------------------------------------------------------------------------


class Display:
    """The progress of one step, of which `total` units make the whole.

    Args:
        name: of the step, such as SFT; its place in the run goes before it.
        unit: what is counted, in the plural; empty for training steps.
        together: how many units are made side by side.
        done: units that an earlier session did.
        stream: where it is shown; stderr by default.
        shown: whether it is shown at all; only one of several processes shows it.
        is_part: whether the step goes on after the whole, so that the run's end cannot be told from it.
        between_lines_s: the least time between two lines of counts in a log.
        passing: whether something else tells that the step ended: its line then goes with it on a terminal, and a log has one
            only after `between_lines_s`.
    """

    def __init__(
        self,
        name: str,
        total: int,
        *,
        unit: str = "",
        together: int = 1,
        done: int = 0,
        stream: TextIO | None = None,
        shown: bool = True,
        is_part: bool = False,
        between_lines_s: float = BETWEEN_LINES_S,
        passing: bool = False,
    ) -> None:
        self.place = current_place()
        self.name, self.total, self.unit, self.done = self.place.numbered(name), total, unit, done
        self.stream: TextIO = stream if stream is not None else sys.stderr
        self.shown, self.is_part, self.news, self.tokens_per_second = shown, is_part, (), None
        self._pace, self._began, self._between_lines_s = Pace(done, together), time.monotonic(), between_lines_s
        self._next_line, self._last_shown = float(done), 0.0
        self._passing, self._bar = passing, None
        if shown and is_terminal(self.stream):
            self._bar = tqdm(total=total, bar_format="{desc}", file=self.stream, leave=not passing, disable=False)
            self._draw()

    news: tuple[Field, ...]
    """Fields after the count"""
    tokens_per_second: float | None
    _bar: Any

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def advance(self, done: int) -> None:
        """So many units are done."""
        self.done = done
        self._pace.now_at(done)
        if time.monotonic() - self._last_shown >= REDRAWN_AFTER_S:
            self._draw()

    def tell(self, *news: Field, tokens_per_second: float | None = None) -> None:
        """News of the step, which stay in the line; where that is no terminal, a line if one is due."""
        self.news = news
        self.tokens_per_second = tokens_per_second or self.tokens_per_second
        if self._bar is not None:
            self._draw()
        elif self.shown and self._line_is_due():
            self._next_line = self.done + self.total / LINES
            self._last_shown = time.monotonic()
            self.say("  ".join(field.long for field in self.fields()))

    def _line_is_due(self) -> bool:
        silent_s = time.monotonic() - max(self._last_shown, self._began if self._passing else 0.0)
        is_last = self.done >= self.total and not self._passing
        in_a_burst = bool(self.unit) and silent_s < self._between_lines_s and not is_last
        return silent_s >= LONGEST_SILENCE_S or (self.done >= min(self._next_line, self.total) and not in_a_burst)

    def redraw(self, *news: Field) -> None:
        """As `tell`, where the line is drawn in its place; nothing elsewhere."""
        self.news = news
        if time.monotonic() - self._last_shown >= REDRAWN_AFTER_S:
            self._draw()

    def say(self, text: str) -> None:
        """A line above the display, with the time in front where it goes into a log."""
        if self.shown:
            stamp = "" if self._bar is not None else f"{datetime.now():%Y-%m-%d %H:%M:%S}  "
            say(f"{stamp}{text}", self.stream)

    def close(self) -> None:
        """Leaves the last line where it is."""
        if self._bar is not None:
            self._draw()
            self._bar.close()
            self._bar = None

    def fields(self) -> list[Field]:
        """The line in parts: name and count, news, tokens per second, time, estimated ends."""
        elapsed, count = duration(time.monotonic() - self._began), f"{self.done}/{self.total}"
        percent = f" ({100 * self.done / max(self.total, 1):.0f} %)"
        unit = f" {self.unit}" if self.unit else ""
        words = "" if self.unit else "step "
        name = self.name.replace("[", "").replace("]", "")
        fields = [Field(f"{self.name}  {words}{count}{unit}{percent}", f"{name} {count}{unit}"), *self.news]
        if self.tokens_per_second is not None:
            speed = f"{self.tokens_per_second:,.0f}"
            fields.append(Field(f"{speed} tokens/s", f"{speed} tok/s", 4))
        return [*fields, Field(f"elapsed {elapsed}", elapsed, 6), *self._ends()]

    def _ends(self) -> list[Field]:
        left_s, now = self._pace.left_s(self.total), time.time()
        if left_s is None or self.done >= self.total:
            return []
        if not self.place.later or self.is_part:
            return [ends(left_s, now)]
        # What is counted in other units, such as answers, makes its tokens at another rate than training reads them.
        after_s, known = self.place.seconds_after(None if self.unit else self.tokens_per_second)
        return [ends(left_s, now, "stage"), ends(left_s + after_s, now, "run", at_least=not known)]

    def _draw(self) -> None:
        if self._bar is not None:
            self._last_shown = time.monotonic()
            self._bar.set_description_str(fitted(self.fields(), terminal_width(self.stream) - 1))


def say(text: str, stream: TextIO | None = None) -> None:
    """Prints a line, on stderr by default; one that is above the display where there is one."""
    stream = stream if stream is not None else sys.stderr
    with tqdm.external_write_mode(file=stream):
        for line in _wrapped(text, stream) if is_terminal(stream) else [text]:
            print(line, file=stream, flush=True)


def _wrapped(text: str, stream: TextIO) -> list[str]:
    """The text in lines that fit the terminal, broken at words."""
    from rich.console import Console
    from rich.text import Text

    from hymba_align.terminal import wrapped

    console = Console(file=stream, width=terminal_width(stream), color_system=None)
    return [part.plain.rstrip() for line in text.split("\n") for part in wrapped(console, Text(line))]


def is_terminal(stream: TextIO) -> bool:
    """Whether lines on the stream can be drawn again in their place. A notebook's stream says no."""
    return stream.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("TQDM_DISABLE")


def terminal_width(stream: TextIO) -> int:
    """Columns of the terminal behind a stream; `COLUMNS` counts first."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns) > 0:
        return int(columns)
    try:
        return os.get_terminal_size(stream.fileno()).columns or WIDTH
    except (OSError, ValueError):  # no descriptor, or nobody knows
        return WIDTH


def counting(display: Display, tokens: Callable[[], int]) -> Callable[[], None]:
    """What to call after each unit that ended: it advances the display, with tokens per second of all so far."""
    began = time.monotonic()

    def ended() -> None:
        display.advance(display.done + 1)
        seconds = time.monotonic() - began
        display.tell(tokens_per_second=tokens() / seconds if seconds > 0 and tokens() else None)

    return ended
