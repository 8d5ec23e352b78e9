"""Sick runs in which one layer, one direction or one cell is wrong, not the whole."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.detection import truth
from benchmarks.detection.case import Case, Draw, family
from benchmarks.detection.sick_flow import (
    RATE,
    SYMBOLS,
    adam,
    first,
    flow,
    net,
    vanishing,
)
from benchmarks.detection.sick_growth import RELU, STEPS, dead_units, late
from benchmarks.detection.truth import compared
from testbed.nets import CellLoop
from testbed.tasks import Pair, recall
from testbed.weights import I, Z, bias, bias_of, orthogonal, recurrent, remembering

# ---- vanishing


@family
@compared
def vanishing_small_radius_reverse(draw: Draw, sick: bool) -> Case:
    """The last symbol is asked for near the start: the reverse direction is too small.

    Both directions are read out at one of the first steps.
    """
    model = net(draw, nn.RNN, bidirectional=True)
    orthogonal(model.layer)
    if sick:
        recurrent(model.layer, lambda w: 0.3 * w, "l0_reverse")
    at = draw.between(3, 6)

    def early(model: Any, batch: Pair) -> Tensor:
        return cross_entropy(model.head(model.layer(batch[0])[0][at]), batch[1])

    length, size = draw.between(32, 40), draw.between(16, 32)
    pairs = recall(draw.source(), length, size, SYMBOLS, 0)
    shown = [f"{model.name}.l0_reverse"]
    return vanishing(model, pairs, "small_radius", loss=early, shown=shown)


@family
@compared
def vanishing_saturation_upper_layer(draw: Draw, sick: bool) -> Case:
    """Weights of the upper of two layers hold every tanh of it at its end."""
    model = net(draw, nn.RNN, num_layers=2)
    orthogonal(model.layer)
    if sick:
        recurrent(model.layer, lambda w: 5 * torch.eye(len(w)), "l1")
        bias_of(model.layer, "l1", 3.0)
    pairs = first(draw, draw.between(25, 35))
    return vanishing(
        model,
        pairs,
        "saturation",
        "large_weights",
        shown=[f"{model.name}.l1"],
        optimizer=adam(model, RATE / 2),
    )


@family
@compared
def vanishing_input_scale_lstm(draw: Draw, sick: bool) -> Case:
    """Inputs a thousand times too large: the gates of an LSTM know open and shut."""
    length = draw.between(30, 40)
    model = net(draw, nn.LSTM)
    remembering(model.layer, length)
    scale = 1000.0 if sick else 1.0
    scaled = ((scale * x, y) for x, y in first(draw, length))
    return vanishing(model, scaled, "saturation", "input_scale", curable=False)


# ---- dead units

NOTHING_PASSES = ("no_gradient", "vanishing")
"""True as well, where all units are dead."""


@family
@compared
def dead_units_second_layer(draw: Draw, sick: bool) -> Case:
    """The biases of the second of two ReLU layers are lowered in mid-run."""
    model = net(draw, RELU, num_layers=2)
    orthogonal(model.layer)
    onset = draw.between(100, 150)

    def before(number: int) -> None:
        if sick and number == onset:
            bias_of(model.layer, "l1", -10.0)

    pairs, shown = late(draw, draw.between(15, 25)), [f"{model.name}.l1"]
    return dead_units(
        model,
        pairs,
        "dead_relu",
        onset=onset,
        before=before,
        shown=shown,
        others=NOTHING_PASSES,
    )


@family
@compared
def dead_units_cell(draw: Draw, sick: bool) -> Case:
    """A ReLU cell in a loop begins with biases far below its inputs."""
    cell = orthogonal(nn.RNNCell(SYMBOLS, draw.between(20, 40), nonlinearity="relu"))
    if sick:
        bias(cell, -10.0)
    model = CellLoop(draw.module_name(), cell, SYMBOLS)
    pairs = late(draw, draw.between(15, 25))
    return dead_units(model, pairs, "dead_relu", others=NOTHING_PASSES)


# ---- stuck gates

gate_stuck = partial(flow, "gate_stuck", steps=STEPS)


@family
@compared
def gate_stuck_input_cell(draw: Draw, sick: bool) -> Case:
    """The input gates of an LSTMCell in a loop are shut from the start."""
    cell = nn.LSTMCell(SYMBOLS, draw.between(20, 40))
    if sick:
        bias(cell, -10.0, I)
    model = CellLoop(draw.module_name(), cell, SYMBOLS)
    pairs, rate = late(draw, draw.between(15, 25)), adam(model, 2 * RATE)
    return gate_stuck(truth.stuck("i"), model, pairs, "input_gate", optimizer=rate)


def _second(draw: Draw, layer: Any, gate: str, begin: Callable[[Any], object]) -> Case:
    model = net(draw, layer, num_layers=2)
    begin(model.layer)
    cause = {"i": "input_gate", "z": "update_gate"}[gate]
    pairs = late(draw, draw.between(12, 18))
    return gate_stuck(
        truth.stuck(gate),
        model,
        pairs,
        cause,
        shown=[f"{model.name}.l1"],
    )


@family
@compared
def gate_stuck_input_second_layer(draw: Draw, sick: bool) -> Case:
    """The input gates of the second of two LSTM layers are shut from the start."""

    def shut(rnn: nn.RNNBase) -> None:
        if sick:
            bias_of(rnn, "l1", -15.0, I)

    return _second(draw, nn.LSTM, "i", shut)


@family
@compared
def gate_stuck_update_second_layer(draw: Draw, sick: bool) -> Case:
    """The update gates of the second of two GRU layers keep for far too long."""

    def keep(rnn: nn.RNNBase) -> None:
        if sick:
            bias_of(rnn, "l1", 15.0, Z)

    return _second(draw, nn.GRU, "z", keep)
