"""What it costs that the processes of a sharded model exchange their norms.

Two and four processes on this machine, with gloo: an LSTM under ``fully_shard``,
watched at its defaults. Of each meeting the whole time is taken on the first process,
waiting for the others included; beside it a step's median where they do not meet.

Run: python -m benchmarks.shards [--quick]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

import gradwatch
from benchmarks.results import Results
from gradwatch.hooks.shards import Left, Shards, meets

LENGTH, BATCH, FEATURES, HIDDEN = 50, 32, 64, 128


def train(ranks: int, steps: int, folder: str) -> None:
    """Train as one of several processes, and print what meetings and steps took."""
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks
    )
    torch.manual_seed(0)
    model = nn.LSTM(FEATURES, HIDDEN, num_layers=2)
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (ranks,)))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    took: list[float] = []
    meet = Shards.meet

    def timed(self: Shards, optimizer: Optimizer | None, left: Left | None) -> None:
        waits = self._stepping is not None
        began = time.perf_counter()
        meet(self, optimizer, left)
        if waits:
            took.append(time.perf_counter() - began)

    Shards.meet = timed  # type: ignore[method-assign]  # for this process alone
    watch = gradwatch.watch(model, dir=None, wandb=None)
    usual: list[float] = []
    x = torch.randn(LENGTH, BATCH, FEATURES)
    for step in range(steps):
        began = time.perf_counter()
        optimizer.zero_grad()
        model(x)[0].square().mean().backward()
        optimizer.step()
        if not meets(step):
            usual.append(time.perf_counter() - began)
    if rank == 0:
        assert "gradwatch/grad_norm" in watch.latest
        count = sum(1 for _ in model.parameters())
        print(json.dumps([took, usual, 8 * (4 * count + 5)]))
    watch.close()
    sys.stdout.flush()
    os._exit(0)  # threads of the process group may abort an ordinary exit


def main() -> None:
    """Run the processes and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--arm", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.arm is not None:
        train(int(chosen.arm[0]), int(chosen.arm[1]), chosen.arm[2])
        return
    results = Results("shards", keep=not chosen.quick)
    columns = ["processes", "sent by each, bytes", "a meeting, us", "a step, ms"]
    title = f"two-layer LSTM {FEATURES}->{HIDDEN}, T={LENGTH}, B={BATCH}"
    results.table("meetings", columns, title)
    for ranks in 2, 4:
        with tempfile.TemporaryDirectory() as folder:
            arm = ["--arm", str(ranks), "60" if chosen.quick else "400", folder]
            running = [
                subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.shards", *arm],
                    env={**os.environ, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
                    stdout=subprocess.PIPE,
                    text=True,
                )
                for rank in range(ranks)
            ]
            said = [process.communicate()[0] for process in running]
        took, usual, size = json.loads(said[0])
        low, middle, high = (1e6 * q for q in statistics.quantiles(took, n=4))
        step = 1e3 * statistics.median(usual)
        spread = f"{middle:.0f} [{low:.0f}, {high:.0f}]"
        results.row(ranks, size, spread, f"{step:.1f}")
    results.save()


if __name__ == "__main__":
    main()
