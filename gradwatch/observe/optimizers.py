"""Which optimizer holds which of the watched parameters; looked up once each."""

from __future__ import annotations

import math
import weakref
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from gradwatch.observe.weights import Changes, Moving


class Held(NamedTuple):
    """What an optimizer holds of the watched parameters.

    Attributes:
        size: How many parameters it had when this was looked up.
        optimizer: The optimizer, not kept alive.
        params: Indices of the watched parameters that it holds.
        moving: The recurrent weights among them.
    """

    size: int
    optimizer: weakref.ref[Optimizer]
    params: list[int]
    moving: Moving


class Optimizers:
    """The optimizers that have stepped, for one set of watched parameters.

    Args:
        params: The watched parameters.
        changes: Knows which of them are recurrent weights.
    """

    def __init__(self, params: Sequence[nn.Parameter], changes: Changes) -> None:
        self._params, self._changes = params, changes
        self._index = {id(p): i for i, p in enumerate(params)}
        self._known: dict[int, Held] = {}
        self._idle: dict[frozenset[int], frozenset[int]] = {}

    def known(self, optimizer: Optimizer) -> Held | None:
        """Return what was looked up, unless its size has changed since."""
        size = 0
        for group in optimizer.param_groups:
            size += len(group["params"])
        held = self._known.get(id(optimizer))
        if held is None or held.size != size or held.optimizer() is not optimizer:
            return None
        return held

    def look_up(self, optimizer: Optimizer) -> Held:
        """Look up what an optimizer holds."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        index = [self._index[id(p)] for p in params if id(p) in self._index]
        moving = self._changes.among(self._params[i] for i in index)
        held = Held(len(params), weakref.ref(optimizer), index, moving)
        self._known[id(optimizer)] = held
        self._idle.clear()
        return held

    def idle(self, stepped: Collection[int]) -> frozenset[int]:
        """Return the parameters that only optimizers hold which have not stepped.

        Args:
            stepped: Ids of the optimizers that have.

        Returns:
            Their indices; what an earlier backward left there is no part of the step.
        """
        if len(self._known) < 2 or not stepped:
            return frozenset()
        key = frozenset(stepped)
        if key not in self._idle:
            held = {i: set(one.params) for i, one in self._known.items()}
            used = set().union(*(held.get(i, ()) for i in key))
            self._idle[key] = frozenset(set().union(*held.values()) - used)
        return self._idle[key]

    def alive(self) -> list[Optimizer]:
        """Return the optimizers that hold a watched parameter."""
        known = [held.optimizer() for held in self._known.values() if held.params]
        return [optimizer for optimizer in known if optimizer is not None]

    def rates(self) -> dict[int, float]:
        """Return the learning rates of all parameters that these optimizers hold.

        Returns:
            Id of a parameter -> its learning rate; NaN where reading it would wait.
        """
        groups = [g for o in self.alive() for g in o.param_groups]
        return {id(p): _rate(group) for group in groups for p in group["params"]}


def _rate(group: dict[str, Any]) -> float:
    rate = group.get("lr")
    if isinstance(rate, Tensor) and rate.device.type == "cpu" and rate.numel() == 1:
        return float(rate)
    return float(rate) if isinstance(rate, int | float) else math.nan
