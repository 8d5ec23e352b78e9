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
from gradwatch.observe.capture import Capture, Past
from gradwatch.observe.rows import Rows, given_states, take_rows, tensors
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
    """What a forward now has to show.

    Attributes:
        weights: The weights that it used.
        rows: What it was given and returned, for a few sequences.
        grads: What backward brings to those.
        address: Where it returns its states: the next step asks whose states it has.
    """

    weights: bool
    rows: bool
    grads: bool = False
    address: bool = False


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
        self._by_state: dict[_States, Past] = {}
        self._copied: _Copied = (None, {}, {})
        self._computed: dict[str, Tensor] = {}
        self._rng: Tensor | None = None
        self._returned: tuple[Tensor | None, Tensor | None] = (None, None)
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
        self.forget(everything=True)

    def forget(self, *, everything: bool = False) -> None:
        """Let go of what the open step captured.

        Args:
            everything: Also of calls that no gradient has reached: else they wait for
                a backward of their own, and die with the graph that holds them.
        """
        for capture in list(self._captures):
            if everything or capture.reached:
                capture.release()
        self._reached.clear()
        self._by_state.clear()
        self._copied = (None, {}, {})
        self._computed.clear()
        self._rng = None
        self.calls = 0
        if everything:
            self._returned = (None, None)

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
        for capture in reached:
            capture.wants_grads = False
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
        if not wanted.weights and not wanted.address:
            self._returned = (None, None)
            return
        with self._guard:
            before = self._returned
            heads = [t for t in tensors(output) if _torch.holds_values(t)]
            self._returned = (before[1], heads[-1].detach() if heads else None)
            if not wanted.weights:
                return
            self.calls += 1
            if self._reached and _torch.graph_task_id() == -1:
                self._drop_reached()  # nobody took them after their backward
            heads = [t for t in tensors(output) if t.requires_grad and not t.is_leaf]
            if not heads or not all(map(_torch.holds_values, heads)):
                return
            given = args[0] if args else kwargs.get("input")
            capture = Capture(
                shape=shape_of(module, given),
                dtype=_name(heads[0].dtype),
                autocast=_autocast(heads[0].device.type),
            )
            self._copy_weights(capture, module, recurrent_only=not wanted.rows)
            if wanted.rows:
                states = given_states(args, kwargs)
                self._look(capture, module, given, states, output)
                carried = bool(states) and _lies_at(states[-1], before)
                if carried and isinstance(capture.rows, Rows):
                    capture.rows.carried = not any(map(_passes_gradient, states))
            self._captures.add(capture)
            capture.wants_grads = wanted.grads and isinstance(capture.rows, Rows)
            names = "hc" if isinstance(module, nn.RNNCellBase) else "yhc"
            for name, head in zip(names, tensors(output), strict=False):
                if head.requires_grad and not head.is_leaf:
                    head.register_hook(_OnGrad(self, capture, name))

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
        before = self._by_state.get(_identity(states)) if states else None
        if before is not None and all(map(_passes_gradient, states)):
            capture.previous = before.call()
        elif before is not None and not any(map(_passes_gradient, states)):
            capture.cut_from = before
        steps = capture.shape[0] if capture.shape is not None else 0
        if isinstance(module, nn.RNNCellBase):
            returned = tuple(tensors(output))
        else:
            returned = tuple(tensors(output))[1:]
        held = tuple(s.detach() for s in returned)
        past = Past(weakref.ref(capture), steps, before, held)
        self._by_state[_identity(returned)] = past

    def _copy_weights(
        self, capture: Capture, module: nn.Module, *, recurrent_only: bool
    ) -> None:
        """Copy the weights, once for all the calls that use the same ones."""
        weights = self._computed | used_weights(module, recurrent_only=recurrent_only)
        used = tuple((n, w.data_ptr(), w._version) for n, w in weights.items())
        if self._copied[0] != used:
            self._copied = (used, {n: w.clone() for n, w in weights.items()}, weights)
        capture.weights, capture.used = self._copied[1:]

    def _drop_reached(self) -> None:
        for capture in self._reached:
            capture.release()
        self._reached.clear()

    def reached(self, capture: Capture, name: str, grad: Tensor) -> None:
        """Take note that a gradient reached one of a call's outputs."""
        if capture.wants_grads and not self.closed:
            with self._guard:
                if isinstance(capture.rows, Rows):
                    capture.rows.take_grad(name, grad)
        if not self.closed and not capture.reached:
            capture.reached = True
            if capture.weights:  # else the graph has outlived the step
                self._reached.append(capture)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _autocast(device: str) -> str:
    """Return the type that autocast computes in on a device now; empty where off."""
    on = torch.is_autocast_enabled(device)
    return _name(torch.get_autocast_dtype(device)) if on else ""


_States = tuple[tuple[int, int, torch.Size], ...]
_Copied = tuple[object, dict[str, Tensor], dict[str, Tensor]]
"""By what weights are known again, their copies, and themselves: held, so that their
memory is given to no other while it is compared."""


def _lies_at(state: Tensor, held: tuple[Tensor | None, ...]) -> bool:
    """Tell whether a state lies where one of some tensors lies that are held."""
    return any(t is not None and t.data_ptr() == state.data_ptr() for t in held)


def _passes_gradient(state: Tensor) -> bool:
    """Tell whether a gradient goes on from a state to the call that made it."""
    return state.requires_grad and not state.is_leaf


def _identity(states: tuple[Tensor, ...]) -> _States:
    """Tell states apart by their memory, and by whether it was written since."""
    return tuple((s.data_ptr(), s._version, s.shape) for s in states)


class _OnGrad:
    """A tensor hook; the graph that holds it may outlive the probe."""

    __slots__ = ("capture", "name", "probe")
    __torch_unserializable__ = True
    """Saving a tensor leaves this hook out, and is not warned of."""

    def __init__(self, probe: Probe, capture: Capture, name: str) -> None:
        self.probe = probe
        self.capture = capture
        self.name = name

    def __call__(self, grad: Tensor | None) -> None:
        if grad is not None:  # None: backward passes by, and nothing comes here
            self.probe.reached(self.capture, self.name, grad)
