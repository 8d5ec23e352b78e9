"""Cells written by hand: do they learn, and what does a watch say of them?

Of four symbols the first is to be named at the end, 8 or 40 steps later; with the cell
as it is made, and with its matrices six times as large. 700 steps of Adam at 5e-3, 32
sequences. One thread.

Run: python -m benchmarks.cells
"""

import argparse

import torch
from torch.nn.functional import cross_entropy

import gradwatch
from benchmarks.results import Results
from testbed.cells import CELLS, Stepped
from testbed.tasks import recall

UNITS, SYMBOLS, BATCH = 24, 4, 32
RUNS = {"8 steps": (8, 1.0), "40 steps": (40, 1.0), "40 steps, 6 times": (40, 6.0)}


def run(name: str, length: int, factor: float, steps: int) -> list[str]:
    """Train one cell; return the row about it."""
    torch.manual_seed(0)
    cell = CELLS[name](SYMBOLS, UNITS)
    model = Stepped(cell, UNITS, SYMBOLS)
    with torch.no_grad():
        for weight in cell.parameters():
            weight.mul_(factor if weight.dim() == 2 else 1.0)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    options = {"dir": None, "wandb": None, "budget": None}
    right: list[float] = []
    batches = recall(torch.Generator().manual_seed(1), length, BATCH, SYMBOLS)
    with gradwatch.watch(model, cells=[type(cell)], **options) as watch:
        for _ in range(steps):
            x, y = next(batches)
            scores = model(x)[-1]
            loss = cross_entropy(scores, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            right.append((scores.argmax(1) == y).float().mean().item())
    latest = watch.latest
    found = [
        f"{a.kind} ({a.cause}), step {a.step}"
        for a in watch.alerts
        if a.severity != "info"
    ]
    shown = [latest.get(f"gradwatch/cell/{key}") for key in _SHOWN]
    return [
        f"{100 * sum(right[-50:]) / 50:.0f} %",
        *("-" if value is None else f"{value:.3g}" for value in shown),
        "; ".join(found) or "-",
    ]


_SHOWN = ("horizon", "growth_log10", "rho_step")


def main() -> None:
    """Train all cells and report them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="20 steps each")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    results = Results("cells", keep=not quick)
    head = ["cell", "run", "right", *_SHOWN, "alarms"]
    results.table("alarms", head, "The first of four symbols, named at the end")
    for name in CELLS:
        for title, (length, factor) in RUNS.items():
            row = run(name, length, factor, 20 if quick else 700)
            results.row(name, title, *row)
    results.save()


if __name__ == "__main__":
    main()
