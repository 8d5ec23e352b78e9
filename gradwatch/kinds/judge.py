"""All rules together: from a record to the alerts it gives and the incidents."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from gradwatch.block import Block
from gradwatch.kinds.incidents import Incidents
from gradwatch.record import Alert, Incident, StepRecord


@runtime_checkable
class Rule(Protocol):
    """Judges one record after the other.

    An alert opens an incident, which is over with the next record; a rule that has
    ``kind`` and ``active`` as well keeps it open while ``active`` is true
    (:class:`gradwatch.rules.OfKind`).
    """

    def update(self, record: StepRecord) -> list[Alert]:
        """Return the alerts that a record raises; mostly none."""


@runtime_checkable
class OfKind(Protocol):
    """A rule by which an incident stays open.

    Attributes:
        kind: The kind of the incident.
        active: Whether it still holds.
    """

    kind: str
    active: bool


@runtime_checkable
class Wanting(Protocol):
    """A rule that asks for measurements.

    Attributes:
        wants: A depth to be measured at the next step, or several.
    """

    wants: str | Sequence[str] | None


@runtime_checkable
class Wishing(Protocol):
    """A rule that asks for measurements where the budget allows them.

    Attributes:
        wishes: A depth to be measured at the next step, or several.
    """

    wishes: str | Sequence[str] | None


@runtime_checkable
class ByBlock(Protocol):
    """A rule that need not look at every record to know that nothing is wrong."""

    def update_block(self, block: Block) -> bool:
        """Take in a block whose rows are plain, if none raises or ends anything.

        Returns:
            True where the rule is then as :meth:`Rule.update` would have left it,
            record by record, and that would have returned no alert and not have
            changed ``active``. False where that is not sure: nothing was taken in.
        """


@runtime_checkable
class Saved(Protocol):
    """A rule whose state is saved with the run's."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""


def check_mute(
    mute: Iterable[str | tuple[str, str]],
    rules: Sequence[Rule],
    streams: Collection[str],
) -> None:
    """Check that what is to be muted exists.

    Args:
        mute: Kinds, or ``(kind, stream)`` pairs.
        rules: The rules, of which those that name no kind may report any.
        streams: Names of the streams.

    Raises:
        ValueError: If a kind or a stream is unknown, or an entry is neither.
    """
    kinds = sorted({rule.kind for rule in rules if isinstance(rule, OfKind)})
    any_kind = not all(isinstance(rule, OfKind) for rule in rules)
    for entry in mute:
        try:
            kind, stream = (entry, None) if isinstance(entry, str) else entry
        except (TypeError, ValueError):
            raise ValueError(
                f"mute holds {entry!r}; expected a kind, or a pair of a kind and a "
                'stream such as ("vanishing", "rnn.l0").'
            ) from None
        if kind not in kinds and not any_kind:
            raise ValueError(
                f"mute names the kind {kind!r}; the kinds are {', '.join(kinds)}."
            )
        if stream is not None and stream not in streams:
            raise ValueError(
                f"mute names the stream {stream!r}; the streams are "
                f"{', '.join(streams)}."
            )


class Judge:
    """Has every rule look at every record, and makes incidents of their alerts.

    Args:
        rules: The rules, in their order.
        incidents: What they have found so far: mostly nothing.
        absorb: Given what fails and its error; tells whether it is off from now on.
            None: errors are the caller's.
    """

    def __init__(
        self,
        rules: Sequence[Rule],
        incidents: Incidents,
        absorb: Callable[[str, Exception], bool] | None = None,
    ) -> None:
        self.rules = list(rules)
        self._absorb = absorb
        self._working = [
            (rule, rule if isinstance(rule, OfKind) else None) for rule in rules
        ]
        self._by_block = {
            id(r): r.update_block for r in rules if isinstance(r, ByBlock)
        }
        self._unsettled = False  # what is open may be over with the next record
        self._wanting = [rule for rule in rules if isinstance(rule, Wanting)]
        self._wishing = [rule for rule in rules if isinstance(rule, Wishing)]
        self.incidents = incidents

    def busy(self, block: Block) -> Sequence[Rule]:
        """Have every rule take in a block that can; return those that could not.

        They are to be given its records by :meth:`take`. Where there are none, the
        block has changed nothing.
        """
        if self._unsettled or not block.plain:
            return [rule for rule, _ in self._working]
        found: list[Rule] = []
        for rule, _ in self._working:
            try:
                update = self._by_block.get(id(rule))
                if update is None or not update(block):
                    found.append(rule)
            except Exception as error:
                self._failed(rule, error)
        return found

    def take(
        self, record: StepRecord, busy: Sequence[Rule] | None = None
    ) -> tuple[list[Alert], list[Incident]]:
        """Judge one record.

        Args:
            record: The record.
            busy: The rules that have not taken it in; None for all.

        Returns:
            The alerts that are given out, and the incidents that have changed.
        """
        given: list[Alert] = []
        changed: dict[str, Incident] = {}
        self._unsettled = False
        active: dict[str, bool] = {}
        for rule, of_kind in self._working:
            try:
                alerts = []
                if busy is None or rule in busy:
                    alerts = rule.update(record)
                    if alerts or type(alerts) is not list:
                        alerts = _checked(rule, alerts)
            except Exception as error:
                self._failed(rule, error)
                continue
            for alert in alerts:
                active[alert.kind] = self._unsettled = True
                out, incident = self.incidents.take(alert)
                if out is not None:
                    given.append(out)
                if incident is not None:
                    changed[incident.kind] = incident
            if of_kind is not None:
                kind, there = of_kind.kind, bool(of_kind.active)
                active[kind] = active.get(kind, False) or there
        for incident in self.incidents.end(record.step, active):
            changed[incident.kind] = incident
        for alert in self.incidents.left_behind(active):
            out, incident = self.incidents.take(alert)
            given += [out] if out is not None else []
            if incident is not None and incident.kind not in changed:
                changed[incident.kind] = incident
        return given, list(changed.values())

    def _failed(self, rule: Rule, error: Exception) -> None:
        """Go on without a rule: for this record, or for good."""
        if self._absorb is None:
            raise error
        if self._absorb(_part(rule), error):
            self._working = [own for own in self._working if own[0] is not rule]
            self._wanting = [own for own in self._wanting if own is not rule]
            self._wishing = [own for own in self._wishing if own is not rule]

    def reports(self, kind: str) -> bool:
        """Tell whether a rule of a kind works, and the kind is not muted."""
        known = {of_kind.kind for _, of_kind in self._working if of_kind is not None}
        return kind in known and not self.incidents.mutes(kind)

    def wanted(self) -> set[str]:
        """Return the depths that rules ask for at the next step."""
        return _depths([rule.wants for rule in self._wanting])

    def wished(self) -> set[str]:
        """Return the depths that they ask for where the budget allows them."""
        return _depths([rule.wishes for rule in self._wishing])

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the rules and the incidents, in plain values."""
        state = {
            "rules": {
                type(rule).__name__: rule.state_dict()
                for rule in self.rules
                if isinstance(rule, Saved)
            },
            "incidents": self.incidents.state_dict(),
        }
        return copy.deepcopy(state)  # rules go on writing into what they hold

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        state, self._unsettled = copy.deepcopy(dict(state)), True
        for rule in self.rules:
            saved = state["rules"].get(type(rule).__name__)
            if saved is not None and isinstance(rule, Saved):
                rule.load_state_dict(saved)
        self.incidents.load_state_dict(state["incidents"])


def _checked(rule: Rule, returned: Any) -> list[Alert]:
    """Return what a rule has returned, if it is alerts.

    Raises:
        TypeError: If it is not.
    """
    if type(returned) is list and all(isinstance(alert, Alert) for alert in returned):
        return returned
    odd = returned
    if isinstance(returned, list):
        odd = next(each for each in returned if not isinstance(each, Alert))
    raise TypeError(
        f"{type(rule).__name__}.update returned {type(odd).__name__}"
        f"{' in a list' if odd is not returned else ''}; expected a list of "
        "gradwatch.Alert, [] where there is nothing to report"
    )


def _part(rule: Rule) -> str:
    """Return what a rule is called where it fails."""
    name = type(rule).__name__
    return f"the rule of {rule.kind}" if isinstance(rule, OfKind) else f"rule {name}"


def _depths(asked: Iterable[str | Sequence[str] | None]) -> set[str]:
    given = [
        () if own is None else (own,) if isinstance(own, str) else own for own in asked
    ]
    return {depth for own in given for depth in own}
