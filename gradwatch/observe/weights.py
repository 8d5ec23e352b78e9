"""How far the recurrent weights move in one step of the optimizer that holds them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from gradwatch.observe.measure import Norms, norms


class Changes:
    """Compares weights before and after an optimizer's step, in buffers that it keeps.

    Args:
        weights: Name of a stream -> its W_hh, where that is a parameter itself.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        self._tracked = {id(w): (name, w) for name, w in weights.items()}
        self._buffers: dict[str, tuple[Tensor, Tensor]] = {}
        self._moving: list[tuple[str, nn.Parameter]] = []

    def remember(self, params: Iterable[nn.Parameter]) -> None:
        """Copy those weights that an optimizer is about to change."""
        self._moving = []
        for param in params:
            known = self._tracked.get(id(param))
            if known is None:
                continue
            name, weight = known
            buffers = self._buffers.get(name)
            if buffers is None or buffers[0].shape != weight.shape:
                fresh = torch.empty_like(weight, requires_grad=False)
                buffers = self._buffers[name] = (fresh, torch.empty_like(fresh))
            buffers[0].copy_(weight.detach())
            self._moving.append(known)

    def compare(self) -> tuple[list[str], Norms] | None:
        """Measure how far they have moved.

        Returns:
            The streams' names, and for each the norm of the change and that of the
            weight before it, in turn; None where no weight was remembered.
        """
        read: list[Tensor] = []
        for name, weight in self._moving:
            before, change = self._buffers[name]
            torch.sub(weight.detach(), before, out=change)
            read += [change, before]
        names = [name for name, _ in self._moving]
        self._moving = []
        return (names, norms(read)) if read else None
