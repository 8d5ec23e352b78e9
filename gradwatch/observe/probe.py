"""The hooks of one recurrent module. They look, and only on sampled steps.

No full backward hook: it forbids in-place operations on the module's output and warns
where an input needs no gradient. The forward hook puts tensor hooks on what the module
returned; a gradient that reaches one of them makes the call count.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from gradwatch import _torch
from gradwatch.health import Guard
from gradwatch.observe.capture import Capture
from gradwatch.recurrent import recurrent_weights, shape_of


class _Inert:
    """A hook whose copies and pickles do nothing and need no gradwatch to be read."""

    __slots__ = ("probe",)

    def __init__(self, probe: Probe) -> None:
        self.probe = probe

    def __reduce__(self) -> tuple[Any, ...]:
        # The exit of a null context takes any arguments and returns None.
        return getattr, (contextlib.nullcontext(), "__exit__")


class ForwardHook(_Inert):
    """Calls the probe after the module's forward; the model owns the watch by it."""

    __slots__ = ()

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any
    ) -> None:
        """Show the call to the probe."""
        self.probe.on_forward(module, args, kwargs, output)


class WeightHook(_Inert):
    """Notes what a parametrization returned, as computing it again may change it."""

    __slots__ = ()

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Show the computed weight to the probe."""
        self.probe.on_weight(output)


class Probe:
    """Owns the hooks of one nn.RNNBase or nn.RNNCellBase.

    Args:
        module: The module to look at.
        owner: Whoever is to live as long as the module's hooks: the watch.
        armed: Tells whether a forward now belongs to a sampled step.
        guard: Absorbs and reports what fails in the probe's own work.
    """

    def __init__(
        self, module: nn.Module, owner: object, armed: Callable[[], bool], guard: Guard
    ) -> None:
        self.owner: object = owner
        self.module = weakref.ref(module)
        self.closed = False
        self._armed = armed
        self._guard = guard
        self._reached: Capture | None = None
        self._copied: tuple[tuple[tuple[int, int], ...], dict[str, Tensor]] = ((), {})
        self._computed: Tensor | None = None
        self._handles = [
            module.register_forward_hook(ForwardHook(self), with_kwargs=True)
        ]
        if isinstance(module, nn.RNNCellBase):
            made = getattr(module, "parametrizations", {})
            if "weight_hh" in made:
                hook = WeightHook(self)
                self._handles.append(made["weight_hh"].register_forward_hook(hook))

    def close(self) -> None:
        """Take the hooks off and let go of everything. Safe to call twice."""
        self.closed = True
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.owner = None
        self.forget()

    def forget(self) -> None:
        """Let go of what the open step captured."""
        self._reached = self._computed = None
        self._copied[1].clear()  # a graph that the user keeps does not keep the copies
        self._copied = ((), {})

    def take(self) -> Capture | None:
        """Return the call that a gradient reached since the last one, if any."""
        capture, self._reached = self._reached, None
        return capture

    def on_weight(self, output: object) -> None:
        """Note a parametrized weight of a cell."""
        if not self.closed and isinstance(output, Tensor) and self._armed():
            self._computed = output.detach()

    def on_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any
    ) -> None:
        """Look at one call; the only thing done on an unsampled step is to ask."""
        if self.closed or not torch.is_grad_enabled() or not self._armed():
            return
        with self._guard:
            heads = [t for t in _tensors(output) if t.requires_grad]
            if not heads or not all(map(_torch.holds_values, heads)):
                return
            given = args[0] if args else kwargs.get("input")
            capture = Capture(
                weights=self._copies(module),
                shape=shape_of(module, given),
                dtype=str(heads[0].dtype).removeprefix("torch."),
            )
            on_grad = _OnGrad(self, capture)
            for head in heads:
                head.register_hook(on_grad)

    def _copies(self, module: nn.Module) -> dict[str, Tensor]:
        """Copy the weights, once for all the calls that use the same ones."""
        weights = recurrent_weights(module)
        if self._computed is not None and "" not in weights:
            weights[""] = self._computed
        used = tuple((w.data_ptr(), w._version) for w in weights.values())
        if self._copied[0] != used:
            self._copied = (used, {k: w.clone() for k, w in weights.items()})
        return self._copied[1]

    def reached(self, capture: Capture) -> None:
        """Take note that a gradient reached a call; the first of a step is kept."""
        if not self.closed and not capture.reached:
            capture.reached = True
            if self._reached is None:
                self._reached = capture


class _OnGrad:
    """A tensor hook; the graph that holds it may outlive the probe."""

    __slots__ = ("capture", "probe")

    def __init__(self, probe: Probe, capture: Capture) -> None:
        self.probe = probe
        self.capture = capture

    def __call__(self, grad: Tensor) -> None:
        self.probe.reached(self.capture)


def _tensors(output: object) -> Iterator[Tensor]:
    """Yield the tensors that a recurrent module returned, whatever it was made into."""
    if isinstance(output, PackedSequence):
        yield output.data
    elif isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for item in output.values():
            yield from _tensors(item)
    elif isinstance(output, (tuple, list)):
        for item in output:
            yield from _tensors(item)
