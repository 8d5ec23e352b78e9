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
        self._copies: dict[str, Tensor] = {}
        self._names: list[str] = []
        self._moving: list[nn.Parameter] = []
        self._norms: Norms = []

    def remember(self, params: Iterable[nn.Parameter]) -> None:
        """Copy and measure those weights that an optimizer is about to change."""
        known = [self._tracked.get(id(param)) for param in params]
        self._names = [pair[0] for pair in known if pair is not None]
        self._moving = [pair[1] for pair in known if pair is not None]
        for name, weight in zip(self._names, self._moving, strict=True):
            copy = self._copies.get(name)
            if copy is None or copy.shape != weight.shape:
                copy = torch.empty_like(weight, requires_grad=False)
                self._copies[name] = copy
            copy.copy_(weight.detach())
        if self._moving:  # now, while they are at hand for the optimizer
            self._norms = norms(self._moving)

    def compare(self) -> tuple[list[str], Norms, Norms] | None:
        """Measure how far they have moved.

        Returns:
            The streams' names, the norm of each change, and that of each weight before
            it; None where no weight was remembered.
        """
        if not self._moving:
            return None
        changes = [
            self._copies[name].sub_(weight.detach())
            for name, weight in zip(self._names, self._moving, strict=True)
        ]
        self._moving = []
        return self._names, norms(changes), self._norms
