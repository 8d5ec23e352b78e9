"""How large a report is, and how long it takes: to write, and to open in a browser.

Six runs made by hand, from healthy to 40 streams and 100,000 steps. A page is opened in
headless Chromium where that and playwright are installed, five times; the time is that
to the browser's ``load`` event, by its own clock. ``--pictures FOLDER`` also takes a
screenshot of each.

Run: python -m benchmarks.report [--keep] [--pictures FOLDER]
"""

import argparse
import dataclasses
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image  # comes with the extra ``plot``
from torch import nn

import gradwatch
from benchmarks.results import Results, spread
from gradwatch.record import StepRecord
from gradwatch.records import Records
from gradwatch.report import save
from gradwatch.runs import Run
from testbed.models import Tagger

REPEATS: Final = 5
HEAD: Final = ("run", "charts", "kB", "seconds to write", "ms to open")


def trained(
    folder: Path,
    cell: nn.Module,
    steps: int = 600,
    length: int = 60,
    spoil: int | None = None,
) -> Run:
    """Train a net to recall its first input under watch, and return its run."""
    torch.manual_seed(0)
    hidden = cell.hidden_size * (1 + cell.bidirectional)
    model = Tagger(cell, int(hidden), 3)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    with gradwatch.watch(
        model, dir=folder, name="run", wandb=None, budget=None
    ) as watch:
        for step in range(steps):
            x = torch.randn(length, 16, 4)
            if step == spoil:
                x[5, 1, 2] = math.nan
            optimizer.zero_grad()
            target = (x[0, :, 0] > 0).long()
            nn.functional.cross_entropy(model(x), target).backward()
            optimizer.step()
    assert watch.dir is not None
    return gradwatch.load(watch.dir)


def inflated(cell: nn.RNN, factor: float) -> nn.RNN:
    """Multiply recurrent weights, so that gradients explode."""
    with torch.no_grad():
        cell.weight_hh_l0.mul_(factor)
    return cell


def stretched(run: Run, steps: int) -> Run:
    """Return a run of so many steps, whose rows are those of another, in turn."""
    rows = list(run.records)
    made: list[StepRecord] = [
        dataclasses.replace(rows[n % len(rows)], step=n) for n in range(steps)
    ]
    return dataclasses.replace(run, records=Records(made, limit=None))


RUNS: Final[dict[str, Callable[[Path], Run]]] = {
    "healthy": lambda folder: trained(folder, nn.GRU(4, 32), length=8),
    "exploding": lambda folder: trained(
        folder, inflated(nn.RNN(4, 32, nonlinearity="relu"), 3.5), length=30
    ),
    "vanishing": lambda folder: trained(folder, nn.LSTM(4, 32), steps=1000),
    "NaN": lambda folder: trained(folder, nn.GRU(4, 32), length=8, spoil=300),
    "40 streams": lambda folder: trained(
        folder, nn.LSTM(4, 8, num_layers=20, bidirectional=True), steps=120
    ),
    "100,000 steps": lambda folder: stretched(
        trained(folder, nn.LSTM(4, 32), steps=400), 100_000
    ),
}


@contextmanager
def browser() -> Iterator[Any]:
    """Yield headless Chromium, or None where there is none."""
    path = shutil.which("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        path = None
    if path is None:
        print("Chromium or playwright is not installed: pages are not opened.\n")
        yield None
        return
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=path, args=quiet)
        yield chromium
        chromium.close()


def opened(chromium: Any, path: Path, picture: Path | None) -> str:
    """Open a page; return the milliseconds until it has loaded, in words."""
    if chromium is None:
        return "-"
    times = []
    for _ in range(REPEATS):
        page = chromium.new_page(viewport={"width": 1200, "height": 1500})
        page.goto(path.as_uri())
        times.append(
            page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
        )
        if picture is not None:
            page.screenshot(path=picture)
            Image.open(picture).convert("RGB").quantize(128).save(
                picture, optimize=True
            )
        page.close()
    return spread(times, ".0f") if statistics.fmean(times) else "-"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="the table, for the docs")
    parser.add_argument("--pictures", type=Path, help="a folder for screenshots")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = Results("report", keep=asked.keep, used=("vl-convert-python",))
    results.table("sizes", HEAD, "Six runs; median (min to max) of 5 visits.")
    with browser() as chromium, tempfile.TemporaryDirectory() as temporary:
        for name, make in RUNS.items():
            run = make(Path(temporary) / name)
            path = Path(temporary) / f"{name}.html"
            began = time.perf_counter()
            save([run], path)
            took = time.perf_counter() - began
            picture = None
            if asked.pictures is not None:
                slug = name.lower().replace(" ", "-").replace(",", "")
                picture = asked.pictures / f"report-{slug}.png"
            text = path.read_text(encoding="utf-8")
            results.row(
                name,
                text.count('class="chart"'),
                f"{len(text.encode()) / 1e3:.0f}",
                f"{took:.1f}",
                opened(chromium, path, picture),
            )
    results.save()


if __name__ == "__main__":
    main()
