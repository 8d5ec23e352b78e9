"""The run folder: where it is, its name, and what never changes in a run."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from gradwatch import console
from gradwatch._version import __version__
from gradwatch.record import Stream
from gradwatch.runs import DIR
from gradwatch.schedule import DEPTHS
from gradwatch.settings import Settings
from gradwatch.sinks.jsonl import Jsonl, safe_name
from gradwatch.sinks.wandb import active_run

FORMAT: Final = 2
"""Version of the files: 2 keeps facts by scope, 1 kept them in one dict."""


class FolderError(OSError):
    """No folder could be made; the message names the places that were tried."""


def meta(settings: Settings, streams: Sequence[Stream]) -> dict[str, Any]:
    """Return what never changes in a run: versions, settings, streams."""
    return {
        "format": FORMAT,
        "started": time.time(),
        "versions": {
            "gradwatch": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "settings": {
            "every": settings.every,
            "budget": settings.budget,
            "flow_samples": settings.flow_samples,
            "start_step": settings.start_step,
            "cadence": {d: settings.schedule.cadence(d) for d in DEPTHS},
        },
        "streams": [asdict(stream) for stream in streams],
    }


def open_folder(settings: Settings, content: dict[str, Any]) -> Jsonl | None:
    """Make the run folder; if that fails, report it and keep records in memory only."""
    where = settings.dir
    if where == DIR:
        where = os.environ.get("GRADWATCH_DIR", DIR)
    if where is None:
        return None
    default = time.strftime("%Y%m%d-%H%M%S") + f"-{os.getpid()}"
    run = active_run()
    name = settings.name or (run.id if run is not None else None) or default
    try:
        folder, why = make_folder(Path(where), str(name))
        sink = Jsonl(folder, content, say=console.report)
    except OSError as error:
        reason = error if isinstance(error, FolderError) else f"{where}: {error}"
        console.report(f"{reason}; records are kept in memory only.")
        return None
    if why is not None:
        console.report(f"{why}; records go to {folder} instead.")
    return sink


def make_folder(parent: Path, name: str) -> tuple[Path, str | None]:
    """Make a new run folder, never one that exists.

    Args:
        parent: Where it goes; falls back to the system's folder for temporary files.
        name: Name wished for; a number is added where it is taken, and what could
            lead out of ``parent`` is replaced.

    Returns:
        The folder, and why it is not under ``parent`` (None where it is).

    Raises:
        FolderError: If neither place can be written.
    """
    tried = []
    for place in (parent, Path(tempfile.gettempdir()) / "gradwatch-runs"):
        try:
            place.mkdir(parents=True, exist_ok=True)
            ignore = place / ".gitignore"
            if not ignore.exists():
                ignore.write_text("*\n", encoding="ascii")
            folder = _fresh(place, safe_name(name))
        except OSError as error:
            tried.append(f"{place} ({error.strerror or error})")
            continue
        return folder, f"cannot write in {tried[0]}" if tried else None
    raise FolderError(f"no run folder could be made; tried {' and '.join(tried)}")


def _fresh(place: Path, name: str) -> Path:
    number = 1
    while True:
        folder = place / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            if not folder.is_dir() and number > 1000:
                raise
            number += 1
            continue
        return folder
