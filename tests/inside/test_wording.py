"""Numbers are written so that they say neither less nor more than was measured."""

from __future__ import annotations

import math

import pytest

from hymba_align.inside.result import Measured
from hymba_align.inside.wording import (
    count,
    listed,
    number,
    percent,
    ranges,
    signed,
    significant,
    size_in_bytes,
    with_error,
)


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0.4123, 3, "0.412"),
        (0.0, 3, "0.000"),
        (0.0057, 3, "0.0057"),
        (-0.000042, 3, "−0.000042"),
        (-0.0, 3, "0.000"),
        (3.2e-9, 3, "3.2 × 10⁻⁹"),
        (12_345.6, 3, "12,346"),
        (math.nan, 3, "not a number"),
        (math.inf, 3, "infinite"),
        (-math.inf, 3, "−infinite"),
    ],
)
def test_a_number_keeps_two_digits_that_say_something(value: float, digits: int, text: str) -> None:
    assert number(value, digits) == text


@pytest.mark.parametrize(
    ("mean", "stderr", "text"),
    [
        (0.41234, 0.0312, "0.412 ± 0.031"),
        (92.5, 1.87, "92.5 ± 1.9"),
        (1234.5, 56.7, "1,234 ± 57"),
        (-0.0001042, 0.0000339, "−0.000104 ± 0.000034"),
        (1.2527e-5, 1.256e-6, "(1.25 ± 0.13) × 10⁻⁵"),
        (0.412, None, "0.412"),
        (0.412, 0.0, "0.412 ± 0.000"),
        (math.nan, math.nan, "not a number ± not a number"),
    ],
)
def test_a_mean_is_as_long_as_its_error_allows(mean: float, stderr: float | None, text: str) -> None:
    assert with_error(Measured(mean, stderr)) == text


def test_a_share_just_below_all_is_not_rounded_to_all() -> None:
    assert [percent(share) for share in (0.99949, 0.9995, 0.99976, 0.9999044, 0.999999)] == [
        "99.9 %",
        "99.95 %",
        "99.98 %",
        "99.99 %",
        "99.9999 %",
    ]


def test_shares_are_in_percent() -> None:
    assert [percent(share) for share in (0.314, 0.0086, 0.0, 1.0, 0.0000163)] == [
        "31.4 %",
        "0.86 %",
        "0.0 %",
        "100.0 %",
        "0.0016 %",
    ]


def test_signs_are_written() -> None:
    assert [signed(value) for value in (0.5, -0.5, 0.0)] == ["+0.500", "−0.500", "0.000"]
    assert with_error(Measured(0.5, 0.1), sign=True) == "+0.50 ± 0.10"
    assert significant(-0.0123) == "−0.012"


def test_numbers_that_follow_each_other_are_joined() -> None:
    assert [ranges(each) for each in ([3], [1, 0], [0, 2, 3, 4, 7], [5, 6, 9])] == [
        "3",
        "0 and 1",
        "0, 2–4 and 7",
        "5, 6 and 9",
    ]


def test_words_are_listed() -> None:
    assert listed("abc") == "a, b and c"
    assert listed("ab") == "a and b"
    assert listed("") == ""
    assert listed("abcd", most=2) == "a, b and 2 more"
    assert (count(1, "layer"), count(0, "layer"), count(1200, "token")) == ("1 layer", "0 layers", "1,200 tokens")


def test_bytes_are_decimal_as_the_papers_are() -> None:
    assert [size_in_bytes(size) for size in (512, 79_000_000, 942_300_000, 2e9, 1_500)] == [
        "512 bytes",
        "79.0 MB",
        "942 MB",
        "2.0 GB",
        "1.5 kB",
    ]
