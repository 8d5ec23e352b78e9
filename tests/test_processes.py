"""Several processes, and what ends or interrupts one."""

import gc
import os
import signal
import subprocess
import sys
import time
import weakref

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import gradwatch
from testbed.models import batches, lstm
from tests.support.ranks import on_ranks
from tests.support.seldom import seldom
from tests.test_faults import ROOT
from tests.test_watch import train


class OfModel(Dataset):
    """Its items come from the watched model, which every worker has a copy of."""

    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 12

    def __getitem__(self, index):
        x = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(index))
        self.model(x).sum().backward()  # a worker that even trains
        return x


@pytest.mark.parametrize("way", ["fork", "spawn"])
def test_workers_of_a_loader_write_nothing(way, tmp_path):
    model = lstm()
    with gradwatch.watch(model, dir=tmp_path, name="run", wandb=None) as watch:
        loader = DataLoader(
            OfModel(model), batch_size=None, num_workers=2, multiprocessing_context=way
        )
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for x in loader:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        assert len(watch.records) == 12
    run = gradwatch.load(tmp_path / "run")
    assert [r.step for r in run.records] == list(range(12)) and run.skipped == []
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["run"]


def test_a_step_that_is_tried_again_with_less_is_counted_once():
    """What a loop does that meets the end of memory: half the batch, once more."""
    model, seen = lstm(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradwatch.watch(
        model, dir=None, wandb=None, every=1, budget=None, flow_samples=None
    ) as watch:
        for step, x in enumerate(batches(8, batch=4)):
            for batch in (x, x[:, :2]):
                optimizer.zero_grad()
                try:
                    out = model(batch)
                    if step == 4 and batch.shape[1] == 4:
                        out.register_hook(_out_of_memory)
                        seen.append(weakref.ref(out))
                    out.square().mean().backward()
                except torch.OutOfMemoryError:
                    del out
                    continue
                optimizer.step()
                break
        assert [r.step for r in watch.records] == list(range(8))
        sizes = [r.facts.modules["rnn"].B for r in watch.records if r.facts.modules]
        assert 2 in sizes
        assert watch.health["failed"] == {}
    gc.collect()
    assert seen[0]() is None  # nothing of the failed step is kept


def _out_of_memory(grad):
    raise torch.OutOfMemoryError("made up")


RANK = """
import gradwatch
from torch.nn.parallel import DistributedDataParallel
from gradwatch.depths import reader
from testbed.models import batches, lstm
norms = reader.norms
def fail(*args):
    raise RuntimeError("this rank's watch is broken")
for broken in (None, 0, 1):
    model = DistributedDataParallel(lstm())
    reader.norms = fail if broken == rank else norms
    if broken is not None:
        watch = gradwatch.watch(model, dir=None, wandb=None, on_alert="raise")
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for group in batches(12).split(2):
        optimizer.zero_grad()
        model(group[rank]).square().mean().backward()
        optimizer.step()
    if broken is not None:
        assert ("gradients" in watch.health["off"]) == (broken == rank), watch.health
        watch.close()
    print(torch.cat([p.detach().reshape(-1) for p in model.parameters()]).tolist())
"""


def test_a_rank_whose_watch_fails_holds_up_no_other(tmp_path):
    for out, _ in on_ranks(RANK, tmp_path, GRADWATCH_STRICT="0"):
        bare, *watched = out.splitlines()[-3:]
        assert watched == [bare, bare]


ENDLESS = """
import sys
from testbed.models import lstm
from tests.test_faults import trained
def on_alert(alert):
    print(alert.step, flush=True)
trained(lstm(), dir=sys.argv[1], on_alert=on_alert, steps=10**6)
"""


@pytest.mark.parametrize("seed", seldom(range(5), range(1, 5)))
@pytest.mark.parametrize(
    "how", seldom([signal.SIGKILL, signal.SIGTERM], [signal.SIGTERM])
)
def test_what_was_announced_is_on_disk_whenever_the_process_ends(how, seed, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    first = process.stdout.readline()
    time.sleep(0.037 * seed)
    process.send_signal(how)
    announced = [int(x) for x in (first + process.communicate()[0]).split()]
    assert process.returncode == -how and announced
    [folder] = [p for p in tmp_path.iterdir() if p.is_dir()]
    run = gradwatch.load(folder)
    steps = [a.step for a in run.alerts]
    assert steps[: len(announced)] == announced and not run.closed
    assert [r.step for r in run.records] == list(range(len(run.records)))
    assert len(run.records) > announced[-1] and len(run.skipped) <= 1


def test_a_child_that_is_forked_in_training_may_train_by_itself():
    model = lstm()
    with gradwatch.watch(model, dir=None, wandb=None) as watch:
        train(model, 5)
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            train(model, 5)
            os._exit(0 if len(watch.records) == 10 else 1)
        _, status = os.waitpid(child, 0)
        train(model, 5)
        assert status == 0 and len(watch.records) == 10
