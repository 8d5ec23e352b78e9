"""Peak memory of a training with a watch over that of a bare one, at T = 1000.

Each arm is a process of its own, three times, in turns; the peak is that of its
resident memory. Gradients, states, spectrum and flow at their default cadences.

Run: python -m benchmarks.memory [--steps 110]
"""

import argparse
import resource
import subprocess
import sys

import torch
from torch import nn

import gradwatch

LENGTH, BATCH, FEATURES, HIDDEN = 1000, 32, 64, 128
ROUNDS = 3


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
    """Run both arms and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=110)
    parser.add_argument("--arm", choices=("bare", "watched"))
    chosen = parser.parse_args()
    if chosen.arm is not None:
        train(chosen.arm == "watched", chosen.steps)
        return
    peaks: dict[str, list[float]] = {"bare": [], "watched": []}
    for arm in ("bare", "watched") * ROUNDS:
        command = [sys.executable, "-m", "benchmarks.memory", "--arm", arm]
        command += ["--steps", str(chosen.steps)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks[arm].append(float(done.stdout.split()[-1]))
    print(f"LSTM {FEATURES}->{HIDDEN}, T={LENGTH}, B={BATCH}, {chosen.steps} steps")
    for arm, found in peaks.items():
        print(f"{arm}: {', '.join(f'{peak:.0f}' for peak in sorted(found))} MiB")


if __name__ == "__main__":
    main()
