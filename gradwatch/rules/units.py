"""Units and gates that have stopped to take part, by the state depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from gradwatch import remedies
from gradwatch.facts import Facts, ModuleFacts
from gradwatch.metrics import stream_key
from gradwatch.record import Alert, StepRecord, Stream, reinitialised
from gradwatch.rules import text
from gradwatch.rules.catalogue.units import DEAD_UNITS, GATE_STUCK
from gradwatch.rules.hysteresis import Hysteresis

_GATES: Final[Mapping[str, Mapping[str, tuple[str, str]]]] = {
    "LSTM": {"i": ("shut", "input_gate"), "o": ("shut", "output_gate")},
    "GRU": {"z": ("open", "update_gate")},
}
"""Of each kind of net: gate -> the metric that shows it stuck, and the cause."""

_SIDES: Final[Mapping[str, str]] = {
    "input_gate": "i is below .05",
    "output_gate": "o is below .05",
    "update_gate": "z is above .95",
}
_STATES: Final = 40
"""Fewest states from which a unit that was 0 in all of them is called dead."""
_REPLAYED: Final = 4
"""Sequences that stand for the batch below the uppermost layer."""


class DeadUnits:
    """Half of the ReLU units are 0 at every step of every sequence looked at.

    Raised at .5, at two measurements running (the second is asked for at once),
    cleared at .3. In healthy runs the largest share was .21.
    """

    kind = DEAD_UNITS.name

    def __init__(self, streams: Sequence[Stream] = ()) -> None:
        self.wants: str | None = None
        self._watched = [
            (stream, stream_key(stream, "dead"))
            for stream in streams
            if stream.kind == "RNN_RELU"
        ]
        self._top = {s.module: s.layer for s in sorted(streams, key=lambda s: s.layer)}
        self._facts: dict[str, ModuleFacts] = {}
        self._levels = Hysteresis(DEAD_UNITS.at("dead"), DEAD_UNITS.clear("dead"))

    @property
    def active(self) -> bool:
        """Whether a stream is still below its clear value."""
        return self._levels.active

    def update(self, record: StepRecord) -> list[Alert]:
        """Judge one record."""
        self.wants, found = None, []
        self._facts.update(record.facts.modules)
        for name in reinitialised(record.events):
            self._levels.forget(name)
        for stream, key in self._watched:
            share = record.metrics.get(key)
            if share is None or not self._enough(stream):
                continue
            change = self._levels.update(stream.name, record.step, share)
            if change == "suspected":
                self.wants = "state"
            elif change == "raised":
                found.append(self._alert(record, stream, share))
        return found

    def _enough(self, stream: Stream) -> bool:
        """Tell whether enough states were seen: of few, half are 0 by chance."""
        facts = self._facts.get(stream.module, ModuleFacts())
        length, batch = facts.T or 0, facts.B or 0
        if stream.layer < self._top[stream.module]:
            batch = min(batch, _REPLAYED)
        return bool(length * batch >= _STATES)

    def _alert(self, record: StepRecord, stream: Stream, share: float) -> Alert:
        since = self._levels.since(stream.name)
        active = record.metrics.get(stream_key(stream, "act_deriv"))
        shown = (
            f"dead {share:.2f} in {stream.name} (alarm from {self._levels.raise_at})"
        )
        if active is not None:
            shown += f"; share of active units at a step {active:.2f}"
        return text.alert(
            DEAD_UNITS,
            record,
            since=since,
            what=f"{100 * share:.0f} % of the units of {stream.name} never fire",
            shown=shown,
            cause="dead_relu",
            evidence={stream_key(stream, "dead"): (share, self._levels.raise_at)},
            stream=stream,
            remedy=remedies.against(self.kind, "dead_relu", stream),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values."""
        facts = Facts(modules=self._facts).to_plain()
        return {"levels": self._levels.state_dict(), "facts": facts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._levels.load_state_dict(state["levels"])
        self._facts = dict(Facts.from_plain(state["facts"]).modules)


class GateStuck:
    """A gate that lets nothing in, nothing out, or nothing change, nearly everywhere.

    The input or output gate of an LSTM below .05, or the update gate of a GRU above
    .95, in 95 % of all units and steps, at two measurements running (the second is
    asked for at once); cleared at 85 %. Gates that were set to remember are excused:
    an update gate that keeps for up to 20 lengths of the sequence, and an input gate
    beside a forget gate that does.
    """

    kind = GATE_STUCK.name

    def __init__(self, streams: Sequence[Stream] = ()) -> None:
        self.wants: str | None = None
        self._watched = [
            (stream, gate, stream_key(stream, metric, gate), cause)
            for stream in streams
            for gate, (metric, cause) in _GATES.get(stream.kind, {}).items()
        ]
        self._levels = Hysteresis(GATE_STUCK.at("share"), GATE_STUCK.clear("share"))
        self._lengths: dict[str, int] = {}

    @property
    def active(self) -> bool:
        """Whether a gate is still above its clear value."""
        return self._levels.active

    def update(self, record: StepRecord) -> list[Alert]:
        """Judge one record."""
        self.wants, found = None, []
        for name, facts in record.facts.modules.items():
            if facts.T is not None:
                self._lengths[name] = facts.T
        remade = reinitialised(record.events)
        for stream, gate, key, cause in self._watched:
            if stream.name in remade:
                self._levels.forget(key)
            share = record.metrics.get(key)
            if share is None:
                continue
            if self._meant(record, stream, cause):
                share = 0.0
            change = self._levels.update(key, record.step, share)
            if change == "suspected":
                self.wants = "state"
            elif change == "raised":
                found.append(self._alert(record, stream, gate, key, cause))
        return found

    def _meant(self, record: StepRecord, stream: Stream, cause: str) -> bool:
        """Tell whether a gate is what a long memory looks like, as chrono sets it."""
        steps = record.metrics.get(stream_key(stream, "timescale"), 0.0)
        length = self._lengths.get(stream.module, 0)
        lasting = steps <= GATE_STUCK.at("meant") * length
        if cause == "input_gate":
            held = record.metrics.get(stream_key(stream, "open", "f"), 0.0)
            return lasting and held >= 0.5
        return lasting and cause == "update_gate"

    def _alert(
        self, record: StepRecord, stream: Stream, gate: str, key: str, cause: str
    ) -> Alert:
        share, since = record.metrics[key], self._levels.since(key)
        length = self._lengths.get(stream.module, 0)
        return text.alert(
            GATE_STUCK,
            record,
            since=since,
            what=f"gate {gate} of {stream.name} is stuck",
            shown=(
                f"{_SIDES[cause]} in {100 * share:.0f} % of units and steps "
                f"(alarm from {100 * self._levels.raise_at:.0f} %)"
            ),
            cause=cause,
            evidence={key: (share, self._levels.raise_at)},
            stream=stream,
            remedy=remedies.against(self.kind, cause, stream, length),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values."""
        return {"levels": self._levels.state_dict(), "lengths": dict(self._lengths)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._levels.load_state_dict(state["levels"])
        self._lengths = dict(state["lengths"])
