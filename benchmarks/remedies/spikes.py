"""Runs that die without a clipper: one spike in mid-run, a length jump, one NaN.

The same batches come in the same order whatever the clipper is; only the disturbed
ones differ.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import count
from typing import NamedTuple

import torch
from torch import nn

from benchmarks.remedies import pixels
from benchmarks.remedies.adding import sequences
from benchmarks.remedies.nets import Batch, Loss, Net, generator, squared_error, train
from benchmarks.results import Results, spread
from gradwatch import init
from gradwatch.clip import AGC, AutoClip, Clipper, LogZClip, NormClip, ZClip

LENGTH, HIDDEN, BATCH, TESTED, SIDE = 20, 48, 32, 500, 8

Optimizer = torch.optim.Optimizer


@dataclass(frozen=True)
class Task:
    """What is learned: the adding problem, or the digits row by row.

    Attributes:
        name: As in the table.
        sample: Returns a batch of some length; the digits have their own.
        test: Returns the test set of some length.
        loss: What is minimised, and shown of the test set.
        inputs: Numbers at each step.
        outputs: Of the readout.
    """

    name: str
    sample: Callable[[int, torch.Generator], Batch]
    test: Callable[[int], Batch]
    loss: Loss
    inputs: int
    outputs: int


@cache
def by_row() -> pixels.Split:
    """Return the digits as eight steps of eight pixels."""
    return pixels.Split(
        *(
            (x[..., 0].T.reshape(-1, SIDE, SIDE).transpose(0, 1).contiguous(), y)
            for x, y in pixels.split()
        )
    )


def some_digits(length: int, source: torch.Generator) -> Batch:
    """Return a batch of training images; their length is what it is."""
    x, y = by_row().train
    chosen = torch.randint(len(y), (BATCH,), generator=source)
    return x[:, chosen], y[chosen]


ADDING = Task(
    f"adding, T = {LENGTH}",
    lambda length, source: sequences(length, BATCH, source),
    lambda length: sequences(length, TESTED, generator(10_000)),
    squared_error,
    2,
    1,
)
DIGITS = Task(
    "digits by row",
    some_digits,
    lambda _: by_row().test,
    nn.functional.cross_entropy,
    SIDE,
    pixels.CLASSES,
)


@dataclass(frozen=True)
class Story:
    """A run with something that happens to it.

    Attributes:
        name: What happens.
        task: What is learned.
        make: The recurrent layer, from the number of inputs.
        optimizer: What trains it.
        disturb: What the batch of that step becomes.
        longer: How long the sequences are from there on.
    """

    name: str
    task: Task
    make: Callable[[int], nn.RNNBase]
    optimizer: Callable[[Iterator[nn.Parameter]], Optimizer]
    disturb: Callable[[Batch], Batch] = lambda batch: batch
    longer: int = LENGTH


def gru(inputs: int) -> nn.RNNBase:
    """Return the gated layer."""
    return nn.GRU(inputs, HIDDEN)


def relu(initialiser: Callable[[nn.Module], object], inputs: int) -> nn.RNNBase:
    """Return a ReLU layer, initialised."""
    rnn = nn.RNN(inputs, HIDDEN, nonlinearity="relu")
    initialiser(rnn)
    return rnn


def adam(rate: float) -> Callable[[Iterator[nn.Parameter]], Optimizer]:
    """Return what makes Adam."""
    return lambda parameters: torch.optim.Adam(parameters, rate)


STORIES = (
    Story(
        f"{ADDING.name}, GRU, Adam 3e-3: one target x2000",
        ADDING,
        gru,
        adam(3e-3),
        lambda batch: (batch[0], 2000 * batch[1]),
    ),
    Story(
        f"{DIGITS.name}, ReLU RNN `orthogonal_()`, SGD .05: one input x500",
        DIGITS,
        partial(relu, init.orthogonal_),
        lambda parameters: torch.optim.SGD(parameters, 0.05),
        lambda batch: (500 * batch[0], batch[1]),
    ),
    *(
        Story(
            f"{ADDING.name}, ReLU RNN `identity_()`, Adam 1e-3: T = {longer} from "
            "there on",
            ADDING,
            partial(relu, init.identity_),
            adam(1e-3),
            longer=longer,
        )
        for longer in (100, 200)
    ),
)
POISONED = Story(
    "", ADDING, gru, adam(3e-3), lambda batch: (batch[0] * math.nan, batch[1])
)


def batches(story: Story, disturbed: bool, seed: int, at: int) -> Iterator[Batch]:
    """Yield batches for ever, disturbed at some step or never."""
    source = generator(1000 + seed)
    for step in count():
        length = story.longer if disturbed and step >= at else LENGTH
        batch = story.task.sample(length, source)
        yield story.disturb(batch) if disturbed and step == at else batch


class Outcome(NamedTuple):
    """Test loss before the disturbance and at the end; whether weights are finite."""

    before: float
    after: float
    finite: bool


@torch.no_grad()
def loss_on(net: Net, task: Task, length: int) -> float:
    """Return the loss on the test set."""
    x, y = task.test(length)
    return task.loss(net(x), y).item()


def run(
    story: Story,
    clip: Callable[[Optimizer, Net], object] | None,
    seed: int,
    steps: int,
    disturbed: bool = True,
) -> Outcome:
    """Train; the disturbance comes in the middle."""
    torch.manual_seed(seed)
    task = story.task
    net = Net(story.make(task.inputs), task.outputs)
    optimizer = story.optimizer(net.parameters())
    if clip is not None:
        clip(optimizer, net)
    given = batches(story, disturbed, seed, steps // 2)
    before = math.nan
    for step, _ in enumerate(train(net, optimizer, given, task.loss, steps), 1):
        if step == steps // 2:
            before = loss_on(net, task, LENGTH)
    finite = all(bool(p.isfinite().all()) for p in net.parameters())
    length = story.longer if disturbed else LENGTH
    return Outcome(before, loss_on(net, task, length), finite)


def attach(make: Callable[[], Clipper]) -> Callable[[Optimizer, Net], None]:
    """Return what attaches a new clipper of some kind."""

    def clip(optimizer: Optimizer, net: Net) -> None:
        clipper = make()
        # As its docstring says: not on the last layer.
        chosen = list(net.rnn.parameters()) if isinstance(clipper, AGC) else None
        clipper.attach(optimizer, parameters=chosen)

    return clip


def torch_clip(optimizer: Optimizer, net: Net) -> None:
    """Clip to norm 1 as torch does."""
    optimizer.register_step_pre_hook(
        lambda *_: void(nn.utils.clip_grad_norm_(net.parameters(), 1.0))
    )


def void(_: object) -> None:
    """Return nothing: a hook's value would replace the arguments of the step."""


CLIPS: dict[str, Callable[[Optimizer, Net], object] | None] = {
    "nothing": None,
    "`torch.nn.utils.clip_grad_norm_(1)`": torch_clip,
    "`NormClip(1)`": attach(NormClip),
    "`AutoClip()`": attach(AutoClip),
    "`AutoClip(90)`": attach(lambda: AutoClip(90)),
    "`ZClip()`": attach(ZClip),
    "`LogZClip()`": attach(LogZClip),
    "`AGC()`, not on the readout": attach(AGC),
}


def lives(results: Results, seeds: int, quick: bool) -> None:
    """Report the table of runs that die without a clipper."""
    steps = 20 if quick else 800
    chosen = ("nothing", "`NormClip(1)`", "`LogZClip()`")

    def rows() -> Iterator[tuple[str, ...]]:
        for story in STORIES:
            calm = [run(story, None, s, steps, disturbed=False) for s in range(seeds)]
            cells = [
                ends([run(story, CLIPS[c], s, steps) for s in range(seeds)])
                for c in chosen
            ]
            yield story.name, spread(o.before for o in calm), ends(calm), *cells

    title = (
        f"Runs that die: H = {HIDDEN}, B = {BATCH}; test loss before the "
        f"disturbance at step {steps // 2} of {steps}, and at the end; where sequences "
        "grow the undisturbed run is tested on the short ones. Trivial predictors: "
        f"{1 / 6:.3f} in the adding problem, {math.log(pixels.CLASSES):.2f} of the "
        "digits."
    )
    columns = ("what happens", "before", "undisturbed", "unclipped", *chosen[1:])
    results.table("lives", columns, title, rows())


def ends(outcomes: list[Outcome]) -> str:
    """Return the spread of the last losses."""
    return spread([one.after for one in outcomes])


def nan(results: Results, seeds: int, quick: bool) -> None:
    """Report the table of one NaN batch under every clipper."""
    steps = 20 if quick else 400

    def rows() -> Iterator[tuple[str, ...]]:
        for name, clip in CLIPS.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                hit = [run(POISONED, clip, s, steps) for s in range(seeds)]
            calm = [
                run(POISONED, clip, s, steps, disturbed=False) for s in range(seeds)
            ]
            finite = sum(one.finite for one in hit)
            yield name, f"{finite}/{seeds}", ends(hit), ends(calm)

    title = (
        f"One NaN batch: GRU, adding problem, T = {LENGTH}, Adam 3e-3; the inputs of "
        f"step {steps // 2} of {steps} are NaN. Test loss at the end."
    )
    columns = ("clipper", "weights finite", "with NaN", "without")
    results.table("nan", columns, title, rows())
