"""One batch unlike the others, by the total gradient norm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from gradwatch.metrics import run_key
from gradwatch.numerics.streaming import Window, median, push, robust_z
from gradwatch.record import Alert, Remedy, StepRecord, Stream, reinitialised
from gradwatch.rules import text

_WARM_UP: Final = 50
"""Norms before any is judged: a net that opens to its gradients jumps once."""
_WINDOW: Final = 25
"""Logarithms of norms that a norm is compared with."""

_NORM = run_key("grad_norm")


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
        self._taken = 0
        self._peak = -math.inf
        self._raised: list[float] | None = None  # step, norm, ratio, z; or too long

    def update(self, record: StepRecord) -> list[Alert]:
        """Judge one record."""
        if reinitialised(record.events):
            self.load_state_dict(Spike().state_dict())
        norm = record.metrics.get(_NORM)
        if norm is None or not math.isfinite(norm) or norm <= 0:
            self._raised = None
            return []
        log, usual = math.log(norm), median(self._logs)
        self._taken += 1
        if self._taken <= _WARM_UP:
            self._logs = push(self._logs, log, _WINDOW)
            if len(self._logs) == _WINDOW:
                self._peak = max(self._peak, median(self._logs))
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
        clip = Remedy(name="clip.LogZClip")
        message = text.four_lines(
            self.kind,
            record.step,
            f"one gradient norm stood out at step {step:.0f}; it is back",
            f"norm {norm:.3g}, {ratio:.3g} times the median {usual:.3g} "
            f"(robust z {z:.1f}; both 25 and 10 are needed)",
            "a batch unlike the others, most likely: a long sequence, a bad label, "
            "an outlier in the input",
            text.remedy_line(clip, int(step)),
        )
        return Alert(
            kind=self.kind,
            severity="warning",
            step=record.step,
            since=int(step),
            cause="bad_batch",
            evidence={_NORM: (norm, self.ratio * usual)},
            message=message,
            remedy=clip,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        vars(self).update(state)
