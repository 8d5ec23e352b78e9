"""Along which axis of an input neighbours are alike: time's, or the batch's."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

LEAST: Final = 8
"""Entries of an axis below which nothing is told of it."""
_MOST: Final = 64
"""Entries of an axis that are looked at, the first ones."""


def roughness(x: Tensor) -> Tensor:
    """Return how unlike neighbours are, along time and along the batch.

    Half the mean square of the difference of two neighbours, over the variance about
    the mean of the line that they stand in (the von Neumann ratio): 1 for values that
    have nothing to do with each other, near 0 for a slow signal. Pairs of equal
    neighbours, such as padding, are left out.

    Args:
        x: Shape ``(T, B, F)``; 64 entries of either axis are looked at.

    Returns:
        Shape ``(2,)``, float32; NaN along an axis of no two neighbours that differ.

    Source:
        von Neumann (1941), Distribution of the ratio of the mean square successive
        difference to the variance.
    """
    x = x[:_MOST, :_MOST].float()
    return torch.stack([_along(x), _along(x.transpose(0, 1))])


def _along(x: Tensor) -> Tensor:
    """Return the ratio along the first axis."""
    gap = (x[1:] - x[:-1]).square().sum(-1)
    pairs = (gap > 0).sum()
    spread = (x - x.mean(0)).square().sum(-1).sum() / ((len(x) - 1) * x.shape[1])
    return gap.sum() / pairs / (2 * spread)
