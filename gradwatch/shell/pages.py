"""The verbs that make something of a run, a checkpoint or a project."""

from __future__ import annotations

import argparse
import dataclasses
import webbrowser
from pathlib import Path
from typing import Final

from gradwatch import report, view
from gradwatch.inspection import inspect
from gradwatch.runs import load
from gradwatch.shell.verb import Answer, Progress, Verb, run_folder
from gradwatch.sinks.jsonl import safe_name

_INSPECT: Final = """\
Look at the recurrent weights of a checkpoint, before any training: spectral radius,
largest singular value and distance from orthogonality of every gate, how long a gated
net keeps its state, and by what factor a small signal has grown or died out at the end
of a sequence; with a verdict and the remedy. Nothing in the file is executed.

example: gradwatch inspect model.pt --steps 200
"""
_REPORT: Final = """\
Write a run as one page: a file of HTML that needs no network. Its verdict, whether the
record can be trusted, loss, norms and incidents over the steps, the gradient on its way
back through time, what each state depends on, every stream. Two runs: side by side.

RUN is a run folder, or latest: the newest one in gradwatch-runs (or GRADWATCH_DIR).

example: gradwatch report latest --open
"""
_VIEW: Final = """\
Make a saved view of a W&B project, named gradwatch: what gradwatch measures, in
sections. Your own views and panels stay as they are. Needs wandb login, and
pip install 'gradwatch[workspaces]'.

example: gradwatch wandb-view my-team/my-project
"""


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        help="a file of torch.save or safetensors, an index of shards, or a folder",
    )
    parser.add_argument(
        "--steps", type=int, default=100, help="length of the sequences (default 100)"
    )


def _inspected(given: argparse.Namespace) -> Answer:
    folder = Path(given.checkpoint)
    if (folder / "records.jsonl").exists():
        raise ValueError(
            f"{folder} is a run folder, and inspect looks at checkpoints; type "
            f"gradwatch report {folder} --open, or gradwatch check {folder}."
        )
    found = inspect(given.checkpoint, given.steps)
    whole = {**dataclasses.asdict(found), "verdict": found.verdict}
    return Answer(str(found), whole)


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", nargs="+", metavar="RUN", help="one, or two side by side"
    )
    parser.add_argument(
        "-o",
        "--output",
        help="the file (default: report.html in the run folder; of two runs "
        "report-with-RUN2.html in the first)",
    )
    parser.add_argument("--open", action="store_true", help="show it in the browser")


def _reported(given: argparse.Namespace) -> Answer:
    progress = Progress()
    runs = []
    for name in given.run:
        folder = run_folder(name)
        progress.say(f"reading {folder}")
        runs.append(load(folder))
    try:
        output = given.output
        if output is None and len(runs) > 1:  # the page of the first run alone stays
            output = runs[0].dir / f"report-with-{safe_name(runs[1].dir.name)}.html"
        path = report.save(runs, output, say=progress.say)
    finally:
        progress.end()
    if given.open:
        webbrowser.open(path.resolve().as_uri())
    return Answer(str(path), {"page": str(path), "bytes": path.stat().st_size})


def _view_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("project", metavar="ENTITY/PROJECT")


def _viewed(given: argparse.Namespace) -> Answer:
    address = view.save(given.project)
    return Answer(address, {"view": address})


INSPECT: Final = Verb(
    name="inspect",
    help="look at the recurrent weights of a checkpoint",
    description=_INSPECT,
    arguments=_inspect_arguments,
    answer=_inspected,
)
REPORT: Final = Verb(
    name="report",
    help="write a run as one page of HTML",
    description=_REPORT,
    arguments=_report_arguments,
    answer=_reported,
)
VIEW: Final = Verb(
    name="wandb-view",
    help="make a saved view of a W&B project",
    description=_VIEW,
    arguments=_view_arguments,
    answer=_viewed,
)
