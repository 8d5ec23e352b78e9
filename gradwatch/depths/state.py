"""States: gates, slopes and saturation of a replayed forward, and its self-check."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from gradwatch.depths.drain import Host, Numbers
from gradwatch.depths.trajectory import Trajectory
from gradwatch.facts import ModuleFacts
from gradwatch.hooks.chain import Chain
from gradwatch.metrics import run_key, stream_key
from gradwatch.numerics.activation import (
    Statistics,
    mean_field_gain,
    statistics,
    statistics_of_gates,
    statistics_of_states,
)
from gradwatch.numerics.norms import norms
from gradwatch.record import Stream
from gradwatch.recurrent import Recurrence, plain_weight

_DRIVEN = 8
"""Steps at which it is measured what drives the units."""


@dataclass(slots=True)
class State:
    """A run of the state depth whose numbers may still be on the device.

    Attributes:
        streams: Each stream with the names of its numbers, which are ``(name of the
            stream, "statistics")``; what drives its units is ``(name, "drive")``.
        modules: Path of each replayed module with the tolerance of its replay. Its
            mismatch is ``(path, "mismatch")``, absent where the numbers are
            approximate; ``(path, "input")`` are the numbers of :data:`INPUT`, and
            ``(path, "reached")`` is the share of sequences that a gradient reaches,
            and of time steps, and ``(path, "rough")`` what its input is like along
            time and the batch.
        gates: Gated streams whose W_hh has a gradient of its own; the norms of their
            gates' gradients, one stream after the other, are ``gates``.
        left_out: Path of a module -> why it could not be replayed.
        numbers: The numbers.
    """

    streams: list[tuple[Stream, tuple[str, ...]]] = field(default_factory=list)
    modules: list[tuple[str, float]] = field(default_factory=list)
    gates: list[Stream] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    numbers: Numbers = field(default_factory=dict)

    def check(self, path: str, replayed: Trajectory | str) -> None:
        """Note how far one module's replay is off; or why there is none."""
        if isinstance(replayed, str):
            self.left_out[path] = replayed
            return
        if replayed.mismatch is not None:
            self.numbers[path, "mismatch"] = replayed.mismatch
        self.modules.append((path, replayed.tolerance))
        told, x = _input_numbers(replayed.x, replayed.lengths), replayed.x
        finite = [r.finite for r in replayed.calls if r.finite is not None]
        told = [*told, torch.stack(finite).all().to(x.device)]
        self.numbers[path, "input"] = torch.stack([one.float() for one in told])
        reached = [share for call in replayed.calls for share in call.reached.values()]
        rough = [r.roughness for r in replayed.calls if r.roughness is not None]
        if rough:
            self.numbers[path, "rough"] = rough[0]
        if reached:
            self.numbers[path, "reached"] = torch.stack(reached).amax(0)

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
            self.numbers[member.stream.name, "statistics"] = values
            if member.stream.kind != "RNN_RELU":
                drive = _drive(replayed, *divmod(number, each))
                self.numbers[member.stream.name, "drive"] = drive
            self.streams.append((member.stream, names))

    def add_stepped(self, stream: Stream, chain: Chain) -> None:
        """Measure the states of a cell of the user's own."""
        if chain.h is None:
            return
        found = statistics_of_states(chain.h) + statistics_of_gates(chain.gates)
        values = [v.to(chain.h) for _, v in found]
        self.numbers[stream.name, "statistics"] = torch.stack(values)
        self.streams.append((stream, tuple(name for (name,), _ in found)))

    def add_gates(self, members: Sequence[Recurrence]) -> None:
        """Measure the gradient norm of each gate's part of W_hh, as it is now."""
        parts: list[Tensor] = []
        gates: list[Stream] = []
        for member in members:
            weight = plain_weight(member)
            grad = None if weight is None else weight.grad
            count = len(member.stream.gates)
            if not count or grad is None or type(grad) is not Tensor or grad.is_sparse:
                continue
            parts += grad.detach().chunk(count)
            gates.append(member.stream)
        self.gates = gates
        if parts:
            self.numbers["gates"] = norms(parts)


INPUT: Final = (
    "padding",
    "blank",
    "repeats",
    "scale",
    "offset",
    "spread",
    "size",
    "mixed",
    "finite",
)
"""What is measured of an input: the share of all-zero steps at the end, and elsewhere,
and of steps like the one before; its root mean square; the largest share of a channel's
that is its mean; the largest channel over the smallest; two sums by which it is known
again; and whether that of the whole batch is finite."""


def _input_numbers(x: Tensor, lengths: Tensor | None) -> list[Tensor]:
    """Return the numbers of :data:`INPUT`, all but the last.

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
    blank = (size == 0).sum(0) - empty  # what lies behind the end is empty too
    same = (x[1:] == x[:-1]).all(-1) & (size[1:] > 0)
    repeats = same.float().sum(0) / (steps - 1 if lengths is None else lengths - 1)
    mixed = x @ torch.arange(x.shape[-1], device=x.device).add(1).cos()
    wave = torch.arange(size.numel(), device=x.device).cos().view_as(size)
    return [
        (padded / steps).mean(),
        (blank / steps).mean(),
        repeats.mean(),
        *_channels(x, (size > 0).sum().clamp_min(1)),
        size.sum(),
        (mixed * wave).sum(),
    ]


def _channels(x: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return scale, offset and spread; see :data:`INPUT`.

    Args:
        x: Shape ``(T, K, F)``.
        count: How many steps are not all zeros: the others are not counted.
    """
    square = x.square().sum((0, 1)) / count
    mean = x.sum((0, 1)) / count
    there = square > 0
    offset = (mean.square() / square).where(there, 0).amax()
    least = square.where(there, math.inf).amin()
    return square.mean().sqrt(), offset, (square.amax() / least).sqrt()


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


# ---- on the host

_TANH_GATE: Final = ("act_deriv", "act_deriv_rms", "saturated")
_LARGEST: Final = ("shut", "open")
_MORE: Final = 2.0
"""Times by which one has to be larger than the other to be what drives a unit."""
_ALIKE: Final = 0.3
"""Roughness up to which neighbours follow on each other."""
_UNLIKE: Final = 0.8
"""Roughness from which on they have nothing to do with each other."""
_LOOKS: Final = 8
"""Looks at the same input that are counted; more of them tell nothing more."""


@dataclass(slots=True, kw_only=True)
class Memory:
    """What is remembered of replays between steps; plain values.

    Attributes:
        left_out: Module -> how many of its replays were dropped.
        looks: Module -> two sums of its last input, and how many looks in a row found
            the same.
    """

    left_out: dict[str, int] = field(default_factory=dict)
    looks: dict[str, tuple[float, ...]] = field(default_factory=dict)


class Replays(NamedTuple):
    """What a run of the state depth came to.

    Attributes:
        metrics: By key.
        left_out: Module -> why its numbers were dropped.
        modules: Facts of each module that was looked at.
        drives: Stream -> what drives its units.
    """

    metrics: dict[str, float]
    left_out: Mapping[str, str]
    modules: Mapping[str, ModuleFacts]
    drives: Mapping[str, str]


def finish(run: State, host: Host, scale: float, memory: Memory) -> Replays:
    """Return what a run came to.

    A replay whose output is not the real one is not believed: its numbers are dropped.

    Args:
        run: What was launched.
        host: Its numbers.
        scale: By how much a loss scaler has multiplied the gradients.
        memory: Updated in place.
    """
    left_out, words = dict(run.left_out), dict[str, str]()
    mismatches = {}
    for path, tolerance in run.modules:
        if (path, "mismatch") not in host:
            words[path] = "approximate: dropout draws another mask"
            continue
        mismatch = mismatches[path] = float(host[path, "mismatch"])
        if not math.isfinite(mismatch):
            left_out[path] = "its states hold NaN or Inf"
        elif mismatch > tolerance:
            left_out[path] = (
                f"the replay differs from its output by {mismatch:.2g} of its norm, "
                f"more than {tolerance:g}"
            )
    words |= {path: f"left out: {why}" for path, why in left_out.items()}
    for path in left_out:
        memory.left_out[path] = memory.left_out.get(path, 0) + 1
    metrics: dict[str, float] = {}
    drives: dict[str, str] = {}
    for stream, names in run.streams:
        if stream.module in mismatches:
            key = stream_key(stream, "replay_mismatch")
            metrics[key] = mismatches[stream.module]
        if stream.module not in left_out:
            read = host[stream.name, "statistics"].tolist()
            metrics |= _of_stream(stream, dict(zip(names, read, strict=True)))
            if (stream.name, "drive") in host:
                drives[stream.name] = _driven_by(float(host[stream.name, "drive"]))
    if "gates" in host:
        metrics |= _gate_gradients(run.gates, host["gates"], scale)
    modules = {path: ModuleFacts(replay=why) for path, why in words.items()}
    for path, _ in run.modules:
        modules[path] = _input_facts(path, host[path, "input"], words, memory)
        if (path, "reached") in host:
            read = [round(share, 2) for share in host[path, "reached"].tolist()]
            modules[path] = dataclasses.replace(
                modules[path], sequences_read=read[0], steps_read=read[1]
            )
        if (path, "rough") in host:
            order = _order(*host[path, "rough"].tolist())
            modules[path] = dataclasses.replace(modules[path], input_order=order)
    return Replays(metrics, left_out, modules, drives)


def _input_facts(
    path: str, read: Any, words: Mapping[str, str], memory: Memory
) -> ModuleFacts:
    """Return the facts of a module whose input was looked at."""
    told = dict(zip(INPUT, read.tolist(), strict=True))
    sums = [told["size"], told["mixed"]]
    *known, times = memory.looks.get(path, (math.nan, math.nan, 0))
    looks = times + 1 if known == sums and sums[0] > 0 else 1
    memory.looks[path] = (*sums, looks)
    facts = ModuleFacts(
        replay=words.get(path),
        same_batch=min(int(looks), _LOOKS),
        input_finite=None if told["finite"] else False,
    )
    if not told["finite"]:
        return facts
    return dataclasses.replace(
        facts,
        padding=round(told["padding"], 1),
        blank=_share(told["blank"]),
        repeats=_share(told["repeats"]),
        input_scale=_nearest(told["scale"], 2),
        input_offset=_share(told["offset"]),
        input_spread=_nearest(told["spread"], 10),
    )


def _order(time: float, batch: float) -> str | None:
    """Return along which axis neighbours are alike, if along one only."""
    if time <= _ALIKE and batch >= _UNLIKE:
        return "time"
    return "batch" if batch <= _ALIKE and time >= _UNLIKE else None


def _share(value: float) -> float | None:
    """Return a share to one digit, as a fact is not to change often."""
    return round(value, 1) if math.isfinite(value) else None


def _nearest(value: float, base: int) -> float | None:
    """Return the nearest power of a base; None where there is none."""
    if not 0 < value < math.inf:
        return None
    return float(base) ** round(math.log(value, base))


def _driven_by(drive: float) -> str:
    """Return what drives the units of a stream: its input, its state, or both."""
    if drive >= _MORE:
        return "input"
    return "state" if drive <= 1 / _MORE else "both"


def _of_stream(stream: Stream, values: Mapping[str, float]) -> dict[str, float]:
    metrics = {run_key(f"{stream.key}/{name}"): v for name, v in values.items()}
    if math.isnan(values["h_growth"]):  # no two states to draw a line through
        del metrics[stream_key(stream, "h_growth")]
    if math.isnan(values.get("saturated", 0.0)):  # states that no tanh has made
        del metrics[stream_key(stream, "saturated")]
    if not stream.gates:
        return metrics
    for name in _TANH_GATE:
        gate = "g" if "g" in stream.gates else "n"
        metrics[stream_key(stream, name)] = values[f"{name}/{gate}"]
    for name in _LARGEST:
        own = [v for key, v in values.items() if key.startswith(f"{name}/")]
        metrics[stream_key(stream, name)] = max(own)
    return metrics


def _gate_gradients(
    streams: Sequence[Stream], norms: Any, scale: float
) -> dict[str, float]:
    each = iter(norms if isinstance(norms, list) else norms.tolist())
    return {
        stream_key(stream, "grad_norm_hh", gate): next(each) / scale
        for stream in streams
        for gate in stream.gates
    }
