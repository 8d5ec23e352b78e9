"""Markdown tables of medians and spreads over seeds."""

import math
from collections.abc import Iterable, Sequence


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; a row appears as soon as it is known."""
    print(f"| {' | '.join(columns)} |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def spread(values: Iterable[float], form: str = ".3g") -> str:
    """Return ``median (min to max)``; NaN counts as the largest value of all."""
    ranked = _ranked(values)
    low, middle, high = (
        format(value, form) for value in (ranked[0], middle_of(ranked), ranked[-1])
    )
    return middle if low == high else f"{middle} ({low} to {high})"


def middle_of(values: Iterable[float]) -> float:
    """Return the median, of two the higher; NaN counts as the largest value of all."""
    ranked = _ranked(values)
    return ranked[len(ranked) // 2]


def _ranked(values: Iterable[float]) -> list[float]:
    return sorted(values, key=lambda value: (math.isnan(value), value))
