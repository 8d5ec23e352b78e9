"""What is seen of a cell of the user's own that is stepped in a loop.

Its calls are held until the first gradient comes; then it shows which of them make one
sequence (:mod:`gradwatch.hooks.chain`).
"""

from __future__ import annotations

import time
import weakref
from collections import Counter
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradwatch import _torch
from gradwatch.health import Guard
from gradwatch.hooks import calls
from gradwatch.hooks.chain import Call, Chain, Link
from gradwatch.hooks.gates import METHOD, Gate, asked
from gradwatch.hooks.probe import NOTHING, OnGrad, Wanted
from gradwatch.hooks.sequences import tensors
from gradwatch.numerics.through_graph import made_from

_LONGEST: Final = 10_000
"""Calls without a backward pass that are held; nobody trains on more."""
_NEAR: Final = 64
"""Calls before one among which that is looked for whose state it was given."""
_RUNS: Final = 4
"""Sequences of calls that are held until a backward pass shows which one counts."""


class Stepped:
    """Sees the calls of one cell of the user's own.

    Args:
        module: The module.
        owner: Whoever is to live as long as the module: the watch.
        samples: How many sequences are looked at; None for all.
        guard: Absorbs and reports what fails in the probe's own work.
        gates: The same of what the cell tells of its gates.
    """

    def __init__(
        self,
        module: nn.Module,
        owner: object,
        *,
        samples: int | None,
        guard: Guard,
        gates: Guard,
    ) -> None:
        self.owner: object = owner
        self.module = weakref.ref(module)
        self.closed = False
        self.wanted, self.sees = NOTHING, False
        """What a forward now has to show, and whether it is anything."""
        self.called = False
        """Whether one was looked at since the last step of an optimizer."""
        self._samples, self._guard, self._gates_guard = samples, guard, gates
        kinds = tuple(type(part) for part in module.modules())
        self._normed = any(issubclass(kind, _BatchNorm) for kind in kinds)
        self._calls: list[Call] = []
        self._chain: Chain | None = None
        self._at: dict[int, int] = {}  # id of a call -> its step in the chain
        self._era = 0
        self._run = 0
        self._task = -1  # the backward pass that the chain is of
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

    def fail(self, off: bool) -> None:
        """Forget what could not be looked at, or look at nothing any more."""
        if off:
            self.close()
        else:
            self._forget_chain()

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
            links = self._links(given)
            made = [one for one in given if one.requires_grad and not one.is_leaf]
            self._run += not (links or made)
            call = Call(
                returned=returned,
                versions=[tensor._version for tensor in returned],
                links=links,
                given=made,
                run=self._run,
                era=self._era,
                evaluating=not module.training,
                whole=not any(tensor.is_complex() for tensor in tensors(output)),
                gates=self._gates(module, args, kwargs),
            )
            while self._calls and self._calls[0].run <= self._run - _RUNS:
                self._calls.pop(0).release()  # nobody has called backward for it
            self._calls.append(call)
            for place, tensor in enumerate(returned):
                tensor.register_hook(OnGrad(self, call, place))

    def _gates(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Gate]:
        """Return what the cell tells of its gates at a call; few sequences of it."""
        if not hasattr(module, METHOD) or self._gates_guard.off:
            return {}
        with self._gates_guard:
            told = asked(module, args, kwargs)
            return {name: gate.few(self._samples) for name, gate in told.items()}
        return {}

    def _links(self, given: list[Tensor]) -> list[Link]:
        known = {
            id(tensor): (call, place)
            for call in self._calls[-_NEAR:]
            for place, tensor in enumerate(call.returned)
        }
        return [
            Link(position, *known[id(tensor)])
            for position, tensor in enumerate(given)
            if id(tensor) in known
        ]

    def reached(self, call: Call, place: int, grad: Tensor) -> None:
        """Note a gradient that has reached one of a call's tensors."""
        if self.closed or not self.sees or not call.returned:
            return
        if not _torch.holds_values(grad):
            return
        with self._guard:
            began = time.perf_counter()
            try:
                self._look(call, place, grad)
            finally:
                if self._chain is not None:
                    self._chain.seconds += time.perf_counter() - began

    def _begin(self, call: Call) -> Chain:
        """Find the chain that a call is in, and begin to look at it."""
        # Where layers share a cell, its input is another call's output, too; the state
        # is what most calls were given.
        counts = Counter(link.position for one in self._calls for link in one.links)
        [(main, _)] = counts.most_common(1) or [(-1, 0)]
        sources = {
            id(one): next((k.source for k in one.links if k.position == main), None)
            for one in self._calls
        }
        after = {id(source): one for one in self._calls if (source := sources[id(one)])}
        at = {id(one): i for i, one in enumerate(self._calls)}
        places: tuple[int, ...] = ()
        found = [call]
        while True:  # on to the last one
            later = after.get(id(found[-1]))
            if later is None:
                i = at[id(found[-1])] + 1
                later = self._calls[i] if i < len(self._calls) else None
                if later is None or later.links:
                    break
                leading = made_from(later.given, found[-1].returned)
                if not leading:
                    break
                places = places or leading
            found.append(later)
        found.reverse()
        while True:  # and back to the first
            before = sources[id(found[-1])]
            if before is None:
                i = at[id(found[-1])]
                if not i or found[-1].links or not found[-1].given:
                    break
                before = self._calls[i - 1]
                leading = made_from(found[-1].given, before.returned)
                if not leading:
                    break
                places = places or leading
            found.append(before)
        found.reverse()
        for one in found[1:]:
            source = sources[id(one)]
            own = sorted({k.place for k in one.links if k.source is source})
            places = tuple(own) or places
        places = places or tuple(range(len(call.returned)))
        self._chain = chain = Chain(found, places)
        self._at = {id(one): t for t, one in enumerate(found)}
        chain.begin(self._samples)
        if self.wanted.grads and len(found) > 1 and not chain.why:
            chain.follow()
            if chain.logs is not None and not self._normed:  # else they mix, as meant
                chain.look_for_mixing()
        return chain

    def _look(self, call: Call, place: int, grad: Tensor) -> None:
        if (task := _torch.graph_task_id()) != self._task:
            # Another pass over the same graph begins again; its calls are kept.
            self._chain, self._at, self._task = None, {}, task
        chain = self._chain or self._begin(call)
        step = self._at.get(id(call))
        if step is None or place not in chain.places or chain.logs is None:
            return
        own = chain.places.index(place)
        if chain.reach is None and (not grad.is_cpu or grad.any()):
            chain.follow_read(step, own, grad)
        chain.take(step, own, grad)
