"""What the hooks saw of one forward call; detached."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

from torch import Tensor

from gradwatch.hooks.sequences import Sequences


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
        era: How many backward passes and optimizer steps had ended before it.
        reached: Whether a gradient reached its output: evaluation has none.
        task: The number of the backward pass that brought the first one.
        evaluating: Whether the module was in evaluation mode.
        graph_kept: Whether the state it was given brings the graph of a step along that
            is over.
        apart: How many calls there were, where there were several, each of one time
            step and given no state.
        wants_grads: Whether the gradients that reach it are to be copied.
        sequences: What a few of its sequences were given and returned; or why that
            could not be had; None where it was not wanted.
        previous: The call whose states it was given, where a gradient can pass.
        cut_from: What is kept of the call whose states it was given, detached.
        own: What is kept of this call for the next one.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    used: dict[str, Tensor] = field(default_factory=dict)
    shape: tuple[int, int] | None = None
    dtype: str = ""
    autocast: str = ""
    era: int = 0
    reached: bool = False
    task: int = -1
    evaluating: bool = False
    graph_kept: bool = False
    apart: int = 0
    wants_grads: bool = False
    sequences: Sequences | str | None = None
    previous: Capture | None = None
    cut_from: Past | None = None
    own: Past | None = None

    def look(self, name: str, grad: Tensor, task: int) -> bool:
        """Look at a gradient that has reached one of the call's outputs.

        Args:
            name: Of the output.
            grad: The gradient; copied where that is wanted.
            task: The number of the backward pass.

        Returns:
            Whether it is the first, and the step of the call is not over.
        """
        if self.wants_grads and isinstance(self.sequences, Sequences):
            self.sequences.take_grad(name, grad)
        if self.reached:
            return False
        self.reached, self.task = True, task
        if self.own is not None:
            self.own.note_reached()
        return bool(self.weights)  # else the graph has outlived the step

    def stop_looking(self) -> None:
        """Copy no more gradients: a second pass over the graph would add to them."""
        self.wants_grads = False

    def release(self) -> None:
        """Let go of all tensors: a graph that the user keeps would keep them."""
        self.weights, self.used, self.sequences = {}, {}, None
        self.previous = self.cut_from = self.own = None


@dataclass(slots=True)
class Past:
    """A call that another one may go on from; it may be gone, with its graph.

    Attributes:
        steps: How many it took.
        before: The call that it went on from in its turn, detached or not.
        states: The states that it returned; held so that their memory is not given to
            another tensor, by which a later call could be taken for its successor.
        era: As of :class:`Capture`.
        reached: Whether a gradient has reached it.
        lost: Steps of calls before it that no gradient can reach any more.
    """

    steps: int
    before: Past | None
    states: tuple[Tensor, ...]
    era: int = 0
    reached: bool = False
    lost: int = 0
    _call: weakref.ref[Capture] | None = None

    @property
    def call(self) -> Capture | None:
        """The call, while it lives: only then can a gradient reach it."""
        return None if self._call is None else self._call()

    def belongs_to(self, call: Capture) -> None:
        """Note the call."""
        self._call = weakref.ref(call)

    def note_reached(self) -> None:
        """Note that a gradient has reached the call."""
        self.reached = True

    def forget_before(self, era: int) -> None:
        """Forget what the call went on from before an era: the step of that is over."""
        if self.before is not None and self.before.era < era:
            self.before, self.lost = None, 0

    def fold(self) -> None:
        """Keep of calls that are gone, and that no gradient has reached, their steps.

        Else each of a thousand calls without a backward would hold on to the one
        before it.
        """
        before = self.before
        while before is not None and before.call is None and not before.reached:
            self.lost += before.steps + before.lost
            self.before = before = before.before
