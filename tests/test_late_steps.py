"""Loops whose steps close late, or whose parameters come and go: nothing is lost."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

import gradwatch
from gradwatch.metrics import run_key
from testbed.models import Tagger, batches, lstm

NORM = run_key("grad_norm")
QUIET = {"dir": None, "wandb": None, "budget": None}
ENDS = ("early", "two", "repeat", "turn")


def sgd(module, rate=0.05):
    return torch.optim.SGD(module.parameters(), rate)


def norm_of(parameters):
    squares = [p.grad.double().square().sum() for p in parameters if p.grad is not None]
    return float(torch.stack(squares).sum().sqrt())


class Ending:
    """The ways to end a step: all but ``early`` are known to be over with the next."""

    def __init__(self, kind, model):
        self.kind, self.number = kind, 0
        self.whole = sgd(model)
        self.pair = sgd(model.rnn), sgd(model.head)

    def __call__(self):
        if self.kind == "two":
            for optimizer in self.pair:
                optimizer.step()
        elif self.kind == "turn":
            self.pair[self.number % 2].step()
        else:
            self.whole.step()
            if self.kind == "repeat":
                self.whole.step()
        self.number += 1


def sampled(watch, name="rho"):
    return [r.step for r in watch.records if f"gradwatch/rnn/l0/{name}" in r.metrics]


def module_facts(watch, name="rnn"):
    """Return what was found of a module, each time that it had changed."""
    found = [record.facts.modules.get(name) for record in watch.records]
    return [facts for facts in found if facts is not None]


# ---- gradients that stay where they are


@pytest.mark.parametrize("kind", ["two", "turn"])
def test_gradients_zeroed_in_place_under_several_optimizers(kind):
    """The objects are the same in all steps: only what was written tells them apart."""
    model = lstm()
    ending, norms = Ending(kind, model), []
    with gradwatch.watch(model, **QUIET) as watch:
        for i, x in enumerate(batches(40)):
            model.zero_grad(set_to_none=False)
            model(x).square().mean().backward()
            parts = (model,) if kind == "two" else (model.rnn, model.head)
            norms.append(norm_of(parts[i % len(parts)].parameters()))
            ending()
    assert [r.step for r in watch.records] == list(range(40))
    measured = [record.metrics[NORM] for record in watch.records]
    # Which optimizers there are is learned in the first steps.
    assert measured[2:] == pytest.approx(norms[2:], rel=1e-4)
    assert watch.alerts == [] and watch.health["failed"] == {}


def test_a_second_optimizer_that_accumulates_for_longer_is_no_uncleared_gradient():
    model = lstm()
    rnn, head = sgd(model.rnn), sgd(model.head)
    with gradwatch.watch(model, **QUIET) as watch:
        for i, x in enumerate(batches(250)):
            rnn.zero_grad()
            model(x).square().mean().backward()
            rnn.step()
            if i % 4 == 3:
                head.step()
                head.zero_grad()
    assert len(watch.records) == 250
    assert "not_cleared" not in [alert.kind for alert in watch.alerts]


# ---- parameters that come and go


def toggle(model, optimizer):
    """Have other parameters learn: as many as before are held, none of them is seen."""
    model.head.requires_grad_(True)
    model.rnn.requires_grad_(False)


def assign(model, optimizer):
    """Load weights in place of the parameters, as many of them."""
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    optimizer.param_groups[0]["params"] = list(model.parameters())


@pytest.mark.parametrize("change", [toggle, assign])
def test_other_parameters_of_the_same_number_are_found(change):
    model = lstm()
    if change is toggle:
        model.head.requires_grad_(False)
    optimizer = sgd(model)
    with gradwatch.watch(model, **QUIET) as watch:
        for i, x in enumerate(batches(60)):
            if i == 7:
                change(model, optimizer)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    assert [r.step for r in watch.records] == list(range(60))
    assert watch.health["failed"] == {}


def test_records_keep_their_order_where_an_alert_reads_them_as_the_columns_change():
    """What waits at that time is in two blocks, of other columns each."""
    model = lstm()
    optimizer, seen = sgd(model), []
    with gradwatch.watch(
        model,
        on_alert=lambda _: seen.append(watch.records[-1].step),
        every=99,
        **QUIET,
    ) as watch:
        for i, x in enumerate(batches(80)):
            if i == 36:
                optimizer.param_groups[0]["lr"] = 0.0  # an alert at step 45
            if i == 44:  # found when parameters are looked for, after step 50
                model.register_parameter("extra", nn.Parameter(torch.zeros(2)))
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    assert seen == [45]
    assert [r.step for r in watch.records] == list(range(80))


# ---- what is measured at a step that closes late


@pytest.mark.parametrize("kind", ENDS)
def test_a_gradient_penalty_does_not_use_up_the_probe(kind):
    """autograd.grad goes through the probed forward before the backward does."""
    model = Tagger(nn.RNN(4, 8), 8)
    ending = Ending(kind, model)
    with gradwatch.watch(model, every=1, **QUIET) as watch:
        for x in batches(20):
            model.zero_grad()
            x.requires_grad_()
            out = model(x)
            (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
            (out.square().mean() + (slope.norm() - 1) ** 2).backward()
            ending()
    assert len(watch.records) == 20
    assert len(sampled(watch)) >= 18
    assert {facts.reach for facts in module_facts(watch)} == {"reached"}


@pytest.mark.parametrize("kind", ENDS)
def test_carried_states_are_seen_alike(kind):
    """Truncated backpropagation through time, with the state detached."""
    model = Tagger(nn.LSTM(4, 8), 8)
    ending, state = Ending(kind, model), None
    with gradwatch.watch(model, every=1, **QUIET) as watch:
        for x in batches(20):
            model.zero_grad()
            out, state = model.rnn(x, state and tuple(s.detach() for s in state))
            model.head(out).square().mean().backward()
            ending()
    assert watch.health["failed"] == {}
    first, *_, last = module_facts(watch)
    assert first.state_detached is not True  # there is no earlier call
    assert last.state_detached and last.T == 6 and last.reach == "reached"
    assert len(sampled(watch, "adjoint_log10")) >= 16


@pytest.mark.parametrize("order", ["fbfb", "ffbb"])
def test_modules_of_two_backwards_of_one_step_are_both_measured(order):
    torch.manual_seed(0)
    model = nn.ModuleDict({"one": nn.LSTM(4, 8), "other": nn.GRU(4, 8)})
    optimizer = sgd(model)
    with gradwatch.watch(model, every=1, **QUIET) as watch:
        for x in batches(8):
            optimizer.zero_grad()
            losses = []
            for module in model.values():
                losses.append(module(x)[0].square().mean())
                if order == "fbfb":
                    losses.pop().backward()
            for loss in losses:
                loss.backward()
            optimizer.step()
    for name in model:
        assert {facts.reach for facts in module_facts(watch, name)} == {"reached"}
        for record in watch.records[2:]:
            assert f"gradwatch/{name}/l0/rho" in record.metrics


def test_a_loss_may_be_logged_between_two_optimizers():
    """But for the first step, which closes with the first optimizer that is seen."""
    model = lstm()
    rnn, head = sgd(model.rnn), sgd(model.head)
    with gradwatch.watch(model, **QUIET) as watch:
        for number, x in enumerate(batches(6)):
            model.zero_grad()
            model(x).square().mean().backward()
            rnn.step()
            watch.log(loss=float(number))
            head.step()
    losses = [record.metrics.get(run_key("loss")) for record in watch.records]
    assert losses[0] not in (None, 0) and losses[1:] == [1, 2, 3, 4, 5]


# ---- whom an alert stops


def test_an_alert_is_not_raised_out_of_another_models_optimizer():
    model, other = lstm(), nn.Linear(2, 2)
    ending, stranger = Ending("turn", model), sgd(other)
    raised = []
    with gradwatch.watch(model, on_alert="raise", **QUIET):
        for i, x in enumerate(batches(10)):
            model.zero_grad()
            (model(x).square().mean() * (torch.nan if i == 5 else 1)).backward()
            stranger.step()
            try:
                ending()
            except gradwatch.TrainingAlert as alarm:
                raised.append((i, alarm.alert.kind))
    assert raised and {kind for _, kind in raised} == {"nonfinite"}
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_nan_that_only_the_second_optimizer_holds_never_reaches_its_weights():
    model = lstm()
    rnn, head = sgd(model.rnn), sgd(model.head)
    with gradwatch.watch(model, on_alert="raise", **QUIET):
        for x in batches(5):
            model.zero_grad()
            model(x).square().mean().backward()
            rnn.step()
            head.step()
        model.zero_grad()
        model.head.bias.register_hook(lambda grad: grad * torch.nan)
        model(batches(1)[0]).square().mean().backward()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(gradwatch.TrainingAlert, match="nonfinite") as caught:
            rnn.step()  # else it would have moved, and the head would not
        assert caught.value.alert.cause == "nan_backward"
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


# ---- what is kept


def test_forwards_without_a_backward_are_not_kept():
    """An evaluation that forgets no_grad, ahead of training."""

    def held():
        gc.collect()
        kinds = (torch.Tensor, nn.Parameter)
        return sum(o.numel() for o in gc.get_objects() if type(o) in kinds)

    model = Tagger(nn.GRU(4, 16), 16)
    x = batches(1, batch=8)[0]
    with gradwatch.watch(model, dir=None, wandb=None):
        for _ in range(100):
            model(x)
        before = held()
        for _ in range(900):
            model(x)
        assert held() <= before + 10_000


def test_clips_before_the_second_optimizer_are_seen():
    """Each optimizer's gradients are read as they are given to it."""
    model = lstm()
    rnn, head = sgd(model.rnn), sgd(model.head)
    given = []
    with gradwatch.watch(model, **QUIET) as watch:
        for x in batches(6):
            model.zero_grad()
            model(x).square().mean().backward()
            rnn.step()
            clip_grad_norm_(model.head.parameters(), 0.01)
            given.append(norm_of(model.parameters()))
            head.step()
    clipped = [r.metrics[run_key("grad_norm_clipped")] for r in watch.records]
    assert clipped[1:] == pytest.approx(given[1:], rel=1e-4)
