"""Decisions follow the steps: neither the clock nor the allocator has a say."""

import json
import multiprocessing
import random
import time

import pytest
import torch
from torch import nn

import gradwatch
from testbed.models import Tagger
from testbed.training import adding_batches, inflated, learn
from tests.support.seldom import seldom

STEPS = 130


def healthy():
    torch.manual_seed(0)
    return Tagger(nn.GRU(2, 16), 16, 1), None


def vanishing():
    torch.manual_seed(0)
    return Tagger(nn.LSTM(2, 16), 16, 1), None


def exploding():
    torch.manual_seed(0)
    model = Tagger(nn.RNN(2, 16, nonlinearity="relu"), 16, 1)
    return model, inflated(model, 4.0)


RUNS = {
    "healthy": (healthy, 4),
    "vanishing": (vanishing, 50),
    "exploding": (exploding, 30),
}
SAID = {"healthy": set(), "vanishing": {"vanishing"}, "exploding": {"exploding"}}


def busy():
    while True:
        sum(range(1000))


def disturbed(batches):
    """Pause, and use memory, as a busy machine and another allocator would.

    Yields:
        The same batches.
    """
    chance, kept = random.Random(1), []
    for step, batch in enumerate(batches):
        kept = [torch.zeros(chance.randrange(1, 4000)) for _ in range(8)] + kept[:16]
        time.sleep(1.05 if step in (40, 90) else chance.expovariate(200))
        yield batch


def trained(name, folder, disturb):
    build, length = RUNS[name]
    model, change = build()
    data = adding_batches(STEPS, length=length, batch=8)
    with gradwatch.watch(model, dir=folder, wandb=None, budget=None) as watch:
        learn(
            model,
            torch.optim.Adam(model.parameters(), 1e-3),
            disturbed(data) if disturb else data,
            at=60,
            change=change or (lambda: None),
            loss_fn=lambda out, y: (out.squeeze(-1) - y).square().mean(),
        )
        if disturb:
            assert len(watch.records) == STEPS  # reading decides nothing either
    return watch.dir


def told(folder):
    rows = [json.loads(line) for line in (folder / "records.jsonl").open()]
    for row in rows:
        del row["time"], row["metrics"]["gradwatch/overhead"]
    return rows, (folder / "alerts.jsonl").read_text()


@pytest.mark.parametrize("name", seldom(RUNS, ["vanishing"]))
def test_a_busy_machine_changes_no_record_and_no_alert(name, tmp_path):
    quiet = told(trained(name, tmp_path / "quiet", False))
    other = multiprocessing.get_context("spawn").Process(target=busy, daemon=True)
    other.start()
    try:
        crowded = told(trained(name, tmp_path / "crowded", True))
    finally:
        other.kill()
        other.join()
    assert len(quiet[0]) == STEPS
    for one, two in zip(quiet[0], crowded[0], strict=True):
        assert one == two
    assert crowded[1] == quiet[1]
    kinds = {json.loads(line)["kind"] for line in quiet[1].splitlines()}
    assert kinds >= SAID[name] and (kinds == set()) == (SAID[name] == set())
