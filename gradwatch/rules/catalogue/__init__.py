"""The catalogue of kinds: one row each, from which all else is derived.

Its thresholds are those that the rules use, its words those of the messages, and the
pages ``docs/alerts/<kind>.md`` are made from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from gradwatch.rules.catalogue import flow, loop, units
from gradwatch.rules.catalogue.kind import Cause, Evidence, Kind

__all__ = ["CATALOGUE", "Cause", "Evidence", "Kind"]

CATALOGUE: Final[Mapping[str, Kind]] = MappingProxyType(
    {kind.name: kind for kind in (*loop.KINDS, *flow.KINDS, *units.KINDS)}
)
