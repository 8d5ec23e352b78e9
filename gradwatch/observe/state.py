"""The state depth: from trajectories to numbers that stay on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import linear

from gradwatch.numerics.activation import Statistics, mean_field_gain, statistics
from gradwatch.observe.measure import Numbers, norms
from gradwatch.observe.sequence import Trajectory
from gradwatch.record import Stream
from gradwatch.recurrent import Recurrence, plain_weight

_DRIVEN = 8
"""Steps at which it is measured what drives the units."""


@dataclass(slots=True)
class State:
    """A run of the state depth whose numbers may still be on the device.

    Attributes:
        streams: Each stream with the names of its numbers, which are under
            ``state.<index>``.
        modules: Path of each module with the tolerance of its replay; its mismatch is
            ``state.mismatch.<index>``, absent where the numbers are approximate.
        gates: Gated streams whose W_hh has a gradient of its own; the norms of their
            gates' gradients, one stream after the other, are ``state.gates``.
        left_out: Path of a module -> why it could not be replayed.
        inputs: Path of each module whose input is told: the share of its steps, at the
            end, that are all zeros, two sums by which the same input is known again,
            and whether that of the whole batch is finite, are ``state.input.<index>``.
        numbers: The numbers.
        seconds: What the launch cost on the host's clock.
    """

    streams: list[tuple[Stream, tuple[str, ...]]] = field(default_factory=list)
    modules: list[tuple[str, float]] = field(default_factory=list)
    gates: list[Stream] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    numbers: Numbers = field(default_factory=dict)
    seconds: float = 0.0

    def check(self, path: str, replayed: Trajectory | str) -> None:
        """Take note of how far one module's replay is off; or why there is none."""
        if isinstance(replayed, str):
            self.left_out[path] = replayed
            return
        if replayed.mismatch is not None:
            self.numbers[f"mismatch.{len(self.modules)}"] = replayed.mismatch
        self.modules.append((path, replayed.tolerance))
        told, x = _of_input(replayed.x, replayed.lengths), replayed.x
        finite = [r.finite for r in replayed.calls if r.finite is not None]
        told = [*told, torch.stack(finite).all().to(x.device)]
        self.numbers[f"input.{len(self.inputs)}"] = torch.stack(
            [one.float() for one in told]
        )
        self.inputs.append(path)

    def add(
        self, path: str, members: Sequence[Recurrence], replayed: Trajectory | str
    ) -> None:
        """Measure one module's trajectory, its mismatch included."""
        self.check(path, replayed)
        if isinstance(replayed, str):
            return
        each = len(replayed.layers[0])
        for number, member in enumerate(members):
            found = _of_layer(member.stream, replayed, *divmod(number, each))
            names = tuple(name for parts, _ in found for name in parts)
            values = torch.cat([v.reshape(-1).to(found[0][1].dtype) for _, v in found])
            self.numbers[str(len(self.streams))] = values
            if member.stream.kind != "RNN_RELU":
                drive = _drive(replayed, *divmod(number, each))
                self.numbers[f"drive.{len(self.streams)}"] = drive
            self.streams.append((member.stream, names))


def _of_input(x: Tensor, lengths: Tensor | None) -> list[Tensor]:
    """Return the share of all-zero steps at the end, and two sums of an input.

    Args:
        x: Shape ``(T, K, F)``.
        lengths: Of each sequence; their padding is not counted. None: all have T.
    """
    x = x.float()
    size = torch.linalg.vector_norm(x, dim=-1)
    steps = len(x) if lengths is None else lengths
    last = (size > 0).flip(0).to(torch.int8).argmax(0)  # 0 for nothing but zeros too
    empty = last.where(size.amax(0) > 0, len(x))
    padded = empty if lengths is None else (empty - (len(x) - lengths)).clamp_min(0)
    mixed = x @ torch.arange(x.shape[-1], device=x.device).add(1).cos()
    wave = torch.arange(size.numel(), device=x.device).cos().view_as(size)
    return [(padded / steps).mean(), size.sum(), (mixed * wave).sum()]


def _drive(replayed: Trajectory, layer: int, direction: int) -> Tensor:
    """Return the size of what the input drives the units by, over what the state does.

    Taken at a few steps along the sequence; a tensor of no axis.
    """
    own, weights = replayed.layers[layer][direction], replayed.weights[layer][direction]
    below = replayed.layers[layer - 1] if layer else None
    step = max(len(own.h) // _DRIVEN, 1)
    if below is None:
        x = replayed.x[step::step]
    else:
        x = torch.cat([one.h[step::step] for one in below], -1)
    given = torch.linalg.vector_norm(linear(x, weights.ih))
    state = torch.linalg.vector_norm(linear(own.h[step - 1 :: step], weights.hh))
    drive: Tensor = given / state.clamp_min(1e-30)
    return drive


def _of_layer(
    stream: Stream, replayed: Trajectory, layer: int, direction: int
) -> Statistics:
    found = statistics(stream.kind, replayed.layers[layer][direction], replayed.lengths)
    if not stream.gates:
        rms = dict(_single(found))["act_deriv_rms"]
        weight = replayed.weights[layer][direction].hh
        found.append((("chi",), mean_field_gain(weight, rms)))
    if replayed.largest is not None and layer == len(replayed.layers) - 1:
        # All that the module returned, not only the sequences looked at.
        own = replayed.largest.unflatten(0, (-1, stream.hidden_size))[direction]
        dead = (own <= 0).to(replayed.layers[0][0].h.dtype).mean()
        found = [(n, dead if n == ("dead",) else value) for n, value in found]
    return found


def _single(found: Statistics) -> list[tuple[str, Tensor]]:
    return [(names[0], value) for names, value in found if len(names) == 1]


def gate_gradients(members: Sequence[Recurrence], state: State) -> None:
    """Measure the gradient norm of each gate's part of W_hh, as it is now."""
    parts: list[Tensor] = []
    state.gates = []
    for member in members:
        weight = plain_weight(member)
        grad = None if weight is None else weight.grad
        count = len(member.stream.gates)
        if not count or grad is None or type(grad) is not Tensor or grad.is_sparse:
            continue
        parts += grad.detach().chunk(count)
        state.gates.append(member.stream)
    if parts:
        state.numbers["gates"] = norms(parts)
