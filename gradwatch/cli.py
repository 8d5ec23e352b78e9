"""The command ``gradwatch``; also ``python -m gradwatch``.

What is asked for goes to stdout, what went wrong to stderr in one sentence with exit
code 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import os
import sys
import time
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from gradwatch import report, view
from gradwatch._version import __version__
from gradwatch.inspection import inspect
from gradwatch.kinds.catalogue import CATALOGUE
from gradwatch.record import dump_line, printable
from gradwatch.runs import latest, load

_INSPECT = """\
Look at the recurrent weights of a checkpoint, before any training: spectral radius,
largest singular value and distance from orthogonality of every gate, how long a gated
net keeps its state, and by what factor a small signal has grown or died out at the end
of a sequence; with a verdict and the remedy. Nothing in the file is executed.

example: gradwatch inspect model.pt --steps 200
"""
_REPORT = """\
Write a run as one page: a file of HTML that needs no network. Its verdict, whether the
record can be trusted, loss, norms and incidents over the steps, the gradient on its way
back through time, what each state depends on, every stream. Two runs: side by side.

RUN is a run folder, or latest: the newest one in gradwatch-runs (or GRADWATCH_DIR).

example: gradwatch report latest --open
"""
_VIEW = """\
Make a saved view of a W&B project, named gradwatch: what gradwatch measures, in
sections. Your own views and panels stay as they are. Needs wandb login, and
pip install 'gradwatch[workspaces]'.

example: gradwatch wandb-view my-team/my-project
"""
_EXPLAIN = """\
Print the page of a kind of alert: what it means, the numbers that decide it, its causes
and what helps against each. Without a kind: all kinds, with a line on each.

example: gradwatch explain vanishing
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What stands behind ``gradwatch``; None: the process's own.

    Returns:
        The exit code: 0, or 2 where something went wrong.
    """
    given = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name may be beyond its encoding
            stream.reconfigure(errors="backslashreplace")
    try:
        print(_ANSWERS[given.verb](given), flush=True)
    except BrokenPipeError:  # "| head": what was wanted has been read
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, ModuleNotFoundError) as error:
        words = " ".join(printable(line) for line in str(error).splitlines())
        print(f"gradwatch: {words}", file=sys.stderr)
        return 2
    return 0


def _inspected(given: argparse.Namespace) -> str:
    found = inspect(given.checkpoint, given.steps)
    whole = {**dataclasses.asdict(found), "verdict": found.verdict}
    return dump_line(whole) if given.json else str(found)


def _reported(given: argparse.Namespace) -> str:
    progress = Progress()
    runs = []
    for name in given.run:
        folder = latest() if name == "latest" else Path(name)
        progress.say(f"reading {folder}")
        runs.append(load(folder))
    try:
        path = report.save(runs, given.output, say=progress.say)
    finally:
        progress.end()
    if given.open:
        webbrowser.open(path.resolve().as_uri())
    return str(path)


class Progress:
    """Says on a terminal what is being done, where it takes over a second."""

    def __init__(self) -> None:
        self._began, self._shown = time.monotonic(), False

    def say(self, line: str) -> None:
        """Say what is being done now."""
        if sys.stderr.isatty() and time.monotonic() - self._began > 1:
            self._shown = True
            print(
                f"\r\033[K{printable(line)[:79]}", end="", file=sys.stderr, flush=True
            )

    def end(self) -> None:
        """Leave the line empty."""
        if self._shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _explained(given: argparse.Namespace) -> str:
    if given.kind is None:
        return "\n".join(f"{k.name:16} {k.meaning}" for k in CATALOGUE.values())
    if given.kind not in CATALOGUE:
        raise ValueError(
            f"no kind of alert is called {given.kind!r}; there are "
            f"{', '.join(CATALOGUE)}."
        )
    package = Path(__file__).parent
    shipped, written = package / "pages", package.parent / "docs" / "alerts"
    folder = shipped if shipped.is_dir() else written  # of an installation from source
    page = (folder / f"{given.kind}.md").read_text(encoding="utf-8")
    return "\n".join(line for line in page.splitlines() if line not in _MARKS)


def _viewed(given: argparse.Namespace) -> str:
    return view.save(given.project)


_MARKS: Final = ("<!-- catalogue -->", "<!-- by hand -->")
"""Lines of a page that are no part of what it says."""
_ANSWERS: Final = {
    "inspect": _inspected,
    "report": _reported,
    "wandb-view": _viewed,
    "explain": _explained,
}
"""Verb -> what it prints."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gradwatch", description="See recurrent networks train."
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verb = verbs.add_parser(
        "inspect",
        help="look at the recurrent weights of a checkpoint",
        description=_INSPECT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument(
        "checkpoint",
        help="a file of torch.save or safetensors, an index of shards, or a folder",
    )
    verb.add_argument(
        "--steps", type=int, default=100, help="length of the sequences (default 100)"
    )
    verb.add_argument("--json", action="store_true", help="one JSON object instead")
    verb = verbs.add_parser(
        "report",
        help="write a run as one page of HTML",
        description=_REPORT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument("run", nargs="+", metavar="RUN", help="one, or two side by side")
    verb.add_argument(
        "-o", "--output", help="the file (default: report.html in the run folder)"
    )
    verb.add_argument("--open", action="store_true", help="show it in the browser")
    verb = verbs.add_parser(
        "wandb-view",
        help="make a saved view of a W&B project",
        description=_VIEW,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument("project", metavar="ENTITY/PROJECT")
    verb = verbs.add_parser(
        "explain",
        help="print the page of a kind of alert",
        description=_EXPLAIN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument("kind", nargs="?", help="such as vanishing; none: list them")
    return parser
