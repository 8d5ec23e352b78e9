"""Training dynamics and loops: healthy runs that look odd."""

import math
from collections.abc import Callable, Iterator
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn.functional import cross_entropy, mse_loss, one_hot, smooth_l1_loss
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau

from benchmarks.detection.case import (
    Batch,
    Case,
    Draw,
    History,
    Label,
    Measured,
    family,
)
from benchmarks.detection.sets.c_sick import digit_rows, row_reader
from benchmarks.detection.truth import Truth
from testbed import tasks
from testbed.nets import Reader, classes, values

CHARACTERS = 3.0
SUMS = 1 / 6


def healthy_case(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Batch],
    loss: Callable[[nn.Module, Any], Tensor],
    truth: Truth,
    **more: Any,
) -> Case:
    """Return a case without a fault."""
    return Case(
        model=model,
        optimizer=optimizer,
        batches=batches,
        loss=loss,
        label=Label(),
        truth=truth,
        **more,
    )


def learns(bound: float = math.inf, share: float = 0.8) -> Truth:
    """Return what asks whether the loss falls to a share of its start, and a bound."""

    def truth(case: Case, history: History) -> Measured:
        begin = sum(history.losses[:20]) / 20
        holds = history.nonfinite is None and history.fell_to(share)
        return Measured(holds and history.final < bound, {"begin": begin})

    return truth


def ends_at(bound: float) -> Truth:
    """Return what asks for a last goal below a bound, whatever the loss does."""

    def truth(case: Case, history: History) -> Measured:
        assert case.goal is not None
        error = case.goal()
        finite = history.nonfinite is None
        return Measured(finite and error < bound, {"error": error})

    return truth


def wrong_of(model: nn.Module, pair: tasks.Pair) -> Callable[[], float]:
    """Return what measures the share of a batch that is classified wrongly."""

    def goal() -> float:
        with torch.no_grad():
            found = model(pair[0]).argmax(-1)
        return float((found != pair[1]).float().mean())

    return goal


# ---- rates


@family
def c_one_cycle_stack(draw: Draw) -> Case:
    """Two LSTM layers; the rate rises from next to 0 to 1e-2, and ends at 1e-8."""
    model = row_reader(draw, nn.LSTM, num_layers=2, dropout=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.01)
    steps = draw.between(250, 350)
    schedule = OneCycleLR(
        optimizer, 1e-2, total_steps=steps + 1, div_factor=1e3, final_div_factor=1e3
    )

    def once(batch: Batch) -> Tensor:
        optimizer.zero_grad()
        loss = classes(model, batch)
        loss.backward()
        optimizer.step()
        schedule.step()
        return loss

    return healthy_case(
        model, optimizer, digit_rows(draw), classes, learns(), steps=steps, once=once
    )


class Writer(nn.Module):
    """A language model of two LSTM layers that takes a state and hands one back."""

    def __init__(self, name: str, inputs: int, hidden: int) -> None:
        super().__init__()
        self.name = name
        self.embed = nn.Embedding(128, inputs)
        self.add_module(name, nn.LSTM(inputs, hidden, num_layers=2))
        self.head = nn.Linear(hidden, 128)

    def forward(self, codes: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Return scores of the next characters, and the last state."""
        out, state = getattr(self, self.name)(self.embed(codes), state)
        return self.head(out), state


def next_characters(model: nn.Module, batch: tasks.Pair) -> Tensor:
    """Cross entropy of text that begins without a state."""
    return cross_entropy(model(batch[0])[0].flatten(0, 1), batch[1].flatten())


@family
def c_sgd_rate_twenty(draw: Draw) -> Case:
    """Text by SGD at a rate of 20 under a clip of 0.25, the state carried on purpose.

    The rate is divided by 4 where the mean loss of 50 steps is no better.
    """
    model = Writer(draw.module_name(), draw.between(24, 32), draw.between(40, 56))
    optimizer = torch.optim.SGD(model.parameters(), 20.0)
    schedule = ReduceLROnPlateau(optimizer, factor=0.25, patience=0)
    state, recent = list[tuple[Tensor, ...]](), list[float]()

    def once(batch: Batch) -> Tensor:
        x, y = batch
        carried = tuple(s.detach() for s in state.pop()) if state else None
        optimizer.zero_grad()
        scores, last = model(x, carried)
        state.append(last)
        loss = cross_entropy(scores.flatten(0, 1), y.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()
        recent.append(float(loss.detach()))
        if len(recent) % 50 == 0:
            schedule.step(sum(recent[-50:]) / 50)
        return loss

    return healthy_case(
        model,
        optimizer,
        tasks.streams_of_text(draw.source(), draw.between(16, 24), 16),
        next_characters,
        learns(CHARACTERS),
        steps=400,
        once=once,
    )


# ---- optimizers


class SineCells(nn.Module):
    """Two LSTM cells that say the next value of a wave at each step."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.lower = nn.LSTMCell(1, hidden)
        self.upper = nn.LSTMCell(hidden, hidden)
        self.linear = nn.Linear(hidden, 1)

    def forward(self, wave: Tensor) -> Tensor:
        """Return the next values, ``(T, B, 1)``."""
        lower = upper = None
        said = []
        for now in wave:
            lower = self.lower(now, lower)
            upper = self.upper(lower[0], upper)
            said.append(self.linear(upper[0]))
        return torch.stack(said)


def next_value(model: nn.Module, batch: tasks.Pair) -> Tensor:
    """Mean squared error of the next values."""
    return mse_loss(model(batch[0]), batch[1])


@family
def c_lbfgs_sine(draw: Draw) -> Case:
    """L-BFGS on one batch of sine waves in float64: several backwards make a step."""
    model = SineCells(draw.between(12, 20)).double()
    optimizer = torch.optim.LBFGS(
        model.parameters(), lr=0.8, max_iter=2, line_search_fn="strong_wolfe"
    )
    length, waves = draw.between(12, 16), draw.between(12, 24)
    phase = torch.rand(1, waves, 1, generator=draw.source()) * 2 * math.pi
    time = torch.arange(length + 1.0)[:, None, None] / draw.between(3, 5)
    wave = torch.sin(time + phase).double()

    def once(batch: Batch) -> Tensor:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = next_value(model, batch)
            loss.backward()
            return loss

        loss: Any = optimizer.step(closure)
        return torch.as_tensor(loss)

    pairs = repeat((wave[:-1], wave[1:]))
    truth = learns(share=0.1)
    return healthy_case(
        model, optimizer, pairs, next_value, truth, steps=200, once=once
    )


@family
def c_gradual_unfreezing(draw: Draw) -> Case:
    """A bidirectional net that knows digits is told odd from even: the head first.

    In mid-run the recurrent weights are let go, at a tenth of the head's rate.
    """
    model: Any = row_reader(draw, draw.one_of(nn.LSTM, nn.GRU), bidirectional=True)
    pairs = digit_rows(draw)
    before = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(150):
        before.zero_grad()
        classes(model, next(pairs)).backward()
        before.step()
    before.zero_grad()
    model.head = nn.Linear(2 * model.layer.hidden_size, 2)
    model.layer.requires_grad_(False)
    optimizer = torch.optim.Adam(model.head.parameters(), 1e-3)
    thaw = draw.between(150, 200)

    def unfreeze(number: int) -> None:
        if number == thaw:
            model.layer.requires_grad_(True)
            optimizer.add_param_group({"params": model.layer.parameters(), "lr": 1e-4})

    parity = ((x, y % 2) for x, y in pairs)
    return healthy_case(
        model, optimizer, parity, classes, learns(), steps=400, before=unfreeze
    )


# ---- plateaus and noise


class Adder(nn.Module):
    """Two GRU cells in a loop, the upper beside a residual, and one number."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.cells = nn.ModuleList([nn.GRUCell(2, hidden), nn.GRUCell(hidden, hidden)])
        self.head = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the number, ``(B, 1)``."""
        lower, upper = self.cells
        h = below = x.new_zeros(x.shape[1], self.head.in_features)
        for now in x:
            below = lower(now, below)
            h = upper(below, h)
        number: Tensor = self.head(h + below)
        return number


def _plateau(case: Case, history: History) -> Measured:
    """Long no better than a constant, then below a tenth of what that earns."""
    losses = history.losses
    waits = next(
        (n for n in range(20, len(losses)) if sum(losses[n - 20 : n]) < 10 * SUMS),
        len(losses),
    )
    holds = history.nonfinite is None and waits >= 60 and history.final < 0.1 * SUMS
    return Measured(holds, {"steps_on_plateau": waits})


@family
def c_adding_plateau_cells(draw: Draw) -> Case:
    """The adding problem in two layers of cells: nothing for long, then all at once."""
    model = Adder(draw.between(28, 40))
    pairs = tasks.adding(draw.source(), draw.between(13, 17), draw.between(24, 32))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    return healthy_case(model, optimizer, pairs, values, _plateau, steps=600, clip=1.0)


@family
def c_labels_mostly_noise(draw: Draw) -> Case:
    """Two bidirectional layers learn from labels of which 60 % are made up."""
    kind, source = draw.one_of(nn.LSTM, nn.GRU), draw.source()
    model = row_reader(draw, kind, num_layers=2, bidirectional=True)

    def noisy() -> Iterator[tasks.Pair]:
        for x, y in digit_rows(draw):
            made_up = torch.rand(y.shape, generator=source) < 0.6
            other = torch.randint(10, y.shape, generator=source)
            yield x, torch.where(made_up, other, y)

    fresh = next(tasks.digits(draw.source(), 300, rows=True))
    return healthy_case(
        model,
        torch.optim.Adam(model.parameters(), 2e-3),
        noisy(),
        classes,
        ends_at(0.3),
        steps=400,
        goal=wrong_of(model, fresh),
    )


# ---- reinforcement learning


@family
def c_reinforce_first_symbol(draw: Draw) -> Case:
    """REINFORCE with a baseline: a loss of either sign that hovers around 0.

    The action at the end earns 1 where it is the symbol that came first.
    """
    actions, length = draw.between(3, 4), draw.between(5, 8)
    rnn = nn.GRU(actions, draw.between(24, 40))
    model = Reader(draw.module_name(), rnn, actions)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    baseline = [1 / actions]

    def policy_loss(model: nn.Module, batch: Batch) -> Tensor:
        x, wanted = batch
        policy = Categorical(logits=model(x))
        action = policy.sample()
        reward = (action == wanted).float()
        loss = -(policy.log_prob(action) * (reward - baseline[0])).mean()
        baseline[0] += 0.1 * (float(reward.mean()) - baseline[0])
        regularized: Tensor = loss - 0.01 * policy.entropy().mean()
        return regularized

    fresh = next(tasks.recall(draw.source(), length, 300, actions))
    return healthy_case(
        model,
        optimizer,
        tasks.recall(draw.source(), length, draw.between(24, 40), actions),
        policy_loss,
        ends_at(0.25),
        steps=500,
        clip=0.5,
        goal=wrong_of(model, fresh),
    )


class Agent(nn.Module):
    """A recurrent net of action values, and the older copy that sets its targets."""

    def __init__(self, name: str, inputs: int, hidden: int, actions: int) -> None:
        super().__init__()
        self.online = Reader(name, nn.LSTM(inputs, hidden), actions, every=True)
        self.target = Reader(name, nn.LSTM(inputs, hidden), actions, every=True)
        self.target.load_state_dict(self.online.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        """Return the values of all actions at each step, ``(T, B, actions)``."""
        q: Tensor = self.online(x)
        return q


def replayed(
    source: torch.Generator, length: int, batch: int, symbols: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield observations, actions by chance, and what they earn.

    An action earns 1 where it is the symbol of the step before.
    """
    while True:
        seen = torch.randint(symbols, (length, batch), generator=source)
        action = torch.randint(symbols, (length, batch), generator=source)
        wanted = torch.cat([seen[:1], seen[:-1]])
        yield one_hot(seen, symbols).float(), action, (action == wanted).float()


@family
def c_recurrent_q_target_net(draw: Draw) -> Case:
    """Recurrent Q-learning: targets from an old copy, so that the loss rises again.

    The copy is loaded every 40 steps or so, and no optimizer has it.
    """
    symbols, hidden = draw.between(3, 4), draw.between(24, 40)
    model = Agent(draw.module_name(), symbols, hidden, symbols)
    optimizer = torch.optim.Adam(model.online.parameters(), 5e-3)
    length, every = draw.between(8, 12), draw.between(30, 50)

    def td_loss(model: Any, batch: Batch) -> Tensor:
        x, action, reward = batch
        q = model(x).gather(-1, action.unsqueeze(-1)).squeeze(-1)
        with torch.no_grad():
            ahead = model.target(x)[1:].amax(-1)
        return smooth_l1_loss(q[:-1], reward[:-1] + 0.9 * ahead)

    def refresh(number: int) -> None:
        if number % every == 0:
            model.target.load_state_dict(model.online.state_dict())

    seen = torch.randint(symbols, (length, 200), generator=draw.source())

    def goal() -> float:
        """Share of steps at which the best action is the wrong one."""
        with torch.no_grad():
            chosen = model(one_hot(seen, symbols).float()).argmax(-1)
        return float((chosen[1:] != seen[:-1]).float().mean())

    return healthy_case(
        model,
        optimizer,
        replayed(draw.source(), length, draw.between(16, 32), symbols),
        td_loss,
        ends_at(0.2),
        steps=500,
        before=refresh,
        goal=goal,
    )
