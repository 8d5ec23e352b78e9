"""All rules together: from a record to the alerts it gives and the incidents."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from gradwatch.record import Alert, Incident, StepRecord
from gradwatch.rules.incidents import Incidents


@runtime_checkable
class Rule(Protocol):
    """Judges one record after the other.

    A rule may also have: ``wants``, the name of a depth that it asks for at the next
    step, or several; ``wishes``, the same where the budget allows it; ``kind`` and
    ``active``, by which an incident of that kind stays open; and
    ``state_dict`` / ``load_state_dict`` of plain values.
    """

    def update(self, record: StepRecord) -> list[Alert]:
        """Return the alerts that a record raises; mostly none."""


class Judge:
    """Has every rule look at every record, and makes incidents of their alerts.

    Args:
        rules: The rules, in their order.
        mute: Kinds, or ``(kind, stream)`` pairs, that are not wanted.
    """

    def __init__(
        self, rules: Sequence[Rule], mute: Iterable[str | tuple[str, str]] = ()
    ) -> None:
        self.rules = list(rules)
        self.incidents = Incidents(mute)

    def take(self, record: StepRecord) -> tuple[list[Alert], list[Incident]]:
        """Judge one record.

        Returns:
            The alerts that are given out, and the incidents that have changed.
        """
        given: list[Alert] = []
        changed: dict[str, Incident] = {}
        active: dict[str, bool] = {}
        for rule in self.rules:
            for alert in rule.update(record):
                active[alert.kind] = True
                out, incident = self.incidents.take(alert)
                if out is not None:
                    given.append(out)
                if incident is not None:
                    changed[incident.kind] = incident
            if (kind := getattr(rule, "kind", None)) is not None:
                there = bool(getattr(rule, "active", False))
                active[kind] = active.get(kind, False) or there
        for incident in self.incidents.end(record.step, active):
            changed[incident.kind] = incident
        for alert in self.incidents.left_behind(active):
            out, incident = self.incidents.take(alert)
            given += [out] if out is not None else []
            if incident is not None and incident.kind not in changed:
                changed[incident.kind] = incident
        return given, list(changed.values())

    def wanted(self, attribute: str) -> set[str]:
        """Return the depths that rules ask for at the next step.

        Args:
            attribute: ``wants``, or ``wishes`` for what the budget has to allow.
        """
        asked = [getattr(rule, attribute, None) or () for rule in self.rules]
        return {w for own in asked for w in ((own,) if isinstance(own, str) else own)}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the rules and the incidents, in plain values."""
        state = {
            "rules": {
                type(rule).__name__: rule.state_dict()
                for rule in self.rules
                if hasattr(rule, "state_dict")
            },
            "incidents": self.incidents.state_dict(),
        }
        return copy.deepcopy(state)  # rules go on writing into what they hold

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        state = copy.deepcopy(dict(state))
        for rule in self.rules:
            saved = state["rules"].get(type(rule).__name__)
            if saved is not None and hasattr(rule, "load_state_dict"):
                rule.load_state_dict(saved)
        self.incidents.load_state_dict(state["incidents"])
