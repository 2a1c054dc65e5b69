"""How well a difference of two means is known that may depend on each other."""

from __future__ import annotations

import pytest

from hymba_align.inside.evidence import apart
from hymba_align.inside.result import Measured


def test_the_error_of_a_difference_is_the_sum_of_both_which_no_dependence_exceeds() -> None:
    found = apart(Measured(3.0, 0.3), Measured(1.0, 0.4))
    assert (found.mean, found.stderr) == (2.0, pytest.approx(0.7))


@pytest.mark.parametrize(("one", "other"), [(None, 0.4), (0.3, None)])
def test_where_one_mean_has_no_error_their_difference_has_none(one: float | None, other: float | None) -> None:
    assert apart(Measured(3.0, one), Measured(1.0, other)) == Measured(2.0, None)
