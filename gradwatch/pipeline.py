"""From a block to records, alerts and incidents, and on to the sinks.

The order of an alert: file, log, callback, then the other sinks.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from gradwatch import console
from gradwatch.block import Block
from gradwatch.health import Health
from gradwatch.kinds.catalogue import CATALOGUE
from gradwatch.kinds.incidents import Incidents
from gradwatch.kinds.judge import Judge, Rule
from gradwatch.record import Alert, Incident, StepRecord
from gradwatch.records import Records
from gradwatch.settings import Settings
from gradwatch.sinks import ByBlock, Holding, Seldom, Sink
from gradwatch.sinks.jsonl import Jsonl

_ALERTS_KEPT = 1000


class Pipeline:
    """Has the rows of blocks judged, and hands them on.

    Args:
        rules: The rules, in their order.
        settings: The arguments of the watch.
        folder: The run folder's sink, or None.
        sinks: The other sinks, by name.
        health: Where failures are noted.
        quiet: Whether nobody is told of alerts.
    """

    def __init__(
        self,
        rules: Sequence[Rule],
        settings: Settings,
        *,
        folder: Jsonl | None,
        sinks: Mapping[str, Sink],
        health: Health,
        quiet: bool,
    ) -> None:
        self.records = Records()
        self.latest: dict[str, float] = {}
        self.alerts: list[Alert] = []
        incidents = Incidents(CATALOGUE, settings.mute, fold=not settings.raising)
        self.judge = Judge(rules, incidents, health.absorb)
        self._doubted = False
        self.steps = 0
        on_alert = None if quiet else settings.on_alert
        self._on_alert = on_alert if callable(on_alert) else None
        self._folder = folder
        self._sinks = dict(sinks)
        self._by_block = {
            name: sink.write_block
            for name, sink in sinks.items()
            if isinstance(sink, ByBlock)
        }
        self._every = {
            name: (sink.every or 1) if isinstance(sink, Seldom) else 1
            for name, sink in sinks.items()
        }
        self._quiet = quiet
        self._rules_guard = health.guard("rules")
        self._callback_guard = health.guard("on_alert", lasting=True)
        self._folder_guard = health.guard("the run folder")
        self._sink_guards = {name: health.guard(name) for name in sinks}

    def take(self, block: Block) -> list[Alert]:
        """Take a block; return the alerts that were given out."""
        return [alert for part in block.parts() for alert in self._take_part(part)]

    def _take_part(self, block: Block) -> list[Alert]:
        busy: Sequence[Rule] = ()
        if not self._rules_guard.off:
            with self._rules_guard:
                busy = self.judge.busy(block)
        if block.plain:
            self._doubted = bool(busy)
        if not busy and block.plain:
            self._pass_on(block)
            return []
        given: list[Alert] = []
        for record in block.records():
            given += self._take_record(record, busy)
        return given

    def _pass_on(self, block: Block) -> None:
        """Hand on a block in which no rule has found anything."""
        self.steps += len(block)
        self.records.extend(block)
        self.latest.update(block.last())
        if self._folder is not None and not self._folder_guard.off:
            with self._folder_guard:
                self._folder.write_block(block)
        for name, sink in self._sinks.items():
            guard, every = self._sink_guards[name], self._every[name]
            if guard.off:
                continue
            with guard:
                if name in self._by_block:
                    self._by_block[name](block)
                    continue
                for i, step in enumerate(block.steps):
                    if step % every == 0:
                        sink.write(block.records()[i])

    def _take_record(self, record: StepRecord, busy: Sequence[Rule]) -> list[Alert]:
        self.steps += 1
        self.records.append(record)
        self.latest.update(record.metrics)
        given, changed = self._judge(record, busy)
        if given:
            self.alerts = (self.alerts + given)[-_ALERTS_KEPT:]
        self._to_folder(record, given, changed)
        alarms = [alert for alert in given if alert.severity != "info"]
        self._tell(given, alarms)
        for name, sink in self._sinks.items():
            guard = self._sink_guards[name]
            if not guard.off and (alarms or record.step % self._every[name] == 0):
                with guard:
                    sink.write(record, given)
        return given

    @property
    def restless(self) -> bool:
        """Whether an alarm is open, or some rule was not sure that all is well."""
        return self._doubted or self.judge.incidents.alarmed

    def reports(self, kind: str) -> bool:
        """Tell whether alerts of a kind may be given out: its rule works, unmuted."""
        return self.judge.reports(kind) and not self._rules_guard.off

    def still_open(self) -> list[Alert]:
        """Return the last alert of the incident of an error that is open, if one is."""
        known = [i for i in self.judge.incidents.all() if i.until is None]
        errors = [i for i in known if i.severity == "error"] or known
        return [errors[-1].alerts[-1]] if errors else []

    def _judge(
        self, record: StepRecord, busy: Sequence[Rule]
    ) -> tuple[list[Alert], list[Incident]]:
        found: tuple[list[Alert], list[Incident]] = [], []
        if not self._rules_guard.off:
            with self._rules_guard:
                found = self.judge.take(record, busy)
        return found

    def _to_folder(
        self, record: StepRecord, given: Sequence[Alert], changed: Sequence[Incident]
    ) -> None:
        if self._folder is None or self._folder_guard.off:
            return
        with self._folder_guard:
            self._folder.write(record, given)
            for incident in changed:
                self._folder.write_incident(incident, self.latest)

    def _tell(self, given: Sequence[Alert], alarms: Sequence[Alert]) -> None:
        for alert in alarms:
            if not self._quiet:
                level = logging.ERROR if alert.severity == "error" else logging.WARNING
                console.say(alert.message, level)
            if self._on_alert is not None:
                with self._callback_guard:
                    self._on_alert(alert)

    def write_open(self) -> None:
        """Have the folder hold what is open from an earlier run, changed or not."""
        if self._folder is not None:
            with self._folder_guard:
                for incident in self.judge.incidents.all():
                    if incident.until is None:
                        self._folder.write_incident(incident, self.latest)

    def write_out(self) -> None:
        """Have the folder write the records that it was given."""
        if self._folder is not None and not self._folder_guard.off:
            with self._folder_guard:
                self._folder.flush()

    def flush(self) -> None:
        """Have the folder, and every sink that can, hand on what it holds."""
        self.write_out()
        for name, sink in self._sinks.items():
            if isinstance(sink, Holding) and not self._sink_guards[name].off:
                with self._sink_guards[name]:
                    sink.flush()

    def close(self) -> None:
        """Close the sinks; the folder's is closed by the watch, with the health."""
        for name, sink in self._sinks.items():
            with self._sink_guards[name]:
                sink.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the rules and the incidents, in plain values."""
        return self.judge.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.judge.load_state_dict(state)
