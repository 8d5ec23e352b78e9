"""Several processes: gradients accumulated without sync, few batches, restarts."""

import os
import subprocess
import sys

import pytest

import gradwatch
from tests.support.ranks import ROOT, on_ranks

DDP = """
import json
from contextlib import nullcontext
import gradwatch
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
torch.set_num_threads(1)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][-1])

def batches(count, seed):
    source = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield torch.randn(9, 6, 4, generator=source), torch.randint(
            3, (6,), generator=source)

def accumulated(model, ranks):
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(12):
        optimizer.zero_grad()
        for half, (x, y) in enumerate(batches(2, step)):
            wait = model.no_sync() if ranks > 1 and half == 0 else nullcontext()
            with wait:
                mine = slice(rank, None, ranks) if ranks > 1 else slice(None)
                out = model(x[:, mine])
                (nn.functional.cross_entropy(out, y[mine]) / 2).backward()
        optimizer.step()

def uneven(model, count):
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    with Join([model]):
        for x, y in batches(count, 99 + rank):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses

def made():
    torch.manual_seed(0)
    return Net()

def watched(model):
    return gradwatch.watch(model, dir=None, wandb=None, budget=None)

if sys.argv[1] == "no_sync":
    one, both = made(), DistributedDataParallel(made())
    with watched(one) as single:
        accumulated(one, 1)
    with watched(both) as watch:
        accumulated(both, 2)
    if rank == 0:
        assert [r.step for r in watch.records] == list(range(12))
        for a, b in zip(single.records, watch.records, strict=True):
            for key in "grad_norm", "rnn/l0/grad_norm_hh", "rnn/l0/update_ratio":
                x, y = (r.metrics["gradwatch/" + key] for r in (a, b))
                assert abs(x - y) <= 1e-5 * x, (a.step, key, x, y)
else:
    count = 9 if rank == 0 else 13
    plain = uneven(DistributedDataParallel(made()), count)
    model = DistributedDataParallel(made())
    with watched(model) as watch:
        assert uneven(model, count) == plain
    assert rank or len(watch.records) == 9, len(watch.records)
"""


@pytest.mark.slow
def test_gradients_accumulated_without_sync_are_those_of_one_process(tmp_path):
    on_ranks(DDP, tmp_path, "no_sync")


@pytest.mark.slow
def test_a_process_that_has_fewer_batches_than_the_others(tmp_path):
    on_ranks(DDP, tmp_path, "uneven")


ELASTIC = """
import os, sys, torch, torch.distributed as dist
from pathlib import Path
from torch import nn
from torch.distributed.fsdp import fully_shard
import gradwatch
torch.set_num_threads(1)
rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
# By the store of the first attempt, gloo may find the processes that are gone.
meet = f"file://{folder}/meet{attempt}"
dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.GRU(4, 6)
fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
optimizer = torch.optim.SGD(model.parameters(), 0.01)
saved, first = folder / f"{rank}.pt", 0
watch = gradwatch.watch(model, dir=folder, name="run", wandb=None, budget=None)
if saved.exists():
    first, state = torch.load(saved, weights_only=True)
    watch.load_state_dict(state)
for step in range(first, 20):
    x = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(step))
    optimizer.zero_grad()
    model(x)[0].square().mean().backward()
    optimizer.step()
    torch.save((step + 1, watch.state_dict()), saved)
    dist.barrier()
    if attempt == 0 and step == 7 and rank == 1:
        os._exit(3)
watch.close()
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.slow
def test_a_restart_by_torchrun_goes_on_with_the_steps(tmp_path):
    program = tmp_path / "train.py"
    program.write_text(ELASTIC, encoding="utf-8")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*run, "--nproc-per-node=2", "--max-restarts=1", program, tmp_path],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    runs = sorted(p.name for p in tmp_path.iterdir() if p.is_dir())
    steps = [[r.step for r in gradwatch.load(tmp_path / name).records] for name in runs]
    assert steps[0][:8] == list(range(8)) and steps[-1] == list(range(8, 20)), steps
    norms = gradwatch.load(tmp_path / runs[-1]).records
    assert all("gradwatch/grad_norm" in r.metrics for r in norms)
