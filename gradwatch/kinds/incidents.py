"""From alerts to incidents: one alarm for all that one cause shows."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Final

from gradwatch.kinds.kind import Kind
from gradwatch.record import Alert, Incident, parse

_SEVERITIES: Final = ("info", "warning", "error")
_NOTICES: Final = 3
"""Notices that one stream may give in a run, per kind."""
_ALARMS: Final = 3
"""Alarms of a kind with an incident each; one that flaps has no more."""


class Incidents:
    """The open and past incidents of a run.

    Args:
        kinds: The catalogue: kind -> its row, which tells what explains it.
        mute: Kinds, or ``(kind, stream)`` pairs, that are not wanted.
        fold: Whether an alarm that comes again and again goes on with its last
            incident, and is given out only when its repeats have doubled.
    """

    def __init__(
        self,
        kinds: Mapping[str, Kind],
        mute: Iterable[str | tuple[str, str]] = (),
        *,
        fold: bool = True,
    ) -> None:
        self._fold = fold
        self._kinds = kinds
        ranks = {name: row.rank for name, row in kinds.items() if row.rank is not None}
        self._ranks = dict(sorted(ranks.items(), key=lambda ranked: ranked[1]))
        self._mute = set(mute)
        self._open: dict[str, Incident] = {}
        self._past: list[Incident] = []
        self._notices: Counter[tuple[str, str | None]] = Counter()
        self._explained: dict[str, tuple[str, Alert]] = {}  # kind: by which, the last

    def __iter__(self) -> Any:
        """Iterate over the past incidents, then the open ones."""
        return iter(self.all())

    def all(self) -> list[Incident]:
        """Return the past incidents, then the open ones."""
        return [*self._past, *self._open.values()]

    @property
    def alarmed(self) -> bool:
        """Whether an alarm is open; a notice is none."""
        return any(known.severity != "info" for known in self._open.values())

    def mutes(self, kind: str) -> bool:
        """Tell whether alerts of a kind are never wanted."""
        return kind in self._mute

    def take(self, alert: Alert) -> tuple[Alert | None, Incident | None]:
        """Take in one alert.

        Returns:
            The alert if it is to be given out, else None: it is muted, or evidence of
            an incident that is open already. And the incident that it changed.
        """
        if alert.kind in self._mute or (alert.kind, alert.stream) in self._mute:
            return None, None
        if alert.severity == "info":
            self._notices[alert.kind, alert.stream] += 1
            if self._notices[alert.kind, alert.stream] > _NOTICES:
                return None, None
        known = self._covering(alert)
        if known is None and (before := self._flapping(alert)) is not None:
            return self._come_back(before, alert)
        if known is None:
            opened = Incident(
                kind=alert.kind,
                severity=alert.severity,
                since=alert.since,
                streams=alert.streams,
                cause=alert.cause,
                evidence=dict(alert.evidence),
                remedy=alert.remedy,
                alerts=(alert,),
            )
            self._open[alert.kind] = opened
            return alert, opened
        rises = _SEVERITIES.index(alert.severity) > _SEVERITIES.index(known.severity)
        if alert.kind != known.kind:
            self._explained[alert.kind] = (known.kind, alert)
            # What is explained is evidence, however bad; but a NaN is told.
            rises = rises and alert.kind == "nonfinite"
        grown = dataclasses.replace(
            known,
            severity=alert.severity if rises else known.severity,
            streams=tuple(dict.fromkeys((*known.streams, *alert.streams))),
            cause=known.cause or (alert.cause if alert.kind == known.kind else None),
            evidence={**known.evidence, **alert.evidence},
            remedy=known.remedy or (alert.remedy if alert.kind == known.kind else None),
            alerts=(*known.alerts, alert) if rises else known.alerts,
        )
        self._open[known.kind] = grown
        return (alert if rises else None), grown

    def _flapping(self, alert: Alert) -> Incident | None:
        """Return the last incident of an alarm that has had all that it may have."""
        if alert.severity == "info" or not self._fold:
            return None
        past = [i for i in self._past if i.kind == alert.kind]
        same = [i for i in past if i.severity != "info"]
        return same[-1] if len(same) >= _ALARMS else None

    def _come_back(
        self, before: Incident, alert: Alert
    ) -> tuple[Alert | None, Incident]:
        """Open an incident again."""
        self._past.remove(before)
        again = dataclasses.replace(
            before,
            severity=max(before.severity, alert.severity, key=_SEVERITIES.index),
            until=None,
            streams=tuple(dict.fromkeys((*before.streams, *alert.streams))),
            cause=alert.cause or before.cause,
            evidence=dict(alert.evidence),
            remedy=alert.remedy or before.remedy,
            repeats=before.repeats + 1,
        )
        out = None
        if again.doubled:
            out = dataclasses.replace(
                alert,
                message=f"{alert.message}\n  again: {again.repeats + _ALARMS} times so "
                "far; the next one is reported when this number of repeats has doubled",
            )
            again = dataclasses.replace(again, alerts=(*again.alerts, out))
        self._open[alert.kind] = again
        return out, again

    def _covering(self, alert: Alert) -> Incident | None:
        """Return the open incident that an alert is evidence of."""
        own = self._open.get(alert.kind)
        if own is not None and "info" not in (own.severity, alert.severity):
            return own
        row = self._kinds.get(alert.kind)
        explained = [*row.explained_by] if row is not None else []
        if row is not None and alert.cause is None:
            explained += row.undecided_by
        for kind in explained:
            known = self._open.get(kind)
            if known is not None and known.severity != "info":
                return known
        if own is not None or alert.kind not in self._ranks:
            return own
        for kind, rank in self._ranks.items():
            known = self._open.get(kind)
            # An open error explains also what ranks above it: an explosion ends in NaN.
            if known is None or known.severity == "info":
                continue
            if known.severity == "error" or rank < self._ranks[alert.kind]:
                return known
        return None

    def end(self, step: int, active: Mapping[str, bool]) -> list[Incident]:
        """Close the incidents whose rule is no longer active; return them."""
        over = [kind for kind in self._open if not active.get(kind, False)]
        ended = [dataclasses.replace(self._open.pop(k), until=step) for k in over]
        self._past += ended
        return ended

    def left_behind(self, active: Mapping[str, bool]) -> list[Alert]:
        """Return alerts that were explained by what is over, and that still hold.

        Args:
            active: Kind -> whether its rule still shows it.
        """
        over = [k for k, (by, _) in self._explained.items() if by not in self._open]
        found = [self._explained.pop(kind)[1] for kind in over]
        return [alert for alert in found if active.get(alert.kind, False)]

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values."""
        return {
            "open": [_plain(i) for i in self._open.values()],
            "past": [_plain(i) for i in self._past],
            "notices": [[*key, n] for key, n in self._notices.items()],
            "explained": [
                [kind, by, dataclasses.asdict(alert)]
                for kind, (by, alert) in self._explained.items()
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`; open incidents are not alerted again."""
        self._open = {raw["kind"]: parse(Incident, raw) for raw in state["open"]}
        self._past = [parse(Incident, raw) for raw in state["past"]]
        self._notices = Counter({(k, s): n for k, s, n in state["notices"]})
        self._explained = {
            kind: (by, parse(Alert, raw)) for kind, by, raw in state["explained"]
        }


def _plain(incident: Incident) -> dict[str, Any]:
    raw = dataclasses.asdict(incident)
    raw["alerts"] = list(raw["alerts"])
    return raw
