"""Healthy runs that look odd: in scale, in schedule, in what is dead, frozen or far.

What makes each odd is measured along with whether it learns; see ``healthy``.
"""

import math
from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from benchmarks.detection.case import Batch, Case, Draw, History, Label, Measured
from benchmarks.detection.case import family as family
from benchmarks.detection.healthy import (
    ALIVE,
    CHARACTERS,
    HALF_OF_SUMS,
    OPENS,
    by_row,
    dead,
    digits,
    ends_below,
    final,
    learned_and,
    pixels,
    reach_end,
    reader,
    rho,
    run,
    speller,
    text,
)
from benchmarks.detection.truth import unrolled
from benchmarks.remedies.unrolled import growth
from gradwatch.init import chrono_, forget_bias_, orthogonal_
from testbed import tasks
from testbed.nets import Loss, classes, values


def _growth(case: Case, history: History) -> float:
    """Log10 of how much the recurrence can enlarge a gradient, at the end."""
    _, streams, _ = unrolled(case)
    return max(growth(stream) for stream in streams.values())


def _clipped(case: Case, history: History) -> float:
    """Share of the steps whose gradient is clipped."""
    assert case.clip is not None
    return sum(norm > case.clip for norm in history.norms) / len(history.norms)


def _scheduled(case: Case, rate: Callable[[int], float]) -> Case:
    """Return the case with a learning rate that depends on the step."""
    begun = case.before

    def before(number: int) -> None:
        if begun is not None:
            begun(number)
        for group in case.optimizer.param_groups:
            group["lr"] = rate(number)

    case.before = before
    return case


def _scaled(loss: Loss, factor: float) -> Loss:
    return lambda model, batch: factor * loss(model, batch)


# ---- opens late, and by itself


@family
def healthy_warm_up_lstm(draw: Draw) -> Case:
    """Digits by pixel, LSTM; Adam warmed up from 0 to 1e-3 over some 400 steps."""
    warm = draw.between(300, 500)
    model = pixels(draw, nn.LSTM, hidden=(40, 64))
    case = run(model, digits(draw), steps=1200, truth=learned_and(**OPENS))
    return _scheduled(case, lambda step: 1e-3 * min(1.0, step / warm))


@family
def healthy_warm_up_gru(draw: Draw) -> Case:
    """Digits by pixel, GRU; Adam warmed up from 0 to 2e-3 over some 250 steps."""
    warm = draw.between(200, 300)
    model = pixels(draw, nn.GRU, hidden=(24, 40))
    case = run(model, digits(draw), steps=700, truth=learned_and(**OPENS))
    return _scheduled(case, lambda step: 2e-3 * min(1.0, step / warm))


@family
def healthy_slow_lstm(draw: Draw) -> Case:
    """Digits by pixel, LSTM; Adam 1e-4."""
    model = pixels(draw, nn.LSTM, hidden=(48, 64))
    truth = learned_and(**OPENS)
    return run(model, digits(draw), lr=1e-4, steps=1700, truth=truth)


@family
def healthy_slow_gru(draw: Draw) -> Case:
    """Digits by pixel, GRU; Adam 3e-4."""
    model = pixels(draw, nn.GRU, hidden=(40, 56))
    truth = learned_and(**OPENS)
    return run(model, digits(draw), lr=3e-4, steps=900, truth=truth)


@family
def healthy_growing_lengths(draw: Draw) -> Case:
    """Recall over lengths that grow from 4 to some 25 as a GRU learns; Adam 5e-3."""
    source, batch, longer = draw.source(), draw.between(16, 32), draw.between(3, 5)

    def batches() -> Iterator[Batch]:
        for length in range(4, 4 + 5 * longer, longer):
            yield from islice(tasks.recall(source, length, batch), 150)
        yield from tasks.recall(source, 4 + 5 * longer, batch)

    return run(reader(draw, nn.GRU, 4, 4), batches(), lr=5e-3, steps=900)


# ---- needs no far memory


@family
def healthy_recent_small_radius(draw: Draw) -> Case:
    """A tanh RNN of small rho recalls what came two steps before; Adam 5e-4.

    It begins at 0.2 to 0.3, and ends below 0.7.
    """
    model = reader(draw, nn.RNN, 4, 4)
    orthogonal_(model, draw.one_of(0.2, 0.25, 0.3))
    length, batch = draw.between(30, 50), draw.between(16, 32)
    batches = tasks.recall(draw.source(), length, batch, lag=2)
    truth = learned_and(rho=(rho, 0.0, 0.7), reach=(reach_end, -math.inf, -6.0))
    return run(model, batches, lr=5e-4, steps=700, truth=truth)


@family
def healthy_recent_gru(draw: Draw) -> Case:
    """A GRU reads a long sequence of which the last steps count; Adam 2e-3."""
    length, batch = draw.between(45, 60), draw.between(16, 24)
    batches = tasks.recall(draw.source(), length, batch, lag=draw.between(1, 2))
    truth = learned_and(reach=(reach_end, -math.inf, -6.0))
    return run(reader(draw, nn.GRU, 4, 4), batches, lr=2e-3, steps=650, truth=truth)


@family
def healthy_recent_chrono_lstm(draw: Draw) -> Case:
    """An LSTM that could remember has no need to: the last steps count; Adam 3e-3."""
    length, batch = draw.between(30, 50), draw.between(16, 32)
    model = reader(draw, nn.LSTM, 4, 4)
    chrono_(model, length)
    batches = tasks.recall(draw.source(), length, batch, lag=draw.between(2, 3))
    truth = learned_and(reach=(reach_end, -4.5, 0.0))
    return run(model, batches, lr=3e-3, steps=700, truth=truth)


@family
def healthy_left_padded_rows(draw: Draw) -> Case:
    """An LSTM reads the rows of digits behind many rows of zeros; Adam 2e-3."""
    pad = draw.between(25, 40)
    batches = (
        (torch.cat([torch.zeros(pad, x.shape[1], 8), x]), y)
        for x, y in digits(draw, rows=True)
    )
    return run(by_row(draw, nn.LSTM), batches, lr=2e-3, steps=700)


def _last_steps(source: torch.Generator, length: int, batch: int) -> Iterator[Batch]:
    """Yield noise ``(T, B, 4)``, its largest of the last step, the mean of three."""
    while True:
        x = torch.randn(length, batch, 4, generator=source)
        yield x, x[-1].argmax(-1), x[-3:].mean((0, 2))


def _two_tasks(model: nn.Module, batch: Batch) -> Tensor:
    x, largest, mean = batch
    out = model(x)
    return cross_entropy(out[:, :4], largest) + mse_loss(out[:, 4], mean)


@family
def healthy_two_tasks_of_the_last_steps(draw: Draw) -> Case:
    """A class and a value, both of the last steps alone; LSTM, Adam 5e-3."""
    batches = _last_steps(draw.source(), draw.between(40, 60), draw.between(16, 32))
    truth = learned_and(reach=(reach_end, -math.inf, -6.0))
    model = reader(draw, nn.LSTM, 4, 5)
    return run(model, batches, loss=_two_tasks, lr=5e-3, steps=650, truth=truth)


# ---- odd weights


@family
def healthy_radius_above_one(draw: Draw) -> Case:
    """A tanh RNN that begins and ends with rho above 1, rows of digits; Adam 1e-3."""
    model = by_row(draw, nn.RNN)
    orthogonal_(model, draw.one_of(1.2, 1.3, 1.4))
    truth = learned_and(rho=(rho, 1.1, math.inf), growth=(_growth, -math.inf, 2.0))
    return run(model, digits(draw, rows=True), truth=truth)


@family
def healthy_large_forget_bias(draw: Draw) -> Case:
    """An LSTM whose forget gates begin wide open recalls; Adam 3e-3."""
    model = reader(draw, nn.LSTM, 4, 4)
    forget_bias_(model, draw.one_of(4.0, 5.0, 6.0))
    batches = tasks.recall(draw.source(), draw.between(25, 50), draw.between(16, 32))
    return run(model, batches, lr=3e-3, steps=500)


@family
def healthy_partly_inactive_relu(draw: Draw) -> Case:
    """A ReLU RNN with some third of its units off for good, rows; Adam 1e-3."""
    model = by_row(draw, nn.RNN, nonlinearity="relu", hidden=(30, 60))
    orthogonal_(model)
    with torch.no_grad():
        model.layer.bias_ih_l0[: round(0.35 * model.layer.hidden_size)] = -10.0
    truth = learned_and(dead=(dead, 0.25, 0.42))
    return run(model, digits(draw, rows=True), steps=400, truth=truth)


@family
def healthy_frozen_embedding(draw: Draw) -> Case:
    """A character model whose embedding is not trained; GRU, Adam 5e-3."""
    model = speller(draw, nn.GRU)
    model.embed.weight.requires_grad_(False)
    truth = ends_below(CHARACTERS)
    return run(model, text(draw), lr=5e-3, clip=5.0, steps=400, truth=truth)


@family
def healthy_frozen_lower_layer(draw: Draw) -> Case:
    """Two layers of LSTM, the lower one frozen on purpose; rows, Adam 5e-3."""
    model = by_row(draw, nn.LSTM, num_layers=2)
    for name, weight in model.layer.named_parameters():
        weight.requires_grad_("l0" not in name)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    # Right as a notice: nobody but the user knows that it is meant.
    label = Label(others=frozenset({"no_gradient"}))
    optimizer = torch.optim.Adam(trained, 5e-3)
    batches = digits(draw, rows=True)
    return run(model, batches, optimizer=optimizer, steps=400, label=label)


# ---- odd scales, and noise


@family
def healthy_loss_times_1000(draw: Draw) -> Case:
    """The loss of an LSTM that recalls is multiplied by 1000; Adam 1e-2."""
    batches = tasks.recall(draw.source(), draw.between(5, 8), draw.between(16, 32))
    model, loss = reader(draw, nn.LSTM, 4, 4), _scaled(classes, 1e3)
    return run(model, batches, loss=loss, lr=1e-2, steps=400)


@family
def healthy_loss_by_1000(draw: Draw) -> Case:
    """The loss of a GRU that reads rows is divided by 1000; Adam 2e-3."""
    model, loss = by_row(draw, nn.GRU), _scaled(classes, 1e-3)
    return run(model, digits(draw, rows=True), loss=loss, lr=2e-3)


def _averages(
    source: torch.Generator, length: int, batch: int, scale: float
) -> Iterator[Batch]:
    """Yield noise ``(T, B, 1)`` and, at each step, its mean of 3 steps, scaled."""
    while True:
        x = torch.randn(length, batch, 1, generator=source)
        before = torch.cat([torch.zeros(2, batch, 1), x])
        yield x, scale * before.unfold(0, 3, 1).mean(-1)[..., 0]


@family
def healthy_targets_of_scale_100(draw: Draw) -> Case:
    """A GRU gives a moving average times 100; Adam 1e-2; below half the variance.

    The variance of the targets is 100^2 / 3, less at the first two steps.
    """
    length, batch = draw.between(15, 30), draw.between(16, 32)
    batches = _averages(draw.source(), length, batch, 100.0)
    truth = ends_below(0.5 * 100**2 / 3)
    model = reader(draw, nn.GRU, 1, 1, every=True)
    return run(model, batches, loss=values, lr=1e-2, steps=700, truth=truth)


@family
def healthy_batches_of_two(draw: Draw) -> Case:
    """A GRU reads rows of digits, two at a time; Adam 1e-3.

    Its loss jumps from step to step, so the mean of the last 100 is asked for.
    """
    batches = tasks.digits(draw.source(), 2, rows=True)
    truth = learned_and(of_100=(_mean_of_100, 0.0, 0.8 * math.log(10)))
    return run(by_row(draw, nn.GRU), batches, steps=900, truth=truth)


def _mean_of_100(case: Case, history: History) -> float:
    return sum(history.losses[-100:]) / 100


@family
def healthy_label_noise(draw: Draw) -> Case:
    """A fifth of the labels are drawn at random; rows, LSTM, Adam 5e-3."""
    noise = draw.source()

    def spoilt(y: Tensor) -> Tensor:
        wrong = torch.randint(10, y.shape, generator=noise)
        return torch.where(torch.rand(y.shape, generator=noise) < 0.2, wrong, y)

    batches = ((x, spoilt(y)) for x, y in digits(draw, rows=True))
    return run(by_row(draw, nn.LSTM), batches, lr=5e-3, steps=400)


# ---- odd optimizers


@family
def healthy_always_clipped(draw: Draw) -> Case:
    """A GRU reads rows, and every gradient is clipped, at 0.05; Adam 2e-3."""
    truth = learned_and(clipped=(_clipped, 0.95, 1.0))
    batches = digits(draw, rows=True)
    return run(by_row(draw, nn.GRU), batches, lr=2e-3, clip=0.05, truth=truth)


@family
def healthy_sgd_momentum(draw: Draw) -> Case:
    """A tanh RNN reads rows of digits; SGD 0.05 with momentum 0.9, clipped at 1."""
    model = by_row(draw, nn.RNN)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    batches = digits(draw, rows=True)
    return run(model, batches, optimizer=optimizer, clip=1.0, steps=400)


@family
def healthy_adamw(draw: Draw) -> Case:
    """A GRU adds two numbers; AdamW 1e-2 with weight decay of 0.01 to 0.1."""
    model, decay = reader(draw, nn.GRU, 2, 1), draw.one_of(0.01, 0.03, 0.1)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=decay)
    batches = tasks.adding(draw.source(), draw.between(8, 14), draw.between(20, 32))
    truth = ends_below(HALF_OF_SUMS)
    return run(model, batches, loss=values, optimizer=optimizer, steps=600, truth=truth)


@family
def healthy_cosine_schedule(draw: Draw) -> Case:
    """An LSTM reads rows; Adam 5e-3, by a cosine to 0."""
    steps = draw.between(350, 450)
    case = run(by_row(draw, nn.LSTM), digits(draw, rows=True), steps=steps)
    return _scheduled(
        case, lambda step: 2.5e-3 * (1 + math.cos(math.pi * step / steps))
    )


# ---- odd loops


@family
def healthy_converged(draw: Draw) -> Case:
    """An LSTM has learnt to recall by half of its steps, and goes on; Adam 1e-2.

    A loss near 0 that stays there: below 0.02 at half-way and at the end.
    """
    batches = tasks.recall(draw.source(), draw.between(4, 6), draw.between(16, 32))
    truth = learned_and(half=(_at_half, 0.0, 0.02), end=(final, 0.0, 0.02))
    return run(reader(draw, nn.LSTM, 4, 4), batches, lr=1e-2, steps=1200, truth=truth)


def _at_half(case: Case, history: History) -> float:
    half = len(history.losses) // 2
    return sum(history.losses[half : half + 20]) / 20


@family
def healthy_validated(draw: Draw) -> Case:
    """A ReLU RNN that is tested on unseen lengths every 25 steps; Adam 1e-3."""
    model = by_row(draw, nn.RNN, nonlinearity="relu")
    orthogonal_(model)
    held = next(tasks.digits(draw.source(), 64, rows=True))[0]
    case = run(model, digits(draw, rows=True), truth=learned_and(**ALIVE), steps=400)
    begun = case.before

    def before(number: int) -> None:
        if begun is not None:
            begun(number)
        if number % 25 == 0:
            model.eval()
            with torch.no_grad():
                model(held[: 4 + number % 4])
            model.train()

    case.before = before
    return case


class Bandit:
    """Chooses one of some arms at the end, by the scores, and is paid for the cue's.

    Attributes:
        rewards: Mean reward of each update.
    """

    def __init__(self, source: torch.Generator) -> None:
        self.source = source
        self.rewards: list[float] = []
        self.usual = 0.0

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of REINFORCE, with a moving average as its baseline."""
        x, cue = batch
        chances = model(x).log_softmax(-1)
        arm = torch.multinomial(chances.detach().exp(), 1, generator=self.source)
        reward = (arm[:, 0] == cue).float()
        advantage = reward - self.usual
        self.rewards.append(float(reward.mean()))
        self.usual = 0.9 * self.usual + 0.1 * self.rewards[-1]
        return -(advantage * chances.gather(1, arm)[:, 0]).mean()


def _is_paid(case: Case, history: History) -> Measured:
    """The loss of a policy gradient is no measure: the reward is, 1/3 by chance."""
    rewards = case.notes["rewards"]
    values = {"begin": sum(rewards[:50]) / 50, "end": sum(rewards[-50:]) / 50}
    return Measured(history.nonfinite is None and values["end"] >= 0.8, values)


@family
def healthy_policy_gradient(draw: Draw) -> Case:
    """REINFORCE: a GRU acts by a cue that it has to remember; Adam 5e-3."""
    bandit, arms = Bandit(draw.source()), 3
    length, batch = draw.between(4, 8), draw.between(16, 32)
    batches = tasks.recall(draw.source(), length, batch, symbols=arms)
    model = reader(draw, nn.GRU, arms, arms)
    case = run(model, batches, loss=bandit.loss, lr=5e-3, steps=600, truth=_is_paid)
    case.notes["rewards"] = bandit.rewards
    return case
