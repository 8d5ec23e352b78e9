"""The flow: how far back in time gradients reach, and how they grow on the way.

Axes: T time, K sequences looked at, V vectors. A profile is aligned at the end of each
sequence, in the stream's own direction of time.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradwatch.depths.drain import Host, Numbers
from gradwatch.depths.trajectory import Trajectory
from gradwatch.hooks.chain import VECTORS, Chain
from gradwatch.metrics import stream_key
from gradwatch.numerics.adjoint import (
    Adjoint,
    Linear,
    adjoint,
    adjoint_from,
    linearised,
    pulled_back,
)
from gradwatch.numerics.krylov import ritz_radius
from gradwatch.numerics.streaming import median
from gradwatch.numerics.through_time import turned
from gradwatch.record import Stream
from gradwatch.recurrent import Recurrence

READ: Final = 1e-3
"""Share of its largest value from which on a gradient counts."""
MIXED: Final = 1e-3
"""Share of a vector of one sequence that reaches others, from which on they mix."""
SEEDS: Final = 16
"""Time steps, at most, from which a gradient is sent back alone."""
BURN_IN: Final = 10
"""Steps back that a Lyapunov exponent leaves out, where there are twice as many."""
NAMES: Final = (
    "adjoint_log10",
    "demand",
    "signal",
    "horizon",
    "flow_gain",
    "flow_log10",
    "growth_log10",
    "lyapunov",
)


@dataclass(slots=True)
class Flow:
    """A run of the flow depth whose numbers may still be on the device.

    Attributes:
        streams: The streams. Of each, ``(name, "values")`` holds the values of
            :data:`NAMES`, and ``(name, "adjoint")``, ``"adjoint_cell"`` and
            ``"direct"`` the profiles; where ``seeded``, ``(name, "adjoint_from")``
            a profile of each of :func:`seed_steps`.
        seeded: Whether gradients are sent back from single steps, too.
        shares: Of each stream, how many sequences were replayed, of how many.
        carried: Paths of modules whose first states an earlier call may have returned;
            the norm of these is ``(path, "carried")``.
        numbers: The numbers.
    """

    seeded: bool = False
    streams: list[Stream] = field(default_factory=list)
    shares: list[tuple[int, int]] = field(default_factory=list)
    carried: list[str] = field(default_factory=list)
    numbers: Numbers = field(default_factory=dict)

    def add(
        self, path: str, members: Sequence[Recurrence], replayed: Trajectory
    ) -> None:
        """Measure the gradient's way back through one module's trajectory."""
        first = replayed.calls[0]
        if first.carried and first.h0 is not None:
            self.numbers[path, "carried"] = torch.linalg.vector_norm(first.h0)
            self.carried.append(path)
        found = backward(members, replayed)
        for member, (layer, back) in zip(members, found, strict=True):
            self.numbers |= {
                (member.stream.name, name): value
                for name, value in _measured(layer, back, replayed.lengths).items()
            }
            if self.seeded:
                each = _from_seeds(layer, back, replayed.lengths)
                self.numbers[member.stream.name, "adjoint_from"] = each
            self.streams.append(member.stream)
            self.shares.append((first.x.shape[1], first.batch))

    def add_stepped(self, stream: Stream, chain: Chain) -> None:
        """Take what the backward pass has shown of a cell of the user's own."""
        if (found := _of_chain(chain)) is None:
            return
        self.numbers |= {(stream.name, name): value for name, value in found.items()}
        if chain.mixed is not None:
            self.numbers[stream.module, "mixed"] = chain.mixed
        self.streams.append(stream)
        self.shares.append((1, 1))  # all sequences were looked at


class _Seen(NamedTuple):
    """What the tensor hooks saw of one layer and direction.

    Attributes:
        h: Direct gradients of its states beside those of its output, ``(T, K, P)``.
        c: The same of its cell states, or None.
        totals: As :func:`gradwatch.numerics.adjoint.adjoint` takes them.
    """

    h: Tensor | None
    c: Tensor | None
    totals: list[tuple[int, Tensor | None, Tensor | None]]


def backward(
    members: Sequence[Recurrence], replayed: Trajectory
) -> list[tuple[Linear, Adjoint]]:
    """Run backpropagation through time over a replayed module, from the top down.

    Args:
        members: The module's recurrences, layer by layer, forward before reverse.
        replayed: Its replay, with the gradients that the tensor hooks saw.

    Returns:
        For each recurrence its linearisation and its adjoint.
    """
    each = len(replayed.layers[0])
    cell = not members[0].suffix
    found: dict[int, tuple[Linear, Adjoint]] = {}
    above = None if cell else _output_gradient(replayed)
    for number in range(len(replayed.layers) - 1, -1, -1):
        below = None
        parts = [None] * each if above is None else above.chunk(each, -1)
        for way, part in enumerate(parts):
            place = number * each + way
            layer = replayed.layers[number][way]
            linear = linearised(
                replayed.kind,
                layer,
                replayed.states[place],
                replayed.weights[number][way],
            )
            seen = _seen(replayed, place, linear, cell)
            direct = torch.zeros_like(layer.h)
            if part is not None:
                direct = turned(part, replayed.lengths) if way else part
            if seen.h is not None:
                direct = direct + seen.h
            back = adjoint(linear, direct, seen.c, seen.totals, to_input=number > 0)
            found[place] = linear, back
            if back.x is not None:
                x = turned(back.x, replayed.lengths) if way else back.x
                below = x if below is None else below + x
        above = below
        if above is not None and number and replayed.masks:
            above = above * replayed.masks[number - 1]
    return [found[place] for place in range(len(members))]


def _output_gradient(replayed: Trajectory) -> Tensor:
    like = replayed.layers[0][0].h
    parts = []
    for call in replayed.calls:
        grad = call.grads.get("y")
        parts.append(torch.zeros_like(call.y) if grad is None else grad)
    return torch.cat(parts).to(like.dtype)


def _seen(replayed: Trajectory, place: int, linear: Linear, cell: bool) -> _Seen:
    """Return what was seen of the states of one layer and direction.

    Between two calls of a chain autograd has seen the whole gradient of the state that
    was passed on; at the end of the last one, only what the loss itself read of it.
    """
    dtype = linear.slope.dtype
    totals: list[tuple[int, Tensor | None, Tensor | None]] = []
    end = -1
    for call in replayed.calls:
        end += len(call.x)
        h, c = (call.grads.get(name) for name in "hc")
        h = None if h is None else h[place].to(dtype)
        c = None if c is None else c[place].to(dtype)
        totals.append((end, h, c))
    steps, h, c = totals.pop()
    if cell:  # h is output and state in one: autograd saw its whole gradient
        totals = [(t, h_t, None) for t, h_t, _ in totals]
        composite = replayed.calls[-1].composite
        if composite and linear.cell is not None and c is not None and h is not None:
            c = c - h * linear.cell[steps]
    return _Seen(
        _at_end(h, steps, replayed.lengths), _at_end(c, steps, replayed.lengths), totals
    )


def _at_end(grad: Tensor | None, last: int, lengths: Tensor | None) -> Tensor | None:
    """Put a gradient at the last step of each sequence, 0 elsewhere."""
    if grad is None:
        return None
    steps = torch.arange(last + 1, device=grad.device)[:, None, None]
    ends = torch.full_like(grad[:, :1], last, dtype=torch.int64)
    if lengths is not None:
        ends = lengths[:, None] - 1
    return torch.where(steps == ends, grad, 0)


def _measured(
    layer: Linear, back: Adjoint, lengths: Tensor | None
) -> dict[str, Tensor]:
    """Return the values of NAMES, by ``values``, and the profiles."""
    ends = _ends(back, lengths)
    total_h, total = _sizes(back.h, back.c)
    direct_h, direct = _sizes(back.direct_h, back.direct_c)
    share, last = _read(direct, ends)
    logs = _reaches(layer, back, ends, last)
    aligned = _aligned(total, ends).sum(1).sqrt()
    reach = (total[0].sum().sqrt() / aligned.amax()).log10()
    horizon, gains = _horizon(logs[:, VECTORS], last), _gains(logs[:, :VECTORS], ends)
    found = {"values": _values(reach, share, direct, horizon, gains)}
    found["adjoint"] = _aligned(total_h, ends).sum(1).sqrt()
    if back.c is not None:
        cells = back.c.square().sum(-1)
        found["adjoint_cell"] = _aligned(cells, ends).sum(1).sqrt()
    found["direct"] = _aligned(direct_h, ends).sum(1).sqrt()
    return found


def _of_chain(chain: Chain) -> dict[str, Tensor] | None:
    """Return the same of the calls of a cell of the user's own; None for nothing.

    Nothing is known of the state before the first one: the way back ends there.
    """
    logs, reach = chain.logs, chain.reach
    if logs is None or reach is None or chain.radii is None:
        return None
    nothing = logs.new_zeros(logs.shape[2])
    total = torch.stack([nothing if t is None else t for t in chain.totals])
    direct = torch.stack([nothing if t is None else t for t in chain.direct])
    steps = torch.full_like(nothing, len(total), dtype=torch.int64)
    share, last = _read(direct, steps)
    last = last.where(last == chain.last, -1)  # others were not followed
    along = total.sum(1).sqrt()
    shown = (along[0] / along.amax()).log10()
    horizon, gains = _horizon(reach[:, 0], last), _gains(logs, steps - 1)
    return {
        "values": _values(shown, share, direct, horizon, gains),
        "adjoint": along,
        "direct": direct.sum(1).sqrt(),
        "radii": chain.radii,
    }


def _read(direct: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Return the share of steps that are read directly, and the last one of each.

    Args:
        direct: Squared norms of what the loss puts in, shape ``(T, K)``.
        ends: How many steps each sequence has, shape ``(K,)``.
    """
    read = (direct > READ**2 * direct.amax(0)) & (direct > 0)
    counted = read.sum(0).to(direct.dtype)
    share = (counted / ends).where(counted > 0, math.nan)
    steps = torch.arange(1, len(direct) + 1, device=direct.device)[:, None]
    return _middle(share), (read * steps).amax(0) - 1


def _values(
    reach: Tensor,
    share: Tensor,
    direct: Tensor,
    horizon: Tensor,
    gains: Sequence[Tensor],
) -> Tensor:
    """Return the values of NAMES; the signal is what the loss puts into a sequence."""
    values = [reach, share, direct.sum(0).sqrt().mean(), horizon, *gains]
    return torch.stack([value.to(reach) for value in values])


def _ends(back: Adjoint, lengths: Tensor | None) -> Tensor:
    """Return how many steps each sequence has, shape ``(K,)``."""
    steps, count = back.h.shape[:2]
    if lengths is not None:
        return lengths
    return torch.full((count,), steps, device=back.h.device)


def _sizes(h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the squared norms of h, and of h and c together, shape ``(T, K)``."""
    own = h.square().sum(-1)
    return own, own if c is None else own + c.square().sum(-1)


def _aligned(values: Tensor, ends: Tensor) -> Tensor:
    """Shift each sequence so that it ends at the last step; 0 before its first.

    Args:
        values: Shape ``(..., T, K)``.
        ends: How many steps each sequence has, shape ``(K,)``.
    """
    steps = values.shape[-2]
    source = torch.arange(steps, device=values.device)[:, None] - (steps - ends)
    taken = values.gather(-2, source.clamp_min(0).expand_as(values))
    return taken.where(source >= 0, 0)


def _reaches(layer: Linear, back: Adjoint, ends: Tensor, last: Tensor) -> Tensor:
    """Pull random vectors back from the ends, and what the last step read gets.

    Returns:
        ln of their norms by lag, shape ``(T + 1, VECTORS + 1, K)``; the last is of what
        the last step that is read gets directly.
    """
    count, width = back.h.shape[1:]
    cells = 0 if layer.cell is None else layer.cell.shape[-1]
    fixed = torch.Generator().manual_seed(0)  # never the user's
    drawn = torch.randn(VECTORS, count, width + cells, generator=fixed)
    drawn = drawn.to(back.h.device, back.h.dtype, non_blocking=True)
    at = last.clamp_min(0)[None, :, None]
    h = back.direct_h.gather(0, at.expand(1, -1, width))
    c = None
    if back.direct_c is not None:
        own = back.direct_c.gather(0, at.expand(1, -1, cells))
        c = torch.cat((drawn[..., width:], own))
    starts = torch.cat(((ends - 1).expand(VECTORS, -1), last[None]))
    return pulled_back(layer, (torch.cat((drawn[..., :width], h)), c), starts)


def seed_steps(steps: int) -> list[int]:
    """Return the steps that gradients are sent back from: 16, evenly, the last too."""
    count = min(SEEDS, steps)
    return [(i + 1) * steps // count - 1 for i in range(count)]


def _from_seeds(layer: Linear, back: Adjoint, lengths: Tensor | None) -> Tensor:
    """Send a random unit gradient of h back from each of some steps, one at a time.

    Returns:
        The norm of what arrives, root mean square over the sequences that have the
        seed's step, shape ``(V, T)``.
    """
    steps, count, width = back.h.shape
    ends = _ends(back, lengths)
    fixed = torch.Generator().manual_seed(0)  # never the user's
    drawn = torch.nn.functional.normalize(
        torch.randn(count, width, generator=fixed), dim=-1
    ).to(back.h.device, back.h.dtype, non_blocking=True)
    at = seed_steps(steps)
    starts = torch.stack([ends - (steps - step) for step in at])
    norms = adjoint_from(layer, drawn.expand(len(at), -1, -1), starts)
    squares = _aligned(norms.square().transpose(0, 1), ends).sum(2)
    return (squares / (starts >= 0).sum(1, keepdim=True)).sqrt()


def _horizon(logs: Tensor, last: Tensor) -> Tensor:
    """Return how many steps back the last step that is read still reaches."""
    lags = torch.arange(len(logs), device=logs.device)[:, None]
    largest = logs.nan_to_num(-math.inf, math.inf, -math.inf).amax(0)
    reaching = logs >= largest + math.log(READ)
    furthest = (reaching * lags).amax(0).to(logs.dtype)
    return _middle(furthest.where(last >= 0, math.nan))


def _gains(logs: Tensor, ends: Tensor) -> list[Tensor]:
    """Return flow_gain, flow_log10, growth_log10 and lyapunov."""
    whole = logs.gather(0, ends.expand(1, VECTORS, -1))[0]
    gain = _middle(whole / ends).exp()
    decades = _middle(whole) / math.log(10)
    known = logs.where(logs == logs, -math.inf)
    mean_square = torch.logsumexp(2 * known, 1) - math.log(VECTORS)
    growth = mean_square.amax() / 2 / math.log(10)
    skipped = (ends > 2 * BURN_IN) * BURN_IN
    start = logs.gather(0, skipped.expand(1, VECTORS, -1))[0]
    rate = (whole - start) / (ends - skipped)
    return [gain, decades, growth, _middle(rate)]


def _middle(values: Tensor) -> Tensor:
    """Return the median of all values that are not NaN; NaN where there are none."""
    flat = values.flatten()
    low, high = flat.nanmedian(), -(-flat).nanmedian()
    return torch.where(low == high, low, (low + high) / 2)


# ---- on the host

_POINTS: Final = 128
_PROBES: Final = 5
"""How many probes the progress of a signal is taken over, at the start and now."""

Signal = Mapping[str, Sequence[float]]
"""``first`` and ``last``: what the loss put into a stream; plain values."""


@dataclass(slots=True, kw_only=True)
class Memory:
    """What is remembered of the flow between steps; plain values.

    Attributes:
        signals: What the loss put into every stream, at the start and lately.
    """

    signals: dict[str, Signal] = field(default_factory=dict)


class Flows(NamedTuple):
    """What a run of the flow depth came to.

    Attributes:
        metrics: By key.
        profiles: By key.
        carried: Modules that go on from the detached states of an earlier call.
        mixing: Cells of the user's own -> whether their sequences mix.
    """

    metrics: dict[str, float]
    profiles: dict[str, list[float]]
    carried: set[str]
    mixing: dict[str, bool]


def finish(
    run: Flow, host: Host, scale: float, left_out: Container[str], memory: Memory
) -> Flows:
    """Return what a run came to.

    Args:
        run: What was launched.
        host: Its numbers.
        scale: By how much a loss scaler has multiplied the gradients.
        left_out: Modules whose replay is not believed.
        memory: Updated in place.
    """
    metrics: dict[str, float] = {}
    profiles: dict[str, list[float]] = {}
    for stream, (few, batch) in zip(run.streams, run.shares, strict=True):
        if stream.module in left_out:
            continue
        read = host[stream.name, "values"].tolist()
        values = dict(zip(NAMES, read, strict=True))
        raw = values.pop("signal") / scale
        for name, value in values.items():
            if not math.isnan(value):
                metrics[stream_key(stream, name)] = value
        if (signal := _progress(memory, stream, raw)) is not None:
            metrics[stream_key(stream, "signal")] = signal
        factor = math.sqrt(batch / few) / scale
        for profile in ("adjoint", "adjoint_cell", "direct"):
            block = host.get((stream.name, profile))
            if block is not None:
                key = stream_key(stream, profile)
                profiles[key] = _cut(np.asarray(block, np.float64) * factor)
        if (radii := host.get((stream.name, "radii"))) is not None:
            rho = ritz_radius(np.asarray(radii, np.float64))
            if rho is not None:
                metrics[stream_key(stream, "rho_step")] = rho
        if (each := host.get((stream.name, "adjoint_from"))) is not None:
            key, steps = stream_key(stream, "adjoint_from"), seed_steps(each.shape[1])
            rows = _cut(np.asarray(each, np.float64), _POINTS // 2)
            for step, row in zip(steps, rows, strict=True):
                profiles[f"{key}/{step}"] = row
    carried = {path for path in run.carried if float(host[path, "carried"]) > 0}
    mixing = {
        s.module: float(host[s.module, "mixed"]) > MIXED
        for s in run.streams
        if (s.module, "mixed") in host
    }
    carried &= {s.module for s in run.streams}
    return Flows(metrics, profiles, carried, mixing)


def _progress(memory: Memory, stream: Stream, value: float) -> float | None:
    """Return what the loss puts in now, over what it put in at first."""
    if not math.isfinite(value):
        return None
    known = memory.signals.get(stream.name, {"first": [], "last": []})
    first, last = known["first"], [*known["last"], value][-_PROBES:]
    first = [*first, value] if len(first) < _PROBES else first
    memory.signals[stream.name] = {"first": first, "last": last}
    start = median(tuple(first))
    return median(tuple(last)) / start if start > 0 else None


def _cut(profile: np.ndarray, points: int = _POINTS) -> list[Any]:
    """Return at most so many values along the last axis: the largest of each bin."""
    length = profile.shape[-1]
    if length > points:
        edges = np.linspace(0, length, points, endpoint=False).astype(int)
        profile = np.maximum.reduceat(profile, edges, axis=-1)
    found: list[Any] = profile.tolist()
    return found
