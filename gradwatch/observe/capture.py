"""What the hooks saw: of one forward call, and of one optimizer step; detached."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

from torch import Tensor

from gradwatch.observe.measure import Numbers
from gradwatch.observe.rows import Rows


@dataclass(slots=True, eq=False, weakref_slot=True)
class Capture:
    """One forward call of a recurrent module.

    Attributes:
        weights: Copies of the weights that the call used, by name, as
            :func:`gradwatch.recurrent.used_weights` gives them. Copies, because an
            optimizer may step before the end of backward.
        used: The weights themselves, detached, by name.
        shape: ``(T, B)``, or None where unknown.
        dtype: Type of the output, such as ``float32``.
        autocast: Type that autocast computes in, where it is on.
        reached: Whether a gradient reached its output: evaluation has none.
        wants_grads: Whether the gradients that reach it are to be copied; not once it
            has been taken: a second pass over the graph would add to them.
        rows: What it was given and returned, for a few sequences; or why that could
            not be had; None where it was not wanted.
        previous: The call whose states it was given, where a gradient can pass.
        cut_from: What is kept of the call whose states it was given, detached.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    used: dict[str, Tensor] = field(default_factory=dict)
    shape: tuple[int, int] | None = None
    dtype: str = ""
    autocast: str = ""
    reached: bool = False
    wants_grads: bool = False
    rows: Rows | str | None = None
    previous: Capture | None = None
    cut_from: Past | None = None

    def release(self) -> None:
        """Let go of all tensors: a graph that the user keeps would keep them."""
        self.weights, self.used, self.rows = {}, {}, None
        self.previous = self.cut_from = None


@dataclass(slots=True)
class Past:
    """A call that another one may go on from; it may be gone, with its graph.

    Attributes:
        call: The call; a gradient can reach it only while it lives.
        steps: How many it took.
        before: The call that it went on from in its turn, detached or not.
        states: The states that it returned; held so that their memory is not given to
            another tensor, by which a later call could be taken for its successor.
    """

    call: weakref.ref[Capture]
    steps: int
    before: Past | None
    states: tuple[Tensor, ...]


@dataclass(slots=True)
class Step:
    """One optimiser step as the tap saw it; its numbers may still be on the device.

    Attributes:
        number: The step, from 0.
        names: Names of all watched parameters, wrappers left out.
        live: Indices of the parameters that had a gradient.
        order: The same in the order in which backward reached them; may be left out
            where every norm is finite.
        numbers: ``pre`` and ``post``: norms of ``live``; ``scale`` of a loss scaler;
            ``change`` and ``weight``: norms in the order of ``changed``.
        post_live: Indices that ``post`` belongs to.
        changed: Names of the streams whose weight was compared before and after.
        events: Such as ``skipped_step``.
        idle: Indices of the parameters whose optimizers have not stepped, while others
            have.
        cleared: Whether the gradients of the last step were cleared before this one's;
            None where that cannot be told.
        skipped_by: Who skipped a skipped step: ``scaler``, ``clipper``, ``user``,
            ``refused`` (ourselves), or ``unknown`` while no step has been taken.
    """

    number: int
    names: list[str] = field(default_factory=list)
    live: list[int] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    numbers: Numbers = field(default_factory=dict)
    post_live: list[int] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    events: tuple[str, ...] = ()
    idle: frozenset[int] = frozenset()
    cleared: bool | None = None
    skipped_by: str = ""
