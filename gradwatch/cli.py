"""The command ``gradwatch``; also ``python -m gradwatch``.

What is asked for goes to stdout, what went wrong to stderr in one sentence with exit
code 2. With ``--json`` every verb prints one JSON object, as
``gradwatch/shell/schema.json`` has it.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import Final

from gradwatch._version import __version__
from gradwatch.record import dump_line, printable
from gradwatch.shell.check import CHECK
from gradwatch.shell.completion import completion
from gradwatch.shell.demo import DEMO
from gradwatch.shell.explain import EXPLAIN
from gradwatch.shell.live import LIVE
from gradwatch.shell.pages import INSPECT, REPORT, VIEW
from gradwatch.shell.preflight import PREFLIGHT
from gradwatch.shell.runs import RUNS
from gradwatch.shell.verb import Answer, Verb

_ABOUT: Final = """\
See recurrent networks train: what a watch left in its run folder, and checkpoints.

  gradwatch demo                          a sick LSTM, its alarm, its remedy
  gradwatch live latest                   a run while it goes on
  gradwatch report latest --open          the same as one page
  gradwatch check latest                  an exit code for scripts
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What stands behind ``gradwatch``; None: the process's own.

    Returns:
        The exit code: 0, or 2 where something went wrong; ``check`` has two more.
    """
    given = parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name may be beyond its encoding
            stream.reconfigure(errors="backslashreplace")
    try:
        answer: Answer = given.answer(given)
        text = dump_line(answer.plain) if given.json and answer.plain else answer.text
        if text:
            print(text, flush=True)
    except BrokenPipeError:  # "| head": what was wanted has been read
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ModuleNotFoundError) as error:
        words = " ".join(printable(line) for line in str(error).splitlines())
        print(f"gradwatch: {words}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return answer.code


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    raw = argparse.RawDescriptionHelpFormatter
    whole = argparse.ArgumentParser(
        prog="gradwatch", description=_ABOUT, formatter_class=raw
    )
    whole.add_argument("--version", action="version", version=__version__)
    verbs = whole.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in VERBS:
        own = verbs.add_parser(
            verb.name,
            help=verb.help,
            description=verb.description,
            formatter_class=raw,
        )
        verb.arguments(own)
        own.add_argument("--json", action="store_true", help="print one JSON object")
        own.set_defaults(answer=verb.answer)
    return whole


VERBS: Final[Sequence[Verb]] = (
    DEMO,
    PREFLIGHT,
    LIVE,
    RUNS,
    CHECK,
    REPORT,
    EXPLAIN,
    INSPECT,
    VIEW,
    completion(parser),
)
"""In the order of the help."""
