"""What a step is like at which all is as usual, and how its gradients are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from gradwatch.depths.gradients import Layout
from gradwatch.hooks.optimizers import Held

_ITEM: Final = Tensor.item
_DTYPES: Final = (torch.float32, torch.float64)


class Usual(NamedTuple):
    """What a step has to be like to stay on the path.

    Attributes:
        held: What the one optimizer holds.
        names: Names of the parameters; another list once they have changed.
        layout: Which numbers are behind which key.
        live: Places of the parameters that have a gradient.
        params: These parameters.
        without: The others.
        first: The first parameter that the optimizer holds.
        place: Its place.
        small: Whether copying the gradients together costs less than a norm of each.
    """

    held: Held
    names: Sequence[str]
    layout: Layout
    live: list[int]
    params: list[nn.Parameter]
    without: list[nn.Parameter]
    first: nn.Parameter
    place: int
    small: bool


def read(grads: list[Any]) -> list[float] | None:
    """Return the norms of gradients; None where they are not plain, on the CPU."""
    dtype = getattr(grads[0], "dtype", None) if grads else None
    if dtype not in _DTYPES:
        return None
    for grad in grads:
        if type(grad) is not Tensor or grad.dtype is not dtype or grad.is_sparse:
            return None
        if not grad.is_cpu or grad.requires_grad:
            return None
    return list(map(_ITEM, torch._foreach_norm(grads)))
