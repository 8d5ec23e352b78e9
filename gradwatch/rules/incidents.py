"""From alerts to incidents: one trouble, one alarm."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from gradwatch.record import Alert, Incident, parse

PRECEDENCE: Final = (
    "nonfinite",
    "exploding",
    "lr_too_high",
    "loss_divergence",
    "spike",
)
_BROKEN: Final = ("nonfinite", "exploding")
CONSEQUENCES: Final[Mapping[str, Sequence[str]]] = MappingProxyType(
    {
        "dead_units": _BROKEN,
        "gate_stuck": _BROKEN,
        "no_gradient": _BROKEN,
        "underflow": _BROKEN,
        "vanishing": (*_BROKEN, "lr_too_high", "dead_units", "gate_stuck"),
        "cleared_early": _BROKEN,  # a clip to a norm that overflows leaves zeros
        "over_clipping": (*_BROKEN, "cleared_early"),
        "not_updating": (*_BROKEN, "cleared_early", "over_clipping"),
        "lr_too_high": ("not_cleared",),
        "nonfinite": ("lr_too_high",),  # and it raises that to an error
        "loss_divergence": ("not_cleared",),
        "spike": ("not_cleared",),
    }
)
"""Kind -> the open errors and alarms that explain it: it is evidence of theirs."""
UNDECIDED: Final[Mapping[str, Sequence[str]]] = MappingProxyType(
    {
        "no_gradient": ("dead_units", "gate_stuck", "underflow"),
        "not_updating": ("dead_units", "gate_stuck", "underflow"),
        "exploding": ("lr_too_high",),
    }
)
"""The same for an alert that could name no cause of its own."""
_RANK: Final = {"info": 0, "warning": 1, "error": 2}
_NOTICES: Final = 3
"""Notices that one stream may give in a run, per kind."""


class Incidents:
    """The open and past incidents of a run.

    Args:
        mute: Kinds, or ``(kind, stream)`` pairs, that are not wanted.
    """

    def __init__(self, mute: Iterable[str | tuple[str, str]] = ()) -> None:
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
        rises = _RANK[alert.severity] > _RANK[known.severity]
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
            remedy=known.remedy or alert.remedy,
            alerts=(*known.alerts, alert) if rises else known.alerts,
        )
        self._open[known.kind] = grown
        return (alert if rises else None), grown

    def _covering(self, alert: Alert) -> Incident | None:
        """Return the open incident that an alert is evidence of."""
        own = self._open.get(alert.kind)
        if own is not None and "info" not in (own.severity, alert.severity):
            return own
        explained = [*CONSEQUENCES.get(alert.kind, ())]
        if alert.cause is None:
            explained += UNDECIDED.get(alert.kind, ())
        for kind in explained:
            known = self._open.get(kind)
            if known is not None and known.severity != "info":
                return known
        if own is not None or alert.kind not in PRECEDENCE:
            return own
        for kind in PRECEDENCE:
            known = self._open.get(kind)
            # An open error explains also what ranks above it: an explosion ends in NaN.
            if known is None or known.severity == "info":
                continue
            if known.severity == "error" or PRECEDENCE.index(kind) < PRECEDENCE.index(
                alert.kind
            ):
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
