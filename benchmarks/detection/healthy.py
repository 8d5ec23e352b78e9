"""Healthy runs as anyone has them: every kind of net, and the usual tasks.

Also what all healthy families share. How each is known to be healthy: its losses and
gradients are finite throughout, and it learns what there is to be learnt. That is a
loss of 80 % of its start or less, and more wherever a constant would earn that much:
the adding problem below half the variance of its sums (0.083), characters below 3 nats
(their entropy without context is 3.25).
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.detection.case import Batch, Case, Draw, History, Label, Measured
from benchmarks.detection.case import family as family
from benchmarks.detection.truth import Truth, keep, reach, unrolled
from gradwatch.init import chrono_, identity_, orthogonal_
from testbed import tasks
from testbed.nets import CellLoop, Reader, classes, values

HALF_OF_SUMS = 0.5 / 6
CHARACTERS = 3.0

Fact = Callable[[Case, History], float]
Bounds = tuple[Fact, float, float]


# ---- how they are known to be healthy


def learned(case: Case, history: History) -> Measured:
    """Finite throughout, and the loss ends at 80 % of its start or lower."""
    share = history.final / (sum(history.losses[:20]) / 20)
    holds = history.nonfinite is None and history.fell_to(0.8)
    return Measured(holds, {"share": share, "final": history.final})


def learned_and(**facts: Bounds) -> Truth:
    """Return what asks for :func:`learned`, and for numbers between two bounds."""

    def truth(case: Case, history: History) -> Measured:
        holds, found = learned(case, history)
        found = dict(found)
        for name, (fact, low, high) in facts.items():
            found[name] = fact(case, history)
            holds = holds and low <= found[name] <= high
        return Measured(holds, found)

    return truth


def final(case: Case, history: History) -> float:
    """Mean loss of the last 20 steps."""
    return history.final


def ends_below(loss: float) -> Truth:
    """Return what asks for a last loss that no constant has."""
    return learned_and(end=(final, 0.0, loss))


def rho(case: Case, history: History) -> float:
    """Largest modulus of an eigenvalue of W_hh, of all layers."""
    weights = [w for name, w in case.model.named_parameters() if "weight_hh" in name]
    radii = [torch.linalg.eigvals(w.detach().double()).abs().max() for w in weights]
    return max(float(radius) for radius in radii)


def reach_begin(case: Case, history: History) -> float:
    """Log10 of the first adjoint by the largest, before the first step."""
    loss, streams, _ = unrolled(case, case.notes["weights"][0])
    return min(reach(loss, stream) for stream in streams.values())


def reach_end(case: Case, history: History) -> float:
    """Log10 of the first adjoint by the largest, after the last step."""
    loss, streams, _ = unrolled(case)
    return min(reach(loss, stream) for stream in streams.values())


def dead(case: Case, history: History) -> float:
    """Share of the ReLU units that no step of 5 batches activates."""
    _, streams, _ = unrolled(case)
    active = [torch.zeros(1) for _ in streams]
    for _ in range(5):
        _, streams, _ = unrolled(case)
        for k, stream in enumerate(streams.values()):
            states = torch.stack(stream.states[1:])
            active[k] = active[k] + (states > 0).flatten(0, 1).sum(0)
    return max((counts == 0).double().mean().item() for counts in active)


OPENS: dict[str, Bounds] = {
    "reach_begin": (reach_begin, -math.inf, -6.0),
    "reach_end": (reach_end, -4.5, 0.0),
}
ALIVE: dict[str, Bounds] = {"dead": (dead, 0.0, 0.45)}


# ---- what they are made of


def run(
    model: nn.Module,
    batches: Iterator[Batch],
    *,
    loss: Callable[[nn.Module, Any], Tensor] = classes,
    lr: float = 1e-3,
    optimizer: torch.optim.Optimizer | None = None,
    steps: int = 300,
    truth: Truth = learned,
    **more: Any,
) -> Case:
    """Return a healthy case; Adam where no optimizer is given."""
    case = Case(
        model=model,
        optimizer=optimizer or torch.optim.Adam(model.parameters(), lr),
        batches=batches,
        loss=loss,
        label=more.pop("label", Label()),
        steps=steps,
        truth=truth,
        **more,
    )
    keep(case, [0])
    return case


def reader(
    draw: Draw,
    kind: type[nn.RNNBase],
    inputs: int,
    outputs: int,
    *,
    hidden: tuple[int, int] = (24, 48),
    every: bool = False,
    vocabulary: int = 0,
    **options: Any,
) -> Reader:
    """Return a recurrent module of a drawn size and name, with its readout."""
    rnn = kind(inputs, draw.between(*hidden), **options)
    return Reader(draw.module_name(), rnn, outputs, every=every, vocabulary=vocabulary)


def pixels(draw: Draw, kind: type[nn.RNNBase], **options: Any) -> Reader:
    """Return a net that reads digits pixel by pixel."""
    return reader(draw, kind, 1, 10, **options)


def by_row(draw: Draw, kind: type[nn.RNNBase], **options: Any) -> Reader:
    """Return a net that reads digits row by row."""
    return reader(draw, kind, 8, 10, **options)


def speller(draw: Draw, kind: type[nn.RNNBase], **options: Any) -> Reader:
    """Return a character model."""
    size = draw.between(16, 32)
    return reader(draw, kind, size, 128, every=True, vocabulary=128, **options)


def digits(draw: Draw, *, rows: bool = False) -> Iterator[Batch]:
    """Return digits, a drawn number at a time."""
    return tasks.digits(draw.source(), draw.between(12, 32), rows=rows)


def text(draw: Draw) -> Iterator[Batch]:
    """Return pieces of text of a drawn length."""
    return tasks.characters(draw.source(), draw.between(25, 40), draw.between(12, 24))


# ---- digits


@family
def healthy_digits_lstm(draw: Draw) -> Case:
    """An LSTM reads digits pixel by pixel; Adam 1e-3."""
    model = pixels(draw, nn.LSTM, hidden=(32, 64))
    return run(model, digits(draw), steps=900, truth=learned_and(**OPENS))


@family
def healthy_digits_gru(draw: Draw) -> Case:
    """A GRU reads digits pixel by pixel; Adam 2e-3."""
    model = pixels(draw, nn.GRU)
    return run(model, digits(draw), lr=2e-3, steps=600, truth=learned_and(**OPENS))


@family
def healthy_digits_tanh(draw: Draw) -> Case:
    """A tanh RNN of PyTorch's own weights reads digits pixel by pixel; Adam 1e-3."""
    model = pixels(draw, nn.RNN, hidden=(40, 64))
    return run(model, digits(draw), steps=1200, truth=learned_and(**OPENS))


@family
def healthy_digits_orthogonal_tanh(draw: Draw) -> Case:
    """An orthogonal tanh RNN reads digits pixel by pixel; Adam 1e-3."""
    model = pixels(draw, nn.RNN, hidden=(32, 64))
    orthogonal_(model)
    return run(model, digits(draw), steps=600)


@family
def healthy_rows_gru(draw: Draw) -> Case:
    """A GRU reads digits row by row; Adam 2e-3."""
    return run(by_row(draw, nn.GRU), digits(draw, rows=True), lr=2e-3)


@family
def healthy_rows_identity_relu(draw: Draw) -> Case:
    """A ReLU RNN that begins as the identity reads digits row by row; Adam 1e-3."""
    model = by_row(draw, nn.RNN, nonlinearity="relu")
    identity_(model, draw.one_of(0.9, 1.0))
    return run(model, digits(draw, rows=True), truth=learned_and(**ALIVE))


@family
def healthy_rows_stacked_dropout(draw: Draw) -> Case:
    """Three layers of LSTM with dropout between them, rows of digits; Adam 3e-3."""
    dropout = draw.one_of(0.1, 0.2, 0.3)
    model = by_row(draw, nn.LSTM, num_layers=3, dropout=dropout)
    return run(model, digits(draw, rows=True), lr=3e-3, steps=400)


@family
def healthy_rows_two_layers_tanh(draw: Draw) -> Case:
    """Two layers of tanh RNN, rows of digits; Adam 1e-3."""
    return run(by_row(draw, nn.RNN, num_layers=2), digits(draw, rows=True))


@family
def healthy_rows_bidirectional_gru(draw: Draw) -> Case:
    """A GRU in both directions, the last state of each read out; Adam 2e-3."""
    model = by_row(draw, nn.GRU, bidirectional=True)
    return run(model, digits(draw, rows=True), lr=2e-3)


# ---- cells in loops


@family
def healthy_cell_rnn(draw: Draw) -> Case:
    """A tanh RNNCell in a loop over the rows of digits; Adam 2e-3."""
    cell = nn.RNNCell(8, draw.between(24, 48))
    model = CellLoop(draw.module_name(), cell, 10)
    return run(model, digits(draw, rows=True), lr=2e-3)


@family
def healthy_cell_lstm(draw: Draw) -> Case:
    """An LSTMCell in a loop recalls what came a few steps ago; Adam 1e-2."""
    cell = nn.LSTMCell(4, draw.between(16, 32))
    batches = tasks.recall(draw.source(), draw.between(5, 8), draw.between(16, 32))
    return run(CellLoop(draw.module_name(), cell, 4), batches, lr=1e-2, steps=500)


@family
def healthy_cell_gru(draw: Draw) -> Case:
    """A GRUCell in a loop adds two numbers; Adam 1e-2, clipped at 1."""
    cell = nn.GRUCell(2, draw.between(24, 40))
    model = CellLoop(draw.module_name(), cell, 1)
    batches = tasks.adding(draw.source(), draw.between(8, 11), draw.between(20, 32))
    truth = ends_below(HALF_OF_SUMS)
    return run(model, batches, loss=values, lr=1e-2, steps=500, clip=1.0, truth=truth)


# ---- memory


@family
def healthy_adding_gru(draw: Draw) -> Case:
    """A GRU solves a short adding problem; Adam 1e-2, clipped at 1."""
    model = reader(draw, nn.GRU, 2, 1)
    batches = tasks.adding(draw.source(), draw.between(10, 18), draw.between(20, 32))
    truth = ends_below(HALF_OF_SUMS)
    return run(model, batches, loss=values, lr=1e-2, steps=700, clip=1.0, truth=truth)


@family
def healthy_recall_identity_relu(draw: Draw) -> Case:
    """An identity ReLU RNN recalls over some ten steps; Adam 1e-3, clipped at 1."""
    model = reader(draw, nn.RNN, 4, 4, nonlinearity="relu")
    identity_(model)
    batches = tasks.recall(draw.source(), draw.between(8, 14), draw.between(16, 32))
    return run(model, batches, steps=500, clip=1.0, truth=learned_and(**ALIVE))


@family
def healthy_recall_short_gru(draw: Draw) -> Case:
    """A GRU of PyTorch's own weights recalls over some ten steps; Adam 5e-3."""
    batches = tasks.recall(draw.source(), draw.between(8, 14), draw.between(16, 32))
    return run(reader(draw, nn.GRU, 4, 4), batches, lr=5e-3, steps=400)


@family
def healthy_recall_long_chrono_lstm(draw: Draw) -> Case:
    """An LSTM with chrono gates recalls what came first; Adam 3e-3."""
    length = draw.between(50, 90)
    model = reader(draw, nn.LSTM, 4, 4)
    chrono_(model, length)
    batches = tasks.recall(draw.source(), length, draw.between(16, 32))
    return run(model, batches, lr=3e-3, steps=900)


@family
def healthy_recall_long_chrono_gru(draw: Draw) -> Case:
    """A GRU with chrono gates recalls what came first; Adam 3e-3."""
    length = draw.between(30, 50)
    model = reader(draw, nn.GRU, 4, 4)
    chrono_(model, length)
    batches = tasks.recall(draw.source(), length, draw.between(16, 32))
    return run(model, batches, lr=3e-3, steps=600)


# ---- a loss at each step


@family
def healthy_characters_lstm(draw: Draw) -> Case:
    """An LSTM character model; Adam 5e-3, clipped at 5."""
    model = speller(draw, nn.LSTM)
    return run(
        model, text(draw), lr=5e-3, clip=5.0, steps=500, truth=ends_below(CHARACTERS)
    )


@family
def healthy_characters_orthogonal_relu(draw: Draw) -> Case:
    """A character model of an orthogonal ReLU RNN; Adam 2e-3, clipped at 1."""
    model = speller(draw, nn.RNN, nonlinearity="relu")
    orthogonal_(model)
    truth = learned_and(end=(final, 0.0, CHARACTERS), **ALIVE)
    return run(model, text(draw), lr=2e-3, clip=1.0, steps=500, truth=truth)


@family
def healthy_characters_projected(draw: Draw) -> Case:
    """A projected LSTM character model of one or two layers; Adam 5e-3."""
    layers, projected = draw.between(1, 2), draw.between(10, 16)
    model = speller(draw, nn.LSTM, num_layers=layers, proj_size=projected)
    return run(model, text(draw), lr=5e-3, steps=500, truth=ends_below(CHARACTERS))


@family
def healthy_packed_tagging(draw: Draw) -> Case:
    """An LSTM in both directions tags packed sentences; Adam 5e-3."""
    model = reader(draw, nn.LSTM, 12, 2, every=True, bidirectional=True)
    batches = tasks.tagging(draw.source(), draw.between(10, 24), draw.between(8, 16))
    return run(model, batches, lr=5e-3, steps=300)


class Streaming(nn.Module):
    """A character model that goes on from where the last batch ended, detached."""

    def __init__(self, name: str, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.name, self.state = name, None
        self.embed = nn.Embedding(128, rnn.input_size)
        self.add_module(name, rnn)
        self.head = nn.Linear(rnn.hidden_size, 128)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of the next character, of every step."""
        out, state = getattr(self, self.name)(self.embed(x), self.state)
        if isinstance(state, tuple):
            self.state: Any = tuple(one.detach() for one in state)
        else:
            self.state = state.detach()
        scores: Tensor = self.head(out)
        return scores


def _streaming(draw: Draw, kind: type[nn.RNNBase], lr: float) -> Case:
    rnn = kind(draw.between(16, 32), draw.between(24, 48))
    model = Streaming(draw.module_name(), rnn)
    length, batch = draw.between(16, 32), draw.between(8, 20)
    batches = tasks.streams_of_text(draw.source(), length, batch)
    # The alarms call this a notice: true, and no fault where every step has a loss.
    label = Label(others=frozenset({"truncated"}))
    truth = ends_below(CHARACTERS)
    return run(model, batches, lr=lr, clip=1.0, steps=500, truth=truth, label=label)


@family
def healthy_streams_of_text_lstm(draw: Draw) -> Case:
    """Truncated backpropagation through text, LSTM; Adam 5e-3, clipped at 1."""
    return _streaming(draw, nn.LSTM, 5e-3)


@family
def healthy_streams_of_text_gru(draw: Draw) -> Case:
    """Truncated backpropagation through text, GRU; Adam 5e-3, clipped at 1."""
    return _streaming(draw, nn.GRU, 5e-3)


class Translator(nn.Module):
    """An encoder, and a decoder that is begun with its last state."""

    def __init__(self, symbols: int, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols + 1, hidden)
        self.encoder = nn.GRU(hidden, hidden)
        self.decoder = nn.GRU(hidden, hidden)
        self.head = nn.Linear(hidden, symbols)

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        """Return scores of what follows each given symbol."""
        _, state = self.encoder(self.embed(x))
        out, _ = self.decoder(self.embed(given), state)
        scores: Tensor = self.head(out)
        return scores


def _reversed(
    source: torch.Generator, symbols: int, length: int, batch: int
) -> Iterator[Batch]:
    """Yield words, what the decoder is given, and the words from back to front."""
    first = torch.full((1, batch), symbols)
    while True:
        x = torch.randint(symbols, (length, batch), generator=source)
        yield x, torch.cat([first, x.flip(0)[:-1]]), x.flip(0)


def _translated(model: nn.Module, batch: Batch) -> Tensor:
    x, given, y = batch
    return cross_entropy(model(x, given).flatten(0, 1), y.flatten())


@family
def healthy_encoder_decoder(draw: Draw) -> Case:
    """A GRU encoder and decoder turn short words round; Adam 5e-3."""
    symbols = draw.between(5, 8)
    model = Translator(symbols, draw.between(32, 48))
    length, batch = draw.between(4, 6), draw.between(16, 32)
    batches = _reversed(draw.source(), symbols, length, batch)
    return run(model, batches, loss=_translated, lr=5e-3, steps=500)
