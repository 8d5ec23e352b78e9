"""Sick runs whose states are wrong: gradients grow, units die, gates stick."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.detection import truth
from benchmarks.detection.case import Case, Draw, family
from benchmarks.detection.sick_flow import RATE, SYMBOLS, Layer, adam, flow, net
from benchmarks.detection.truth import compared
from testbed.nets import CellLoop
from testbed.tasks import recall
from testbed.weights import F, I, O, Z, bias, of_radius, orthogonal, recurrent

RELU: Layer = partial(nn.RNN, nonlinearity="relu")
STEPS, SLOW = 300, 1e-4

exploding = partial(flow, "exploding", truth.grows, steps=STEPS, clip=1.0)


def late(draw: Draw, length: int) -> Any:
    """Return batches with the symbol near the end, which what grows drowns."""
    rows, lag = draw.between(16, 32), draw.between(1, 3)
    return recall(draw.source(), length, rows, SYMBOLS, lag)


def inflate(
    rnn: nn.Module, begin: int, end: int, factor: float
) -> Callable[[int], Any]:
    """Return what multiplies recurrent weights at each step of a range."""

    def before(number: int) -> None:
        if begin <= number < end:
            recurrent(rnn, lambda w: w * factor)

    return before


@family
@compared
def exploding_large_radius_relu(draw: Draw, sick: bool) -> Case:
    """A ReLU net of spectral radius 3 to 4."""
    model = net(draw, RELU)
    rho = draw.one_of(3.0, 3.5, 4.0)
    recurrent(orthogonal(model.layer), of_radius(rho if sick else 1.0))
    pairs = late(draw, draw.between(20, 30))
    return exploding(model, pairs, "large_radius", optimizer=adam(model, SLOW))


def _one_of_two(
    draw: Draw, sick: bool, suffix: str, rate: float = RATE, **more: Any
) -> Case:
    model = net(draw, RELU, **more)
    orthogonal(model.layer)
    if sick:
        recurrent(model.layer, lambda w: 4 * w, suffix)
    pairs = late(draw, draw.between(20, 30))
    shown = [f"{model.name}.{suffix}"]
    return exploding(
        model, pairs, "large_radius", shown=shown, optimizer=adam(model, rate)
    )


@family
@compared
def exploding_second_layer(draw: Draw, sick: bool) -> Case:
    """Only the second of two layers has a large radius."""
    return _one_of_two(draw, sick, "l1", rate=SLOW, num_layers=2)


@family
@compared
def exploding_reverse_direction(draw: Draw, sick: bool) -> Case:
    """Only the reverse direction has a large radius."""
    return _one_of_two(draw, sick, "l0_reverse", bidirectional=True)


@family
@compared
def exploding_cell_loop(draw: Draw, sick: bool) -> Case:
    """A ReLU cell in a loop, of a large radius."""
    cell = nn.RNNCell(SYMBOLS, draw.between(20, 40), nonlinearity="relu")
    recurrent(orthogonal(cell), lambda w: w * (4.0 if sick else 1.0))
    model = CellLoop(draw.module_name(), cell, SYMBOLS)
    pairs = late(draw, draw.between(20, 25))
    return exploding(model, pairs, "large_radius", optimizer=adam(model, SLOW))


@family
@compared
def exploding_nonnormal_chain(draw: Draw, sick: bool) -> Case:
    """A chain of ReLU units: radius a half, and yet each drives the next one up."""
    model = net(draw, RELU)
    orthogonal(model.layer)
    if sick:
        recurrent(
            model.layer,
            lambda w: 0.5 * torch.eye(len(w)) + 4.0 * torch.ones(len(w) - 1).diag(1),
        )
    pairs = late(draw, draw.between(20, 30))
    # Slowly, or the net trains it away.
    return exploding(model, pairs, "nonnormal", optimizer=adam(model, SLOW))


def _paired(weight: Tensor) -> Tensor:
    """Return a matrix of radius .5 whose first half alone has radius 2.5.

    The other half holds it in balance; as ReLUs, it is off and cannot.
    """
    half = len(weight) // 2
    pair = torch.tensor([[2.5, 6.0**0.5], [-(6.0**0.5), -2.5]])
    made = torch.zeros_like(weight)
    made[: 2 * half, : 2 * half] = torch.kron(pair, torch.eye(half).roll(1, 0))
    return made


@family
@compared
def exploding_active_subnetwork(draw: Draw, sick: bool) -> Case:
    """Of a ReLU net of radius a half, the units that are on have radius 2.5."""
    model = net(draw, RELU)
    orthogonal(model.layer)
    if sick:
        recurrent(model.layer, _paired)
    return exploding(
        model,
        late(draw, draw.between(25, 35)),
        "active_subnetwork",
        others=["dead_units"],
        optimizer=adam(model, SLOW),
    )


@family
@compared
def exploding_chaos_tanh(draw: Draw, sick: bool) -> Case:
    """A tanh net of gain 3: what goes in is lost in chaos."""
    model = net(draw, nn.RNN)
    orthogonal(model.layer)
    if sick:
        recurrent(model.layer, lambda w: torch.randn_like(w) * 3 / len(w) ** 0.5)
    return exploding(model, late(draw, draw.between(30, 40)), "chaos")


def _sixteenfold(draw: Draw, sick: bool, layer: Layer) -> Case:
    model = net(draw, layer)
    bias(model.layer, 1.0, F)
    if sick:
        recurrent(model.layer, lambda w: 16 * w)
    pairs = late(draw, draw.between(30, 40))
    return exploding(model, pairs, "large_recurrent_weights")


@family
@compared
def exploding_recurrent_weights_lstm(draw: Draw, sick: bool) -> Case:
    """An LSTM with recurrent weights sixteen times PyTorch's."""
    return _sixteenfold(draw, sick, nn.LSTM)


@family
@compared
def exploding_recurrent_weights_gru(draw: Draw, sick: bool) -> Case:
    """A GRU with recurrent weights sixteen times PyTorch's."""
    return _sixteenfold(draw, sick, nn.GRU)


@family
@compared
def exploding_drift_inflated(draw: Draw, sick: bool) -> Case:
    """Recurrent weights of a ReLU net grow by 3 % a step, for 40 steps."""
    model = net(draw, RELU)
    orthogonal(model.layer)
    begin = draw.between(100, 150)
    grow = inflate(model.layer, begin, begin + 40, 1.03 if sick else 1.0)
    return exploding(
        model,
        late(draw, draw.between(20, 30)),
        "drift",
        "large_radius",
        onset=begin,
        settled=begin + 40,
        before=grow,
        others=["drift"],
    )


@family
@compared
def exploding_to_nan(draw: Draw, sick: bool) -> Case:
    """Recurrent weights of a ReLU net grow until the loss is NaN."""
    model = net(draw, RELU)
    orthogonal(model.layer)
    begin = draw.between(80, 120)
    return flow(
        "exploding",
        truth.grows_to_nan,
        model,
        late(draw, draw.between(25, 35)),
        "drift",
        "large_radius",
        steps=STEPS,
        onset=begin,
        settled=begin + 40,
        before=inflate(model.layer, begin, STEPS, 1.03 if sick else 1.0),
        others=["drift", "nonfinite", "loss_divergence"],
    )


dead_units = partial(flow, "dead_units", truth.dead, steps=STEPS)


@family
@compared
def dead_units_bias_drop(draw: Draw, sick: bool) -> Case:
    """The biases of a ReLU net are lowered far below its inputs, in mid-run."""
    model = net(draw, RELU)
    orthogonal(model.layer)
    onset = draw.between(100, 150)

    def before(number: int) -> None:
        if sick and number == onset:
            bias(model.layer, -10.0)

    pairs = late(draw, draw.between(15, 25))
    return dead_units(model, pairs, "dead_relu", onset=onset, before=before)


@family
@compared
def dead_units_from_start(draw: Draw, sick: bool) -> Case:
    """A ReLU net begins with biases far below its inputs."""
    model = net(draw, RELU)
    orthogonal(model.layer)
    if sick:
        bias(model.layer, -10.0)
    return dead_units(model, late(draw, draw.between(15, 25)), "dead_relu")


def _stuck(draw: Draw, layer: Layer, gate: str, block: int, value: float) -> Case:
    model = net(draw, layer)
    if value:
        bias(model.layer, value, block)
    cause = {"i": "input_gate", "o": "output_gate", "z": "update_gate"}[gate]
    pairs, measure = late(draw, draw.between(15, 25)), truth.stuck(gate)
    rate = adam(model, 2 * RATE)
    return flow("gate_stuck", measure, model, pairs, cause, steps=STEPS, optimizer=rate)


@family
@compared
def gate_stuck_input_lstm(draw: Draw, sick: bool) -> Case:
    """The input gates of an LSTM are shut from the start."""
    return _stuck(draw, nn.LSTM, "i", I, -10.0 if sick else 0.0)


@family
@compared
def gate_stuck_output_lstm(draw: Draw, sick: bool) -> Case:
    """The output gates of an LSTM are shut from the start."""
    return _stuck(draw, nn.LSTM, "o", O, -10.0 if sick else 0.0)


@family
@compared
def gate_stuck_update_gru(draw: Draw, sick: bool) -> Case:
    """The update gates of a GRU keep for far longer than a sequence lasts."""
    return _stuck(draw, nn.GRU, "z", Z, 9.0 if sick else 0.0)
