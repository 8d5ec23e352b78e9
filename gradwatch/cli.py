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
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from gradwatch._version import __version__
from gradwatch.inspection import inspect
from gradwatch.kinds.catalogue import CATALOGUE
from gradwatch.record import dump_line, printable

_INSPECT = """\
Look at the recurrent weights of a checkpoint, before any training: spectral radius,
largest singular value and distance from orthogonality of every gate, how long a gated
net keeps its state, and by what factor a small signal has grown or died out at the end
of a sequence; with a verdict and the remedy. Nothing in the file is executed.

example: gradwatch inspect model.pt --steps 200
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
    except (ValueError, OSError) as error:
        words = " ".join(printable(line) for line in str(error).splitlines())
        print(f"gradwatch: {words}", file=sys.stderr)
        return 2
    return 0


def _inspected(given: argparse.Namespace) -> str:
    found = inspect(given.checkpoint, given.steps)
    whole = {**dataclasses.asdict(found), "verdict": found.verdict}
    return dump_line(whole) if given.json else str(found)


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


_MARKS: Final = ("<!-- catalogue -->", "<!-- by hand -->")
"""Lines of a page that are no part of what it says."""
_ANSWERS: Final = {"inspect": _inspected, "explain": _explained}
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
        "explain",
        help="print the page of a kind of alert",
        description=_EXPLAIN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument("kind", nargs="?", help="such as vanishing; none: list them")
    return parser
