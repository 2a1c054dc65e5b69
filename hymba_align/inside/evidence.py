"""When a measured difference is more than chance: the rule behind every sentence that says so.

n documents (answers, pairs, problems), ν = n − 1.

A difference counts when it is further from what it is compared with than Student's t with ν degrees of freedom is at
5 %, two-sided, divided among the comparisons that a sentence chooses from (Bonferroni). Fewer than five documents support no claim.
"""

from __future__ import annotations

import math
from statistics import NormalDist

from hymba_align.inside.result import Measured

ERROR_RATE = 0.05
FEWEST = 5
WORTH_TELLING = 0.01
"""Share of tokens without a piece of their own from which on it is told, and a sign: one rare character in a text is none"""
LEAST_PREFERENCE = 0.05
"""Relative difference from which on a meta token prefers a domain: differences that are more than chance but smaller are in
every model, even of random weights (meta_tokens.py)."""


def limit(n: int, comparisons: int = 1) -> float:
    """How many standard errors a difference has to be away, infinitely many with fewer than five documents.

    Source: Abramowitz and Stegun, 26.7.5, with all four terms: within 0.4 % of Student's t for up to
    8 comparisons, and 1.5 % too small at worst for 64 (five documents); from ten documents on within 0.1 %.
    """
    if n < FEWEST:
        return math.inf
    z = NormalDist().inv_cdf(1 - ERROR_RATE / (2 * max(1, comparisons)))
    ν = n - 1
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / ν**power for power, term in enumerate(terms, 1))


def is_above(measured: Measured, than: float, n: int, comparisons: int = 1) -> bool:
    """Whether a mean lies above a number by more than chance; without a standard error (None or 0) nothing is claimed."""
    if not measured.stderr or not math.isfinite(measured.mean):
        return False
    return measured.mean - than > limit(n, comparisons) * measured.stderr


def is_below(measured: Measured, than: float, n: int, comparisons: int = 1) -> bool:
    """Whether a mean lies below a number by more than chance."""
    return is_above(Measured(-measured.mean, measured.stderr), -than, n, comparisons)


def of_problems(measured: Measured, n: int) -> Measured:
    """A mean of verdicts in percent; where all go alike, with the error that Laplace's rule of succession leaves.

    There the plain standard error is 0, which says nothing.
    """
    if measured.stderr is None or measured.stderr > 0 or n < 1:
        return measured
    p = (n + 1) / (n + 2)
    return Measured(measured.mean, 100 * math.sqrt(p * (1 - p) / n))


def apart(one: Measured, other: Measured) -> Measured:
    """The difference of two means with an error that is too large rather than too small: the sum of both errors.

    That holds however the two depend on each other.
    """
    if one.stderr is None or other.stderr is None:
        return Measured(one.mean - other.mean)
    return Measured(one.mean - other.mean, one.stderr + other.stderr)
