"""The recurrent weights of a model or checkpoint: a table and a verdict.

Nothing is trained and no input is needed. What it can tell is what the weights alone
decide: whether a small signal grows or dies out from rest, over as many steps as the
sequence is long. A net with inputs has other slopes; the watch measures those.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from gradwatch import console, remedies
from gradwatch.checkpoint import (
    Weights,
    read_weights,
    streams_of,
    tensors_of,
    unreadable,
)
from gradwatch.kinds.exploding import EXPLODING
from gradwatch.kinds.vanishing import VANISHING
from gradwatch.numerics.singular import launch_gram
from gradwatch.numerics.spectral import spectral_radius
from gradwatch.record import Remedy, Stream, printable
from gradwatch.recurrent import KEEPS, gate_matrices, recurrences, stored_weights

_STREAMS: Final = 256
_LONGEST: Final = 10**9
_WORK: Final = 2e11
"""Multiplications, up to a factor, that are spent on one file; some minutes."""
_LARGEST_LOG: Final = 709.0
"""exp() of more overflows."""
_GROWS: Final = 1e3
_FADES: Final = 1e-3
"""Gain over the sequence from which on it counts as growing, or dying out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """The recurrent matrix of one gate.

    Attributes:
        gate: PyTorch's letter; the empty string for a vanilla net.
        rho: Spectral radius; NaN where the weights are not finite.
        certified: Whether ``rho`` is within 1e-3 for sure.
        sigma_max: Largest singular value.
        orthogonality: ``||W'W - I||_F / sqrt(H)``; 0 for an orthogonal matrix.
    """

    gate: str
    rho: float
    certified: bool
    sigma_max: float
    orthogonality: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspected:
    """One stream, from its weights alone.

    Attributes:
        stream: Its name.
        kind: ``LSTM``, ``GRU``, ``RNN_TANH`` or ``RNN_RELU``; ``RNN`` from a
            checkpoint, which does not tell the nonlinearity.
        hidden_size: Units of the state.
        gates: Its gates, in PyTorch's order.
        forget_bias: Mean of both biases' sum of the gate that keeps: f, or a GRU's z.
            None for a vanilla net.
        timescale: Median over the units of ``1 + exp(bias)``: the steps that a unit
            keeps its state for, by the biases alone. None for a vanilla net.
        rate: By what factor a signal that is small enough changes at each step. rho of
            W_hh for a vanilla net; for a gated one, of the Jacobian of state to state
            where input and state are 0.
        gain: ``rate`` to the power of the number of steps.
        verdict: ``ok``, ``fades``, ``grows`` or ``broken``.
        remedy: What helps, or None.
    """

    stream: str
    kind: str
    hidden_size: int
    gates: tuple[Gate, ...]
    forget_bias: float | None
    timescale: float | None
    rate: float
    gain: float
    verdict: str
    remedy: Remedy | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What :func:`inspect` found; printed, it is a table with a verdict.

    Attributes:
        steps: The number of steps that gains are over.
        streams: Every stream that could be read.
        left_out: Name -> why it could not.
    """

    steps: int
    streams: tuple[Inspected, ...]
    left_out: Mapping[str, str]

    @property
    def ok(self) -> bool:
        """Whether every stream could be read and none needs a look."""
        return not self.left_out and all(s.verdict == "ok" for s in self.streams)

    @property
    def verdict(self) -> str:
        """The verdict in one line."""
        count = {v: 0 for v in ("broken", "grows", "fades")}
        for stream in self.streams:
            if stream.verdict in count:
                count[stream.verdict] += 1
        found = [f"{n} {_WORDS[v]}" for v, n in count.items() if n]
        if self.left_out:
            found.append(f"{len(self.left_out)} could not be read")
        whole = f"{len(self.streams)} stream{'s' * (len(self.streams) != 1)}"
        if not found:
            return f"{whole} over {self.steps:,} steps: nothing to do."
        return f"{whole} over {self.steps:,} steps: {', '.join(found)}."

    def __repr__(self) -> str:
        """Return the table and the verdict."""
        sick = [stream for stream in self.streams if stream.verdict != "ok"]
        lines = [*_table(self.streams), self.verdict]
        lines += [f"  {printable(s.stream)} {_what(s, self.steps)}" for s in sick]
        lines += [f"  {printable(line)}" for line in _lines(sick)]
        lines += [
            f"  {printable(name)}: {printable(why)}"
            for name, why in self.left_out.items()
        ]
        return "\n".join(lines)


_WORDS: Final = {
    "broken": "with NaN or Inf",
    "grows": "where a signal grows",
    "fades": "where a signal dies out",
}


def inspect(
    model: nn.Module | Mapping[str, Any] | str | os.PathLike[str], steps: int = 100
) -> Inspection:
    """Look at the recurrent weights of a model or checkpoint, before any training.

    Args:
        model: A module, a state dict, or the path of a checkpoint, which is read
            without running anything in it. Of a state dict PyTorch's names and shapes
            tell the kind of net; prefixes do not matter.
        steps: Length of the sequences; gains are over as many steps.

    Returns:
        The table, with a verdict and the remedy for each stream.

    Raises:
        TypeError: If ``model`` is none of these.
        ValueError: If it has no recurrent weights, or ``steps`` is below 1.
        CheckpointError: If a file cannot be read; a ValueError.

    Example:
        >>> rnn = nn.RNN(2, 4)
        >>> _ = nn.init.eye_(rnn.weight_hh_l0.data).mul_(0.9)
        >>> [stream] = inspect(rnn, steps=100).streams
        >>> f"{stream.gain:.2g}", stream.verdict, stream.remedy.name
        ('2.7e-05', 'fades', 'init.orthogonal_')
    """
    if not isinstance(steps, int) or not 1 <= steps <= _LONGEST:
        raise ValueError(f"steps is {steps}; expected 1 to {_LONGEST:,}.")
    left_out: dict[str, str] = {}
    if isinstance(model, nn.Module):
        found = [(r.stream, stored_weights(r)) for r in recurrences(model)]
        found = [(s, w) for s, w in found if "weight_hh" in w]
    elif isinstance(model, str | os.PathLike):
        found = streams_of(read_weights(model), left_out)
    elif isinstance(model, Mapping):
        found = streams_of(tensors_of(model), left_out)
    else:
        raise TypeError(
            f"got {type(model).__name__}; expected a module, a state dict or the path "
            "of a checkpoint."
        )
    if not found and not left_out:
        raise ValueError(
            "no recurrent weights found: no name ends in weight_hh, weight_hh_l0 and "
            "the like, as those of nn.RNN, nn.LSTM, nn.GRU and their cells do."
        )
    trusted = not isinstance(model, str | os.PathLike)
    streams = _all_inspected(found, int(steps), trusted, left_out)
    return Inspection(steps=int(steps), streams=streams, left_out=left_out)


def _all_inspected(
    found: Sequence[tuple[Stream, Weights]],
    steps: int,
    trusted: bool,
    left_out: dict[str, str],
) -> tuple[Inspected, ...]:
    """Inspect all that can be; a file that is not trusted gets so much work, no more.

    Weights that several names share are looked at once.
    """
    streams: list[Inspected] = []
    known: dict[Any, Inspected] = {}
    work = 0.0
    for number, (stream, weights) in enumerate(found):
        why = unreadable(stream, weights)
        same: Any = stream.kind if why is None else None
        if same is not None:
            held = ((n, w.data_ptr(), w.shape, w.stride()) for n, w in weights.items())
            same = (same, *held)
        if why is None and same not in known:
            work += stream.hidden_size**3 * (len(stream.gates) or 1)
            if not trusted and (work > _WORK or number >= _STREAMS):
                why = "too much work for one file; inspect its state dict in Python"
        if why is not None:
            left_out[stream.name] = why
            continue
        if same not in known:
            known[same] = _inspected(stream, weights, steps)
        of = known[same]
        remedy = _remedy(stream, of.verdict, steps)
        streams.append(dataclasses.replace(of, stream=stream.name, remedy=remedy))
    return tuple(streams)


# ---- what the weights tell


def _inspected(stream: Stream, weights: Weights, steps: int) -> Inspected:
    plain = {k: v.detach().cpu() for k, v in weights.items()}
    plain = {k: v if v.dtype == torch.float64 else v.float() for k, v in plain.items()}
    gates = gate_matrices(stream, plain["weight_hh"], plain.get("weight_hr"))
    radii, more = spectral_radius(gates), launch_gram(gates)
    finite = all(bool(torch.isfinite(t).all()) for t in (gates, *plain.values()))
    keeps, bias = KEEPS.get(stream.kind), None
    rate = radii[0].rho
    if keeps is not None:
        ih, hh = _biases(stream, plain)
        bias = (ih + hh)[stream.gates.index(keeps)]
        if finite:
            rate = spectral_radius(_at_rest(stream, gates, ih, hh))[0].rho
    finite = finite and math.isfinite(rate)
    gain = _power(rate, steps) if finite else math.nan
    verdict = "ok" if _FADES <= gain <= _GROWS else "grows" if gain > 1 else "fades"
    verdict = verdict if finite else "broken"
    return Inspected(
        stream=stream.name,
        kind=stream.kind,
        hidden_size=stream.hidden_size,
        gates=tuple(
            Gate(
                gate=gate,
                rho=radius.rho,
                certified=radius.certified,
                sigma_max=sigma,
                orthogonality=off,
            )
            for gate, radius, sigma, off in zip(
                stream.gates or ("",),
                radii,
                more["sigma"].tolist(),
                more["orthogonality"].tolist(),
                strict=True,
            )
        ),
        forget_bias=None if bias is None else bias.mean().item(),
        timescale=None if bias is None else 1 + bias.exp().median().item(),
        rate=rate,
        gain=gain,
        verdict=verdict,
        remedy=_remedy(stream, verdict, steps),
    )


def _biases(stream: Stream, weights: Weights) -> tuple[Tensor, Tensor]:
    """Return ``bias_ih`` and ``bias_hh`` gate by gate, shape ``(G, H)``; 0 if none."""
    shape = (len(stream.gates), stream.hidden_size)
    none = torch.zeros(shape, dtype=torch.float64)
    ih, hh = (weights.get(name, none) for name in ("bias_ih", "bias_hh"))
    return ih.double().reshape(shape), hh.double().reshape(shape)


def _at_rest(stream: Stream, gates: Tensor, ih: Tensor, hh: Tensor) -> Tensor:
    """Return the Jacobian of state to state where input and state are 0.

    Args:
        stream: An LSTM or GRU.
        gates: Its recurrent matrices, shape ``(G, H, H)``.
        ih: Its input biases, shape ``(G, H)``.
        hh: Its recurrent biases, shape ``(G, H)``.

    Returns:
        Shape ``(H, H)`` for a GRU; ``(2H, 2H)``, h then c, for an LSTM.
    """
    w, both = gates.double(), ih + hh

    def rows(slope: Tensor, matrix: Tensor) -> Tensor:
        return slope[:, None] * matrix

    if stream.kind == "GRU":
        r, z = both[0].sigmoid(), both[1].sigmoid()
        n = (ih[2] + r * hh[2]).tanh()
        inner = rows(r, w[2]) + rows(hh[2] * r * (1 - r), w[0])
        by_n, by_z = (1 - z) * (1 - n * n), -n * z * (1 - z)
        return torch.diag(z) + rows(by_n, inner) + rows(by_z, w[1])
    i, f, o = (both[k].sigmoid() for k in (0, 1, 3))
    g = both[2].tanh()
    shown = (i * g).tanh()
    slope, kept = o * (1 - shown * shown), torch.diag(f)
    cell = rows(g * i * (1 - i), w[0]) + rows(i * (1 - g * g), w[2])
    state = rows(slope, cell) + rows(shown * o * (1 - o), w[3])
    return torch.cat(
        [torch.cat([state, rows(slope, kept)], 1), torch.cat([cell, kept], 1)]
    )


def _power(rate: float, steps: int) -> float:
    log = steps * math.log(rate) if rate > 0 else -math.inf
    return math.exp(log) if log < _LARGEST_LOG else math.inf


def _remedy(stream: Stream, verdict: str, steps: int) -> Remedy | None:
    if verdict == "grows":
        cause = "large_recurrent_weights" if stream.gates else "large_radius"
        return EXPLODING.remedy(cause, stream)
    if verdict == "fades":
        cause = "forget_gate" if stream.gates else "small_radius"
        return VANISHING.remedy(cause, stream, steps)
    return None


def _what(found: Inspected, steps: int) -> str:
    """Return what there is to report of a stream."""
    if found.verdict == "broken":
        return "holds NaN or Inf; go back to a checkpoint before that"
    what = "grows" if found.verdict == "grows" else "dies out"
    shown = f"{what}: {found.rate:.3g} a step is {found.gain:.2g} over {steps:,} steps"
    if found.timescale is not None and found.verdict == "fades":
        shown += f"; a unit keeps its state for {found.timescale:.2g} steps"
    return shown


def _lines(sick: Sequence[Inspected]) -> Iterator[str]:
    """Yield a line to paste for each remedy, over all streams that it is for.

    Yields:
        Lines of Python.
    """
    alike: dict[str, Remedy] = {}
    for one in sick:
        if one.remedy is not None:
            whole = Remedy(
                name=one.remedy.name, args={**one.remedy.args, "streams": []}
            )
            known = alike.setdefault(remedies.line(whole), whole)
            known.args["streams"].append(one.stream)
    for whole in alike.values():
        yield remedies.line(whole).replace(", optimizer=optimizer", "")


_HEAD: Final = (
    "stream", "kind", "H", "gate", "rho", "sigma", "off orth.", "bias", "keeps", "gain"
)  # fmt: skip


def _table(streams: Sequence[Inspected]) -> list[str]:
    rows = [row for stream in streams for row in _rows(stream)]
    if not rows:
        return []
    whole = [_HEAD, *rows]
    widths = [max(len(row[i]) for row in whole) for i in range(len(_HEAD))]
    return [
        "  ".join(
            cell.ljust(w) if i in (0, 1, 3) else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in whole
    ]


def _rows(found: Inspected) -> Iterator[tuple[str, ...]]:
    number = console.number
    keeps = KEEPS.get(found.kind, "")
    for place, gate in enumerate(found.gates):
        first = place == 0
        own = gate.gate == keeps
        yield (
            printable(found.stream) if first else "",
            found.kind.lower() if first else "",
            str(found.hidden_size) if first else "",
            gate.gate,
            number(gate.rho) + "?" * (not gate.certified),
            number(gate.sigma_max),
            number(gate.orthogonality),
            number(found.forget_bias) if own and keeps else "",
            number(found.timescale) if own and keeps else "",
            number(found.gain) if first else "",
        )
