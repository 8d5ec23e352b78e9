"""What differs on an accelerator; skipped without one."""

import pytest
import torch

import gradwatch
from gradwatch.metrics import run_key
from gradwatch.numerics.spectral import spectral_radius
from testbed.models import batches, lstm

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


def train(model, steps, log=None):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    norms = []
    for x in batches(steps):
        optimizer.zero_grad()
        loss = model(x.cuda()).square().mean()
        loss.backward()
        if log is not None:
            log(loss=loss)
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05))
        optimizer.step()
    return [float(n) for n in norms]


def test_records_come_one_step_late_and_are_right():
    model = lstm(hidden=40).cuda()
    with gradwatch.watch(model, dir=None, every=1, budget=None) as watch:
        norms = train(model, 6, watch.log)
        assert len(watch.records) == 5
        watch.flush()
        assert watch.records.series(run_key("grad_norm"))[1] == pytest.approx(
            norms, rel=1e-5
        )
        assert watch.latest["gradwatch/rnn/l0/rho_certified"] == 1.0
        assert run_key("loss") in watch.latest


def test_nothing_waits_for_the_device():
    model = lstm(hidden=40).cuda()
    with gradwatch.watch(model, dir=None, every=1, budget=None):
        train(model, 3)
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            x = batches(1)[0].cuda(non_blocking=True)
            model(x).square().mean().backward()
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_rho_is_that_of_the_cpu():
    weight = torch.randn(4, 96, 96, generator=torch.Generator().manual_seed(0)) / 10
    for one, two in zip(
        spectral_radius(weight), spectral_radius(weight.cuda()), strict=True
    ):
        assert one.rho == pytest.approx(two.rho, rel=1e-4)
        assert one.certified and two.certified
