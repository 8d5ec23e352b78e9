"""Training dynamics and loops: sick optimizers and loops, each after a thread."""

from collections.abc import Iterable, Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import StepLR

from benchmarks.detection.case import Batch, Case, Draw, History, Measured, family
from benchmarks.detection.sets.c_sick import digit_rows, row_reader, sick_case
from benchmarks.detection.truth import compared
from testbed import tasks
from testbed.nets import Reader, classes


def follow(case: Case, weights: Iterable[Tensor]) -> Case:
    """Have it noted how far weights move at each step, and how many gradients are 0."""
    followed, last = list(weights), list[Tensor]()
    moves = case.notes.setdefault("moves", [])
    zeros = case.notes.setdefault("zeros", [])

    def before(number: int) -> None:
        now = [w.detach().clone() for w in followed]
        if last:
            pairs = zip(now, last, strict=True)
            moves.append(max(float((a - b).norm() / b.norm()) for a, b in pairs))
            zeros.append(sum(w.grad is None or not w.grad.any() for w in followed))
        last[:] = now

    case.before = before
    return case


class CellStack(nn.Module):
    """Cells on top of each other in a Python loop, registered or not."""

    def __init__(self, cells: list[nn.GRUCell], words: int, registered: bool) -> None:
        super().__init__()
        hidden = cells[0].hidden_size
        self.embed = nn.Embedding(words, hidden)
        self.cells: Any = nn.ModuleList(cells) if registered else cells
        self.head = nn.Linear(hidden, words)

    def forward(self, codes: Tensor) -> Tensor:
        """Return scores of the word to be recalled."""
        words = self.embed(codes)
        states = [torch.zeros_like(words[0]) for _ in self.cells]
        for below in words:
            for k, cell in enumerate(self.cells):
                below = states[k] = cell(below, states[k])
        scores: Tensor = self.head(below)
        return scores


def recalled(
    source: torch.Generator, length: int, batch: int, words: int
) -> Iterator[tasks.Pair]:
    """Yield sequences of words ``(T, B)``, the first of which is to be recalled."""
    while True:
        codes = torch.randint(words, (length, batch), generator=source)
        yield codes, codes[0]


def _left_alone(case: Case, history: History) -> Measured:
    """The weights have a gradient at each step, and never move by a bit."""
    values = {
        "steps_without": sum(case.notes["zeros"]),
        "largest_move": max(case.notes["moves"]),
    }
    return Measured(not any(values.values()), values)


@family
@compared
def c_cells_in_list(draw: Draw, sick: bool) -> Case:
    """Two GRU cells kept in a Python list: the optimizer never gets them."""
    words, hidden = draw.between(5, 7), draw.between(28, 40)
    cells = [nn.GRUCell(hidden, hidden) for _ in range(2)]
    model = CellStack(cells, words, registered=not sick)
    case = sick_case(
        "not_updating",
        "not_in_optimizer",
        model,
        torch.optim.Adam(model.parameters(), 5e-3),
        recalled(draw.source(), draw.between(9, 12), draw.between(16, 32), words),
        classes,
        _left_alone,
        "ikostrikov/pytorch-meta-optimizer/issues/11",
        steps=400,
        others=["not_cleared", "not_learning"],
    )
    return follow(case, [w for cell in cells for w in cell.parameters()])


def _rate_gone(case: Case, history: History) -> Measured:
    """From the onset on the weights have gradients and hardly move; soon not at all."""
    onset, moves = case.label.onset, case.notes["moves"]
    values = {
        "steps_without": sum(case.notes["zeros"][onset:]),
        "move_begin": max(moves[:5]),
        "move_onset": max(moves[onset:]),
        "move_later": max(moves[2 * onset :]),
    }
    still = values["move_onset"] < 1e-3 * values["move_begin"] + 1e-4
    begun = values["move_begin"] > 1e-2 and not values["steps_without"]
    return Measured(begun and still and values["move_later"] < 1e-6, values)


@family
@compared
def c_scheduler_per_batch(draw: Draw, sick: bool) -> Case:
    """A StepLR meant for epochs is stepped behind each batch of a bidirectional net."""
    model = row_reader(draw, draw.one_of(nn.GRU, nn.LSTM), bidirectional=True)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    period = draw.between(4, 6)
    schedule = StepLR(optimizer, period, gamma=0.1)
    epoch, done = draw.between(50, 70), list[int]()

    def once(batch: Batch) -> Tensor:
        optimizer.zero_grad()
        loss = classes(model, batch)
        loss.backward()
        optimizer.step()
        done.append(1)
        if sick or len(done) % epoch == 0:
            schedule.step()
        return loss

    case = sick_case(
        "not_updating",
        "frozen",
        model,
        optimizer,
        digit_rows(draw),
        classes,
        _rate_gone,
        "ivadomed/ivadomed/pull/55",
        onset=3 * period,
        others=["not_learning"],
        once=once,
    )
    return follow(case, model.parameters())


def _clipped_scaled(case: Case, history: History) -> Measured:
    """The clip leaves a hundredth of each gradient or less, and nothing moves."""
    assert case.clip is not None
    assert case.scaler is not None
    scaled = case.scaler.get_scale() * min(history.norms)
    values = {"left": case.clip / scaled, "largest_move": max(case.notes["moves"])}
    return Measured(values["left"] <= 0.01 and values["largest_move"] < 1e-4, values)


@family
@compared
def c_clip_before_unscale(draw: Draw, sick: bool) -> Case:
    """Float16 and SGD: gradients are clipped while they are still scaled by 65,536."""
    model = row_reader(draw, draw.one_of(nn.GRU, nn.RNN), num_layers=2)

    def half(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            return classes(model, batch)

    case = sick_case(
        "over_clipping",
        "",
        model,
        torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
        digit_rows(draw),
        half,
        _clipped_scaled,
        "pytorch/pytorch/issues/40907",
        others=["not_learning"],
        curable=True,
        clip=1.0,
        clip_scaled=sick,
        scaler=torch.amp.GradScaler("cpu"),
    )
    return follow(case, model.parameters())


def _unclipped(case: Case, history: History) -> Measured:
    """The usual step is over ten times what the clip allows; the loss stays up."""
    allowed, taken = case.notes["allowed"], case.notes["taken"]
    over = median(taken[20:]) / allowed
    share = history.final / history.losses[0]
    move = median(case.notes["moves"][20:])
    values = {"steps_by_allowed": over, "loss_share": share, "median_move": move}
    return Measured(over > 10 and share > 0.9, values)


@family
@compared
def c_clip_after_step(draw: Draw, sick: bool) -> Case:
    """A tanh net reads text by SGD, and is clipped when the step has been made."""
    rnn = nn.RNN(draw.between(16, 24), draw.between(40, 64))
    model = Reader(draw.module_name(), rnn, 128, every=True, vocabulary=128)
    rate, clip, taken = draw.one_of(0.3, 0.4), 1.0, list[float]()
    optimizer = torch.optim.SGD(model.parameters(), rate)
    length, batch_size = draw.between(20, 30), draw.between(12, 20)

    def summed(model: nn.Module, batch: Batch) -> Tensor:
        """Cross entropy, summed over the steps and averaged over the batch."""
        return classes(model, batch) * length

    def once(batch: Batch) -> Tensor:
        optimizer.zero_grad()
        loss = summed(model, batch)
        loss.backward()
        if sick:
            optimizer.step()
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), clip))
        if not sick:
            optimizer.step()
        taken.append(rate * norm)
        return loss

    case = sick_case(
        "lr_too_high",
        "clip_order",
        model,
        optimizer,
        tasks.characters(draw.source(), length, batch_size),
        summed,
        _unclipped,
        "VGraphRNN/VGRNN/issues/4",
        others=["exploding", "spike"],
        same=["loss_divergence", "saturated"],
        steps=300,
        curable=True,
        once=once,
        notes={"allowed": rate * clip, "taken": taken},
    )
    return follow(case, rnn.parameters())


class Translator(nn.Module):
    """An encoder's last state begins a decoder that is fed the right words."""

    def __init__(
        self, names: tuple[str, str], kind: Any, words: int, hidden: int
    ) -> None:
        super().__init__()
        self.names, self.words = names, words
        self.source = nn.Embedding(words, hidden)
        self.target = nn.Embedding(words + 1, hidden)
        for name in names:
            self.add_module(name, kind(hidden, hidden))
        self.out = nn.Linear(hidden, words)

    def forward(self, codes: Tensor, fed: Tensor) -> Tensor:
        """Return scores of the next word at each step, ``(T, B, words)``."""
        encoder, decoder = (getattr(self, name) for name in self.names)
        state = encoder(self.source(codes))[1]
        scores: Tensor = self.out(decoder(self.target(fed), state)[0])
        return scores


def reversal(
    source: torch.Generator, length: int, batch: int, words: int
) -> Iterator[tasks.Pair]:
    """Yield words ``(T, B)`` and the same words back to front."""
    while True:
        codes = torch.randint(words, (length, batch), generator=source)
        yield codes, codes.flip(0)


def translated(model: Any, batch: tasks.Pair) -> Tensor:
    """Cross entropy of each word, given the right ones before it."""
    codes, wanted = batch
    begin = torch.full_like(wanted[:1], model.words)
    scores = model(codes, torch.cat([begin, wanted[:-1]]))
    return cross_entropy(scores.flatten(0, 1), wanted.flatten())


def _left_over(case: Case, history: History) -> Measured:
    """The encoder's gradient is there before each backward, the decoder's never."""
    kept = case.notes["kept"]
    values = {
        "encoder": sum(encoder > 0 for encoder, _ in kept[1:]) / (len(kept) - 1),
        "decoder": sum(decoder > 0 for _, decoder in kept) / len(kept),
    }
    return Measured(values == {"encoder": 1.0, "decoder": 0.0}, values)


@family
@compared
def c_encoder_never_cleared(draw: Draw, sick: bool) -> Case:
    """Two optimizers, and zero_grad for the decoder's alone."""
    words, size = draw.between(6, 9), draw.between(24, 40)
    names = draw.one_of(("encoder", "decoder"), ("enc", "dec"), ("reader", "writer"))
    kind, hidden = draw.one_of(nn.GRU, nn.LSTM), draw.between(28, 40)
    model = Translator(names, kind, words, hidden)
    encoder = model.get_submodule(names[0])
    first = [*model.source.parameters(), *encoder.parameters()]
    inner = {id(w) for w in first}
    second = [w for w in model.parameters() if id(w) not in inner]
    encoding = torch.optim.Adam(first, 5e-3)
    decoding = torch.optim.Adam(second, 5e-3)
    kept = list[tuple[float, float]]()

    def once(batch: Batch) -> Tensor:
        decoding.zero_grad()
        if not sick:
            encoding.zero_grad()
        loss = translated(model, batch)
        kept.append((_size(first), _size(second)))
        loss.backward()
        encoding.step()
        decoding.step()
        return loss

    return sick_case(
        "not_cleared",
        "",
        model,
        encoding,
        reversal(draw.source(), draw.between(4, 5), size, words),
        translated,
        _left_over,
        "Hsintien-Ng/idinvert_pytorch-reproduced/issues/1",
        streams=[f"{names[0]}.l0"],
        steps=500,
        once=once,
        notes={"kept": kept},
    )


def _size(weights: list[nn.Parameter]) -> float:
    return sum(float(w.grad.abs().sum()) for w in weights if w.grad is not None)
