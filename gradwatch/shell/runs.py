"""The verb runs: which runs there are, and what became of each."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from gradwatch.runs import Run, outline
from gradwatch.runs import parent as default
from gradwatch.shell.verb import Answer, Progress, Verb, cut, table

_ABOUT: Final = """\
List runs with their verdicts, the newest first.

With --prune N all but the newest N are deleted, after a question (--yes: without).
Only files that gradwatch wrote go; a run that was written to within the last hour and
is not closed stays, and so does a folder that holds files of yours.

example: gradwatch runs
         gradwatch runs experiments/lstm --prune 20
"""
_OURS: Final = ("records.jsonl", "alerts.jsonl", "meta.json", "report.html")
_GOING_ON: Final = 3600.0
"""Seconds since the last row within which an open run may still be going on."""
_SHOWN: Final = 100


class Listed(NamedTuple):
    """A run in the list.

    Attributes:
        folder: Where it is.
        run: Its outline; None where it cannot be read.
        written: When its records were last written to, in seconds since the epoch.
    """

    folder: Path
    run: Run | None
    written: float

    @property
    def state(self) -> str:
        """Whether it is closed, may be going on, or was left open."""
        if self.run is None:
            return "unreadable"
        if self.run.closed:
            return "closed"
        return "open" if time.time() - self.written < _GOING_ON else "not closed"

    @property
    def verdict(self) -> str:
        """What became of it, in a few words."""
        if self.run is None:
            return "cannot be read"
        alarms = [i for i in self.run.incidents if i.severity != "info"]
        if alarms:
            kinds = list(dict.fromkeys(i.kind for i in alarms))
            still = sum(i.until is None for i in alarms)
            named = ", ".join(kinds[:3]) + (", .." if len(kinds) > 3 else "")
            several = f"{len(alarms)} alarm" + ("s" if len(alarms) > 1 else "")
            return f"{several} ({named})" + (f", {still} still open" if still else "")
        if not len(self.run.records):
            return "nothing was measured"
        return "no alarm"

    @property
    def last(self) -> int | None:
        """The last step, or None."""
        if self.run is None or not len(self.run.records):
            return None
        return self.run.records[-1].step


def runs_in(parent: Path) -> list[Listed]:
    """Return the runs in a folder, the newest first."""
    found = []
    for path in parent.glob("*/records.jsonl"):
        try:
            written, run = path.stat().st_mtime, outline(path.parent)
        except OSError:
            written, run = 0.0, None
        found.append(Listed(path.parent, run, written))
    return sorted(found, key=lambda one: one.written, reverse=True)


def _listed(given: argparse.Namespace) -> Answer:
    parent = Path(given.folder) if given.folder else default()
    if (parent / "records.jsonl").exists():
        raise ValueError(
            f"{parent} is a run folder, and runs lists those in a folder; type "
            f"gradwatch check {parent}, or gradwatch runs {parent.parent}."
        )
    if not parent.is_dir():
        raise FileNotFoundError(
            f"{parent} is no folder; pass the one that holds your run folders, or set "
            "GRADWATCH_DIR."
        )
    progress = Progress()
    progress.say(f"reading {parent}")
    found = runs_in(parent)
    progress.end()
    plain: dict[str, Any] = {"folder": str(parent), "runs": [*map(_plain, found)]}
    if given.prune is not None:
        gone, kept = _pruned(found, given.prune, sure=given.yes)
        plain |= {"pruned": gone, "kept": kept}
        lines = [f"deleted {name}" for name in gone]
        lines += [f"kept {name}: {why}" for name, why in kept.items()]
        return Answer("\n".join(lines) or "nothing to delete", plain)
    if not found:
        return Answer(f"{parent} holds no run", plain)
    rows = [("run", "written", "last step", "", "verdict")]
    rows += [
        (
            cut(one.folder.name, 32),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(one.written)),
            "-" if one.last is None else f"{one.last:,}",
            one.state,
            one.verdict,
        )
        for one in found[:_SHOWN]
    ]
    more = [f"... {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    return Answer("\n".join([*table(rows), *more]), plain)


def _plain(one: Listed) -> dict[str, Any]:
    incidents = one.run.incidents if one.run is not None else []
    return {
        "run": str(one.folder),
        "written": one.written,
        "last_step": one.last,
        "state": one.state,
        "verdict": one.verdict,
        "alarms": sum(i.severity != "info" for i in incidents),
        "notices": sum(i.severity == "info" for i in incidents),
        "open": sum(i.until is None for i in incidents),
    }


def _pruned(
    found: list[Listed], keep: int, *, sure: bool
) -> tuple[list[str], dict[str, str]]:
    """Delete all but the newest runs; return what went, and what stayed and why."""
    if keep < 0:
        raise ValueError(f"--prune is {keep}; expected how many runs to keep, from 0.")
    gone: list[str] = []
    kept: dict[str, str] = {}
    doomed = []
    for one in found[keep:]:
        if one.state == "open":
            kept[one.folder.name] = "it may still be going on"
        elif one.folder.is_symlink():
            kept[one.folder.name] = "it is a link"
        else:
            doomed.append(one.folder)
    if doomed and not sure:
        _ask(doomed)
    for folder in doomed:
        for path in _files(folder):
            path.unlink()
        try:
            if (folder / "incidents").is_dir():
                (folder / "incidents").rmdir()
            folder.rmdir()
        except OSError:
            kept[folder.name] = "it holds files that gradwatch did not write"
        else:
            gone.append(folder.name)
    return gone, kept


def _ask(doomed: list[Path]) -> None:
    """Return where the person agrees.

    Raises:
        ValueError: If not, or if nobody is there to be asked.
    """
    names = ", ".join(folder.name for folder in doomed[:5])
    more = f" and {len(doomed) - 5} more" if len(doomed) > 5 else ""
    if not sys.stdin.isatty():
        raise ValueError(
            f"--prune would delete {names}{more}; add --yes to do it without asking."
        )
    print(f"delete {names}{more}? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise ValueError("nothing was deleted.")


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files of a run folder that gradwatch writes."""
    yield from (p for name in _OURS if (p := folder / name).is_file())
    yield from folder.glob("report-with-*.html")
    incidents = folder / "incidents"
    if not incidents.is_symlink():
        yield from (p for p in incidents.glob("*.json") if p.is_file())


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        nargs="?",
        help="where run folders are (default gradwatch-runs, or GRADWATCH_DIR)",
    )
    parser.add_argument(
        "--prune", type=int, metavar="N", help="delete all but the newest N"
    )
    parser.add_argument("--yes", action="store_true", help="delete without a question")


RUNS: Final = Verb(
    name="runs",
    help="list runs with their verdicts",
    description=_ABOUT,
    arguments=_arguments,
    answer=_listed,
)
