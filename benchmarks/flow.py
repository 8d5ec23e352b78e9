"""How exact the gradient through time is, and what a run of the flow depth costs.

Every layout that a fused module or a cell can be called in, with losses that read the
output, its last step, h_n, c_n, or all of them, is compared with autograd through a
cell unrolled by hand in float64: the largest error of dL/dh_t and dL/dc_t over their
largest value. The cost is that of one replay over the training step beside it, with a
loss at every step. One thread.

Run: python -m benchmarks.flow [--quick]
"""

import argparse

import torch
from torch import nn

from benchmarks.replay import cost
from benchmarks.results import Results, quartiles
from gradwatch.depths.drain import Drain
from gradwatch.depths.flow import Flow
from gradwatch.depths.trajectory import Trajectory
from gradwatch.recurrent import Recurrence
from testbed.adjoints import errors, reads
from testbed.replays import (
    KINDS,
    cases,
)

COSTS = (
    ("RNN tanh", nn.RNN, 100),
    ("LSTM", nn.LSTM, 100),
    ("GRU", nn.GRU, 100),
    ("RNN tanh, T=1000", nn.RNN, 1000),
    ("LSTM, T=1000", nn.LSTM, 1000),
    ("GRU, T=1000", nn.GRU, 1000),
)


def run_flow(members: list[Recurrence], replayed: Trajectory) -> None:
    """Run the flow depth, and wait for its numbers."""
    flow = Flow()
    flow.add("rnn", members, replayed)
    Drain({"flow": flow.numbers}).wait()


def main() -> None:
    """Measure and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    chosen = list(cases())
    chosen = chosen[::15] if quick else chosen
    results = Results("flow", keep=not quick)
    results.table("errors", ["module", "cases", "float64", "float32"])
    for kind in KINDS:
        for chain in (False, True):
            own = [
                (case, read)
                for case in chosen
                if case.kind == kind and case.chain == chain
                for read in reads(case)
            ]
            if own:
                row = [
                    f"{max(errors(case, read, dtype) for case, read in own):.0e}"
                    for dtype in (torch.float64, torch.float32)
                ]
                name = kind + (", one step a call" if chain else "")
                results.row(name, len(own), *row)
    results.table("cost", ["module", "4 of 32", "8 of 32", "all 32"])
    for name, make, length in COSTS:
        row = []
        for samples in (4, 8, None):
            rounds = 3 if quick else (8 if length > 500 else 30)
            torch.manual_seed(0)
            module, x = make(64, 128), torch.randn(length, 32, 64)
            ratios = cost(module, x, run_flow, samples=samples, rounds=rounds)
            row.append(quartiles(ratios))
        results.row(name, *row)
    results.save()


if __name__ == "__main__":
    main()
