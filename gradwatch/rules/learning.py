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

_NEVER: Final = 20
"""Steps without, from the first on, before it counts; some nets take turns."""
_LOST: Final = 50
"""Steps without, after there had been some: phases of a training are shorter."""
_STILL: Final = 10
"""Steps without a change of a weight that an optimizer holds; warm-ups begin at 0."""
_UNHELD: Final = 25
"""Steps in which no optimizer was seen that holds a weight; some step rarely."""
_BACK: Final = 3
"""Steps with it again before an incident is over."""

_NORM = run_key("grad_norm")


class _Ledger:
    """The facts as they are now, and for how many steps something was missing."""

    def __init__(self) -> None:
        self.facts: dict[str, dict[str, Any]] = {}
        self.missing: dict[str, int] = {}
        self.since: dict[str, int] = {}
        self.raised: dict[str, int] = {}  # stream: steps running with it again
        self.ever: dict[str, bool] = {}

    def note(self, record: StepRecord) -> bool:
        """Take in a record's facts; tell whether the step can be judged."""
        if record.facts:
            found = {k: v for k, v in record.facts.items() if isinstance(v, dict)}
            self.facts.update(found)
        for name in reinitialised(record.events):
            for state in (self.missing, self.since, self.raised, self.ever):
                state.pop(name, None)
        norm = record.metrics.get(_NORM, 0.0)
        return norm > 0 and math.isfinite(norm) and "skipped_step" not in record.events

    def fact(self, stream: Stream, name: str) -> Any:
        """Return a fact of a stream, or else of its module."""
        own = self.facts.get(stream.name, {}).get(name)
        return self.facts.get(stream.module, {}).get(name) if own is None else own

    def there(self, stream: Stream) -> None:
        """Take note of a step in which it was there, or in which nobody could tell."""
        name = stream.name
        self.ever[name] = True
        self.missing.pop(name, None)
        if name in self.raised:
            self.raised[name] += 1
            if self.raised[name] >= _BACK:
                del self.raised[name]

    def absent(self, stream: Stream, step: int) -> int:
        """Take note of one in which it was not; return how many running."""
        name = stream.name
        if name not in self.missing:
            self.since[name] = step
        self.missing[name] = self.missing.get(name, 0) + 1
        if name in self.raised:
            self.raised[name] = 0
        return self.missing[name]

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values."""
        return {key: dict(value) for key, value in vars(self).items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        vars(self).update({key: dict(value) for key, value in state.items()})


class _Keys(NamedTuple):
    """The keys of one stream, made once."""

    hh: str
    ih: str
    ratio: str
    dead: str

    @classmethod
    def of(cls, stream: Stream) -> _Keys:
        names = ("grad_norm_hh", "grad_norm_ih", "update_ratio", "dead")
        return cls(*(stream_key(stream, name) for name in names))


class NoGradient:
    """W_hh has no gradient at all, or one that is 0 in every entry.

    After 20 steps without from the first on, or 50 after there had been some. Never a
    small gradient: 7e-10 was healthy. Excused: a weight that no optimizer holds, a
    sequence of one step (nothing has recurred), units that are dead (which is said).
    """

    kind = "no_gradient"

    def __init__(self, streams: Sequence[Stream] = ()) -> None:
        self.wants: str | None = None
        self._watched = [(stream, _Keys.of(stream)) for stream in streams]
        self._ledger = _Ledger()

    @property
    def active(self) -> bool:
        """Whether it is still missing somewhere."""
        return bool(self._ledger.raised)

    def update(self, record: StepRecord) -> list[Alert]:
        """Judge one record."""
        self.wants, found = None, []
        ledger = self._ledger
        if not ledger.note(record):
            return []
        for stream, keys in self._watched:
            norm = record.metrics.get(keys.hh)
            if norm or self._excused(stream, norm):
                ledger.there(stream)
                continue
            hold = _LOST if ledger.ever.get(stream.name) else _NEVER
            missing = ledger.absent(stream, record.step)
            if missing == hold - 1:
                self.wants = "state"  # so that the facts are of now
            elif missing >= hold and stream.name not in ledger.raised:
                found += self._judged(record, stream, keys)
        return found

    def _excused(self, stream: Stream, norm: float | None) -> bool:
        if self._ledger.fact(stream, "requires_grad") is False:
            return False  # that is said, as a notice
        if self._ledger.fact(stream, "in_optimizer") is False:
            return True
        return norm == 0 and self._ledger.fact(stream, "T") == 1

    def _judged(self, record: StepRecord, stream: Stream, keys: _Keys) -> list[Alert]:
        """Return the alert, if a cause can be seen or a gradient of zeros is there."""
        ledger, reach = self._ledger, self._ledger.fact(stream, "reach")
        norm = record.metrics.get(keys.hh)
        cause: str | None = None
        if ledger.fact(stream, "requires_grad") is False:
            cause = "frozen"
        elif norm is None:
            if reach not in ("unused", "detached"):
                return []  # reached, and its gradients were taken away since
            cause = reach
        elif record.metrics.get(keys.ih, 0.0) > 0:
            cause = "readout_index"
        elif record.metrics.get(keys.dead, 0.0) >= 1.0:
            return []
        ledger.raised[stream.name] = 0
        why, do = text.NO_GRADIENT[cause]
        names = {
            "weight": text.path_of(stream, "weight_hh"),
            "module": text.path_of(stream, ""),
        }
        shown = "none at all" if norm is None else "0 in every entry"
        message = text.four_lines(
            self.kind,
            record.step,
            f"the recurrent weights of {stream.name} get no gradient",
            f"{shown}, in {ledger.missing[stream.name]} steps running; the total norm "
            f"is {record.metrics[_NORM]:.3g}",
            why.format(**names),
            do.format(**names),
        )
        return [
            Alert(
                kind=self.kind,
                severity="info" if cause == "frozen" else "warning",
                step=record.step,
                since=ledger.since[stream.name],
                stream=stream.name,
                streams=(stream.name,),
                cause=cause,
                evidence={} if norm is None else {keys.hh: (norm, 0.0)},
                message=message,
            )
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values."""
        return self._ledger.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._ledger.load_state_dict(state)


class NotUpdating:
    """W_hh has a gradient and does not change.

    After 10 steps with an update ratio of exactly 0, or 25 in which no optimizer that
    has stepped holds the weight. A learning rate of 0 is a notice.
    """

    kind = "not_updating"

    def __init__(self, streams: Sequence[Stream] = ()) -> None:
        self.wants: str | None = None
        self._watched = [(stream, _Keys.of(stream)) for stream in streams]
        self._ledger = _Ledger()

    @property
    def active(self) -> bool:
        """Whether it is still missing somewhere."""
        return bool(self._ledger.raised)

    def update(self, record: StepRecord) -> list[Alert]:
        """Judge one record."""
        self.wants, found = None, []
        ledger = self._ledger
        if not ledger.note(record):
            return []
        for stream, keys in self._watched:
            if not record.metrics.get(keys.hh):
                continue
            ratio = record.metrics.get(keys.ratio)
            unheld = ratio is None and ledger.fact(stream, "in_optimizer") is False
            if ratio != 0 and not unheld:
                ledger.there(stream)
                continue
            hold = _UNHELD if unheld else _STILL
            missing = ledger.absent(stream, record.step)
            if missing == hold - 1:
                self.wants = "state"  # so that the facts are of now
            elif missing >= hold and stream.name not in ledger.raised:
                found.append(self._alert(record, stream, keys, unheld))
        return found

    def _alert(
        self, record: StepRecord, stream: Stream, keys: _Keys, unheld: bool
    ) -> Alert:
        ledger = self._ledger
        ledger.raised[stream.name] = 0
        cause: str | None = "not_in_optimizer" if unheld else None
        if not unheld and ledger.fact(stream, "lr") == 0:
            cause = "frozen"
        why, do = text.NOT_UPDATING[cause]
        weight = text.path_of(stream, "weight_hh")
        norm = record.metrics[keys.hh]
        return Alert(
            kind=self.kind,
            severity="info" if cause == "frozen" else "warning",
            step=record.step,
            since=ledger.since[stream.name],
            stream=stream.name,
            streams=(stream.name,),
            cause=cause,
            evidence={} if unheld else {keys.ratio: (0.0, 0.0)},
            message=text.four_lines(
                self.kind,
                record.step,
                f"the recurrent weights of {stream.name} do not change",
                f"no change in {ledger.missing[stream.name]} steps running, with a "
                f"gradient of norm {norm:.3g}",
                why.format(weight=weight),
                do.format(weight=weight),
            ),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values."""
        return self._ledger.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._ledger.load_state_dict(state)
