"""The flow of a run so far, in few records: what a picture of it is drawn of."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from gradwatch.facts import NO_FACTS, Facts
from gradwatch.plot.charts import flow_of
from gradwatch.plot.columns import base, columns
from gradwatch.plot.numbers import PROFILE, ROWS, flow_points, stream_with
from gradwatch.plot.panels import Spec
from gradwatch.record import StepRecord


class History:
    """Keeps what a picture of the flow needs, at most two records for each row of it.

    When it is full every second record goes, so that it always spans the whole run.
    """

    def __init__(self) -> None:
        self._kept: list[StepRecord] = []
        self._facts: Facts = NO_FACTS
        self._every, self._seen = 1, 0

    def add(self, record: StepRecord) -> None:
        """Take one record in; most have nothing of the flow."""
        if record.facts:
            self._facts = self._facts.with_later(record.facts)
        if not record.profiles:
            return
        self._seen += 1
        if self._seen % self._every:
            return
        shown = {k: v for k, v in record.profiles.items() if k.endswith(PROFILE)}
        reach = {k: v for k, v in record.metrics.items() if k.endswith("/horizon")}
        self._kept.append(StepRecord(step=record.step, metrics=reach, profiles=shown))
        if len(self._kept) >= 2 * ROWS:
            self._kept, self._every = self._kept[1::2], 2 * self._every

    @property
    def empty(self) -> bool:
        """Whether no flow has been seen."""
        return not self._kept

    def picture(self, streams: Sequence[str]) -> tuple[str, Spec, str]:
        """Return the flow of the first of some streams that has one, or of any.

        Args:
            streams: Names of streams, those of an alarm first.

        Returns:
            The stream's part of a key, the chart, and its title.

        Raises:
            ValueError: If no flow has been seen.
        """
        last = self._kept[-1:]
        records = self._kept[:-1]
        records += [dataclasses.replace(record, facts=self._facts) for record in last]
        found = columns(records)
        known = {key for record in records for key in record.profiles}
        named = [name for name in streams if base(name) + PROFILE in known]
        stream = named[0] if named else None
        cells, marks, title = flow_points(found, stream)
        key = stream_with(found, stream, "flow")
        return key, flow_of(found, key, cells, marks), title
