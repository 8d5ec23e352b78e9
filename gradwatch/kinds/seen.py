"""What several rules remember: the losses, and what was last seen of each stream."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from gradwatch.block import Block
from gradwatch.facts import ModuleFacts, StreamFacts
from gradwatch.metrics import run_key, stream_key
from gradwatch.numerics.streaming import median, rolling_medians, smallest_median
from gradwatch.record import StepRecord, Stream, reinitialised

SPAN: Final = 20
"""Losses that a median is taken over: one bad batch is not what the loss is."""
HALF: Final = SPAN - 1
"""Losses of which the median is at least as far out as that of one more."""
_RECENT: Final = 5
"""Losses that the median of now is taken over; chosen, not measured."""
_IMPROVED: Final = 0.95
"""Share of the lowest median below which it has improved; chosen, not measured."""
_LONG: Final = 100
"""Losses that their running mean is of: of small batches a median of 20 scatters."""
_SHORTLY: Final = 50
"""Steps before a fault in which its cause is looked for; chosen, not measured."""
_LOSS: Final = run_key("loss")
_NO_MODULE: Final = ModuleFacts()
_NO_STREAM: Final = StreamFacts()


@dataclass(slots=True)
class Losses:
    """The losses: where they began, and where they are.

    Attributes:
        last: The last 20.
        start: Median of the first 20; None until there are as many, and where one was
            negative: then no share of it means anything.
        largest: The largest one.
        signed: Whether one was negative.
        best: The lowest median, as it was when it had last improved by a twentieth.
        improved: When that was.
        mean: Of about the last 100.
        taken: How many there were, up to as many.
    """

    last: list[float] = field(default_factory=list)
    start: float | None = None
    largest: float = -math.inf
    signed: bool = False
    best: float = math.inf
    improved: int = 0
    mean: float = 0.0
    taken: int = 0

    def take(self, record: StepRecord) -> float | None:
        """Take in a record's loss; return it if it has a finite one."""
        return self.take_one(record.step, record.metrics.get(_LOSS))

    def take_block(self, block: Block) -> None:
        """Take in the losses of several plain steps."""
        losses = block.whole(_LOSS)
        if losses is not None and self.settled and min(losses) >= 0:
            self.take_all(block.steps, losses)
            return
        for step, loss in zip(block.steps, block.column(_LOSS) or (), strict=False):
            self.take_one(step, loss)

    @property
    def settled(self) -> bool:
        """Whether it is known where they began."""
        return self.start is not None

    def take_all(self, steps: Sequence[int], losses: Sequence[float]) -> None:
        """Take in losses of several steps, none of them negative, once it is settled.

        What :meth:`take_one` would come to, one after the other.
        """
        every = [*self.last, *losses]
        mean, taken = self.mean, self.taken
        for loss in losses:
            taken += taken < _LONG
            mean += (loss - mean) / taken
        self.mean, self.taken = mean, taken
        self.largest = max(self.largest, *losses)
        if smallest_median(every, HALF) < _IMPROVED * self.best:
            medians = rolling_medians(every[1:], SPAN)
            best, improved = self.best, self.improved
            for step, loss, usual in zip(steps, losses, medians, strict=True):
                if loss < _IMPROVED * best > usual:
                    best, improved = usual, step
            self.best, self.improved = best, improved
        self.last = every[-SPAN:]

    def take_one(self, step: int, loss: float | None) -> float | None:
        """Take in the loss of a step; return it if it is a finite one."""
        if loss is None or not math.isfinite(loss):
            return None
        self.last = [*self.last[1 - SPAN :], loss]
        self.taken += self.taken < _LONG
        self.mean += (loss - self.mean) / self.taken
        if self.start is None and not self.signed and len(self.last) == SPAN:
            self.start = self.usual
        if loss < 0:
            self.signed, self.start = True, None
        self.largest = max(self.largest, loss)
        # The loss itself first: a median costs as much as all the rest.
        if self.start is not None and loss < _IMPROVED * self.best > self.usual:
            self.best, self.improved = self.usual, step
        return loss

    @property
    def usual(self) -> float:
        """Median of the last 20: one bad batch is not what the loss is."""
        return median(tuple(self.last))

    @property
    def recent(self) -> float | None:
        """The median of the last 5 over the start; None where that cannot be told."""
        return median(tuple(self.last[-_RECENT:])) / self.start if self.start else None

    @property
    def lowest(self) -> float | None:
        """The lowest median over the start; None where that cannot be told.

        Of small batches no single median says how far a net has come.
        """
        return min(self.best, self.usual) / self.start if self.start else None

    @property
    def share(self) -> float | None:
        """The median over the start; None where that cannot be told."""
        return self.usual / self.start if self.start else None


@dataclass(slots=True)
class SeenState:
    """What was last seen.

    Attributes:
        values: Stream -> metric -> its last value.
        modules: Path of a module -> its facts.
        streams: Stream -> its facts.
    """

    values: dict[str, dict[str, float]] = field(default_factory=dict)
    modules: dict[str, ModuleFacts] = field(default_factory=dict)
    streams: dict[str, StreamFacts] = field(default_factory=dict)


class Seen:
    """The last value of some metrics of every stream, and the facts as they are now.

    Attributes:
        state: What is remembered; saved with the rule's.
    """

    def __init__(self, streams: Sequence[Stream], metrics: Sequence[str]) -> None:
        self._keys = [(s.name, m, stream_key(s, m)) for s in streams for m in metrics]
        self.state = SeenState()

    def take(self, record: StepRecord) -> None:
        """Take in a record; forget the streams whose weights were made again."""
        if record.events:
            for name in reinitialised(record.events):
                self.state.values.pop(name, None)
        metrics = record.metrics
        for name, metric, key in self._keys:
            if key in metrics:
                self.state.values.setdefault(name, {})[metric] = metrics[key]
        self.state.modules.update(record.facts.modules)
        self.state.streams.update(record.facts.streams)

    def of(self, stream: Stream) -> Mapping[str, float]:
        """Return the values of a stream, by metric."""
        return self.state.values.get(stream.name, {})

    def module(self, stream: Stream) -> ModuleFacts:
        """Return the facts of a stream's module."""
        return self.state.modules.get(stream.module, _NO_MODULE)

    def stream(self, stream: Stream) -> StreamFacts:
        """Return the facts of a stream."""
        return self.state.streams.get(stream.name, _NO_STREAM)


@dataclass(slots=True)
class Outside:
    """What was done to a training beside its steps.

    Attributes:
        raised: The last rise of a learning rate, as its event; empty for none.
        raised_at: When that was.
        written: The stream whose weights somebody has written last; empty for none.
        written_at: When that was.
        late: Whether gradients are clipped after the step that has used them.
    """

    raised: str = ""
    raised_at: int = -1
    written: str = ""
    written_at: int = -1
    late: bool = False

    def take(self, record: StepRecord) -> None:
        """Take in a record."""
        self.late = self.late or bool(record.facts.run.written_late)
        for event in record.events:
            kind, _, rest = event.partition(":")
            if kind == "written":
                self.written, self.written_at = rest, record.step
            elif kind == "lr":
                before, _, after, *_ = rest.split()
                if float(after) > float(before):
                    self.raised, self.raised_at = rest.strip(), record.step

    def was_raised(self, since: int) -> bool:
        """Tell whether a rate was raised shortly before a step, or after it."""
        return bool(self.raised) and self.raised_at >= since - _SHORTLY

    def was_written(self, since: int) -> bool:
        """Tell whether weights were written shortly before a step, or after it."""
        return bool(self.written) and self.written_at >= since - _SHORTLY

    @property
    def rise(self) -> str:
        """Say which rise it was."""
        rates = self.raised.replace("->", "to")
        return f"the learning rate went from {rates} at step {self.raised_at}"


def by_module(streams: Iterable[Stream]) -> dict[str, list[Stream]]:
    """Return the streams of each module, by its path."""
    found: dict[str, list[Stream]] = {}
    for stream in streams:
        found.setdefault(stream.module, []).append(stream)
    return found


def add_travel(
    known: dict[str, Any], steps: Iterable[tuple[float | None, bool]]
) -> None:
    """Add the sizes of some steps' updates to a cumulative one.

    Args:
        known: What is known of a stream, with its ``travel``.
        steps: Of each its update ratio, None where none was measured, and whether it
            was read in full. The next ratio that is read stands for the steps before
            it that were not, too.
    """
    for ratio, full in steps:
        if not full:
            known["unread"] = known.get("unread", 0) + 1
        elif ratio is not None:
            known["travel"] += ratio * (1 + known.pop("unread", 0))
