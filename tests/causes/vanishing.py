"""Gradients that die out on their way through time, and what is no more than told."""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss, pad
from torch.nn.utils.rnn import pack_padded_sequence

from testbed.cells import RNN
from testbed.cells import Stepped as Own
from testbed.nets import classes
from testbed.weights import F, I, Z, bias, bias_of, orthogonal, recurrent, remembering
from tests.causes.run import (
    CHRONO,
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


def far(model, rate=1e-3, **more):
    """A run in which the first symbol is wanted."""
    more.setdefault("steps", 125)
    more.setdefault("batches", symbols())
    return Run(model=model, optimizer=adam(model, rate), **more)


def orthogonal_tanh(**more):
    model = net(nn.RNN, **more)
    orthogonal(model.layer)
    return model


def in_pieces(sick):
    """The state is detached every 5 steps of a sequence."""

    def loss(model, batch):
        x, y = batch
        state = None
        for piece in x.split(5):
            state = state.detach() if sick and state is not None else state
            out, state = model.layer(piece, state)
        return cross_entropy(model.head(out[-1]), y)

    return far(orthogonal_tanh(), loss=loss)


def padded(sick):
    """Behind 5 steps come 40 of zeros; the healthy twin packs them."""
    lengths = torch.full((16,), 5)

    def loss(model, batch):
        x, y = pad(batch[0], (0, 0, 0, 0, 0, 40)), batch[1]
        return classes(model, (x if sick else pack_padded_sequence(x, lengths), y))

    return far(net(nn.LSTM), 5e-3, batches=symbols(5), loss=loss)


def saturated(scale, weight=0.0, level=0.0, suffix="l0", **more):
    def build(sick):
        model = orthogonal_tanh(**more)
        with torch.no_grad():
            model.head.weight.mul_(0.1)  # so that the loss begins at chance
        if sick and weight:
            recurrent(model.layer, lambda w: weight * torch.eye(HIDDEN), suffix)
            bias_of(model.layer, suffix, level)
        pairs = ((scale * x, y) if sick else (x, y) for x, y in symbols())
        return far(model, 3e-4, batches=pairs)

    return build


def of_another_mean(sick):
    """The same inputs in a regression: the loss falls by the mean of its targets."""
    model = net(nn.RNN, outputs=1)
    orthogonal(model.layer)
    pairs = ((100.0 * x, y) if sick else (x, y) for x, y in symbols())

    def loss(model, batch):
        return mse_loss(model(batch[0])[:, 0], batch[1].float())

    return far(model, 5e-3, batches=pairs, loss=loss)


def shut(kind, gate):
    def build(sick):
        model = net(kind)
        remembering(model.layer, 25)
        if sick:
            bias(model.layer, 0.0, I)
            bias(model.layer, -5.0, gate)
        return far(model)

    return build


def shrinking(sick):
    """Recurrent weights shrink by a half and more, once gradients had reached."""
    model = orthogonal_tanh()

    def before(step):
        if sick and 20 <= step < 32:
            recurrent(model.layer, lambda w: 0.88 * w)

    return far(model, 3e-4, steps=130, before=before)


def penalised(loss):
    """Two losses added up, of which no constant is known: there the way counts."""

    def of_two(model, batch):
        bias = model.head.bias
        return loss(model, batch) + 1e-4 * mse_loss(bias, torch.zeros_like(bias))

    return of_two


def as_pytorch_makes_it(kind, **more):
    more.setdefault("steps", 190)

    def build(sick):
        model = net(kind)
        if not sick:
            remembering(model.layer, 40)
        return far(model, 5e-3, batches=symbols(40), **more)

    return build


def too_small(make, suffix="", loss=classes):
    def build(sick):
        model = make()
        if sick:
            recurrent(model.layer, lambda w: 0.4 * w, suffix)
        return far(model, 2e-3, steps=220, loss=penalised(loss))

    return build


def tanh_cell():
    model = looped(nn.RNNCell)
    orthogonal(model.layer)
    return model


def packed(model, batch):
    """Sequences of 20 to 25 steps, packed."""
    x, y = batch
    lengths = 20 + torch.arange(16) % 6
    given = pack_padded_sequence(x, lengths, enforce_sorted=False)
    return classes(model, (given, y))


def last_wanted_early(model, batch):
    """What comes last is wanted at the fourth step: the reverse direction's part."""
    x, y = batch
    return cross_entropy(model.head(model.layer(x.flip(0))[0][3]), y)


# ---- notices


def carried(sick):
    """The state goes on from step to step, detached."""
    model = net(nn.LSTM)
    state: Any = None

    def loss(model, batch):
        nonlocal state
        x, y = batch
        out, last = model.layer(x, state)
        state = tuple(s.detach() for s in last) if sick else None
        return cross_entropy(model.head(out).flatten(0, 1), y.repeat(len(x)))

    return Run(
        model=model, batches=symbols(8), optimizer=adam(model), steps=20, loss=loss
    )


def wandering(sick):
    """Recurrent weights shrink by 2 % a step, for 40 steps."""
    model = orthogonal_tanh()

    def before(step):
        if sick and 5 <= step < 45:
            recurrent(model.layer, lambda w: 0.98 * w)

    return Run(
        model=model,
        batches=symbols(8, 2),
        optimizer=adam(model, 1e-4),
        steps=102,
        before=before,
    )


def forgetting(sick):
    """A tanh cell written by hand, with recurrent weights near 0 and at 1."""
    model = Own(RNN(SYMBOLS, HIDDEN), HIDDEN, SYMBOLS)
    nn.init.orthogonal_(model.cell.u.weight, gain=0.4 if sick else 1.0)

    def loss(model, batch):
        return cross_entropy(model(batch[0])[-1], batch[1])

    return far(model, loss=loss, cells=(RNN,), steps=660, batches=symbols(20))


CASES = {
    "a tanh cell of one's own that forgets": Case(
        "vanishing", "contraction", forgetting, stream="cell"
    ),
    "a sequence in pieces": Case("vanishing", "truncation", in_pieces, stream="rnn.l0"),
    "a state read behind the padding": Case(
        "vanishing", "padding", padded, stream="rnn.l0"
    ),
    "inputs a hundred times too large": Case(
        "vanishing", "input_scale", saturated(100.0), stream="rnn.l0"
    ),
    "inputs a hundred times too large in a regression": Case(
        "vanishing", "input_scale", of_another_mean, stream="rnn.l0"
    ),
    "recurrent weights that hold the tanh at its end": Case(
        "vanishing",
        "large_weights",
        saturated(1.0, 1.6, 0.6),
        stream="rnn.l0",
        remedy=ORTHOGONAL,
    ),
    "recurrent weights that hold the second layer at its end": Case(
        "vanishing",
        "large_weights",
        saturated(1.0, 1.6, 0.6, "l1", num_layers=2),
        stream="rnn.l1",
        remedy=ORTHOGONAL,
    ),
    "inputs and recurrent weights too large": Case(
        "vanishing", "saturation", saturated(50.0, 4.0), stream="rnn.l0"
    ),
    "an LSTM that forgets": Case(
        "vanishing", "forget_gate", shut(nn.LSTM, F), stream="rnn.l0", remedy=CHRONO
    ),
    "a GRU that keeps nothing": Case(
        "vanishing", "update_gate", shut(nn.GRU, Z), stream="rnn.l0", remedy=CHRONO
    ),
    "recurrent weights that shrink": Case(
        "vanishing", "drift", shrinking, stream="rnn.l0", onset=20, remedy=HELD
    ),
    "an LSTM as PyTorch makes it": Case(
        "vanishing",
        "horizon_too_long",
        as_pytorch_makes_it(nn.LSTM, steps=620),
        stream="rnn.l0",
        remedy=CHRONO,
    ),
    "a GRU as PyTorch makes it": Case(
        "vanishing",
        "horizon_too_long",
        as_pytorch_makes_it(nn.GRU, loss=penalised(classes)),
        stream="rnn.l0",
        remedy=CHRONO,
    ),
    "a tanh net of radius .4, packed": Case(
        "vanishing",
        "small_radius",
        too_small(orthogonal_tanh, loss=packed),
        stream="rnn.l0",
        remedy=ORTHOGONAL,
    ),
    "a tanh net of radius .4 in reverse": Case(
        "vanishing",
        "small_radius",
        too_small(
            lambda: orthogonal_tanh(bidirectional=True),
            "l0_reverse",
            loss=last_wanted_early,
        ),
        stream="rnn.l0_reverse",
        remedy=ORTHOGONAL,
    ),
    "a tanh cell of radius .4": Case(
        "vanishing",
        "small_radius",
        too_small(tanh_cell),
        stream="cell",
        remedy=ORTHOGONAL,
    ),
    "a state that goes on detached": Case(
        "truncated", "truncation", carried, stream="rnn.l0", onset=1
    ),
    "a radius that wanders off": Case(
        "drift", "drift", wandering, stream="rnn.l0", onset=5, remedy=HELD
    ),
}
