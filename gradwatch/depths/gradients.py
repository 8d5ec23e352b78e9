"""The gradients of a step: norms before and after clipping, and who broke first."""

from __future__ import annotations

import math
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, Final, NamedTuple, Self

from torch import Tensor

from gradwatch.depths.drain import Host, Numbers
from gradwatch.depths.update import Moved
from gradwatch.facts import STEP_SCOPE, StepFacts
from gradwatch.metrics import run_key, stream_key
from gradwatch.numerics.norms import Norms, all_finite, joined
from gradwatch.numerics.streaming import Window, median, push
from gradwatch.record import Stream

_NAMED: Final = 3
"""Most tensors that are named."""
_CARRIES: Final = 0.05
"""Least share of the square of a total norm by which a tensor is named."""
_NORMS_KEPT: Final = 25
_SUSPICIOUS: Final = 10.0
"""Times the running median from which on a total norm is unusual."""
_FEW: Final = 5
"""Norms below which none is unusual."""
_SURE: Final = 12
"""Norms from which on their median is a measure for steps that wait."""
# In the order in which finish() fills them.
_OF_RUN: Final = tuple(
    map(
        run_key,
        (
            "overhead",
            "loss",
            "grad_norm",
            "nonfinite",
            "grad_norm_clipped",
            "clip_ratio",
            "skipped",
        ),
    )
)


class Layout(NamedTuple):
    """Which numbers of a step are behind which key; made once for a set of parameters.

    Attributes:
        columns: Every key that a row may have a value of.
        norms: Indices of the parameters whose norms are joined, a column each.
        ratios: Names of the streams whose update is measured, a column each.
    """

    columns: tuple[str, ...]
    norms: Sequence[Sequence[int]]
    ratios: Sequence[str]

    @classmethod
    def of(cls, groups: Sequence[tuple[Stream, Mapping[str, Sequence[int]]]]) -> Self:
        """Return the layout for streams and their ``hh``, ``ih``, ``bias`` groups."""
        norms = [
            (stream_key(stream, f"grad_norm_{group}"), tuple(index))
            for stream, parts in groups
            for group, index in parts.items()
            if index
        ]
        ratios = [stream_key(stream, "update_ratio") for stream, _ in groups]
        return cls(
            (*_OF_RUN, *(key for key, _ in norms), *ratios),
            [index for _, index in norms],
            [stream.name for stream, _ in groups],
        )


class Idleness(NamedTuple):
    """What has become of the weights in steps that no optimizer has used.

    Attributes:
        passes: Backward passes since they last changed by a bit.
        elsewhere: Whether an optimizer steps that holds tensors of the same shapes, and
            none of them.
    """

    passes: int
    elsewhere: bool


@dataclass(slots=True, kw_only=True)
class Gradients:
    """What was read of one step's gradients; the norms may still be on the device.

    Attributes:
        names: Names of all watched parameters, wrappers left out.
        live: Indices of the parameters that had a gradient as backward ended.
        before: The norms of these; None where no end of backward was read.
        scale: By how much a loss scaler had multiplied them.
        used: Indices, and norms, as each optimizer was about to use them.
        moved: How far the recurrent weights have moved; None where that is not known.
        cleared: Whether the gradients of the last step had been cleared; None where
            that cannot be told.
        order: Indices in the order in which backward reached them; may be empty where
            every norm is finite.
        idle: Indices of those whose optimizers have not stepped, while others have.
        untouched: Whether what was used was, to all appearance, what backward left.
        written_late: Whether the last step's gradients were written after its optimizer
            and before they were cleared.
        weights_finite: False where a gradient is not finite, and neither is a weight.
        broken: What was not finite in the graph of a loss that is not; may be empty.
        idleness: Of a step that no optimizer has used; None where nobody looked.
        partial: Whether a part was read of what this process does not know whole.
        guarded: Whether each optimizer leaves them unused if they are not finite.
    """

    names: Sequence[str] = ()
    live: list[int] = field(default_factory=list)
    before: Norms | None = None
    scale: Tensor | None = None
    used: list[tuple[list[int], Norms]] = field(default_factory=list)
    moved: Moved | None = None
    cleared: bool | None = None
    order: list[int] = field(default_factory=list)
    idle: frozenset[int] = frozenset()
    untouched: bool = False
    written_late: bool = False
    weights_finite: bool | None = None
    broken: str = ""
    idleness: Idleness | None = None
    partial: bool = False
    guarded: bool = False

    def ended(
        self,
        names: Sequence[str],
        live: list[int],
        read: Norms | None,
        scale: Tensor | None,
        order: list[int],
    ) -> None:
        """Take the norms of the gradients as a backward pass leaves them."""
        self.names, self.live, self.before = names, live, read
        self.scale, self.order = scale, order

    def found_scale(self, scale: Tensor | None) -> None:
        """Take the scale of a loss scaler that was not known as backward ended."""
        if self.before is not None:
            self.scale = scale

    def about_to_be_used(
        self, live: list[int], read: Norms, *, untouched: bool = False
    ) -> None:
        """Take the norms of gradients that no optimizer has used before.

        Args:
            live: Their indices.
            read: Their norms.
            untouched: Whether they are to all appearance what backward left.
        """
        self.used.append((live, read))
        self.untouched = untouched

    def not_used(self, index: Iterable[int]) -> list[int]:
        """Return those of some parameters that no optimizer has used before."""
        if not self.used:
            return list(index)
        known = {i for live, _ in self.used for i in live}
        return [i for i in index if i not in known]

    def forget(self) -> None:
        """Forget what was read: the parameters are others now."""
        self.live, self.before, self.order, self.used = [], None, [], []

    def closed(
        self,
        names: Sequence[str],
        *,
        moved: Moved | None,
        idle: frozenset[int],
        clearing_known: bool,
    ) -> None:
        """Take what is known once the step has closed."""
        self.names, self.moved, self.idle = names, moved, idle
        if not clearing_known and self.cleared is False:
            self.cleared = None  # it may be cleared before its own backward

    @property
    def finite(self) -> bool:
        """Whether what backward left is finite; on an accelerator this waits for it."""
        return self.before is None or all_finite(self.before)

    @property
    def used_finite(self) -> bool:
        """Whether what the optimizers were given is finite; the same wait."""
        return all(all_finite(read) for _, read in self.used)

    def written_unseen(self, host: Host) -> bool:
        """Tell whether something was written that left no trace, by what was read."""
        if not self.untouched or "before" not in host or "used" not in host:
            return False
        pairs = zip(_floats(host["before"]), _floats(host["used"]), strict=True)
        return any(a != b and not (math.isnan(a) and math.isnan(b)) for a, b in pairs)

    def numbers(self) -> Numbers:
        """Return what was read by ``before, scale, used, change, weight``."""
        numbers: Numbers = {}
        if self.before is not None:
            numbers["before"] = self.before
        if self.scale is not None:
            numbers["scale"] = self.scale
        if self.used:
            numbers["used"] = joined([read for _, read in self.used])
        if self.moved is not None:
            numbers["change"], numbers["weight"] = self.moved.change, self.moved.weight
        return numbers


class Read(NamedTuple):
    """What was read of the gradients of a step of the quiet path, in full.

    Attributes:
        names: Names of the parameters.
        live: Indices of the parameters that have a gradient.
        before: Their norms as backward left them.
        used: The same as the optimizer was given them; the same list where they are.
        moved: How far the recurrent weights have moved; None where none was compared.
    """

    names: Sequence[str]
    live: list[int]
    before: list[float]
    used: list[float]
    moved: Moved | None


class Plain(NamedTuple):
    """A closed step of the quiet path.

    Attributes:
        number: Its number.
        time: When it closed, in seconds since the epoch.
        layout: Which numbers are behind which key.
        norm: The total norm as backward left it.
        loss: Its loss.
        overhead: Share of the time so far that gradwatch has used.
        spent: Seconds since the last step that gradwatch used.
        elapsed: The other seconds since then.
        read: The rest; None where only the total norm was read.
    """

    number: int
    time: float
    layout: Layout
    norm: float
    loss: float | None
    overhead: float
    spent: float
    elapsed: float
    read: Read | None


@dataclass(slots=True, kw_only=True)
class Memory:
    """What is remembered of gradients between steps; plain values.

    Attributes:
        skipped: Steps skipped so far.
        norms: The last usual total norms.
    """

    skipped: int = 0
    norms: Window = ()

    def count(self, *, skipped: bool) -> None:
        """Count a step that was skipped."""
        self.skipped += skipped

    def take(self, norm: float) -> bool:
        """Take a total norm, if it is usual; tell whether it is."""
        if self.unusual(norm):
            return False
        self.norms = push(self.norms, norm, _NORMS_KEPT)
        return True

    def take_all(self, norms: Sequence[float]) -> Sequence[bool]:
        """Take finite ones, one after the other; tell which are usual."""
        known = (*self.norms, *norms)
        if max(norms) > _SUSPICIOUS * min(known):
            return list(map(self.take, norms))
        self.norms = known[-_NORMS_KEPT:]
        return [True] * len(norms)

    def unusual(self, norm: float) -> bool:
        """Tell whether a total norm is not finite, or far above those of late."""
        if not math.isfinite(norm):
            return True
        few = len(self.norms) < _FEW
        return not few and norm > _SUSPICIOUS * median(self.norms)

    @property
    def bound(self) -> float:
        """A total norm below which a step is usual by now; 0 where it is not known."""
        return _SUSPICIOUS * median(self.norms) if len(self.norms) >= _SURE else 0.0


def scale_of(host: Host) -> float:
    """Return by how much a loss scaler has multiplied the gradients; 1 without one.

    NaN for a scale that has been halved down to 0: nothing can be told behind it.
    """
    return (float(host["scale"]) or math.nan) if "scale" in host else 1.0


def finish(
    step: Gradients,
    host: Host,
    layout: Layout,
    memory: Memory,
    *,
    loss: float | None,
    overhead: float,
    skipped: bool,
) -> tuple[list[float | None], StepFacts]:
    """Return the row of a step, and the tensors to be named if its norm is unusual.

    Args:
        step: What was read.
        host: Its numbers.
        layout: What belongs to which column.
        memory: Updated in place.
        loss: The loss that was told for the step, or None.
        overhead: Share of the time since the last step that gradwatch used.
        skipped: Whether no optimizer has used the gradients.
    """
    memory.count(skipped=skipped)
    before = _before(step, host)
    norm = broken = clipped = ratio = None
    named = STEP_SCOPE
    if before:
        norm = math.hypot(*before.values())
        broken = _broken(before, norm)
        if "used" in host:
            clipped = _clipped(step, host, before, norm)
            if math.isfinite(norm) and math.isfinite(clipped):
                ratio = min(clipped / norm, 1.0) if norm else 1.0
        if not memory.take(norm):
            named = _named(step, before, norm)
        if clipped is not None and ratio is None and math.isfinite(norm):
            used = _used(step, host)  # finite as backward left them
            broken, named = _broken(used, clipped), _named(step, used, clipped)
    row: list[float | None] = [
        overhead,
        loss,
        norm,
        broken,
        clipped,
        ratio,
        float(memory.skipped),
    ]
    for index in layout.norms:
        found = [before[i] for i in index if i in before]
        row.append(math.hypot(*found) if found else None)
    moved = step.moved
    row += _ratios(moved, host.get("change"), host.get("weight"), layout)
    return row, named


def finish_plain(
    steps: Sequence[Plain], memory: Memory
) -> Iterator[tuple[list[float | None], StepFacts]]:
    """Yield of each step of the quiet path what :func:`finish` returns of it.

    Args:
        steps: With the same layout.
        memory: Updated in place.
    """
    layout, live = steps[0].layout, list[int]()
    unread: list[float | None] = [None] * (len(layout.norms) + len(layout.ratios))
    places: list[Callable[[list[float]], Sequence[float]] | None] = []
    taken = memory.take_all([step.norm for step in steps])
    skipped = float(memory.skipped)
    for step, usual in zip(steps, taken, strict=True):
        norm, read = step.norm, step.read
        row: list[float | None] = [step.overhead, step.loss, norm, 0.0]
        if read is None:
            row += (None, None, skipped, *unread)
            yield row, STEP_SCOPE
            continue
        if read.live is not live:
            live, at = read.live, {i: k for k, i in enumerate(read.live)}
            found = ([at[i] for i in index if i in at] for index in layout.norms)
            places = [_picking(index) for index in found]
        before, moved, named = read.before, read.moved, STEP_SCOPE
        clipped = norm if read.used is before else math.hypot(*read.used)
        ratio = min(clipped / norm, 1.0) if norm else 1.0
        if not usual:
            norms = dict(zip(live, before, strict=True))
            named = _carriers(read.names, norms, norm)
        row += (clipped, ratio, skipped)
        row += [None if of is None else math.hypot(*of(before)) for of in places]
        change, weight = (None, None) if moved is None else moved[1:]
        row += _ratios(moved, change, weight, layout)
        yield row, named


def _picking(
    places: Sequence[int],
) -> Callable[[list[float]], Sequence[float]] | None:
    """Return what picks the values at some places of a list; None for no place."""
    if len(places) > 1:
        return itemgetter(*places)
    return itemgetter(slice(places[0], places[0] + 1)) if places else None


def _before(step: Gradients, host: Host) -> Mapping[int, float]:
    """Return the norms before clipping, unscaled, by parameter."""
    if "before" not in host:  # backward was not seen: what the optimizer saw stands in
        return _used(step, host)
    values = _floats(host["before"])
    if (scale := scale_of(host)) != 1.0:
        values = [value / scale for value in values]
    before = dict(zip(step.live, values, strict=True))
    if step.idle:  # they wait for an optimizer of their own
        idle = step.idle.difference(*(live for live, _ in step.used))
        return {i: norm for i, norm in before.items() if i not in idle} or before
    return before


def _used(step: Gradients, host: Host) -> Mapping[int, float]:
    live = [i for index, _ in step.used for i in index]
    return dict(zip(live, _floats(host.get("used")), strict=True))


def _floats(values: Any) -> Collection[float]:
    if values is None:
        return []
    return values if isinstance(values, list) else values.tolist()


def _broken(before: Mapping[int, float], norm: float) -> float:
    """Return how many norms are not finite."""
    if math.isfinite(norm):
        return 0.0
    return float(sum(not math.isfinite(value) for value in before.values()))


def _clipped(
    step: Gradients, host: Host, before: Mapping[int, float], norm: float
) -> float:
    """Return the total norm of what the optimizers were given."""
    if host["used"] is host.get("before"):  # one list, where none was read again
        return norm
    return math.hypot(*{**before, **_used(step, host)}.values())


def _ratios(
    moved: Moved | None, change: Any, weight: Any, layout: Layout
) -> list[float | None]:
    """Return how far each stream's W_hh has moved, over its norm."""
    if moved is None:
        return [None] * len(layout.ratios)
    found: dict[str, float] = {}
    sizes = zip(moved.names, _floats(change), _floats(weight), strict=True)
    for name, by, size in sizes:
        found[name] = by / (size + 1e-12)
    return list(map(found.get, layout.ratios))


def _named(step: Gradients, before: Mapping[int, float], norm: float) -> StepFacts:
    """Name the tensors that broke first, or those that carry an unusual norm."""
    if not math.isfinite(norm):
        order = [i for i in step.order if i in before] or list(before)
        broken = [i for i in order if not math.isfinite(before[i])]
        return StepFacts(
            nonfinite=tuple(step.names[i] for i in broken[:_NAMED]),
            weights_finite=step.weights_finite,
            broken=step.broken or None,
        )
    return _carriers(step.names, before, norm)


def _carriers(
    names: Sequence[str], before: Mapping[int, float], norm: float
) -> StepFacts:
    heavy = sorted(before, key=before.__getitem__, reverse=True)[:_NAMED]
    shares = {names[i]: (before[i] / norm) ** 2 for i in heavy}
    return StepFacts(
        carriers={n: round(s, 4) for n, s in shares.items() if s >= _CARRIES}
    )
