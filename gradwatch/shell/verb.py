"""What a verb of the command line is, and what several of them use."""

from __future__ import annotations

import argparse
import difflib
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from gradwatch.record import Incident, printable
from gradwatch.remedies import line
from gradwatch.report.cards import told
from gradwatch.runs import latest, parent

RUN: Final = (
    "a run folder, the name of one in gradwatch-runs (or GRADWATCH_DIR), or latest"
)
"""What an argument RUN is, for the help."""
WIDTH: Final = 99
"""Most columns that a verb prints."""


class Answer(NamedTuple):
    """What a verb found.

    Attributes:
        text: For a person; empty where it has been printed already.
        plain: The same as plain values, for ``--json``.
        code: The exit code.
    """

    text: str
    plain: Mapping[str, Any]
    code: int = 0


@dataclass(frozen=True, kw_only=True)
class Verb:
    """A verb of the command line.

    Attributes:
        name: As it is typed.
        help: What it does, in half a line.
        description: The same in full, with an example.
        arguments: Adds its arguments to a parser.
        answer: Does it.
    """

    name: str
    help: str
    description: str
    arguments: Callable[[argparse.ArgumentParser], None]
    answer: Callable[[argparse.Namespace], Answer]


def run_folder(name: str) -> Path:
    """Return the run folder that is meant: a path, a run's name, or ``latest``."""
    if name == "latest":
        return latest()
    if Path(name).exists():
        return Path(name)
    by_name = parent() / name
    if by_name.exists():
        return by_name
    known = [path.parent.name for path in parent().glob("*/records.jsonl")]
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"near it: {', '.join(near)}" if near else "gradwatch runs lists them"
    raise FileNotFoundError(f"there is no run {name!r} here or in {parent()}; {hint}.")


def plain_incident(incident: Incident) -> dict[str, Any]:
    """Return an incident as plain values: what it is, and what was said of it."""
    alert = told(incident, incident.alerts)
    return {
        "kind": incident.kind,
        "severity": incident.severity,
        "cause": incident.cause,
        "streams": list(incident.streams),
        "since": incident.since,
        "until": incident.until,
        "repeats": incident.repeats,
        "message": alert.message if alert else None,
        "remedy": line(incident.remedy) if incident.remedy else None,
    }


def cut(text: str, width: int = WIDTH) -> str:
    """Return a text in one line of so many columns, printable."""
    text = printable(text)
    return text if len(text) <= width else f"{text[: width - 2]}.."


def wrapped(text: str, indent: int = 4) -> list[str]:
    """Return a text as lines of at most :data:`WIDTH` columns; no word is broken."""
    return textwrap.wrap(
        printable(text),
        WIDTH,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines with columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        cut("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())
        for row in rows
    ]


class Progress:
    """Says on a terminal what is being done, where it takes over a second."""

    def __init__(self) -> None:
        self._began, self._shown = time.monotonic(), False

    def say(self, line: str) -> None:
        """Say what is being done now."""
        if sys.stderr.isatty() and time.monotonic() - self._began > 1:
            self._shown = True
            print(f"\r\033[K{cut(line, 79)}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leave the line empty."""
        if self._shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
