"""Exploding gradients, as far as the total norm and the updates alone can decide.

Each threshold and the margin it was chosen with stands in docs/alerts.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from gradwatch import remedies
from gradwatch.metrics import run_key, stream_key
from gradwatch.numerics.streaming import Window, median, push
from gradwatch.record import Alert, Remedy, StepRecord, Stream, reinitialised
from gradwatch.rules import text

WARM_UP: Final = 12
"""Finite norms that a running median needs before anything is compared with it."""
_WINDOW: Final = 25

_NORM = run_key("grad_norm")


class Exploding:
    """The total norm far above its own running median, and staying there.

    With the running median of the last 25 usual norms: 10,000 times it at three steps
    running, or 100 times at 25 steps running, each also 10 times the largest median so
    far; or 10 times it at two steps running in which an update was larger than the
    recurrent weights that it changed; or not finite right after 10,000 times. A net
    that explodes from step 0 is its own median and is not seen here.
    """

    kind = "exploding"
    factor: Final = 1e4
    running: Final = 3
    lasting_factor: Final = 100.0
    lasting: Final = 25
    above_peak: Final = 10.0
    clear: Final = 10.0
    jump: Final = 1.0
    jump_running: Final = 2
    leap: Final = 10.0
    before_nonfinite: Final = 1e4

    def __init__(self, streams: Sequence[Stream] = ()) -> None:
        self.active = False
        self.wants: tuple[str, ...] = ()
        self._streams = tuple(streams)
        self._keys = [
            (s.name, stream_key(s, "rho"), stream_key(s, "update_ratio"))
            for s in streams
        ]
        self._norms: Window = ()
        self._peak = 0.0
        self._since = 0
        self._high: list[float] = []  # ratios to the median, while it stays above 10
        self._updates: Window = ()
        self._jumps: dict[str, float] = {}
        self._calm = 0
        self._rho: dict[str, list[float]] = {}
        self._carriers: dict[str, float] = {}

    def update(self, record: StepRecord) -> list[Alert]:
        """Judge one record."""
        if reinitialised(record.events):  # norms of other weights are no measure
            self.load_state_dict(Exploding(self._streams).state_dict())
        self.wants = ()
        self._note_rho(record)
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
        self._carriers = dict(record.facts.get("carriers", self._carriers))
        if not self._high:
            self._since, self._jumps = record.step, {}
            self.wants = () if self.active else ("spectrum", "flow")
        self._high = [*self._high, ratio][-self.lasting :]
        self._note_jumps(record)
        if self.active or not self._decided(norm):
            return []
        return [self._alert(record, norm, usual)]

    def _decided(self, norm: float) -> bool:
        high = self._high
        if self._jumps and len(high) >= self.jump_running:
            return True
        far = len(high) >= self.running and min(high[-self.running :]) >= self.factor
        long = len(high) >= self.lasting and min(high) >= self.lasting_factor
        return (far or long) and norm >= self.above_peak * self._peak

    def _take_usual(self, record: StepRecord, norm: float, usual: float) -> None:
        """Take a usual norm into the median; count the steps back to calm."""
        ratios = [record.metrics.get(key, 0.0) for _, _, key in self._keys]
        self._updates = push(self._updates, max(ratios, default=0.0), _WINDOW)
        self._norms = push(self._norms, norm, _WINDOW)
        if usual > self._peak and len(self._norms) > WARM_UP:
            self._peak = usual
        self._high = []
        self._calm += 1
        if self._calm >= self.running:
            self.active = False

    def _note_jumps(self, record: StepRecord) -> None:
        for name, _, key in self._keys:
            ratio = record.metrics.get(key, 0.0)
            if ratio >= self.jump:
                self._jumps[name] = max(ratio, self._jumps.get(name, 0.0))

    def _note_rho(self, record: StepRecord) -> None:
        for name, key, _ in self._keys:
            rho = record.metrics.get(key)
            if rho is not None:
                self._rho[name] = [self._rho.get(name, [rho])[0], rho]

    def _alert(self, record: StepRecord, norm: float, usual: float) -> Alert:
        self.active = True
        since = self._since
        heavy = max(self._carriers, key=self._carriers.__getitem__, default="")
        at = [s for s in self._streams if _belongs(heavy, s)]
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
        why, do, remedy = self._why_and_do(usual)
        message = text.four_lines(
            self.kind,
            record.step,
            f"the gradient norm has exploded since step {since}",
            shown,
            why,
            do,
        )
        return Alert(
            kind=self.kind,
            severity="error",
            step=record.step,
            since=since,
            stream=at[0].name if at else None,
            streams=tuple(s.name for s in at[:1]),
            evidence=self._evidence(norm, usual),
            message=message,
            remedy=remedy,
        )

    def _why_and_do(self, usual: float) -> tuple[str, str, Remedy | None]:
        since = self._since
        *before, last = self._updates or (0.0,)
        common = median(tuple(before))
        if common > 0 and last >= self.leap * common:
            why = (
                f"the last update before it moved the recurrent weights {last:.2g} of "
                f"their norm, {last / common:.3g} times as far as usual: the learning "
                "rate is too high"
            )
            return why, text.lr_line(since), None
        grown = self._grown()
        if grown is None or self._jumps:  # what jumped tells nothing of what was before
            clip = remedies.clipping(5 * usual)
            return text.EXPLODING_UNDECIDED, text.remedy_line(clip, since), clip
        first, now = self._rho[grown.name]
        why = (
            f"rho of {grown.name} was {first:.3g} at first and is {now:.3g}; clipping "
            "would hide that, not cure it"
        )
        anew = remedies.against(self.kind, "large_radius", grown)
        assert anew is not None
        return why, text.remedy_line(anew, since), anew

    def _evidence(
        self, norm: float, usual: float
    ) -> dict[str, tuple[float, float | None]]:
        factor = self.clear if self._jumps else self.factor
        found: dict[str, tuple[float, float | None]] = {_NORM: (norm, factor * usual)}
        for name, _, key in self._keys:
            if name in self._jumps:
                found[key] = (self._jumps[name], self.jump)
        return found

    def _grown(self) -> Stream | None:
        """Return the stream whose rho has grown most, by more than a tenth."""
        growth = {n: last / max(first, 1e-12) for n, (first, last) in self._rho.items()}
        grown = [s for s in self._streams if growth.get(s.name, 0.0) > 1.1]
        return max(grown, key=lambda s: growth[s.name], default=None)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values."""
        static = ("_streams", "_keys")
        return {k: v for k, v in vars(self).items() if k not in static}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        vars(self).update(state)


def _belongs(parameter: str, stream: Stream) -> bool:
    """Tell whether a parameter, by its name, is one of a stream's weights."""
    path, _, last = parameter.rpartition(".")
    own = stream.name.removeprefix(stream.module)[1:]
    within = path == stream.module or path.startswith(f"{stream.module}.") or not path
    return within and (f"_{own}" in f"{last}." or own in path if own else True)
