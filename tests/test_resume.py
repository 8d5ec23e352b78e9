"""Resuming, and several processes."""

import subprocess
import sys

import torch
from torch import nn

import gradwatch
from gradwatch.metrics import of, run_key
from testbed.models import Tagger, batches, lstm
from tests.support.ranks import on_ranks

TRAIN = """
import sys, torch, gradwatch
from tests.test_watch import train
from testbed.models import lstm
model = lstm()
"""


def test_a_resumed_run_goes_on_in_a_fresh_process(tmp_path):
    first = f"""{TRAIN}
watch = gradwatch.watch(model, dir={str(tmp_path)!r}, name="one", budget=None)
train(model, 50, spoil=45)
for p in model.parameters():
    torch.nn.init.uniform_(p, -0.1, 0.1)
torch.save(watch.state_dict(), {str(tmp_path / "watch.pt")!r})
watch.close()
"""
    second = f"""{TRAIN}
watch = gradwatch.watch(model, dir={str(tmp_path)!r}, name="two", budget=None)
watch.load_state_dict(torch.load({str(tmp_path / "watch.pt")!r}))
train(model, 10, spoil=3)
for p in model.parameters():
    torch.nn.init.uniform_(p, -0.1, 0.1)
train(model, 60)
watch.close()
"""
    for code in (first, second):
        subprocess.run(
            [sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL
        )
    one, two = gradwatch.load(tmp_path / "one"), gradwatch.load(tmp_path / "two")
    assert [r.step for r in one.records] == list(range(50))
    assert [r.step for r in two.records] == list(range(50, 120))
    assert two.records[0].events == ("resume",)
    steps, _ = two.records.series("gradwatch/rnn/l0/rho")
    # Nothing warms up again; by then the weights had been written by hand.
    assert steps.tolist() == [50, 61, 100]
    assert [a.step for a in one.alerts] == [45]
    assert two.alerts == []  # the incident was open, and is not sent again
    [incident] = two.incidents
    assert incident.since == 45 and incident.until is not None


def test_start_step_moves_the_axis():
    model = lstm()
    with gradwatch.watch(model, dir=None, start_step=1000) as watch:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for x in batches(2):
            model(x).sum().backward()
            optimizer.step()
        assert [r.step for r in watch.records] == [1000, 1001]


RANK = """
import gradwatch
from torch.nn.parallel import DistributedDataParallel
from testbed.models import batches, lstm
model = DistributedDataParallel(lstm())
forbidden = []
watch = gradwatch.watch(model, dir=sys.argv[1], name="ddp", every=1, budget=None)
for name in ("all_reduce", "broadcast", "barrier", "all_gather", "reduce"):
    setattr(dist, name, lambda *a, name=name, **k: forbidden.append(name))
optimizer = torch.optim.SGD(model.parameters(), 0.5)
for group in batches(12).split(2):
    optimizer.zero_grad()
    model(group[rank]).square().mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    optimizer.step()
watch.close()
assert not forbidden, forbidden
"""


def test_two_ranks_are_one_run(tmp_path):
    said = [err for _, err in on_ranks(RANK, tmp_path, tmp_path / "runs")]
    assert [s.count("gradwatch:") for s in said] == [2, 0]
    assert [p.name for p in (tmp_path / "runs").iterdir() if p.is_dir()] == ["ddp"]
    run = gradwatch.load(tmp_path / "runs" / "ddp")
    assert [s.name for s in run.streams] == ["rnn.l0"]

    model = lstm()  # one process on both halves has the averaged gradient
    with gradwatch.watch(model, dir=None, every=1, budget=None) as watch:
        plain_pairs(model)
        records = list(watch.records)
    assert len(run.records) == len(records) == 6
    for one, two in zip(run.records, records, strict=True):
        assert one.metrics.keys() == two.metrics.keys()
        for key, value in two.metrics.items():
            # Rank 0 has the loss of its own half of the batch, and replays sequences
            # of that.
            own = of(key)
            of_half = own.depth in {"state", "flow"}
            of_half = of_half or own.name in {"rho_eff", "rho_gain_log10", "loss"}
            if key != run_key("overhead") and not of_half:
                torch.testing.assert_close(one.metrics[key], value, rtol=1e-4, atol=0)


def plain_pairs(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for group in batches(12).split(2):
        optimizer.zero_grad()
        sum(model(x).square().mean() / 2 for x in group).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()


def test_the_folder_of_a_resumed_run_begins_with_what_was_known(tmp_path):
    def go_on(state, name):
        with gradwatch.watch(model, dir=tmp_path, name=name, wandb=None) as watch:
            if state is not None:
                watch.load_state_dict(state)
            for x in batches(3, length=9):
                optimizer.zero_grad()
                nn.functional.mse_loss(model(x), torch.zeros(x.shape[1], 3)).backward()
                optimizer.step()
            return watch.state_dict()

    torch.manual_seed(0)
    model = Tagger(nn.GRU(4, 8), 8)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    go_on(go_on(None, "first"), "second")
    first = gradwatch.load(tmp_path / "second").records[0]
    assert first.step == 3 and first.facts.run.loss_kind == "mse"
    assert first.facts.run.optimizers["Adam"]["lr"] == 1e-3
    assert first.facts.modules["rnn"].T == 9
