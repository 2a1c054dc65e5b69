"""How an inspection writes its numbers, in sentences, tables and plots alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain

from hymba_align.inside.result import Measured
from hymba_align.inspect_choices import Part

MOST_DECIMALS = 6
PART_NAMES: dict[Part, str] = {
    "attention": "Attention",
    "importance": "Importance of the heads",
    "fusion": "Fusion",
    "meta_tokens": "Meta tokens",
    "alignment": "What training changed",
    "cost": "Cost",
}


def percent(share: float) -> str:
    """A share in percent: `31.4 %`; below one percent to two digits that say something: `0.086 %`.

    Nothing but all is `100.0 %`: just below, as many digits as show that: `99.98 %`.
    """
    value = 100 * share
    if 99.95 <= value < 100:
        missing = f"{100 - value:.0e}"  # rounded to one digit before it is taken away
        return f"{100 - float(missing):.{-int(missing[2:])}f} %"
    return f"{significant(value) if 0 < abs(value) < 1 else number(value, 1)} %"


def significant(value: float) -> str:
    """A number to two digits that say something, without an exponent down to a millionth."""
    if value == 0 or not math.isfinite(value):
        return number(value, 0)
    if abs(value) >= 1e-6:
        digits = max(0, 1 - math.floor(math.log10(abs(value))))
        return _with_minus(f"{value:,.{digits}f}")
    return _scientific(value)


def number(value: float, digits: int = 3) -> str:
    """A number with so many decimals; where they would leave less than two digits of it, two digits; none from 1,000 on."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite" if value > 0 else "−infinite"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}".replace("-", "−")
    return significant(value) if 0 < size < 10 ** (1 - digits) else _with_minus(f"{value:.{digits}f}")


def signed(value: float, digits: int = 3) -> str:
    """A number with its sign."""
    return f"+{number(value, digits)}" if value > 0 else number(value, digits)


def with_error(measured: Measured, *, sign: bool = False) -> str:
    """A mean and its standard error, to two digits of the error: `0.412 ± 0.031`."""
    write = signed if sign else number
    if measured.stderr is None:
        return write(measured.mean)
    if not math.isfinite(measured.stderr) or measured.stderr <= 0:
        return f"{write(measured.mean)} ± {number(measured.stderr)}"
    digits = max(0, 1 - math.floor(math.log10(measured.stderr)))
    mean, stderr, times = measured.mean, measured.stderr, ""
    if digits > MOST_DECIMALS:
        exponent = math.floor(math.log10(max(abs(mean), stderr)))
        digits += exponent
        mean, stderr, times = mean / 10.0**exponent, stderr / 10.0**exponent, f" × 10{_raised(exponent)}"
    plus = "+" if sign and mean > 0 else ""
    told = f"{plus}{_with_minus(f'{mean:,.{digits}f}')} ± {stderr:,.{digits}f}"
    return f"({told}){times}" if times else told


def count(size: int, one: str, many: str = "") -> str:
    """How many of something: `1 layer`, `4 layers`."""
    return f"{size:,} {one if size == 1 else many or one + 's'}"


def listed(words: Iterable[object], most: int = 0) -> str:
    """Words in a row: `a, b and c`; the first `most` alone, with how many more there are."""
    each = [str(word) for word in words]
    if most and len(each) > most:
        return f"{', '.join(each[:most])} and {len(each) - most:,} more"
    return " and ".join(([", ".join(each[:-1])] if len(each) > 1 else []) + each[-1:])


def ranges(numbers: Sequence[int]) -> str:
    """Numbers in order, neighbours joined: `0, 2–4 and 7`."""
    runs: list[list[int]] = []
    for one in sorted(numbers):
        if runs and one == runs[-1][-1] + 1:
            runs[-1].append(one)
        else:
            runs.append([one])
    return listed(chain.from_iterable(run if len(run) < 3 else [f"{run[0]}–{run[-1]}"] for run in runs))


def layers(numbers: Sequence[int]) -> str:
    """Layers by number: `layer 3`, `layers 0, 2–4 and 7`."""
    return f"{'layer' if len(numbers) == 1 else 'layers'} {ranges(numbers)}"


def size_in_bytes(size: float) -> str:
    """Bytes as people write them, decimal as the paper's: `79.0 MB`."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}" if size < 100 * factor else f"{size / factor:,.0f} {unit}"
    return f"{size:.0f} bytes"


def _scientific(value: float) -> str:
    mantissa, exponent = f"{value:.1e}".split("e")
    return _with_minus(f"{mantissa} × 10{_raised(int(exponent))}")


def _raised(exponent: int) -> str:
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _with_minus(text: str) -> str:
    """The typographic minus, and none before zero."""
    return text.replace("-", "−") if any(digit in text for digit in "123456789") else text.replace("-", "")
