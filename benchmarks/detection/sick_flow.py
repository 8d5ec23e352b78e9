"""Sick runs in which no gradient reaches the first steps; else: the control."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.detection import truth
from benchmarks.detection.case import Case, Draw, Label, family
from benchmarks.detection.truth import Truth, compared
from testbed.nets import CellLoop, Loss, Reader, classes
from testbed.tasks import Pair, recall
from testbed.weights import F, I, Z, bias, orthogonal, recurrent, remembering

Layer = Callable[..., nn.RNNBase]

SYMBOLS, RATE = 4, 1e-3
VANISHING = 720


def net(draw: Draw, layer: Layer, inputs: int = SYMBOLS, **more: Any) -> Reader:
    """Return a reader around a layer of a size of the draw."""
    outputs = more.pop("outputs", SYMBOLS)
    rnn = layer(inputs, draw.between(20, 40), **more)
    return Reader(draw.module_name(), rnn, outputs)


def streams(model: Any) -> list[str]:
    """Return the names of the streams of a reader, or of a cell's."""
    if not isinstance(model.layer, nn.RNNBase):
        return [model.name]
    return [
        f"{model.name}.{name.removeprefix('weight_hh_')}"
        for name, _ in model.layer.named_parameters()
        if name.startswith("weight_hh")
    ]


def adam(model: nn.Module, rate: float = RATE) -> torch.optim.Optimizer:
    """Return what trains most of these."""
    return torch.optim.Adam(model.parameters(), lr=rate)


FINER = {
    "lr": ("schedule",),
    "frozen": ("schedule",),
    "input_scale": ("inputs",),
    "large_weights": ("weights",),
    "saturation": ("inputs", "weights"),
}
"""Causes that a kind or a cause of today names more precisely."""


def labelled(
    kind: str,
    measure: Truth,
    model: Any,
    batches: Any,
    *causes: str,
    shown: Iterable[str],
    steps: int,
    onset: int = 0,
    loss: Loss = classes,
    others: Iterable[str] = (),
    same: Iterable[str] = (),
    curable: bool = True,
    **more: Any,
) -> Case:
    """Return a sick case; what trains it is Adam, if nothing else is given."""
    finer = {name for cause in causes for name in FINER.get(cause, ())}
    if kind == "vanishing" and finer:
        same = (*same, "saturated")
    label = Label(
        kind=kind,
        causes=frozenset(causes) | finer,
        streams=frozenset(shown),
        onset=onset,
        others=frozenset(others),
        same=frozenset(same),
        curable=curable,
    )
    more.setdefault("optimizer", adam(model))
    return Case(
        model=model,
        batches=batches,
        loss=loss,
        label=label,
        steps=steps,
        truth=measure,
        **more,
    )


def flow(
    kind: str,
    measure: Truth,
    model: Any,
    *given: Any,
    steps: int,
    onset: int = 0,
    shown: Iterable[str] | None = None,
    settled: int | None = None,
    **more: Any,
) -> Case:
    """Return a case whose weights are looked at six times from the onset on."""
    shown = streams(model) if shown is None else shown
    case = labelled(
        kind, measure, model, *given, shown=shown, steps=steps, onset=onset, **more
    )
    begin = case.notes["settled"] = onset if settled is None else settled
    early = {0, onset} if begin else {0}
    truth.keep(case, early | {*range(begin, steps, (steps - begin) // 6)})
    return case


vanishing = partial(flow, "vanishing", truth.no_reach, steps=VANISHING)


def first(draw: Draw, length: int) -> Any:
    """Return batches in which the first symbol is to be recalled."""
    return recall(draw.source(), length, draw.between(16, 32), SYMBOLS)


@family
@compared
def vanishing_small_radius_tanh(draw: Draw, sick: bool) -> Case:
    """A tanh net of one or two layers, recurrent matrices far too small."""
    model = net(draw, nn.RNN, num_layers=draw.between(1, 2))
    recurrent(orthogonal(model.layer), lambda w: w * (0.3 if sick else 1.0))
    return vanishing(model, first(draw, draw.between(25, 35)), "small_radius")


@family
@compared
def vanishing_small_radius_cell(draw: Draw, sick: bool) -> Case:
    """The same in a cell, called in a loop."""
    cell = nn.RNNCell(SYMBOLS, draw.between(20, 40))
    recurrent(orthogonal(cell), lambda w: w * (0.3 if sick else 1.0))
    model = CellLoop(draw.module_name(), cell, SYMBOLS)
    return vanishing(model, first(draw, draw.between(25, 30)), "small_radius")


@family
@compared
def vanishing_saturation_inputs(draw: Draw, sick: bool) -> Case:
    """Inputs a hundred times too large: every tanh is at its end."""
    model = net(draw, nn.RNN)
    orthogonal(model.layer)
    scale = 100.0 if sick else 1.0
    pairs = first(draw, draw.between(25, 35))
    scaled = ((scale * x, y) for x, y in pairs)
    return vanishing(model, scaled, "saturation", "input_scale", curable=False)


@family
@compared
def vanishing_saturation_weights(draw: Draw, sick: bool) -> Case:
    """Recurrent weights that hold every tanh at its end, whatever comes."""
    model = net(draw, nn.RNN)
    orthogonal(model.layer)
    if sick:
        recurrent(model.layer, lambda w: 4 * torch.eye(len(w)))
        bias(model.layer, 2.0)
    pairs = first(draw, draw.between(25, 35))
    return vanishing(model, pairs, "saturation", "large_weights")


@family
@compared
def vanishing_forget_gate(draw: Draw, sick: bool) -> Case:
    """An LSTM whose forget gates are shut."""
    length = draw.between(25, 35)
    model = net(draw, nn.LSTM)
    remembering(model.layer, length)
    if sick:
        bias(model.layer, 0.0, I)
        bias(model.layer, -5.0, F)
    return vanishing(model, first(draw, length), "forget_gate")


@family
@compared
def vanishing_update_gate(draw: Draw, sick: bool) -> Case:
    """A GRU whose update gates keep nothing."""
    length = draw.between(25, 35)
    model = net(draw, nn.GRU)
    remembering(model.layer, length)
    if sick:
        bias(model.layer, -5.0, Z)
    return vanishing(model, first(draw, length), "update_gate")


@family
@compared
def vanishing_horizon_tanh(draw: Draw, sick: bool) -> Case:
    """A tanh net as PyTorch makes it, and a symbol to recall 60 to 80 steps later."""
    model = net(draw, nn.RNN)
    if not sick:
        orthogonal(model.layer)
    pairs = first(draw, draw.between(60, 80))
    return vanishing(model, pairs, "horizon_too_long", "small_radius")


def _horizon(draw: Draw, sick: bool, layer: Layer) -> Case:
    length = draw.between(60, 80)
    model = net(draw, layer)
    if not sick:
        remembering(model.layer, length)
    pairs, optimizer = first(draw, length), adam(model, 2 * RATE)
    return vanishing(model, pairs, "horizon_too_long", optimizer=optimizer)


@family
@compared
def vanishing_horizon_lstm(draw: Draw, sick: bool) -> Case:
    """An LSTM as PyTorch makes it, and the same."""
    return _horizon(draw, sick, nn.LSTM)


@family
@compared
def vanishing_horizon_gru(draw: Draw, sick: bool) -> Case:
    """A GRU as PyTorch makes it, and the same."""
    return _horizon(draw, sick, nn.GRU)


@family
@compared
def vanishing_padding(draw: Draw, sick: bool) -> Case:
    """The state is read behind 60 to 80 steps of zeros."""
    model = net(draw, draw.one_of(nn.RNN, nn.LSTM))
    padding = draw.between(60, 80) if sick else 0

    def padded(model: nn.Module, batch: Pair) -> Tensor:
        x, y = batch
        return classes(model, (torch.cat([x, x.new_zeros(padding, *x.shape[1:])]), y))

    pairs = first(draw, draw.between(4, 6))
    return vanishing(model, pairs, "padding", loss=padded, curable=False)


@family
@compared
def vanishing_truncation(draw: Draw, sick: bool) -> Case:
    """The state is detached every few steps of a sequence."""
    model = net(draw, nn.RNN)
    orthogonal(model.layer)
    length = draw.between(25, 35)
    chunk = draw.between(8, 10) if sick else length

    def in_pieces(model: Any, batch: Pair) -> Tensor:
        x, y = batch
        *early, last = x.split(chunk)
        state = None
        for piece in early:
            state = model.layer(piece, state)[1].detach()
        return cross_entropy(model.head(model.layer(last, state)[0][-1]), y)

    return vanishing(
        model,
        first(draw, length),
        "truncation",
        loss=in_pieces,
        others=["truncated"],
        curable=False,
    )


@family
@compared
def vanishing_drift_decay(draw: Draw, sick: bool) -> Case:
    """The weight decay of the recurrent layer is raised a thousandfold in mid-run."""
    model = net(draw, nn.RNN)
    orthogonal(model.layer)
    onset = draw.between(200, 250)
    parts = [{"params": [*m.parameters()]} for m in (model.layer, model.head)]
    optimizer = torch.optim.AdamW(parts, lr=RATE, weight_decay=0.03)

    def before(number: int) -> None:
        if sick and number == onset:
            optimizer.param_groups[0]["weight_decay"] = 30.0

    return vanishing(
        model,
        first(draw, draw.between(25, 35)),
        "drift",
        "small_radius",
        onset=onset,
        settled=onset + 100,
        optimizer=optimizer,
        before=before,
        others=["drift"],
    )
