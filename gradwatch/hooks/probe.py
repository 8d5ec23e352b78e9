"""What is seen of the calls of one recurrent module.

No full backward hook: it forbids in-place operations on the module's output and warns
where an input needs no gradient. What a call returned gets tensor hooks; a gradient
that reaches one of them makes the call count.
"""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from gradwatch import _torch
from gradwatch.health import Guard
from gradwatch.hooks import calls
from gradwatch.hooks.capture import Capture, Past
from gradwatch.hooks.sequences import Sequences, given_states, take_sequences, tensors
from gradwatch.numerics.through_graph import pulling
from gradwatch.recurrent import shape_of, used_weights


class Wanted(NamedTuple):
    """What a forward now has to show.

    Attributes:
        weights: The weights that it used.
        sequences: What it was given and returned, for a few sequences.
        grads: What backward brings to those.
        address: Where it returns its states: the next step asks whose states it has.
    """

    weights: bool = False
    sequences: bool = False
    grads: bool = False
    address: bool = False


NOTHING: Final = Wanted()
_HELD: Final = 32
"""Calls that are gone, with their graphs, whose states are held to be known again."""


class Returned(NamedTuple):
    """The last states that two calls returned: held, so that their memory stays theirs.

    Attributes:
        before: Of the call before the last.
        last: Of the last one.
        era: Of the last one.
    """

    before: Tensor | None = None
    last: Tensor | None = None
    era: int = -1

    def lies_at(self, state: Tensor) -> bool:
        """Tell whether a state lies where one of these does."""
        held = (self.before, self.last)
        return any(t is not None and t.data_ptr() == state.data_ptr() for t in held)


class Probe:
    """Sees the calls of one nn.RNNBase or nn.RNNCellBase.

    Args:
        module: The module to look at.
        owner: Whoever is to live as long as the module: the watch.
        samples: How many sequences are looked at; None for all.
        guard: Absorbs and reports what fails in the probe's own work.
    """

    def __init__(
        self,
        module: nn.Module,
        owner: object,
        *,
        samples: int | None,
        guard: Guard,
    ) -> None:
        self.owner: object = owner
        self.module = weakref.ref(module)
        self.closed = False
        self.wanted, self.sees = NOTHING, False
        """What a forward now has to show, and whether it is anything."""
        self.called = False
        """Whether one was looked at since the last step of an optimizer."""
        self._samples, self._guard = samples, guard
        self._reached: list[Capture] = []
        self._captures: weakref.WeakSet[Capture] = weakref.WeakSet()
        self._by_state: dict[_States, Past] = {}
        self._copied: _Copied = (None, {}, {})
        self._computed: dict[str, Tensor] = {}
        self._rng: Tensor | None = None
        self._era = 0
        self._begun = 0  # numbers of functions from here on are of the open step
        self._returned = Returned()
        self._tidy_at = 2 * _HELD
        self._alone: list[bool] = []  # of each call: one time step, and no state
        self.on_grad = _torch.OutOfGraphs(self.reached)
        self._draws = bool(
            getattr(module, "num_layers", 1) > 1 and getattr(module, "dropout", 0)
        )
        self._given: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._shown: _Shown | None = None
        self._taking: Any = None
        made = getattr(module, "parametrizations", {})
        cell = isinstance(module, nn.RNNCellBase)
        self._weights_seen = [
            _Weight(self, name, made[name]) for name in (made if cell else ())
        ]
        try:
            self._attach()
        except BaseException:
            self.close()
            raise

    def _attach(self) -> None:
        """See the calls; again, where the module was compiled meanwhile."""
        module = self.module()
        if module is not None:
            calls.attach(module, self)
        for weight in self._weights_seen:
            weight.attach()

    def close(self) -> None:
        """See no call any more and let go of everything. Safe to call twice."""
        self.closed, self.owner = True, None
        with ExitStack() as each:  # all of it, even if one part fails
            each.callback(self.let_go)
            for weight in self._weights_seen:
                each.callback(weight.close)
            if (module := self.module()) is not None:
                each.callback(calls.detach, module, self)
        self._weights_seen.clear()

    def let_go(self) -> None:
        """Keep nothing of what was seen, and look at no call until asked to."""
        self._want(NOTHING)
        self._take_no_more()
        for capture in list(self._captures):
            capture.release()
        self._captures.clear()
        self.forget()

    def expect(self, wanted: Wanted) -> None:
        """Have a forward from now on show what is wanted."""
        if self.closed:
            return
        self._want(wanted)
        if wanted is not NOTHING:
            with self._guard:
                self._attach()

    def _want(self, wanted: Wanted) -> None:
        self.wanted, self.sees = wanted, wanted is not NOTHING
        for weight in self._weights_seen:
            weight.sees = self.sees

    def ended(self) -> None:
        """Note that a backward pass has ended: later calls are told apart."""
        self._era += 1

    def used(self) -> None:
        """Note that an optimizer has stepped: later calls are told apart."""
        self._era += 1
        self.called = False
        self._begun = _torch.next_function()

    def forget(
        self, task: int = -1, *, states: tuple[bool, bool] = (False, False)
    ) -> bool:
        """Let go of what was seen of a step that is over.

        What was called since its last backward pass or optimizer is of the next step.
        Calls that no gradient has reached wait for a backward pass of their own, and
        die with the graph that holds them.

        Args:
            task: A backward pass of the next step, whose calls are kept.
            states: Whether the next step, and the one after it, are to know whose
                states they are given.

        Returns:
            Whether anything is left.
        """
        for capture in list(self._captures):
            old = capture.era < self._era and (capture.task != task or task == -1)
            if old and capture.reached:
                capture.release()
        self._reached = [c for c in self._reached if c.weights]
        waiting = {id(c) for c in self._captures if c.weights}
        self._by_state = {
            key: past
            for key, past in self._by_state.items()
            if past.era == self._era or id(past.call) in waiting
        }
        for past in self._by_state.values():
            past.forget_before(self._era)
        if not waiting:
            self._copied = (None, {}, {})
        self._computed.clear()
        self._alone.clear()
        self._rng = None
        if not states[self._returned.era == self._era]:
            self._returned = Returned()
        return bool(waiting or self._by_state)

    def take(self) -> list[Capture]:
        """Return the longest chain of calls that gradients reached since the last one.

        Returns:
            The calls in their order; empty where no gradient has reached any.
        """
        reached, self._reached = self._reached, []
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
            capture.stop_looking()
        if longest and len(self._alone) > 1 and all(self._alone):
            longest[0].apart = len(self._alone)
        self._alone.clear()
        return longest[::-1]

    # ---- a call

    def on_weight(self, name: str, output: object) -> None:
        """Note a parametrized weight of a cell."""
        with self._guard:
            asked = self.wanted.weights and torch.is_grad_enabled()
            if asked and isinstance(output, Tensor):
                self._computed[name] = output.detach()

    def before_forward(self, module: nn.Module) -> None:
        """Keep the generator's state where dropout is about to draw from it.

        Where the module's own hooks may change its arguments, or put a part of its
        weights in their place after the call, they are taken between those hooks, for
        this one call.
        """
        with self._guard:
            self._take_no_more()
            drawn = self._draws and self.wanted.sequences and module.training
            drawn = drawn and torch.is_grad_enabled()
            self._rng = torch.get_rng_state() if drawn else None
            if _torch.changes_arguments(module):
                self._taking = module.register_forward_hook(
                    self._take, with_kwargs=True, prepend=True
                )

    def _take(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._given = (args, kwargs)
        if self.wanted.weights and torch.is_grad_enabled():
            with self._guard:
                self._shown = self._weights(module)

    def _take_no_more(self) -> None:
        self._given = self._shown = None
        if self._taking is not None:
            taking, self._taking = self._taking, None
            taking.remove()

    def on_forward(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        """Look at one call, as far as that is wanted."""
        with self._guard:
            args, kwargs = self._given or (args, kwargs)
            shown = self._shown
            self._take_no_more()
            if torch.is_grad_enabled():
                self._look(module, args, kwargs, tuple(tensors(output)), shown)

    def _look(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        returned: tuple[Tensor, ...],
        shown: _Shown | None,
    ) -> None:
        before, wanted = self._returned, self.wanted
        heads = [t for t in returned if _torch.holds_values(t)]
        last = heads[-1].detach() if heads else None
        self._returned = Returned(before.last, last, self._era)
        if not wanted.weights:
            return
        self.called = True
        if self._reached and _torch.graph_task_id() == -1:
            for capture in self._reached:  # nobody took them after their backward
                capture.release()
            self._reached.clear()
        heads = [t for t in returned if t.requires_grad and not t.is_leaf]
        if not heads or not all(map(_torch.holds_values, heads)):
            return
        shown = shown or self._weights(module)
        capture = self._captured(module, args, kwargs, returned, before, shown)
        self._captures.add(capture)
        names = "hc" if isinstance(module, nn.RNNCellBase) else "yhc"
        for name, head in zip(names, returned, strict=False):
            if head.requires_grad and not head.is_leaf:
                head.register_hook(OnGrad(self, capture, name))

    def _captured(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        returned: tuple[Tensor, ...],
        before: Returned,
        shown: _Shown,
    ) -> Capture:
        """Return a call as it is kept, joined to the one that it goes on from."""
        wanted, given = self.wanted, args[0] if args else kwargs.get("input")
        weights, used = shown
        shape, sequences, past = shape_of(module, given), None, None
        states = given_states(args, kwargs) if wanted.sequences else ()
        passes = all(map(_passes_gradient, states))
        cut = not any(map(_passes_gradient, states))
        # A reverse direction starts again in each call.
        goes_on = not isinstance(given, PackedSequence) and not getattr(
            module, "bidirectional", False
        )
        if wanted.sequences:
            rng, self._rng = self._rng, None
            sequences = take_sequences(
                module,
                given,
                states,
                returned,
                count=self._samples,
                rng=rng,
                carried=bool(states) and cut and before.lies_at(states[-1]),
            )
            if goes_on and states:
                past = self._by_state.get(_identity(states))
            self._alone.append(not states and (shape or (0,))[0] == 1)
        own = None
        if wanted.sequences and goes_on:
            own = self._kept(module, shape, returned, past)
        head = next(t for t in returned if t.requires_grad and not t.is_leaf)
        capture = Capture(
            weights=weights,
            used=used,
            shape=shape,
            dtype=_name(head.dtype),
            autocast=_autocast(head.device.type),
            era=self._era,
            evaluating=not module.training,
            graph_kept=any(_torch.made_before(s, self._begun) for s in states),
            sequences=sequences,
            wants_grads=wanted.grads and isinstance(sequences, Sequences),
            previous=past.call if past is not None and passes else None,
            cut_from=past if past is not None and cut else None,
            own=own,
        )
        if own is not None:
            own.belongs_to(capture)
        return capture

    def _kept(
        self,
        module: nn.Module,
        shape: tuple[int, int] | None,
        returned: tuple[Tensor, ...],
        before: Past | None,
    ) -> Past:
        """Keep what the next call is known by that goes on from this one."""
        states = returned if isinstance(module, nn.RNNCellBase) else returned[1:]
        held = tuple(state.detach() for state in states)
        kept = Past(shape[0] if shape is not None else 0, before, held, self._era)
        kept.fold()
        if before is not None:
            before.fold()
        self._by_state[_identity(states)] = kept
        if len(self._by_state) > self._tidy_at:
            self._tidy()
        return kept

    def _tidy(self) -> None:
        """Forget all but the last calls that are gone: nobody trains on them."""
        gone = [key for key, past in self._by_state.items() if past.call is None]
        for key in gone[:-_HELD]:
            del self._by_state[key]
        self._tidy_at = 2 * max(len(self._by_state), _HELD)

    def _weights(self, module: nn.Module) -> _Shown:
        """Return copies of the weights, once for all calls that use the same ones."""
        own = used_weights(module, recurrent_only=not self.wanted.sequences)
        weights = self._computed | own
        # By the era, too: fully_shard writes others into the same memory unseen.
        marks = ((n, w.data_ptr(), w._version) for n, w in weights.items())
        used = (self._era, *marks)
        if self._copied[0] != used:
            self._copied = (used, {n: w.clone() for n, w in weights.items()}, weights)
        return self._copied[1:]

    def reached(self, capture: Capture, name: str, grad: Tensor) -> None:
        """Note that a gradient reached one of a call's outputs."""
        if self.closed:
            return
        with self._guard:
            if capture.look(name, grad, _torch.graph_task_id()):
                self._reached.append(capture)


class _Weight:
    """Sees what a parametrization returns, as computing it again may change it."""

    def __init__(self, probe: Probe, name: str, made: nn.Module) -> None:
        self._probe, self._name, self._made = probe, name, weakref.ref(made)
        self.sees = False

    def attach(self) -> None:
        """See the calls."""
        if (made := self._made()) is not None:
            calls.attach(made, self)

    def close(self) -> None:
        """See them no more."""
        if (made := self._made()) is not None:
            calls.detach(made, self)

    def before_forward(self, module: nn.Module) -> None:
        """Nothing is to be known before."""

    def on_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any
    ) -> None:
        """Show the computed weight to the probe."""
        self._probe.on_weight(self._name, output)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _autocast(device: str) -> str:
    """Return the type that autocast computes in on a device now; empty where off."""
    on = torch.is_autocast_enabled(device)
    return _name(torch.get_autocast_dtype(device)) if on else ""


_States = tuple[tuple[int, int, torch.Size], ...]
_Shown = tuple[dict[str, Tensor], dict[str, Tensor]]
"""Copies of the weights that a call has used, and themselves."""
_Copied = tuple[object, dict[str, Tensor], dict[str, Tensor]]
"""By what weights are known again, their copies, and themselves: held, so that their
memory is given to no other while it is compared."""


def _passes_gradient(state: Tensor) -> bool:
    """Tell whether a gradient goes on from a state to the call that made it."""
    return state.requires_grad and not state.is_leaf


def _identity(states: tuple[Tensor, ...]) -> _States:
    """Tell states apart by their memory, and by whether it was written since."""
    return tuple((s.data_ptr(), s._version, s.shape) for s in states)


class OnGrad:
    """A tensor hook; the graph that holds it may outlive the probe."""

    __slots__ = ("call", "name", "probe")
    __torch_unserializable__ = True
    """Saving a tensor leaves this hook out, and is not warned of."""

    def __init__(self, probe: Any, call: Any, name: Any) -> None:
        self.probe = probe
        self.call = call
        self.name = name

    def __call__(self, grad: Tensor | None) -> None:
        """Pass a gradient on."""
        if grad is not None and not pulling():  # None: nothing comes here
            self.probe.on_grad(self.call, self.name, grad)
