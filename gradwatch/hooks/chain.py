"""The calls of a cell of the user's own that make one sequence, in autograd's graph.

Nobody knows the cell's formulas, and its forward may do what is not to be done twice.
So nothing is run again: at the first gradient that reaches a chain of its calls, while
the graph of all of them is still there, vectors are pulled back along that graph
(:mod:`gradwatch.numerics.through_graph`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, NamedTuple

import torch
from torch import Tensor

from gradwatch import _torch
from gradwatch.hooks.gates import Gate
from gradwatch.hooks.probe import OnGrad
from gradwatch.numerics import krylov, through_graph
from gradwatch.numerics.through_graph import joined

VECTORS: Final = 4
"""Random vectors that are sent back from the end of a chain."""
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
        versions: How often each had been written.
        links: What it was given that earlier calls have returned.
        given: All that it was given that may be made from what they returned.
        run: Calls that may go on from each other have the same number.
        era: How many backward passes and optimizer steps had ended before it.
        evaluating: Whether the module was in evaluation mode.
        whole: Whether all that it returned are real numbers.
        gates: What the cell tells of its gates.
    """

    returned: list[Tensor]
    versions: list[int]
    links: list[Link]
    given: list[Tensor]
    run: int
    era: int
    evaluating: bool
    whole: bool
    gates: dict[str, Gate]

    def release(self) -> None:
        """Let go of the graph; a hook in it holds this, which no collector sees."""
        self.returned, self.links, self.given, self.gates = [], [], [], {}

    @property
    def written(self) -> bool:
        """Whether what it returned has been changed in place since."""
        pairs = zip(self.returned, self.versions, strict=True)
        return any(t._version != n or not t.requires_grad for t, n in pairs)


class Link(NamedTuple):
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
        why: Why nothing is measured, or no vector could be pulled back; empty for
            neither.
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
        gates: What the cell tells of its gates: nonlinearity and activations, shape
            ``(T, K, H)``; only those that it has told of at each call.
        matrices: By gate, where it has one, its recurrent matrix at the first call.
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
    gates: dict[str, tuple[str, Tensor]] = field(default_factory=dict)
    matrices: dict[str, Tensor] = field(default_factory=dict)
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
        self._take_gates()
        self.shape = (steps, 0, 0)
        try:
            states = [[call.returned[i] for i in self.places] for call in self.calls]
        except IndexError:
            self.why = "its calls return different numbers of tensors"
            return
        if any(call.written for call in self.calls):
            self.why = "its state is changed in place after the call"
            return
        if not all(call.whole for call in self.calls):
            self.why = "its state has complex numbers"
            return
        shapes = {tuple(part.shape for part in state) for state in states}
        count = {part.shape[0] if part.dim() > 1 else 0 for part in states[0]}
        if len(shapes) > 1 or len(count) > 1 or not all(count):
            self.why = "its state changes its shape, or has no axis of sequences"
            return
        self._states = states
        self.dtype = str(first.returned[self.places[0]].dtype).removeprefix("torch.")
        [batch] = count
        few = batch if samples is None else min(samples, batch)
        rows = slice(0, batch // few * few, batch // few)
        self.h = torch.stack([joined([part[rows] for part in s]) for s in states])
        self.shape = (steps, batch, self.h.shape[-1])

    def _take_gates(self) -> None:
        for name, gate in self.calls[0].gates.items():
            each = [call.gates.get(name) for call in self.calls]
            known = [one.activation for one in each if one is not None]
            if len({one.shape for one in known}) == 1 and len(known) == len(each):
                self.gates[name] = gate.nonlinearity, torch.stack(known)
                if gate.weight is not None:
                    self.matrices[name] = gate.weight

    def follow(self) -> None:
        """Pull random vectors back over all steps, while the graph of all is there."""
        steps, batch, size = self.shape
        assert self.h is not None
        states = self._states
        self.why = self._obstacle()
        if self.why:
            return
        self._order = through_graph.order_of(states[-1])
        fixed = torch.Generator().manual_seed(0)  # never the user's
        drawn = torch.randn(VECTORS, batch, size, generator=fixed)
        drawn = drawn.to(self.h.device, self.h.dtype)
        if steps > 2 and through_graph.goes_round(states[-3:], self._order, drawn[0]):
            self.why = "its state also passes by the cell, such as by a residual path"
            return
        self.logs = through_graph.pulled_back(states, self._order, drawn, steps - 1)
        at = sorted({1, steps // 2, steps - 1})
        self.radii = torch.cat([self._radii(t, drawn[0]) for t in at if 0 < t < steps])

    def look_for_mixing(self) -> None:
        """Pull a vector of the first sequence back over one step."""
        assert self.h is not None
        alone = self.h.new_zeros(self.shape[1:])
        alone[0] = 1.0
        earlier, later = self._states[-2:]
        found = through_graph.back(later, earlier, self._order, alone)
        if found is not None and len(found) > 1:
            whole = torch.linalg.vector_norm(found).clamp_min(_LEAST)
            self.mixed = torch.linalg.vector_norm(found[1:]) / whole

    def _obstacle(self) -> str:
        """Return what would notice that vectors are pulled back; empty for nothing."""
        parts = [part for state in self._states for part in state]
        hooks = [
            hook for part in parts for hook in (part._backward_hooks or {}).values()
        ]
        others = any(not isinstance(hook, OnGrad) for hook in hooks)
        if others or any(part.retains_grad for part in parts):
            return "hooks of your own on its states would be called once more"
        if through_graph.runs_python(self._states[-1], self._states[0]):
            return (
                "an autograd.Function or a backward hook in it would be run once more"
            )
        if _torch.recomputes():
            return "checkpointing would compute it once more"
        return ""

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
        size = joined([own]).square().sum(1)
        left = joined([own - coming[place]]).square().sum(1)
        left = left.where(left > _ROUNDING**2 * size, 0)
        total = joined([grad]).square().sum(1)
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
