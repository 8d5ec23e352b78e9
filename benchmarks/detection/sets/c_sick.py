"""Training dynamics and loops: sick losses and weights, each after a public thread."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from benchmarks.detection.case import (
    Batch,
    Case,
    Draw,
    History,
    Label,
    Measured,
    family,
)
from benchmarks.detection.sick_flow import FINER
from benchmarks.detection.truth import Truth, compared
from testbed import tasks
from testbed.nets import Reader, classes

GITHUB = "https://github.com/"
ROWS = 8


def sick_case(
    kind: str,
    cause: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Batch],
    loss: Callable[[nn.Module, Any], Tensor],
    truth: Truth,
    thread: str,
    *,
    streams: Iterable[str] = (),
    onset: int = 0,
    others: Iterable[str] = (),
    same: Iterable[str] = (),
    steps: int = 300,
    curable: bool = False,
    **more: Any,
) -> Case:
    """Return a case with a fault; the cause is empty where the kind has none."""
    label = Label(
        kind=kind,
        causes=frozenset([cause, *FINER.get(cause, ())] if cause else []),
        streams=frozenset(streams),
        onset=onset,
        others=frozenset(others),
        same=frozenset(same),
        curable=curable,
    )
    return Case(
        model=model,
        optimizer=optimizer,
        batches=batches,
        loss=loss,
        label=label,
        steps=steps,
        truth=truth,
        thread=GITHUB + thread,
        **more,
    )


def row_reader(draw: Draw, layer: Any, **options: Any) -> Reader:
    """Return a net that reads digits row by row."""
    rnn = layer(ROWS, draw.between(24, 40), **options)
    return Reader(draw.module_name(), rnn, 10)


def digit_rows(draw: Draw) -> Iterator[tasks.Pair]:
    """Return digits, row by row."""
    return tasks.digits(draw.source(), draw.between(16, 32), rows=True)


# ---- the loss


class MixtureNet(nn.Module):
    """An LSTM that says how the next value is distributed, as a mixture of normals."""

    def __init__(self, name: str, hidden: int, parts: int, axis: int) -> None:
        super().__init__()
        self.name, self.parts, self.axis = name, parts, axis
        self.add_module(name, nn.LSTM(1, hidden))
        self.head = nn.Linear(hidden, 3 * parts)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return means, log deviations and log weights, ``(T, B, parts)`` each."""
        out = getattr(self, self.name)(x)[0]
        mu, log_sigma, weights = self.head(out).chunk(3, -1)
        return mu, log_sigma, log_softmax(weights, self.axis)


def mixture_loss(model: nn.Module, batch: tasks.Pair) -> Tensor:
    """Negative log likelihood of the next values."""
    x, y = batch
    mu, log_sigma, log_pi = model(x)
    normal = -0.5 * ((y - mu) / log_sigma.exp()).square() - log_sigma
    likelihood = torch.logsumexp(log_pi + normal - 0.5 * math.log(2 * math.pi), -1)
    return -likelihood.mean()


def jumps(source: torch.Generator, length: int, batch: int) -> Iterator[tasks.Pair]:
    """Yield values around 1 or -1, one of them at home, the other now and then."""
    while True:
        home = 2.0 * torch.randint(2, (1, batch), generator=source) - 1
        away = torch.rand(length + 1, batch, generator=source) < 0.1
        values = torch.where(away, -home, home).unsqueeze(-1)
        values = values + 0.25 * torch.randn(values.shape, generator=source)
        yield values[:-1], values[1:]


def _weights_mix(case: Case, history: History) -> Measured:
    """Another sample changes a sample's weights, and no sample's weights sum to 1."""
    x, _ = next(case.batches)
    changed = x.clone()
    changed[:, 0] += 1.0
    with torch.no_grad():
        one, other = case.model(x)[2], case.model(changed)[2]
    moved = float((one - other)[:, 1:].abs().max())
    total = float(one.exp().sum(-1).mean())
    values = {"others_moved": moved, "sum_of_weights": total}
    return Measured(moved > 1e-3 and abs(total - 1) > 0.1, values)


@family
@compared
def c_mixture_weights_over_batch(draw: Draw, sick: bool) -> Case:
    """A mixture density LSTM takes the softmax of its weights over the batch."""
    hidden, length = draw.between(24, 40), draw.between(12, 20)
    model = MixtureNet(draw.module_name(), hidden, 2, -2 if sick else -1)
    fresh = next(jumps(draw.source(), length, 64))

    def goal() -> float:
        """Loss of sequences that come alone: the softmax of one is 1, not a half."""
        pairs = [(x[:, None], y[:, None]) for x, y in _each(fresh)]
        with torch.no_grad():
            mean = sum(float(mixture_loss(model, pair)) for pair in pairs) / 64
        return mean + (math.log(2) if sick else 0.0)

    return sick_case(
        "loss_mismatch",
        "axis",
        model,
        torch.optim.Adam(model.parameters(), 5e-3),
        jumps(draw.source(), length, draw.between(16, 32)),
        mixture_loss,
        _weights_mix,
        "ctallec/world-models/issues/10",
        steps=400,
        goal=goal,
    )


def _each(pair: tasks.Pair) -> Iterator[tasks.Pair]:
    return zip(pair[0].unbind(1), pair[1].unbind(1), strict=True)


class Critic(nn.Module):
    """A GRU that reads an episode and says what it is worth, ``(B,)``."""

    def __init__(self, name: str, inputs: int, hidden: int) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.GRU(inputs, hidden))
        self.value = nn.Sequential(
            nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return one value an episode."""
        values: Tensor = self.value(getattr(self, self.name)(x)[0][-1])
        return values.squeeze(-1)


def episodes(
    source: torch.Generator, length: int, batch: int, inputs: int
) -> Iterator[tasks.Pair]:
    """Yield observations, and the sum of what they earned, the last ones most."""
    discounts = 0.9 ** torch.arange(length - 1, -1, -1.0)[:, None]
    while True:
        x = torch.randn(length, batch, inputs, generator=source)
        rewards = x[..., 0] * (x[..., 1] > 0) + 0.5
        yield x, (discounts * rewards).sum(0)[:, None]


def _all_with_all(case: Case, history: History) -> Measured:
    """Each value is pulled by every return, and the values hardly differ."""
    x, returns = next(case.batches)
    values = case.model(x)
    values.retain_grad()
    (returns - values).square().mean().backward()
    assert values.grad is not None
    pull = 2 * (values - returns.mean()) / len(values)
    apart = float((values.grad - pull).detach().abs().max())
    spread = float(values.detach().std() / returns.std())
    pairs = (returns - values).numel() / len(values)
    found = {"returns_a_value": pairs, "apart": apart, "spread": spread}
    return Measured(pairs == len(values) and apart < 1e-5 and spread < 0.4, found)


@family
@compared
def c_critic_broadcast(draw: Draw, sick: bool) -> Case:
    """A recurrent critic's values are (B), the returns (B, 1)."""
    inputs, length = draw.between(2, 4), draw.between(5, 8)
    model = Critic(draw.module_name(), inputs, draw.between(24, 40))
    fresh = next(episodes(draw.source(), length, 200, inputs))

    def critic_loss(model: nn.Module, batch: Batch) -> Tensor:
        x, returns = batch
        values = model(x) if sick else model(x).unsqueeze(-1)
        loss: Tensor = (returns - values).square().mean()
        return loss

    def goal() -> float:
        with torch.no_grad():
            error = model(fresh[0]) - fresh[1].squeeze(-1)
        return float(error.square().mean())

    return sick_case(
        "target_broadcast",
        "shape",
        model,
        torch.optim.Adam(model.parameters(), 3e-3),
        episodes(draw.source(), length, draw.between(16, 32), inputs),
        critic_loss,
        _all_with_all,
        "RLinf/RLinf/issues/1568",
        steps=500,
        goal=goal,
    )


# ---- the weights


def _at_the_end(case: Case, history: History) -> Measured:
    """Nearly all states are at their ends, and recurrent gradients are next to none."""
    model: Any = case.model
    x, y = next(case.batches)
    model.zero_grad()
    loss = classes(model, (x, y))
    loss.backward()
    with torch.no_grad():
        states = model.layer(x)[0]
    hidden = [p.grad for n, p in model.named_parameters() if "weight_hh" in n]
    values = {
        "saturated": float((states[1:].abs() > 0.99).float().mean()),
        "largest_gradient": max(float(g.norm()) for g in hidden if g is not None),
        "head": float(model.head.weight.grad.norm()),
    }
    dead = values["largest_gradient"] < 1e-4 * values["head"]
    return Measured(values["saturated"] > 0.9 and dead, values)


@family
@compared
def c_uniform_from_zero_to_one(draw: Draw, sick: bool) -> Case:
    """Two bidirectional tanh layers whose weights all begin between 0 and 1."""
    model = row_reader(draw, nn.RNN, num_layers=2, bidirectional=True)
    low = 0.0 if sick else -1 / math.sqrt(model.layer.hidden_size)
    for weight in model.layer.parameters():
        nn.init.uniform_(weight, low, 1.0 if sick else -low)
    directions = ["", "_reverse"]
    return sick_case(
        "saturated",
        "weights",
        model,
        torch.optim.Adam(model.parameters(), 2e-3),
        digit_rows(draw),
        classes,
        _at_the_end,
        "microsoft/vscode-python/issues/5069",
        streams=[f"{model.name}.l{k}{d}" for k in range(2) for d in directions],
        others=["vanishing", "not_learning"],
        curable=True,
    )
