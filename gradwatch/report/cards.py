"""Incidents as the page tells them: what was said, and how often such are right."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Final

from gradwatch.kinds.catalogue import CATALOGUE as KINDS
from gradwatch.plot.numbers import WORDS
from gradwatch.record import Alert, Incident
from gradwatch.report.content import Subject

CARDS: Final = 12
"""Most incidents that are told whole."""


@dataclass(frozen=True)
class Card:
    """An incident as it is told.

    Attributes:
        number: From 1, as in the timeline.
        incident: What it is.
        sign: Its severity, in a word.
        span: From when to when.
        lines: What, evidence, why and do, as the alert had them: a name and a text.
        right: How often such an alarm is right; empty where that was not measured.
    """

    number: int
    incident: Incident
    sign: str
    span: str
    lines: Sequence[tuple[str, str]]
    right: str


def incident_cards(subject: Subject) -> list[Card]:
    """Return the incidents, the gravest first."""
    return [
        Card(
            number=n,
            incident=incident,
            sign=WORDS[incident.severity],
            span=_span(incident),
            lines=_lines(told(incident, subject.run.alerts), incident),
            right=_right(incident),
        )
        for n, incident in enumerate(subject.incidents[:CARDS], 1)
    ]


def _span(incident: Incident) -> str:
    until = "still open" if incident.until is None else f"over at step {incident.until}"
    back = f", came back {incident.repeats} times" if incident.repeats else ""
    return f"from step {incident.since}, {until}{back}"


def told(incident: Incident, alerts: Sequence[Alert]) -> Alert | None:
    """Return the alert that says most about an incident: the last one with a cause."""
    own = [*incident.alerts]
    if not own:
        own = [
            a for a in alerts if (a.kind, a.since) == (incident.kind, incident.since)
        ]
    return next((a for a in reversed(own) if a.cause == incident.cause), None) or (
        own[-1] if own else None
    )


def _lines(alert: Alert | None, incident: Incident) -> list[tuple[str, str]]:
    if alert is None:
        return (
            [("what", KINDS[incident.kind].meaning)] if incident.kind in KINDS else []
        )
    found = [("what", "")]
    for raw in alert.message.splitlines():
        name, colon, text = raw.strip().partition(": ")
        if colon and name in ("evidence", "why", "do"):
            found.append((name, text))
        else:
            before = found[-1][1]
            found[-1] = (found[-1][0], f"{before}\n{raw}" if before else raw)
    return found


@cache
def measured() -> Mapping[str, tuple[int, int]]:
    """Return kind -> how many of its alarms were right, and how many there were.

    Of the labelled runs of ``benchmarks/detection``; see ``docs/detection.md``.
    """
    text = resources.files("gradwatch").joinpath("kinds/right.csv").read_text("utf-8")
    rows = csv.DictReader(text.splitlines())
    return {row["kind"]: (int(row["right"]), int(row["alarms"])) for row in rows}


def _right(incident: Incident) -> str:
    right, alarms = measured().get(incident.kind, (0, 0))
    if not alarms or incident.severity == "info":  # notices were not judged
        return ""
    return f"right in {right} of {alarms} labelled runs in which it was raised"
