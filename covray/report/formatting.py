"""Figures as people read them: digits, units, signs and plurals. Every function returns plain text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypeGuard

NONE = "–"
"""Stands for a figure that does not exist."""
_MINUS = "−"
_COUNT_UNITS = ((1e9, "B"), (1e6, "M"), (1e3, "k"))


def is_finite(value: float | None) -> TypeGuard[float]:
    """Return whether ``value`` is a number that can be compared and drawn."""
    return value is not None and math.isfinite(value)


def numbers(value: float | None, *bounds: float | None) -> list[str]:
    """Write a value and its bounds with the same number of decimals.

    The value gets three significant digits, or fewer where its bounds are so wide that the last ones say nothing.

    Args:
        value: The figure itself; None becomes a dash, as in ``bounds``.
        bounds: The ends of its interval, or other figures to write beside it.

    Returns:
        The texts of ``value`` and of each bound.
    """
    # Infinite figures are written as they are and do not choose the decimals.
    sizes = [0.0]
    if is_finite(value):
        sizes.append(abs(value))
    for bound in bounds:
        if is_finite(bound):
            sizes.append(abs(bound) / 10)
    # The largest of them decides the decimals of all; a bound counts a tenth.
    size = max(sizes)
    # Very small and very large figures are written with an exponent.
    pattern = ".2e"
    if size == 0:
        pattern = ",.0f"
    elif 1e-4 <= size < 1e7:
        # Rounding may carry (0.9996 is 1.00), so the digits are counted after it.
        rounded = float(f"{size:.2e}")
        decimals = max(0, 2 - math.floor(math.log10(rounded)))
        pattern = f",.{decimals}f"
    texts = []
    for number in (value, *bounds):
        texts.append(_write(number, pattern))
    return texts


def signed_numbers(value: float | None, *bounds: float | None) -> list[str]:
    """Write the figures as ``numbers`` does, with a plus sign before those above zero."""
    texts = []
    for number, text in zip((value, *bounds), numbers(value, *bounds), strict=True):
        if is_finite(number) and number > 0:
            # Negative figures have their sign from `numbers`.
            text = f"+{text}"
        texts.append(text)
    return texts


def interval(low: str, high: str) -> str:
    """Write an interval of which both ends are written already."""
    return f"[{low}, {high}]"


def fixed(value: float, decimals: int) -> str:
    """Write ``value`` with so many decimals and a real minus sign."""
    return _write(value, f",.{decimals}f")


def short_count(count: float) -> str:
    """Write a count with three digits: 172k, 1.2M."""
    # Rounded first: 999,999 is 1M, not 1000k.
    rounded = float(f"{count:.3g}")
    for size, unit in _COUNT_UNITS:
        if rounded >= size:
            return f"{rounded / size:.3g}{unit}"
    return f"{rounded:.3g}"


def duration(seconds: float) -> str:
    """Write a time in seconds, minutes or hours."""
    # Up to 99 s, then up to 99 min: two digits say enough.
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def p_value(value: float | None) -> str:
    """Write the p-value of a test with three decimals."""
    if value is None:
        return NONE
    if value < 0.001:
        return "< 0.001"
    return f"{value:.3f}"


def plural(count: int, noun: str) -> str:
    """Return ``noun`` in the form for ``count`` of them, without the count."""
    if count == 1:
        return noun
    return f"{noun}s"


def counted(count: int, noun: str) -> str:
    """Write a count with its noun: 1 trial, 1,024 trials."""
    return f"{count:,} {plural(count, noun)}"


def readable(name: str) -> str:
    """Return the name of a task or a key for people: ``low_light`` becomes Low light."""
    return name.replace("_", " ").capitalize()


def listed(values: Iterable[object], empty: str = NONE) -> str:
    """Return the distinct ``values`` in their order, joined by commas."""
    distinct = dict.fromkeys(map(str, values))
    return ", ".join(distinct) or empty


def _write(number: float | None, pattern: str) -> str:
    if number is None:
        return NONE
    text = format(number, pattern)
    # What is rounded to zero has no sign.
    if not text.strip("-0.,"):
        text = text.lstrip("-")
    return text.replace("-", _MINUS)
