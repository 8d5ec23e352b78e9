"""Exploding gradients, as far as the total norm and the updates alone can decide."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from gradwatch import remedies
from gradwatch.metrics import run_key, stream_key
from gradwatch.numerics.streaming import Window, median, push
from gradwatch.record import Alert, Remedy, StepRecord, Stream, reinitialised
from gradwatch.rules import text
from gradwatch.rules.catalogue.flow import BEFORE, EXPLODING, HIDDEN, LOWER_RATE
from gradwatch.rules.causes import CONTEXT, GROWN, growth_cause
from gradwatch.rules.seen import Seen

WARM_UP: Final = 12
"""Finite norms that a running median needs before anything is compared with it."""
_WINDOW: Final = 25
_LOOKS: Final = (1, 2, 4, 8, 12, 16, 20, 24)
"""Steps of a high norm after which it is asked what grows through time."""
_GROWS: Final = EXPLODING.clear("growth")

_NORM = run_key("grad_norm")


class Exploding:
    """The total norm far above its own running median, and staying there.

    Compared with the running median of the last 25 usual norms; see the catalogue. A
    net that explodes from step 0 is its own median and is not seen here.
    """

    kind = EXPLODING.name
    factor: Final = EXPLODING.at("norm")
    running: Final = 3
    lasting_factor: Final = EXPLODING.at("lasting")
    lasting: Final = 25
    above_peak: Final = EXPLODING.at("peak")
    clear: Final = EXPLODING.clear("norm")
    leap: Final = 10.0
    before_nonfinite: Final = 1e4

    def __init__(self, streams: Sequence[Stream] = ()) -> None:
        self.active = False
        self.wants: tuple[str, ...] = ()
        self._streams = tuple(streams)
        self._keys = [stream_key(s, "update_ratio") for s in streams]
        self._seen = Seen(streams, CONTEXT)
        self._norms: Window = ()
        self._peak = 0.0
        self._since = self._lasts = 0
        self._high: list[float] = []  # ratios to the median, while it stays above 10
        self._updates: Window = ()
        self._calm = 0
        self._carriers: dict[str, float] = {}

    def update(self, record: StepRecord) -> list[Alert]:
        """Judge one record."""
        if reinitialised(record.events):  # norms of other weights are no measure
            seen = self._seen.state_dict()
            self.load_state_dict(
                {**Exploding(self._streams).state_dict(), "seen": seen}
            )
        self.wants = ()
        self._seen.take(record)
        norm = record.metrics.get(_NORM)
        if norm is None:
            return []
        usual = median(self._norms)
        warm = len(self._norms) >= WARM_UP and usual > 0
        if not math.isfinite(norm):
            burst = bool(self._high) and self._high[-1] >= self.before_nonfinite
            self._high = []
            if burst and not self.active and "skipped_step" not in record.events:
                return [self._alert(record, norm, usual)]
            return []
        ratio = norm / usual if warm else 0.0
        if ratio < self.clear:
            self._take_usual(record, norm, usual)
            return []
        self._calm = 0
        if record.facts.step.carriers is not None:
            self._carriers = dict(record.facts.step.carriers)
        if not self._high:
            self._since, self._lasts = record.step, 0
        self._lasts += 1
        if not self.active and self._lasts in _LOOKS:
            self.wants = ("spectrum", "flow")
        self._high = [*self._high, ratio][-self.lasting :]
        if self.active or not self._decided(usual):
            return []
        return [self._alert(record, norm, usual)]

    def _decided(self, usual: float) -> bool:
        high = self._high
        last = high[-self.running :]
        far = len(last) == self.running and min(last) >= self.factor
        long = len(high) >= self.lasting and min(high) >= self.lasting_factor
        # One norm of these above all that was usual is a batch's, not the net's.
        least = min(last) if far else median(tuple(high))
        return (far or long) and least * usual >= self.above_peak * self._peak

    def _take_usual(self, record: StepRecord, norm: float, usual: float) -> None:
        """Take a usual norm into the median; count the steps back to calm."""
        ratios = [record.metrics.get(key, 0.0) for key in self._keys]
        self._updates = push(self._updates, max(ratios, default=0.0), _WINDOW)
        self._norms = push(self._norms, norm, _WINDOW)
        if usual > self._peak and len(self._norms) > WARM_UP:
            self._peak = usual
        self._high = []
        self._calm += 1
        if self._calm >= self.running:
            self.active = False

    def _alert(self, record: StepRecord, norm: float, usual: float) -> Alert:
        self.active = True
        since = self._since
        shown = (
            f"total norm {norm:.3g}, {norm / usual:.3g} times its median {usual:.3g}"
        )
        if not math.isfinite(norm):
            shown = (
                f"total norm {norm}, right after a burst; its median was {usual:.3g}"
            )
        if self._carriers:
            parts = (f"{100 * v:.0f} % {name}" for name, v in self._carriers.items())
            shown += f"; carried by {', '.join(parts)}"
        stream, cause, why, do, remedy = self._judgement(usual)
        evidence: dict[str, tuple[float, float | None]] = {
            _NORM: (norm, self.factor * usual)
        }
        if cause is not None and stream is not None:
            grown = self._seen.of(stream).get("growth_log10", 0.0)
            evidence[stream_key(stream, "growth_log10")] = (grown, _GROWS)
            shown += f"; growth_log10 {grown:.1f} in {stream.name}"
        return text.alert(
            EXPLODING,
            record,
            since=since,
            what=f"the gradient norm has exploded since step {since}",
            shown=shown,
            cause=cause,
            evidence=evidence,
            stream=stream,
            remedy=remedy,
            why=why,
            do=do,
        )

    def _judgement(
        self, usual: float
    ) -> tuple[Stream | None, str | None, str | None, str | None, Remedy | None]:
        """Return the stream, the cause, why and do where they are not its, a remedy."""
        heavy = max(self._carriers, key=self._carriers.__getitem__, default="")
        bearer = next((s for s in self._streams if _belongs(heavy, s)), None)
        *before, last = self._updates or (0.0,)
        common = median(tuple(before))
        if common > 0 and last >= self.leap * common:
            why = (
                f"the last update before it moved the recurrent weights {last:.2g} of "
                f"their norm, {last / common:.3g} times as far as usual: the learning "
                "rate is too high"
            )
            return (
                bearer,
                None,
                why,
                LOWER_RATE + BEFORE.format(since=self._since),
                None,
            )
        grows = self._grows()
        if grows is None:
            return bearer, None, None, None, remedies.clipping(5 * usual)
        seen = self._seen.of(grows)
        cause = growth_cause(grows, seen)
        remedy = remedies.against(self.kind, cause, grows)
        if cause != "drift":
            return grows, cause, None, None, remedy
        now, moved = seen.get("rho", math.nan), seen["rho_total_drift"]
        why = (
            f"rho of {grows.name} was {now / math.exp(moved):.3g} at first and is "
            f"{now:.3g}; {HIDDEN}"
        )
        return grows, cause, why, None, remedy

    def _grows(self) -> Stream | None:
        """Return the stream through which gradients grow most, or whose rho has."""
        seen = {s: self._seen.of(s) for s in self._streams}
        growth = {s: v.get("growth_log10", 0.0) for s, v in seen.items()}
        drift = {
            s: v.get("rho_total_drift", 0.0) for s, v in seen.items() if not s.gates
        }
        for values, least in ((growth, _GROWS), (drift, GROWN)):
            most = max(values, key=values.__getitem__, default=None)
            if most is not None and values[most] >= least:
                return most
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values."""
        static = ("_streams", "_keys", "_seen")
        state = {k: v for k, v in vars(self).items() if k not in static}
        return {**state, "seen": self._seen.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._seen.load_state_dict(state["seen"])
        vars(self).update({k: v for k, v in state.items() if k != "seen"})


def _belongs(parameter: str, stream: Stream) -> bool:
    """Tell whether a parameter, by its name, is one of a stream's weights."""
    path, _, last = parameter.rpartition(".")
    own = stream.name.removeprefix(stream.module)[1:]
    within = path == stream.module or path.startswith(f"{stream.module}.") or not path
    return within and (f"_{own}" in f"{last}." or own in path if own else True)
