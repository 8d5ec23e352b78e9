"""The hooks of one recurrent module. They look, and only on sampled steps.

No full backward hook: it forbids in-place operations on the module's output and warns
where an input needs no gradient. The forward hook puts tensor hooks on what the module
returned; a gradient that reaches one of them makes the call count.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from gradwatch import _torch
from gradwatch.health import Guard
from gradwatch.observe.capture import Capture
from gradwatch.observe.rows import given_states, take_rows, tensors
from gradwatch.recurrent import shape_of, used_weights


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

    __slots__ = ("name",)

    def __init__(self, probe: Probe, name: str) -> None:
        super().__init__(probe)
        self.name = name

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Show the computed weight to the probe."""
        self.probe.on_weight(self.name, output)


class RngHook(_Inert):
    """Notes the state of the generator that dropout between layers draws from."""

    __slots__ = ()

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Tell the probe that the module is about to run."""
        self.probe.before_forward(module)


class Wanted(NamedTuple):
    """What a forward now has to show: the weights, and a few of its sequences."""

    weights: bool
    rows: bool


class Probe:
    """Owns the hooks of one nn.RNNBase or nn.RNNCellBase.

    Args:
        module: The module to look at.
        owner: Whoever is to live as long as the module's hooks: the watch.
        wanted: Tells what a forward now is to show.
        samples: How many sequences are looked at; None for all.
        guard: Absorbs and reports what fails in the probe's own work.
    """

    def __init__(
        self,
        module: nn.Module,
        owner: object,
        *,
        wanted: Callable[[], Wanted],
        samples: int | None,
        guard: Guard,
    ) -> None:
        self.owner: object = owner
        self.module = weakref.ref(module)
        self.closed = False
        self.calls = 0
        self._wanted, self._samples, self._guard = wanted, samples, guard
        self._reached: list[Capture] = []
        self._captures: weakref.WeakSet[Capture] = weakref.WeakSet()
        self._by_state: dict[_States, weakref.ref[Capture]] = {}
        self._copied: tuple[object, dict[str, Tensor]] = (None, {})
        self._computed: dict[str, Tensor] = {}
        self._rng: Tensor | None = None
        self._handles = [
            module.register_forward_hook(ForwardHook(self), with_kwargs=True)
        ]
        if isinstance(module, nn.RNNCellBase):
            made = getattr(module, "parametrizations", {})
            for name in made:
                hook = WeightHook(self, name)
                self._handles.append(made[name].register_forward_hook(hook))
        elif getattr(module, "num_layers", 1) > 1 and getattr(module, "dropout", 0):
            self._handles.append(module.register_forward_pre_hook(RngHook(self)))

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
        for capture in list(self._captures):
            capture.release()
        self._reached.clear()
        self._by_state.clear()
        self._copied[1].clear()
        self._copied = (None, {})
        self._computed.clear()
        self._rng = None
        self.calls = 0

    def take(self) -> list[Capture]:
        """Return the longest chain of calls that gradients reached since the last one.

        Returns:
            The calls in their order; empty where no gradient has reached any.
        """
        reached = list(self._reached)
        self._reached.clear()
        followed = {id(capture.previous) for capture in reached}
        longest: list[Capture] = []
        steps = -1
        for end in reached:
            if id(end) in followed:
                continue
            chain = [end]
            while (before := chain[-1].previous) is not None:
                chain.append(before)
            length = sum(c.shape[0] for c in chain if c.shape is not None)
            if length > steps:
                longest, steps = chain, length
        return longest[::-1]

    def on_weight(self, name: str, output: object) -> None:
        """Note a parametrized weight of a cell."""
        if not self.closed and isinstance(output, Tensor) and self._wanted().weights:
            self._computed[name] = output.detach()

    def before_forward(self, module: nn.Module) -> None:
        """Keep the generator's state where dropout is about to draw from it."""
        self._rng = None
        if self.closed or not module.training or not torch.is_grad_enabled():
            return
        with self._guard:
            if self._wanted().rows:
                self._rng = torch.get_rng_state()

    def on_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any
    ) -> None:
        """Look at one call; the only thing done on an unsampled step is to ask."""
        if self.closed or not torch.is_grad_enabled():
            return
        wanted = self._wanted()
        if not wanted.weights:
            return
        with self._guard:
            self.calls += 1
            heads = [t for t in tensors(output) if t.requires_grad]
            if not heads or not all(map(_torch.holds_values, heads)):
                return
            given = args[0] if args else kwargs.get("input")
            capture = Capture(
                weights=self._copies(module, recurrent_only=not wanted.rows),
                shape=shape_of(module, given),
                dtype=str(heads[0].dtype).removeprefix("torch."),
            )
            if wanted.rows:
                self._look(capture, module, given, given_states(args, kwargs), output)
            self._captures.add(capture)
            on_grad = _OnGrad(self, capture)
            for head in heads:
                head.register_hook(on_grad)

    def _look(
        self,
        capture: Capture,
        module: nn.Module,
        given: object,
        states: tuple[Tensor, ...],
        output: object,
    ) -> None:
        """Copy a few sequences of a call, and find the call that it goes on from."""
        rng, self._rng = self._rng, None
        capture.rows = take_rows(
            module, given, states, output, count=self._samples, rng=rng
        )
        if isinstance(given, PackedSequence) or getattr(module, "bidirectional", False):
            return  # a reverse direction begins anew in each call
        if states and all(s.requires_grad for s in states):
            before = self._by_state.get(_identity(states))
            capture.previous = before() if before is not None else None
        if isinstance(module, nn.RNNCellBase):
            returned = tuple(tensors(output))
        else:
            returned = tuple(tensors(output))[1:]
        capture.states = tuple(s.detach() for s in returned)
        self._by_state[_identity(returned)] = weakref.ref(capture)

    def _copies(self, module: nn.Module, *, recurrent_only: bool) -> dict[str, Tensor]:
        """Copy the weights, once for all the calls that use the same ones."""
        weights = self._computed | used_weights(module, recurrent_only=recurrent_only)
        used = tuple((n, w.data_ptr(), w._version) for n, w in weights.items())
        if self._copied[0] != used:
            self._copied = (used, {n: w.clone() for n, w in weights.items()})
        return self._copied[1]

    def reached(self, capture: Capture) -> None:
        """Take note that a gradient reached a call."""
        if not self.closed and not capture.reached:
            capture.reached = True
            if capture.weights:  # else the graph has outlived the step
                self._reached.append(capture)


_States = tuple[tuple[int, int, torch.Size], ...]


def _identity(states: tuple[Tensor, ...]) -> _States:
    """Tell states apart by their memory, and by whether it was written since."""
    return tuple((s.data_ptr(), s._version, s.shape) for s in states)


class _OnGrad:
    """A tensor hook; the graph that holds it may outlive the probe."""

    __slots__ = ("capture", "probe")

    def __init__(self, probe: Probe, capture: Capture) -> None:
        self.probe = probe
        self.capture = capture

    def __call__(self, grad: Tensor) -> None:
        self.probe.reached(self.capture)
