"""From a reading on the host to records, alerts and incidents, and on to the sinks.

The order of an alert: file, log, callback, then the other sinks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from gradwatch import console
from gradwatch.derive import Memory, Reading, derive
from gradwatch.health import Health
from gradwatch.record import Alert, Incident, Records, StepRecord
from gradwatch.rules import Judge, Rule
from gradwatch.sinks import Sink
from gradwatch.sinks.jsonl import Jsonl

_ALERTS_KEPT = 1000


class Pipeline:
    """Turns readings into records, has them judged, and hands them on.

    Args:
        rules: The rules, in their order.
        mute: Kinds, or ``(kind, stream)`` pairs, that are not wanted.
        on_alert: Told about warnings and errors; or None.
        folder: The run folder's sink, or None.
        sinks: The other sinks, by name.
        health: Where failures are noted.
        quiet: Whether nothing is printed.
    """

    def __init__(
        self,
        *,
        rules: Sequence[Rule],
        mute: Iterable[str | tuple[str, str]],
        on_alert: Callable[[Alert], object] | None,
        folder: Jsonl | None,
        sinks: Mapping[str, Sink],
        health: Health,
        quiet: bool,
    ) -> None:
        self.records = Records()
        self.latest: dict[str, float] = {}
        self.alerts: list[Alert] = []
        self.judge = Judge(rules, mute)
        self.memory = Memory()
        self.steps = 0
        self.notices = 0
        self._on_alert = on_alert
        self._folder = folder
        self._sinks = dict(sinks)
        self._quiet = quiet
        self._told = False
        self._rules_guard = health.guard("rules")
        self._callback_guard = health.guard("on_alert")
        self._folder_guard = health.guard("the run folder")
        self._sink_guards = {name: health.guard(name) for name in sinks}

    def take(self, reading: Reading) -> list[Alert]:
        """Take in one step; return the alerts that were given out."""
        self.memory, record = derive(self.memory, reading)
        self.steps += 1
        self.records.append(record)
        self.latest.update(record.metrics)
        given, changed = self._judge(record)
        self.alerts = (self.alerts + given)[-_ALERTS_KEPT:]
        self._to_folder(record, given, changed)
        alarms = [alert for alert in given if alert.severity != "info"]
        self._tell(given, alarms)
        for name, sink in self._sinks.items():
            guard = self._sink_guards[name]
            every = getattr(sink, "every", None) or 1
            if not guard.failed and (alarms or record.step % every == 0):
                with guard:
                    sink.write(record, given)
        return given

    def wanted(self, attribute: str) -> set[str]:
        """Return the depths that rules ask for at the next step; see ``Judge``."""
        return self.judge.wanted(attribute)

    def _judge(self, record: StepRecord) -> tuple[list[Alert], list[Incident]]:
        found: tuple[list[Alert], list[Incident]] = [], []
        if not self._rules_guard.failed:
            with self._rules_guard:
                found = self.judge.take(record)
        return found

    def _to_folder(
        self, record: StepRecord, given: Sequence[Alert], changed: Sequence[Incident]
    ) -> None:
        if self._folder is None or self._folder_guard.failed:
            return
        with self._folder_guard:
            self._folder.write(record, given)
            for incident in changed:
                self._folder.write_incident(incident, self.latest)

    def _tell(self, given: Sequence[Alert], alarms: Sequence[Alert]) -> None:
        self.notices += len(given) - len(alarms)
        for alert in alarms:
            if not self._quiet:
                level = logging.ERROR if alert.severity == "error" else logging.WARNING
                console.say(alert.message, level)
            if self._on_alert is not None:
                with self._callback_guard:
                    self._on_alert(alert)

    def handed_on(self) -> None:
        """Have the folder write the records that it was given."""
        if self._folder is not None and not self._folder_guard.failed:
            with self._folder_guard:
                self._folder.flush()

    def flush(self) -> None:
        """Have the folder, and every sink that can, hand on what it holds."""
        self.handed_on()
        for name, sink in self._sinks.items():
            flush = getattr(sink, "flush", None)
            if flush is not None and not self._sink_guards[name].failed:
                with self._sink_guards[name]:
                    flush()

    def close(self) -> None:
        """Close the sinks; the folder's is closed by the watch, with the health."""
        for name, sink in self._sinks.items():
            with self._sink_guards[name]:
                sink.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of derive, the rules and the incidents, in plain values."""
        memory = self.memory
        return {
            "memory": {
                "skipped": memory.skipped,
                "norms": list(memory.norms),
                "facts": dict(memory.facts),
                "rho": dict(memory.rho),
                "signals": dict(memory.signals),
                "left_out": dict(memory.left_out),
                "looks": dict(memory.looks),
            },
            **self.judge.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        memory = state["memory"]
        self.memory = Memory(
            skipped=memory["skipped"],
            norms=tuple(memory["norms"]),
            facts=memory["facts"],
            rho=memory.get("rho", {}),
            signals=memory.get("signals", {}),
            left_out=memory.get("left_out", {}),
            looks=memory.get("looks", {}),
        )
        self.judge.load_state_dict(state)
