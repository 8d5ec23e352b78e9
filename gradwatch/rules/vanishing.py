"""Gradients that do not reach the first steps, and states that are cut off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from gradwatch import remedies
from gradwatch.metrics import stream_key
from gradwatch.record import Alert, Severity, StepRecord, Stream, reinitialised
from gradwatch.rules import text

_LOW: Final = -6.0
_HIGH: Final = -4.5
"""Decades from the largest adjoint to the first step's: raised at, cleared at."""
_PROBES: Final = 5
_CLEAR: Final = 3
_DEMAND: Final = 0.5
_SHORTEST: Final = 5
_PROGRESS: Final = 0.5
"""Share of its start to which the signal falls where the task is being learnt."""
_HOLD: Final = 100
_TRAVEL: Final = 1.5
_LONG: Final = 3000
"""Steps, and sum of update ratios, after which a net will not open by itself."""
_OFTEN: Final = 10
_SELDOM: Final = 100
_OFTEN_FOR: Final = 1000
"""Steps between probes while an incident is open, at first and later."""
_CONTEXT: Final = ("act_deriv", "forget", "rho", "rho_total_drift", "shut/f", "shut/z")
_METRICS: Final = ("adjoint_log10", "demand", "signal", "horizon", "update_ratio")


class Vanishing:
    """The adjoint of the first step is a millionth of the largest, or less.

    At the first probe that is a notice: many nets open by themselves. It is an alarm
    once it has lasted 100 steps in which the recurrent weights have moved by one and a
    half times their norm (the sum of their update ratios is 1.5), or 3,000 steps; at
    once where the gradient had reached the first steps before. Silent where the loss
    reads half of the steps or more, in sequences of 5 steps or fewer, and where the
    signal has fallen to half: the task is being learnt without the far past.
    """

    kind = "vanishing"

    def __init__(self, streams: Sequence[Stream] = ()) -> None:
        self.wishes: str | None = None
        self._watched = [
            (s, {name: stream_key(s, name) for name in _METRICS}) for s in streams
        ]
        self._context = [
            (s.name, name, stream_key(s, name)) for s in streams for name in _CONTEXT
        ]
        self._open: dict[str, dict[str, Any]] = {}
        self._past: dict[str, list[float]] = {}
        self._reached: dict[str, bool] = {}
        self._learnt: dict[str, bool] = {}
        self._seen: dict[str, dict[str, float]] = {}
        self._modules: dict[str, dict[str, Any]] = {}
        self._probed = 0

    @property
    def active(self) -> bool:
        """Whether some stream's first steps are out of reach."""
        return bool(self._open)

    def update(self, record: StepRecord) -> list[Alert]:
        """Judge one record."""
        self._note(record)
        found: list[Alert] = []
        for stream, keys in self._watched:
            known = self._open.get(stream.name)
            if known is not None:
                known["travel"] += record.metrics.get(keys["update_ratio"], 0.0)
            reach = record.metrics.get(keys["adjoint_log10"])
            if reach is None:
                continue
            self._probed = record.step
            found += self._probe(record, stream, keys, reach)
        self.wishes = self._asks(record.step)
        return found

    def _note(self, record: StepRecord) -> None:
        for name, metric, key in self._context:
            if key in record.metrics:
                self._seen.setdefault(name, {})[metric] = record.metrics[key]
        for name, facts in record.facts.items():
            if isinstance(facts, dict):
                self._modules[name] = facts
        for name in reinitialised(record.events):
            for state in (self._open, self._past, self._reached, self._learnt):
                state.pop(name, None)
            self._seen.pop(name, None)

    def _asks(self, step: int) -> str | None:
        """Return the depth that an open incident asks for at the next step."""
        if not self._open:
            return None
        since = min(known["since"] for known in self._open.values())
        every = _OFTEN if step - since < _OFTEN_FOR else _SELDOM
        return "flow" if step + 1 - self._probed >= every else None

    def _probe(
        self, record: StepRecord, stream: Stream, keys: Mapping[str, str], reach: float
    ) -> list[Alert]:
        name = stream.name
        past = self._past[name] = [*self._past.get(name, []), reach][-_PROBES:]
        learnt = record.metrics.get(keys["signal"], 1.0) < _PROGRESS
        known = self._open.get(name)
        if known is not None:
            calm = reach >= _HIGH or learnt
            known["calm"] = known["calm"] + 1 if calm else 0
            if known["calm"] >= _CLEAR:
                del self._open[name]
                self._learnt[name] = self._learnt.get(name, False) or learnt
                self._reached[name] = self._reached.get(name, False) or reach >= _HIGH
                return []
            return self._rise(record, stream, keys, known, past, learnt)
        if reach >= _HIGH:
            self._reached[name] = True
            self._learnt[name] = False
        learnt = learnt or self._learnt.get(name, False)
        if reach > _LOW or learnt or not self._can_matter(record, stream, keys):
            return []
        if self._reached.get(name) and (len(past) < _PROBES or max(past) > _HIGH):
            return []
        known = {"since": record.step, "travel": 0.0, "calm": 0, "raised": False}
        self._open[name] = known
        if self._reached.get(name):
            return self._rise(record, stream, keys, known, past, learnt)
        return [self._alert(record, stream, keys, "info")]

    def _can_matter(
        self, record: StepRecord, stream: Stream, keys: Mapping[str, str]
    ) -> bool:
        """Tell whether the loss can want the far past at all."""
        length = self._modules.get(stream.module, {}).get("T", 0)
        demand = record.metrics.get(keys["demand"])
        return length > _SHORTEST and demand is not None and demand < _DEMAND

    def _rise(
        self,
        record: StepRecord,
        stream: Stream,
        keys: Mapping[str, str],
        known: dict[str, Any],
        past: Sequence[float],
        learnt: bool,
    ) -> list[Alert]:
        """Return the alarm where a notice has lasted what opens by itself."""
        lasted = record.step - known["since"]
        moved = lasted >= _HOLD and known["travel"] >= _TRAVEL
        middle = sorted(past)[len(past) // 2]
        low = middle <= _LOW and max(past) <= _HIGH and len(past) >= _PROBES
        fell = bool(self._reached.get(stream.name))
        due = fell or moved or lasted >= _LONG
        if known["raised"] or learnt or not low or not due:
            return []
        known["raised"] = True
        return [self._alert(record, stream, keys, "warning")]

    def _alert(
        self,
        record: StepRecord,
        stream: Stream,
        keys: Mapping[str, str],
        severity: Severity,
    ) -> Alert:
        known = self._open[stream.name]
        reach = record.metrics[keys["adjoint_log10"]]
        horizon = record.metrics.get(keys["horizon"])
        length = self._modules.get(stream.module, {}).get("T", 0)
        cause = self._cause(stream, length)
        far = (
            f"{horizon:.0f} of {length}" if horizon is not None else f"few of {length}"
        )
        shown = (
            f"the first step gets 10^{reach:.1f} of the largest adjoint (from "
            f"10^{_LOW:.0f}); signal {record.metrics.get(keys['signal'], 1.0):.2f} of "
            f"its start; the weights have moved by {known['travel']:.2g} of their norm"
        )
        remedy = remedies.against(self.kind, cause, stream, length)
        why, do = text.vanishing(cause, remedy)
        return Alert(
            kind=self.kind,
            severity=severity,
            step=record.step,
            since=known["since"],
            stream=stream.name,
            streams=(stream.name,),
            cause=cause,
            evidence={keys["adjoint_log10"]: (reach, _LOW)},
            message=text.four_lines(
                self.kind,
                record.step,
                f"gradients of {stream.name} reach {far} steps back",
                shown,
                why,
                do,
            ),
            remedy=remedy,
        )

    def _cause(self, stream: Stream, length: int) -> str:
        """Return the first cause that the evidence names."""
        seen = self._seen.get(stream.name, {})
        if self._modules.get(stream.module, {}).get("state_detached"):
            return "truncation"
        if stream.kind != "RNN_RELU" and seen.get("act_deriv", 1.0) < 0.35:
            return "saturation"
        if seen.get("shut/f", 0.0) > 0.9:
            return "forget_gate"
        if seen.get("shut/z", 0.0) > 0.9:
            return "update_gate"
        if not stream.gates and seen.get("rho_total_drift", 0.0) <= -0.1:
            return "drift"
        if stream.gates or (length > 70 and seen.get("rho", 0.0) > 0.5):
            return "horizon_too_long"
        return "small_radius"

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values."""
        static = ("_watched", "_context", "wishes")
        return {k: v for k, v in vars(self).items() if k not in static}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        vars(self).update(state)


class Truncated:
    """The first states are those of an earlier call, and no gradient passes: a notice.

    Known by structure: they lie where an earlier call returned them, are not 0, and
    have no graph. Said once a stream.
    """

    kind = "truncated"
    active = False

    def __init__(self, streams: Sequence[Stream] = ()) -> None:
        self._streams = tuple(streams)
        self._said: list[str] = []

    def update(self, record: StepRecord) -> list[Alert]:
        """Judge one record."""
        found = []
        for stream in self._streams if record.facts else ():
            facts = record.facts.get(stream.module)
            if not isinstance(facts, dict) or not facts.get("state_detached"):
                continue
            if stream.name not in self._said:
                self._said.append(stream.name)
                found.append(self._alert(record, stream, facts.get("T", 0)))
        return found

    def _alert(self, record: StepRecord, stream: Stream, length: int) -> Alert:
        return Alert(
            kind=self.kind,
            severity="info",
            step=record.step,
            since=record.step,
            stream=stream.name,
            streams=(stream.name,),
            cause="truncation",
            message=text.four_lines(
                self.kind,
                record.step,
                f"the state of {stream.name} is detached every {length} steps",
                "it begins with the state of an earlier call, which has no graph",
                "truncated backpropagation through time: nothing farther back than "
                f"{length} steps is learnt from; no fault by itself",
                "a longer piece of the sequence in each call, if more is needed",
            ),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values."""
        return {"said": list(self._said)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._said = list(state["said"])
