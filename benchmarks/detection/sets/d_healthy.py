"""What advanced users do that looks odd and is right.

Each learns, by a number of its own where the loss does not say so: losses without an
eye on their sign, noise that no one can learn, phases in which a part stands still.
Axes: T time, B batch, I inputs, C classes.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

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
from benchmarks.detection.truth import Truth
from testbed import tasks


def learned(case: Case, history: History) -> Measured:
    """Finite throughout, and the loss ends at 80 % of its start or lower."""
    share = history.final / (sum(history.losses[:20]) / 20)
    return Measured(history.nonfinite is None and share <= 0.8, {"share": share})


def below(what: str, measure: Callable[[], float], bound: float) -> Truth:
    """Return what asks for a number on fresh data that no constant answer has."""

    def truth(case: Case, history: History) -> Measured:
        with torch.no_grad():
            found = sum(measure() for _ in range(20)) / 20
        holds = history.nonfinite is None and found < bound
        return Measured(holds, {what: found, "bound": bound})

    return truth


def healthy(model: nn.Module, *, lr: float = 2e-3, **more: Any) -> Case:
    """Return a healthy case; Adam where no optimizer is given."""
    if "optimizer" not in more:
        more["optimizer"] = torch.optim.Adam(model.parameters(), lr=lr)
    more.setdefault("truth", learned)
    return Case(model=model, label=more.pop("label", Label()), **more)


# ---- losses by hand


class Normed(Net):
    """Digits by row: batch norm in front and behind, a softmax written out at the end.

    The inputs are of very unlike scales; the norm in front takes care of that.
    """

    def __init__(self, draw: Draw, kind: Kind) -> None:
        rnn = kind(8, draw.between(24, 48), batch_first=True)
        super().__init__(draw.module_name(), rnn, 10)
        self.before = nn.BatchNorm1d(8)
        self.behind = nn.BatchNorm1d(rnn.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return the chances of 10 classes."""
        x = self.before(x.flatten(0, 1)).view_as(x)
        scores = self.fc(self.behind(self.layer(x)[0][:, -1]))
        powers = (scores - scores.amax(1, keepdim=True)).exp()
        chances: Tensor = powers / powers.sum(1, keepdim=True)
        return chances


@family
def d_rows_softmax_by_hand(draw: Draw) -> Case:
    """Softmax and its logarithm by hand, smoothed labels, inputs of unlike scales."""
    model = Normed(draw, draw.one_of(nn.LSTM, nn.GRU, nn.RNN))
    source, smooth = draw.source(), draw.between(5, 15) / 100
    scales = 10 ** (4 * torch.rand(8, generator=source) - 2)
    pairs = rows(source, draw.between(20, 32))

    def loss(model: nn.Module, batch: Pair) -> Tensor:
        x, y = batch
        logs = torch.log(model(x) + 1e-8)
        right = logs.gather(1, y[:, None]).mean()
        return -((1 - smooth) * right + smooth * logs.mean())

    batches = ((scales * x, y) for x, y in pairs)
    return healthy(model, batches=batches, loss=loss, steps=300)


class Attentive(Net):
    """The chance that a padded review is a complaint, by attention over all words."""

    def __init__(self, draw: Draw) -> None:
        rnn = nn.LSTM(draw.between(10, 20), draw.between(8, 16), bidirectional=True)
        super().__init__(draw.module_name(), rnn, 1)
        width = 2 * rnn.hidden_size
        self.embed = nn.Embedding(WORDS, rnn.input_size, padding_idx=0)
        self.attention, self.fc = nn.Linear(width, 1), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return a chance for each review, ``(B,)``."""
        states, _ = self.layer(self.embed(x.T))
        weight = self.attention(states).masked_fill(x.T[..., None] == 0, -1e9)
        pooled = (weight.softmax(0) * states).sum(0)
        chance: Tensor = torch.sigmoid(self.fc(pooled)).flatten()
        return chance


@family
def d_reviews_focal_rare(draw: Draw) -> Case:
    """One in ten is a complaint; a focal loss of probabilities, weights by sample."""
    model = Attentive(draw)
    longest, rare = draw.between(15, 25), draw.one_of(0.05, 0.1)
    batches = reviews(draw.source(), 4, longest, draw.between(24, 40), 1 - rare)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x, lengths, y = batch
        chance, trust = model(x), lengths / lengths.sum()
        right = torch.where(y == 0, chance, 1 - chance).clamp(1e-6, 1)
        alpha = torch.where(y == 0, 0.8, 0.2)
        return -(trust * alpha * (1 - right) ** 2 * right.log()).sum()

    return healthy(model, batches=batches, loss=loss, steps=400)


# ---- axes


class Nested(Net):
    """Digits pixel by pixel: one net along each row, another along what it says.

    All rows of all images are one batch to the first, so batch and time change places
    by a view that is right.
    """

    def __init__(self, draw: Draw, kind: Kind) -> None:
        rnn = kind(draw.between(12, 20), draw.between(24, 40))
        super().__init__(draw.module_name(), rnn, 10)
        self.pixels = kind(1, rnn.input_size, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores of 10 classes."""
        said, _ = self.pixels(x.reshape(-1, 8, 1))
        lines = said[:, -1].view(len(x), 8, -1).transpose(0, 1)
        scores: Tensor = self.fc(self.layer(lines)[0][-1])
        return scores


@family
def d_rows_nested_batch(draw: Draw) -> Case:
    """Rows and images are one batch to the first net, and two axes to the second."""
    model = Nested(draw, draw.one_of(nn.LSTM, nn.GRU))
    batches = rows(draw.source(), draw.between(16, 32))
    return healthy(model, batches=batches, loss=classified, lr=5e-3, steps=400)


class ByLetter(Spelling):
    """The language of one name, a call for each letter."""

    def forward(self, x: Tensor) -> Tensor:
        """Return scores of the languages."""
        state: Any = None
        for letter in x.unbind(1):
            out, state = self.layer(self.embed(letter)[:, None], state)
        scores: Tensor = self.fc(out[:, -1])
        return scores


@family
def d_names_one_at_a_time(draw: Draw) -> Case:
    """One name, one call a letter; one step in some names, by their mean."""
    languages = 3
    model = ByLetter(draw, draw.one_of(nn.LSTM, nn.GRU), languages)
    return healthy(
        model,
        batches=names(draw.source(), languages, draw.between(5, 7), 1),
        loss=classified,
        lr=5e-3,
        accumulate=draw.between(4, 6),
        clip=1.0,
        steps=300,
    )


# ---- the optimizer


class Waves(nn.Module):
    """A cell in a loop that predicts the next value at each step, in float64."""

    def __init__(self, name: str, hidden: int) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.LSTMCell(1, hidden))
        self.fc = nn.Linear(hidden, 1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        """Return what follows each value, ``(B, T)``."""
        state, said = None, []
        for now in x.double().unbind(1):
            state = getattr(self, self.name)(now, state)
            said.append(self.fc(state[0]))
        return torch.cat(said, 1)


@family
def d_sine_lbfgs(draw: Draw) -> Case:
    """LBFGS calls its closure many times a step, always on the same few waves."""
    model = Waves(draw.module_name(), draw.between(8, 16))
    optimizer = torch.optim.LBFGS(
        model.parameters(), lr=0.5, max_iter=3, history_size=10
    )
    x, last = next(waves(draw.source(), draw.between(15, 20), draw.between(8, 16)))
    y = torch.cat([x[:, 1:, 0], last[:, None]], 1)

    def loss(model: nn.Module, batch: Pair) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    def once(batch: Pair) -> Tensor:
        def closure() -> Tensor:
            optimizer.zero_grad()
            error = loss(model, batch)
            error.backward()
            return error

        found: Tensor = optimizer.step(closure)
        return found

    def batches() -> Iterator[Pair]:
        while True:
            yield x, y

    return healthy(
        model,
        batches=batches(),
        loss=loss,
        optimizer=optimizer,
        once=once,
        steps=200,
    )


@family
def d_rows_unfrozen_bit_by_bit(draw: Draw) -> Case:
    """A trained net gets a new head, and is unfrozen layer by layer, from the top.

    Each part has a rate of its own, all of which rise from next to nothing and fall.
    """
    model: Any = Image(draw, draw.one_of(nn.LSTM, nn.GRU), 2, True)
    pairs = rows(draw.source(), draw.between(20, 32))
    trainer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(200):
        trainer.zero_grad()
        classified(model, next(pairs)).backward()
        trainer.step()
    trainer.zero_grad()
    model.fc = nn.Linear(model.layer.hidden_size, 2)
    parts: list[list[nn.Parameter]] = [[], [], [*model.fc.parameters()]]
    for name, weight in model.layer.named_parameters():
        parts["_l1" in name].append(weight.requires_grad_(False))
    rates, steps = [5e-4, 1e-3, 4e-3], 400
    optimizer = torch.optim.AdamW([{"params": part} for part in parts])
    schedule = OneCycleLR(optimizer, rates, total_steps=steps + 1)
    thaws = {draw.between(80, 110): parts[1], draw.between(160, 200): parts[0]}

    def before(number: int) -> None:
        if number:
            schedule.step()
        for weight in thaws.get(number, ()):
            weight.requires_grad_()

    return healthy(
        model,
        batches=((x, (y > 4).long()) for x, y in pairs),
        loss=classified,
        optimizer=optimizer,
        before=before,
        steps=steps,
    )


# ---- losses that say little


class Policy(Net):
    """What to do once all has been seen: the chances of some actions, and a value."""

    def __init__(self, draw: Draw, kind: Kind, actions: int) -> None:
        super().__init__(
            draw.module_name(), kind(actions, draw.between(24, 40)), actions
        )
        self.value = nn.Linear(self.layer.hidden_size, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logarithms of chances ``(B, C)`` and values ``(B,)``."""
        h = self.layer(x)[0][-1]
        return self.fc(h).log_softmax(1), self.value(h).squeeze(1)


@family
def d_recall_policy_gradient(draw: Draw) -> Case:
    """REINFORCE with a learnt baseline; its loss goes up and down around nothing."""
    actions, source = draw.between(3, 4), draw.source()
    model = Policy(draw, draw.one_of(nn.LSTM, nn.GRU), actions)
    batches = tasks.recall(source, draw.between(4, 7), draw.between(24, 40), actions)

    def loss(model: nn.Module, batch: Pair) -> Tensor:
        logs, values = model(batch[0])
        action = torch.multinomial(logs.exp(), 1, generator=source)[:, 0]
        gain = (action == batch[1]).to(logs.dtype) - values
        chosen = logs.gather(1, action[:, None])[:, 0]
        entropy = -(logs.exp() * logs).sum(1)
        policy = -(chosen * gain.detach()) - 0.01 * entropy
        return (policy + 0.5 * gain.square()).mean()

    def misses() -> float:
        x, y = next(batches)
        return float((model(x)[0].argmax(1) != y).float().mean())

    truth = below("misses", misses, 0.5 * (1 - 1 / actions))
    return healthy(model, batches=batches, loss=loss, lr=5e-3, steps=500, truth=truth)


class Forecast(Net):
    """The mean and spread of each next value; goes on from where it ended, detached."""

    def __init__(self, draw: Draw, kind: Kind) -> None:
        super().__init__(draw.module_name(), kind(1, draw.between(16, 32)), 2)
        self.state: Any = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return means and logarithms of variances, each ``(T, B)``."""
        out, state = self.layer(x, self.state)
        pair = isinstance(state, tuple)
        self.state = tuple(s.detach() for s in state) if pair else state.detach()
        mean, spread = self.fc(out).unbind(2)
        return mean, spread


def _streams(draw: Draw, noise: float) -> Iterator[Pair]:
    """Yield pieces of noisy waves ``(T, B, 1)``, each going on from the last one.

    Yields:
        What was seen a step earlier, and what is seen, ``(T, B)``.

    """
    source, length, batch = draw.source(), draw.between(10, 16), draw.between(12, 24)
    phase = 2 * math.pi * torch.rand(batch, generator=source)
    pace = 0.2 + 0.3 * torch.rand(batch, generator=source)
    begin, last = 0, torch.zeros(1, batch)
    while True:
        steps = torch.arange(begin, begin + length)[:, None]
        wave = torch.sin(phase + pace * steps)
        seen = wave + noise * torch.randn(length, batch, generator=source)
        yield torch.cat([last, seen[:-1]])[..., None], seen
        begin, last = begin + length, seen[-1:]


@family
def d_streams_negative_likelihood(draw: Draw) -> Case:
    """A likelihood that falls below zero, noise in it, and a state that is kept."""
    model = Forecast(draw, draw.one_of(nn.LSTM, nn.GRU))
    noise = draw.between(10, 20) / 100
    batches = _streams(draw, noise)

    def loss(model: nn.Module, batch: Pair) -> Tensor:
        mean, spread = model(batch[0])
        error = (mean - batch[1]).square()
        return 0.5 * (spread + error * (-spread).exp()).mean()

    def error() -> float:
        x, y = next(batches)
        return float((model(x)[0] - y).square().mean())

    return healthy(
        model,
        batches=batches,
        loss=loss,
        lr=5e-3,
        clip=1.0,
        steps=500,
        label=Label(others=frozenset({"truncated"})),
        truth=below("error", error, 0.3 * (0.5 + noise**2)),
    )
