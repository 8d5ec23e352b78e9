"""What all clippers share: the refusal of broken gradients, the counts, the hook.

A gradient that holds NaN or Inf reaches neither the weights nor the statistics. The
step is refused: every gradient becomes None, so that any optimizer leaves weights and
moments as they are.
"""

from __future__ import annotations

import logging
import math
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import torch
from torch.optim import LBFGS, Optimizer

from gradwatch import _torch, console, saved
from gradwatch.clip.gradients import (
    Held,
    Name,
    Parameters,
    named,
    norms_on_host,
    of_optimizer,
    scale_,
    with_gradient,
)
from gradwatch.record import printable

KEPT: Final = 1000
"""How many norms a clipper remembers."""
_NAMED: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipResult:
    """What a clipper did to the gradients of one step.

    Attributes:
        norm: L2 norm of all gradients before; NaN or Inf where one holds such.
        threshold: The largest norm that was let through; Inf while a statistic warms
            up, NaN for AGC, which has one for each unit.
        ratio: Norm after over norm before, in [0, 1]; 0 where the step was refused.
        nonfinite: Names, or positions, of the tensors that hold NaN or Inf.
        skipped: Whether the step was refused; every gradient is None then.
    """

    norm: float
    threshold: float
    ratio: float
    nonfinite: tuple[Name, ...] = ()
    skipped: bool = False


class Attached:
    """A clipper at work before each step of an optimizer; ``remove()`` ends that."""

    def __init__(self, clipper: Clipper, handle: Any) -> None:
        self._clipper: weakref.ref[Clipper] | None = weakref.ref(clipper)
        self._handle = handle

    def remove(self) -> None:
        """Take the clipper off the optimizer. Safe to call twice."""
        self._handle.remove()
        clipper = None if self._clipper is None else self._clipper()
        self._clipper = None  # it may be attached again since
        if clipper is not None:
            clipper._attached_to = None


@dataclass(slots=True, kw_only=True)
class ClipperState:
    """What every clipper saves.

    Attributes:
        steps: Steps so far.
        clipped: Those that were clipped.
        refused: Those that were refused.
        in_row: Consecutive ones that were refused.
        norms: The last norms.
        carried: What carried norms that were clipped.
    """

    steps: int
    clipped: int
    refused: int
    in_row: int
    norms: list[float]
    carried: dict[str, Any]


class Clipper(ABC):
    """Clips the gradients of one optimizer's parameters, and refuses broken ones.

    On an accelerator every step waits once, for the norms: whether to refuse is decided
    on the host.

    Args:
        patience: The refusal of so many consecutive steps raises; None: never. Under a
            GradScaler refused steps are expected, and counted for this only once its
            scale has fallen to 1.
    """

    _saved_as: ClassVar[type[ClipperState]] = ClipperState

    def __init__(self, *, patience: int | None = 10) -> None:
        if patience is not None and patience < 1:
            raise ValueError(f"patience is {patience}; expected 1 or more, or None.")
        self.patience = patience
        self._attached_to: weakref.ref[Optimizer] | None = None
        self.reset()

    def reset(self) -> None:
        """Forget all norms and counts, as after a change of model or task."""
        self.steps = self.clipped = self.refused = self._in_row = 0
        self._norms: deque[float] = deque(maxlen=KEPT)
        self._threshold = math.inf
        self._carried: dict[str, float] = {}

    # ---- what each clipper decides

    @abstractmethod
    def _limit(self, norm: float) -> float:
        """Return the largest norm to let through; Inf lets everything through."""

    @abstractmethod
    def _learn(self, norm: float, let_through: float) -> None:
        """Take in the norm of a step, before and after; finite and above 0."""

    def _act(
        self, held: Sequence[Held], norm: float, scale: float
    ) -> tuple[float, float]:
        """Clip; return the threshold, and the norm after over the norm before.

        Args:
            held: The gradients, all of them finite.
            norm: Their norm, over ``scale``.
            scale: What they are still multiplied by.
        """
        limit = self._limit(norm)
        if not norm > limit:
            return limit, 1.0
        scale_([one.grad for one in held], limit / norm)
        return limit, limit / norm

    # ---- what users call

    def clip_(
        self,
        parameters: Parameters,
        *,
        optimizer: Optimizer | None = None,
        scaler: Any = None,
    ) -> ClipResult:
        """Clip the gradients of some parameters in place; call it before the step.

        With a GradScaler call ``scaler.unscale_(optimizer)`` first. Whether that was
        done is checked where both are given, and cannot be known without them.

        Args:
            parameters: Parameters, or ``(name, parameter)`` pairs, then a refusal names
                them. Those without a gradient are passed over.
            optimizer: The optimizer that will step. Broken gradients of any of its
                parameters are then refused too, not of ``parameters`` alone.
            scaler: The GradScaler; needs ``optimizer``.

        Returns:
            What was done.

        Raises:
            TypeError: If ``parameters`` is something else.
            ValueError: If the gradients are still multiplied by the loss scale, or
                ``scaler`` is given without ``optimizer``.
            FloatingPointError: If ``patience`` consecutive steps were refused.
        """
        if scaler is not None:
            _check_unscaled(optimizer, scaler)
        held = with_gradient(named(parameters))
        return self._clip(held, _others(held, optimizer), scaler=scaler)

    def attach(
        self,
        optimizer: Optimizer,
        scaler: Any = None,
        *,
        parameters: Parameters | None = None,
    ) -> Attached:
        """Clip before each step of an optimizer; the training loop stays as it is.

        Nothing is to be done for a GradScaler, fused optimizers included. A closure is
        followed by a clip each time that the optimizer calls it.

        Args:
            optimizer: The optimizer.
            scaler: The GradScaler, where it is not found by itself: it is where
                ``scaler.step(optimizer)`` is used.
            parameters: Which to clip, such as ``model.rnn.parameters()``; None: all of
                the optimizer's. Broken gradients of the others are refused too.

        Returns:
            A handle with ``remove()``.

        Raises:
            TypeError: If ``optimizer`` is no torch.optim.Optimizer.
            ValueError: If this clipper is attached already: its statistics are of one
                optimizer's gradients.
        """
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"attach() got a {type(optimizer).__name__}; expected a "
                "torch.optim.Optimizer. A wrapper's own is often its .optimizer."
            )
        if self._attached_to is not None and self._attached_to() is not None:
            raise ValueError(
                f"this {type(self).__name__} is attached already; make another one for "
                "a second optimizer, or remove() the first handle."
            )
        chosen = None if parameters is None else list(named(parameters))

        def clip(optimizer: Optimizer) -> ClipResult:
            held = with_gradient(of_optimizer(optimizer) if chosen is None else chosen)
            others = [] if chosen is None else _others(held, optimizer)
            # A fused optimizer unscales by itself, later.
            pending = _torch.fused_scale(optimizer)
            scale = 1.0 if pending is None else float(pending)
            return self._clip(
                held, others, scale=scale, scaler=scaler, optimizer=optimizer
            )

        def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
            closure = args[1] if len(args) > 1 else kwargs.get("closure")
            if closure is None:
                clip(optimizer)
                return None

            def clipped() -> Any:
                loss = closure()
                if clip(optimizer).skipped and isinstance(optimizer, LBFGS):
                    return math.inf  # so that a line search turns back from there
                return loss

            if len(args) > 1:
                return (args[0], clipped, *args[2:]), kwargs
            return args, {**kwargs, "closure": clipped}

        handle = optimizer.register_step_pre_hook(hook)
        self._attached_to = weakref.ref(optimizer)
        return Attached(self, handle)

    def state_dict(self) -> dict[str, Any]:
        """Return the statistics and counts, as plain values for a checkpoint."""
        return {
            "kind": type(self).__name__,
            **saved.write(self._saved_as(**self._fields())),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            ValueError: If ``state`` is of another clipper, or something else; nothing
                is changed then.
        """
        kind, own = state.get("kind"), type(self).__name__
        if kind not in (None, own):
            raise ValueError(
                f"the state is of a {kind}; expected what {own}.state_dict() returned."
            )
        plain = {key: value for key, value in state.items() if key != "kind"}
        self._go_on_from(saved.read(self._saved_as, plain, own, saved.UNCHANGED))

    def _fields(self) -> dict[str, Any]:
        """Return the fields of what is saved."""
        return {
            "steps": self.steps,
            "clipped": self.clipped,
            "refused": self.refused,
            "in_row": self._in_row,
            "norms": list(self._norms),
            "carried": dict(self._carried),
        }

    def _go_on_from(self, state: Any) -> None:
        """Take over what was saved."""
        self.steps, self.clipped = state.steps, state.clipped
        self.refused, self._in_row = state.refused, state.in_row
        self._norms = deque(state.norms, maxlen=KEPT)
        self._carried = dict(state.carried)

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle as attached to nothing, without a watch."""
        return {**vars(self), "_attached_to": None, "_watch": None}

    def __repr__(self) -> str:
        """Return quartiles, threshold, share clipped, and what carried the norms."""
        name = type(self).__name__
        if not self.steps:
            return f"{name}: no step yet"
        shown = console.number
        share = 100 * self.clipped / self.steps
        lines = [
            f"{name}: {self.steps:,} steps, {share:.3g} % clipped, "
            f"{self.refused:,} refused"
        ]
        if self._norms:
            quartiles = np.quantile(self._norms, (0.25, 0.5, 0.75)).tolist()
            lines.append(
                f"  norms: quartiles {', '.join(map(shown, quartiles))}, largest "
                f"{shown(max(self._norms))} (last {len(self._norms):,}); threshold "
                f"{shown(self._threshold)}"
            )
        if self._carried:
            whole = sum(self._carried.values())
            heaviest = sorted(self._carried.items(), key=lambda item: -item[1])
            parts = [
                f"{printable(name)} {100 * part / whole:.0f} %"
                for name, part in heaviest[:_NAMED]
            ]
            lines.append(f"  clipped norms carried by: {', '.join(parts)}")
        return "\n".join(lines)

    # ---- one step

    def _clip(
        self,
        held: Sequence[Held],
        others: Sequence[Held],
        *,
        scale: float = 1.0,
        scaler: Any = None,
        optimizer: Optimizer | None = None,
    ) -> ClipResult:
        everything = [*held, *others]
        read = norms_on_host([one.grad for one in everything])
        self.steps += 1
        if not all(map(math.isfinite, read)):
            found = scaler or (None if optimizer is None else _torch.calling_scaler())
            return self._refuse(everything, read, found)
        self._in_row = 0
        own = [value / scale for value in read[: len(held)]]
        norm = math.hypot(*own)
        with torch.no_grad():
            self._threshold, ratio = self._act(held, norm, scale)
        if ratio < 1.0:
            self.clipped += 1
            self._note(held, own, norm)
        if norm > 0:
            self._norms.append(norm)
            self._learn(norm, ratio * norm)
        return ClipResult(norm=norm, threshold=self._threshold, ratio=ratio)

    def _note(self, held: Sequence[Held], own: Sequence[float], norm: float) -> None:
        """Note which parameters carried a norm that was clipped."""
        for one, value in zip(held, own, strict=True):
            name = one.name if isinstance(one.name, str) else f"parameter {one.name}"
            share = (value / norm) ** 2
            self._carried[name] = self._carried.get(name, 0.0) + share

    def _refuse(
        self, everything: Sequence[Held], read: Sequence[float], scaler: Any
    ) -> ClipResult:
        broken = tuple(
            one.name
            for one, value in zip(everything, read, strict=True)
            if not math.isfinite(value)
        )
        for one in everything:
            one.param.grad = None
        self.refused += 1
        expected = scaler is not None and scaler.get_scale() > 1.0
        self._in_row += not expected
        names = [printable(name) for name in broken[:_NAMED]]
        names += ["..."] * (len(broken) > _NAMED)
        what = f"the gradients of {', '.join(names)} hold NaN or Inf"
        if self.patience is not None and self._in_row >= self.patience:
            raise FloatingPointError(
                f"{self._in_row} consecutive steps were refused: {what}. The weights "
                "are as they were before the first of them. Look for the cause with "
                "torch.autograd.set_detect_anomaly(True). To go on regardless, pass "
                "patience=None."
            )
        if self.refused & (self.refused - 1) == 0 and not expected:  # 1, 2, 4, 8, ...
            console.say(f"refused a step: {what} ({self.refused} in all)", _LEVEL)
        return ClipResult(
            norm=math.hypot(*read),
            threshold=self._threshold,
            ratio=0.0,
            nonfinite=broken,
            skipped=True,
        )


_LEVEL: Final = logging.WARNING


def _others(held: Sequence[Held], optimizer: Optimizer | None) -> list[Held]:
    """Return an optimizer's parameters with a gradient that are not held already."""
    if optimizer is None:
        return []
    known = {id(one.param) for one in held}
    found = with_gradient(of_optimizer(optimizer))
    return [one for one in found if id(one.param) not in known]


def _check_unscaled(optimizer: Optimizer | None, scaler: Any) -> None:
    if optimizer is None:
        raise ValueError(
            "scaler= was given without optimizer=; whether gradients were unscaled is "
            "known for an optimizer: clip_(parameters, optimizer=..., scaler=...)."
        )
    stage = _torch.scaler_stage(scaler, optimizer)
    if stage == "READY":
        raise ValueError(
            f"the gradients are still multiplied by the loss scale "
            f"({scaler.get_scale():g}); call scaler.unscale_(optimizer) before "
            "clip_(), or use attach(optimizer), which needs nothing."
        )
    if stage == "STEPPED":
        raise ValueError(
            "scaler.step(optimizer) has run already; clip_() belongs between "
            "scaler.unscale_(optimizer) and scaler.step(optimizer)."
        )
