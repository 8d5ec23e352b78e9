"""Recurrent weights that get no gradient, or get one and do not change.

An absence is a fault only where someone wanted the presence: a frozen weight is a
notice, and a weight that no optimizer holds needs no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from gradwatch.metrics import run_key, stream_key
from gradwatch.record import Alert, StepRecord, Stream, reinitialised
from gradwatch.rules import text
from gradwatch.rules.catalogue.loop import UNDERFLOW
from gradwatch.rules.catalogue.units import NO_GRADIENT, NOT_UPDATING
from gradwatch.rules.seen import Seen

_BACK: Final = 3
"""Steps with it again before an incident is over."""
_ALL_DEAD: Final = 0.95
"""Share of dead units from which on their alarm says why there is no gradient."""

_NORM = run_key("grad_norm")


class _Keys(NamedTuple):
    """The keys of one stream, made once."""

    hh: str
    ih: str
    ratio: str

    @classmethod
    def of(cls, stream: Stream) -> _Keys:
        names = ("grad_norm_hh", "grad_norm_ih", "update_ratio")
        return cls(*(stream_key(stream, name) for name in names))


class _Missing:
    """For how many steps something is missing in each stream, and the facts as known.

    A subclass tells of one step whether it is, and what is said when it has lasted.
    """

    def __init__(self, streams: Sequence[Stream] = ()) -> None:
        self.wants: str | None = None
        self._watched = [(stream, _Keys.of(stream)) for stream in streams]
        self._seen = Seen(streams, ("dead",))
        self._missing: dict[str, int] = {}
        self._since: dict[str, int] = {}
        self._raised: dict[str, int] = {}  # stream: steps running with it again
        self._ever: dict[str, bool] = {}

    @property
    def active(self) -> bool:
        """Whether it is still missing somewhere."""
        return bool(self._raised)

    def _hold(self, record: StepRecord, stream: Stream, keys: _Keys) -> int | None:
        """Return how long it has to be missing; None where it is not, or excused."""
        raise NotImplementedError

    def _judged(self, record: StepRecord, stream: Stream, keys: _Keys) -> list[Alert]:
        """Return what is said once it has been missing for as long."""
        raise NotImplementedError

    def update(self, record: StepRecord) -> list[Alert]:
        """Judge one record."""
        self.wants, found = None, []
        self._note(record)
        norm = record.metrics.get(_NORM, 0.0)
        if not norm > 0 or not math.isfinite(norm) or "skipped_step" in record.events:
            return []
        for stream, keys in self._watched:
            hold = self._hold(record, stream, keys)
            if hold is None:
                self._there(stream.name)
                continue
            missing = self._absent(stream.name, record.step)
            if missing == hold - 1:
                self.wants = "state"  # so that the facts are of now
            elif missing >= hold and stream.name not in self._raised:
                alerts = self._judged(record, stream, keys)
                if alerts:
                    self._raised[stream.name] = 0
                found += alerts
        return found

    def _note(self, record: StepRecord) -> None:
        self._seen.take(record)
        for name in reinitialised(record.events):
            for state in (self._missing, self._since, self._raised, self._ever):
                state.pop(name, None)

    def _half(self, stream: Stream) -> bool:
        """Tell whether the net computes in float16."""
        return "float16" in (
            self._seen.module(stream).dtype,
            self._seen.module(stream).autocast,
        )

    def _all_dead(self, stream: Stream) -> bool:
        """Tell whether no gradient passes because units are dead, here or above."""
        return any(
            self._seen.of(other).get("dead", 0.0) >= _ALL_DEAD
            for other, _ in self._watched
            if other.module == stream.module and other.layer >= stream.layer
        )

    def _there(self, name: str) -> None:
        """Note a step in which it was there, or in which nobody could tell."""
        self._ever[name] = True
        self._missing.pop(name, None)
        if name in self._raised:
            self._raised[name] += 1
            if self._raised[name] >= _BACK:
                del self._raised[name]

    def _absent(self, name: str, step: int) -> int:
        """Note one in which it was not; return how many running."""
        if name not in self._missing:
            self._since[name] = step
        self._missing[name] = self._missing.get(name, 0) + 1
        if name in self._raised:
            self._raised[name] = 0
        return self._missing[name]

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values."""
        plain = {k: v for k, v in vars(self).items() if isinstance(v, dict)}
        own = {key: dict(value) for key, value in plain.items()}
        return {**own, "_seen": self._seen.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._seen.load_state_dict(state["_seen"])
        own = {key: value for key, value in state.items() if key != "_seen"}
        vars(self).update({key: dict(value) for key, value in own.items()})


class NoGradient(_Missing):
    """W_hh has no gradient at all, or one that is 0 in every entry."""

    kind = NO_GRADIENT.name

    def _hold(self, record: StepRecord, stream: Stream, keys: _Keys) -> int | None:
        norm = record.metrics.get(keys.hh)
        if norm:
            return None
        if self._seen.stream(stream).requires_grad is not False:  # that is a notice
            held = self._seen.stream(stream).in_optimizer
            if held is False or (held and keys.ratio not in record.metrics):
                return None  # nobody trains it, or its optimizer has not stepped
            if norm == 0 and self._seen.module(stream).T == 1:
                return None  # nothing has recurred
            if norm == 0 and self._half(stream):
                return None  # an alarm of its own
        level = "lost" if self._ever.get(stream.name) else "never"
        return int(NO_GRADIENT.at(level))

    def _judged(self, record: StepRecord, stream: Stream, keys: _Keys) -> list[Alert]:
        """Return the alert, if a cause can be seen or a gradient of zeros is there."""
        reach, norm = self._seen.module(stream).reach, record.metrics.get(keys.hh)
        cause: str | None = None
        if self._seen.stream(stream).requires_grad is False:
            cause = "frozen"
        elif norm is None:
            if reach not in ("unused", "detached"):
                return []  # reached, and its gradients were taken away since
            cause = reach
        elif record.metrics.get(keys.ih, 0.0) > 0:
            cause = "readout_index"
        elif self._all_dead(stream):
            return []
        shown = "none at all" if norm is None else "0 in every entry"
        return [
            text.alert(
                NO_GRADIENT,
                record,
                severity="info" if cause == "frozen" else None,
                since=self._since[stream.name],
                what=f"the recurrent weights of {stream.name} get no gradient",
                shown=(
                    f"{shown}, in {self._missing[stream.name]} steps running; the "
                    f"total norm is {record.metrics[_NORM]:.3g}"
                ),
                cause=cause,
                evidence={} if norm is None else {keys.hh: (norm, 0.0)},
                stream=stream,
            )
        ]


class NotUpdating(_Missing):
    """W_hh has a gradient and does not change."""

    kind = NOT_UPDATING.name

    def _cause(self, record: StepRecord, stream: Stream, keys: _Keys) -> str | None:
        if record.metrics.get(keys.ratio) is None:
            return "not_in_optimizer"
        return "frozen" if self._seen.stream(stream).lr == 0 else None

    def _hold(self, record: StepRecord, stream: Stream, keys: _Keys) -> int | None:
        ratio = record.metrics.get(keys.ratio)
        unheld = ratio is None and self._seen.stream(stream).in_optimizer is False
        if not record.metrics.get(keys.hh) or (ratio != 0 and not unheld):
            return None
        cause = self._cause(record, stream, keys)
        level = {"not_in_optimizer": "unheld", "frozen": "rate_zero"}
        return int(NOT_UPDATING.at(level.get(cause or "", "still")))

    def _judged(self, record: StepRecord, stream: Stream, keys: _Keys) -> list[Alert]:
        cause = self._cause(record, stream, keys)
        norm, steps = record.metrics[keys.hh], self._missing[stream.name]
        return [
            text.alert(
                NOT_UPDATING,
                record,
                since=self._since[stream.name],
                what=f"the recurrent weights of {stream.name} do not change",
                shown=(
                    f"no change in {steps} steps running, with a gradient of norm "
                    f"{norm:.3g}"
                ),
                cause=cause,
                evidence={} if cause == "not_in_optimizer" else {keys.ratio: (0.0, 0)},
                stream=stream,
            )
        ]


class Underflow(_Missing):
    """W_hh has a gradient of zeros, and the net computes in float16."""

    kind = UNDERFLOW.name

    def _hold(self, record: StepRecord, stream: Stream, keys: _Keys) -> int | None:
        if not self._half(stream) or record.metrics.get(keys.hh) != 0:
            return None
        if self._seen.module(stream).T == 1:
            return None
        return int(UNDERFLOW.at("steps"))

    def _judged(self, record: StepRecord, stream: Stream, keys: _Keys) -> list[Alert]:
        if record.metrics.get(keys.ih, 0.0) > 0 or self._all_dead(stream):
            return []
        steps = self._missing[stream.name]
        return [
            text.alert(
                UNDERFLOW,
                record,
                since=self._since[stream.name],
                what=f"gradients of {stream.name} are 0 in float16",
                shown=(
                    f"0 in every entry in {steps} steps running; the total norm is "
                    f"{record.metrics[_NORM]:.3g}"
                ),
                cause="fp16_underflow",
                evidence={keys.hh: (0.0, 0.0)},
                stream=stream,
            )
        ]
