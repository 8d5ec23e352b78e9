"""The words of alerts: the four lines what, evidence, why, do, and what fills them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from gradwatch import remedies
from gradwatch.kinds.kind import Kind
from gradwatch.record import Alert, Remedy, Severity, StepRecord, Stream

HIDDEN: Final = "clipping would hide that, not cure it"
BREAKS: Final = ("nonfinite", "exploding", "lr_too_high")
"""Kinds after which little else that is seen is a fault of its own."""
LOOP: Final = ("not_cleared", "not_updating")
"""Mistakes of the loop, which keep a net from learning whatever gradients do."""
CLIPPED_LATE: Final = (
    "the gradients are clipped after optimizer.step(), which has used them as they "
    "were: nothing is clipped"
)
CLIP_FIRST: Final = (
    "torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # before the step"
)
LOWER_RATE: Final = "for group in optimizer.param_groups: group['lr'] /= 10"
BEFORE: Final = "  # from a checkpoint before step {since}"
"""What several kinds say: behind a cause, and what to do."""
_ANEW: Final = "  # then train from the start"
"""The same where there is no step before."""


def lower_rate(times: float) -> str:
    """Return the line that lowers the rate: by ten, or more tens, so many times."""
    tens = max(math.ceil(math.log10(times)), 1) if 1 < times < math.inf else 1
    return LOWER_RATE + "0" * (tens - 1)


def first_line(row: Kind) -> str:
    """Return a row's meaning as the first line has it, behind kind and step."""
    return row.meaning[:1].lower() + row.meaning[1:-1]


def alert(
    row: Kind,
    record: StepRecord,
    *,
    since: int,
    what: str,
    shown: str,
    cause: str | None,
    evidence: Mapping[str, tuple[float, float | None]],
    stream: Stream | None = None,
    severity: Severity | None = None,
    remedy: Remedy | None = None,
    why: str | None = None,
    do: str | None = None,
) -> Alert:
    """Return an alert in the words of its row of the catalogue.

    Args:
        row: The kind.
        record: The one that decided.
        since: Step at which the evidence began.
        what: The first line, behind kind and step.
        shown: The second line: what was measured.
        cause: A cause of the row's, or None where there is none to name.
        evidence: Metric key -> (value, threshold).
        stream: The one that shows it, if one does.
        severity: The row's, if none is given.
        remedy: What would cure it, if a program can.
        why: The third line, in place of the cause's.
        do: The last line, in place of the remedy's or the cause's.
    """
    if why is None:
        why = filled(row.causes[cause].why, since=since, stream=stream)
    if do is None and remedy is not None:
        do = remedy_line(remedy, since)
    elif do is None:
        do = filled(row.causes[cause].do, since=since, stream=stream)
    name = row.name.replace("_", " ")
    message = (
        f"{name} at step {record.step}: {what}\n"
        f"  evidence: {shown}\n"
        f"  why: {why} (gradwatch explain {row.name})\n"
        f"  do: {do}"
    )
    return Alert(
        kind=row.name,
        severity=severity or row.severity,
        step=record.step,
        since=since,
        stream=stream.name if stream is not None else None,
        streams=(stream.name,) if stream is not None else (),
        cause=cause,
        evidence=evidence,
        message=message,
        remedy=remedy,
    )


def filled(line: str, *, since: int = 0, stream: Stream | None = None) -> str:
    """Return a line of the catalogue with what it names filled in."""
    if not since:
        line = line.replace(BEFORE, _ANEW)
    if stream is None:
        return line.format(since=since)
    biases = [path_of(stream, name) for name in ("bias_ih", "bias_hh")]
    return line.format(
        since=since,
        weight=path_of(stream, "weight_hh"),
        module=path_of(stream, ""),
        biases=", ".join(biases),
    )


def remedy_line(remedy: Remedy, since: int) -> str:
    """Return the line that applies a remedy, with where to go back to."""
    return remedies.line(remedy) + filled(BEFORE, since=since)


def times_largest(log10: float) -> str:
    """Return how a gradient compares with the largest one, from the log of a ratio."""
    return "0 times" if log10 == -math.inf else f"10^{log10:.1f} times"


def path_of(stream: Stream, weight: str) -> str:
    """Return the expression that names a weight of a stream, or its module for ``""``.

    Args:
        stream: The stream.
        weight: Such as ``weight_hh``; without a layer's suffix.
    """
    layer = stream.name.removeprefix(stream.module)[1:]
    module = f"model.{stream.module}"
    return module + (f".{weight}" + (f"_{layer}" if layer else "") if weight else "")


def percent(share: float) -> str:
    """Return a share as a message shows it."""
    return f"{share:.0%}".replace("%", " %")
