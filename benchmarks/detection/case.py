"""One labelled run: an ordinary model and loop, with what is true of it.

A *family* makes a case from a seed: sizes, lengths, data, initial weights and module
names differ from seed to seed, the label does not. A third of the families, by a hash
of the name, is held out: no threshold may be chosen on it.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Batch = Any
"""What one step is given; a family's own ``loss`` knows its shape."""


@dataclass(frozen=True, kw_only=True)
class Label:
    """What is true of a run.

    Attributes:
        kind: The kind of fault, by the names of docs/alerts.md; None: healthy.
        causes: The causes that are right; empty where the kind has none.
        streams: The streams that show it, named as ``<module>.l0``; empty where the
            fault belongs to no stream, or to all.
        onset: The step from which on the fault is there.
        others: Kinds that are true as well, and not counted against a tool.
        same: Kinds under which the same fault is named as rightly: of a rate that is
            too high, and a loss that goes up by it, either is.
        curable: Whether changing weights or gradients can cure it from then on. Else
            the data or the code has to change, or what was done is done, as by one bad
            batch.
    """

    kind: str | None = None
    causes: frozenset[str] = frozenset()
    streams: frozenset[str] = frozenset()
    onset: int = 0
    others: frozenset[str] = frozenset()
    same: frozenset[str] = frozenset()
    curable: bool = False


@dataclass(kw_only=True)
class Case:
    """One run that can be trained.

    Attributes:
        model: The model; contains the recurrent modules.
        optimizer: What trains it.
        batches: Fresh batches for ever, of a seed of their own.
        loss: From model and batch to the loss; the forward of an ordinary loop.
        label: What is true.
        steps: How many.
        clip: Norm that the gradients are clipped to; None: not at all.
        scaler: What scales the loss, for half precision; None: nothing does.
        clip_scaled: Whether the clip comes before the gradients are unscaled, by
            mistake.
        clears: Whether gradients are cleared before each step's backward.
        accumulate: Batches whose gradients make one step; its loss is their mean.
        before: Called with the step's number before each step: where faults begin.
        after: Called behind backward, before the clip and the step.
        once: Makes one whole step of the loop in the family's own way, from a batch,
            and returns its loss; in place of ``loss``, backward, clip and step.
        goal: What is measured at the end in place of the training loss, lower is
            better: the error on fresh data, where the training loss flatters.
        thread: Where someone had this, for families that come from public threads.
        control: Makes the same run without the fault, or with the cure that the label
            knows of; None for healthy families.
        truth: Measures, on the trained case and its losses, whether the label holds;
            named numbers, and whether they do.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: Iterator[Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    label: Label
    steps: int = 200
    clip: float | None = None
    scaler: torch.amp.GradScaler | None = None
    clip_scaled: bool = False
    clears: bool = True
    accumulate: int = 1
    before: Callable[[int], object] | None = None
    after: Callable[[int], object] | None = None
    once: Callable[[Batch], Tensor] | None = None
    goal: Callable[[], float] | None = None
    thread: str = ""
    control: Callable[[], Case] | None = None
    truth: Callable[[Case, History], Measured] | None = None
    notes: dict[str, Any] = field(default_factory=dict)


class Measured(NamedTuple):
    """What a truth found.

    Attributes:
        holds: Whether the label is right.
        values: Named numbers that show it.
    """

    holds: bool
    values: Mapping[str, float]


@dataclass
class History:
    """What a run was seen to do, step by step, by exact counts.

    Attributes:
        losses: Loss of each step.
        norms: Norm of all gradients before the clip, unscaled, in float64.
        nonfinite: The first step at which a loss or gradient was not finite, or None;
            a finite loss whose gradients overflow under a scaler, which skips the step,
            does not count.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    nonfinite: int | None = None

    def fell_to(self, share: float, last: int = 20) -> bool:
        """Tell whether the loss ended at that share of where it began, or lower."""
        first = sum(self.losses[:last]) / last
        final = sum(self.losses[-last:]) / last
        return math.isfinite(final) and final <= share * first

    @property
    def diverged(self) -> bool:
        """Whether the loss ends at over twice its best, and a third of its start."""
        if not all(map(math.isfinite, self.losses)) or min(self.losses) <= 0:
            return False
        means = [
            sum(self.losses[i : i + 20]) / 20 for i in range(len(self.losses) - 19)
        ]
        return means[-1] > max(2.0 * min(means), means[0] / 3)

    @property
    def final(self) -> float:
        """Mean loss of the last 20 steps."""
        return sum(self.losses[-20:]) / len(self.losses[-20:])


class Step(NamedTuple):
    """A step that has been made.

    Attributes:
        number: From 0.
        loss: Before the step.
        norm: Of all gradients, before the clip, as ``clip_grad_norm_`` returns it, and
            unscaled; where the family makes the whole step, as the step leaves them.
    """

    number: int
    loss: Tensor
    norm: Tensor


def loop(case: Case, history: History | None = None) -> Iterator[Step]:
    """Train, as anyone would; the run can be looked at between the steps.

    Yields:
        Each step, once the optimizer has made it.
    """
    for number in range(case.steps):
        if case.before is not None:
            case.before(number)
        if case.once is not None:
            loss = case.once(next(case.batches)).detach()
            if history is not None:
                _note(case, history, number, loss, 1.0)
            yield Step(number, loss, _total_norm(case.model))
            continue
        if case.clears:
            case.optimizer.zero_grad()
        loss = _backward(case)
        if case.after is not None:
            case.after(number)
        scale = _unscaled(case)
        if history is not None:
            _note(case, history, number, loss, scale)
        norm = _total_norm(case.model)
        if case.clip is not None:
            nn.utils.clip_grads_with_norm_(case.model.parameters(), case.clip, norm)
        if case.scaler is None:
            case.optimizer.step()
        else:
            case.scaler.step(case.optimizer)
            case.scaler.update()
        yield Step(number, loss, norm / scale)


def _total_norm(model: nn.Module) -> Tensor:
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return nn.utils.get_total_norm(grads)


def _backward(case: Case) -> Tensor:
    """Go through the batches of one step, forward and back; return their mean loss."""
    losses = []
    for _ in range(case.accumulate):
        loss = case.loss(case.model, next(case.batches))
        losses.append(loss.detach())
        if loss.requires_grad:
            part = loss / case.accumulate
            (part if case.scaler is None else case.scaler.scale(part)).backward()
    return torch.stack(losses).mean()


def _unscaled(case: Case) -> float:
    """Unscale the gradients, if that is due; return the scale that is left on them."""
    if case.scaler is None:
        return 1.0
    if case.clip_scaled:
        return float(case.scaler.get_scale())
    case.scaler.unscale_(case.optimizer)
    return 1.0


def _note(
    case: Case, history: History, number: int, loss: Tensor, scale: float
) -> None:
    grads = [p.grad for p in case.model.parameters() if p.grad is not None]
    norm = math.hypot(*(float(g.detach().double().norm()) for g in grads)) / scale
    history.losses.append(float(loss))
    history.norms.append(norm)
    broken = not math.isfinite(history.losses[-1])
    if case.scaler is None:
        broken = broken or not math.isfinite(norm)
    if broken and history.nonfinite is None:
        history.nonfinite = number


def trained(case: Case) -> History:
    """Train to the end with nothing attached; return what was seen."""
    history = History()
    for _ in loop(case, history):
        pass
    return history


class Draw:
    """Sizes, names and data of one seed."""

    def __init__(self, family: str, seed: int) -> None:
        self.seed = int(hashlib.sha256(f"{family} {seed}".encode()).hexdigest()[:8], 16)
        self._random = random.Random(self.seed)
        torch.manual_seed(self.seed)

    def between(self, low: int, high: int) -> int:
        """Return a whole number, both ends included."""
        return self._random.randint(low, high)

    def one_of(self, *values: Any) -> Any:
        """Return one of some values."""
        return self._random.choice(values)

    def module_name(self) -> str:
        """Return a name that a recurrent module may have."""
        return str(self.one_of("rnn", "encoder", "core", "recurrent", "memory", "net0"))

    def source(self) -> torch.Generator:
        """Return a source of data of its own."""
        return torch.Generator().manual_seed(self._random.randrange(2**31))


Family = Callable[[Draw], Case]

FAMILIES: dict[str, Family] = {}


def family(make: Family) -> Family:
    """Add a family to the benchmark, by the name of its function."""
    assert make.__name__ not in FAMILIES, make.__name__
    FAMILIES[make.__name__] = make
    return make


def make(name: str, seed: int) -> Case:
    """Return the case of a family and a seed; the same each time."""
    return FAMILIES[name](Draw(name, seed))


HELD_OUT_SET = "d_"
"""What the names of the set begin with that is held out whole."""


def held_out(name: str) -> bool:
    """Tell whether a family is kept from those who choose thresholds."""
    drawn = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 3 == 0
    return drawn or name.startswith(HELD_OUT_SET)
