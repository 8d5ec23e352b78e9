"""What is missing in a stream, for how many steps; the base of three kinds.

An absence is a fault only where someone wanted the presence: a frozen weight is a
notice, and a weight that no optimizer holds needs no gradient.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from gradwatch.block import Block
from gradwatch.kinds.kind import Kind
from gradwatch.kinds.remembering import Remembering
from gradwatch.kinds.saturated import SATURATED
from gradwatch.kinds.seen import Seen, SeenState
from gradwatch.metrics import run_key, stream_key
from gradwatch.record import Alert, StepRecord, Stream, reinitialised

NORM = run_key("grad_norm")


class Keys(NamedTuple):
    """The keys of one stream, made once."""

    hh: str
    ih: str
    ratio: str

    @classmethod
    def of(cls, stream: Stream) -> Keys:
        """Return the keys of a stream."""
        names = ("grad_norm_hh", "grad_norm_ih", "update_ratio")
        return cls(*(stream_key(stream, name) for name in names))


@dataclass(slots=True)
class _State:
    """What a rule of what is missing remembers.

    Attributes:
        missing: Stream -> consecutive steps without.
        since: Stream -> the first of them.
        raised: Stream that was reported -> consecutive steps with it again.
        ever: Streams that it was ever there of.
        rates: Stream -> the learning rate that was seen first.
        norms: Stream -> the first norm of W_hh's gradient that was not 0.
        unheld: Parameters with a gradient that no optimizer holds.
        seen: What was last seen of every stream.
    """

    missing: dict[str, int] = field(default_factory=dict)
    since: dict[str, int] = field(default_factory=dict)
    raised: dict[str, int] = field(default_factory=dict)
    ever: dict[str, bool] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    unheld: list[str] = field(default_factory=list)
    seen: SeenState = field(default_factory=SeenState)


class Missing(Remembering[_State], ABC):
    """For how many steps something is missing in each stream, and the facts as known.

    A subclass tells of one step whether it is, and what is reported when it has lasted.
    """

    _row: Kind

    def __init__(self, streams: Sequence[Stream] = ()) -> None:
        self.wants: str | None = None
        self._watched = [(stream, Keys.of(stream)) for stream in streams]
        self._seen = Seen(streams, ("dead", "saturated"))
        super().__init__(_State(seen=self._seen.state))
        self._back = self._row.count("back")

    @property
    def active(self) -> bool:
        """Whether it is still missing somewhere."""
        return bool(self._state.raised)

    @abstractmethod
    def _hold(self, record: StepRecord, stream: Stream, keys: Keys) -> int | None:
        """Return how long it has to be missing; None where it is not, or excused."""

    @abstractmethod
    def _judged(self, record: StepRecord, stream: Stream, keys: Keys) -> list[Alert]:
        """Return what is reported once it has been missing for as long."""

    def update_block(self, block: Block) -> bool:
        """Take in plain rows in which nothing is missing that was there before."""
        norms, state = block.whole(NORM), self._state
        if norms is None or min(norms) <= 0 or state.missing or state.raised:
            return False
        for stream, keys in self._watched:
            if stream.name not in state.ever or not self._always(block, stream, keys):
                return False
        self.wants = None
        return True

    @abstractmethod
    def _always(self, block: Block, stream: Stream, keys: Keys) -> bool:
        """Tell whether it is missing in no row of a block; False where unsure."""

    def update(self, record: StepRecord) -> list[Alert]:
        """Judge one record."""
        self.wants, found = None, []
        self._note(record)
        if record.partial:
            return []
        norm = record.metrics.get(NORM, 0.0)
        if not norm > 0 or not math.isfinite(norm) or "skipped_step" in record.events:
            return []
        for stream, keys in self._watched:
            hold = self._hold(record, stream, keys)
            if hold is None:
                self._there(stream.name)
                continue
            missing = self._absent(stream.name, record.step)
            if missing == hold - 1:
                self.wants = "state"  # so that the facts are of now
            elif missing >= hold and stream.name not in self._state.raised:
                alerts = self._judged(record, stream, keys)
                if alerts:
                    self._state.raised[stream.name] = 0
                found += alerts
        return found

    def _note(self, record: StepRecord) -> None:
        self._seen.take(record)
        for name, facts in record.facts.streams.items():
            if facts.lr:
                self._state.rates.setdefault(name, facts.lr)
        if (unheld := record.facts.run.unheld) is not None:
            self._state.unheld = list(unheld)
        for name in reinitialised(record.events):
            for state in (
                self._state.missing,
                self._state.since,
                self._state.raised,
                self._state.ever,
            ):
                state.pop(name, None)

    def _half(self, stream: Stream) -> bool:
        """Tell whether the net computes in float16."""
        return "float16" in (
            self._seen.module(stream).dtype,
            self._seen.module(stream).autocast,
        )

    def _all_dead(self, stream: Stream) -> bool:
        """Tell whether no gradient passes because units are dead, here or above."""
        return any(
            self._seen.of(other).get("dead", 0.0) >= self._row.number("all_dead")
            for other, _ in self._watched
            if other.module == stream.module and other.layer >= stream.layer
        )

    def _is_saturated(self, stream: Stream) -> bool:
        """Tell whether hardly any gradient passes because units are at their ends."""
        share = self._seen.of(stream).get("saturated", 0.0)
        return not stream.gates and share >= SATURATED.at("without")

    def _there(self, name: str) -> None:
        """Note a step in which it was there, or in which nobody could tell."""
        self._state.ever[name] = True
        self._state.missing.pop(name, None)
        if name in self._state.raised:
            self._state.raised[name] += 1
            if self._state.raised[name] >= self._back:
                del self._state.raised[name]

    def _absent(self, name: str, step: int) -> int:
        """Note one in which it was not; return how many running."""
        if name not in self._state.missing:
            self._state.since[name] = step
        self._state.missing[name] = self._state.missing.get(name, 0) + 1
        if name in self._state.raised:
            self._state.raised[name] = 0
        return self._state.missing[name]
