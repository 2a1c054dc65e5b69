"""The one display of a run: on a terminal, in a log file, in a notebook."""

from __future__ import annotations

import io
import os
import re
import time
from typing import Any

import pytest

from hymba_align import progress
from hymba_align.progress import Display, Field, Later, Pace, Place, at, clock, current_place, duration, fitted

NOW = time.mktime((2026, 11, 24, 12, 0, 0, 0, 0, -1))  # a Tuesday


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class NotebookStream(io.StringIO):
    """As ipykernel's OutStream: no terminal, and without a descriptor of its own."""

    def fileno(self) -> int:
        raise io.UnsupportedOperation("fileno")


@pytest.fixture
def clock_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A clock that tests move; the display sees no other."""
    passed = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: passed[0])
    monkeypatch.setattr(progress.time, "time", lambda: NOW + passed[0])
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.delenv("TERM", raising=False)
    monkeypatch.delenv(progress.VARIABLE, raising=False)
    return lambda seconds: passed.__setitem__(0, passed[0] + seconds)


def train(display: Display, move: Any, steps: int, *, seconds: float = 2.0) -> None:
    """So many steps, each with news."""
    for step in range(display.done + 1, display.done + steps + 1):
        move(seconds)
        display.advance(step)
        news = (Field("loss 0.4312", "loss 0.431", 1), Field("lr 4.9e-05", "lr 5e-05", 5))
        display.tell(*news, tokens_per_second=1234.4)


def text_on_screen(written: str) -> list[str]:
    """What a terminal shows: a carriage return goes back to the beginning of the line."""
    lines = []
    for line in written.split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


# ---- the line --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (
            200,
            "[2/5] SFT  step 40/400 (10 %)  loss 0.4312  lr 4.9e-05  1,234 tokens/s  elapsed 1:20  "
            "ends about 12:13 (in 12:00)  run ends about 12:30 (in 28:40)",
        ),
        (80, "2/5 SFT 40/400  loss 0.431  1,234 tok/s  stage ends ~12:13  all ~12:30"),
        (50, "2/5 SFT 40/400  loss 0.431  stage ends ~12:13"),
        (20, "2/5 SFT 40/400"),
    ],
)
def test_a_terminal_of_any_width_has_one_line_that_keeps_what_matters_most(
    clock_of: Any, monkeypatch: pytest.MonkeyPatch, width: int, line: str
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    terminal = Terminal()
    with at(Place(2, 5, later=(Later(seconds=1000.0),))):
        display = Display("SFT", 400, stream=terminal)
    train(display, clock_of, 40)

    written = terminal.getvalue()

    assert text_on_screen(written) == [line]
    assert max(map(len, re.split("[\r\n]", written))) < width
    display.close()
    assert text_on_screen(terminal.getvalue()) == [line, ""]


def test_a_line_that_fits_stays_in_full_and_nothing_goes_that_must_not() -> None:
    fields = [Field("step 40 of 400", "40/400"), Field("loss 0.4312", "l 0.43", 1), Field("elapsed 1:20", "1:20", 2)]
    assert fitted(fields, 41) == "step 40 of 400  loss 0.4312  elapsed 1:20"
    assert fitted(fields, 40) == "40/400  l 0.43  1:20"
    assert fitted(fields, 19) == "40/400  l 0.43"
    assert fitted(fields, 6) == "40/400"
    assert fitted(fields, 4) == "40/4"


def test_on_a_terminal_what_is_said_meanwhile_stands_above_the_line(
    clock_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    terminal = Terminal()
    with Display("SFT", 4, stream=terminal) as display:
        train(display, clock_of, 2)
        display.say("SFT  step 2/4  validation loss 0.5000")
        progress.say("sft: the loss spiked", terminal)
        train(display, clock_of, 2)

    shown = text_on_screen(terminal.getvalue())
    assert shown[:2] == ["SFT  step 2/4  validation loss 0.5000", "sft: the loss spiked"]
    assert shown[2:] == ["SFT  step 4/4 (100 %)  loss 0.4312  lr 4.9e-05  1,234 tokens/s  elapsed 0:08", ""]


def test_the_line_is_not_drawn_more_often_than_ten_times_a_second(
    clock_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    terminal = Terminal()
    display = Display("SFT", 1000, stream=terminal)
    for step in range(1, 1001):
        clock_of(0.001)
        display.advance(step)
    drawn = terminal.getvalue().count("\r")
    display.close()
    assert 5 < drawn < 30


# ---- log files and notebooks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [io.StringIO, NotebookStream])
def test_elsewhere_there_is_a_whole_line_every_few_percent_and_no_control_character(
    clock_of: Any, stream: type[io.StringIO]
) -> None:
    log = stream()
    with at(Place(2, 5, later=(Later(tokens=123_440), Later()))), Display("SFT", 1000, stream=log) as display:
        train(display, clock_of, 1000)

    lines = log.getvalue().splitlines()
    assert 20 <= len(lines) <= 22
    assert not re.search(r"[^\n -~]", log.getvalue())
    stamp = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ")
    assert all(stamp.match(line) for line in lines)
    assert stamp.sub("", lines[1]) == (
        "[2/5] SFT  step 51/1000 (5 %)  loss 0.4312  lr 4.9e-05  1,234 tokens/s  elapsed 1:42  "
        "ends about 12:33 (in 31:38)  run ends after 12:35 (in 33:18)"
    )
    assert stamp.sub("", lines[-1]) == (
        "[2/5] SFT  step 1000/1000 (100 %)  loss 0.4312  lr 4.9e-05  1,234 tokens/s  elapsed 33:20"
    )


def test_a_long_run_is_never_silent_for_more_than_ten_minutes(clock_of: Any) -> None:
    log = io.StringIO()
    train(Display("SFT", 100_000, stream=log), clock_of, 60, seconds=60.0)
    assert [line.split("  ")[2].split("/")[0] for line in log.getvalue().splitlines()] == [
        f"step {step}" for step in (1, 11, 21, 31, 41, 51)
    ]


def test_a_terminal_that_cannot_go_back_or_a_user_who_wants_no_bars_gets_lines(
    clock_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("TERM", "dumb"), ("TQDM_DISABLE", "1")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            terminal = Terminal()
            train(Display("SFT", 4, stream=terminal), clock_of, 4)
            assert "\r" not in terminal.getvalue()
            assert len(terminal.getvalue().splitlines()) == 4


def test_only_the_process_that_shows_it_writes(clock_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (io.StringIO(), Terminal()):
        with Display("SFT", 4, stream=stream, shown=False) as display:
            train(display, clock_of, 4)
            display.say("nothing")
        assert stream.getvalue() == ""


def test_answers_are_counted_from_those_that_an_earlier_session_gave(clock_of: Any) -> None:
    log, given = io.StringIO(), [0]
    with at(Place(1, 3, "score base")):
        display = Display("score base gsm8k", 12, unit="answers", done=8, stream=log)
    ended = progress.counting(display, lambda: given[0])
    for _ in range(4):
        clock_of(3.0)
        given[0] += 60
        ended()
    lines = [line[21:] for line in log.getvalue().splitlines()]
    assert lines[0] == (
        "[1/3] score base gsm8k  9/12 answers (75 %)  20 tokens/s  elapsed 0:03  ends about 12:00 (in 0:09)"
    )
    assert lines[-1] == "[1/3] score base gsm8k  12/12 answers (100 %)  20 tokens/s  elapsed 0:12"


def test_answers_that_come_by_the_batch_fill_no_log(clock_of: Any) -> None:
    log = io.StringIO()
    display = Display("score base gsm8k", 200, unit="answers", stream=log)
    for done in range(1, 201):
        clock_of(20.0 if done % 100 == 1 else 0.001)
        display.advance(done)
        display.tell()
    counts = [line.split("  ")[2].split("/")[0] for line in log.getvalue().splitlines()]
    assert counts == ["1", "101", "200"]


def test_a_part_of_a_short_step_tells_less_often(clock_of: Any) -> None:
    log = io.StringIO()
    clock_of(100.0)
    display = Display("Loss without each branch", 20, unit="rows", stream=log, between_lines_s=30.0)
    for done in range(1, 21):
        clock_of(3.0)
        display.advance(done)
        display.tell()
    counts = [line.split("  ")[2].split("/")[0] for line in log.getvalue().splitlines()]
    assert counts == ["1", "11", "20"]


# ---- estimates -------------------------------------------------------------------------------------------------------


def test_a_passing_part_leaves_nothing_on_a_terminal_and_in_a_log_what_lasts_alone(
    clock_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    clock_of(5000.0)
    terminal, log = Terminal(), io.StringIO()
    for stream, seconds in ((terminal, 2.0), (log, 2.0), (log, 20.0)):
        with Display("Attention", 4, unit="layers", stream=stream, between_lines_s=30.0, passing=True) as display:
            for layer in range(4):
                clock_of(seconds)
                display.advance(layer + 1)
                display.tell()

    assert "Attention  4/4 layers (100 %)  elapsed 0:08" in terminal.getvalue()
    assert text_on_screen(terminal.getvalue()) == [""]
    assert [line[21:] for line in log.getvalue().splitlines()] == [
        "Attention  2/4 layers (50 %)  elapsed 0:40  ends about 13:24 (in 0:40)",
        "Attention  4/4 layers (100 %)  elapsed 1:20",
    ]


def test_the_first_unit_of_a_session_which_compiles_does_not_count_for_those_to_come(clock_of: Any) -> None:
    pace = Pace(100)
    assert pace.left_s(110) is None
    clock_of(60.0)
    pace.now_at(101)
    assert pace.left_s(110) == 9 * 60.0, "nothing better is known"
    for done in (102, 103):
        clock_of(2.0)
        pace.now_at(done)
    assert pace.left_s(110) == 7 * 2.0
    clock_of(1.0)
    assert pace.left_s(110) == 7 * 2.0 - 1.0


def test_units_made_side_by_side_tell_nothing_before_all_of_them_are_done(clock_of: Any) -> None:
    pace = Pace(0, together=4)
    clock_of(60.0)
    for done in (1, 2, 3):
        pace.now_at(done)
        assert pace.left_s(8) is None
    pace.now_at(4)
    assert pace.left_s(8) == 60.0
    clock_of(20.0)
    pace.now_at(6)
    assert pace.left_s(8) == 20.0


def test_the_end_of_the_run_is_a_bound_where_a_later_step_is_unknown() -> None:
    place = Place(1, 4, later=(Later(tokens=5000), Later(seconds=30.0), Later()))
    assert place.seconds_after(100.0) == (80.0, False)
    assert place.seconds_after(None) == (30.0, False)
    assert Place(1, 3, later=place.later[:2]).seconds_after(100.0) == (80.0, True)
    assert Place(1, 3, later=(Later(tokens=5000, at_least=True), place.later[1])).seconds_after(100.0) == (80.0, False)
    assert progress.ends(90.0, NOW, "run", at_least=True) == Field(
        "run ends after 12:01 (in 1:30)", "all in over 1:30", 3
    )


def test_a_line_above_the_display_breaks_at_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    progress.say("sample at step 2: nothing [red]", terminal := Terminal())
    assert terminal.getvalue() == "sample at step 2:\nnothing [red]\n"


def test_the_rate_of_answers_is_not_taken_for_that_of_training(clock_of: Any) -> None:
    log = io.StringIO()
    with at(Place(3, 5, later=(Later(tokens=100_000), Later(seconds=30.0)))):
        display = Display("score sft gsm8k", 20, unit="answers", stream=log)
    for answers in (5, 10, 15):
        clock_of(5.0)
        display.advance(answers)
        display.tell(tokens_per_second=100.0)
    # After the five seconds that are left and the thirty of the last step; of the training between them nothing is known.
    assert log.getvalue().splitlines()[-1].endswith("ends about 12:00 (in 0:05)  run ends after 12:00 (in 0:35)")


def test_a_part_of_a_step_tells_its_own_end_and_not_the_runs(clock_of: Any) -> None:
    log = io.StringIO()
    with at(Place(2, 3, later=(Later(seconds=30.0),))):
        display = Display("DPO reference of train", 4, unit="batches", stream=log, is_part=True)
    for batch in (1, 2, 3, 4):
        clock_of(5.0)
        display.advance(batch)
        display.tell()
    assert [line[21:] for line in log.getvalue().splitlines()[1:]] == [
        "[2/3] DPO reference of train  2/4 batches (50 %)  elapsed 0:10  ends about 12:00 (in 0:10)",
        "[2/3] DPO reference of train  3/4 batches (75 %)  elapsed 0:15  ends about 12:00 (in 0:05)",
        "[2/3] DPO reference of train  4/4 batches (100 %)  elapsed 0:20",
    ]


def test_a_place_reaches_the_processes_that_are_started_within() -> None:
    place = Place(2, 5, "", (Later(tokens=5), Later(seconds=1.5), Later()))
    with at(place):
        assert current_place() == place
        with at(Place(3, 5)):
            assert current_place() == Place(3, 5)
        assert current_place() == place
    assert progress.VARIABLE not in os.environ
    assert current_place() == Place()


def test_times_are_read_as_people_write_them() -> None:
    assert [duration(seconds) for seconds in (7, 760, 3723, 97_260)] == ["0:07", "12:40", "1:02:03", "1 d 03:01"]
    hour = 3600
    assert [clock(NOW + seconds, NOW) for seconds in (0, 20 * hour, 8 * 24 * hour)] == [
        "12:00", "Wed 08:00", "2 Dec 12:00"
    ]  # fmt: skip
