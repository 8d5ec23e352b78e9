"""What happens around the recurrence: rates that jump, weights that others write."""

import copy

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.record import Remedy
from testbed.models import batches, lstm

RHO = "gradwatch/rnn/l0/rho"


class Trained:
    """A training of some steps, with something done between two of them."""

    def __init__(self, optimizer=torch.optim.Adam, rate=1e-2, groups=None, **watch):
        self.model = lstm()
        params = groups(self.model) if groups else self.model.parameters()
        self.optimizer = optimizer(params, rate)
        options = {"dir": None, "wandb": None, "budget": None, **watch}
        self.watch = gradwatch.watch(self.model, **options)

    def run(self, steps, before=lambda i, train: None, after=lambda i, train: None):
        for i, x in enumerate(batches(steps)):
            before(i, self)
            self.optimizer.zero_grad()
            self.model(x).square().mean().backward()
            after(i, self)
            self.optimizer.step()
        self.watch.close()
        assert self.watch.health["failed"] == {}
        return self

    def events(self, word):
        records = self.watch.records
        return [(r.step, e) for r in records for e in r.events if e.startswith(word)]


def rate_to(value, at, group=0):
    def change(i, train):
        if i == at:
            train.optimizer.param_groups[group]["lr"] = value

    return change


# ---- learning rates


@pytest.mark.parametrize("at", [1, 37, 100, 131])
@pytest.mark.parametrize("watch", [{}, {"budget": 0.03}])
def test_a_jump_of_the_rate_is_an_event_with_both_values(at, watch):
    train = Trained(rate=0.003, **watch).run(140, rate_to(3.0, at))
    assert train.events("lr") == [(at, "lr: 0.003 -> 3")]


def test_of_several_groups_it_says_which():
    def groups(model):
        return [{"params": model.rnn.parameters()}, {"params": model.head.parameters()}]

    train = Trained(groups=groups).run(60, rate_to(0.0, 40, group=1))
    assert train.events("lr") == [(40, "lr: 0.01 -> 0 of group 1")]


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 120, 1e-3),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, 120),
        lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.97),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda i: min(1, i / 30)),
    ],
)
def test_a_schedule_that_glides_is_none(scheduler):
    train = Trained()
    plan = scheduler(train.optimizer)
    train.run(110, after=lambda i, train: plan.step() if i else None)
    assert train.events("lr") == []


def test_a_rate_that_is_divided_by_ten_is_told():
    train = Trained()
    plan = torch.optim.lr_scheduler.MultiStepLR(train.optimizer, [50])
    train.run(80, before=lambda i, train: plan.step() if i else None)
    assert train.events("lr") == [(50, "lr: 0.01 -> 0.001")]


# ---- how weights are trained


def run_facts(watch, name):
    found = [getattr(r.facts.run, name) for r in watch.records]
    return [value for value in found if value is not None]


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (
            lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=0.5, maximize=True),
            {
                "AdamW": {
                    "lr": 0.01,
                    "weight_decay": 0.5,
                    "betas": [0.9, 0.999],
                    "eps": 1e-8,
                    "maximize": True,
                }
            },
        ),
        (
            lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, nesterov=True),
            {"SGD": {"lr": 0.01, "momentum": 0.9, "nesterov": True}},
        ),
        (
            lambda p, lr: torch.optim.RMSprop(p, lr, alpha=0.5),
            {"RMSprop": {"lr": 0.01, "alpha": 0.5, "eps": 1e-8}},
        ),
    ],
)
def test_the_options_of_the_optimizer_are_facts(optimizer, expected):
    train = Trained(optimizer).run(10)
    assert run_facts(train.watch, "optimizers") == [expected]
    assert run_facts(train.watch, "unheld") == [()]


def test_every_parameter_that_no_optimizer_holds_is_named():
    def groups(model):
        return [*model.rnn.parameters()][:-1]

    train = Trained(groups=groups).run(10)
    names = ("rnn.bias_hh_l0", "head.weight", "head.bias")
    assert run_facts(train.watch, "unheld") == [names]


def test_two_optimizers_hold_all_together():
    model = lstm()
    first = torch.optim.SGD(model.rnn.parameters(), 0.1)
    second = torch.optim.SGD(model.head.parameters(), 0.2)
    with gradwatch.watch(model, dir=None, wandb=None, budget=None) as watch:
        for x in batches(12):
            model.zero_grad()
            model(x).square().mean().backward()
            first.step()
            second.step()
    last = run_facts(watch, "optimizers")[-1]
    assert last == {"SGD": {"lr": 0.1}, "SGD'": {"lr": 0.2}}
    assert run_facts(watch, "unheld") in ([()], [("head.weight", "head.bias"), ()])


# ---- weights that somebody else writes


def load(i, train):
    if i == 20:
        torch.manual_seed(5)
        other = {k: torch.randn_like(v) for k, v in train.model.state_dict().items()}
        train.model.load_state_dict(other)


def write(how):
    def between(i, train):
        if i == 20:
            weight = train.model.rnn.weight_hh_l0
            if how == "no_grad":
                with torch.no_grad():
                    weight.mul_(2.0)
            elif how == "data":
                weight.data.mul_(2.0)
            elif how == "numpy":
                weight.detach().numpy()[...] *= 2.0
            else:
                weight.data = 2.0 * weight.data

    return between


@pytest.mark.parametrize(
    "between",
    [load, *map(write, ("no_grad", "data", "numpy", "new data"))],
    ids=["a checkpoint", "no_grad", "data", "numpy", "new data"],
)
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_weights_written_between_two_steps_are_an_event_and_rho_is_measured(
    between, optimizer
):
    train = Trained(optimizer).run(40, between)
    assert train.events("written") == [(20, "written:rnn.l0")]
    steps, rho = train.watch.records.series(RHO)
    before, after = rho[steps < 20][-1], rho[steps >= 20]
    assert steps[steps >= 20][0] <= 22
    assert after[0] > 1.5 * before


def test_weights_written_between_backward_and_step_are_one_too():
    train = Trained().run(40, after=write("no_grad"))
    assert train.events("written") == [(20, "written:rnn.l0")]


def clamped(i, train):
    with torch.no_grad():
        for p in train.model.parameters():
            p.clamp_(-0.5, 0.5)


def test_what_is_written_at_every_step_is_told_once():
    train = Trained().run(140, clamped)
    assert train.events("written") == [(1, "written:rnn.l0")]


def averaged(i, train):
    """Evaluate with other weights, and put the old ones back."""
    if i == 30:
        kept = copy.deepcopy(train.model.state_dict())
        train.model.load_state_dict(kept)


HEALTHY = {
    "nothing": (lambda i, train: None, {}),
    "a pause": (
        lambda i, train: (
            train.watch.pause()
            if i == 20
            else train.watch.resume()
            if i == 40
            else None
        ),
        {},
    ),
    "a copy": (lambda i, train: copy.deepcopy(train.model), {}),
    "an evaluation": (lambda i, train: train.model.eval() and train.model.train(), {}),
    "a state that is saved": (lambda i, train: train.model.state_dict(), {}),
    "a rate that changes": (rate_to(0.02, 30), {}),
    "fused": (lambda i, train: None, {"optimizer": "fused"}),
    "with a budget": (lambda i, train: None, {"budget": 0.03}),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_nothing_is_told_where_optimizers_alone_write(name):
    between, how = HEALTHY[name]
    if how.get("optimizer") == "fused":
        how = {"optimizer": lambda p, lr: torch.optim.Adam(p, lr, fused=True)}
    train = Trained(**how).run(150, between)
    assert train.events("written") == [] and train.events("lr") == []


def test_a_remedy_of_ours_is_no_other_hand():
    train = Trained()

    def between(i, train):
        if i == 20:
            train.watch.apply(
                Remedy(name="init.orthogonal_", args={"streams": ["rnn.l0"]})
            )

    train.run(40, between)
    assert train.events("written") == []
    assert train.events("reinit") == [(20, "reinit:rnn.l0")]


def test_two_optimizers_that_share_a_weight_are_no_other_hands():
    model = lstm()
    first = torch.optim.SGD(model.parameters(), 0.1)
    second = torch.optim.SGD([model.rnn.weight_hh_l0], 0.1)
    with gradwatch.watch(model, dir=None, wandb=None, budget=None) as watch:
        for x in batches(40):
            model.zero_grad()
            model(x).square().mean().backward()
            first.step()
            second.step()
    events = [e for r in watch.records for e in r.events]
    assert not [e for e in events if e.startswith("written")]


def test_a_net_of_cells_is_looked_at_too():
    cell = nn.GRUCell(4, 8)
    optimizer = torch.optim.Adam(cell.parameters(), 1e-2)
    with gradwatch.watch(cell, dir=None, wandb=None, budget=None) as watch:
        for i, x in enumerate(batches(30)):
            if i == 12:
                with torch.no_grad():
                    cell.weight_hh.zero_()
            optimizer.zero_grad()
            state = None
            for row in x:
                state = cell(row, state)
            state.square().mean().backward()
            optimizer.step()
    [stream] = watch.streams
    events = [(r.step, e) for r in watch.records for e in r.events]
    assert (12, f"written:{stream.name}") in events


# ---- the order of calls


def clipped(model):
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def ordered(*order, steps=12, set_to_none=True):
    """Train by calls in some order; return the facts of the run, joined."""
    model = lstm()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    calls = {
        "clear": lambda x: optimizer.zero_grad(set_to_none=set_to_none),
        "backward": lambda x: model(x).square().mean().backward(),
        "clip": lambda x: clipped(model),
        "step": lambda x: optimizer.step(),
    }
    with gradwatch.watch(model, dir=None, wandb=None, budget=None) as watch:
        for x in batches(steps):
            for name in order:
                calls[name](x)
    assert watch.health["failed"] == {}
    return run_facts(watch, "written_late")


def test_a_clip_after_the_step_is_seen():
    assert ordered("clear", "backward", "step", "clip") == [True]
    assert ordered("backward", "step", "clip", "clear") == [True]


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize(
    "order",
    [
        ("clear", "backward", "clip", "step"),
        ("backward", "clip", "step", "clear"),
        ("clear", "backward", "step"),
        ("clear", "backward", "clip", "step", "clear"),
    ],
)
def test_a_clip_before_it_is_not(order, set_to_none):
    assert ordered(*order, set_to_none=set_to_none) == []


def module_facts(watch, name):
    found = [getattr(f, name) for r in watch.records for f in r.facts.modules.values()]
    return [value for value in found if value is not None]


def test_a_backward_through_evaluation_mode_is_seen():
    train = Trained()
    train.model.eval()
    train.run(10)
    assert module_facts(train.watch, "evaluating")[-1] is True
    assert module_facts(Trained().run(10).watch, "evaluating") == []


def carried(detach, kept=True, pieces=12, **watch):
    """Train piece by piece on a state that goes on, with its graph or without.

    The head alone: autograd refuses to go through weights that were changed meanwhile.
    """
    model = lstm()
    optimizer = torch.optim.SGD(model.head.parameters(), 1e-3)
    options = {"dir": None, "wandb": None, "budget": None, **watch}
    with gradwatch.watch(model, **options) as watch:
        state = None
        for x in batches(pieces):
            out, state = model.rnn(x, state)
            optimizer.zero_grad()
            model.head(out[-1]).square().mean().backward(retain_graph=kept)
            optimizer.step()
            if detach:
                state = tuple(s.detach() for s in state)
    return module_facts(watch, "graph_kept")


def test_a_state_that_brings_its_graph_along_is_seen():
    assert carried(detach=True, kept=False) == []
    assert True in carried(detach=False)


def test_two_losses_on_one_graph_keep_none():
    model = lstm()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with gradwatch.watch(model, dir=None, wandb=None, budget=None) as watch:
        for x in batches(12):
            optimizer.zero_grad()
            out, state = model.rnn(x)
            model.head(out[-1]).square().mean().backward(retain_graph=True)
            out, _ = model.rnn(x, state)
            model.head(out[-1]).square().mean().backward()
            optimizer.step()
    assert module_facts(watch, "graph_kept") == []


# ---- inputs, and which sequences are read


def inputs(change, build=lstm, read=lambda model, x: model(x), steps=10):
    """Train on changed inputs; return the last facts of the module."""
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    how = {"every": 1, "flow_samples": None, "budget": None}
    with gradwatch.watch(model, dir=None, wandb=None, **how) as watch:
        for x in batches(steps, length=20, batch=8):
            optimizer.zero_grad()
            read(model, change(x)).square().mean().backward()
            optimizer.step()
    assert watch.health["failed"] == {}
    found = [r.facts.modules["rnn"] for r in watch.records if r.facts.modules]
    return found[-1]


def gaps(x):
    x = x.clone()
    x[5:10] = 0
    return x


def held(x):
    return x[::2].repeat_interleave(2, 0)


def one_constant(x):
    x = x.clone()
    x[..., 2] = 7.0
    return x


def one_large(x):
    return x * torch.tensor([1.0, 1.0, 1000.0, 1.0])


def padded(x):
    x = x.clone()
    x[10:] = 0
    return x


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda x: x, {"input_scale": 1.0, "blank": 0.0, "repeats": 0.0}),
        (lambda x: 1000 * x, {"input_scale": 1024.0, "input_spread": 1.0}),
        (gaps, {"blank": 0.2, "padding": 0.0, "input_scale": 1.0}),  # 5 of 20
        (held, {"repeats": 0.5}),  # 10 of 19
        (one_constant, {"input_offset": 1.0}),
        (lambda x: x + 3, {"input_offset": 0.9}),
        (one_large, {"input_spread": 1000.0}),
        (padded, {"padding": 0.5, "blank": 0.0, "input_scale": 1.0}),
    ],
)
def test_what_is_fed_is_told(change, expected):
    found = inputs(change)
    told = {name: getattr(found, name) for name in expected}
    assert told == pytest.approx(expected, abs=0.051)


def along_axis_1(model, x):
    """As if the first axis were the batch: one sequence is read, at all its steps."""
    return model.head(model.rnn(x)[0][:, -1])


@pytest.mark.parametrize(
    ("read", "share"),
    [
        (lambda model, x: model(x), 1.0),
        (lambda model, x: model.head(model.rnn(x)[0]), 1.0),
        (lambda model, x: model.head(model.rnn(x)[1][0][-1]), 1.0),
        (along_axis_1, 1 / 8),
    ],
)
def test_the_share_of_sequences_that_a_gradient_reaches(read, share):
    found = inputs(lambda x: x, read=read)
    assert found.sequences_read == pytest.approx(share, abs=0.006)


def test_weights_that_were_not_finite_before_backward_are_told_from_gradients():
    for spoil_weights in (True, False):
        model = lstm()
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        with gradwatch.watch(model, dir=None, wandb=None, budget=None) as watch:
            for i, x in enumerate(batches(15)):
                if i == 10 and spoil_weights:
                    with torch.no_grad():
                        model.head.bias[0] = torch.nan
                optimizer.zero_grad()
                loss = model(x).square().mean()
                loss = loss * torch.nan if i == 10 and not spoil_weights else loss
                loss.backward()
                if i < 10:
                    optimizer.step()
        [facts] = [r.facts.step for r in watch.records if r.step == 10]
        assert facts.weights_finite is (False if spoil_weights else None)
