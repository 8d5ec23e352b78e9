"""The loop, the data and the precision."""

import torch
from torch import nn
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    mse_loss,
    nll_loss,
    one_hot,
)

from testbed.nets import classes
from testbed.weights import orthogonal
from tests.causes.run import HIDDEN, Case, Run, adam, looped, net, symbols


def plain(model, steps, optimizer=None, pairs=None, **more):
    """A run in which a symbol two steps before the end is wanted."""
    return Run(
        model=model,
        batches=symbols(8, 2) if pairs is None else pairs,
        optimizer=adam(model) if optimizer is None else optimizer,
        steps=steps,
        **more,
    )


def from_step(begin, change, end=10**6, pairs=None):
    """Yield batches that are changed from one step on, up to another."""
    for step, (x, y) in enumerate(symbols(8, 2) if pairs is None else pairs):
        yield change(x, y) if begin <= step < end else (x, y)


def nan_data(begin, sequence=0, scale=None, known=True):
    """From one step on, one sequence of the batch holds a NaN."""

    def broken(x, y):
        x = x.clone()
        x[3, sequence, 1] = torch.nan
        return x, y

    def build(sick):
        model = net(nn.LSTM, bidirectional=True)
        pairs = from_step(begin if sick else 99, broken)
        return plain(model, begin + 20, pairs=pairs, known=known, scaler=scaler(scale))

    return build


def nan_backward(known):
    """A distance by a root, of two sequences that are one and the same."""

    def twins(x, y):
        x = x.clone()
        x[:, 1] = x[:, 0]
        return x, y

    def loss(model, batch):
        x, y = batch
        state = None
        for row in x:
            state = model.layer(row, state)
        apart = (state[0] - state[1]).square().sum().sqrt()
        return cross_entropy(model.head(state), y) - 1e-3 * apart

    def build(sick):
        pairs = from_step(20 if sick else 99, twins)
        return plain(looped(nn.GRUCell), 40, pairs=pairs, loss=loss, known=known)

    return build


def noisy(sick):
    """Noise is added to the gradients, divided by a deviation that becomes 0."""
    model = net(nn.LSTM)
    weight = model.rnn.weight_hh_l0
    generator = torch.Generator().manual_seed(1)

    def add_noise(step):
        deviation = 0.0 if sick and step >= 20 else 1.0
        noise = torch.randn(weight.shape, generator=generator)
        weight.grad += 1e-4 * (noise * deviation) / deviation

    return plain(model, 40, after=add_noise)


def scaler(scale):
    if scale is None:
        return None
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)


def overflow(sick):
    """A sigmoid by hand, in float16: exp overflows once a unit is closed."""
    model = net(nn.GRU)
    model.gate = nn.Linear(HIDDEN, HIDDEN)

    def loss(model, batch):
        x, y = batch
        with torch.autocast("cpu", torch.float16):
            h = model.layer(x)[0][-1]
            closed = -model.gate(h)
            opened = 1 / (1 + closed.exp()) if sick else (-closed).sigmoid()
            return cross_entropy(model.head(h * opened), y)

    @torch.no_grad()
    def before(step):
        if step == 10:
            model.gate.bias[3] = -25.0

    return plain(model, 30, loss=loss, before=before, scaler=scaler(2.0**10))


def overflow_unscaled(sick):
    """Gradients too large for float16, and no scaler."""
    model = net(nn.RNN)

    def loss(model, batch):
        with torch.autocast("cpu", torch.float16):
            large = 1e7 if sick else 1.0
            return large * classes(model, batch)

    return plain(model, 10, loss=loss)


def spike(sick):
    """One batch of a regression has targets a thousand times too large."""
    model = net(nn.LSTM, outputs=1)

    def values(x, y):
        return x, y.float()

    pairs = from_step(0, values, pairs=symbols(8, 2))
    pairs = from_step(60, lambda x, y: (x, 1000 * y), 60 + sick, pairs)

    def loss(model, batch):
        return mse_loss(model(batch[0])[:, 0], batch[1])

    return plain(model, 75, pairs=pairs, loss=loss)


def rate_one(sick):
    """A rate of 1 under a weight decay that keeps every update large."""
    model = net(nn.RNN)
    orthogonal(model.layer)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=1.0 if sick else 1e-3,
        weight_decay=0.9,
        betas=(0.5, 0.95),
    )
    return plain(model, 40, optimizer)


def too_tight(sick):
    model = looped(nn.LSTMCell)
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    return plain(model, 30, optimizer, clip=1e-6 if sick else 1.0)


def clip_of_scaled(sick):
    """A clip at 1 of gradients that are scaled by 65536."""
    model = net(nn.GRU)
    return plain(
        model,
        30,
        torch.optim.SGD(model.parameters(), 0.3),
        clip=1.0,
        clip_scaled=sick,
        scaler=scaler(2.0**16),
    )


def other_targets(sick):
    """From step 120 on the classes belong to other sequences."""
    model = net(nn.GRU)
    pairs = from_step(120 if sick else 999, lambda x, y: (x, y.roll(1)))
    return plain(model, 220, adam(model, 1e-2), pairs)


def rate_raised(sick):
    """From step 120 on the rate is too high."""
    model = net(nn.LSTM)
    optimizer = adam(model, 1e-2)

    def before(step):
        if sick and step == 120:
            optimizer.param_groups[0]["lr"] = 0.4

    return plain(model, 220, optimizer, before=before)


def thrown_out(sick):
    """Four batches have wrong classes and weigh 300; Adam's steps are short thereafter.

    Four, because fewer are a spike.
    """
    model, steps = net(nn.GRU), iter(range(220))

    def loss(model, batch):
        x, y = batch
        if sick and 120 <= next(steps) < 124:
            return 300.0 * classes(model, (x, (y + 1) % 4))
        return classes(model, batch)

    return plain(model, 220, adam(model, 1e-2), loss=loss)


def underflow(sick):
    """A loss of little weight in float16, without a scaler."""
    model = net(nn.RNN)

    def loss(model, batch):
        with torch.autocast("cpu", torch.float16, enabled=sick):
            return 1e-6 * classes(model, batch)

    optimizer = torch.optim.Adam(model.parameters(), 1e-3, eps=1e-14)
    return plain(model, 25, optimizer, loss=loss)


def never_cleared(sick):
    model = net(nn.LSTM)
    return plain(model, 25, adam(model, 3e-3), clears=not sick)


def cleared_early(to_none):
    def build(sick):
        model = net(nn.GRU)
        rate = 5e-3 if to_none else 0.5
        kind = torch.optim.Adam if to_none else torch.optim.SGD
        optimizer = kind(model.parameters(), rate)

        def after(step):
            if sick and step >= 10:
                optimizer.zero_grad(set_to_none=to_none)

        return plain(model, 30, optimizer, after=after)

    return build


def repeated(sick):
    model = net(nn.RNN, nonlinearity="relu")
    one = next(symbols(8, 2))
    pairs = (one for _ in range(200)) if sick else None
    return plain(model, 80, pairs=pairs)


def of_loss(wrong, right=classes, outputs=4):
    """A loss that does not fit what the last layer returns."""

    def build(sick):
        loss = wrong if sick else right
        return plain(net(nn.LSTM, outputs=outputs), 40, loss=loss)

    return build


def over_batch(model, batch):
    return nll_loss(model(batch[0]).log_softmax(0), batch[1])


def normalised(model, batch):
    return nll_loss(model(batch[0]).log_softmax(-1), batch[1])


def each_class(change):
    def loss(model, batch):
        y = one_hot(batch[1], 4).float()
        return binary_cross_entropy_with_logits(change(model(batch[0])), y)

    return loss


def column(model, batch):
    return mse_loss(model(batch[0]), batch[1].float())


def row(model, batch):
    return mse_loss(model(batch[0])[:, 0], batch[1].float())


CASES = {
    "a softmax before cross entropy": Case(
        "loss_mismatch",
        "softmax_twice",
        of_loss(lambda m, b: cross_entropy(m(b[0]).softmax(-1), b[1])),
    ),
    "a sigmoid before a loss that has one": Case(
        "loss_mismatch",
        "sigmoid_twice",
        of_loss(each_class(torch.sigmoid), each_class(lambda o: o)),
    ),
    "a negative log-likelihood of probabilities": Case(
        "loss_mismatch",
        "probabilities",
        of_loss(lambda m, b: nll_loss(m(b[0]).softmax(-1), b[1]), normalised),
    ),
    "a negative log-likelihood of scores": Case(
        "loss_mismatch",
        "scores",
        of_loss(lambda m, b: nll_loss(m(b[0]), b[1]), normalised),
    ),
    "a softmax over the batch": Case(
        "loss_mismatch", "axis", of_loss(over_batch, normalised)
    ),
    "a ReLU before cross entropy": Case(
        "loss_mismatch",
        "relu",
        of_loss(lambda m, b: cross_entropy(m(b[0]).relu(), b[1])),
    ),
    "a column of outputs and a row of targets": Case(
        "target_broadcast", "shape", of_loss(column, row, outputs=1)
    ),
    "an input that is NaN": Case("nonfinite", "nan_data", nan_data(20), onset=20),
    "an input that is NaN as states are looked at, the loss not known": Case(
        "nonfinite", "nan_data", nan_data(50, known=False), onset=50
    ),
    "an input that is NaN, under a scaler": Case(
        "nonfinite", "nan_data", nan_data(20, scale=2.0**10), onset=20
    ),
    "an input that is NaN, under a scaler, where nobody looks": Case(
        "nonfinite", "nan_data", nan_data(20, 2, 2.0**10), onset=20
    ),
    "noise that is divided by 0": Case("nonfinite", "after_backward", noisy, onset=20),
    "a root at 0": Case("nonfinite", "nan_backward", nan_backward(True), onset=20),
    "a root at 0, the loss not known": Case(
        "nonfinite", None, nan_backward(False), onset=20
    ),
    "a sigmoid by hand in float16": Case(
        "nonfinite", "fp16_overflow", overflow, onset=10
    ),
    "gradients too large for float16": Case(
        "nonfinite", "fp16_overflow", overflow_unscaled
    ),
    "a batch of targets a thousand times too large": Case(
        "spike", "bad_batch", spike, onset=60, remedy="clip.LogZClip"
    ),
    "a rate of 1": Case("lr_too_high", "lr", rate_one, stream="rnn.l0"),
    "a clip at a millionth": Case("over_clipping", "clip", too_tight),
    "a clip of scaled gradients": Case(
        "over_clipping", "scaled_gradients", clip_of_scaled
    ),
    "targets of other sequences": Case(
        "loss_divergence", "data", other_targets, onset=120
    ),
    "a rate that is raised 40 times": Case(
        "loss_divergence",
        "schedule",
        rate_raised,
        onset=120,
        beside=frozenset({"lr_too_high"}),
    ),
    "four batches that throw the weights out": Case(
        "loss_divergence", "bad_batch", thrown_out, onset=120
    ),
    "a small loss in float16": Case(
        "underflow", "fp16_underflow", underflow, stream="rnn.l0"
    ),
    "gradients that nobody clears": Case("not_cleared", "zero_grad", never_cleared),
    "gradients that are None before the step": Case(
        "cleared_early", "zero_grad", cleared_early(True), onset=10
    ),
    "gradients that are 0 before the step": Case(
        "cleared_early", "zero_grad", cleared_early(False), onset=10
    ),
    "one batch for ever": Case("repeated_batch", "data", repeated),
}
