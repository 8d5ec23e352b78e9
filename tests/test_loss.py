"""The loss found is the loss used, in every kind of loop, without a word from it."""

import functools
import gc
import math
import sys
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, l1_loss
from torch.utils.checkpoint import checkpoint

import gradwatch
from gradwatch.hooks import roots
from gradwatch.metrics import run_key
from testbed.models import Loop, batches, lstm

LOSS = run_key("loss")
STEPS = 7


def loss_of(model, x):
    return model(x).square().mean()


def sgd(model, rate=0.1):
    return torch.optim.SGD(model.parameters(), rate)


def plain(model):
    optimizer = sgd(model)
    for x in batches(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        optimizer.step()
        yield loss.item()


def of_one_line(model):
    # Nothing but the graph holds the loss.
    optimizer = sgd(model)
    for x in batches(STEPS):
        optimizer.zero_grad()
        with torch.no_grad():
            told = loss_of(model, x).item()
        loss_of(model, x).backward()
        optimizer.step()
        yield told


def scaled(model):
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for x in batches(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, x)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        yield loss.item()


def accumulated(model):
    optimizer = sgd(model)
    for group in batches(3 * STEPS).split(3):
        optimizer.zero_grad()
        losses = [loss_of(model, x) / 3 for x in group]
        for loss in losses:
            loss.backward()
        optimizer.step()
        yield sum(loss.item() for loss in losses)


def accumulated_under_a_scaler(model):
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for group in batches(2 * STEPS).split(2):
        optimizer.zero_grad()
        losses = [loss_of(model, x) / 2 for x in group]
        for loss in losses:
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        yield sum(loss.item() for loss in losses)


def by_closure(model):
    optimizer = sgd(model)
    for x in batches(STEPS):

        def closure(x=x):
            optimizer.zero_grad()
            loss = loss_of(model, x)
            loss.backward()
            return loss

        yield optimizer.step(closure).item()


def searched(model):
    # LBFGS calls its closure several times; what the last one found counts.
    optimizer, last = torch.optim.LBFGS(model.parameters(), max_iter=3), [0.0]
    for x in batches(STEPS):

        def closure(x=x):
            optimizer.zero_grad()
            loss = loss_of(model, x)
            loss.backward()
            last[0] = loss.item()
            return loss

        optimizer.step(closure)
        yield last[0]


def several(model):
    # Two losses, each with a backward of its own: the optimizer gets both.
    optimizer = sgd(model)
    for x in batches(STEPS):
        optimizer.zero_grad()
        out = model(x)
        first, second = out.square().mean(), 0.1 * out.abs().mean()
        first.backward(retain_graph=True)
        second.backward()
        optimizer.step()
        yield first.item() + second.item()


def together(model):
    optimizer = sgd(model)
    for x in batches(STEPS):
        optimizer.zero_grad()
        out = model(x)
        losses = [out.square().mean(), out.abs().mean()]
        torch.autograd.backward(losses)
        optimizer.step()
        yield sum(loss.item() for loss in losses)


def weighted(model):
    # By gradients that are given: what is trained on is the weighted sum.
    optimizer = sgd(model)
    for x in batches(STEPS):
        optimizer.zero_grad()
        out = model(x)
        losses = [out.square().mean(), out.abs().mean()]
        torch.autograd.backward(losses, [torch.tensor(0.5), torch.tensor(2.0)])
        optimizer.step()
        yield 0.5 * losses[0].item() + 2 * losses[1].item()


def of_one_element(model):
    optimizer = sgd(model)
    for x in batches(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, x).reshape(1, 1)
        loss.backward()
        optimizer.step()
        yield loss.item()


def of_many_numbers(model):
    # A backward on no single number has no loss.
    optimizer = sgd(model)
    for x in batches(STEPS):
        optimizer.zero_grad()
        out = model(x)
        out.backward(out.detach())
        optimizer.step()
        yield None


def one_of_two_unknown(model):
    optimizer = sgd(model)
    for x in batches(STEPS):
        optimizer.zero_grad()
        out = model(x)
        out.square().mean().backward(retain_graph=True)
        out.backward(out.detach())
        optimizer.step()
        yield None


def checkpointed(model, *, reentrant):
    # A backward that runs in the backward is no loss of its own.
    optimizer = sgd(model)
    for x in batches(STEPS):
        optimizer.zero_grad()
        x.requires_grad_()
        out = checkpoint(lambda x: model.rnn(x)[0], x, use_reentrant=reentrant)
        loss = model.head(out[-1]).square().mean()
        loss.backward()
        optimizer.step()
        yield loss.item()


def all_checkpointed(model):
    # Only the inner backward reaches a parameter.
    optimizer = sgd(model)
    for x in batches(STEPS):
        optimizer.zero_grad()
        x.requires_grad_()
        loss = checkpoint(model, x, use_reentrant=True).square().mean()
        loss.backward()
        optimizer.step()
        yield loss.item()


def deep(model):
    # A framework calls: forty frames and more stand above the loop.

    def fall(depth, call):
        return call() if depth == 0 else fall(depth - 1, call)

    optimizer = sgd(model)
    for x in batches(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, x)
        fall(50, loss.backward)
        optimizer.step()
        yield loss.item()


def by_hand(model):
    # No optimizer: the updates are hand-written.
    for x in batches(STEPS):
        loss = loss_of(model, x)
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(p.grad, alpha=0.1)
                p.grad = None
        yield loss.item()


def two_optimizers(model):
    rnn, head = sgd(model.rnn), sgd(model.head)
    for x in batches(STEPS):
        model.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        rnn.step()
        head.step()
        yield loss.item()


def penalised(model):
    # The gradient for the penalty is taken apart, and is no backward.
    optimizer = sgd(model)
    for x in batches(STEPS):
        optimizer.zero_grad()
        x.requires_grad_()
        loss = loss_of(model, x)
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        total = loss + slope.square().mean()
        total.backward()
        optimizer.step()
        yield total.item()


def evaluated_between(model):
    optimizer = sgd(model)
    for x in batches(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, x)
        with torch.no_grad():
            l1_loss(model(x), torch.zeros(3))
        loss.backward()
        cross_entropy(model(x), torch.zeros(x.shape[1], dtype=torch.int64))
        optimizer.step()
        yield loss.item()


def truncated(model):
    # Piece by piece, each with a step.
    optimizer = sgd(model)
    for x in batches(STEPS):
        state = None
        for piece in x.split(3):
            optimizer.zero_grad()
            out, state = model.rnn(piece, state)
            loss = model.head(out[-1]).square().mean()
            loss.backward()
            optimizer.step()
            state = tuple(s.detach() for s in state)
            yield loss.item()


def in_double(model):
    model.double()
    optimizer = sgd(model)
    for x in batches(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, x.double())
        loss.backward()
        optimizer.step()
        yield loss.item()


def compiled_model(model):
    called = torch.compile(model, backend="aot_eager")
    optimizer = sgd(model)
    for x in batches(STEPS):
        optimizer.zero_grad()
        loss = called(x).square().mean()
        loss.backward()
        optimizer.step()
        yield loss.item()


def compiled_step(model):
    optimizer = sgd(model)

    @functools.partial(torch.compile, backend="aot_eager")
    def step(x):
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        optimizer.step()
        return loss

    for x in batches(STEPS):
        yield step(x).item()


def changed_afterwards(model):
    # What is done to the loss after backward is not what was trained on.
    optimizer = sgd(model)
    for x in batches(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, x)
        told = loss.item()
        loss.backward()
        loss.detach().mul_(100)
        optimizer.step()
        yield told


LOOPS = {
    f.__name__: f
    for f in (
        plain,
        of_one_line,
        scaled,
        accumulated,
        accumulated_under_a_scaler,
        by_closure,
        searched,
        several,
        together,
        weighted,
        of_one_element,
        of_many_numbers,
        one_of_two_unknown,
        all_checkpointed,
        deep,
        by_hand,
        two_optimizers,
        penalised,
        evaluated_between,
        truncated,
        in_double,
        compiled_model,
        compiled_step,
        changed_afterwards,
    )
} | {
    "checkpointed": functools.partial(checkpointed, reentrant=False),
    "checkpointed by a backward of its own": functools.partial(
        checkpointed, reentrant=True
    ),
}


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_the_loss_found_is_the_loss_used(loop):
    model = lstm()
    with gradwatch.watch(model, dir=None, wandb=None) as watch:
        used = list(loop(model))
    found = [record.metrics.get(LOSS) for record in watch.records]
    if loop is searched:  # the steps of a search are counted in test_late_steps
        found = found[-len(used) :]
    assert len(found) == len(used)
    for one, other in zip(found, used, strict=True):
        assert (one is None) == (other is None)
        assert one is None or one == pytest.approx(other, rel=1e-6)


def test_a_value_logged_between_backward_and_step_replaces_it_and_no_other_does():
    model = lstm()
    optimizer = sgd(model)
    with gradwatch.watch(model, dir=None, wandb=None) as watch:
        for i, x in enumerate(batches(150)):
            watch.log(loss=-1.0)
            loss_of(model, x).backward()
            if i % 2:
                watch.log(loss=float(i))
            optimizer.step()
            watch.log(loss=-2.0)
            optimizer.zero_grad()
    losses = watch.records.series(LOSS)[1].tolist()
    assert losses[1::2] == list(range(1, 150, 2))
    assert all(0 < loss < 1 for loss in losses[::2])


def test_an_infinite_product_with_a_scale_tells_nothing():
    model = lstm()
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=2.0**120)
    with gradwatch.watch(model, dir=None, wandb=None, scaler=scaler) as watch:
        for x in batches(3):
            optimizer.zero_grad()
            loss = loss_of(model, x) * 1e9
            assert math.isfinite(loss)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    assert not any(LOSS in record.metrics for record in watch.records)


def test_losses_of_models_that_train_in_threads_are_told_apart():
    def train(seed, out):
        torch.manual_seed(seed)
        model = lstm()
        optimizer = sgd(model)
        with gradwatch.watch(model, dir=None, wandb=None) as watch:
            used = []
            for x in batches(120, seed=seed):
                if seed % 2:  # an optimizer that no watch has seen before
                    other = sgd(nn.Linear(1, 1))
                    other.step()
                optimizer.zero_grad()
                loss = (seed + 1) * loss_of(model, x)
                loss.backward()
                used.append(loss.item())
                optimizer.step()
        out[seed] = used, watch.records.series(LOSS)[1].tolist()

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        out = {}
        threads = [threading.Thread(target=train, args=(i, out)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert sorted(out) == [0, 1, 2, 3]
    for used, found in out.values():
        assert used == found


def test_nothing_of_the_loss_is_kept_alive():
    model = lstm()
    optimizer = sgd(model)
    with gradwatch.watch(model, dir=None, wandb=None):
        for x in batches(4):
            optimizer.zero_grad()
            loss = loss_of(model, x)
            loss.backward()
            optimizer.step()
        ref = weakref.ref(loss)
        del loss
        gc.collect()
        assert ref() is None


def test_a_loop_of_calls_has_one_loss():
    cell = Loop(nn.LSTMCell(4, 8), 8)
    optimizer = sgd(cell)
    with gradwatch.watch(cell, dir=None, wandb=None) as watch:
        used = []
        for x in batches(5):
            optimizer.zero_grad()
            loss = loss_of(cell, x)
            loss.backward()
            optimizer.step()
            used.append(loss.item())
    assert watch.records.series(LOSS)[1].tolist() == used


def test_without_the_frames_of_torch_there_is_no_loss(monkeypatch):
    monkeypatch.setattr(roots._torch, "_BACKWARD", None)
    model = lstm()
    with gradwatch.watch(model, dir=None, wandb=None) as watch:
        for _ in plain(model):
            pass
    assert len(watch.records) == STEPS
    assert not any(LOSS in record.metrics for record in watch.records)
