"""The kinds of alert that gradients alone can decide, and their thresholds.

Each threshold and the margin it was chosen with stands in docs/alerts.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from gradwatch.metrics import run_key, stream_key
from gradwatch.numerics.streaming import Window, median, push, robust_z
from gradwatch.record import Alert, StepRecord, Stream
from gradwatch.rules import text

WARM_UP: Final = 12
"""Finite norms that a running median needs before anything is compared with it."""
_WINDOW: Final = 25
_SKIPS_ALLOWED: Final = 10
_QUIET_STEPS: Final = 25

_NORM = run_key("grad_norm")
_NONFINITE = run_key("nonfinite")
_LOSS = run_key("loss")


class Nonfinite:
    """A gradient or a logged loss holds NaN or Inf.

    What a loss scaler or a refusing clipper skips is expected, up to ten steps in a
    row; the incident ends after 25 finite steps.
    """

    kind = "nonfinite"

    def __init__(self, streams: Sequence[Stream] = ()) -> None:
        self.active = False
        self._skips = 0
        self._quiet = 0
        self._finite: list[float] | None = None  # step and norm

    def update(self, record: StepRecord) -> list[Alert]:
        """Judge one record."""
        norm = record.metrics.get(_NORM)
        loss = record.metrics.get(_LOSS)
        count = record.metrics.get(_NONFINITE, 0.0)
        bad_loss = loss is not None and not math.isfinite(loss)
        if not count and not bad_loss:
            self._skips = 0
            self._quiet += 1
            if norm is not None and math.isfinite(norm):
                self._finite = [record.step, norm]
            if self._quiet >= _QUIET_STEPS:
                self.active = False
            return []
        self._quiet = 0
        if "skipped_step" in record.events:
            self._skips += 1
            by = record.facts.get("skipped_by", "user")
            excused = by in ("scaler", "clipper", "unknown")
            if excused and self._skips <= _SKIPS_ALLOWED:
                return []
        self.active = True
        return [self._alert(record, count, loss)]

    def _alert(self, record: StepRecord, count: float, loss: float | None) -> Alert:
        cause = self._cause(record, count, loss)
        names = record.facts.get("nonfinite", [])
        if count:
            what = f"{count:.0f} gradient tensors hold NaN or Inf"
            shown = f"first on the way back: {', '.join(names) or 'unknown'}"
            evidence: dict[str, tuple[float, float | None]] = {_NONFINITE: (count, 1.0)}
        else:
            what, shown = "the logged loss is not finite", f"loss {loss}"
            evidence = {_LOSS: (float(loss or 0.0), None)}
        if self._finite is not None:
            step, norm = self._finite
            shown += f"; last finite gradient norm {norm:.3g} at step {step:.0f}"
        else:
            shown += "; no gradient was finite before"
        why, do = text.NONFINITE[cause]
        if self._skips > _SKIPS_ALLOWED:
            what = f"{self._skips} steps in a row were skipped for NaN or Inf"
        return Alert(
            kind=self.kind,
            severity="error",
            step=record.step,
            since=record.step - max(self._skips - 1, 0),
            cause=cause,
            evidence=evidence,
            message=text.four_lines(self.kind, record.step, what, shown, why, do),
        )

    def _cause(
        self, record: StepRecord, count: float, loss: float | None
    ) -> str | None:
        if loss is not None and not math.isfinite(loss):
            return "nan_data" if self._finite is not None else None
        if self._skips > _SKIPS_ALLOWED and record.facts.get("skipped_by") == "scaler":
            return "fp16_overflow"
        if loss is not None:
            return "nan_backward"
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        vars(self).update(state)


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
        self.wants: str | None = None
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
        self.wants = None
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
            self.wants = None if self.active else "spectrum"
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
        why, do = self._why_and_do(usual)
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
        )

    def _why_and_do(self, usual: float) -> tuple[str, str]:
        since = self._since
        *before, last = self._updates or (0.0,)
        common = median(tuple(before))
        if common > 0 and last >= self.leap * common:
            why = (
                f"the last update before it moved the recurrent weights {last:.2g} of "
                f"their norm, {last / common:.3g} times as far as usual: the learning "
                "rate is too high"
            )
            return why, text.lr_line(since)
        grown = self._grown()
        if grown is None or self._jumps:  # what jumped tells nothing of what was before
            return text.EXPLODING_UNDECIDED, text.clip_line(5 * usual, since)
        first, now = self._rho[grown.name]
        why = (
            f"rho of {grown.name} was {first:.3g} at first and is {now:.3g}; clipping "
            "would hide that, not cure it"
        )
        bare = all("." not in name for name in self._carriers)
        return why, text.orthogonal_line(grown, since, bare=bare)

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


class Spike:
    """One norm far above the recent ones that is over within three steps.

    Robust z of ln(norm) >= 10 and at least 25 times the median of the last 25; said
    once the norm is back, because a longer one belongs to another kind.
    """

    kind = "spike"
    active = False
    score: Final = 10.0
    ratio: Final = 25.0
    within: Final = 3

    def __init__(self, streams: Sequence[Stream] = ()) -> None:
        self._logs: Window = ()
        self._peak = -math.inf
        self._raised: list[float] | None = None  # step, norm, ratio, z; or too long

    def update(self, record: StepRecord) -> list[Alert]:
        """Judge one record."""
        norm = record.metrics.get(_NORM)
        if norm is None or not math.isfinite(norm) or norm <= 0:
            self._raised = None
            return []
        log, usual = math.log(norm), median(self._logs)
        if len(self._logs) < WARM_UP:
            self._logs = push(self._logs, log, _WINDOW)
            return []
        if log - usual < math.log(self.ratio):
            self._logs = push(self._logs, log, _WINDOW)
            self._peak = max(self._peak, usual)
            raised, self._raised = self._raised, None
            return [self._alert(record, raised)] if raised else []
        z = robust_z(self._logs, log, floor=0.1)
        if self._raised is None:
            # A norm that was usual before is a net that had forgotten it, no spike.
            if z >= self.score and log > self._peak + 1:
                self._raised = [record.step, norm, math.exp(log - usual), z]
        elif not self._raised or record.step - self._raised[0] >= self.within:
            self._raised = []  # too long for a spike
            self._logs = push(self._logs, log, _WINDOW)
        return []

    def _alert(self, record: StepRecord, raised: Sequence[float]) -> Alert:
        step, norm, ratio, z = raised
        usual = norm / ratio
        message = text.four_lines(
            self.kind,
            record.step,
            f"one gradient norm stood out at step {step:.0f}; it is back",
            f"norm {norm:.3g}, {ratio:.3g} times the median {usual:.3g} "
            f"(robust z {z:.1f}; both 25 and 10 are needed)",
            "a batch unlike the others, most likely: a long sequence, a bad label, "
            "an outlier in the input",
            text.clip_line(5 * usual, int(step)),
        )
        return Alert(
            kind=self.kind,
            severity="warning",
            step=record.step,
            since=int(step),
            cause="bad_batch",
            evidence={_NORM: (norm, self.ratio * usual)},
            message=message,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        vars(self).update(state)
