"""What is reported of every family of the detection benchmark, seed 0."""

from typing import Any

from benchmarks.detection.alerts import alerts
from benchmarks.detection.case import FAMILIES
from benchmarks.detection.parallel import pool_of_two


def alerts_of(name: str) -> list[list[Any]]:
    """Train a family at fixed cadences; return its alerts, but for their words.

    Or what a watch has refused it with.
    """
    try:
        told = alerts(name)
    except ValueError as error:
        return [["refused", str(error)]]
    return [
        [
            *(a.kind, a.severity, a.cause, a.stream, list(a.streams), a.since, a.step),
            {key: list(pair) for key, pair in a.evidence.items()},
        ]
        for a in told
    ]


def reported() -> dict[str, Any]:
    """Return the alerts of all families, by family."""
    with pool_of_two() as pool:
        return dict(zip(FAMILIES, pool.map(alerts_of, FAMILIES), strict=True))
