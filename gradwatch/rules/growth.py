"""Exploding gradients by what grows through time, whatever the total norm is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from gradwatch import remedies
from gradwatch.metrics import stream_key
from gradwatch.record import Alert, StepRecord, Stream, reinitialised
from gradwatch.rules import text
from gradwatch.rules.hysteresis import Hysteresis

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
        self._levels = Hysteresis(raise_at=2.4, clear_at=1.7, at_once=2.7)
        self._seen: dict[str, dict[str, float]] = {}
        self._probed = 0

    @property
    def active(self) -> bool:
        """Whether gradients still grow in some stream."""
        return self._levels.active

    def update(self, record: StepRecord) -> list[Alert]:
        """Judge one record."""
        self.wants, found = None, []
        for name in reinitialised(record.events):
            self._levels.forget(name)
            self._seen.pop(name, None)
        for name, metric, key in self._context:
            if key in record.metrics:
                self._seen.setdefault(name, {})[metric] = record.metrics[key]
        for stream, key in self._watched:
            growth = record.metrics.get(key)
            if growth is None:
                continue
            self._probed = record.step
            change = self._levels.update(stream.name, record.step, growth)
            if change == "suspected":
                self.wants = "flow"
            elif change == "raised":
                found.append(self._alert(record, stream, key, growth))
        due = self.active and record.step + 1 - self._probed >= _OFTEN
        self.wishes = "flow" if due else None
        return found

    def _alert(
        self, record: StepRecord, stream: Stream, key: str, growth: float
    ) -> Alert:
        levels, cause = self._levels, self._cause(stream)
        since = levels.since(stream.name)
        remedy = remedies.against(self.kind, cause, stream)
        assert remedy is not None
        shown = (
            f"growth_log10 {growth:.1f} (alarm from {levels.raise_at}, twice, or "
            f"{levels.at_once}): "
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
            evidence={key: (growth, levels.raise_at)},
            message=text.four_lines(
                self.kind,
                record.step,
                f"gradients grow through time in {stream.name} since step {since}",
                shown,
                text.GROWTH[cause],
                text.remedy_line(remedy, since),
            ),
            remedy=remedy,
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
        return {
            "levels": self._levels.state_dict(),
            "seen": dict(self._seen),
            "probed": self._probed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._levels.load_state_dict(state["levels"])
        self._seen, self._probed = dict(state["seen"]), state["probed"]
