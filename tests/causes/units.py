"""Units, gates and weights that do not take part."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pack_padded_sequence

from testbed.nets import classes
from testbed.weights import I, O, Z, bias, bias_of, orthogonal
from tests.causes.run import (
    CHRONO,
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


def near(model, steps, **more):
    """A run in which a symbol near the end is wanted."""
    more.setdefault("optimizer", adam(model))
    return Run(model=model, batches=symbols(12, 2), steps=steps, **more)


# ---- dead units, stuck gates


def dying(suffix, steps, **more):
    """From step 10 on the biases of a layer are far below its inputs."""

    def build(sick):
        model = net(nn.RNN, nonlinearity="relu", **more)
        orthogonal(model.layer)

        def before(step):
            if sick and step == 10:
                bias_of(model.layer, suffix, -10.0)

        return near(model, steps, before=before)

    return build


def dead_cell(sick):
    model = looped(nn.RNNCell, nonlinearity="relu")
    orthogonal(model.layer)
    if sick:
        bias(model.layer, -10.0)
    return near(model, 25)


def stuck(make, suffix, gate, value, loss=classes):
    def build(sick):
        model = make()
        if sick and suffix:
            bias_of(model.layer, suffix, value, gate)
        elif sick:
            bias(model.layer, value, gate)
        return near(model, 25, loss=loss)

    return build


def packed(model, batch):
    """Sequences of 7 to 12 steps, packed."""
    x, y = batch
    lengths = 7 + torch.arange(16) % 6
    given = pack_padded_sequence(x, lengths, enforce_sorted=False)
    return classes(model, (given, y))


# ---- no gradient


def frozen(sick):
    model = net(nn.GRU)
    model.layer.requires_grad_(not sick)
    return near(model, 25)


def unused(sick):
    """A cell that the forward passes by."""
    model = looped(nn.GRUCell)
    model.plain = nn.Linear(SYMBOLS, HIDDEN)

    def loss(model, batch):
        x, y = batch
        seen = model.plain(x[-3]) if sick else model.layer(x[-3])
        return cross_entropy(model.head(seen), y)

    return near(model, 25, loss=loss)


def detached(sick):
    """The head reads the cell's last state without its graph."""
    model = looped(nn.LSTMCell)

    def loss(model, batch):
        x, y = batch
        state = None
        for row in x:
            state = model.layer(row, state)
        h = state[0].detach() if sick else state[0]
        return cross_entropy(model.head(h), y)

    return near(model, 25, loss=loss)


def forgotten(kind):
    """The loop does not hand the state on from call to call."""

    def build(sick):
        model = looped(kind) if kind is nn.LSTMCell else net(kind)
        cell = kind is nn.LSTMCell

        def loss(model, batch):
            x, y = batch
            state = None
            for row in x if cell else x[:, None]:
                found = model.layer(row, None if sick else state)
                state = found if cell else found[1]
            h = state[0] if cell else found[0][-1]
            return cross_entropy(model.head(h), y)

        return near(model, 25, loss=loss)

    return build


def read_at_the_end(sick):
    """The last output, at which the reverse direction has only begun."""
    model = net(nn.LSTM, bidirectional=True)

    def loss(model, batch):
        x, y = batch
        out, (h_n, _) = model.layer(x)
        return cross_entropy(model.head(out[-1] if sick else torch.cat([*h_n], -1)), y)

    return near(model, 25, loss=loss)


def cut_off(sick):
    """The states are clamped from below, at a value that none reaches."""
    model = net(nn.GRU)

    def loss(model, batch):
        x, y = batch
        h = model.layer(x)[0][-1]
        return cross_entropy(model.head(h.clamp_min(2.0) if sick else h), y)

    return near(model, 25, loss=loss)


# ---- not updating


def left_out(sick):
    model = net(nn.RNN)
    held = [*model.head.parameters(), *([] if sick else model.layer.parameters())]
    return near(model, 30, optimizer=torch.optim.Adam(held, 1e-3))


def at_rate_zero(sick):
    model = net(nn.LSTM, num_layers=2)
    upper = [p for n, p in model.layer.named_parameters() if n.endswith("l1")]
    lower = [p for n, p in model.layer.named_parameters() if n.endswith("l0")]
    groups = [
        {"params": [*model.head.parameters(), *lower]},
        {"params": upper, "lr": 0.0 if sick else 1e-3},
    ]
    return near(model, 55, optimizer=torch.optim.Adam(groups, 1e-3))


def scheduled_by_batch(sick):
    model = net(nn.LSTM)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.4 if sick else 0.999)
    optimizer.register_step_post_hook(lambda *_: schedule.step())
    return near(model, 120, optimizer=optimizer)


def below_precision(sick):
    model = net(nn.GRU)
    rate = 1e-11 if sick else 1e-2
    return near(model, 25, optimizer=torch.optim.SGD(model.parameters(), rate))


CASES = {
    "biases that fall far below the inputs": Case(
        "dead_units",
        "dead_relu",
        dying("l0", 52),
        stream="rnn.l0",
        onset=10,
        remedy=ORTHOGONAL,
    ),
    "biases that fall far below the inputs, in reverse": Case(
        "dead_units",
        "dead_relu",
        dying("l0_reverse", 52, bidirectional=True),
        stream="rnn.l0_reverse",
        onset=10,
        remedy=ORTHOGONAL,
    ),
    "biases that stay far below the inputs": Case(
        "dead_units",
        "dead_relu",
        dying("l0", 150),
        stream="rnn.l0",
        onset=10,
        remedy=ORTHOGONAL,
    ),
    "a ReLU cell of such biases": Case(
        "dead_units", "dead_relu", dead_cell, stream="cell", remedy=ORTHOGONAL
    ),
    "a shut input gate in the second layer": Case(
        "gate_stuck",
        "input_gate",
        stuck(lambda: net(nn.LSTM, num_layers=2), "l1", I, -15.0),
        stream="rnn.l1",
        remedy=CHRONO,
    ),
    "a shut input gate of a cell": Case(
        "gate_stuck",
        "input_gate",
        stuck(lambda: looped(nn.LSTMCell), "", I, -10.0),
        stream="cell",
        remedy=CHRONO,
    ),
    "a shut output gate, packed": Case(
        "gate_stuck",
        "output_gate",
        stuck(lambda: net(nn.LSTM), "l0", O, -10.0, packed),
        stream="rnn.l0",
        remedy="init.zero_bias_",
    ),
    "an update gate that keeps for ever, in reverse": Case(
        "gate_stuck",
        "update_gate",
        stuck(lambda: net(nn.GRU, bidirectional=True), "l0_reverse", Z, 9.0),
        stream="rnn.l0_reverse",
        remedy=CHRONO,
    ),
    "a frozen layer": Case("no_gradient", "frozen", frozen, stream="rnn.l0"),
    "a cell that is not used": Case("no_gradient", "unused", unused, stream="cell"),
    "a state that is read detached": Case(
        "no_gradient", "detached", detached, stream="cell"
    ),
    "a cell that is not given its state": Case(
        "no_gradient", "state", forgotten(nn.LSTMCell), stream="cell"
    ),
    "a net that is stepped without its state": Case(
        "no_gradient", "state", forgotten(nn.GRU), stream="rnn.l0"
    ),
    "a reverse direction that is read too early": Case(
        "no_gradient", "readout_index", read_at_the_end, stream="rnn.l0_reverse"
    ),
    "states that are clamped away": Case("no_gradient", None, cut_off, stream="rnn.l0"),
    "a layer that no optimizer holds": Case(
        "not_updating", "not_in_optimizer", left_out, stream="rnn.l0"
    ),
    "a second layer at a rate of 0": Case(
        "not_updating", "frozen", at_rate_zero, stream="rnn.l1"
    ),
    "a schedule of epochs that is stepped at each batch": Case(
        "not_updating", "schedule", scheduled_by_batch, stream="rnn.l0", onset=10
    ),
    "updates below the weights' precision": Case(
        "not_updating", None, below_precision, stream="rnn.l0"
    ),
}
