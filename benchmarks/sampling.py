"""How far the state metrics of 4 sequences are from those of all 32, along training.

An LSTM, a GRU and a tanh RNN learn handwritten digits, pixel by pixel. Every few steps
the whole batch is replayed, and each metric is taken from all sequences and from the
four that the state depth looks at by default. One thread.

Run: python -m benchmarks.sampling [--quick]
"""

import argparse
import statistics
from collections.abc import Iterator

import torch
from torch import nn

from benchmarks.results import Results
from gradwatch.depths.trajectory import Trajectory, trajectory
from gradwatch.hooks.probe import NOTHING
from gradwatch.numerics.activation import statistics as measured
from gradwatch.numerics.through_time import Layer
from gradwatch.recurrent import recurrences
from testbed.looking import STATES, looking_at
from testbed.trajectories import digits

HIDDEN, BATCH, LOOKED_AT = 64, 32, 4
NETS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN_TANH": nn.RNN}


def values(kind: str, layer: Layer) -> dict[str, float]:
    """Return every state metric of a layer by name."""
    return {
        name: value
        for names, found in measured(kind, layer)
        for name, value in zip(names, found.reshape(-1).tolist(), strict=True)
    }


def follow(kind: str, steps: int, every: int) -> Iterator[tuple[dict, dict]]:
    """Train; yield the metrics of all sequences and of the few, on the way.

    Yields:
        Two mappings from metric to value.
    """
    torch.manual_seed(0)
    net, head = NETS[kind](1, HIDDEN), nn.Linear(HIDDEN, 10)
    parameters = [*net.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, 3e-3)
    probe = looking_at(net, NOTHING)
    for step, (x, y) in zip(range(steps), digits(), strict=False):
        probe.expect(STATES if step % every == 0 else NOTHING)
        loss = nn.functional.cross_entropy(head(net(x)[0][-1]), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if probe.wanted is not NOTHING:
            replayed = trajectory(recurrences(net), probe.take())
            assert isinstance(replayed, Trajectory)
            [[whole]] = replayed.layers
            some = slice(0, None, BATCH // LOOKED_AT)
            few = Layer(*(None if part is None else part[:, some] for part in whole))
            yield values(kind, whole), values(kind, few)
            probe.forget()
    probe.close()


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few seconds")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    steps, every = (30, 5) if quick else (600, 10)
    results = Results("sampling", keep=not quick)
    results.table(
        "errors",
        ["net", "metric", "range along the run", "error: median", "p95", "largest"],
        f"{steps} steps of Adam 3e-3, H={HIDDEN}, measured every {every}.",
    )
    for kind in NETS:
        pairs = list(follow(kind, steps, every))
        for name in pairs[0][0]:
            whole = [w[name] for w, _ in pairs]
            errors = sorted(abs(w[name] - f[name]) for w, f in pairs)
            row = (
                f"{min(whole):.3g} to {max(whole):.3g}",
                f"{statistics.median(errors):.2g}",
                f"{errors[int(0.95 * len(errors))]:.2g}",
                f"{errors[-1]:.2g}",
            )
            results.row(kind.lower(), f"`{name}`", *row)
    results.save()


if __name__ == "__main__":
    main()
