"""Running statistics as pure functions: ``(state, value) -> state``.

A state is a tuple of plain floats, so that it can be saved as JSON and restored.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

Window = tuple[float, ...]


def push(window: Window, value: float, size: int) -> Window:
    """Return the window with a value added and the oldest beyond ``size`` dropped.

    Args:
        window: Past values, oldest first.
        value: The new value; a non-finite one is left out, because one NaN would stay
            in every statistic for ``size`` steps.
        size: How many values to keep, at least 1.

    Returns:
        The new window.
    """
    if not math.isfinite(value):
        return window
    return (*window[-(size - 1) :], value) if size > 1 else (value,)


def median(window: Sequence[float]) -> float:
    """Return the median, NaN for an empty window."""
    if not window:
        return math.nan
    ranked, middle = sorted(window), len(window) // 2
    if len(window) % 2:
        return ranked[middle]
    return 0.5 * (ranked[middle - 1] + ranked[middle])


def rolling_medians(values: Sequence[float], size: int) -> list[float]:
    """Return the median of each ``size`` consecutive values, as :func:`median` does.

    Example:
        >>> rolling_medians((1.0, 9.0, 2.0, 4.0, 3.0), 4)
        [3.0, 3.5]
    """
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(values), size)
    ranked, middle = np.sort(windows, axis=1), size // 2
    found = ranked[:, middle]
    if size % 2 == 0:
        found = 0.5 * (ranked[:, middle - 1] + found)
    medians: list[float] = found.tolist()
    return medians


def largest_median(values: Sequence[float], size: int) -> float:
    """Return the most that the median of ``size`` of the values can be.

    Args:
        values: At least ``size``.
        size: An odd number.

    Example:
        >>> largest_median((5.0, 1.0, 4.0, 2.0, 3.0), 3)
        4.0
    """
    return sorted(values)[-(size // 2 + 1)]


def smallest_median(values: Sequence[float], size: int) -> float:
    """Return the least that the median of ``size`` of the values can be; see above."""
    return sorted(values)[size // 2]


def upper_median(values: Sequence[float]) -> float:
    """Return the median; of an even number of values, the larger of the two."""
    return sorted(values)[len(values) // 2]


def robust_z(window: Window, value: float, floor: float = 0.0) -> float:
    r"""Return how far a value lies from a window, in robust standard deviations.

    :math:`z = (v - \mathrm{med}) / (1.4826\,\mathrm{MAD} + \mathrm{floor})`.

    Args:
        window: Past values, oldest first.
        value: The value to judge.
        floor: Added to the scale, so that a constant window does not make every
            change infinite; in the values' own unit.

    Returns:
        The score; NaN for an empty window or a NaN value, Inf where the scale is 0 and
        the value differs.

    Example:
        >>> robust_z((1.0, 2.0, 3.0), 2.0)
        0.0

    References:
        Rousseeuw & Croux (1993), J. Am. Stat. Assoc. 88.
    """
    centre = median(window)
    scale = 1.4826 * median(tuple(abs(v - centre) for v in window)) + floor
    if scale == 0:
        return 0.0 if value == centre else (value - centre) * math.inf
    return (value - centre) / scale


def theil_sen(steps: Sequence[float], values: Sequence[float]) -> float:
    """Return the median of the slopes between all pairs of points.

    Args:
        steps: Strictly increasing.
        values: One for each step; finite.

    Returns:
        The slope in the values' unit per step; NaN for fewer than two points.

    Example:
        >>> theil_sen((0, 1, 2, 3), (0.0, 1.0, 9.0, 3.0))
        1.0

    References:
        Theil (1950); Sen (1968), J. Am. Stat. Assoc. 63.
    """
    points = list(zip(steps, values, strict=True))
    pairs = itertools.combinations(points, 2)
    return median([(w - v) / (t - s) for (s, v), (t, w) in pairs])
