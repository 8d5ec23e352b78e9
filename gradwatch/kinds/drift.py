"""A spectral radius far from where it began: a notice, for a vanilla net alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from gradwatch import remedies
from gradwatch.block import Block
from gradwatch.kinds import text
from gradwatch.kinds.kind import Cause, Evidence, Kind, Number
from gradwatch.kinds.latch import Hysteresis, Levels
from gradwatch.kinds.remembering import Remembering
from gradwatch.metrics import stream_key
from gradwatch.record import CELL, Alert, StepRecord, Stream, reinitialised

DRIFT = Kind(
    name="drift",
    title="gradwatch: the spectral radius has drifted",
    severity="info",
    meaning="rho of a vanilla net is far from where it began.",
    evidence={
        "moved": Evidence(
            "`rho_total_drift`, in size, at two consecutive measurements",
            0.5,
            0.35,
            "healthy runs reach .92: a notice, and no alarm",
        )
    },
    warm_up="20 steps after the first measurement",
    confirmed="by two consecutive measurements",
    over="after 3 measurements at .35 or below",
    excused="the gates of an LSTM or GRU, which move by 1.05 in healthy runs",
    causes={
        "drift": Cause(
            "by measurement",
            "gradients through time now {way}; no fault by itself",
            remedy="parametrize.orthogonal",
        )
    },
    numbers={
        "confirm": Number(
            2, "consecutive measurements that confirm it", "one may be chance"
        ),
        "calm": Number(
            3,
            "consecutive measurements at the clear value or below after which it is "
            "over",
            "one or two may be chance",
        ),
        "warm_up": Number(
            20,
            "steps after the first measurement before any is judged",
            "the first updates move rho most",
        ),
    },
)

_WARM_UP: Final = DRIFT.count("warm_up")


@dataclass(slots=True)
class _State:
    """What the rule remembers.

    Attributes:
        levels: Of every stream.
        began: Step of the first measurement.
    """

    levels: Levels = field(default_factory=Levels)
    began: int | None = None


class Drift(Remembering[_State]):
    """The logarithm of rho has moved by .5 since the start, at two measurements.

    Cleared at .35. Healthy runs reached .33: the margin is thin, so that this is a
    notice and never an alarm. The gates of an LSTM or GRU move by 1.05 in healthy runs
    and are left alone.
    """

    kind = DRIFT.name

    def __init__(self, streams: Sequence[Stream] = ()) -> None:
        self._watched = [
            (stream, stream_key(stream, "rho_total_drift"))
            for stream in streams
            if not stream.gates and stream.kind != CELL
        ]
        self._levels = Hysteresis.of(DRIFT, "moved")
        super().__init__(_State(levels=self._levels.state))

    @property
    def active(self) -> bool:
        """Whether a stream is still far from its start."""
        return self._levels.active

    def update_block(self, block: Block) -> bool:
        """Take in plain rows: what is judged here stands in none of them."""
        return True

    def update(self, record: StepRecord) -> list[Alert]:
        """Judge one record."""
        found = []
        for name in reinitialised(record.events):
            self._levels.forget(name)
        for stream, key in self._watched:
            moved = record.metrics.get(key)
            if moved is None:
                continue
            if self._state.began is None:
                self._state.began = record.step
            if record.step < self._state.began + _WARM_UP:
                continue
            if self._levels.update(stream.name, record.step, abs(moved)) == "raised":
                found.append(self._alert(record, stream, moved))
        return found

    def _alert(self, record: StepRecord, stream: Stream, moved: float) -> Alert:
        key, since = stream_key(stream, "rho_total_drift"), self._levels.since
        rho = record.metrics.get(stream_key(stream, "rho"))
        trend = record.metrics.get(stream_key(stream, "rho_trend"))
        shown = (
            f"total drift ln(rho / rho at the start) = {moved:+.2f} (notice beyond "
            f"+-{self._levels.raise_at:g})"
        )
        if rho is not None:
            shown += f"; rho is {rho:.3g}"
        if trend is not None:
            shown += f" and changes by {trend:+.2g} a step"
        way = "last longer and explode sooner" if moved > 0 else "die out sooner"
        remedy = DRIFT.remedy("drift", stream)
        assert remedy is not None
        line = remedies.line(remedy)
        return text.alert(
            DRIFT,
            record,
            since=since(stream.name),
            what=f"rho of {stream.name} has drifted",
            shown=shown,
            cause="drift",
            evidence={key: (moved, self._levels.raise_at)},
            stream=stream,
            remedy=remedy,
            why=DRIFT.causes["drift"].why.format(way=way),
            do=(
                f"nothing, unless gradients explode; then weight decay, or: {line}"
                if moved > 0
                else f"nothing, unless gradients vanish; then: {line}"
            ),
        )
