"""What the loss reads: its kind, its targets, and the best constant in their place."""

import math
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradwatch
from gradwatch.depths.readout import launch
from gradwatch.facts import Facts
from gradwatch.hooks import calls, graph
from gradwatch.hooks.readout import Taken
from gradwatch.kinds.loss_mismatch import LossMismatch
from gradwatch.kinds.target_broadcast import TargetBroadcast
from gradwatch.metrics import run_key
from gradwatch.numerics.readout import (
    best_constant,
    binary_targets,
    cross_entropy_targets,
    squared_targets,
)
from gradwatch.record import StepRecord
from testbed.models import Loop, Tagger, batches, lstm

CONSTANT, WEIGHT, SHARE = map(run_key, ("loss_constant", "loss_weight", "target_share"))
SCALE = run_key("readout_rms")


# ---- targets from gradients, beside those that were used


def gradient(scores, loss):
    (found,) = torch.autograd.grad(loss, scores)
    return found


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_targets_of_a_cross_entropy_are_those_that_were_used(reduction, spread):
    torch.manual_seed(0)
    scores = (spread * torch.randn(200, 7)).requires_grad_()
    y = torch.randint(7, (200,))
    y[::4] = -100
    loss = F.cross_entropy(scores, y, reduction=reduction)
    found = cross_entropy_targets(scores.detach(), gradient(scores, loss))
    used = y[y != -100]
    lost = 0.02 if spread == 30 else 1e-3  # where p rounds to 1, no gradient is left
    assert found.misfit < 1e-3
    assert found.weight == pytest.approx(1 if reduction == "mean" else 150, rel=lost)
    shares = torch.bincount(used, minlength=7) / len(used)
    torch.testing.assert_close(found.sums, shares, atol=lost, rtol=0)
    assert found.share == pytest.approx(0.75, abs=lost)


def test_classes_that_weigh_more_are_counted_so():
    torch.manual_seed(0)
    scores, y = torch.randn(300, 3, requires_grad=True), torch.randint(3, (300,))
    weight = torch.tensor([1.0, 2.0, 5.0])
    loss = F.cross_entropy(scores, y, weight=weight)
    found = cross_entropy_targets(scores.detach(), gradient(scores, loss))
    assert found.misfit < 1e-4
    prior = torch.bincount(y, minlength=3) * weight
    torch.testing.assert_close(found.sums, prior / prior.sum(), atol=1e-4, rtol=0)
    # Whatever the constant scores are, none has a smaller loss.
    least = best_constant("cross_entropy", found.sums) * found.weight
    fit = torch.zeros(3, requires_grad=True)
    search = torch.optim.LBFGS([fit], max_iter=100)

    def closure():
        search.zero_grad()
        loss = F.cross_entropy(fit.expand(300, 3), y, weight=weight)
        loss.backward()
        return loss

    search.step(closure)
    assert closure().item() == pytest.approx(least.item(), rel=1e-4)


@pytest.mark.parametrize("broken", ["smoothed", "another axis"])
def test_what_is_no_plain_cross_entropy_does_not_fit(broken):
    torch.manual_seed(0)
    scores = torch.randn(6, 5, requires_grad=True)
    if broken == "smoothed":
        loss = F.cross_entropy(scores, torch.randint(5, (6,)), label_smoothing=0.2)
    else:
        loss = F.cross_entropy(scores.t(), torch.randint(6, (5,)))
    assert cross_entropy_targets(scores.detach(), gradient(scores, loss)).misfit > 0.02


def test_targets_of_a_binary_cross_entropy_are_those_that_were_used():
    torch.manual_seed(0)
    scores = torch.randn(500, 3, requires_grad=True)
    y = (torch.rand(500, 3) < torch.tensor([0.1, 0.5, 0.8])).float()
    loss = F.binary_cross_entropy_with_logits(scores, y)
    found = binary_targets(scores.detach(), gradient(scores, loss))
    assert found.misfit < 1e-4 and found.weight == pytest.approx(1, rel=1e-4)
    torch.testing.assert_close(found.sums[0], y.mean(0), atol=1e-4, rtol=0)
    mean = y.mean(0)
    entropy = -(mean * mean.log() + (1 - mean) * (1 - mean).log()).mean()
    found = best_constant("bce_with_logits", found.sums)
    assert found.item() == pytest.approx(entropy.item(), rel=1e-4)


def test_soft_binary_targets_do_not_fit():
    torch.manual_seed(0)
    scores = torch.randn(50, 3, requires_grad=True)
    loss = F.binary_cross_entropy_with_logits(scores, torch.rand(50, 3))
    assert binary_targets(scores.detach(), gradient(scores, loss)).misfit > 0.02


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_targets_of_squared_errors_are_those_that_were_used(reduction):
    torch.manual_seed(0)
    outputs = torch.randn(400, 2, requires_grad=True)
    y = torch.tensor([3.0, -1.0]) + torch.randn(400, 2) * torch.tensor([0.5, 2.0])
    loss = F.mse_loss(outputs, y, reduction=reduction)
    found = squared_targets(outputs.detach(), gradient(outputs, loss), loss.detach())
    assert found.weight == pytest.approx(1 if reduction == "mean" else 800, rel=1e-4)
    torch.testing.assert_close(found.sums[0], y.mean(0), atol=1e-4, rtol=1e-4)
    constant = best_constant("mse", found.sums).item()
    assert constant == pytest.approx(y.var(0, correction=0).mean().item(), rel=1e-3)


# ---- the kind of a loss


def seen(build):
    """Return what is seen of a loss while its backward runs."""
    weight = nn.Parameter(torch.zeros(1))
    found = []
    root = build(weight)
    weight.register_post_accumulate_grad_hook(lambda p: found.append(graph.look(root)))
    root.backward()
    return found[0]


def written(kind, chance):
    """Return a loss of a kind, written in one of the usual ways."""
    c, n, t = chance.randint(2, 9), chance.randint(1, 12), chance.randint(1, 6)
    reduction = chance.choice(["mean", "sum", "none"])
    head = nn.Linear(4, c)
    x = torch.randn(t, n, 4)
    over = {"mean": torch.mean, "sum": torch.sum, "none": torch.mean}[reduction]

    def scores(weight):
        out = head(x + weight)
        shape = chance.choice(["flat", "last", "classes first"])
        if shape == "flat":
            return chance.choice([out.view(-1, c), out.flatten(0, 1)]), -1
        if shape == "last":
            return out[-1], -1
        return out.permute(1, 2, 0), 1

    def build(weight):
        out, axis = scores(weight)
        if kind in ("cross_entropy", "nll"):
            shape = [s for i, s in enumerate(out.shape) if i != axis % out.dim()]
            y = torch.randint(c, shape)
            if kind == "nll":
                bad = chance.choice([out.softmax(axis), out, out.relu()])
                loss = F.nll_loss(bad, y, reduction=reduction)
            elif axis == -1 and chance.random() < 0.25:
                log = out.log_softmax(-1)
                loss = -log.gather(1, y[:, None])
                if chance.random() < 0.5:
                    loss = -log[torch.arange(len(y)), y]
            elif chance.random() < 0.4:
                loss = F.nll_loss(out.log_softmax(axis), y, reduction=reduction)
            else:
                how = chance.choice([{}, {"weight": torch.rand(c) + 0.1}])
                loss = F.cross_entropy(out, y, reduction=reduction, **how)
        elif kind == "bce":
            loss = F.binary_cross_entropy(
                out.sigmoid(), torch.rand_like(out), reduction=reduction
            )
        elif kind == "bce_with_logits":
            loss = F.binary_cross_entropy_with_logits(
                out, torch.rand_like(out), reduction=reduction
            )
        elif kind == "mse":
            y = torch.randn_like(out)
            ways = [
                lambda: F.mse_loss(out, y, reduction=reduction),
                lambda: (out - y) ** 2,
                lambda: (y - out).square(),
                lambda: nn.MSELoss()(out, y),
            ]
            loss = chance.choice(ways)()
        else:
            y = torch.randn_like(out)
            ways = [
                lambda: F.l1_loss(out, y, reduction=reduction),
                lambda: (out - y).abs(),
            ]
            loss = chance.choice(ways)()
        loss = over(loss) if loss.dim() else loss
        dressed = chance.random()
        if dressed < 0.2:
            loss = loss + 1e-4 * sum(p.square().sum() for p in head.parameters())
        elif dressed < 0.4:
            loss = chance.choice([loss / 4, 1024.0 * loss])
        elif dressed < 0.5:
            mask = (torch.rand(()) < 2).float()
            loss = (loss * mask) / mask.sum()
        return loss

    return build, head


def look_at(kind, chance):
    build, head = written(kind, chance)
    found = seen(build)
    assert found is not None, kind
    assert found.kind == kind
    assert not found.others
    own = {id(p) for p in head.parameters()}
    assert {id(weight) for weight in found.weights} == own
    return found


KINDS = ["cross_entropy", "nll", "bce", "bce_with_logits", "mse", "l1"]


def test_the_kind_of_a_loss_is_read_from_its_graph():
    chance = random.Random(0)
    torch.manual_seed(0)
    for i in range(600):
        look_at(KINDS[i % 6], chance)


@pytest.mark.slow
def test_the_kind_of_a_loss_is_right_at_ten_thousand_looks():
    chance = random.Random(1)
    torch.manual_seed(1)
    for i in range(10_000):
        look_at(KINDS[i % 6], chance)


HEAD = nn.Linear(4, 3)
X = torch.randn(8, 4)
Y = torch.randint(3, (8,))

ODD = {
    "softmax twice": (
        lambda o: F.cross_entropy(o.softmax(-1), Y),
        {"kind": "cross_entropy", "reads": ("Softmax",), "softmax": (1, -1)},
    ),
    "NLL of probabilities": (
        lambda o: F.nll_loss(o.softmax(-1), Y),
        {"kind": "nll", "reads": ("Softmax",)},
    ),
    "NLL of raw scores": (lambda o: F.nll_loss(o, Y), {"kind": "nll", "reads": ()}),
    "softmax over the batch": (
        lambda o: F.nll_loss(o.log_softmax(0), Y),
        {"kind": "cross_entropy", "softmax": (0,), "classes": (8, 3)},
    ),
    "sigmoid twice": (
        lambda o: F.binary_cross_entropy_with_logits(o.sigmoid(), torch.rand(8, 3)),
        {"kind": "bce_with_logits", "reads": ("Sigmoid",)},
    ),
    "a ReLU before squared errors": (
        lambda o: F.mse_loss(o.relu(), torch.randn(8, 3)),
        {"kind": "mse", "reads": ("Relu",)},
    ),
    "a logarithm of a softmax": (
        lambda o: F.nll_loss(o.softmax(-1).log(), Y),
        {"kind": "nll", "reads": ("Log", "Softmax")},
    ),
    "a column beside a row": (
        lambda o: F.mse_loss(o[:, :1], torch.randn(8)),
        {"kind": "mse", "broadcast": ((8, 1), (8, 8))},
    ),
    "a column minus a row": (
        lambda o: (o[:, :1] - torch.randn(8)).square().mean(),
        {"kind": "mse", "broadcast": ((8, 1), (8, 8))},
    ),
    "a row beside a column, as L1": (
        lambda o: F.l1_loss(o[:, 0], torch.randn(8, 1)),
        {"kind": "l1", "broadcast": ((8,), (8, 8))},
    ),
    "two losses": (
        lambda o: F.cross_entropy(o, Y) + F.mse_loss(o, torch.zeros(8, 3)),
        {"others": ("mse",), "alone": True, "terms": 2},
    ),
    "a term a row": (
        lambda o: sum(F.cross_entropy(row[None], Y[:1]) for row in o),
        {"kind": "cross_entropy", "terms": 8, "alone": True},
    ),
    "a penalty beside it": (
        lambda o: F.mse_loss(o, torch.zeros(8, 3)) + HEAD.weight.square().sum(),
        {"kind": "mse", "alone": False},
    ),
}


class LogProbabilities(torch.autograd.Function):
    """Whatever a function of one's own does, it may normalise."""

    @staticmethod
    def forward(ctx, scores, weight):
        ctx.save_for_backward(weight)
        return scores

    @staticmethod
    def backward(ctx, grad):
        return grad, torch.zeros_like(ctx.saved_tensors[0])


@pytest.mark.parametrize(
    "build",
    [
        lambda o: F.nll_loss(LogProbabilities.apply(o, HEAD.weight), Y),
        lambda o: F.nll_loss((o.softmax(-1) + 1e-8).log(), Y),
        lambda o: F.nll_loss(o - o.logsumexp(-1, keepdim=True), Y),
        lambda o: F.nll_loss(o.log_softmax(-1) * 0.5, Y),
        lambda o: F.cross_entropy(o.log_softmax(-1), Y),
        lambda o: F.cross_entropy(10 * o.sigmoid(), Y),
        lambda o: F.mse_loss(o.relu(), torch.rand(8, 3)),
        lambda o: F.mse_loss(o[:, None], torch.rand(8, 5, 3)),
        lambda o: F.mse_loss(o.mean(), torch.rand(8)),
        lambda o: F.binary_cross_entropy(o.softmax(-1), torch.rand(8, 3)),
    ],
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_what_is_unusual_and_sound_raises_no_alarm(build):
    made = seen(lambda weight: build(HEAD(X + weight)))
    facts = launch(Taken(torch.zeros(()), made, "head", True, ())).facts
    for rule in (LossMismatch(), TargetBroadcast()):
        given = [
            alert
            for step in range(20)
            for alert in rule.update(
                StepRecord(step=step, time=0.0, metrics={}, facts=Facts(run=facts))
            )
        ]
        assert given == [] and not rule.active


def test_what_compiled_code_returns_is_not_guessed():
    model = lstm()
    read = torch.compile(lambda h: model.head(h).log_softmax(-1), backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradwatch.watch(model, dir=None, wandb=None, budget=None) as watch:
        for x in batches(20):
            out = read(model.rnn(x)[0][-1])
            optimizer.zero_grad()
            F.nll_loss(out, classes(x)).backward()
            optimizer.step()
    assert [a for a in watch.alerts if a.kind == "loss_mismatch"] == []
    assert facts(watch).loss_reads == "compiled_function"


def of_views(read, recurrent=None):
    """Return the views that mix axes on the way from a recurrent module to a loss."""
    rnn = recurrent or nn.LSTM(4, 6, 2)
    head = nn.LazyLinear(3)
    x = torch.randn(7, 5, 4)
    return seen(lambda weight: read(rnn, head, x + weight)).views


def scores_loss(scores):
    return F.cross_entropy(scores, torch.randint(3, scores.shape[:1]))


@pytest.mark.parametrize(
    ("read", "views"),
    [
        (lambda r, h, x: scores_loss(h(r(x)[0][-1])), ()),
        (lambda r, h, x: scores_loss(h(r(x)[0]).view(-1, 3)), ()),
        (lambda r, h, x: scores_loss(h(r(x)[0].view(35, 6))), ()),
        (lambda r, h, x: scores_loss(h(r(x)[0].transpose(0, 1).reshape(5, -1))), ()),
        (lambda r, h, x: scores_loss(h(r(x)[1][0].transpose(0, 1).flatten(1))), ()),
        (
            lambda r, h, x: scores_loss(h(r(x)[1][0].view(5, -1))),
            (((2, 5, 6), (5, 12)),),
        ),
        (
            lambda r, h, x: scores_loss(h(r(x)[0].view(5, 7, 6)[:, -1])),
            (((7, 5, 6), (5, 7, 6)),),
        ),
        (
            lambda r, h, x: scores_loss(h(r(x)[0].reshape(5, -1))),
            (((7, 5, 6), (5, 42)),),
        ),
        (
            lambda r, h, x: scores_loss(h(r(x)[0]).view(5, 21)[:, :3]),
            (((7, 5, 3), (5, 21)),),
        ),
    ],
)
def test_a_view_that_mixes_axes_is_seen(read, views):
    assert of_views(read) == views


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("name", ODD)
def test_what_is_odd_about_a_loss_is_seen(name):
    build, expected = ODD[name]
    found = seen(lambda weight: build(HEAD(X + weight)))
    assert {key: getattr(found, key) for key in expected} == expected


@pytest.mark.parametrize(
    "build",
    [
        lambda o: o.square().mean(),
        lambda o: -(o.log_softmax(-1) * o.softmax(-1).detach()).sum(),
        lambda o: (o[1:] - o[:-1]).square().mean(),
        lambda o: o.logsumexp(-1).mean(),
        lambda o: F.cosine_similarity(o, torch.ones(3)).mean(),
    ],
)
def test_what_is_no_known_loss_is_not_guessed(build):
    assert seen(lambda weight: build(HEAD(X + weight))) is None


# ---- in training


def watched(model, loss, steps=12, labels=None, **how):
    """Train under a watch that looks at every step; return it, closed."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    options = {"every": 1, "budget": None, "dir": None, "wandb": None, **how}
    with gradwatch.watch(model, **options) as watch:
        for x in batches(steps, batch=9):
            optimizer.zero_grad()
            loss(model, x).backward()
            optimizer.step()
        watch.flush()
        assert watch.health["failed"] == {}
    assert not any(calls.seeing(module) for module in model.modules())
    return watch


def first(watch, key):
    return watch.records.series(key)[1]


def classes(x, count=3):
    return x[-1, :, :count].argmax(-1)


def facts(watch):
    [found] = [r.facts.run for r in watch.records if r.facts.run.loss_kind]
    return found


def test_the_constant_is_the_entropy_of_the_targets_seen_so_far():
    watch = watched(lstm(), lambda m, x: F.cross_entropy(m(x), classes(x)))
    found = facts(watch)
    assert (found.readout, found.loss_kind, found.loss_terms) == (
        "head",
        "cross_entropy",
        1,
    )
    assert (found.loss_reads, found.loss_axes) == ("", "1")
    steps, constants = watch.records.series(CONSTANT)
    assert steps.tolist() == list(range(1, 12))  # the first backward names the module
    counts = torch.zeros(3)
    for x, constant in zip(list(batches(12, batch=9))[1:], constants, strict=True):
        counts += torch.bincount(classes(x), minlength=3)
        q = counts / counts.sum()
        entropy = -torch.special.xlogy(q, q).sum().item()
        assert constant == pytest.approx(entropy, rel=1e-4)
    assert set(first(watch, WEIGHT).round(4)) == {1.0}
    assert set(first(watch, SHARE)) == {1.0}


def summed_over_time(model, x):
    out = model.head(model.rnn(x)[0])
    return sum(F.cross_entropy(row, classes(x)) for row in out)


def all_at_once(model, x):
    out = model.head(model.rnn(x)[0])
    y = classes(x).expand(len(x), -1)
    return F.cross_entropy(out.transpose(1, 2), y)


def half_masked(model, x):
    out = model.head(model.rnn(x)[0])
    y = classes(x).expand(len(x), -1).clone()
    y[: len(x) // 2] = -100
    return F.cross_entropy(out.reshape(-1, 3), y.reshape(-1))


def head_in_a_loop(model, x):
    state, total = None, 0.0
    for row in x:
        out, state = model.rnn(row[None], state)
        total = total + F.cross_entropy(model.head(out[0]), classes(x))
    return total


@pytest.mark.parametrize(
    ("loss", "weight", "share"),
    [
        (summed_over_time, 6, 1),
        (all_at_once, 1, 1),
        (half_masked, 1, 0.5),
        (head_in_a_loop, 6, 1),
    ],
)
def test_positions_and_their_weight(loss, weight, share):
    """The root's forward is never called here; the head is found by its weights."""
    watch = watched(lstm(), loss)
    assert facts(watch).readout == "head"
    assert first(watch, WEIGHT) == pytest.approx(weight, rel=1e-3)
    assert first(watch, SHARE) == pytest.approx(share, rel=1e-6)


def test_of_squared_errors_the_constant_is_their_variance():
    model = Tagger(nn.GRU(4, 8), 8, 1)
    loss = lambda m, x: F.mse_loss(m(x)[:, 0], x[-1, :, 0])  # noqa: E731
    watch = watched(model, loss, steps=200)
    y = batches(200, batch=9)[1:, -1, :, 0]
    assert first(watch, CONSTANT)[-1] == pytest.approx(y.var().item(), rel=1e-2)
    assert first(watch, WEIGHT) == pytest.approx(1, rel=1e-3)


def test_a_loss_scaler_changes_nothing():
    model = lstm()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    with gradwatch.watch(model, every=1, budget=None, dir=None, wandb=None) as watch:
        for x in batches(6):
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(x), classes(x))).backward()
            scaler.step(optimizer)
            scaler.update()
    assert first(watch, WEIGHT) == pytest.approx(1, rel=1e-3)


def test_hand_written_updates_close_the_step_at_the_next_backward():
    model = lstm()
    with gradwatch.watch(model, every=1, budget=None, dir=None, wandb=None) as watch:
        for x in batches(8):
            F.cross_entropy(model(x), classes(x)).backward()
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(p.grad, alpha=0.1)
                    p.grad = None
    assert len(first(watch, WEIGHT)) >= 6


def test_a_cell_in_a_loop_and_its_head():
    watch = watched(
        Loop(nn.GRUCell(4, 8), 8), lambda m, x: F.cross_entropy(m(x), classes(x))
    )
    assert facts(watch).readout == "head"
    assert first(watch, WEIGHT) == pytest.approx(1, rel=1e-3)


class Writes(nn.Module):
    """Writes a character at a time, through one head, and stacks the scores."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRUCell(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        h, scores = torch.zeros(x.shape[1], 8), []
        for one in x:
            h = self.cell(one, h)
            scores.append(self.head(h))
        return torch.stack(scores)


def at_each_step(x):
    return x[..., :3].argmax(-1)


@pytest.mark.parametrize("joined", [False, True])
def test_outputs_that_are_stacked_are_all_counted(joined):
    """As one loss of a stack, and as the mean of a loss a time step."""

    def loss(model, x):
        scores, y = model(x), at_each_step(x)
        if joined:
            return F.cross_entropy(scores.flatten(0, 1), y.flatten())
        each = [F.cross_entropy(s, t) for s, t in zip(scores, y, strict=True)]
        return sum(each) / len(each)

    watch = watched(Writes(), loss)
    assert first(watch, WEIGHT) == pytest.approx(1, rel=1e-3)
    counts = torch.zeros(3)
    constants = first(watch, CONSTANT)
    for x, constant in zip(list(batches(12, batch=9))[1:], constants, strict=True):
        counts += torch.bincount(at_each_step(x).flatten(), minlength=3)
        q = counts / counts.sum()
        entropy = -torch.special.xlogy(q, q).sum().item()
        assert constant == pytest.approx(entropy, rel=1e-4)


def test_of_a_part_of_the_loss_no_constant_is_told():
    def loss(model, x):
        return F.cross_entropy(model(x).flatten(0, 1), at_each_step(x).flatten()) + 5

    watch = watched(Writes(), loss)
    assert first(watch, WEIGHT) == pytest.approx(1, rel=1e-3)
    assert all(CONSTANT not in record.metrics for record in watch.records)


def test_an_output_that_is_changed_in_place_is_left_out():
    watch = watched(
        lstm(), lambda m, x: F.cross_entropy(m(x).mul_(2.0), classes(x)), steps=5
    )
    assert facts(watch).loss_kind == "cross_entropy"
    assert CONSTANT not in watch.records.keys()  # noqa: SIM118


def test_a_head_that_is_exchanged_is_followed():
    model = lstm()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradwatch.watch(model, every=1, budget=None, dir=None, wandb=None) as watch:
        for i, x in enumerate(batches(90)):
            if i == 20:
                old, model.head = model.head, nn.Linear(8, 4)
                optimizer = torch.optim.SGD(model.parameters(), 0.1)
            optimizer.zero_grad()
            F.cross_entropy(model(x), classes(x)).backward()
            optimizer.step()
        assert not calls.seeing(old)
    steps = watch.records.series(CONSTANT)[0]
    assert steps[0] == 1 and steps[-1] == 89 and 20 not in steps


def test_what_is_seen_is_let_go():
    model = lstm()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradwatch.watch(model, every=1, budget=None, dir=None, wandb=None) as watch:
        for x in batches(3):
            F.cross_entropy(model(x), classes(x)).backward()
            optimizer.step()
            optimizer.zero_grad()
        readout = watch._engine._modules.readout
        assert readout._looks == [] and readout._seen is None
        model(x)  # a forward of nothing
    assert readout._module is None and not calls.seeing(model.head)


def test_the_memory_of_targets_is_resumed():
    model = lstm()
    loss = lambda m, x: F.cross_entropy(m(x), classes(x))  # noqa: E731
    whole = watched(model, loss)
    state = whole.state_dict()["pipeline"]["memory"]["readout"]
    assert state["kind"] == "cross_entropy" and state["positions"] == 99
    assert math.isclose(sum(state["sums"][0]), 1, rel_tol=1e-6)
