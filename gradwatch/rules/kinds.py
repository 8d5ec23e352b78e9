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

    At least 100 times the median of the last 25 usual norms and 10 times the largest
    such median so far, at three steps running; or not finite right after 10,000 times
    the median. A net that explodes from step 0 is its own median and is not seen here.
    """

    kind = "exploding"
    factor: Final = 100.0
    above_peak: Final = 10.0
    running: Final = 3
    before_nonfinite: Final = 1e4
    clear: Final = 10.0

    def __init__(self, streams: Sequence[Stream] = ()) -> None:
        self.active = False
        self.wants: str | None = None
        self._streams = tuple(streams)
        self._rho_keys = [(s.name, stream_key(s, "rho")) for s in streams]
        self._norms: Window = ()
        self._peak = 0.0
        self._hot: list[int] = []
        self._calm = 0
        self._last_ratio = 0.0
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
            burst = warm and self._last_ratio >= self.before_nonfinite
            skipped = "skipped_step" in record.events
            self._last_ratio = 0.0
            if burst and not self.active and not skipped:
                return [self._alert(record, norm, usual)]
            return []
        ratio = norm / usual if warm else 0.0
        self._last_ratio = ratio
        if ratio >= self.clear:
            self._carriers = dict(record.facts.get("carriers", self._carriers))
            self.wants = None if self._hot or self.active else "spectrum"
        self._settle(norm, ratio, usual)
        hot = ratio >= self.factor and norm >= self.above_peak * self._peak
        self._hot = [*self._hot, record.step][-self.running :] if hot else []
        if len(self._hot) < self.running or self.active:
            return []
        return [self._alert(record, norm, usual)]

    def _settle(self, norm: float, ratio: float, usual: float) -> None:
        """Take a usual norm into the median; count the steps back to calm."""
        if ratio < self.clear:
            self._norms = push(self._norms, norm, _WINDOW)
            if usual > self._peak and len(self._norms) > WARM_UP:
                self._peak = usual
            self._calm += 1
            if self._calm >= self.running:
                self.active = False
        else:
            self._calm = 0

    def _note_rho(self, record: StepRecord) -> None:
        for name, key in self._rho_keys:
            rho = record.metrics.get(key)
            if rho is not None:
                self._rho[name] = [self._rho.get(name, [rho])[0], rho]

    def _alert(self, record: StepRecord, norm: float, usual: float) -> Alert:
        self.active = True
        since = self._hot[0] if self._hot else record.step
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
        grown = self._grown()
        why, do = text.EXPLODING_UNDECIDED, text.clip_line(5 * usual, since)
        if grown is not None:
            first, last = self._rho[grown.name]
            why = (
                f"rho of {grown.name} was {first:.3g} at first and is {last:.3g}; "
                "clipping would hide that, not cure it"
            )
            do = text.orthogonal_line(grown, since)
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
            evidence={_NORM: (norm, self.factor * usual)},
            message=message,
        )

    def _grown(self) -> Stream | None:
        """Return the stream whose rho has grown most, by more than a tenth."""
        growth = {n: last / max(first, 1e-12) for n, (first, last) in self._rho.items()}
        grown = [s for s in self._streams if growth.get(s.name, 0.0) > 1.1]
        return max(grown, key=lambda s: growth[s.name], default=None)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values."""
        static = ("_streams", "_rho_keys")
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
        self._raised: list[float] | None = None  # step, norm, ratio, z

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
            return [] if raised is None else [self._alert(record, raised)]
        z = robust_z(self._logs, log, floor=0.1)
        if self._raised is None:
            # A norm that was usual before is a net that had forgotten it, no spike.
            if z >= self.score and log > self._peak + 1:
                self._raised = [record.step, norm, math.exp(log - usual), z]
        elif record.step - self._raised[0] >= self.within:
            self._raised = None
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
