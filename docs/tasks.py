"""Run the real tasks of ``examples/tasks``, check them, and write a page for each.

A task trains a healthy net: its run has to give no alarm, to reach what is asked of it
below, and to leave a report that stays small. Its page says what gradwatch showed.

Run: python docs/tasks.py; with --write to write docs/tasks.md and docs/tasks/ as well
"""

import argparse
import ast
import io
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from PIL import Image  # comes with the extra ``tensorboard``

import gradwatch
from gradwatch import plot
from gradwatch.console import number
from gradwatch.metrics import stream_key
from gradwatch.record import Stream
from gradwatch.runs import Run

ROOT: Final = Path(__file__).parent.parent
FOLDER: Final = ROOT / "docs" / "tasks"
REPORT_LIMIT: Final = 1_500_000
"""Bytes of a report, at most."""
SHOWN: Final = ("rho", "saturated", "update_ratio", "grad_norm_hh")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One task and what is asked of it.

    Attributes:
        name: Of the script and its run.
        reach: What a number that the script prints has to be, at least or at most.
        rising: Whether it has to be at least that.
        at: Which of the numbers it is.
        stream: Whose gradient flow is drawn.
        read: What the numbers say, in words.
    """

    name: str
    reach: float
    rising: bool
    stream: str
    read: str
    at: int = -1


TASKS: Final = (
    Task(
        name="characters",
        reach=2.8,
        rising=False,
        stream="rnn.l0",
        read="""\
The notice `truncated` says what detaching the state means: nothing that lies more
than 50 characters back can be learnt. Beside it stands how far gradients come within
a piece. As long as that is well below the length of the piece, longer pieces would
cost time and bring nothing; where the two are the same, the seams cut off what the
net could use.""",
    ),
    Task(
        name="tagger",
        reach=95.0,
        rising=True,
        stream="rnn.l0_reverse",
        read="""\
The two directions are two streams, and each has its own flow: a character is tagged
by what stands before it and by what comes after it. The lines are packed, so that no
gradient goes into padding, and `T` is the length of the longest line that was looked
at.""",
    ),
    Task(
        name="dates",
        reach=90.0,
        rising=True,
        stream="encoder.l0",
        read="""\
The encoder and the decoder are two modules with a stream each; the decoder is a cell
in a loop, and is watched like a module that runs over time itself. At the first look
gradients come back half of the encoder's steps, at the last one nearly all: attention
has become a way to each of them that is one step long, beside the recurrence. The
best constant output would have a loss of 2.16 (`loss_constant`), over all ten
characters.""",
    ),
    Task(
        name="load",
        at=0,
        reach=0.09,
        rising=False,
        stream="rnn.l1",
        read="""\
Gradients come back less than three days of the week that the net is given, and the
notice `vanishing` says so: the same day of the week before gets no gradient. It is a
notice and no alarm because the net learns all the same. What it is worth depends on
the task: the forecast beats the naive one by what it finds in the last days, and
whoever wants the weekly cycle from the series itself has the line of the remedy to
try.""",
    ),
    Task(
        name="corridor",
        reach=95.0,
        rising=True,
        stream="cell",
        read="""\
The sign is seen in the first of eleven steps, and the horizon says from the start
that gradients come back that far: what is to be remembered can be learnt. The norm of
the gradient falls as the agent is paid each time: a reward that is always the same
has no gradient, and gradwatch does not take that for a fault.""",
    ),
)


def script(task: Task) -> Path:
    """Return the script of a task."""
    return ROOT / "examples" / "tasks" / f"{task.name}.py"


def show(task: Task, folder: Path) -> tuple[str, float, Run]:
    """Run a task in a process of its own; return what it printed, how long, its run.

    Raises:
        RuntimeError: If it failed.
    """
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(script(task))],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "GRADWATCH_DIR": str(folder)},
    )
    seconds = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(f"{task.name}: exit code {done.returncode}: {done.stderr}")
    return done.stdout.strip(), seconds, gradwatch.load(folder / task.name)


def failures(task: Task, printed: str, run: Run, folder: Path) -> list[str]:
    """Return what a task has not kept."""
    wrong = [f"alarm {a.kind}" for a in run.alerts if a.severity != "info"]
    numbers = re.findall(r"(?<![\w.])\d+(?:\.\d+)?", printed)
    found = float(numbers[task.at])
    if found < task.reach if task.rising else found > task.reach:
        wrong.append(f"it printed {printed!r}, and {task.reach:g} was to be reached")
    pages = list((folder / task.name).glob("*.html"))
    if not pages or pages[0].stat().st_size > REPORT_LIMIT:
        wrong.append(f"no report below {REPORT_LIMIT:,} bytes")
    return [f"{task.name}: {line}" for line in wrong]


# ---- the pages


def table(run: Run) -> str:
    """Return the first and the last value of what was measured, by stream."""
    head = ["stream", "gradients come back", *(f"`{name}`" for name in SHOWN)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for stream in run.streams:
        cells = [f"`{stream.name}`", _reach(run, stream)]
        cells += [_ends(run, stream_key(stream, name)) for name in SHOWN]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _series(run: Run, key: str) -> list[float]:
    return [r.metrics[key] for r in run.records if key in r.metrics]


def _ends(run: Run, key: str) -> str:
    found = _series(run, key)
    return f"{number(found[0])} → {number(found[-1])}" if found else "-"


def _reach(run: Run, stream: Stream) -> str:
    steps = _series(run, stream_key(stream, "horizon"))
    known = [f.T for r in run.records if (f := r.facts.modules.get(stream.module))]
    length = next((t for t in reversed(known) if t is not None), 0)
    return f"{steps[0]:.0f} → {steps[-1]:.0f} of {length} steps" if steps else "-"


def page(task: Task, printed: str, run: Run) -> str:
    """Return the page of a task, and draw its picture."""
    title, *paragraphs = (
        ast.get_docstring(ast.parse(script(task).read_text(encoding="utf-8"))) or ""
    ).split("\n\n")
    about = "\n\n".join(p for p in paragraphs if not p.startswith("Run:"))
    picture = FOLDER / f"{task.name}.png"
    drawn = io.BytesIO()
    chart = plot.flow(run.records, task.stream).properties(background="white")
    chart.save(drawn, format="png", ppi=90)
    Image.open(drawn).convert("RGB").quantize(64).save(picture, optimize=True)
    notices = "\n\n".join(f"```text\n{a.message}\n```" for a in run.alerts)
    said = f"No alarm, and this:\n\n{notices}" if notices else "Nothing: no alarm."
    losses = _series(run, "gradwatch/loss")
    course = f"{number(losses[0])} to {number(losses[-1])} in {len(losses)} steps"
    return f"""# {title.removesuffix(".")}

{about}

The script prints:

```text
{printed}
```

The loss went from {course}. What gradwatch measured, at its first look and at its last:

{table(run)}

What it said:

{said}

{task.read}

![The gradient flow of {task.stream} over the training]({task.name}.png)

The script is [examples/tasks/{task.name}.py](../../examples/tasks/{task.name}.py); it
writes its [report](../report.md) into the run folder. This page is written by
`python docs/tasks.py --write`.
"""


INDEX: Final = """# Real tasks

Five trainings that work, each with one line of gradwatch and a page of what it showed.
In none of them is an alarm raised; `make check` runs them all and makes sure of it.

| task | the net | gradients come back, at the last look |
|---|---|---|
"""
NETS: Final = {
    "characters": "LSTM, state handed on and detached",
    "tagger": "bidirectional GRU over packed lines",
    "dates": "GRU, attention, GRU cell in a loop",
    "load": "two LSTM layers",
    "corridor": "GRU cell in a loop, REINFORCE",
}


def row(task: Task, run: Run) -> str:
    """Return the line of a task in the index."""
    doc = ast.get_docstring(ast.parse(script(task).read_text(encoding="utf-8"))) or ""
    title = doc.split("\n")[0].removesuffix(".")
    reach = "; ".join(
        f"`{s.name}` {_reach(run, s).rpartition('→ ')[2]}" for s in run.streams
    )
    return f"| [{title}](tasks/{task.name}.md) | {NETS[task.name]} | {reach} |\n"


def main() -> int:
    """Run all tasks; return 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description="Run the real tasks and check them.")
    parser.add_argument("--write", action="store_true", help="write the pages")
    write = parser.parse_args().write
    wrong, index = [], INDEX
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for task in TASKS:
            printed, seconds, run = show(task, Path(folder))
            wrong += failures(task, printed, run, Path(folder))
            print(f"{seconds:5.1f} s  {task.name}: {printed}")
            if write:
                text = page(task, printed, run)
                (FOLDER / f"{task.name}.md").write_text(text, encoding="utf-8")
                index += row(task, run)
    for line in wrong:
        print(line)
    if write and not wrong:
        FOLDER.with_suffix(".md").write_text(index, encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
