"""What derive is given: one step's numbers on the host, with what they belong to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gradwatch.metrics import stream_key
from gradwatch.observe.capture import Step
from gradwatch.observe.flow import Flow
from gradwatch.observe.measure import HostNumbers
from gradwatch.observe.spectrum import Spectrum
from gradwatch.observe.state import State
from gradwatch.record import Stream


class Layout(NamedTuple):
    """Which parameters are behind which key; made once for a set of parameters.

    Attributes:
        norms: Key -> indices of the parameters whose norms are joined under it.
        ratios: Name of a stream -> key of its update ratio.
    """

    norms: Sequence[tuple[str, Sequence[int]]]
    ratios: Mapping[str, str]

    @classmethod
    def of(cls, groups: Sequence[tuple[Stream, Mapping[str, Sequence[int]]]]) -> Layout:
        """Return the layout for streams and their ``hh``, ``ih``, ``bias`` groups."""
        norms = [
            (stream_key(stream, f"grad_norm_{group}"), tuple(index))
            for stream, parts in groups
            for group, index in parts.items()
            if index
        ]
        return cls(norms, {s.name: stream_key(s, "update_ratio") for s, _ in groups})


@dataclass(slots=True, kw_only=True)
class Reading:
    """One step's numbers on the host, with what they belong to.

    Attributes:
        step: The step as the tap saw it.
        host: Its numbers.
        layout: Which parameters are behind which key.
        spectrum: The spectrum run of this step, its numbers under ``spectrum.``.
        state: The state run of this step, its numbers under ``state.``.
        flow: The flow run of this step, its numbers under ``flow.``.
        time: Seconds since the epoch.
        loss: The last value given to ``watch.log``, or None.
        overhead: Share of the time since the last record that gradwatch used.
        facts: What is not a number, as it is now.
        events: What happened beside the tap's own events.
    """

    step: Step
    host: HostNumbers
    layout: Layout = field(default_factory=lambda: Layout((), {}))
    spectrum: Spectrum | None = None
    state: State | None = None
    flow: Flow | None = None
    time: float = 0.0
    loss: float | None = None
    overhead: float = 0.0
    facts: Mapping[str, Any] = field(default_factory=dict)
    events: tuple[str, ...] = ()

    def part(self, name: str) -> dict[str, Any]:
        """Return the numbers under a name, without it."""
        start = f"{name}."
        found = self.host.items()
        return {k[len(start) :]: v for k, v in found if k.startswith(start)}

    @property
    def scale(self) -> float:
        """By how much a loss scaler has multiplied the gradients; 1 without one.

        NaN for a scale that has been halved down to 0: nothing can be told behind it.
        """
        return (float(self.host["scale"]) or math.nan) if "scale" in self.host else 1.0
