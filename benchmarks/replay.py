"""How exact the replay of a forward is, and what a run of the state depth costs.

Every layout that a fused module or a cell can be called in is replayed from what the
hooks saw, and every state, gate and metric is compared with a cell unrolled by hand in
float64. The cost is that of one state run over the training step beside it: medians of
interleaved pairs, 4 of 32 sequences. One thread.

Run: python -m benchmarks.replay [--quick]
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.results import Results, quartiles
from gradwatch.depths.drain import Drain
from gradwatch.depths.state import State
from gradwatch.depths.trajectory import Trajectory, trajectory
from gradwatch.hooks.probe import NOTHING
from gradwatch.recurrent import Recurrence, recurrences
from testbed.looking import ALL, looking_at
from testbed.replays import KINDS, cases, errors

COSTS = (
    ("RNN tanh", nn.RNN, 64, 128, 100, {}),
    ("LSTM", nn.LSTM, 64, 128, 100, {}),
    ("LSTM, T=1000", nn.LSTM, 64, 128, 1000, {}),
    ("LSTM, projection 32", nn.LSTM, 64, 128, 100, {"proj_size": 32}),
    ("LSTM, 2 layers", nn.LSTM, 64, 128, 100, {"num_layers": 2}),
    ("LSTM, two ways", nn.LSTM, 64, 128, 100, {"bidirectional": True}),
    (
        "LSTM, 2 layers, dropout",
        nn.LSTM,
        64,
        128,
        100,
        {"num_layers": 2, "dropout": 0.3},
    ),
    ("GRU", nn.GRU, 64, 128, 100, {}),
    ("RNN tanh 16->32, T=30, B=16", nn.RNN, 16, 32, 30, {}),
)


def run_state(members: list[Recurrence], replayed: Trajectory) -> None:
    """Run the state depth, and wait for its numbers."""
    state = State()
    state.add("rnn", members, replayed)
    Drain({"state": state.numbers}).wait()


def cost(
    module: nn.Module,
    x: Tensor,
    run: Callable[[list[Recurrence], Trajectory], None],
    *,
    samples: int | None,
    rounds: int,
) -> list[float]:
    """Return, pair by pair, a depth's time over that of the training step beside it.

    Args:
        module: The module that is trained.
        x: Its input.
        run: What the depth does with a replay; the replay and the capture count too.
        samples: How many sequences are looked at; None for all.
        rounds: How many pairs.
    """
    optimizer = torch.optim.Adam(module.parameters(), 1e-3)
    probe = looking_at(module, NOTHING, samples=samples)
    members, ratios = recurrences(module), []

    def step() -> float:
        began = time.perf_counter()
        optimizer.zero_grad()
        module(x)[0].square().mean().backward()
        optimizer.step()
        return time.perf_counter() - began

    for number in range(rounds + 3):
        probe.expect(NOTHING)
        bare = step()
        probe.expect(ALL)
        seen = step()
        began = time.perf_counter()
        with torch.no_grad():
            replayed = trajectory(members, probe.take())
            assert isinstance(replayed, Trajectory)
            run(members, replayed)
        probe.forget()
        if number >= 3:
            ratios.append((time.perf_counter() - began + max(seen - bare, 0)) / bare)
    probe.close()
    return ratios


def main() -> None:
    """Measure and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    chosen = list(cases())
    chosen = chosen[::7] if quick else chosen
    print(f"{len(chosen)} cases; largest error of any case of the row\n")
    results = Results("replay", keep=not quick)
    results.table(
        "errors",
        ["module", "cases", "states, gates f64", "metrics f64", "f32", "metrics f32"],
    )
    for kind in KINDS:
        for chain in (False, True):
            own = [c for c in chosen if c.kind == kind and c.chain == chain]
            if not own:
                continue
            row = []
            for dtype in (torch.float64, torch.float32):
                found = [errors(case, dtype) for case in own]
                row += [f"{max(column):.0e}" for column in zip(*found, strict=True)]
            name = kind + (", one step a call" if chain else "")
            results.row(name, len(own), *row)
    results.table("cost", ["module", "cost of a state run, in steps (quartiles)"])
    for name, make, features, hidden, length, options in COSTS:
        rounds = 5 if quick else (20 if length > 500 else 60)
        torch.manual_seed(0)
        module = make(features, hidden, **options)
        x = torch.randn(length, 16 if hidden == 32 else 32, features)
        ratios = cost(module, x, run_state, samples=4, rounds=rounds)
        results.row(name, quartiles(ratios))
    results.save()


if __name__ == "__main__":
    main()
