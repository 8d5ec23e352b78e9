"""The arguments of ``watch``, checked as they are put together."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from torch import Tensor

from gradwatch.environment import BUDGET
from gradwatch.kinds.judge import Rule
from gradwatch.processes import processes
from gradwatch.record import Alert
from gradwatch.report.drawing import renderer
from gradwatch.schedule import Schedule
from gradwatch.sinks import ByBlock, Sink, Wandb

_WORDS: Final = (None, "raise", "rollback")
_OFTEN: Final = 100
"""Steps between two states that are kept, unless another number is given."""
OnAlert = Callable[[Alert], object] | Literal["raise", "rollback"] | None


@dataclass(kw_only=True)
class Settings:
    """The arguments of ``watch``, as its docstring has them.

    Attributes:
        silent: Whether the first and the closing lines are left out; no argument of
            ``watch``, but of whoever makes one for a moment.
        schedule: When each depth is measured; made from ``every`` and ``budget``.

    Raises:
        TypeError: If an argument cannot be used.
        ValueError: If an argument is out of range.
        ModuleNotFoundError: If what an argument asks for is not installed.
    """

    every: int | Mapping[str, int] | None = None
    budget: float | None = BUDGET
    flow_samples: int | None = 4
    rules: Sequence[Rule] | None = None
    mute: Iterable[str | tuple[str, str]] = ()
    on_alert: OnAlert = None
    sinks: Iterable[Sink] = ()
    wandb: Any = None
    dir: str | os.PathLike[str] | None = None
    name: str | None = None
    scaler: Any = None
    start_step: int = 0
    report: bool = False
    recorder: int | None = None
    silent: bool = False
    schedule: Schedule = field(init=False)

    def __post_init__(self) -> None:
        """Check what the types cannot."""
        self.schedule = Schedule(self.every, self.budget)
        self.wandb = _wandb_sink(self.wandb)
        self.mute = _several("mute", self.mute)
        self.sinks = _several("sinks", self.sinks)
        self.rules = None if self.rules is None else _several("rules", self.rules)
        if not (self.on_alert in _WORDS or callable(self.on_alert)):
            raise TypeError(
                f"on_alert is {self.on_alert!r}; expected a callable Alert -> None, "
                '"raise" or "rollback".'
            )
        self.recorder = _every(self.recorder, self.on_alert)
        if self.on_alert == "rollback" and processes() > 1:
            raise ValueError(
                'on_alert="rollback" would put one of several processes back and not '
                'the others; use on_alert="raise" and start again from a checkpoint.'
            )
        if not isinstance(self.start_step, int) or self.start_step < 0:
            raise ValueError(
                f"start_step is {self.start_step!r}; expected an int of at least 0."
            )
        if self.report:
            renderer()
            if self.dir is None:
                raise ValueError(
                    "report=True writes into the run folder, and dir=None makes none; "
                    'use watch.report("report.html") before the watch is closed.'
                )
        samples = self.flow_samples
        if samples is not None and (not isinstance(samples, int) or samples < 1):
            raise ValueError(
                f"flow_samples is {samples!r}; expected at least 1, or None for all."
            )
        for rule in self.rules or ():
            if not isinstance(rule, Rule):
                raise TypeError(
                    f"rules holds a {type(rule).__name__}; expected objects with "
                    "update(record) -> list of Alert, such as "
                    "gradwatch.rules.default_rules(streams) returns."
                )
        if self.scaler is not None and not hasattr(self.scaler, "get_scale"):
            raise TypeError(
                f"scaler is a {type(self.scaler).__name__}; expected a GradScaler."
            )
        for sink in self.sinks:
            if isinstance(sink, Wandb):
                raise TypeError(
                    "sinks holds a gradwatch.sinks.Wandb; pass it as wandb=, where it "
                    "learns the streams."
                )
            if not isinstance(sink, Sink):
                raise TypeError(
                    f"sinks holds a {type(sink).__name__}; expected objects with "
                    "write(record, alerts=()) and close(), such as "
                    "gradwatch.sinks.TensorBoard(writer)."
                )

    @property
    def raising(self) -> bool:
        """Whether an error stops the training."""
        return self.on_alert == "raise"

    @property
    def patient(self) -> bool:
        """Whether steps may wait: nobody but gradwatch looks at each."""
        return self.rules is None and all(isinstance(s, ByBlock) for s in self.sinks)


def _every(recorder: int | None, on_alert: OnAlert) -> int | None:
    """Return how often a state is kept."""
    if recorder is None:
        return _OFTEN if on_alert == "rollback" else None
    if isinstance(recorder, bool) or not isinstance(recorder, int) or recorder < 1:
        raise ValueError(
            f"recorder is {recorder!r}; expected the steps between two states that are "
            "kept, at least 1, or None."
        )
    return recorder


def _several(name: str, given: Any) -> tuple[Any, ...]:
    """Return what an argument lists; a single object is no list of one."""
    if isinstance(given, Iterable) and not isinstance(given, str):
        return tuple(given)
    raise TypeError(f"{name} is {given!r}; expected a list: {name}=[{given!r}].")


def _wandb_sink(given: Any) -> Wandb | None:
    if given is None or isinstance(given, Wandb):
        return given
    if isinstance(given, str):
        if given != "auto":
            raise ValueError(
                f'wandb is {given!r}; expected "auto", a run, None or '
                "gradwatch.sinks.Wandb(...)."
            )
        return Wandb()
    if isinstance(given, bool | int | float):
        raise TypeError(
            f'wandb is {given!r}; expected "auto", a run, None for none, or '
            "gradwatch.sinks.Wandb(...)."
        )
    return Wandb(given)


def checked_loss(loss: Any) -> float | Tensor:
    """Return a loss that somebody tells as a number, or a tensor of one element.

    Raises:
        TypeError: If it is no number.
        ValueError: If the tensor has more than one element.
    """
    if isinstance(loss, Tensor):
        if math.prod(loss.shape) != 1:
            raise ValueError(
                f"loss has shape {tuple(loss.shape)}; expected one number, such as "
                "watch.log(loss=loss.mean())."
            )
        return loss
    try:
        return float(loss)
    except (TypeError, ValueError):
        raise TypeError(
            f"loss is {loss!r}; expected a number or a tensor of one element."
        ) from None
