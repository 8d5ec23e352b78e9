"""The flight recorder: the last good state, and the step that was not.

Before an optimizer moves anything its gradients are looked at. Where all are finite,
the state is kept every so many steps; where one is not, what that step was made of is
written beside the incident: weights, the arguments of the model's forward, and the
random numbers at its start. A failure in here is reported; the training goes on.
"""

from __future__ import annotations

import io
import math
import os
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradwatch import _torch
from gradwatch.hooks import calls, every_step
from gradwatch.recorder.state import (
    State,
    as_tensors,
    digest,
    moved_to_cpu,
    randomness,
    size_of,
)
from gradwatch.trees import tensors_in

FORMAT: Final = 1
"""Version of a recording."""
MOST: Final = 3
"""Recordings of a run, at most; and how often it may be rolled back."""
_OUTPUTS: Final = 8
"""Tensors of a forward's output whose gradient is kept, at most."""


@dataclass
class Forward:
    """What is kept of the last call of the model's forward, until the next.

    Attributes:
        args: Its arguments; the objects themselves.
        kwargs: Likewise, by name.
        randomness: The states of the random number generators as it began.
        autocast: Device type -> the type that autocast computed in.
        training: Path of each module -> whether it was in training mode.
        grads: The gradients that have arrived at its outputs, in their order.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    randomness: Mapping[str, Any] = field(default_factory=dict)
    autocast: Mapping[str, torch.dtype] = field(default_factory=dict)
    training: Mapping[str, bool] = field(default_factory=dict)
    grads: dict[int, Tensor] = field(default_factory=dict)


class Recorder:
    """Keeps the last good state of one model, and writes the step that broke it.

    Args:
        model: The model; not kept alive.
        every: Steps between two states that are kept.
        folder: The run folder; None: nothing is written.
        number: Returns the number of the open step.
        say: Told what was written, and what could not be.
        rolls_back: Whether a gradient that is not finite is answered by
            :meth:`roll_back`.
        rolled_back: Told the step before which the state was kept that was put back.
        scaler: The GradScaler, where it cannot be found.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int,
        *,
        folder: Path | None,
        number: Callable[[], int],
        say: Callable[[str], None],
        rolls_back: bool = False,
        rolled_back: Callable[[int], object] = lambda step: None,
        scaler: Any = None,
    ) -> None:
        self._model, self._every = weakref.ref(model), every
        self._folder, self._number, self._say = folder, number, say
        self._rolls_back, self._rolled_back = rolls_back, rolled_back
        self._scaler = scaler
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._ids = {id(p) for p in self._parameters}
        self._optimizers: list[weakref.ref[Optimizer]] = []
        self._forward: Forward | None = None
        self._begun: Forward | None = None
        self._state: State | None = None
        self._written = self.times = 0
        self._bad_step, self._good = -1, True
        self._failed = 0
        self.sees = True  # each call, as calls.Seeing has it
        calls.attach(model, self)
        every_step.add(self)

    def close(self) -> None:
        """Look no more, and let go of all that is kept."""
        if (model := self._model()) is not None:
            calls.detach(model, self)
        every_step.remove(self)
        self.sees = False
        self._forward = self._begun = self._state = None

    @property
    def step(self) -> int | None:
        """The step before which the last good state was kept; None before the first."""
        return None if self._state is None else self._state.step

    @property
    def size(self) -> int:
        """Bytes of the state that is kept."""
        return 0 if self._state is None else self._state.size

    # ---- what the model does

    def before_forward(self, module: nn.Module) -> None:
        """The model's forward begins; an evaluation is left out."""
        if torch.is_grad_enabled():
            self._absorbing(self._begins, module)

    def _begins(self, module: nn.Module) -> None:
        autocast = {
            kind: torch.get_autocast_dtype(kind)
            for kind in ("cpu", "cuda")
            if torch.is_autocast_enabled(kind)
        }
        training = {name: part.training for name, part in module.named_modules()}
        self._begun = Forward(
            randomness=randomness(), autocast=autocast, training=training
        )

    def on_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any
    ) -> None:
        """The model's forward has returned."""
        if self._begun is not None and torch.is_grad_enabled():
            self._absorbing(self._returned, args, kwargs, output)

    def _returned(self, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
        seen, self._begun = self._begun, None
        assert seen is not None
        seen.args, seen.kwargs = args, dict(kwargs)
        self._forward = seen
        for place, tensor in enumerate(tensors_in(output)[:_OUTPUTS]):
            if tensor.requires_grad:
                tensor.register_hook(_keeping(seen.grads, place))

    # ---- what the optimizers do

    def begins(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """An optimizer is about to move the weights."""
        self._absorbing(self._looked_at, optimizer)

    def ended(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """An optimizer has stepped."""

    def _looked_at(self, optimizer: Optimizer) -> None:
        given = [p for g in optimizer.param_groups for p in g["params"]]
        if not any(id(p) in self._ids for p in given):
            return
        if all(ref() is not optimizer for ref in self._optimizers):
            self._optimizers.append(weakref.ref(optimizer))
        if self._scaler is None:
            self._scaler = _torch.calling_scaler()
        step = self._number()
        if self._finite():
            self._good = True
            due = self._state is None or step >= self._state.step + self._every
            if due and step != self._bad_step and (model := self._model()) is not None:
                self._state = State.of(step, model, self._living(), self._scaler)
            return
        if _torch.refuses_inf(optimizer):
            return  # a loss scaler has overflown, and no weight will move
        if self._good:  # else it is the wreck of an earlier step
            self._good, self._bad_step = False, step
            self._write(step)
        if self._rolls_back and self._may_roll_back:
            self.roll_back()

    def _living(self) -> list[Optimizer]:
        return [found for ref in self._optimizers if (found := ref()) is not None]

    def _finite(self) -> bool:
        """Tell whether all gradients are; one number is waited for on each device."""
        alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for parameter in self._parameters:
            if (grad := parameter.grad) is not None:
                grad = grad.coalesce().values() if grad.is_sparse else grad
                alike.setdefault((grad.device, grad.dtype), []).append(grad)
        with torch.no_grad():
            for grads in alike.values():
                total = torch.stack(torch._foreach_norm(grads)).sum().item()
                if not math.isfinite(total):  # or the square was beyond the type
                    return all(bool(g.isfinite().all()) for g in grads)
        return True

    # ---- the recording

    def _write(self, step: int) -> None:
        model = self._model()
        if self._folder is None or self._written >= MOST or model is None:
            return
        self._written += 1
        named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        content: dict[str, Any] = {
            "format": FORMAT,
            "step": step,
            "torch": str(torch.__version__),
            "weights": moved_to_cpu(dict(model.state_dict())),
            "nonfinite": [n for n, g in named.items() if not bool(g.isfinite().all())],
            "digests": {n: digest(g) for n, g in named.items()},
        }
        seen = self._forward
        if seen is not None:
            content |= {
                "randomness": as_tensors(seen.randomness),
                "autocast": dict(seen.autocast),
                "training": dict(seen.training),
                "grads": moved_to_cpu(seen.grads),
            }
            try:
                args = moved_to_cpu((seen.args, dict(seen.kwargs)))
                torch.save(args, io.BytesIO())
                content["arguments"] = args
            except Exception as error:
                why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                content["without"] = why
                self._say(f"the batch of step {step} cannot be kept ({why}).")
        path = self._folder / "incidents" / f"{step}-nonfinite.pt"
        path.parent.mkdir(exist_ok=True)
        part = path.with_suffix(".part")
        try:
            torch.save(content, part)
            os.replace(part, path)
        except (OSError, RuntimeError) as error:
            part.unlink(missing_ok=True)
            said = str(error).splitlines()[0]
            self._say(f"step {step} cannot be recorded in {path} ({said}).")
            return
        self._say(
            f"step {step} is recorded in {path}: gradwatch.reproduce finds out why"
        )

    # ---- the way back

    @property
    def _may_roll_back(self) -> bool:
        return self._state is not None and self.times < MOST

    def roll_back(self) -> int:
        """Put model, optimizers, scaler and random numbers back to the last good state.

        The gradients are dropped: an optimizer that was about to use them does nothing.

        Returns:
            The step before which that state was kept.

        Raises:
            RuntimeError: If there is none, or it was done as often as is allowed.
        """
        model = self._model()
        if self._state is None or model is None:
            raise RuntimeError(
                "no good state has been kept yet; it is, from the first step on whose "
                "gradients are finite."
            )
        if self.times >= MOST:
            raise RuntimeError(
                f"this run was rolled back {MOST} times already, and goes on failing: "
                "more of the same would not help. Look at what was recorded with "
                "gradwatch.reproduce."
            )
        self.times += 1
        self._state.put_back(model, self._living(), self._scaler)
        self._rolled_back(self._state.step)
        return self._state.step

    def _absorbing(self, act: Callable[..., None], *args: Any) -> None:
        """Do something; report what it raises, and after three times do no more."""
        if self._failed >= MOST:
            return
        try:
            act(*args)
        except Exception as error:
            self._failed += 1
            off = "; it is off now" if self._failed >= MOST else ""
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            self._say(f"the flight recorder failed ({said}){off}.")


def _keeping(kept: dict[int, Tensor], place: int) -> Callable[[Tensor], None]:
    """Return a hook that keeps a gradient, and changes nothing."""

    def keep(grad: Tensor) -> None:
        kept[place] = grad.detach()

    return keep


def greeting(model: nn.Module, every: int) -> str:
    """Return what a recorder costs, in words."""
    size = size_of([*model.parameters(), *model.buffers()]) / 1e6
    return (
        f"flight recorder: a state every {every} steps ({size:.3g} MB of weights, and "
        "what the optimizer holds), the last batch, one synchronisation a step"
    )
