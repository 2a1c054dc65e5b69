"""Curves and histograms as shapes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hymba_align.eval.report.charts import BINS, HEIGHT, MOST_POINTS, WIDTH, chart, histogram, nice_ticks

numbers = st.floats(-1e9, 1e9, allow_nan=False).map(lambda value: 0.0 if abs(value) < 1e-9 else value)


@given(low=numbers, high=numbers)
def test_ticks_are_few_and_round_and_enclose_the_values(low: float, high: float) -> None:
    low, high = sorted((low, high))
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 8
    assert ticks == sorted(set(ticks))
    slack = 1e-6 * (ticks[-1] - ticks[0])
    assert ticks[0] <= low + slack
    assert high - slack <= ticks[-1]


def test_ticks_of_counts_are_whole() -> None:
    assert nice_ticks(0, 3, whole=True) == [0, 1, 2, 3]


@given(values=st.lists(numbers, min_size=1, max_size=50))
def test_every_point_lies_in_the_box(values: list[float]) -> None:
    drawn = chart("Loss", {"training": list(enumerate(values))})
    assert drawn is not None
    for pair in drawn.lines[0].points.split():
        x, y = map(float, pair.split(","))
        assert 0 <= x <= WIDTH
        assert 0 <= y <= HEIGHT


def test_a_spike_in_a_long_run_is_not_thinned_away() -> None:
    points = [(float(step), 9.0 if step == 12_345 else 1.0) for step in range(50_000)]
    drawn = chart("Loss", {"training": points})
    assert drawn is not None
    places = [pair.split(",") for pair in drawn.lines[0].points.split()]
    assert len(places) <= MOST_POINTS + 2
    assert sum(float(y) < 60 for _, y in places) == 1  # the top of the box


def test_values_that_are_no_numbers_are_left_out() -> None:
    assert chart("Loss", {"training": [(1.0, math.nan)]}) is None
    drawn = chart("Loss", {"training": [(1.0, math.inf), (2.0, 0.5)]})
    assert drawn is not None
    assert drawn.words == "Loss: training from 0.5 at 2 to 0.5 at 2"
    assert drawn.lines[0].single is not None


@pytest.mark.parametrize("highest", [0, 1, 19, 20, 511, 4096])
def test_a_histogram_counts_every_value_once(highest: int) -> None:
    values = [highest * number // 100 for number in range(101)]
    drawn = histogram("gsm8k", values, highest)
    assert drawn is not None
    assert len(drawn.bars) <= BINS + 1
    assert sum(int(bar.words.rpartition(" ")[2].replace(",", "")) for bar in drawn.bars) == 101


def test_a_histogram_of_nothing_is_none() -> None:
    assert histogram("gpqa", [], 0) is None
