"""Exploding gradients by what grows through time, whatever the total norm is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from gradwatch.block import Block
from gradwatch.kinds import text
from gradwatch.kinds.exploding import CONTEXT, EXPLODING, growth_cause
from gradwatch.kinds.latch import Hysteresis, Levels
from gradwatch.kinds.remembering import Remembering
from gradwatch.kinds.seen import Seen, SeenState
from gradwatch.metrics import stream_key
from gradwatch.numerics.streaming import theil_sen
from gradwatch.record import Alert, StepRecord, Stream, reinitialised

_OFTEN: Final = EXPLODING.count("often")
_AGAIN: Final = EXPLODING.counts("again")
_SAMPLES: Final = EXPLODING.count("slope_over")
_LOST: Final = EXPLODING.count("lost")
_SOON: Final = EXPLODING.count("soon")


@dataclass(slots=True)
class _State:
    """What the rule remembers.

    Attributes:
        levels: Of every stream.
        seen: What was last seen of every stream.
        past: Stream -> [step, growth] of its last probes.
        rising: Stream -> since when its growth rises.
        measured: Stream -> when it was last measured.
        probed: When any was.
    """

    levels: Levels = field(default_factory=Levels)
    seen: SeenState = field(default_factory=SeenState)
    past: dict[str, list[list[float]]] = field(default_factory=dict)
    rising: dict[str, int] = field(default_factory=dict)
    measured: dict[str, int] = field(default_factory=dict)
    probed: int = 0


class Growth(Remembering[_State]):
    """A gradient grows on its way back through the sequence: see the catalogue.

    Seen from the first step on, and while the total norm is clipped. A growth that
    rises together with rho is told of before it crosses, as a notice.
    """

    kind = EXPLODING.name

    def __init__(self, streams: Sequence[Stream] = ()) -> None:
        self.wants: str | None = None
        self.wishes: str | None = None
        self._watched = [(s, stream_key(s, "growth_log10")) for s in streams]
        self._names = [s.name for s in streams]
        self._seen = Seen(streams, (*CONTEXT, "rho_trend"))
        self._levels = Hysteresis.of(
            EXPLODING, "growth", at_once=EXPLODING.at("growth_at_once")
        )
        super().__init__(_State(levels=self._levels.state, seen=self._seen.state))

    @property
    def active(self) -> bool:
        """Whether gradients still grow in some stream, or rise towards it."""
        return self._levels.active or bool(self._state.rising)

    def update_block(self, block: Block) -> bool:
        """Take in plain rows, if no stream has been without a measurement for long."""
        last = block.steps[-1]
        if any(last - at > _LOST for at in self._state.measured.values()):
            return False
        self.wants = None
        self._ask(last)
        return True

    def update(self, record: StepRecord) -> list[Alert]:
        """Judge one record."""
        self.wants, found = None, []
        self._seen.take(record)
        for name in reinitialised(record.events):
            self._levels.forget(name)
            self._state.past.pop(name, None)
            self._state.rising.pop(name, None)
        for stream, key in self._watched:
            growth = record.metrics.get(key)
            if growth is None:
                continue
            self._state.probed = self._state.measured[stream.name] = record.step
            change = self._levels.update(stream.name, record.step, growth)
            if change == "raised":
                self._state.rising.pop(stream.name, None)
                found.append(self._alert(record, stream, key, growth))
            elif not self._levels.raised(stream.name):
                found += self._early(record, stream, key, growth)
        for name in [
            n for n, at in self._state.measured.items() if record.step - at > _LOST
        ]:
            self._levels.forget(name)  # frozen or unused since: nobody can tell
            self._state.rising.pop(name, None)
            del self._state.measured[name]
        self._ask(record.step)
        return found

    def _ask(self, step: int) -> None:
        """Ask for probes: soon while suspected, else often while something rises."""
        steps = step + 1 - self._state.probed
        unsure = max(map(self._levels.suspicions, self._names), default=0)
        if unsure and steps >= _AGAIN[unsure]:
            self.wants = "flow"
        due = (self.active or self._growing()) and steps >= _OFTEN
        self.wishes = "flow" if due else None

    def _growing(self) -> bool:
        """Tell whether a growth is where a rise would soon cross the threshold."""
        low = EXPLODING.clear("rising")
        return any(p and low <= p[-1][1] for p in self._state.past.values())

    def _early(
        self, record: StepRecord, stream: Stream, key: str, growth: float
    ) -> list[Alert]:
        """Return the notice of a growth that rises towards the threshold."""
        name = stream.name
        known = self._state.past.get(name, [])
        past = self._state.past[name] = [*known, [record.step, growth]][-_SAMPLES:]
        slope = theil_sen(*zip(*past, strict=True)) if len(past) > 1 else 0.0
        if name in self._state.rising:
            if growth < EXPLODING.clear("rising") or slope <= 0:
                del self._state.rising[name]
            return []
        if len(past) < _SAMPLES or growth < EXPLODING.at("rising") or slope <= 0:
            return []
        left = (EXPLODING.at("growth") - growth) / slope
        if not 0 < left <= _SOON or self._seen.of(stream).get("rho_trend", 0.0) <= 0:
            return []
        self._state.rising[name] = int(past[0][0])
        return [self._notice(record, stream, key, growth, left)]

    def _notice(
        self,
        record: StepRecord,
        stream: Stream,
        key: str,
        growth: float,
        left: float,
    ) -> Alert:
        cause = growth_cause(stream, self._seen.of(stream))
        trend = self._seen.of(stream)["rho_trend"]
        rounded = max(_OFTEN * math.ceil(left / _OFTEN), _OFTEN)
        return text.alert(
            EXPLODING,
            record,
            severity="info",
            since=self._state.rising[stream.name],
            what=(
                f"growth through time in {stream.name} is rising; at this pace it "
                f"crosses the alarm threshold within about {rounded} steps"
            ),
            shown=(
                f"growth_log10 {growth:.1f}, up in {_SAMPLES} probes (alarm at "
                f"{EXPLODING.at('growth')}); rho rises by {trend:.2g} a step"
            ),
            cause=cause,
            evidence={key: (growth, EXPLODING.at("growth"))},
            stream=stream,
            remedy=EXPLODING.remedy(cause, stream),
        )

    def _alert(
        self, record: StepRecord, stream: Stream, key: str, growth: float
    ) -> Alert:
        levels, cause = self._levels, growth_cause(stream, self._seen.of(stream))
        since = levels.since(stream.name)
        return text.alert(
            EXPLODING,
            record,
            since=since,
            what=f"gradients grow through time in {stream.name} since step {since}",
            shown=(
                f"growth_log10 {growth:.1f} (alarm at {levels.raise_at} in "
                f"{levels.running} consecutive probes, or {levels.at_once} in one): a "
                f"gradient grows to 10^{growth:.1f} times its size through time"
            ),
            cause=cause,
            evidence={key: (growth, levels.raise_at)},
            stream=stream,
            remedy=EXPLODING.remedy(cause, stream),
        )
