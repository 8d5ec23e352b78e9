"""What those who are new to recurrent nets get wrong, rebuilt from public threads.

Rows of digits, sine waves, names by letter, short reviews, brackets; of each fault the
control is the same run without it. Axes: T time, B batch, I inputs, C classes.
"""

import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    mse_loss,
)
from torch.nn.utils.rnn import pack_padded_sequence
from torch.optim.lr_scheduler import StepLR

from benchmarks.detection import truth
from benchmarks.detection.case import Case, Draw, History, Label, Measured, family
from benchmarks.detection.sets.d_common import (
    WORDS,
    Image,
    Kind,
    Net,
    Pair,
    Spelling,
    classified,
    names,
    reviews,
    rows,
    waves,
)
from benchmarks.detection.truth import Truth, compared, keep


def sick(
    kind: str, causes: tuple[str, ...], model: Net, measure: Truth, **more: Any
) -> Case:
    """Return a sick case; what trains it is Adam 2e-3, if nothing else is given."""
    label = Label(
        kind=kind,
        causes=frozenset(causes),
        streams=frozenset(more.pop("streams", ())),
        onset=more.pop("onset", 0),
        others=frozenset(more.pop("others", ())),
        same=frozenset(more.pop("same", ())),
    )
    if "optimizer" not in more:
        more["optimizer"] = torch.optim.Adam(model.parameters(), lr=2e-3)
    return Case(model=model, label=label, truth=measure, **more)


# ---- the loss


class Review(Net):
    """The sentiment of a review, as tutorials have it."""

    def __init__(self, draw: Draw, kind: Kind, squash: bool) -> None:
        rnn: Any = kind(draw.between(10, 20), draw.between(16, 32), batch_first=True)
        super().__init__(draw.module_name(), rnn, 1)
        self.embed = nn.Embedding(WORDS, rnn.input_size, padding_idx=0)
        self.squash = squash

    def forward(self, x: Tensor) -> Tensor:
        """Return one number a review."""
        out, _ = self.layer(self.embed(x))
        score = self.fc(out[:, -1]).squeeze(1)
        return torch.sigmoid(score) if self.squash else score


def _squashed(case: Case, history: History) -> Measured:
    """All that the loss has got is within 0 and 1, and it never fell below its floor.

    A sigmoid of numbers within 0 and 1 has no loss below log(1 + 1/e) = 0.313.
    """
    with torch.no_grad():
        out = case.model(next(case.batches)[0])
    found = {
        "lowest": float(out.min()),
        "highest": float(out.max()),
        "best_loss": min(history.losses),
        "floor": math.log1p(math.exp(-1)),
    }
    within = 0 <= found["lowest"] <= found["highest"] <= 1
    return Measured(within and found["best_loss"] >= found["floor"], found)


@family
@compared
def d_sentiment_sigmoid_twice(draw: Draw, wrong: bool) -> Case:
    """The model ends in a sigmoid, and the loss has one of its own."""
    model = Review(draw, draw.one_of(nn.LSTM, nn.GRU), squash=wrong)
    length = draw.between(8, 16)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x, _, y = batch
        return binary_cross_entropy_with_logits(model(x), y)

    return sick(
        "loss_mismatch",
        ("sigmoid_twice",),
        model,
        _squashed,
        batches=reviews(draw.source(), length, length, draw.between(16, 32)),
        loss=loss,
        steps=400,
        thread="https://github.com/bentrevett/pytorch-sentiment-analysis/issues/75",
    )


class Wave(Net):
    """The next value of a series."""

    def __init__(self, draw: Draw, kind: Kind) -> None:
        rnn = kind(1, draw.between(16, 32), batch_first=True)
        super().__init__(draw.module_name(), rnn, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return one value a series, ``(B, 1)``."""
        out, _ = self.layer(x)
        value: Tensor = self.fc(out[:, -1])
        return value


def _broadcast(case: Case, history: History) -> Measured:
    """At every step as many pairs were compared as the square of the targets."""
    found = case.notes["compared"]
    steps = sum(pairs == targets**2 for targets, pairs in found)
    values = {"steps": steps, "targets": found[0][0], "pairs": found[0][1]}
    return Measured(steps == len(found) == case.steps, values)


@family
@compared
def d_sine_target_without_axis(draw: Draw, wrong: bool) -> Case:
    """Predictions are (B, 1), targets (B,); the warning was switched off."""
    model = Wave(draw, draw.one_of(nn.LSTM, nn.GRU, nn.RNN))
    batches = waves(draw.source(), draw.between(10, 20), draw.between(16, 32))
    shapes: list[tuple[int, int]] = []

    def loss(model: nn.Module, batch: Pair) -> Tensor:
        x, y = batch
        value, target = model(x), y if wrong else y.unsqueeze(1)
        shape = torch.broadcast_shapes(value.shape, target.shape)
        shapes.append((len(y), math.prod(shape)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return mse_loss(value, target)

    def error() -> float:
        with torch.no_grad():
            pairs = [next(batches) for _ in range(10)]
            errors = [mse_loss(model(x).squeeze(1), y) for x, y in pairs]
        return float(torch.stack(errors).mean())

    return sick(
        "target_broadcast",
        ("shape",),
        model,
        _broadcast,
        batches=batches,
        loss=loss,
        steps=400,
        goal=error,
        others=("not_learning",),
        notes={"compared": shapes},
        thread="https://discuss.pytorch.org/t/in-a-number-sequence-1-2-3-4-estimate-"
        "the-next-number-using-lstm/202270",
    )


# ---- axes


def _mixed(case: Case, history: History) -> Measured:
    """Another first image changes what is said of those behind it."""
    x, _ = next(case.batches)
    other = x.clone()
    other[0] = 1 - other[0]
    with torch.no_grad():
        moved = (case.model(x) - case.model(other)).abs().amax(1) > 0
    found = {"samples": len(x), "others_moved": int(moved[1:].sum())}
    return Measured(found["others_moved"] > 0, found)


@family
@compared
def d_rows_batch_first_left_out(draw: Draw, wrong: bool) -> Case:
    """batch_first is left out, and the rest stays as it was."""
    model = Image(draw, draw.one_of(nn.LSTM, nn.GRU), draw.between(1, 2), not wrong)
    return sick(
        "axes_mixed",
        ("batch_axis",),
        model,
        _mixed,
        batches=rows(draw.source(), draw.between(20, 40)),
        loss=classified,
        steps=400,
        thread="https://github.com/yunjey/pytorch-tutorial/issues/196",
    )


# ---- the optimizer


def _leaps(case: Case, history: History) -> Measured:
    """The first step moves the recurrent weights by more than their own norm.

    And the loss ends above log(C), which a constant has.
    """
    first, constant = case.notes["ratios"][0], math.log(case.model.fc.out_features)
    found = {"first_update": first, "constant": constant, "end": history.final}
    return Measured(first > 1 and history.final > constant, found)


@family
@compared
def d_names_rate_too_high(draw: Draw, wrong: bool) -> Case:
    """Adam at a rate that would suit SGD."""
    languages = draw.between(4, 6)
    model = Spelling(draw, draw.one_of(nn.LSTM, nn.GRU, nn.RNN), languages)
    batches = names(draw.source(), languages, draw.between(6, 10), draw.between(16, 32))
    rate = draw.one_of(0.3, 0.5, 1.0) if wrong else 3e-3
    case = sick(
        "lr_too_high",
        ("lr", "rate"),
        model,
        _leaps,
        batches=batches,
        loss=classified,
        steps=400,
        optimizer=torch.optim.Adam(model.parameters(), lr=rate),
        others=("exploding", "vanishing", "spike", "not_learning"),
        same=("loss_divergence", "saturated"),
        thread="https://jvns.ca/blog/2020/11/23/day-11--learning-about-learning-rates/",
    )
    truth.count(case, [model.hidden_weight])
    return case


def brackets(source: torch.Generator, length: int, batch: int) -> Iterator[Pair]:
    """Yield words of brackets and letters ``(B, T)``, and whether each is valid.

    In half of the words one opening bracket is turned into a closing one.

    Yields:
        Codes of ``(``, ``)`` and three letters, and 0 or 1.

    """
    while True:
        x = torch.randint(2, 5, (batch, length), generator=source)
        y = torch.randint(2, (batch,), generator=source)
        for word, valid in zip(x, y.tolist(), strict=True):
            order = torch.randperm(length, generator=source)
            for pair in order[: 2 * (length // 4)].view(-1, 2):
                word[pair.min()], word[pair.max()] = 0, 1
            if not valid:
                word[order[:2].min()] = 1
        yield x, y


class Brackets(Net):
    """Whether a word of brackets is valid; ``build`` makes the layers anew."""

    def __init__(self, draw: Draw, kind: Kind) -> None:
        self.kind, self.sizes = kind, (draw.between(6, 10), draw.between(16, 32))
        super().__init__(draw.module_name(), self._rnn(), 2)
        self.embed = nn.Embedding(5, self.sizes[0])

    def _rnn(self) -> nn.RNNBase:
        return self.kind(*self.sizes, batch_first=True)

    def build(self) -> None:
        """Make layers of the sizes that are set."""
        self.add_module(self.name, self._rnn())
        self.fc = nn.Linear(self.sizes[1], 2)
        self.embed = nn.Embedding(5, self.sizes[0])

    def forward(self, x: Tensor) -> Tensor:
        """Return scores of wrong and of valid."""
        out, _ = self.layer(self.embed(x))
        scores: Tensor = self.fc(out[:, -1])
        return scores


def _stale(case: Case, history: History) -> Measured:
    """The optimizer has not one weight of the model; gradients, but no update."""
    held = {id(p) for group in case.optimizer.param_groups for p in group["params"]}
    shared = sum(id(p) in held for p in case.model.parameters())
    unmoved, found = truth.no_update(case, history)
    return Measured(unmoved and not shared, {**found, "held": shared})


@family
@compared
def d_brackets_layers_built_after_optimizer(draw: Draw, wrong: bool) -> Case:
    """The layers are made anew once the optimizer has been given the old ones."""
    model = Brackets(draw, draw.one_of(nn.LSTM, nn.GRU))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    if wrong:
        model.build()
    case = sick(
        "not_updating",
        ("stale_parameters",),
        model,
        _stale,
        batches=brackets(draw.source(), draw.between(8, 12), draw.between(16, 32)),
        loss=classified,
        steps=400,
        optimizer=optimizer,
        others=("not_cleared", "not_learning"),
        thread="https://github.com/pytorch/pytorch/issues/14467",
    )
    truth.count(case, [model.hidden_weight])
    return case


# ---- the loop


class Ramp(Net):
    """The value after the next one, at each step of a series."""

    def __init__(self, draw: Draw) -> None:
        rnn = nn.LSTM(1, draw.between(32, 64), batch_first=True)
        super().__init__(draw.module_name(), rnn, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return a value for each step, ``(B, T)``."""
        out, _ = self.layer(x)
        values: Tensor = self.fc(out).squeeze(2)
        return values


def _piled_up(case: Case, history: History) -> Measured:
    """At every step the gradient is the sum of those of all steps so far."""
    steps, apart = case.notes["summed"], case.notes["apart"]
    found = {"steps_summed": steps, "largest_difference": apart}
    return Measured(steps == case.steps and apart < 1e-3, found)


@family
@compared
def d_ramp_without_zero_grad(draw: Draw, wrong: bool) -> Case:
    """One short ramp is to be learnt by heart, and nobody clears the gradients."""
    model, length = Ramp(draw), draw.between(15, 25)
    weight = model.layer.weight_hh_l0
    total = torch.zeros_like(weight)
    start = draw.between(0, 5) / 10

    def batches() -> Iterator[Pair]:
        ramp = start + torch.arange(length + 2) / length
        while True:
            yield ramp[None, :-2, None], ramp[None, 2:]

    def loss(model: nn.Module, batch: Pair) -> Tensor:
        return (model(batch[0]) - batch[1]).square().sum()

    case = sick(
        "not_cleared",
        (),
        model,
        _piled_up,
        batches=batches(),
        loss=loss,
        steps=400,
        clears=not wrong,
        optimizer=torch.optim.Adam(model.parameters(), lr=1e-3),
        others=("loss_divergence", "lr_too_high", "not_learning"),
        thread="https://stats.stackexchange.com/questions/376851/",
    )
    case.notes |= {"summed": 0, "apart": 0.0}

    def after(number: int) -> None:
        assert weight.grad is not None
        apart = float((weight.grad - total).norm() / total.norm())
        case.notes["apart"] = max(case.notes["apart"], apart)
        case.notes["summed"] += 1

    def add(grad: Tensor) -> None:
        total.add_(grad)

    weight.register_hook(add)
    case.after = after
    return case


def _faded(case: Case, history: History) -> Measured:
    """Behind the onset there are gradients, and the weights move by less than 1e-5."""
    onset = case.label.onset
    missing = sum(n == 0 for n in case.notes["grads"])
    rest = case.notes["ratios"][onset:]
    rate = case.optimizer.param_groups[0]["lr"]
    found = {"missing": missing, "update_largest": max(rest), "rate_end": rate}
    return Measured(missing == 0 and max(rest) < 1e-5 and rate < 1e-6, found)


@family
@compared
def d_rows_schedule_every_batch(draw: Draw, wrong: bool) -> Case:
    """A schedule that counts epochs is stepped at each batch."""
    batch, every = draw.between(20, 32), draw.between(3, 4)
    model = Image(draw, draw.one_of(nn.LSTM, nn.GRU), draw.between(1, 2), True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = StepLR(optimizer, step_size=every, gamma=0.5)
    epoch = 1797 // batch

    def before(number: int) -> None:
        if number and (wrong or number % epoch == 0):
            schedule.step()

    case = sick(
        "not_updating",
        ("frozen", "schedule"),
        model,
        _faded,
        batches=rows(draw.source(), batch),
        loss=classified,
        steps=400,
        optimizer=optimizer,
        before=before,
        onset=14 * every,
        others=("not_learning",),
        thread="https://github.com/hazdzz/stgcn/issues/18",
    )
    truth.count(case, [model.hidden_weight])
    return case


# ---- padding


def _pads_only(case: Case, history: History) -> Measured:
    """What the loss asks of the words is a millionth of what it asks of the padding.

    By float64 gradients of the embedded reviews, at the start, mid-run and the end.
    """
    x, lengths, y = next(case.batches)
    like: Any = case.model
    weights = [*case.notes["weights"].values(), like.state_dict()]
    found = []
    for state in weights:
        model: Any = Padded(like.name, *case.notes["sizes"], like.packs)
        model.load_state_dict(state)
        model.double()
        embedded = model.embed(x).detach().requires_grad_()
        score = model.read(embedded, lengths)
        loss = binary_cross_entropy_with_logits(score, y.double())
        (grad,) = torch.autograd.grad(loss, embedded)
        norms = grad.norm(dim=2)
        words = norms[torch.arange(x.shape[1]) < lengths[:, None]].max()
        found.append(math.log10(float(words / norms.max()) + 1e-30))
    return Measured(max(found) <= -6, {"begin": found[0], "largest": max(found)})


class Padded(Net):
    """The sentiment of padded reviews; reads the end of the row, or packs."""

    def __init__(self, name: str, inputs: int, hidden: int, packs: bool) -> None:
        rnn = nn.RNN(inputs, hidden, batch_first=True)
        super().__init__(name, rnn, 1)
        self.embed = nn.Embedding(WORDS, rnn.input_size, padding_idx=0)
        self.packs = packs

    def read(self, embedded: Tensor, lengths: Tensor) -> Tensor:
        """Return one score a review."""
        given: Any = embedded
        if self.packs:
            given = pack_padded_sequence(
                embedded, lengths, batch_first=True, enforce_sorted=False
            )
        _, last = self.layer(given)
        score: Tensor = self.fc(last[-1]).squeeze(1)
        return score

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Return one score a review."""
        return self.read(self.embed(x), lengths)


@family
@compared
def d_sentiment_reads_behind_padding(draw: Draw, wrong: bool) -> Case:
    """Reviews are padded to a length that few have, and the last state is read."""
    sizes = draw.between(10, 20), draw.between(16, 32)
    model = Padded(draw.module_name(), *sizes, packs=not wrong)
    longest, pads = draw.between(8, 12), draw.between(35, 50)
    source, batch = draw.source(), draw.between(16, 32)

    def batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for x, lengths, y in reviews(source, 4, longest, batch):
            yield nn.functional.pad(x, (0, pads)), lengths, y

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x, lengths, y = batch
        return binary_cross_entropy_with_logits(model(x, lengths), y)

    case = sick(
        "vanishing",
        ("padding",),
        model,
        _pads_only,
        batches=batches(),
        loss=loss,
        steps=400,
        streams=(f"{model.name}.l0",),
        others=("not_learning",),
        thread="https://github.com/bentrevett/pytorch-sentiment-analysis/issues/86",
    )
    case.notes["sizes"] = sizes
    keep(case, [0, 200])
    return case
