"""The verb check: an exit code for a run, for scripts and continuous integration."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Sequence
from typing import Final
from xml.etree import ElementTree

from gradwatch.console import incident_line, losses
from gradwatch.kinds.catalogue import CATALOGUE as KINDS
from gradwatch.kinds.catalogue import title
from gradwatch.plot.columns import counted
from gradwatch.record import Incident, dump_line, printable
from gradwatch.report.content import Subject, verdict
from gradwatch.runs import Run, load
from gradwatch.shell.verb import (
    RUN,
    Answer,
    Progress,
    Verb,
    plain_incident,
    run_folder,
    wrapped,
)

_ABOUT: Final = """\
Judge a finished run by its incidents, with an exit code.

  0  nothing at or above --fail-on
  1  something was found
  2  the run cannot be read, or the command was wrong
  3  inconclusive: nothing was measured, the run was not closed, or data were lost

example: gradwatch check latest --fail-on warning
         gradwatch check runs/nightly --format github
"""
_LEVELS: Final = ("info", "warning", "error")
_GITHUB: Final = {"info": "notice", "warning": "warning", "error": "error"}
FOUND, INCONCLUSIVE = 1, 3


def found_in(run: Run, fail_on: str) -> list[Incident]:
    """Return the incidents of a run that count, the earliest first.

    Args:
        run: The run.
        fail_on: The lowest severity that counts: info, warning, error, or never.
    """
    if fail_on == "never":
        return []
    told = {(i.kind, i.since) for i in run.incidents}
    told |= {(a.kind, a.since) for i in run.incidents for a in i.alerts}
    lost = [a for a in run.alerts if (a.kind, a.since) not in told]
    alone = [  # of an incident whose file is not there, or cannot be read
        Incident(
            kind=a.kind,
            severity=a.severity,
            since=a.since,
            streams=a.streams,
            cause=a.cause,
            evidence=a.evidence,
            remedy=a.remedy,
            alerts=(a,),
        )
        for a in lost
    ]
    least = _LEVELS.index(fail_on)
    all_ = sorted([*run.incidents, *alone], key=lambda i: i.since)
    return [i for i in all_ if _LEVELS.index(i.severity) >= least]


def inconclusive(run: Run) -> Iterator[str]:
    """Yield why nothing can be concluded from finding nothing in a run."""
    if not len(run.records):
        yield "nothing was measured: no step was seen"
    health = run.meta.get("health", {})
    if not run.closed:
        yield "the run was not closed: it goes on, or was killed"
    elif health.get("state") == "on":
        yield "the run was still going on when this was written"
    known = {"failed": health.get("failed", {}), "dropped": health.get("dropped", {})}
    if all(isinstance(part, dict) for part in known.values()):
        yield from losses(known)
    if run.skipped:
        count = counted(len(run.skipped), "line")
        yield f"{count} cannot be read, first {run.skipped[0]}"


def _checked(given: argparse.Namespace) -> Answer:
    folder, progress = run_folder(given.run), Progress()
    progress.say(f"reading {folder}")
    run = load(folder)
    progress.say(f"judging {folder}")
    found, doubts = found_in(run, given.fail_on), [*inconclusive(run)]
    code = FOUND if found else INCONCLUSIVE if doubts else 0
    subject = Subject.of(run)
    plain = {
        "run": str(folder),
        "code": code,
        "fail_on": given.fail_on,
        "verdict": verdict(subject).text,
        "steps": subject.steps,
        "closed": run.closed,
        "found": [plain_incident(i) for i in found],
        "inconclusive": doubts,
    }
    progress.end()
    if given.format == "json":
        return Answer(dump_line(plain), plain, code)
    if given.format == "github":
        return Answer("\n".join(_github(found, doubts, plain["verdict"])), plain, code)
    if given.format == "junit":
        return Answer(_junit(subject.name, found, doubts), plain, code)
    lines = wrapped(f"{folder}: {plain['verdict']}")
    for incident in found:
        lines += wrapped(f"{incident.severity:7}  {incident_line(incident)}", 13)
        for part in _told(incident):
            lines += wrapped(f"         {part}", 13)
    for why in doubts:
        lines += wrapped(f"inconclusive: {why}", 14)
    if found:
        lines.append(f"to see them: gradwatch report {shlex.quote(str(folder))} --open")
    return Answer("\n".join(lines), plain, code)


def _told(incident: Incident) -> Iterator[str]:
    """Yield why, and what to do, as the incident's alert had it."""
    message = plain_incident(incident)["message"] or ""
    parts = [part.strip() for part in message.splitlines()]
    for name in ("why", "do"):
        said = [part for part in parts if part.startswith(f"{name}: ")]
        yield from said[-1:]
    if incident.kind in KINDS and not any(p.startswith("why: ") for p in parts):
        yield f"more: gradwatch explain {incident.kind}"


def _github(
    found: Sequence[Incident], doubts: Sequence[str], verdict: str
) -> Iterator[str]:
    """Yield workflow commands: an annotation each."""
    for incident in found:
        text = plain_incident(incident)["message"] or incident_line(incident)
        level = _GITHUB[incident.severity]
        yield f"::{level} title={_property(title(incident.kind))}::{_data(text)}"
    for why in doubts:
        yield f"::warning title=gradwatch%3A inconclusive::{_data(why)}"
    yield printable(verdict)


def _data(text: str) -> str:
    text = printable(text, lines=True).replace("%", "%25")
    return text.replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def _junit(name: str, found: Sequence[Incident], doubts: Sequence[str]) -> str:
    """Return a test suite: a case for each kind of alert, and one for the record."""
    own = {i.kind for i in found} - KINDS.keys()  # of rules of the user's own
    kinds = [*KINDS, *sorted(own)]
    suite = ElementTree.Element(
        "testsuite",
        name=printable(f"gradwatch {name}"),
        tests=str(len(kinds) + 1),
        failures=str(len({i.kind for i in found})),
        errors=str(int(bool(doubts))),
    )
    for kind in kinds:
        case = ElementTree.SubElement(
            suite, "testcase", classname="gradwatch", name=printable(kind)
        )
        those = [i for i in found if i.kind == kind]
        if those:
            texts = [plain_incident(i)["message"] or incident_line(i) for i in those]
            failure = ElementTree.SubElement(
                case,
                "failure",
                message=printable(incident_line(those[0])),
                type=those[0].severity,
            )
            failure.text = printable("\n\n".join(texts), lines=True)
    case = ElementTree.SubElement(
        suite, "testcase", classname="gradwatch", name="record"
    )
    if doubts:
        error = ElementTree.SubElement(case, "error", message=printable(doubts[0]))
        error.text = printable("\n".join(doubts), lines=True)
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help=RUN)
    parser.add_argument(
        "--fail-on",
        choices=(*reversed(_LEVELS), "never"),
        default="warning",
        help="the lowest severity that fails (default warning)",
    )
    parser.add_argument(
        "--format",
        choices=("text", "json", "github", "junit"),
        default="text",
        help="how it is printed (default text)",
    )


CHECK: Final = Verb(
    name="check",
    help="judge a run, with an exit code",
    description=_ABOUT,
    arguments=_arguments,
    answer=_checked,
)
