"""What is seen of a cell of the user's own that is stepped in a loop.

Nobody knows its formulas, and its forward may do what is not to be done twice. So
nothing is run again: at the first gradient that reaches a chain of its calls, while the
graph of all of them is still there, vectors are pulled back along that graph
(:mod:`gradwatch.numerics.through_graph`).
"""

from __future__ import annotations

import time
import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradwatch import _torch
from gradwatch.health import Guard
from gradwatch.hooks import calls
from gradwatch.hooks.probe import NOTHING, OnGrad, Wanted
from gradwatch.hooks.sequences import tensors
from gradwatch.numerics import krylov, through_graph
from gradwatch.numerics.through_graph import joined

VECTORS: Final = 4
"""Random vectors that are sent back from the end of a chain."""
_LONGEST: Final = 10_000
"""Calls without a backward pass that are held; nobody trains on more."""
_NEAR: Final = 64
"""Calls before one among which that is looked for whose state it was given."""
_KRYLOV: Final = 48
"""Largest dimension of the spaces that the radius of a step is found in."""
_LEAST: Final = 1e-30
_ROUNDING: Final = 1e-5
"""Share of a gradient below which what is left of it is rounding."""


@dataclass(slots=True, eq=False)
class Call:
    """One call of a cell, with what it returned in autograd's graph.

    Attributes:
        returned: The tensors that a gradient can reach, each once.
        links: What it was given that earlier calls have returned.
        before: The call before it, where it was given something that may be made from
            what that one returned.
        era: How many backward passes and optimizer steps had ended before it.
        evaluating: Whether the module was in evaluation mode.
    """

    returned: list[Tensor]
    links: list[_Link]
    before: Call | None
    era: int
    evaluating: bool

    def release(self) -> None:
        """Let go of the graph; a hook in it holds this, which no collector sees."""
        self.returned, self.links, self.before = [], [], None


class _Link(NamedTuple):
    """A tensor that a call was given, and which an earlier one has returned.

    Attributes:
        position: Its place among what the call was given.
        source: The earlier call.
        place: Its place among what that one returned.
    """

    position: int
    source: Call
    place: int


@dataclass(slots=True, eq=False)
class Chain:
    """Calls that pass their state on, and what the backward pass has shown of them.

    Attributes:
        calls: In their order.
        places: Which of the tensors that a call returns are its state.
        evaluating: Whether one of them was in evaluation mode.
        shape: How many calls, sequences and entries of the state.
        dtype: Type of the state, such as ``float32``.
        why: Why no gradient could be followed; empty where one could.
        h: The states of a few sequences, shape ``(T, K, S)``.
        totals: Of each step and sequence the squared norm of the total gradient, shape
            ``(B,)``; None where none came.
        direct: The same of what of it does not come through a later step.
        logs: :func:`gradwatch.numerics.through_graph.pulled_back`, of random vectors.
        reach: The same of what the last step that is read gets.
        last: That step.
        mixed: Norm of what a vector of one sequence brings to the others in one step,
            over that of the whole.
        radii: Hessenberg matrices of a few steps, shape ``(N, m + 1, m)``.
        seconds: What it took.
    """

    calls: list[Call]
    places: tuple[int, ...]
    evaluating: bool = False
    shape: tuple[int, int, int] = (0, 0, 0)
    dtype: str = ""
    why: str = ""
    h: Tensor | None = None
    totals: list[Tensor | None] = field(default_factory=list)
    direct: list[Tensor | None] = field(default_factory=list)
    logs: Tensor | None = None
    reach: Tensor | None = None
    last: int = -1
    radii: Tensor | None = None
    mixed: Tensor | None = None
    seconds: float = 0.0
    _states: list[list[Tensor]] = field(default_factory=list)
    _order: list[int] = field(default_factory=list)
    _parts: dict[int, list[Tensor]] = field(default_factory=dict)
    _coming: dict[int, list[Tensor]] = field(default_factory=dict)

    def begin(self, samples: int | None) -> None:
        """Take the states of the calls; say why where they are none.

        Args:
            samples: How many sequences are kept; None for all.
        """
        steps, first = len(self.calls), self.calls[0]
        self.evaluating = any(call.evaluating for call in self.calls)
        self.totals, self.direct = [None] * steps, [None] * steps
        self.shape = (steps, 0, 0)
        try:
            states = [[call.returned[i] for i in self.places] for call in self.calls]
        except IndexError:
            self.why = "its calls return different numbers of tensors"
            return
        shapes = {tuple(part.shape for part in state) for state in states}
        count = {part.shape[0] if part.dim() else 0 for part in states[0]}
        if len(shapes) > 1 or len(count) > 1 or not all(count):
            self.why = "its state changes its shape, or has no axis of sequences"
            return
        hooks = (len(part._backward_hooks or ()) for s in states for part in s)
        if max(hooks) > 1:
            self.why = "hooks of your own on its states would be called once more"
            return
        self._states = states
        self.dtype = str(first.returned[self.places[0]].dtype).removeprefix("torch.")
        [batch] = count
        few = batch if samples is None else min(samples, batch)
        rows = slice(0, batch // few * few, batch // few)
        self.h = torch.stack([joined([part[rows] for part in s]) for s in states])
        self.shape = (steps, batch, self.h.shape[-1])

    def follow(self) -> None:
        """Pull random vectors back over all steps, while the graph of all is there."""
        steps, batch, size = self.shape
        assert self.h is not None
        states = self._states
        self._order = through_graph.order_of(states[-1])
        fixed = torch.Generator().manual_seed(0)  # never the user's
        drawn = torch.randn(VECTORS, batch, size, generator=fixed)
        drawn = drawn.to(self.h.device, self.h.dtype)
        self.logs = through_graph.pulled_back(states, self._order, drawn, steps - 1)
        at = sorted({1, steps // 2, steps - 1})
        self.radii = torch.cat([self._radii(t, drawn[0]) for t in at if 0 < t < steps])
        alone = torch.zeros_like(drawn[0])
        alone[0] = drawn[0, 0]
        found = through_graph.back(states[-1], states[-2], self._order, alone)
        if found is not None and batch > 1:
            whole = torch.linalg.vector_norm(found).clamp_min(_LEAST)
            self.mixed = torch.linalg.vector_norm(found[1:]) / whole

    def follow_read(self, last: int, place: int, grad: Tensor) -> None:
        """Pull back what the last step that is read gets.

        Args:
            last: That step.
            place: The tensor of its state that a gradient has reached first.
            grad: That gradient.
        """
        own = [torch.zeros_like(part) for part in self._states[last]]
        own[place] = grad.detach()
        vector = joined(own)[None]
        self.last = last
        self.reach = through_graph.pulled_back(self._states, self._order, vector, last)

    def _radii(self, t: int, drawn: Tensor) -> Tensor:
        """Return the Hessenberg matrices of one step, of a few sequences."""
        later, earlier = self._states[t], self._states[t - 1]
        assert self.h is not None
        batch, few = self.shape[1], self.h.shape[1]
        rows = slice(0, batch // few * few, batch // few)
        whole = self.h.new_zeros(batch, self.shape[2])

        def apply(vectors: Tensor) -> Tensor:
            whole[rows] = vectors
            found = through_graph.back(later, earlier, self._order, whole)
            return torch.zeros_like(vectors) if found is None else found[rows]

        return krylov.arnoldi(apply, drawn[rows], _KRYLOV)

    def take(self, t: int, place: int, grad: Tensor) -> None:
        """Take the total gradient of one tensor of a state, and pull it one step back.

        The nodes that made it have not run yet: their graph is there.
        """
        state = self._states[t]
        zeros = [torch.zeros_like(part) for part in state]
        parts = self._parts.setdefault(t, zeros)
        coming = self._coming.get(t, zeros)
        own = grad.detach() - parts[place]
        rest = own - coming[place]
        size = own.square().flatten(1).sum(1)
        left = rest.square().flatten(1).sum(1)
        left = left.where(left > _ROUNDING**2 * size, 0)
        total = grad.detach().square().flatten(1).sum(1)
        known, read = self.totals[t], self.direct[t]
        self.totals[t] = total if known is None else known + total
        self.direct[t] = left if read is None else read + left
        at = self._order.index(place)
        others = self._order[at + 1 :]
        earlier = self._states[t - 1] if t else []
        targets = [state[j] for j in others] + earlier
        pulled = through_graph.pull([state[place]], targets, [own]) if targets else None
        if pulled is None:
            return
        for j, part in zip(others, pulled[: len(others)], strict=True):
            parts[j] = parts[j] + part
        if t:
            more = through_graph.independent(
                earlier, self._order, pulled[len(others) :]
            )
            found = self._coming.get(t - 1)
            self._coming[t - 1] = (
                more
                if found is None
                else [a + b for a, b in zip(found, more, strict=True)]
            )

    def release(self) -> None:
        """Let go of the graph."""
        for call in self.calls:
            call.release()
        self.calls, self._states = [], []
        self._parts, self._coming = {}, {}


class Stepped:
    """Sees the calls of one cell of the user's own.

    Args:
        module: The module.
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
        kinds = tuple(type(part) for part in module.modules())
        self._mixes = any(issubclass(kind, _BatchNorm) for kind in kinds)
        self._calls: list[Call] = []
        self._chain: Chain | None = None
        self._at: dict[int, int] = {}  # id of a call -> its step in the chain
        self._era = 0
        self._inside = False  # pulling: what hooks see then is our own
        self.on_grad = _torch.OutOfGraphs(self.reached)
        calls.attach(module, self)

    def close(self) -> None:
        """See no call any more and let go of everything. Safe to call twice."""
        self.closed, self.owner = True, None
        self.let_go()
        if (module := self.module()) is not None:
            calls.detach(module, self)

    def let_go(self) -> None:
        """Keep nothing of what was seen, and look at no call until asked to."""
        self.wanted, self.sees = NOTHING, False
        self._forget_chain()
        self._era += 1
        self._drop_old()

    def expect(self, wanted: Wanted) -> None:
        """Have a forward from now on show what is wanted."""
        if self.closed:
            return
        self.wanted, self.sees = wanted, wanted.sequences
        if self.sees and (module := self.module()) is not None:
            with self._guard:
                calls.attach(module, self)  # it may have been compiled meanwhile

    def ended(self) -> None:
        """Note that a backward pass has ended: later calls are told apart."""
        self._era += 1

    def used(self) -> None:
        """Note that an optimizer has stepped: later calls are told apart."""
        self._era += 1
        self.called = False

    def forget(
        self, task: int = -1, *, states: tuple[bool, bool] = (False, False)
    ) -> bool:
        """Let go of what was seen of a step that is over.

        Args:
            task: Not needed here.
            states: Not needed here.

        Returns:
            Whether anything is left.
        """
        self._forget_chain()
        self._drop_old()
        return bool(self._calls)

    def _drop_old(self) -> None:
        calls, self._calls = self._calls, []
        for call in calls:
            if call.era == self._era:
                self._calls.append(call)
            else:
                call.release()

    def take(self) -> Chain | None:
        """Return the first chain that gradients have reached since the last one."""
        chain = self._chain
        self._forget_chain()
        return chain

    def _forget_chain(self) -> None:
        if self._chain is not None:
            self._chain.release()
        self._chain, self._at = None, {}

    def before_forward(self, module: nn.Module) -> None:
        """Nothing is to be known before."""

    def on_forward(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        """Hold on to one call until a gradient comes, or its step is over."""
        with self._guard:
            if not torch.is_grad_enabled():
                return
            self.called = True
            returned: list[Tensor] = []
            for tensor in tensors(output):
                known = any(tensor is other for other in returned)
                if known or not tensor.is_floating_point() or not tensor.requires_grad:
                    continue
                if _torch.holds_values(tensor) and not tensor.is_leaf:
                    returned.append(tensor)
            if not returned or len(self._calls) >= _LONGEST:
                return
            given = [*tensors(args), *tensors(kwargs)]
            made = any(one.requires_grad and not one.is_leaf for one in given)
            call = Call(
                returned=returned,
                links=self._links(given),
                before=self._calls[-1] if made and self._calls else None,
                era=self._era,
                evaluating=not module.training,
            )
            self._calls.append(call)
            for place, tensor in enumerate(returned):
                tensor.register_hook(OnGrad(self, call, place))

    def _links(self, given: list[Tensor]) -> list[_Link]:
        known = {
            id(tensor): (call, place)
            for call in self._calls[-_NEAR:]
            for place, tensor in enumerate(call.returned)
        }
        return [
            _Link(position, *known[id(tensor)])
            for position, tensor in enumerate(given)
            if id(tensor) in known
        ]

    def reached(self, call: Call, place: int, grad: Tensor) -> None:
        """Note a gradient that has reached one of a call's tensors."""
        if self.closed or self._inside or not self.sees or not call.returned:
            return
        with self._guard:
            self._inside, began = True, time.perf_counter()
            try:
                self._look(call, place, grad)
            finally:
                self._inside = False
                if self._chain is not None:
                    self._chain.seconds += time.perf_counter() - began

    def _begin(self, call: Call) -> Chain:
        """Find the chain that a call is in, and begin to look at it."""
        # Where layers share a cell, its input is another call's output, too; the state
        # is what most calls were given.
        counts = Counter(link.position for one in self._calls for link in one.links)
        [(main, _)] = counts.most_common(1) or [(-1, 0)]
        before: dict[int, Call] = {}
        for one in self._calls:
            source = next((k.source for k in one.links if k.position == main), None)
            if source is None and not one.links:
                source = one.before
            if source is not None:
                before[id(one)] = source
        after = {
            id(source): one for one in self._calls if (source := before.get(id(one)))
        }
        end = call
        while (later := after.get(id(end))) is not None:
            end = later
        found = [end]
        while (earlier := before.get(id(found[-1]))) is not None:
            found.append(earlier)
        found.reverse()
        given = [
            tuple(sorted(k.place for k in one.links if k.source is before.get(id(one))))
            for one in found[1:]
            if one.links
        ]
        places = given[-1] if given else tuple(range(len(call.returned)))
        self._chain = chain = Chain(found, places)
        self._at = {id(one): t for t, one in enumerate(found)}
        chain.begin(self._samples)
        return chain

    def _look(self, call: Call, place: int, grad: Tensor) -> None:
        chain = self._chain or self._begin(call)
        step = self._at.get(id(call))
        known = step is not None and place in chain.places and not chain.why
        if step is None or not known or not self.wanted.grads or len(self._at) < 2:
            return
        own = chain.places.index(place)
        if chain.logs is None:
            chain.follow()
            if self._mixes:  # which is meant
                chain.mixed = None
        if chain.reach is None and (not grad.is_cpu or grad.any()):
            chain.follow_read(step, own, grad)
        chain.take(step, own, grad)
