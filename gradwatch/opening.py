"""What happens once, as a watch begins: arguments, folder, meta, and the first line."""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch

from gradwatch import console
from gradwatch._version import __version__
from gradwatch.record import Alert, Stream
from gradwatch.rules import Rule
from gradwatch.schedule import DEPTHS, Schedule
from gradwatch.sinks import Sink, Wandb
from gradwatch.sinks.jsonl import FolderError, Jsonl, make_folder
from gradwatch.sinks.wandb import active_run

OnAlert = Callable[[Alert], object] | Literal["raise"] | None
DIR: Final = "gradwatch-runs"


@dataclass(kw_only=True)
class Settings:
    """The arguments of ``watch``; checked as they are put together.

    Raises:
        TypeError: If an argument is of no use.
        ValueError: If an argument is out of range.
    """

    schedule: Schedule = field(default_factory=Schedule)
    rules: Sequence[Rule] | None = None
    mute: tuple[str | tuple[str, str], ...] = ()
    on_alert: OnAlert = None
    sinks: tuple[Sink, ...] = ()
    wandb: Any = None
    dir: str | os.PathLike[str] | None = None
    name: str | None = None
    scaler: Any = None
    start_step: int = 0
    said: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check what the types cannot."""
        self.wandb = _wandb_sink(self.wandb)
        if not (
            self.on_alert is None or self.on_alert == "raise" or callable(self.on_alert)
        ):
            raise TypeError(
                f"on_alert is {self.on_alert!r}; expected a callable Alert -> None or "
                '"raise".'
            )
        if not isinstance(self.start_step, int) or self.start_step < 0:
            raise ValueError(
                f"start_step is {self.start_step!r}; expected an int of at least 0."
            )
        samples = self.said.get("flow_samples")
        if samples is not None and (not isinstance(samples, int) or samples < 1):
            raise ValueError(
                f"flow_samples is {samples!r}; expected at least 1, or None for all."
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
    return Wandb(given)


def report(line: str) -> None:
    """Say what went wrong, as a warning."""
    console.set_up()
    console.say(line, logging.WARNING)


def meta(settings: Settings, streams: Sequence[Stream]) -> dict[str, Any]:
    """Return what never changes in a run: versions, settings, streams."""
    return {
        "format": 1,
        "started": time.time(),
        "versions": {
            "gradwatch": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "settings": {
            **settings.said,
            "start_step": settings.start_step,
            "cadence": {d: settings.schedule.cadence(d) for d in DEPTHS},
        },
        "streams": [asdict(stream) for stream in streams],
    }


def open_folder(settings: Settings, content: dict[str, Any]) -> Jsonl | None:
    """Make the run folder; where that cannot be, say so and keep to memory."""
    where = settings.dir
    if where == DIR:
        where = os.environ.get("GRADWATCH_DIR", DIR)
    if where is None:
        return None
    default = time.strftime("%Y%m%d-%H%M%S") + f"-{os.getpid()}"
    name = settings.name or getattr(active_run(), "id", None) or default
    try:
        folder, why = make_folder(Path(where), str(name))
        sink = Jsonl(folder, content)
    except OSError as error:
        reason = error if isinstance(error, FolderError) else f"{where}: {error}"
        report(f"{reason}; records are kept in memory only.")
        return None
    if why is not None:
        report(f"{why}; records go to {folder} instead.")
    return sink


def greet(settings: Settings, streams: Sequence[Stream], folder: Path | None) -> None:
    """Say what is watched and where its records go, in one line."""
    console.set_up()
    modules = len({stream.module for stream in streams})
    parts = [
        f"watching {_count(len(streams), 'stream')} in {_count(modules, 'module')}",
        f"records in {folder}" if folder else "records in memory only",
    ]
    if settings.wandb is not None:
        run = active_run()
        if run is None:
            parts.append("W&B: on when a run starts")
        elif getattr(run, "disabled", False):
            parts.append("W&B: the active run is disabled, nothing is sent to it")
        else:
            parts.append(f"W&B: run {getattr(run, 'id', '?')}")
    console.say("; ".join(parts))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def processes() -> int:
    """Return how many processes train together."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_world_size())
    return 1


def rank() -> int:
    """Return this process's rank, 0 where there is only one."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank())
    given = os.environ.get("RANK", "0")
    return int(given) if given.isdigit() else 0
