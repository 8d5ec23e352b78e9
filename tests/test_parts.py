"""An update of a weight, split by where it comes from, beside what torch did."""

import copy

import pytest
import torch

import gradwatch
from gradwatch.metrics import of
from gradwatch.numerics.parts import parts, share_below_eps
from testbed.models import batches, lstm

OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {}),
    "SGD, decay": (torch.optim.SGD, {"weight_decay": 0.1}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    "Nesterov": (
        torch.optim.SGD,
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ),
    "ascent": (torch.optim.SGD, {"momentum": 0.9, "maximize": True}),
    "Adam": (torch.optim.Adam, {}),
    "Adam, decay": (torch.optim.Adam, {"weight_decay": 0.1}),
    "AMSGrad": (torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.1}),
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.5}),
    "AdamW, ascent": (torch.optim.AdamW, {"weight_decay": 0.5, "maximize": True}),
    "RMSprop": (torch.optim.RMSprop, {"weight_decay": 0.1}),
    "RMSprop, all of it": (
        torch.optim.RMSprop,
        {"weight_decay": 0.1, "momentum": 0.9, "centered": True},
    ),
    "Adagrad": (torch.optim.Adagrad, {"lr_decay": 0.1, "weight_decay": 0.1}),
}


def trained(name, steps, change=None):
    """Train one weight in float64; return the last update in parts, and the truth."""
    kind, options = OPTIMIZERS[name]
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(5, 4, dtype=torch.float64))
    optimizer = kind([weight], lr=0.03, **options)
    for step in range(steps):
        weight.grad = torch.randn_like(weight)
        if change is not None and step == steps - 1:
            change(optimizer, weight)
        before = weight.detach().clone()
        optimizer.step()
    group, state = optimizer.param_groups[0], optimizer.state[weight]
    found = parts(kind.__name__, group, state, before, weight.grad)
    return found, weight.detach() - before


@pytest.mark.parametrize("steps", [1, 2, 20])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_parts_add_up_to_the_update(name, steps):
    found, update = trained(name, steps)
    total = found.gradient + found.decay + found.carried
    assert (total - update).norm() <= 1e-5 * update.norm()


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp_min(1e-300)).item()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_part_is_what_is_missing_without_its_source(name):
    """Of one step, from the same state: no gradient, no decay, neither.

    An adaptive denominator is held: it is the one that the optimizer came to.
    """
    found, _ = trained(name, 20)

    def no_gradient(optimizer, weight):
        weight.grad = torch.zeros_like(weight)

    linear = name in ("SGD", "SGD, decay", "momentum", "Nesterov", "ascent")
    if linear:
        rest, update = trained(name, 20, no_gradient)
        assert rest.gradient.norm() == 0
        assert relative(rest.decay, found.decay) <= 1e-5 or found.decay.norm() == 0
        assert relative(rest.carried, found.carried) <= 1e-5 or not found.carried.any()
        assert relative(rest.decay + rest.carried, update) <= 1e-5 or not update.any()
    if name.startswith("AdamW"):
        kept = copy.deepcopy(OPTIMIZERS[name])
        torch.manual_seed(0)
        weight = torch.randn(5, 4, dtype=torch.float64)
        assert kept[1]["weight_decay"] == 0.5
        first, _ = trained(name, 1)
        assert relative(first.decay, -0.03 * 0.5 * weight) <= 1e-12
        assert first.carried.norm() <= 1e-12


def test_an_optimizer_that_is_not_known_has_no_parts():
    weight = torch.nn.Parameter(torch.randn(3))
    optimizer = torch.optim.Rprop([weight])
    weight.grad = torch.ones(3)
    optimizer.step()
    group, state = optimizer.param_groups[0], optimizer.state[weight]
    assert parts("Rprop", group, state, weight.detach(), weight.grad) is None


def test_entries_below_eps_are_counted():
    weight = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.Adam([weight], eps=1e-4)
    for _ in range(5):
        weight.grad = torch.tensor([1e-6, 1e-5, 1e-3, 1.0])
        optimizer.step()
    group, state = optimizer.param_groups[0], optimizer.state[weight]
    assert share_below_eps("Adam", group, state) == 0.5


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_they_are_measured_in_training(name):
    kind, options = OPTIMIZERS[name]
    model = lstm()
    optimizer = kind(model.parameters(), 0.01, **options)
    with gradwatch.watch(model, every=1, budget=None, dir=None, wandb=None) as watch:
        for x in batches(12):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    assert watch.health["failed"] == {}
    latest = {of(key).name: value for key, value in watch.latest.items()}
    whole = latest["update_gradient"] + latest["update_decay"]
    assert latest["update_ratio"] <= whole + latest["update_carried"] + 1e-6
    decays = bool(options.get("weight_decay")) or kind is torch.optim.AdamW
    assert (latest["update_decay"] > 0) is decays
    assert (latest["update_carried"] > 1e-6) is (
        "momentum" in options or kind in (torch.optim.Adam, torch.optim.AdamW)
    )
    assert ("below_eps" in latest) is (kind is not torch.optim.SGD)


def test_a_step_without_a_gradient_goes_on_by_decay_and_momentum():
    model = lstm()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.5)
    with gradwatch.watch(model, every=1, budget=None, dir=None, wandb=None) as watch:
        for i, x in enumerate(batches(12)):
            optimizer.zero_grad()
            ((0 if i > 5 else 1) * model(x).square().mean()).backward()
            optimizer.step()
    gradient = watch.records.series("gradwatch/rnn/l0/update_gradient")[1]
    decay = watch.records.series("gradwatch/rnn/l0/update_decay")[1]
    assert gradient[3] > 0 and gradient[-1] == 0
    assert decay[-1] == pytest.approx(0.01 * 0.5, rel=1e-4)


def test_clipped_gradients_are_those_that_are_split():
    model = lstm()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradwatch.watch(model, every=1, budget=None, dir=None, wandb=None) as watch:
        for x in batches(6):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
            optimizer.step()
    latest = {of(key).name: value for key, value in watch.latest.items()}
    assert latest["update_gradient"] == pytest.approx(latest["update_ratio"], rel=1e-3)
