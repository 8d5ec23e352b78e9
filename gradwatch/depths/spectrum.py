"""The spectrum: rho of every gate, its drift, and what it has come to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor

from gradwatch.depths.drain import Host, Numbers
from gradwatch.metrics import stream_key
from gradwatch.numerics import drift, singular, spectral
from gradwatch.numerics.drift import Drift
from gradwatch.numerics.spectral import Radius
from gradwatch.numerics.streaming import theil_sen
from gradwatch.record import Stream
from gradwatch.recurrent import gate_matrices

Recurrent = tuple[Stream, Tensor, Tensor | None]
"""A stream with its W_hh and, where there is one, its W_hr."""


@dataclass(slots=True)
class Group:
    """Streams whose gates have one size and are measured in one batch.

    Attributes:
        streams: In their order; their gates follow each other in the batch.
        launched: What was launched for all their gates.
        updated: Those of them whose update was seen; ``moved`` is of theirs alone.
    """

    streams: list[Stream]
    launched: spectral.Launched
    updated: list[Stream] = field(default_factory=list)

    def gates(self, stream: Stream) -> range:
        """Return the place of a stream's gates in the batch."""
        start = 0
        for other in self.streams:
            count = max(len(other.gates), 1)
            if other is stream:
                return range(start, start + count)
            start += count
        raise ValueError(f"{stream.name} is not of this group")


@dataclass(slots=True)
class Spectrum:
    """A spectrum run whose numbers may still be on the device.

    Attributes:
        groups: The streams, by size.
        numbers: All blocks, named ``(number of the group, block)``.
    """

    groups: list[Group] = field(default_factory=list)
    numbers: Numbers = field(default_factory=dict)

    def add(self, weights: Sequence[Recurrent], *, gram: bool) -> None:
        """Launch rho for every gate, all gates and layers of one size in one batch.

        Args:
            weights: Streams with their weights, as the forward used them.
            gram: Whether to measure ``sigma_max`` and ``orthogonality`` too.
        """
        by_size: dict[tuple[int, torch.device], list[Recurrent]] = {}
        for member in weights:
            key = (member[0].hidden_size, member[1].device)
            by_size.setdefault(key, []).append(member)
        for members in by_size.values():
            streams = [stream for stream, *_ in members]
            self._add_group(streams, _stacked(members), gram=gram)

    def _add_group(
        self, streams: list[Stream], matrices: Tensor, *, gram: bool
    ) -> None:
        launched, number = spectral.launch(matrices), len(self.groups)
        blocks = dict(launched.blocks)
        if gram:
            blocks |= singular.launch_gram(matrices)
        self.numbers |= {(number, name): t for name, t in blocks.items()}
        self.groups.append(Group(streams, launched))

    def add_update(self, after: Mapping[str, Recurrent]) -> None:
        """Launch what the drift needs, once the optimizers have changed the weights.

        Args:
            after: The weights after the update, by stream, where they are plain
                parameters and those that the forward used.
        """
        for number, group in enumerate(self.groups):
            members = []
            for stream in group.streams:
                member, gates = after.get(stream.name), group.gates(stream)
                if member is None:
                    continue
                if _alike(member, group.launched.matrix, len(gates)):
                    members.append(member)
                    group.updated.append(stream)
            if members:
                rows = [i for stream in group.updated for i in group.gates(stream)]
                self.numbers[number, "moved"] = drift.launch_change(
                    group.launched, _stacked(members), rows
                )


def _alike(member: Recurrent, matrix: Tensor, gates: int) -> bool:
    """Tell whether a weight is still what it was: not replaced, moved or sharded."""
    stream, weight, _ = member
    width = stream.proj_size or stream.hidden_size
    shape = (gates * stream.hidden_size, width)
    return weight.shape == shape and weight.device == matrix.device


def _stacked(members: Sequence[Recurrent]) -> Tensor:
    gates = [gate_matrices(stream, w, projection) for stream, w, projection in members]
    alike = gates[0].dtype
    return torch.cat([g if g.dtype == alike else g.to(alike) for g in gates])


def gated(stream: Stream, matrices: Mapping[str, Tensor]) -> list[Recurrent]:
    """Return the weights of a cell of the user's own, as those of a stream with gates.

    Args:
        stream: The cell's.
        matrices: By gate; nothing where there are none, or of several sizes.
    """
    sizes = {len(matrix) for matrix in matrices.values()}
    if len(sizes) != 1:
        return []
    whole = replace(stream, gates=tuple(matrices), hidden_size=sizes.pop(), proj_size=0)
    return [(whole, torch.cat(list(matrices.values())), None)]


def too_large(sizes: Sequence[tuple[int, int]], device: torch.device) -> bool:
    """Tell whether a spectrum run would surely take over a second.

    Args:
        sizes: ``(H, gates)`` of each stream.
        device: Where the weights are.
    """
    products = 2 * (spectral.SQUARINGS + 1)
    work = sum(products * gates * hidden**3 for hidden, gates in sizes)
    return work > (1e11 if device.type == "cpu" else 2e13)


# ---- on the host

_TREND_OVER: Final = 8
_TREND_FROM: Final = 4
"""Most and fewest certified radii that a trend is taken over."""

History = Mapping[str, Any]
"""Of one gate: ``first``, the reference of its drift; its last certified radii,
``values``, at ``steps``."""


@dataclass(slots=True, kw_only=True)
class Memory:
    """What is remembered of radii between steps; plain values.

    Attributes:
        rho: The certified radii of every gate.
    """

    rho: dict[str, Mapping[str, History]] = field(default_factory=dict)


def finish(run: Spectrum, host: Host, step: int, memory: Memory) -> dict[str, float]:
    """Return the metrics of a run.

    Args:
        run: What was launched.
        host: Its numbers.
        step: The step that they belong to.
        memory: Updated in place.
    """
    metrics: dict[str, float] = {}
    for number, group in enumerate(run.groups):
        own = {name: block for (n, name), block in host.items() if n == number}
        launched = {key: own[key] for key in group.launched.blocks}
        radii = spectral.finish(group.launched, launched)
        for stream in group.streams:
            place = group.gates(stream)
            of_gates = radii[place.start : place.stop]
            lead = _lead(of_gates)
            metrics |= _radius_metrics(stream, of_gates)
            for name, block in (("sigma_max", "sigma"), ("orthogonality",) * 2):
                if block in own:
                    values = own[block][place.start : place.stop].tolist()
                    metrics |= _per_gate(stream, name, values, _largest(values))
            history = _extended(memory.rho.get(stream.name, {}), stream, of_gates, step)
            memory.rho[stream.name] = history
            metrics |= _trend(stream, history, lead, of_gates)
        metrics |= _drift_metrics(group, radii, own)
    return metrics


def _radius_metrics(stream: Stream, radii: Sequence[Radius]) -> dict[str, float]:
    flags = [float(r.certified) for r in radii]
    metrics = _per_gate(stream, "rho_certified", flags, min(flags))
    known = [r.rho for r in radii if r.source != "open"]
    if len(known) == len(radii):
        return metrics | _per_gate(stream, "rho", known, _largest(known))
    for gate, radius in zip(stream.gates, radii, strict=False):
        if radius.source != "open":
            metrics[stream_key(stream, "rho", gate)] = radius.rho
    return metrics


def _lead(radii: Sequence[Radius]) -> int:
    """Return the place of the gate with the largest rho."""
    return max(range(len(radii)), key=lambda i: _or_zero(radii[i].rho))


def _drift_metrics(
    group: Group, radii: Sequence[Radius], blocks: Mapping[str, Any]
) -> dict[str, float]:
    if "moved" not in blocks:
        return {}
    metrics: dict[str, float] = {}
    rows = [i for stream in group.updated for i in group.gates(stream)]
    found = drift.finish_change(
        [radii[i] for i in rows], blocks["scale"][rows], blocks["moved"]
    )
    first = 0
    for stream in group.updated:
        place = group.gates(stream)
        own = found[first : first + len(place)]
        first += len(place)
        lead = own[_lead([radii[i] for i in place])]
        metrics |= _one_drift(stream, "", lead)
        for gate, one in zip(stream.gates, own, strict=False):
            metrics |= _one_drift(stream, gate, one)
    return metrics


def _one_drift(stream: Stream, gate: str, found: Drift) -> dict[str, float]:
    flag = stream_key(stream, "rho_drift_reliable", gate)
    if math.isnan(found.value):
        return {flag: 0.0}
    value = stream_key(stream, "rho_drift", gate)
    return {value: found.value, flag: float(found.reliable)}


def _extended(
    known: Mapping[str, History], stream: Stream, radii: Sequence[Radius], step: int
) -> dict[str, History]:
    histories = dict(known)
    for gate, radius in zip(stream.gates or ("",), radii, strict=True):
        if not radius.certified or not radius.rho > 0:
            continue
        before = known.get(gate, {"first": radius.rho, "steps": [], "values": []})
        if step in before["steps"]:
            continue
        histories[gate] = {
            "first": before["first"],
            "steps": [*before["steps"], step][-_TREND_OVER:],
            "values": [*before["values"], radius.rho][-_TREND_OVER:],
        }
    return histories


def _trend(
    stream: Stream, history: Mapping[str, History], lead: int, radii: Sequence[Radius]
) -> dict[str, float]:
    found = history.get((stream.gates or ("",))[lead])
    if found is None or not radii[lead].certified:
        return {}
    total = math.log(found["values"][-1] / found["first"])
    metrics = {stream_key(stream, "rho_total_drift"): total}
    if len(found["steps"]) >= _TREND_FROM:
        slope = theil_sen(found["steps"], found["values"])
        metrics[stream_key(stream, "rho_trend")] = slope
    return metrics


def _per_gate(
    stream: Stream, metric: str, values: Sequence[float], whole: float
) -> dict[str, float]:
    keys = [stream_key(stream, metric, gate) for gate in stream.gates]
    return {stream_key(stream, metric): whole, **dict(zip(keys, values, strict=False))}


def _largest(values: Sequence[float]) -> float:
    return math.nan if any(map(math.isnan, values)) else max(values)


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value
