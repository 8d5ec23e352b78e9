"""What is missing in a stream, for how many steps; the base of three kinds.

An absence is a fault only where someone wanted the presence: a frozen weight is a
notice, and a weight that no optimizer holds needs no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gradwatch.kinds.kind import Kind
from gradwatch.kinds.seen import Seen
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


class Missing:
    """For how many steps something is missing in each stream, and the facts as known.

    A subclass tells of one step whether it is, and what is said when it has lasted.
    """

    _row: Kind

    def __init__(self, streams: Sequence[Stream] = ()) -> None:
        self.wants: str | None = None
        self._watched = [(stream, Keys.of(stream)) for stream in streams]
        self._seen = Seen(streams, ("dead",))
        self._missing: dict[str, int] = {}
        self._since: dict[str, int] = {}
        self._raised: dict[str, int] = {}  # stream: consecutive steps with it again
        self._ever: dict[str, bool] = {}

    @property
    def active(self) -> bool:
        """Whether it is still missing somewhere."""
        return bool(self._raised)

    def _hold(self, record: StepRecord, stream: Stream, keys: Keys) -> int | None:
        """Return how long it has to be missing; None where it is not, or excused."""
        raise NotImplementedError

    def _judged(self, record: StepRecord, stream: Stream, keys: Keys) -> list[Alert]:
        """Return what is said once it has been missing for as long."""
        raise NotImplementedError

    def update(self, record: StepRecord) -> list[Alert]:
        """Judge one record."""
        self.wants, found = None, []
        self._note(record)
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
            elif missing >= hold and stream.name not in self._raised:
                alerts = self._judged(record, stream, keys)
                if alerts:
                    self._raised[stream.name] = 0
                found += alerts
        return found

    def _note(self, record: StepRecord) -> None:
        self._seen.take(record)
        for name in reinitialised(record.events):
            for state in (self._missing, self._since, self._raised, self._ever):
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

    def _there(self, name: str) -> None:
        """Note a step in which it was there, or in which nobody could tell."""
        self._ever[name] = True
        self._missing.pop(name, None)
        if name in self._raised:
            self._raised[name] += 1
            if self._raised[name] >= self._row.count("back"):
                del self._raised[name]

    def _absent(self, name: str, step: int) -> int:
        """Note one in which it was not; return how many running."""
        if name not in self._missing:
            self._since[name] = step
        self._missing[name] = self._missing.get(name, 0) + 1
        if name in self._raised:
            self._raised[name] = 0
        return self._missing[name]

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values."""
        plain = {k: v for k, v in vars(self).items() if isinstance(v, dict)}
        own = {key: dict(value) for key, value in plain.items()}
        return {**own, "_seen": self._seen.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._seen.load_state_dict(state["_seen"])
        own = {key: value for key, value in state.items() if key != "_seen"}
        vars(self).update({key: dict(value) for key, value in own.items()})
