"""Judging records again, by the rules of the catalogue or by your own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from gradwatch.kinds import catalogue
from gradwatch.kinds.catalogue import CATALOGUE
from gradwatch.kinds.incidents import Incidents
from gradwatch.kinds.judge import Judge, OfKind, Rule, check_mute
from gradwatch.record import Alert, StepRecord, Stream
from gradwatch.recurrent import recurrences

__all__ = ["OfKind", "Rule", "default_rules", "replay"]


def default_rules(of: nn.Module | Sequence[Stream]) -> list[Rule]:
    """Return the catalogue's rules for one model, to be passed on with your own.

    Args:
        of: The model; or its streams, such as ``gradwatch.load(dir).streams``.

    Raises:
        ValueError: If the model has no recurrent module.
    """
    if isinstance(of, nn.Module):
        of = [found.stream for found in recurrences(of)]
    return catalogue.default_rules(of)


def replay(
    records: Iterable[StepRecord],
    streams: Sequence[Stream],
    *,
    rules: Sequence[Rule] | None = None,
    mute: Iterable[str | tuple[str, str]] = (),
) -> list[Alert]:
    """Judge the records of a run again, with no model.

    Args:
        records: One a step, in their order, such as ``gradwatch.load(dir).records``;
            steps may be left out.
        streams: The streams that they are of: ``gradwatch.load(dir).streams``.
        rules: In place of the catalogue's.
        mute: Kinds, or ``(kind, stream)`` pairs, that are not wanted.

    Returns:
        The alerts that the watch gave in that run, where its file still holds a row for
        each step and the run was not resumed.

    Raises:
        ValueError: If a kind or a stream that is to be muted does not exist, or a step
            is not above the one before.
    """
    judged_by = default_rules(streams) if rules is None else rules
    mute = list(mute)
    check_mute(mute, judged_by, [stream.name for stream in streams])
    judge = Judge(judged_by, Incidents(CATALOGUE, mute))
    return [alert for r in _ascending(records) for alert in judge.take(r)[0]]


def _ascending(records: Iterable[StepRecord]) -> Iterator[StepRecord]:
    last: int | None = None
    for record in records:
        if last is not None and record.step <= last:
            raise ValueError(
                f"step {record.step} comes after step {last}; expected steps that "
                "ascend. Sort the records and leave out those that are there twice, or "
                "replay each part of a run that went back on its own."
            )
        last = record.step
        yield record
