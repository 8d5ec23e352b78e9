"""Gradients that grow on their way through time, and a norm that explodes."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from testbed.cells import RNN
from testbed.cells import Stepped as Own
from testbed.weights import F, bias, orthogonal, recurrent
from tests.causes.run import (
    HELD,
    HIDDEN,
    ORTHOGONAL,
    SYMBOLS,
    Case,
    Run,
    adam,
    looped,
    net,
    symbols,
)


def clipped(model, rate=1e-3, **more):
    """A short run on symbols near the end, which what grows drowns; clipped at 1."""
    more.setdefault("steps", 12)
    return Run(
        model=model,
        batches=symbols(lag=2),
        optimizer=adam(model, rate),
        clip=1.0,
        **more,
    )


def relu(**more):
    model = net(nn.RNN, nonlinearity="relu", **more)
    orthogonal(model.layer)
    return model


def gates_too_large(kind):
    def build(sick):
        model = net(kind)
        bias(model.layer, 1.0, F)
        recurrent(model.layer, lambda w: (24 if sick else 1) * w)
        return clipped(model)

    return build


def growing(sick):
    model = relu()

    def before(step):
        if sick and 15 <= step < 35:
            recurrent(model.layer, lambda w: 1.06 * w)

    return clipped(model, steps=80, before=before)


def chain(sick):
    """Each unit drives the next one up, and yet the radius is a half."""
    model = relu()
    if sick:
        links = 4.0 * torch.ones(HIDDEN - 1).diag(1)
        recurrent(model.layer, lambda w: 0.5 * torch.eye(HIDDEN) + links)
    return clipped(model, 1e-4)


def unbalanced(sick):
    """The half that is on has radius 2.5; the other half would hold it in balance."""
    model = relu()
    if sick:
        pair = torch.tensor([[2.5, 6.0**0.5], [-(6.0**0.5), -2.5]])
        shift = torch.eye(HIDDEN // 2).roll(1, 0)
        recurrent(model.layer, lambda w: torch.kron(pair, shift))
    return clipped(model, 1e-4)


def one_too_large(suffix, **more):
    def build(sick):
        model = relu(**more)
        if sick:
            recurrent(model.layer, lambda w: 3.5 * w, suffix)
        return clipped(model, 1e-4)

    return build


def relu_cell(sick):
    model = looped(nn.RNNCell, nonlinearity="relu")
    recurrent(orthogonal(model.layer), lambda w: (3.5 if sick else 1) * w)
    return clipped(model, 1e-4)


def expanding(sick):
    """The same, in a cell written by hand."""
    model = Own(RNN(SYMBOLS, HIDDEN), HIDDEN, SYMBOLS)
    nn.init.orthogonal_(model.cell.u.weight, gain=4.0 if sick else 1.0)
    run = clipped(model)
    run.cells, run.loss = (RNN,), lambda m, b: cross_entropy(m(b[0])[-1], b[1])
    return run


def chaotic(sick):
    model = net(nn.RNN)
    orthogonal(model.layer)
    if sick:
        recurrent(model.layer, lambda w: torch.randn_like(w) * 4 / HIDDEN**0.5)
    return clipped(model)


def other_unit(sick):
    """From step 30 on the targets of a regression are in another unit."""
    model, seen = net(nn.GRU, outputs=1), iter(range(60))

    def loss(model, batch):
        x, y = batch
        unit = 1e6 if sick and next(seen) >= 30 else 1.0
        return mse_loss(model(x)[:, 0], unit * y)

    return Run(
        model=model, batches=symbols(10), optimizer=adam(model), steps=60, loss=loss
    )


CASES = {
    "an LSTM's recurrent weights, 24 times": Case(
        "exploding",
        "large_recurrent_weights",
        gates_too_large(nn.LSTM),
        stream="rnn.l0",
        remedy=ORTHOGONAL,
    ),
    "a GRU's recurrent weights, 24 times": Case(
        "exploding",
        "large_recurrent_weights",
        gates_too_large(nn.GRU),
        stream="rnn.l0",
        remedy=ORTHOGONAL,
    ),
    "recurrent weights that grow by 6 % a step": Case(
        "exploding", "drift", growing, stream="rnn.l0", onset=15, remedy=HELD
    ),
    "a chain of ReLU units": Case(
        "exploding", "nonnormal", chain, stream="rnn.l0", remedy=ORTHOGONAL
    ),
    "half of a ReLU net in balance with the other half": Case(
        "exploding",
        "active_subnetwork",
        unbalanced,
        stream="rnn.l0",
        remedy=ORTHOGONAL,
        beside=frozenset({"dead_units"}),
    ),
    "a ReLU net of radius 3.5 in its second layer": Case(
        "exploding",
        "large_radius",
        one_too_large("l1", num_layers=2),
        stream="rnn.l1",
        remedy=ORTHOGONAL,
    ),
    "a ReLU net of radius 3.5 in reverse": Case(
        "exploding",
        "large_radius",
        one_too_large("l0_reverse", bidirectional=True),
        stream="rnn.l0_reverse",
        remedy=ORTHOGONAL,
    ),
    "a ReLU net of radius 3.5 forward": Case(
        "exploding",
        "large_radius",
        one_too_large("l0", bidirectional=True),
        stream="rnn.l0",
        remedy=ORTHOGONAL,
    ),
    "a ReLU cell of radius 3.5": Case(
        "exploding", "large_radius", relu_cell, stream="cell", remedy=ORTHOGONAL
    ),
    "a tanh net of gain 4": Case(
        "exploding", "chaos", chaotic, stream="rnn.l0", remedy=ORTHOGONAL
    ),
    "a tanh cell of one's own of gain 4": Case(
        "exploding", "expansion", expanding, stream="cell"
    ),
    "targets in another unit": Case(
        "exploding", None, other_unit, stream=None, onset=30, remedy="clip.NormClip"
    ),
}
