"""The spectrum depth: from recurrent weights to numbers that stay on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradwatch.numerics import drift, singular, spectral
from gradwatch.observe.measure import Numbers
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
        numbers: All blocks, named ``<group>.<block>``.
        seconds: What the launch cost on the host's clock.
    """

    groups: list[Group] = field(default_factory=list)
    numbers: Numbers = field(default_factory=dict)
    seconds: float = 0.0


def spectrum(weights: Sequence[Recurrent], *, gram: bool) -> Spectrum:
    """Launch rho for every gate, all gates and layers of one size in one batch.

    Args:
        weights: Streams with their weights, as the forward used them.
        gram: Whether to measure ``sigma_max`` and ``orthogonality`` too.

    Returns:
        The run; its numbers are still on the device.
    """
    by_size: dict[tuple[int, torch.device], list[Recurrent]] = {}
    for member in weights:
        key = (member[0].hidden_size, member[1].device)
        by_size.setdefault(key, []).append(member)
    run = Spectrum()
    for number, members in enumerate(by_size.values()):
        stacked = _stacked(members)
        launched = spectral.launch(stacked)
        blocks = dict(launched.blocks)
        if gram:
            blocks |= singular.launch_gram(stacked)
        run.numbers |= {f"{number}.{name}": t for name, t in blocks.items()}
        run.groups.append(Group([stream for stream, *_ in members], launched))
    return run


def add_update(run: Spectrum, after: Callable[[Stream], Recurrent | None]) -> None:
    """Launch what the drift needs, once the optimizer has changed the weights.

    Args:
        run: The run of this step.
        after: Returns a stream's weights after the update, or None where they are
            parametrised, or not the parameters that the forward used.
    """
    for number, group in enumerate(run.groups):
        members = []
        for stream in group.streams:
            member, place = after(stream), group.gates(stream)
            if member is None or not _alike(member, group.launched.matrix, len(place)):
                continue
            members.append(member)
            group.updated.append(stream)
        if members:
            rows = [i for stream in group.updated for i in group.gates(stream)]
            run.numbers[f"{number}.moved"] = drift.launch_change(
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


def too_large(sizes: Sequence[tuple[int, int]], device: torch.device) -> bool:
    """Tell whether a spectrum run would surely take over a second.

    Args:
        sizes: ``(H, gates)`` of each stream.
        device: Where the weights are.
    """
    products = 2 * (spectral.SQUARINGS + 1)
    work = sum(products * gates * hidden**3 for hidden, gates in sizes)
    return work > (1e11 if device.type == "cpu" else 2e13)
