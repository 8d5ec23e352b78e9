"""What surrounds the recurrence: axes, calls, optimizers, states at their ends."""

from copy import deepcopy

import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from testbed.cells import Stepped as Own
from testbed.nets import classes
from testbed.weights import orthogonal
from tests.causes.loop import plain
from tests.causes.run import HIDDEN, ORTHOGONAL, SYMBOLS, Case, adam, net, symbols


def batch_first_missing(sick):
    """The batch is the first axis, and the module takes it for time."""
    model = net(nn.LSTM, batch_first=not sick)

    def loss(model, batch):
        x, y = batch
        return cross_entropy(model.head(model.rnn(x.transpose(0, 1))[0][:, -1]), y)

    return plain(model, 30, loss=loss)


def steps_over_batch(sick):
    """One time step a call, whose batch the module takes for time."""
    model = net(nn.GRU, batch_first=sick is False)

    def loss(model, batch):
        state = None
        for row in batch[0]:
            out, state = model.rnn(row[:, None], state)
        return cross_entropy(model.head(out[:, 0]), batch[1])

    return plain(model, 30, loss=loss)


def slow_waves(sick):
    """Every step of slow signals is read out, along the wrong axis."""
    generator = torch.Generator().manual_seed(1)

    def pairs():
        while True:
            start = 6 * torch.rand(20, 1, 1, generator=generator)
            time = torch.linspace(0, 4, 25)[:, None]
            wave = (start + time).sin() + torch.zeros(1, 1, 4)
            yield wave, wave.cumsum(1)

    def loss(model, batch):
        return mse_loss(model.head(model.rnn(batch[0])[0]), batch[1])

    return plain(net(nn.RNN, batch_first=not sick), 30, pairs=pairs(), loss=loss)


def viewed(sick):
    """The last states of two directions are viewed, and not transposed."""
    model = net(nn.GRU, bidirectional=True)

    def loss(model, batch):
        x, y = batch
        h = model.rnn(x)[1]
        h = h.view(len(y), -1) if sick else h.transpose(0, 1).reshape(len(y), -1)
        return cross_entropy(model.head(h), y)

    return plain(model, 30, loss=loss)


class Normalised(nn.Module):
    """A tanh cell that normalises its state, over its units or over the sequences."""

    parts = 1

    def __init__(self, axis):
        super().__init__()
        self.w, self.u = nn.Linear(SYMBOLS, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.axis = axis

    def forward(self, x, state):
        h = torch.tanh(self.w(x) + self.u(state[0]))
        return (h - h.mean(self.axis, keepdim=True),)


def normalised(sick):
    model = Own(Normalised(0 if sick else 1), HIDDEN, SYMBOLS)

    def loss(model, batch):
        return cross_entropy(model(batch[0])[-1], batch[1])

    return plain(model, steps=40, loss=loss, pairs=symbols(10), cells=(Normalised,))


def at_its_ends(scale, low=0.0):
    """Inputs out of scale, or recurrent weights that are all positive."""

    def build(sick):
        model = net(nn.RNN)
        if sick and low:
            with torch.no_grad():
                model.rnn.weight_hh_l0.uniform_(0.5 * low, low)
        times = scale if sick else 1.0

        def loss(model, batch):
            return classes(model, (times * batch[0], batch[1]))

        return plain(model, 90, loss=loss)

    return build


def driven_there(sick):
    """A reward of large states, so that steps drive them to their ends."""
    model = net(nn.RNN)

    def loss(model, batch):
        x, y = batch
        out = model.rnn(x)[0]
        reward = 100.0 if sick else 0.0
        return cross_entropy(model.head(out[-1]), y) - reward * out.mean()

    return plain(model, 350, adam(model, 2e-2), symbols(25, 2), loss=loss)


def driven_late(sick):
    """The same, with a clip behind the step."""
    run = driven_there(sick)

    def before(step):
        if sick:
            nn.utils.clip_grad_norm_(run.model.parameters(), 0.1)

    run.before = before
    return run


def by_chance(sick):
    """Targets that the inputs do not tell."""
    generator = torch.Generator().manual_seed(2)

    def pairs():
        for x, y in symbols(8, 2):
            chance = torch.randint(4, y.shape, generator=generator)
            yield x, chance if sick else y

    model = net(nn.LSTM)
    return plain(model, 210, adam(model, 3e-3), pairs())


def behind_eps(sick):
    """An eps of Adam's that is a thousand times the gradients."""
    model = net(nn.GRU)
    eps = 100.0 if sick else 1e-8
    return plain(model, 210, torch.optim.Adam(model.parameters(), 5e-3, eps=eps))


def of_another(copied):
    """The optimizer holds the parameters of another model."""

    def build(sick):
        model = net(nn.LSTM)
        other = deepcopy(model) if copied else nn.Linear(2, 2)
        return plain(model, 210, adam(other if sick else model))

    return build


def head_left_out(sick):
    model = net(nn.GRU)
    trained = model.rnn if sick else model
    return plain(model, 30, torch.optim.SGD(trained.parameters(), 0.1))


def to_one(sick):
    """At step 20 the rate becomes a thousand times what it was."""
    model = net(nn.RNN)
    orthogonal(model.layer)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.9)

    def before(step):
        if sick and step == 20:
            optimizer.param_groups[0]["lr"] = 1.0

    return plain(model, 60, optimizer, before=before)


def clipped_late(begin, times):
    """The clip comes behind the step, and gradients are larger from a step on."""

    def build(sick):
        model, step = net(nn.GRU), iter(range(10**6))
        optimizer = torch.optim.SGD(model.parameters(), 1.0)

        def loss(model, batch):
            loss = classes(model, batch)
            weight = times if next(step) >= begin else 1.0
            return weight * (loss - loss.detach()) + loss.detach()

        def before(step):
            if sick:
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)

        clip = None if sick else 0.1
        return plain(model, begin + 150, optimizer, loss=loss, before=before, clip=clip)

    return build


def raised_bit_by_bit(sick):
    """From step 120 on the rate grows by a tenth at each step."""
    model = net(nn.LSTM)
    optimizer = adam(model, 1e-2)

    def before(step):
        if sick and 120 <= step < 160:
            optimizer.param_groups[0]["lr"] *= 1.1

    return plain(model, 250, optimizer, before=before)


def loaded(sick):
    """From step 120 on the weights are loaded before every step."""
    model = net(nn.LSTM)
    start = deepcopy(model.state_dict())

    def before(step):
        if sick and step >= 120:
            model.load_state_dict(start)

    return plain(model, 200, adam(model, 1e-2), before=before)


def decayed(sick):
    """From step 120 on a weight decay that leaves nothing of the weights."""
    model = net(nn.LSTM)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.0)

    def before(step):
        if sick and step == 120:
            optimizer.param_groups[0]["weight_decay"] = 8.0

    return plain(model, 220, optimizer, before=before)


def broken(what):
    """From step 20 on, NaN or Inf by one of several ways."""

    def build(sick):
        model, steps = net(nn.LSTM), iter(range(40))
        model.gate = nn.Linear(4, 4)

        def loss(model, batch):
            x, y = batch
            begun = sick and next(steps) >= 20
            x = model.gate(x)
            if what == "forward":
                x = (x if begun else x.square() + 1).sqrt()
            if what == "overflow":
                x = (x * (1e4 if begun else 1.0)).exp()
            scores = model.head(model.rnn(x)[0][-1])
            if what == "loss" and begun:
                return (scores.softmax(-1) * 0.0).log().mean()
            return cross_entropy(scores, y)

        def before(step):
            if sick and what == "weights" and step == 20:
                model.rnn.weight_hh_l0.data[0, 0] = torch.nan

        return plain(model, 30, loss=loss, before=before)

    return build


def carried(sick):
    """Each batch begins with the states in which the last one has ended."""
    model, last = net(nn.LSTM), [None]

    def loss(model, batch):
        out, state = model.rnn(batch[0], last[0])
        last[0] = tuple(s.detach() for s in state) if sick else None
        return cross_entropy(model.head(out[-1]), batch[1])

    return plain(model, 30, loss=loss)


def kept(sick):
    """A state with its graph, through weights that were written in place since."""
    model, last = net(nn.RNN), [None]

    def loss(model, batch):
        begun = torch.zeros(1, 16, HIDDEN) if last[0] is None else last[0]
        given = begun if sick else begun.detach()
        out, _ = model.rnn(batch[0], given)
        last[0] = torch.tanh(model.first) * torch.ones(1, 16, HIDDEN)
        return cross_entropy(model.head(out[-1]), batch[1])

    model.first = nn.Parameter(torch.zeros(HIDDEN))
    return plain(model, 30, loss=loss)


def evaluating(sick):
    model = net(nn.GRU)
    model.train(not sick)
    return plain(model, 30)


CASES = {
    "a batch that is taken for time": Case(
        "axes_mixed", "batch_axis", batch_first_missing, stream="rnn.l0"
    ),
    "one step a call, over the batch": Case(
        "axes_mixed", "batch_axis", steps_over_batch, stream="rnn.l0"
    ),
    "slow signals along the batch": Case(
        "axes_mixed", "batch_axis", slow_waves, stream="rnn.l0"
    ),
    "a cell that normalises over its sequences": Case(
        "axes_mixed", "cell", normalised, stream="cell"
    ),
    "last states that are viewed": Case("axes_mixed", "view", viewed),
    "inputs far too large": Case(
        "saturated", "inputs", at_its_ends(300.0), stream="rnn.l0"
    ),
    "recurrent weights all positive": Case(
        "saturated",
        "weights",
        at_its_ends(1.0, 1.5),
        stream="rnn.l0",
        remedy=ORTHOGONAL,
    ),
    "inputs and recurrent weights at their ends": Case(
        "saturated", None, at_its_ends(300.0, 3.0), stream="rnn.l0"
    ),
    "states that are driven to their ends": Case(
        "saturated", "rate", driven_there, stream="rnn.l0"
    ),
    "targets by chance": Case("not_learning", None, by_chance),
    "an eps above the gradients": Case("not_learning", "eps", behind_eps),
    "an optimizer of nothing": Case("not_updating", "no_step", of_another(False)),
    "an optimizer of a copy": Case(
        "not_updating", "stale_parameters", of_another(True)
    ),
    "a read-out that nobody trains": Case(
        "not_updating", "not_in_optimizer", head_left_out
    ),
    "a rate that becomes 1": Case(
        "lr_too_high", "schedule", to_one, stream="rnn.l0", onset=20
    ),
    "a clip behind the step": Case(
        "lr_too_high",
        "clip_order",
        clipped_late(0, 20.0),
        stream="rnn.l0",
        beside=frozenset({"saturated"}),
    ),
    "a clip behind a step that saturates": Case(
        "saturated", "clip_order", driven_late, stream="rnn.l0"
    ),
    "a clip behind the step, and a loss that weighs more": Case(
        "lr_too_high",
        "clip_order",
        clipped_late(120, 8.0),
        stream="rnn.l0",
        onset=120,
        beside=frozenset({"saturated"}),
    ),
    "a rate that grows": Case(
        "loss_divergence",
        "lr",
        raised_bit_by_bit,
        onset=120,
        beside=frozenset({"lr_too_high"}),
    ),
    "weights that are loaded": Case("loss_divergence", "loaded", loaded, onset=120),
    "a weight decay that leaves nothing": Case(
        "loss_divergence",
        "weight_decay",
        decayed,
        onset=120,
        beside=frozenset({"lr_too_high"}),
    ),
    "a root of what is negative": Case(
        "nonfinite", "forward", broken("forward"), onset=20
    ),
    "an exponential of what is large": Case(
        "nonfinite", "overflow", broken("overflow"), onset=20
    ),
    "a logarithm of 0 as the loss": Case("nonfinite", "loss", broken("loss"), onset=20),
    "a weight that is NaN": Case("nonfinite", "weights", broken("weights"), onset=20),
    "states of another batch": Case("state_carried", "carried", carried),
    "a graph of an earlier step": Case("graph_kept", "graph", kept),
    "evaluation mode": Case("eval_mode", "eval", evaluating),
}
