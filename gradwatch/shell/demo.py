"""The verb demo: a sick LSTM, its alarm, its remedy and its page, in half a minute."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import webbrowser
from typing import Final

import torch
from torch import Tensor, nn

from gradwatch import report
from gradwatch.record import Alert
from gradwatch.remedies import line
from gradwatch.runs import DIR, load
from gradwatch.shell.verb import Answer, Verb
from gradwatch.watcher import Watch, watch

_ABOUT: Final = """\
Train an LSTM on a task that it cannot learn as it is: to say after 60 time steps which
of four symbols it saw at the first one. The alarm says why, its remedy is applied, and
the net learns. Takes some 10 s on a CPU, and needs no network and no data set. The run
folder goes to gradwatch-runs, with a page where gradwatch[plot] is installed.

example: gradwatch demo --open
"""
_LENGTH: Final = 60
_SYMBOLS: Final = 4
_UNITS: Final = 32
_BATCH: Final = 32
_WAIT: Final = 1500
"""Steps until the alarm, at most."""
_AFTER: Final = 500
"""Steps after the remedy."""


class Recall(nn.Module):
    """An LSTM that says at the end which symbol came first."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(_SYMBOLS, _UNITS)
        self.head = nn.Linear(_UNITS, _SYMBOLS)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(T, B, symbols)`` to scores ``(B, symbols)``."""
        scores: Tensor = self.head(self.rnn(x)[0][-1])
        return scores


class Training:
    """A training loop as anyone would write it, in pieces."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        self.step = 0
        self.loss = 0.0
        self._shuffle = torch.Generator().manual_seed(0)

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Return sequences of noise that begin with a symbol, and the symbols."""
        symbols = torch.randint(_SYMBOLS, (size,), generator=self._shuffle)
        x = 0.1 * torch.randn(_LENGTH, size, _SYMBOLS, generator=self._shuffle)
        x[0] += nn.functional.one_hot(symbols, _SYMBOLS)
        return x, symbols

    def advance(self) -> None:
        """Take one step."""
        x, symbols = self.batch(_BATCH)
        loss = nn.functional.cross_entropy(self.model(x), symbols)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step, self.loss = self.step + 1, loss.item()

    def accuracy(self) -> float:
        """Return the share of 500 fresh sequences that are answered rightly."""
        x, symbols = self.batch(500)
        with torch.no_grad():
            return float((self.model(x).argmax(1) == symbols).float().mean())


def _until_the_alarm(training: Training, watching: Watch) -> Alert | None:
    while training.step < _WAIT:
        training.advance()
        for alert in watching.alerts:
            if alert.severity != "info" and alert.remedy is not None:
                return alert
    return None


def _played(given: argparse.Namespace) -> Answer:
    drawn = all(importlib.util.find_spec(n) for n in ("altair", "vl_convert", "jinja2"))
    if given.open and not drawn:
        raise ModuleNotFoundError(
            "The page of a run is drawn by altair, vl-convert-python and jinja2: "
            "pip install 'gradwatch[plot]', or leave out --open."
        )
    torch.set_num_threads(1)  # matrices this small only make threads wait
    torch.manual_seed(0)
    _say(f"An LSTM has to remember its first input for {_LENGTH} time steps.\n")
    model = Recall()
    training = Training(model)
    watching = watch(model, dir=given.dir, name="demo", wandb=None)
    alert = _until_the_alarm(training, watching)
    if alert is None or alert.remedy is None:
        watching.close()
        raise ValueError(f"no alarm in {_WAIT} steps; please report this as a bug.")
    before = training.accuracy()
    _say(f"\nWith four symbols, guessing is right in 25 %; this net in {before:.0%}.")
    _say(f"The remedy that the alarm names is applied:\n  {line(alert.remedy)}\n")
    watching.apply(alert.remedy)
    for _ in range(_AFTER):
        training.advance()
    after = training.accuracy()
    watching.close()
    folder = watching.dir
    plain = {
        "run": None if folder is None else str(folder),
        "alarm": alert.kind,
        "cause": alert.cause,
        "step": alert.step,
        "remedy": line(alert.remedy),
        "accuracy_before": before,
        "accuracy_after": after,
        "page": None,
    }
    lines = [f"\n{_AFTER} steps later: right in {after:.0%}."]
    if folder is not None and drawn:
        page = report.save([load(folder)])
        plain["page"] = str(page)
        lines.append(f"The run as one page: {page}")
        if given.open:
            webbrowser.open(page.resolve().as_uri())
    elif folder is not None:
        lines.append(
            "For its page: pip install 'gradwatch[plot]', then "
            f"gradwatch report {folder} --open"
        )
    return Answer("\n".join(lines), plain)


def _say(text: str) -> None:
    """Print to stderr, where the watch speaks too: stdout is for the outcome."""
    print(text, file=sys.stderr, flush=True)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dir", default=DIR, help="where the run folder goes")
    parser.add_argument("--open", action="store_true", help="show its page")


DEMO: Final = Verb(
    name="demo",
    help="watch a sick LSTM, its alarm and its remedy",
    description=_ABOUT,
    arguments=_arguments,
    answer=_played,
)
