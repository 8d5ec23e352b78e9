"""Sick runs whose loop, data or precision is wrong, whatever the net is."""

from collections.abc import Iterator
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
    labelled,
    net,
    streams,
)
from benchmarks.detection.truth import compared
from testbed.nets import Reader, classes, values
from testbed.tasks import Pair, adding, digits, recall
from testbed.weights import orthogonal

STEPS = 300


def looped(
    *given: Any,
    shown: tuple[str, ...] = (),
    counted: tuple[str, ...] = (),
    steps: int = STEPS,
    curable: bool = False,
    **more: Any,
) -> Case:
    """Return a case in which the gradients of some weights are counted."""
    case = labelled(*given, shown=shown, steps=steps, curable=curable, **more)
    if counted:
        truth.count(case, counted)
    return case


def hh(model: Any, suffix: str = "l0") -> str:
    """Return the name of a recurrent weight."""
    return f"{model.name}.weight_hh_{suffix}"


def rows(draw: Draw, layer: Any) -> tuple[Reader, Iterator[Pair]]:
    """Return a net that reads digits by row, and the digits."""
    model = net(draw, layer, 8, outputs=10)
    return model, digits(draw.source(), draw.between(16, 32), rows=True)


@family
@compared
def no_gradient_detached_output(draw: Draw, sick: bool) -> Case:
    """What the head gets of a layer is detached."""
    model, batches = rows(draw, draw.one_of(nn.RNN, nn.LSTM, nn.GRU))

    def read(model: Any, batch: Pair) -> Tensor:
        last = model.layer(batch[0])[0][-1]
        return cross_entropy(model.head(last.detach() if sick else last), batch[1])

    return looped(
        "no_gradient",
        truth.no_gradient,
        model,
        batches,
        "detached",
        loss=read,
        shown=tuple(streams(model)),
        counted=(hh(model),),
    )


@family
@compared
def no_gradient_unused_module(draw: Draw, sick: bool) -> Case:
    """A layer was made and is left out of the forward pass."""
    model, batches = rows(draw, nn.GRU)

    def read(model: Any, batch: Pair) -> Tensor:
        out = batch[0].new_zeros(1, len(batch[1]), model.layer.hidden_size)
        out[..., :8] = batch[0][-1]
        if not sick:
            out = model.layer(batch[0])[0]
        return cross_entropy(model.head(out[-1]), batch[1])

    return looped(
        "no_gradient",
        truth.no_gradient,
        model,
        batches,
        "unused",
        loss=read,
        shown=tuple(streams(model)),
        counted=(hh(model),),
    )


@family
@compared
def no_gradient_readout_index(draw: Draw, sick: bool) -> Case:
    """``out[-1]`` of a bidirectional net: its reverse direction has read one step."""
    model = net(draw, draw.one_of(nn.RNN, nn.GRU), bidirectional=True)

    def read(model: Any, batch: Pair) -> Tensor:
        out, last = model.layer(batch[0])
        read = out[-1] if sick else torch.cat([*last], -1)
        return cross_entropy(model.head(read), batch[1])

    return looped(
        "no_gradient",
        truth.no_gradient,
        model,
        first(draw, draw.between(50, 60)),
        "readout_index",
        loss=read,
        others=("vanishing",),
        shown=(f"{model.name}.l0_reverse",),
        counted=(hh(model, "l0_reverse"),),
    )


def _unmoved(draw: Draw, sick: bool, cause: str) -> Case:
    model, batches = rows(draw, draw.one_of(nn.RNN, nn.GRU))
    layer, head = [*model.layer.parameters()], [*model.head.parameters()]
    rate = 0.0 if sick and cause == "frozen" else RATE
    groups: list[Any] = [{"params": head}, {"params": layer, "lr": rate}]
    kept = groups[:1] if sick and cause == "not_in_optimizer" else groups
    return looped(
        "not_updating",
        truth.no_update,
        model,
        batches,
        cause,
        shown=tuple(streams(model)),
        counted=(hh(model),),
        optimizer=torch.optim.Adam(kept, lr=RATE),
    )


@family
@compared
def not_updating_not_in_optimizer(draw: Draw, sick: bool) -> Case:
    """The optimizer was given the head alone."""
    return _unmoved(draw, sick, "not_in_optimizer")


@family
@compared
def not_updating_rate_zero(draw: Draw, sick: bool) -> Case:
    """The recurrent layer's group has a learning rate of 0."""
    return _unmoved(draw, sick, "frozen")


@family
@compared
def lr_too_high_tanh(draw: Draw, sick: bool) -> Case:
    """A rate of 1 under a weight decay that keeps every update large."""
    model, batches = rows(draw, nn.RNN)
    orthogonal(model.layer)
    rate = 1.0 if sick else RATE
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=rate, weight_decay=0.9, betas=(0.5, 0.95)
    )
    return looped(
        "lr_too_high",
        truth.too_large_steps,
        model,
        batches,
        "lr",
        others=("exploding", "vanishing", "drift", "spike"),
        same=("loss_divergence",),
        counted=(hh(model),),
        optimizer=optimizer,
    )


@family
@compared
def over_clipping_sgd(draw: Draw, sick: bool) -> Case:
    """SGD, and a clip at a millionth."""
    model, batches = rows(draw, draw.one_of(nn.RNN, nn.GRU, nn.LSTM))
    return looped(
        "over_clipping",
        truth.clipped_away,
        model,
        batches,
        "clip",
        clip=1e-6 if sick else 1.0,
        counted=(hh(model),),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.3),
    )


def _from(batches: Any, wrong: Any, begin: int, end: int = STEPS) -> Iterator[Pair]:
    for number, (x, y) in enumerate(batches):
        yield wrong(x, y) if begin <= number < end else (x, y)


@family
@compared
def spike_bad_batch(draw: Draw, sick: bool) -> Case:
    """One batch of a regression has targets a thousand times too large."""
    model = net(draw, draw.one_of(nn.LSTM, nn.GRU), 2, outputs=1)
    onset = draw.between(60, 90)
    pairs = adding(draw.source(), draw.between(15, 25), draw.between(16, 32))
    batches = _from(pairs, lambda x, y: (x, 1000 * y), onset, onset + sick)
    return looped(
        "spike",
        truth.stands_out,
        model,
        batches,
        "bad_batch",
        loss=values,
        onset=onset,
    )


@family
@compared
def nonfinite_nan_data(draw: Draw, sick: bool) -> Case:
    """From one batch on, one input is NaN."""
    model, digits = rows(draw, draw.one_of(nn.RNN, nn.GRU, nn.LSTM))
    onset = draw.between(100, 200)

    def broken(x: Tensor, y: Tensor) -> Pair:
        x = x.clone()
        x[0, 0, 0] = torch.nan
        return x, y

    batches = _from(digits, broken, onset, STEPS if sick else onset)
    measure = truth.breaks(finite_loss=False)
    return looped("nonfinite", measure, model, batches, "nan_data", onset=onset)


@family
@compared
def nonfinite_nan_backward(draw: Draw, sick: bool) -> Case:
    """The distance of two sequences, by a root, and from one batch on two are one."""
    model, digits = rows(draw, draw.one_of(nn.RNN, nn.GRU))
    onset = draw.between(100, 200)

    def twins(x: Tensor, y: Tensor) -> Pair:
        x, y = x.clone(), y.clone()
        x[:, 1], y[1] = x[:, 0], y[0]
        return x, y

    def spread(model: Any, batch: Pair) -> Tensor:
        h = model.layer(batch[0])[0][-1]
        apart = (h[0] - h[1]).square().sum().sqrt()
        return cross_entropy(model.head(h), batch[1]) - 0.001 * apart

    noise = draw.source()
    unlike = ((x + 0.01 * torch.randn(x.shape, generator=noise), y) for x, y in digits)
    batches = _from(unlike, twins, onset, STEPS if sick else onset)
    measure = truth.breaks(finite_loss=True)
    return looped(
        "nonfinite", measure, model, batches, "nan_backward", onset=onset, loss=spread
    )


@family
@compared
def loss_divergence_shuffled_targets(draw: Draw, sick: bool) -> Case:
    """From mid-run on the classes belong to other sequences."""
    model = net(draw, draw.one_of(nn.LSTM, nn.GRU))
    onset, lag = draw.between(200, 230), draw.between(1, 3)
    pairs = recall(draw.source(), 15, draw.between(16, 32), SYMBOLS, lag)
    batches = _from(pairs, lambda x, y: (x, y.roll(1)), onset, 400 if sick else onset)
    return looped(
        "loss_divergence",
        truth.loss_rises,
        model,
        batches,
        "data",
        onset=onset,
        steps=400,
        optimizer=adam(model, 5 * RATE),
    )


@family
@compared
def underflow_float16(draw: Draw, sick: bool) -> Case:
    """A loss of little weight in float16, without a scaler."""
    model, batches = rows(draw, draw.one_of(nn.RNN, nn.GRU))

    def small(model: nn.Module, batch: Pair) -> Tensor:
        half = sick and next(model.parameters()).dtype == torch.float32
        with torch.autocast("cpu", torch.float16, enabled=half):
            return 1e-6 * classes(model, batch)

    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, eps=1e-14)
    return looped(
        "underflow",
        truth.flushed(hh(model)),
        model,
        batches,
        "fp16_underflow",
        loss=small,
        shown=tuple(streams(model)),
        counted=(hh(model),),
        optimizer=optimizer,
        others=("no_gradient",),
    )
