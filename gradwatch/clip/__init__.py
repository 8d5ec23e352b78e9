"""Clippers that refuse NaN: in the training loop, or attached to the optimizer.

    clipper = gradwatch.clip.LogZClip()
    clipper.attach(optimizer)                       # the loop stays as it is
    result = clipper.clip_(model.parameters())      # or: before optimizer.step()

One protocol for all: ``clip_``, ``attach``, ``state_dict``, ``print(clipper)``.
"""

from __future__ import annotations

import bisect
import math
from abc import abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, final

import numpy as np
import torch
from torch import Tensor

from gradwatch.clip.clipper import KEPT, Attached, Clipper, ClipperState, ClipResult
from gradwatch.clip.gradients import Held, norms_on_host
from gradwatch.numerics.streaming import median

__all__ = [
    "AGC",
    "Attached",
    "AutoClip",
    "ClipResult",
    "Clipper",
    "LogZClip",
    "NormClip",
    "ZClip",
]

WARM_UP: Final = 25
"""Norms that a statistic is begun from."""
_MEMORY: Final = 0.97
"""Share of a running mean that stays at each step."""


def _positive(name: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} is {value}; expected a number above 0.")
    return float(value)


@final
class NormClip(Clipper):
    """Scale the gradients down to a fixed norm; their direction is kept.

    Args:
        max_norm: The largest norm, in the gradients' own unit.
        patience: As for :class:`Clipper`.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> result = NormClip(1.0).clip_([weight])
        >>> round(result.norm, 4), round(result.ratio, 4), weight.grad
        (5.0, 0.2, tensor([0.6000, 0.8000]))

    References:
        Pascanu, Mikolov & Bengio (2013), arXiv:1211.5063.
    """

    def __init__(self, max_norm: float = 1.0, *, patience: int | None = 10) -> None:
        self.max_norm = _positive("max_norm", max_norm)
        super().__init__(patience=patience)

    def _limit(self, norm: float) -> float:
        return self.max_norm

    def _learn(self, norm: float, let_through: float) -> None:
        pass  # the threshold is fixed


@dataclass(slots=True, kw_only=True)
class _AdaptiveState(ClipperState):
    """What an adaptive clipper saves.

    Attributes:
        seen: Norms that its statistic has taken in.
    """

    seen: int


@dataclass(slots=True, kw_only=True)
class _AutoState(_AdaptiveState):
    history: list[float]


@dataclass(slots=True, kw_only=True)
class _RunningState(_AdaptiveState):
    first: tuple[float, ...]
    mean: float
    var: float


class _Adaptive(Clipper):
    """A clipper that learns its threshold from the norms so far.

    A statistic that has never seen a healthy norm takes an explosion for normal. So it
    is not begun while ``watch`` has an open ``exploding`` incident; until that is over
    the gradients are clipped to norm 1.
    """

    _saved_as: ClassVar[type[ClipperState]] = _AdaptiveState

    def __init__(self, *, watch: Any, patience: int | None) -> None:
        self._watch = watch
        super().__init__(patience=patience)

    def reset(self) -> None:
        """Forget the statistic, all norms and counts."""
        super().reset()
        self._seen = 0
        self._held_back = False

    def _limit(self, norm: float) -> float:
        self._held_back = self._seen < WARM_UP and self._explodes()
        return 1.0 if self._held_back else self._learnt(norm)

    def _explodes(self) -> bool:
        if self._watch is None or self._watch.health["state"] == "off":
            return False  # a closed watch cannot tell when it is over
        return any(
            incident.kind == "exploding" and incident.until is None
            for incident in self._watch.incidents
        )

    def _learn(self, norm: float, let_through: float) -> None:
        if not self._held_back:
            self._seen += 1
            self._take_in(norm, let_through)

    @abstractmethod
    def _learnt(self, norm: float) -> float:
        """Return the threshold of the statistic; Inf while it warms up."""

    @abstractmethod
    def _take_in(self, norm: float, let_through: float) -> None:
        """Move the statistic on by the norm of a step, before and after clipping."""

    def _fields(self) -> dict[str, Any]:
        return {**super()._fields(), "seen": self._seen}

    def _go_on_from(self, state: Any) -> None:
        super()._go_on_from(state)
        self._seen = state.seen


@final
class AutoClip(_Adaptive):
    """Clip to a percentile of the norms seen so far, this one included.

    Args:
        percentile: In (0, 100]; 10 is the paper's, and clips nine steps in ten.
        window: How many norms are remembered, at most 1,000.
        watch: A :class:`gradwatch.Watch` of the model: no norm is remembered while it
            has an open ``exploding`` incident and fewer than 25 are.
        patience: As for :class:`Clipper`.

    References:
        Seetharaman et al. (2020), arXiv:2007.14469, with an unbounded history.
    """

    _saved_as = _AutoState

    def __init__(
        self,
        percentile: float = 10.0,
        *,
        window: int = KEPT,
        watch: Any = None,
        patience: int | None = 10,
    ) -> None:
        self.percentile = _positive("percentile", percentile)
        if percentile > 100:
            raise ValueError(f"percentile is {percentile}; expected at most 100.")
        if not 1 <= window <= KEPT:
            raise ValueError(f"window is {window}; expected 1 to {KEPT} norms.")
        self.window = window
        super().__init__(watch=watch, patience=patience)

    def reset(self) -> None:
        """Forget the history, all norms and counts."""
        super().reset()
        self._history: deque[float] = deque()
        self._ranked: list[float] = []

    def _learnt(self, norm: float) -> float:
        ranked = self._with(norm)
        place = (len(ranked) - 1) * self.percentile / 100
        low = int(place)
        high = min(low + 1, len(ranked) - 1)
        return ranked[low] + (place - low) * (ranked[high] - ranked[low])

    def _with(self, norm: float) -> list[float]:
        """Return the norms in order, with one more and without the oldest beyond."""
        ranked = self._ranked.copy()
        if len(self._history) == self.window:
            ranked.pop(bisect.bisect_left(ranked, self._history[0]))
        bisect.insort(ranked, norm)
        return ranked

    def _take_in(self, norm: float, let_through: float) -> None:
        self._ranked = self._with(norm)
        if len(self._history) == self.window:
            self._history.popleft()
        self._history.append(norm)

    def _fields(self) -> dict[str, Any]:
        return {**super()._fields(), "history": list(self._history)}

    def _go_on_from(self, state: Any) -> None:
        super()._go_on_from(state)
        history = state.history[-self.window :]
        self._history, self._ranked = deque(history), sorted(history)


class _Running(_Adaptive):
    """A running mean and variance, begun from the first 25 values."""

    _saved_as = _RunningState

    def __init__(self, z_max: float, *, watch: Any, patience: int | None) -> None:
        self.z_max = _positive("z_max", z_max)
        super().__init__(watch=watch, patience=patience)

    def reset(self) -> None:
        """Forget mean and variance, all norms and counts."""
        super().reset()
        self._first: tuple[float, ...] = ()
        self._mean = self._variance = math.nan

    def _move(self, value: float) -> None:
        if len(self._first) < WARM_UP:
            self._first = (*self._first, value)
            if len(self._first) == WARM_UP:
                self._mean, self._variance = self._begin(self._first)
            return
        off = value - self._mean
        self._mean += (1 - _MEMORY) * off
        self._variance = _MEMORY * self._variance + (1 - _MEMORY) * off * off

    def _begin(self, first: Sequence[float]) -> tuple[float, float]:
        """Return mean and variance of the first values."""
        return float(np.mean(first)), float(np.var(first))

    def _fields(self) -> dict[str, Any]:
        own = {"first": self._first, "mean": self._mean, "var": self._variance}
        return {**super()._fields(), **own}

    def _go_on_from(self, state: Any) -> None:
        super()._go_on_from(state)
        self._first, self._mean, self._variance = state.first, state.mean, state.var


_LEAST_SPREAD: Final = 1e-3
"""Least deviation that a z-score is taken with, as a share of the mean."""


@final
class ZClip(_Running):
    r"""Clip a norm that stands out from the running mean, by its z-score.

    :math:`z = (g - \mu) / \sigma`; where :math:`z > z_{max}` the norm becomes
    :math:`\mu + z_{max}^2 \sigma / z`, and that enters the statistic.

    Args:
        z_max: Standard deviations from which on a norm is clipped.
        watch: A :class:`gradwatch.Watch` of the model; the statistic is not begun while
            it has an open ``exploding`` incident.
        patience: As for :class:`Clipper`.

    References:
        Kumar et al. (2025), arXiv:2504.02507.
    """

    def __init__(
        self, z_max: float = 2.5, *, watch: Any = None, patience: int | None = 10
    ) -> None:
        super().__init__(z_max, watch=watch, patience=patience)

    def _learnt(self, norm: float) -> float:
        if math.isnan(self._mean):
            return math.inf
        sigma = max(math.sqrt(self._variance), _LEAST_SPREAD * self._mean)
        z = (norm - self._mean) / sigma
        if z <= self.z_max:
            return self._mean + self.z_max * sigma
        return self._mean + self.z_max * sigma / (z / self.z_max)

    def _take_in(self, norm: float, let_through: float) -> None:
        self._move(let_through)


@final
class LogZClip(_Running):
    r"""Clip a norm whose logarithm stands out from the running mean.

    The norm is let through up to :math:`\exp(\mu + z_{max} \max(\sigma, 0.1))`, where
    :math:`\mu` and :math:`\sigma` follow :math:`\ln g`: the one that we recommend. A
    healthy run is hardly ever clipped, and the unit of the loss does not matter. It
    begins from the median of 25 norms, so that a few bad ones there do no harm.

    Args:
        z_max: Standard deviations from which on a norm is clipped.
        watch: A :class:`gradwatch.Watch` of the model; the statistic is not begun while
            it has an open ``exploding`` incident.
        patience: As for :class:`Clipper`.
    """

    FLOOR: Final = 0.1
    """Least standard deviation of ln g: a steady run is not clipped for 10 %."""

    def __init__(
        self, z_max: float = 4.0, *, watch: Any = None, patience: int | None = 10
    ) -> None:
        super().__init__(z_max, watch=watch, patience=patience)

    def _learnt(self, norm: float) -> float:
        if math.isnan(self._mean):
            return math.inf
        deviation = max(math.sqrt(self._variance), self.FLOOR)
        return math.exp(min(self._mean + self.z_max * deviation, _LARGEST_LOG))

    def _take_in(self, norm: float, let_through: float) -> None:
        self._move(math.log(let_through))

    def _begin(self, first: Sequence[float]) -> tuple[float, float]:
        centre = median(tuple(first))
        spread = 1.4826 * median(tuple(abs(v - centre) for v in first))
        return centre, spread * spread


_LARGEST_LOG: Final = 700.0
"""exp() of more overflows."""


@final
class AGC(Clipper):
    r"""Adaptive gradient clipping: each output unit by the size of its own weights.

    The gradient of every row is scaled down to ``clipping`` times
    :math:`\max(\|w_i\|, 10^{-3})`. Rows of a stacked LSTM weight are units of a gate; a
    vector is one unit. Not meant for the last layer: leave it out of ``parameters``.
    The one clipper here that changes the gradient's direction.

    Args:
        clipping: Largest ratio of a row's gradient to its weights.
        patience: As for :class:`Clipper`.

    References:
        Brock et al. (2021), arXiv:2102.06171.
    """

    def __init__(self, clipping: float = 0.01, *, patience: int | None = 10) -> None:
        self.clipping = _positive("clipping", clipping)
        super().__init__(patience=patience)

    def _limit(self, norm: float) -> float:
        return math.nan  # each unit has its own

    def _learn(self, norm: float, let_through: float) -> None:
        pass  # the limits are those of the weights

    def _act(
        self, held: Sequence[Held], norm: float, scale: float
    ) -> tuple[float, float]:
        grads = []
        huge = norm * scale > _HUGE
        for one in held:
            if one.grad.is_sparse:
                one.param.grad = one.grad.to_dense()
            grad = one.param.grad
            assert grad is not None
            weights = _unit_norms(one.param)
            least = torch.full_like(weights, _LEAST)
            limits = scale * self.clipping * torch.fmax(weights, least)  # NaN: least
            units = _unit_norms(grad, torch.float64 if huge else None)
            factors = (limits / units.clamp_min(_TINY)).clamp_max(1.0)
            if factors.dtype == grad.dtype:
                grad.mul_(factors)
            else:
                grad.copy_(grad * factors)  # in the wider dtype of the two
            grads.append(grad)
        after = math.hypot(*norms_on_host(grads)) / scale
        return math.nan, min(after / norm, 1.0) if norm else 1.0


_LEAST: Final = 1e-3
"""Weights of a norm below this count as that."""
_TINY: Final = 1e-30
_HUGE: Final = 1e18
"""From this norm on the squares of a row may overflow float32."""


def _unit_norms(tensor: Tensor, wide: torch.dtype | None = None) -> Tensor:
    """Return the norm of each row, in float32 at least; of a vector, of the whole."""
    dtype = wide or torch.promote_types(tensor.dtype, torch.float32)
    axes = tuple(range(1 if tensor.dim() > 1 else 0, tensor.dim()))
    found: Tensor = torch.linalg.vector_norm(
        tensor, dim=axes, keepdim=True, dtype=dtype
    )
    return found
