"""Peak memory of a training with a watch over that of a bare one, at T = 1000.

Each arm is a process of its own, three times, in turns; the peak is that of its
resident memory. Gradients, states, spectrum and flow at their default cadences.

Run: python -m benchmarks.memory [--quick]
"""

import argparse
import resource
import subprocess
import sys

import torch
from torch import nn

import gradwatch
from benchmarks.results import Results

LENGTH, BATCH, FEATURES, HIDDEN = 1000, 32, 64, 128
ROUNDS, STEPS = 3, 110


def train(watched: bool, steps: int) -> None:
    """Train, and print the peak in MiB."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.LSTM(FEATURES, HIDDEN)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    watch = gradwatch.watch(model, dir=None, wandb=None) if watched else None
    x = torch.randn(LENGTH, BATCH, FEATURES)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x)[0].square().mean().backward()
        optimizer.step()
    if watch is not None:
        assert "gradwatch/lstm/l0/horizon" in watch.latest
        watch.close()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    """Run both arms and print their peaks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--arm", choices=("bare", "watched"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    steps = 5 if chosen.quick else STEPS
    if chosen.arm is not None:
        train(chosen.arm == "watched", steps)
        return
    peaks: dict[str, list[float]] = {"bare": [], "watched": []}
    for arm in ("bare", "watched") * ROUNDS:
        command = [sys.executable, "-m", "benchmarks.memory", "--arm", arm]
        command += ["--quick"] * chosen.quick
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks[arm].append(float(done.stdout.split()[-1]))
    results = Results("memory", keep=not chosen.quick)
    title = f"LSTM {FEATURES}->{HIDDEN}, T={LENGTH}, B={BATCH}, {steps} steps"
    results.table("peak", ["training", "peak of each process, MiB"], title)
    for arm, found in peaks.items():
        results.row(arm, ", ".join(f"{peak:.0f}" for peak in sorted(found)))
    results.save()


if __name__ == "__main__":
    main()
