"""What passes between the stages: plain, frozen values that need no model to be read.

A number is a float, a name is a string; NaN and Inf are kept as such in memory and
become the strings ``"nan"``, ``"inf"``, ``"-inf"`` in a file, because JSON has no word
for them.
"""

from __future__ import annotations

import dataclasses
import functools
import html
import json
import math
import operator
from collections.abc import (
    Callable,
    Collection,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import (
    Any,
    Final,
    Literal,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

from gradwatch.facts import NO_FACTS, Facts

Severity = Literal["info", "warning", "error"]


def printable(text: object, *, lines: bool = False) -> str:
    """Return a text with control characters escaped: names are hostile input.

    Args:
        text: What is to be shown.
        lines: Whether it may have several lines.
    """
    text, kept = str(text), "\n" if lines else ""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in kept else c.encode("unicode_escape").decode()
        for c in text
    )


CELL: Final = "CELL"
"""The kind of a stream whose module is a cell of the user's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """One recurrence: one direction of one layer of one module.

    Attributes:
        name: ``<module path>.l<k>`` or ``<module path>.l<k>_reverse``, PyTorch's own
            suffixes; a cell is its module path alone.
        module: Path of the module inside the watched model, wrappers left out.
        kind: PyTorch's mode: ``RNN_TANH``, ``RNN_RELU``, ``LSTM`` or ``GRU``; ``CELL``
            for a cell of the user's own, whose sizes are 0 unless it has them as
            ``input_size`` and ``hidden_size``.
        layer: Index of the layer, from 0.
        direction: ``forward`` or ``reverse``.
        input_size: Features that this layer reads.
        hidden_size: Units of the state.
        proj_size: Width of the projected output of an LSTM; 0 without projection.
        gates: PyTorch's letters in the order of the weight's blocks; empty for nn.RNN.
    """

    name: str
    module: str
    kind: str
    layer: int
    direction: Literal["forward", "reverse"]
    input_size: int
    hidden_size: int
    proj_size: int = 0
    gates: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The name as part of a metric key: ``/`` for ``.``, and printable."""
        return printable(self.name).replace(".", "/")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """What was measured at one optimiser step, as its forward saw it.

    Attributes:
        step: Optimiser step, not micro-batch; from 0.
        time: Seconds since the epoch, when the step closed.
        metrics: Values by the keys of the catalogue; absent means not measured.
        profiles: Lists of at most 128 values by key.
        facts: What is no number, by scope; written when it changes.
        events: Such as ``skipped_step``, ``resume``, ``cadence``, ``reinit:<stream>``.
        partial: Whether the step is so short that only the total norm, and whether it
            is finite, were read of its gradients; see ``docs/overhead.md``.
    """

    step: int
    time: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    profiles: Mapping[str, Sequence[float]] = field(default_factory=dict)
    facts: Facts = NO_FACTS
    events: tuple[str, ...] = ()
    partial: bool = False


def reinitialised(events: Collection[str]) -> list[str]:
    """Return the streams whose weights were re-initialised, by the events of a step."""
    if not events:
        return []
    start = "reinit:"
    return [e.removeprefix(start) for e in events if e.startswith(start)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """The name of a remedy and its arguments; it acts only when the user asks."""

    name: str
    args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """What a rule has to say at one step.

    Attributes:
        kind: A kind of the catalogue, such as ``nonfinite``.
        severity: ``info`` is a notice; ``warning`` and ``error`` are alarms.
        step: Step at which it was raised.
        since: Step at which the evidence began.
        stream: The worst stream, or None where the fault belongs to no stream.
        streams: All streams that show it.
        cause: A cause of the catalogue, or None when the evidence does not decide.
        evidence: Metric key -> (value, the threshold that it crossed or None).
        message: Four lines: what, evidence, why, one line to paste.
        remedy: What would cure it, or None.
    """

    kind: str
    severity: Severity
    step: int
    since: int
    message: str
    stream: str | None = None
    streams: tuple[str, ...] = ()
    cause: str | None = None
    evidence: Mapping[str, tuple[float, float | None]] = field(default_factory=dict)
    remedy: Remedy | None = None

    def __post_init__(self) -> None:
        """Check what a rule of the user's own may get wrong.

        Raises:
            ValueError: If the severity is none.
            TypeError: If a piece of evidence is no pair of a value and a threshold.
        """
        if self.severity not in get_args(Severity):
            raise ValueError(
                f"severity is {self.severity!r}; expected info, warning or error."
            )
        for key, pair in self.evidence.items():
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise TypeError(
                    f"the evidence of {key!r} is {pair!r}; expected a pair of a value "
                    "and a threshold, or None for no threshold."
                )
        plain = {
            key: (float(value), None if limit is None else float(limit))
            for key, (value, limit) in self.evidence.items()
        }
        object.__setattr__(self, "evidence", plain)

    def _repr_html_(self) -> str:
        """Return the message for a notebook."""
        text = html.escape(printable(self.message[:4000], lines=True))
        return (
            '<pre style="white-space:pre-wrap;border-left:3px solid #d55e00;'
            f'padding-left:.8em">{self.severity}: {text}</pre>'
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """What is wrong, of one kind, over all streams that show it, from start to end.

    Attributes:
        kind: The kind of the alert that opened it.
        severity: The highest that it reached.
        streams: Every stream that showed it.
        cause: Cause named by the last alert that named one.
        since: Step at which the evidence began.
        until: Step at which it ended; None while it is open.
        evidence: Metric key -> (value, threshold), the latest of each.
        remedy: What would cure it, or None.
        alerts: The alerts that were given for it, oldest first.
        repeats: How often it has ended and come back: the fourth alarm of a kind, and
            every later one, goes on with the third one's incident.
    """

    kind: str
    severity: Severity
    since: int
    until: int | None = None
    streams: tuple[str, ...] = ()
    cause: str | None = None
    evidence: Mapping[str, tuple[float, float | None]] = field(default_factory=dict)
    remedy: Remedy | None = None
    alerts: tuple[Alert, ...] = ()
    repeats: int = 0

    @property
    def doubled(self) -> bool:
        """Whether its repeats are 0, 1, 2, 4, 8, ...: each is reported, no other."""
        return self.repeats & (self.repeats - 1) == 0


class TrainingAlert(RuntimeError):
    """Raised out of ``optimizer.step()`` under ``watch(on_alert="raise")``.

    Attributes:
        alert: The alert that stopped the training.
    """

    def __init__(self, alert: Alert) -> None:
        super().__init__(printable(alert.message, lines=True))
        self.alert = alert

    def __reduce__(self) -> tuple[type[TrainingAlert], tuple[Alert]]:
        """Pickle with the alert, so that it can cross processes."""
        return TrainingAlert, (self.alert,)


# ---- the file format of docs/files.md

_Plain = TypeVar("_Plain", StepRecord, Alert, Incident, Stream)


def _to_json(value: object) -> object:
    """Return plain values of which none is a NaN or Inf."""
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, Mapping):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(item) for item in value]
    return _to_json(_opened(value)) if dataclasses.is_dataclass(value) else value


def _opened(value: Any) -> object:
    """Return what JSON's encoder does not know as what it does."""
    if isinstance(value, Mapping):
        return dict(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return str(value)


_FAST = json.JSONEncoder(allow_nan=False, separators=(",", ":"), default=_opened)


def dump_line(value: StepRecord | Alert | Incident | Mapping[str, Any]) -> str:
    """Return a value as one line of ASCII JSON; a record's empty parts are left out."""
    if isinstance(value, StepRecord):
        row: dict[str, Any] = {"step": value.step, "time": value.time}
        parts = {
            "metrics": value.metrics,
            "profiles": value.profiles,
            "facts": None if value.facts is NO_FACTS else value.facts.to_plain(),
            "events": value.events,
            "partial": value.partial,
        }
        row |= {part: content for part, content in parts.items() if content}
        value = row
    return _encoded(value, parts=True)


def _encoded(value: object, *, parts: bool = False) -> str:
    """Return a value as JSON; with ``parts`` each part is tried for itself, if need be.

    Nearly all is finite, and the C encoder alone is 4 times faster.
    """
    try:
        return _FAST.encode(value)
    except ValueError:
        if not parts or not isinstance(value, Mapping):
            return json.dumps(_to_json(value), separators=(",", ":"), default=str)
    items = (f"{_FAST.encode(str(k))}:{_encoded(v)}" for k, v in value.items())
    return f"{{{','.join(items)}}}"


def parse(kind: type[_Plain], raw: Mapping[str, Any]) -> _Plain:
    """Build a value of this module from what :func:`dump_line` wrote.

    Args:
        kind: ``StepRecord``, ``Alert``, ``Incident`` or ``Stream``.
        raw: The decoded JSON object; unknown names are ignored, so that files of a
            newer version can be read.

    Returns:
        The value, equal to the one that was written. Each field has its type: a whole
        number is an int from 0 to 2**63 - 1, a number a float, the strings ``"nan"``,
        ``"inf"`` and ``"-inf"`` among them.

    Raises:
        TypeError: If a field that has no default is missing, or is of another type.
        ValueError: If a value of the right type cannot be: a step below 0, a severity
            that there is not, a time that is not finite.
    """
    hint: Any = kind
    found: _Plain = _reader(hint)(raw)
    if isinstance(found, StepRecord) and not 0 <= found.time < math.inf:
        raise ValueError(f"time is {found.time}; expected seconds since the epoch")
    return found


@functools.cache
def _reader(hint: Any) -> Callable[[Any], Any]:
    """Return what makes of decoded JSON a value of a type, as fields name types."""
    origin, args = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        readers = {f.name: _reader(hints[f.name]) for f in dataclasses.fields(hint)}
        return lambda raw: _fields(hint, readers, raw)
    if origin is Literal:
        return lambda raw: _one_of(args, raw)
    if origin is UnionType:
        [inner] = [_reader(arg) for arg in args if arg is not NoneType]
        return lambda raw: None if raw is None else inner(raw)
    if origin is Mapping:
        inner = _reader(args[1])
        return _numbers if inner is _number else lambda raw: _items(inner, raw)
    if origin is Sequence or args[1:] == (...,):
        inner, whole = _reader(args[0]), list if origin is Sequence else tuple
        return lambda raw: whole([inner(item) for item in _listed(raw)])
    if origin is tuple:
        inners = [_reader(arg) for arg in args]
        return lambda raw: tuple(
            inner(item) for inner, item in zip(inners, _listed(raw), strict=True)
        )
    return _SINGLE[hint]


def _of_type(raw: Any, *kinds: type) -> Any:
    if not isinstance(raw, kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"found {type(raw).__name__}, expected {expected}")
    return raw


def _listed(raw: Any) -> Any:
    return _of_type(raw, list, tuple)


def _fields(kind: Any, readers: Mapping[str, Callable[[Any], Any]], raw: Any) -> Any:
    known = _of_type(raw, Mapping)
    return kind(**{n: read(known[n]) for n, read in readers.items() if n in known})


def _items(inner: Callable[[Any], Any], raw: Any) -> dict[str, Any]:
    return {str(key): inner(item) for key, item in _of_type(raw, Mapping).items()}


def _numbers(raw: Any) -> dict[str, float]:
    """Return a mapping of numbers; nearly all that a run folder holds is these."""
    found = _of_type(raw, Mapping).items()
    return {k: v if type(v) is float else _number(v) for k, v in found}


def _number(raw: Any) -> float:
    if isinstance(raw, bool):
        raise TypeError("found bool, expected a number")
    try:
        return float(raw)
    except OverflowError:
        raise ValueError("found an integer that is no float") from None


def _whole(raw: Any) -> int:
    if isinstance(raw, bool) or not 0 <= (number := operator.index(raw)) < 2**63:
        raise ValueError("expected a whole number from 0 to 2**63 - 1")
    return number


def _one_of(known: tuple[str, ...], raw: Any) -> Any:
    if not isinstance(raw, str) or raw not in known:
        raise ValueError(f"expected one of {', '.join(known)}")
    return raw


_SINGLE: Final[Mapping[Any, Callable[[Any], Any]]] = {
    Any: lambda raw: raw,
    bool: lambda raw: _of_type(raw, bool),
    float: _number,
    int: _whole,
    str: lambda raw: _of_type(raw, str),
}
"""Types of a single value -> what reads one."""
