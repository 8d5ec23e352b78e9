"""Exploding gradients by what grows through time, whatever the total norm is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from gradwatch.metrics import stream_key
from gradwatch.record import Alert, StepRecord, Stream
from gradwatch.rules import text

_RAISE: Final = 2.4
_AT_ONCE: Final = 2.7
_CLEAR: Final = 1.7
_RUNNING: Final = 2
_CALM: Final = 3
_OFTEN: Final = 10
"""Steps between probes while an incident is open."""
_CONTEXT: Final = ("rho", "rho_total_drift")


class Growth:
    """A gradient grows by 10^2.4 or more on its way back through the sequence.

    ``growth_log10`` at 2.4 in two probes running (the second is asked for at once), or
    at 2.7 in one; cleared after three at 1.7 or below. It is seen from the first step
    on, and while the total norm is clipped.
    """

    kind = "exploding"

    def __init__(self, streams: Sequence[Stream] = ()) -> None:
        self.wants: str | None = None
        self.wishes: str | None = None
        self._watched = [(s, stream_key(s, "growth_log10")) for s in streams]
        self._context = [
            (s.name, name, stream_key(s, name)) for s in streams for name in _CONTEXT
        ]
        self._over: dict[str, list[int]] = {}  # stream: times over, since which step
        self._raised: dict[str, int] = {}  # stream: calm probes running
        self._seen: dict[str, dict[str, float]] = {}
        self._probed = 0

    @property
    def active(self) -> bool:
        """Whether gradients still grow in some stream."""
        return bool(self._raised)

    def update(self, record: StepRecord) -> list[Alert]:
        """Judge one record."""
        self.wants, found = None, []
        for name, metric, key in self._context:
            if key in record.metrics:
                self._seen.setdefault(name, {})[metric] = record.metrics[key]
        for stream, key in self._watched:
            growth = record.metrics.get(key)
            if growth is not None:
                self._probed = record.step
                found += self._probe(record, stream, key, growth)
        if len(self._over) > len(self._raised):  # a suspicion
            self.wants = "flow"
        due = self._raised and record.step + 1 - self._probed >= _OFTEN
        self.wishes = "flow" if due else None
        return found

    def _probe(
        self, record: StepRecord, stream: Stream, key: str, growth: float
    ) -> list[Alert]:
        name = stream.name
        if name in self._raised:
            calm = self._raised[name] + 1 if growth <= _CLEAR else 0
            self._raised[name] = calm
            if calm >= _CALM:
                del self._raised[name]
                self._over.pop(name, None)
            return []
        if not growth >= _RAISE:
            self._over.pop(name, None)
            return []
        times, since = self._over.get(name, [0, record.step])
        self._over[name] = [times + 1, since]
        if times + 1 < _RUNNING and growth < _AT_ONCE:
            return []
        self._raised[name] = 0
        return [self._alert(record, stream, key, growth)]

    def _alert(
        self, record: StepRecord, stream: Stream, key: str, growth: float
    ) -> Alert:
        since, cause = self._over[stream.name][1], self._cause(stream)
        shown = (
            f"growth_log10 {growth:.1f} (alarm from {_RAISE}, twice, or {_AT_ONCE}): "
            f"a gradient grows to 10^{growth:.1f} of its size on its way back"
        )
        return Alert(
            kind=self.kind,
            severity="error",
            step=record.step,
            since=since,
            stream=stream.name,
            streams=(stream.name,),
            cause=cause,
            evidence={key: (growth, _RAISE)},
            message=text.four_lines(
                self.kind,
                record.step,
                f"gradients grow through time in {stream.name} since step {since}",
                shown,
                text.GROWTH[cause],
                text.orthogonal_line(stream, since, bare=False),
            ),
        )

    def _cause(self, stream: Stream) -> str:
        """Return the first cause that the evidence names."""
        seen = self._seen.get(stream.name, {})
        if stream.gates:
            return "large_recurrent_weights"
        if seen.get("rho_total_drift", 0.0) > 0.1:
            return "drift"
        if seen.get("rho", 1.0) < 1:
            return "active_subnetwork" if stream.kind == "RNN_RELU" else "nonnormal"
        return "large_radius" if stream.kind == "RNN_RELU" else "chaos"

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values."""
        static = ("_watched", "_context", "wants", "wishes")
        return {k: v for k, v in vars(self).items() if k not in static}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        vars(self).update(state)
