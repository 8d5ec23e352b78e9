"""Initialisers for recurrent weights, gate by gate and in place.

PyTorch stacks the gates of an LSTM and a GRU in one matrix; an initialiser that is
given the stack does not give each gate what its name says. These do, for every layer
and direction of nn.RNN, nn.LSTM, nn.GRU and their cells:

    gradwatch.init.orthogonal_(model)
    gradwatch.init.chrono_(model, t_max=100, streams=["encoder.lstm"], optimizer=adam)

Every one works on a recurrent module or on any module that contains some. The
parameters stay the same objects, so that an optimizer, and the flat weights on a GPU,
go on with them. All new values are computed before the first is written, and a failure
puts back what was there.

Axes: H units, P features of a projected state (H without projection).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import torch
from torch import Generator, Tensor, nn

from gradwatch.record import Stream
from gradwatch.recurrent import KEEPS, Recurrence, gate_matrices, named, recurrences
from gradwatch.rewrite import Changed, Optimizers, write

__all__ = [
    "Changed",
    "chrono_",
    "forget_bias_",
    "identity_",
    "orthogonal_",
    "spectral_cap_",
    "zero_bias_",
]

Streams = str | Iterable[str] | None

_SHORTEST_CHRONO: Final = 3.0


def orthogonal_(
    model: nn.Module,
    gain: float = 1.0,
    *,
    zero_bias: bool = True,
    streams: Streams = None,
    optimizer: Optimizers = None,
    generator: Generator | None = None,
) -> list[Changed]:
    r"""Make the recurrent matrix of every gate ``gain`` times a random orthogonal one.

    Each is drawn from the Haar measure: QR of a Gaussian matrix in float64, with the
    signs of R's diagonal carried over to Q. Then every singular value is ``gain``, and
    :math:`\|W_g^\top W_g - I\| \le 10^{-5}` at gain 1. With a projection the blocks
    ``(H, P)`` have orthonormal columns, and W_hr ``(P, H)`` orthonormal rows.

    Args:
        model: A recurrent module, or any module that contains some.
        gain: Every singular value; about 1 for tanh, up to sqrt(2) for ReLU.
        zero_bias: Whether the biases of a vanilla nn.RNN or nn.RNNCell are set to 0
            too. Those of gated nets are left alone.
        streams: Names of streams, or of modules, that are meant; None: all.
        optimizer: One optimizer or several; what they remember of the changed
            parameters, moments and step counts, is deleted. Without it, kept second
            moments hold a re-initialised layer still.
        generator: Source of the random numbers; None: torch's default. The values
            depend on the generator alone, not on the device of the weights.

    Returns:
        What was changed, one entry a stream, with rho before and after.

    Raises:
        TypeError: If ``model`` is no nn.Module.
        ValueError: If it has no recurrent module, ``gain`` is not above 0, a name is
            unknown, a weight cannot be written, or the optimizer holds none of them.

    Example:
        >>> lstm = nn.LSTM(3, 16)
        >>> [changed] = orthogonal_(lstm, generator=torch.Generator().manual_seed(0))
        >>> round(changed.after["f"], 4)
        1.0

    References:
        Mezzadri (2007), Notices of the AMS 54; Saxe et al. (2014), arXiv:1312.6120.
    """
    gain = _above_zero("gain", gain)

    def new(stream: Stream, old: Mapping[str, Tensor]) -> dict[str, Tensor]:
        width = stream.proj_size or stream.hidden_size
        gates = range(max(len(stream.gates), 1))
        blocks = [_haar(stream.hidden_size, width, generator) for _ in gates]
        values = {"weight_hh": gain * torch.cat(blocks)}
        if stream.proj_size:
            values["weight_hr"] = _haar(stream.hidden_size, width, generator).mT
        if zero_bias and not stream.gates:
            values |= _zero_biases(old)
        return values

    return write(_chosen(model, streams), new, optimizer)


def identity_(
    model: nn.Module,
    scale: float = 1.0,
    *,
    input_std: float | None = None,
    streams: Streams = None,
    optimizer: Optimizers = None,
    generator: Generator | None = None,
) -> list[Changed]:
    """Set the recurrent matrix of a vanilla ReLU net to ``scale`` times the identity.

    The biases become 0. With ``input_std=0.001`` and scale 1 it is the IRNN. For short
    memories choose a scale below 1.

    Args:
        model: A recurrent module, or any module that contains some.
        scale: The factor, and then rho; above 0.
        input_std: Standard deviation of new input weights, drawn from a normal
            distribution of mean 0; None leaves them alone.
        streams: Names of streams, or of modules, that are meant; None: all.
        optimizer: As for :func:`orthogonal_`.
        generator: Source of the random numbers; None: torch's default.

    Returns:
        What was changed, one entry a stream, with rho before and after.

    Raises:
        TypeError: If ``model`` is no nn.Module.
        ValueError: If a stream is gated: the identity is for nn.RNN and nn.RNNCell.
            Also as for :func:`orthogonal_`.

    Warns:
        UserWarning: If the nonlinearity is tanh, whose slope is 1 at 0 alone.

    References:
        Le, Jaitly & Hinton (2015), arXiv:1504.00941.
    """
    scale = _above_zero("scale", scale)
    std = None if input_std is None else _above_zero("input_std", input_std)
    found = _chosen(model, streams)
    if gated := [r.stream for r in found if r.stream.gates]:
        raise ValueError(
            f"identity_ is for vanilla nets; {_listed(gated)} gated. "
            "Name the others with streams=, or use orthogonal_."
        )
    if tanh := [r.stream for r in found if r.stream.kind == "RNN_TANH"]:
        warnings.warn(
            f"{_listed(tanh)} tanh, whose slope is 1 at 0 alone, so that the identity "
            "still forgets; it is meant for nonlinearity='relu'.",
            stacklevel=2,
        )

    def new(stream: Stream, old: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values = {"weight_hh": scale * _eye(stream.hidden_size), **_zero_biases(old)}
        if std is not None:
            values["weight_ih"] = std * _normal(old["weight_ih"].shape, generator)
        return values

    return write(found, new, optimizer)


def forget_bias_(
    model: nn.Module,
    value: float = 1.0,
    *,
    streams: Streams = None,
    optimizer: Optimizers = None,
) -> list[Changed]:
    """Set the bias of the gate that keeps the state: f of an LSTM, z of a GRU.

    PyTorch adds two biases; their sum becomes ``value``, all of it in ``bias_ih``. At
    rest the gate is sigmoid(value), and remembers for ``1 + exp(value)`` steps: for a
    lag of d steps, ``value = math.log(d)``.

    Args:
        model: A recurrent module, or any module that contains some.
        value: The bias; 1 is usual, more remembers longer.
        streams: Names of streams, or of modules, that are meant; None: all gated ones.
        optimizer: As for :func:`orthogonal_`.

    Returns:
        What was changed, one entry a stream; rho is that of W_hh, and stays.

    Raises:
        TypeError: If ``model`` is no nn.Module.
        ValueError: If there is no gate, or the module was made with bias=False. Also
            as for :func:`orthogonal_`.

    References:
        Gers, Schmidhuber & Cummins (2000), Neural Computation 12; Jozefowicz et al.
        (2015), ICML. Of the GRU, Cho et al. (2014) write z with the opposite sign.
    """
    value = _number("value", value)

    def new(stream: Stream, old: Mapping[str, Tensor]) -> dict[str, Tensor]:
        bias = torch.full((stream.hidden_size,), value, dtype=torch.float64)
        keeps = {KEEPS[stream.kind]: bias}
        return _gate_biases(stream, old, keeps)

    return write(_gated(model, streams, "forget_bias_"), new, optimizer)


def zero_bias_(
    model: nn.Module,
    *,
    gates: Sequence[str] | None = None,
    streams: Streams = None,
    optimizer: Optimizers = None,
) -> list[Changed]:
    """Set both biases to 0, of all gates or of some: without input they are half open.

    What frees a gate that its bias holds shut, such as the output gate of an LSTM.

    Args:
        model: A recurrent module, or any module that contains some.
        gates: PyTorch's letters: LSTM ``i f g o``, GRU ``r z n``. None: all, and the
            biases of vanilla nets.
        streams: Names of streams, or of modules, that are meant; None: all.
        optimizer: As for :func:`orthogonal_`.

    Returns:
        What was changed, one entry a stream; rho is that of W_hh, and stays.

    Raises:
        TypeError: If ``model`` is no nn.Module.
        ValueError: If a stream has no such gate, or was made with bias=False. Also as
            for :func:`orthogonal_`.

    References:
        A reset of the biases alone, Gers, Schmidhuber & Cummins (2000), Neural
        Computation 12, of gates that saturate.
    """

    def new(stream: Stream, old: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if gates is None:
            return _zero_biases(old)
        if unknown := [gate for gate in gates if gate not in stream.gates]:
            has = " ".join(stream.gates) or "none, as it is no LSTM or GRU"
            raise ValueError(
                f"{stream.name} has no gate {unknown[0]!r}; its gates: {has}. "
                "Choose the streams with streams=."
            )
        zero = torch.zeros(stream.hidden_size, dtype=torch.float64)
        return _gate_biases(stream, old, dict.fromkeys(gates, zero))

    return write(_chosen(model, streams), new, optimizer)


def chrono_(
    model: nn.Module,
    t_max: float,
    *,
    streams: Streams = None,
    optimizer: Optimizers = None,
    generator: Generator | None = None,
) -> list[Changed]:
    r"""Spread the memories of a gated net evenly up to ``t_max`` steps.

    :math:`b_f \sim \ln U(1, t_{max} - 1)` and :math:`b_i = -b_f` in an LSTM,
    :math:`b_z \sim \ln U(1, t_{max} - 1)` in a GRU, all in ``bias_ih``; ``bias_hh``
    becomes 0 for those gates. Written to both, the median memory at ``t_max = 100``
    would be 1,900 steps instead of 51.

    Args:
        model: A recurrent module, or any module that contains some.
        t_max: The longest lag that is wanted, in steps; at least 3. It need not be the
            length of the sequence.
        streams: Names of streams, or of modules, that are meant; None: all gated ones.
        optimizer: As for :func:`orthogonal_`.
        generator: Source of the random numbers; None: torch's default.

    Returns:
        What was changed, one entry a stream; rho is that of W_hh, and stays.

    Raises:
        TypeError: If ``model`` is no nn.Module.
        ValueError: If ``t_max`` is below 3, there is no gate, or the module was made
            with bias=False. Also as for :func:`orthogonal_`.

    References:
        Tallec & Ollivier (2018), arXiv:1804.11188.
    """
    t_max = _number("t_max", t_max)
    if t_max < _SHORTEST_CHRONO:
        raise ValueError(f"t_max is {t_max:g}; expected 3 steps or more.")

    def new(stream: Stream, old: Mapping[str, Tensor]) -> dict[str, Tensor]:
        drawn = _uniform((stream.hidden_size,), generator)
        bias = (1 + (t_max - 2) * drawn).log()
        if stream.kind == "LSTM":
            return _gate_biases(stream, old, {"f": bias, "i": -bias})
        return _gate_biases(stream, old, {"z": bias})

    return write(_gated(model, streams, "chrono_"), new, optimizer)


def spectral_cap_(
    model: nn.Module,
    c: float = 0.95,
    *,
    streams: Streams = None,
    optimizer: Optimizers = None,
) -> list[Changed]:
    r"""Scale every gate's recurrent matrix down to a largest singular value of ``c``.

    :math:`W_g \leftarrow W_g \min(1, c / \sigma_{max}(W_g))`; with a projection, of
    :math:`W_g W_{hr}`. It stops gradients from growing through a vanilla net, and makes
    sure that they shrink by c at every step there: 0.95^100 is 0.006.

    Args:
        model: A recurrent module, or any module that contains some.
        c: The largest singular value; above 0.
        streams: Names of streams, or of modules, that are meant; None: all.
        optimizer: As for :func:`orthogonal_`.

    Returns:
        What was looked at, one entry a stream, with rho before and after.

    Raises:
        TypeError: If ``model`` is no nn.Module.
        ValueError: If a weight holds NaN or Inf, which no factor cures. Also as for
            :func:`orthogonal_`.

    References:
        Miyato et al. (2018), arXiv:1802.05957, who divide by the norm instead.
    """
    c = _above_zero("c", c)

    def new(stream: Stream, old: Mapping[str, Tensor]) -> dict[str, Tensor]:
        weight = old["weight_hh"].cpu().double()
        projection = old.get("weight_hr")
        if projection is not None:
            projection = projection.cpu().double()
        gates = gate_matrices(stream, weight, projection)
        if not torch.isfinite(gates).all():  # asked first: LAPACK dies of a NaN
            raise ValueError(
                f"W_hh of {stream.name} holds NaN or Inf; go back to a checkpoint "
                "before that, or use orthogonal_."
            )
        sigma = torch.linalg.matrix_norm(gates, 2).reshape(-1, 1, 1)
        factor = (c / sigma.clamp_min(torch.finfo(torch.float64).tiny)).clamp_max(1.0)
        blocks = weight.reshape(len(gates), stream.hidden_size, -1)
        capped: Tensor = blocks * factor
        return {"weight_hh": capped.reshape(weight.shape)}

    return write(_chosen(model, streams), new, optimizer)


# ---- what is drawn


def _haar(rows: int, columns: int, generator: Generator | None) -> Tensor:
    """Return an orthogonal matrix, or orthonormal columns, of the Haar measure."""
    q: Tensor
    q, r = torch.linalg.qr(_normal((rows, columns), generator))
    # Without the signs the eigenvalues are not evenly spread over the circle.
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0).to(q)
    return q * signs


def _normal(shape: Sequence[int], generator: Generator | None) -> Tensor:
    device = generator.device if generator is not None else "cpu"
    draw = torch.randn(*shape, dtype=torch.float64, device=device, generator=generator)
    return draw.cpu()


def _uniform(shape: Sequence[int], generator: Generator | None) -> Tensor:
    device = generator.device if generator is not None else "cpu"
    draw = torch.rand(*shape, dtype=torch.float64, device=device, generator=generator)
    return draw.cpu()


def _eye(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def _zero_biases(old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: torch.zeros_like(v) for n, v in old.items() if n.startswith("bias")}


def _gate_biases(
    stream: Stream, old: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return both biases with some gates' sums as wanted, all of it in ``bias_ih``."""
    if "bias_ih" not in old:
        raise ValueError(
            f"{stream.name} has no biases (bias=False); expected a module that was "
            "made with bias=True."
        )
    ih, hh = old["bias_ih"].clone(), old["bias_hh"].clone()
    for gate, value in wanted.items():
        first = stream.gates.index(gate) * stream.hidden_size
        ih[first : first + stream.hidden_size] = value.to(ih)
        hh[first : first + stream.hidden_size] = 0.0
    return {"bias_ih": ih, "bias_hh": hh}


# ---- what is asked for


def _number(name: str, value: float) -> float:
    if isinstance(value, str) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a number.")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{name} is {value}; expected a finite number.")
    return number


def _above_zero(name: str, value: float) -> float:
    number = _number(name, value)
    if number <= 0:
        raise ValueError(f"{name} is {value}; expected a number above 0.")
    return number


def _listed(streams: Sequence[Stream]) -> str:
    names = ", ".join(s.name for s in streams[:5]) + ", ..." * (len(streams) > 5)
    return f"{names} {'is' if len(streams) == 1 else 'are'}"


def _chosen(model: nn.Module, streams: Streams) -> list[Recurrence]:
    return named(recurrences(model), streams)


def _gated(model: nn.Module, streams: Streams, what: str) -> list[Recurrence]:
    found = _chosen(model, streams)
    gated = [r for r in found if r.stream.gates]
    if not gated or (streams is not None and len(gated) < len(found)):
        vanilla = [r.stream for r in found if not r.stream.gates]
        raise ValueError(
            f"{what} sets the bias of a gate; {_listed(vanilla)} vanilla and has "
            "none. Choose LSTMs or GRUs with streams=, or use orthogonal_."
        )
    return gated
