"""Weights and gradients of which each process holds a part."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from gradwatch.hooks.shards import meets
from tests.support.ranks import ROOT, on_ranks
from tests.support.seldom import seldom

pytestmark = pytest.mark.skipif(
    torch.__version__ < "2.7", reason="fully_shard of torch 2.6 fails on a CPU"
)

NET = """
import json, re, warnings
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import gradwatch
warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
torch.set_num_threads(1)

class Tagger(nn.Module):
    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.rnn = kind(6, 7, num_layers=2, batch_first=True)
        self.head = nn.Linear(7, 11)

    def forward(self, x):
        return self.head(self.rnn(self.embedding(x))[0])

def batches(count, ranks, seed=1):
    source = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randint(11, (8, 13), generator=source)
        yield x[rank::ranks] if ranks > 1 else x

def train(model, steps, ranks, *, clip=None, before=lambda step: None, lr=0.01):
    optimizer = torch.optim.Adam(model.parameters(), lr)
    losses = []
    for step, x in enumerate(batches(steps, ranks)):
        before(step)
        optimizer.zero_grad()
        out = model(x[:, :-1]).flatten(0, 1)
        loss = nn.functional.cross_entropy(out, x[:, 1:].flatten())
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
    return losses

def whole(kind=nn.LSTM):
    torch.manual_seed(0)
    return Tagger(kind)

def sharded(ranks, way, kind=nn.LSTM):
    model = whole(kind)
    shape = (2, ranks // 2) if way == "hybrid" else (ranks,)
    names = ("replicas", "shards")[-len(shape):]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    if way == "each":
        fully_shard(model.rnn, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model

def watched(model, **options):
    given = dict(dir=None, wandb=None, budget=None, every=1) | options
    return gradwatch.watch(model, **given)
"""

SAME = (
    NET
    + """
ranks, way, kind = int(sys.argv[1]), sys.argv[2], getattr(nn, sys.argv[3])
one = whole(kind)
with watched(one) as single:
    train(one, 26, 1, clip=0.1)
expected = {r.step: dict(r.metrics) for r in single.records}
model = sharded(ranks, way, kind)
with watched(model) as watch:
    train(model, 26, ranks, clip=0.1)
    print("note", str(watch))
for name, weight in model.named_parameters():
    torch.testing.assert_close(weight.full_tensor(), dict(one.named_parameters())[name])
if rank == 0:
    ratios = [m["gradwatch/clip_ratio"] for m in expected.values()]
    assert min(ratios) < 0.9, ratios
    met = {}
    for record in watch.records:
        for key, value in record.metrics.items():
            # The rest is of this process's own sequences, or a small difference.
            if re.search("/(grad_norm|clip|update_ratio|rho$|rho/|sigma|nonfin)", key):
                other = expected[record.step][key]
                assert abs(value - other) <= 1e-5 * abs(other) + 1e-9, (
                    record.step, key, value, other)
                met.setdefault(key, []).append(record.step)
    print(json.dumps(met))
"""
)


@pytest.mark.parametrize(
    ("ranks", "way", "kind"),
    [
        (2, "each", "GRU"),
        pytest.param(4, "hybrid", "LSTM", marks=pytest.mark.slow),
        pytest.param(2, "all", "LSTM", marks=pytest.mark.slow),
        pytest.param(4, "all", "RNN", marks=pytest.mark.slow),
    ],
)
def test_numbers_are_those_of_one_process(ranks, way, kind, tmp_path):
    said = on_ranks(SAME, tmp_path, ranks, way, kind, ranks=ranks)
    met = json.loads(said[0][0].splitlines()[-1])
    together = [step for step in range(26) if meets(step)]
    for key in ("grad_norm", "grad_norm_clipped", "clip_ratio", "nonfinite"):
        assert met[f"gradwatch/{key}"] == together
    for layer in "l0", "l1":
        for key in ("grad_norm_hh", "grad_norm_ih", "grad_norm_bias", "update_ratio"):
            assert met[f"gradwatch/rnn/{layer}/{key}"] == together
        assert met[f"gradwatch/rnn/{layer}/rho"] == list(range(26))
    assert "weights are sharded: gradient norms at every 8th step" in said[0][0]
    assert not any("gradwatch" in err for _, err in said[1:])


BITWISE = (
    NET
    + """
plain = train(sharded(2, "each"), 20, 2, clip=0.4)
model = sharded(2, "each")
with watched(model):
    assert train(model, 20, 2, clip=0.4) == plain
"""
)


@pytest.mark.slow
def test_losses_are_what_they_are_without(tmp_path):
    on_ranks(BITWISE, tmp_path)


APART = (
    NET
    + """
from datetime import timedelta
from gradwatch.hooks import shards
shards._PATIENCE = timedelta(seconds=2)
plain = train(sharded(2, "all"), 20, 2)
model = sharded(2, "all")
watches = []
def begin(step):
    if (rank, step) in ((0, 0), (1, 5)) and (rank == 0 or sys.argv[1] == "late"):
        watches.append(watched(model))
assert train(model, 20, 2, before=begin) == plain
if rank == 0:
    [watch] = watches
    print(watch)
    keys = set().union(*(r.metrics for r in watch.records))
    assert not any(re.search("norm|update|clip|nonfinite", k) for k in keys - {
        k for k in keys if k.endswith(("h_norm", "c_norm"))}), keys
    assert "gradwatch/rnn/l0/rho" in keys and "gradwatch/rnn/l1/horizon" in keys
    watch.close()
"""
)


@pytest.mark.parametrize("way", seldom(["alone", "late"], ["late"]))
def test_who_watches_alone_waits_once_and_for_nobody_after(way, tmp_path):
    said = on_ranks(APART, tmp_path, way)
    assert "no gradient norms, as not every process has called watch()" in said[0][0]


LEFT = (
    NET
    + """
plain = train(sharded(2, "all"), 30, 2)
model = sharded(2, "all")
watch = watched(model)
def leave(step):
    if step == 10 and rank == int(sys.argv[1]):
        watch.close()
assert train(model, 30, 2, before=leave) == plain
if rank != int(sys.argv[1]):
    print(watch)
    norms = [r.step for r in watch.records if "gradwatch/grad_norm" in r.metrics]
    assert norms == list(range(10)), norms
    watch.close()
from gradwatch.hooks import shards
assert not shards._LEAVING
"""
)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_closed_watch_tells_the_others_and_holds_none(rank, tmp_path):
    said = on_ranks(LEFT, tmp_path, rank)
    if rank == 1:  # the one that speaks has gone on
        assert "as the watch of a process is closed" in said[0][0]


FAILS = (
    NET
    + """
from gradwatch.hooks import shards
rows, met = shards._rows, []
def breaks(*args):
    met.append(len(met))
    if rank == 1 and len(met) in (3, 4):
        raise ArithmeticError("of ours")
    return rows(*args)
shards._rows = breaks
plain = train(sharded(2, "all"), 12, 2)
model = sharded(2, "all")
watch = watched(model)
assert train(model, 12, 2) == plain
watch.flush()
if rank == 0:
    norms = [r.step for r in watch.records if "gradwatch/grad_norm" in r.metrics]
    assert norms == [0, 1, 4, 5, 6, 7, 8, 9, 10, 11], norms
watch.close()
"""
)


@pytest.mark.slow
def test_a_process_that_fails_still_comes(tmp_path):
    said = on_ranks(FAILS, tmp_path, GRADWATCH_STRICT="0")
    assert "of ours" in said[1][1] and said[0][1].count("failed") == 0


NAN = (
    NET
    + """
model = sharded(2, "each")
watch = watched(model)
def spoil(step):
    if step == 18 and rank == 1:  # of the other process; between two meetings
        with torch.no_grad():
            model.rnn.weight_hh_l0.to_local().fill_(float("nan"))
train(model, 40, 2, before=spoil)
print([(a.kind, a.step) for a in watch.alerts if a.severity == "error"])
"""
)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_told_though_its_weights_are_freed(tmp_path):
    said = on_ranks(NAN, tmp_path)
    assert "('nonfinite', 18)" in said[0][0]


ACCUMULATED = (
    NET
    + """
def train(model, ranks):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(6):
        optimizer.zero_grad()
        for half, x in enumerate(batches(2, ranks, seed=step)):
            if ranks > 1:
                model.set_requires_gradient_sync(half == 1)
            out = model(x[:, :-1]).flatten(0, 1)
            (nn.functional.cross_entropy(out, x[:, 1:].flatten()) / 2).backward()
        optimizer.step()

one = whole()
with watched(one) as single:
    train(one, 1)
model = sharded(2, "all")
with watched(model) as watch:
    train(model, 2)
if rank == 0:
    assert [r.step for r in watch.records] == list(range(6))
    for a, b in zip(single.records, watch.records):
        for key in ("grad_norm", "rnn/l0/grad_norm_hh", "rnn/l1/update_ratio"):
            a_, b_ = (r.metrics["gradwatch/" + key] for r in (a, b))
            assert abs(a_ - b_) <= 1e-5 * a_, (key, a_, b_)
"""
)


@pytest.mark.slow
def test_gradients_that_are_reduced_at_the_last_backward_alone(tmp_path):
    on_ranks(ACCUMULATED, tmp_path)


WHOLE = (
    NET
    + """
def begun(way):
    model = sharded(2, way)
    return model, torch.optim.Adam(model.parameters(), 0.01)

def step(model, optimizer, x, between=lambda: None):
    optimizer.zero_grad()
    out = model(x[:, :-1]).flatten(0, 1)
    between()
    loss = nn.functional.cross_entropy(out, x[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    return loss.item()

for way in "all", "each":
    losses = []
    for how in "plain", "watched":
        model, optimizer = begun(way)
        other, of_other = begun(way)
        with torch.no_grad():  # which leaves the whole weights in their place
            model(next(batches(1, 2)))
        watch = watched(model) if how == "watched" else None
        losses.append([])
        for x in batches(20, 2):
            # Another optimizer steps for the first time while they are whole.
            between = lambda: step(other, of_other, x)
            losses[-1].append(step(model, optimizer, x, between))
    assert losses[0] == losses[1]
    if rank == 0:
        norms = [r.step for r in watch.records if "gradwatch/grad_norm" in r.metrics]
        assert norms == [*range(17)], norms
    watch.close()
"""
)


@pytest.mark.slow
def test_weights_that_are_whole_at_the_moment_are_known_by_their_shards(tmp_path):
    on_ranks(WHOLE, tmp_path)


UNLIKE = (
    NET
    + """
import gc
from datetime import timedelta
from gradwatch.hooks import shards
shards._PATIENCE = timedelta(seconds=3)

# An optimizer's step that one process leaves out: no collective of FSDP is in it.
model = sharded(2, "all")
optimizer = torch.optim.SGD(model.parameters(), 1e-6)
watch = watched(model)
for step, x in enumerate(batches(12, 2)):
    optimizer.zero_grad()
    model(x[:, :-1]).square().mean().backward()
    if step != 5 or rank == 0:
        optimizer.step()
if rank == 0:
    print(watch)
watch.close()

# Watches that are thrown away with their models, whenever each process comes to it.
gc.disable()
for trial in range(6):
    model = sharded(2, "each")
    watched(model)
    train(model, 3, 2)
    del model
    if trial % 2 == rank:
        gc.collect()
"""
)


@pytest.mark.slow
def test_processes_that_do_not_do_alike_wait_a_moment_and_go_on(tmp_path):
    said = on_ranks(UNLIKE, tmp_path, GRADWATCH_STRICT="0")
    assert "no gradient norms, as another process did not come" in said[0][0]


ELSEWHERE = (
    NET
    + """
half = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))["b"]
model = whole()
fully_shard(model, mesh=half)
other = sharded(4, "all")
watch = watched(model) if rank < 2 else None
train(model, 20, 2)
train(other, 20, 4)
if rank == 0:
    norms = [r.step for r in watch.records if "gradwatch/grad_norm" in r.metrics]
    assert norms == [step for step in range(20) if step < 16 or step % 8 == 0], norms
"""
)


@pytest.mark.slow
def test_who_watches_meets_those_of_its_own_mesh_alone(tmp_path):
    on_ranks(ELSEWHERE, tmp_path, ranks=4)


REFUSED = """
import re, warnings
import gradwatch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
warnings.simplefilter("ignore")
mesh = init_device_mesh("cpu", (2,))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.rnn(x)[0])

def refused(words, call, *args, **options):
    try:
        call(*args, **options)
    except ValueError as error:
        assert re.search(words, str(error)), error
    else:
        raise AssertionError("not refused: " + words)

split = Net()
parallelize_module(split.head, mesh, ColwiseParallel())
refused("head.weight is split .* tensor parallelism", gradwatch.watch, split)
older = FullyShardedDataParallel(Net(), device_id=torch.device("cpu"))
refused("fully_shard", gradwatch.watch, older)
stage = PipelineStage(Net(), rank, 2, torch.device("cpu"))
refused("does not measure a pipeline", gradwatch.watch, stage)
model = Net()
fully_shard(model, mesh=mesh)
refused("watch the whole", gradwatch.watch, model.rnn)
refused("recorder= needs the whole", gradwatch.watch, model, recorder=5)
refused("would raise in one of them", gradwatch.watch, model, on_alert="raise")
batch = torch.ones(3, 2, 4)
refused("a preflight needs the whole", gradwatch.preflight, model, [batch],
        lambda model, x: model(x).sum())
"""


def test_other_ways_to_split_a_model_are_refused(tmp_path):
    on_ranks(REFUSED, tmp_path)


KILLED = """
import faulthandler, os, random, signal, sys, threading, time, warnings
faulthandler.dump_traceback_later(60, exit=True)
import torch, torch.distributed as dist
rank, ranks, seed = int(os.environ["RANK"]), int(sys.argv[1]), int(sys.argv[2])
draw = random.Random(seed)
victim, last, moment = draw.randrange(ranks), draw.randrange(25), draw.random()
dist.init_process_group("gloo", init_method=sys.argv[3], rank=rank, world_size=ranks)
""" + (
    NET
    + """
def die(step):
    if rank == victim and step == last:
        if moment < 0.5:  # at once; else soon, wherever that may be
            os.kill(os.getpid(), signal.SIGKILL)
        end = os.getpid(), signal.SIGKILL
        threading.Timer(draw.random() * 0.02, os.kill, end).start()
model = sharded(ranks, draw.choice(["all", "each"]))
watch = watched(model)
try:
    train(model, 2000, ranks, before=die)
finally:
    began = time.monotonic()
    watch.close()
    print("closed in", time.monotonic() - began, flush=True)
"""
)


def _killed(seed, folder):
    ranks = 2 + 2 * (seed % 2)
    start = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", KILLED, str(ranks), str(seed), f"file://{folder}/m"],
            env={**os.environ, "RANK": str(r), "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(ranks)
    ]
    said = [p.communicate(timeout=90) for p in processes]
    killed = [p.returncode for p in processes].count(-signal.SIGKILL)
    assert killed == 1, said
    for process, (out, err) in zip(processes, said, strict=True):
        if process.returncode != -signal.SIGKILL:
            assert process.returncode != 0 and "Timeout (" not in err, err
            assert float(out.split()[-1]) < 1, (out, err)
    return time.monotonic() - start


@pytest.mark.parametrize("seed", seldom(range(50), range(1, 50)))
def test_nobody_waits_for_a_process_that_was_killed(seed, tmp_path):
    """The others end with torch's own error; 30 s with all their imports."""
    assert _killed(seed, tmp_path) < 30
