"""Whole runs: every record, alert and incident, what is printed, saved and left."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, parametrizations, rnn

import gradwatch
from gradwatch.record import Remedy
from testbed.models import Loop, Tagger, batches, lstm
from tests.causes import exploding, loop, units, vanishing
from tests.causes.run import Run, trained

Train = Callable[[Any], None]
"""Trains the model of a run, given its watch."""


def _squared(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


def plain(model: nn.Module, steps: int = 60, clip: float | None = 0.05) -> Train:
    """An ordinary loop that logs its loss."""

    def train(watch: gradwatch.Watch) -> None:
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for x in batches(steps):
            optimizer.zero_grad()
            loss = _squared(model, x)
            watch.log(loss=loss)
            loss.backward()
            if clip is not None:
                clip_grad_norm_(model.parameters(), clip)
            optimizer.step()

    return train


class Packs(nn.Module):
    """Reads packed sequences in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Tagger(nn.GRU(4, 8, bidirectional=True, num_layers=2), 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(6, 5, 4)`` to ``(5, 3)``."""
        lengths = torch.tensor([6, 2, 5, 1, 3])
        return self.inner(rnn.pack_padded_sequence(x, lengths, enforce_sorted=False))


class Translates(nn.Module):
    """An encoder, and a decoder that is called for each step."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.GRU(4, 8), nn.GRU(4, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(T, B, 4)`` to ``(T, B, 4)``."""
        state, row, made = self.encoder(x)[1], x[:1], []
        for _ in x:
            out, state = self.decoder(row, state)
            row = self.head(out)
            made.append(row)
        return torch.cat(made)


def accumulated(model: nn.Module) -> Train:
    """Three backward passes a step, gradients zeroed in place, one step skipped."""

    def train(watch: gradwatch.Watch) -> None:
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        for number, group in enumerate(batches(60).split(3)):
            optimizer.zero_grad(set_to_none=False)
            for x in group:
                (_squared(model, x) / 3).backward()
            if number != 7:
                optimizer.step()

    return train


def scaled(model: nn.Module) -> Train:
    """A loss scaler that overflows at three steps."""

    def train(watch: gradwatch.Watch) -> None:
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for number, x in enumerate(batches(40)):
            optimizer.zero_grad()
            loss = _squared(model, x)
            watch.log(loss=loss)
            scaler.scale(loss * torch.inf if number in (0, 9, 30) else loss).backward()
            scaler.unscale_(optimizer)
            clip_grad_norm_(model.parameters(), 0.05)
            scaler.step(optimizer)
            scaler.update()

    return train


def two_optimizers(model: Any) -> Train:
    """One for the recurrent module, one for the head."""

    def train(watch: gradwatch.Watch) -> None:
        pair = [
            torch.optim.SGD(model.head.parameters(), 0.1),
            torch.optim.Adam(model.rnn.parameters(), 1e-2),
        ]
        for x in batches(40):
            model.zero_grad()
            _squared(model, x).backward()
            for optimizer in pair:
                optimizer.step()

    return train


def lbfgs(model: nn.Module) -> Train:
    """A closure."""

    def train(watch: gradwatch.Watch) -> None:
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
        for x in batches(12):

            def closure(x: torch.Tensor = x) -> torch.Tensor:
                optimizer.zero_grad()
                loss = _squared(model, x)
                loss.backward()
                return loss

            optimizer.step(closure)

    return train


def hand_written(model: nn.Module) -> Train:
    """No optimizer at all."""

    def train(watch: gradwatch.Watch) -> None:
        for x in batches(30):
            _squared(model, x).backward()
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(p.grad, alpha=0.1)
                    p.grad = None

    return train


def in_pieces(model: nn.LSTM) -> Train:
    """Truncated backpropagation: the state goes on, detached."""

    def train(watch: gradwatch.Watch) -> None:
        optimizer, state = torch.optim.SGD(model.parameters(), 0.1), None
        for x in batches(40):
            out, state = model(x, state)
            optimizer.zero_grad()
            out.square().mean().backward()
            optimizer.step()
            state = tuple(s.detach() for s in state)

    return train


def handled(model: nn.Module) -> Train:
    """All that a user may ask of the handle as the net trains."""

    def train(watch: gradwatch.Watch) -> None:
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for number, x in enumerate(batches(60)):
            if number == 10:
                watch.pause()
            if number == 14:
                watch.resume()
            if number == 20:
                watch.probe_now()
            if number == 30:
                remedy = Remedy(name="init.orthogonal_", args={"streams": ["rnn.l0"]})
                watch.apply(remedy, optimizer=optimizer)
            if number == 40:
                state = watch.state_dict()
                watch.load_state_dict(state)
            optimizer.zero_grad()
            _squared(model, x).backward()
            optimizer.step()

    return train


def _of_relu() -> nn.Module:
    torch.manual_seed(0)
    return Tagger(nn.RNN(4, 8, nonlinearity="relu", num_layers=2, dropout=0.3), 8)


def _held() -> nn.Module:
    torch.manual_seed(0)
    model = Tagger(nn.GRU(4, 8), 8)
    parametrizations.orthogonal(model.rnn, "weight_hh_l0")
    return model


def _seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build()


BY_HAND: dict[str, tuple[Callable[[], Any], Callable[[Any], Train]]] = {
    "an LSTM": (lstm, plain),
    "a deep ReLU net with dropout": (_of_relu, plain),
    "a deep bidirectional LSTM with projection": (
        lambda: lstm(num_layers=2, bidirectional=True, proj_size=3),
        plain,
    ),
    "packed GRUs": (lambda: _seeded(Packs), plain),
    "an encoder and a decoder": (lambda: _seeded(Translates), plain),
    "a loop of LSTM cells": (
        lambda: _seeded(lambda: Loop(nn.LSTMCell(4, 8), 8)),
        plain,
    ),
    "an orthogonal GRU": (_held, plain),
    "accumulation": (lstm, accumulated),
    "a loss scaler": (lstm, scaled),
    "two optimizers": (lstm, two_optimizers),
    "LBFGS": (lstm, lbfgs),
    "hand-written updates": (lstm, hand_written),
    "a state that goes on": (lambda: _seeded(lambda: nn.LSTM(4, 8)), in_pieces),
    "the handle": (lstm, handled),
}
SICK = {
    name: case
    for room, names in (
        (
            loop,
            (
                "an input that is NaN, under a scaler",
                "a sigmoid by hand in float16",
                "a batch of targets a thousand times too large",
                "a rate of 1",
                "a clip at a millionth",
                "four batches that throw the weights out",
                "a small loss in float16",
                "gradients that nobody clears",
                "gradients that are 0 before the step",
                "one batch for ever",
            ),
        ),
        (
            units,
            (
                "biases that fall far below the inputs, in reverse",
                "a shut output gate, packed",
                "a state that is read detached",
                "a second layer at a rate of 0",
            ),
        ),
        (
            vanishing,
            (
                "a sequence in pieces",
                "an LSTM that forgets",
                "a state that goes on detached",
                "a radius that wanders off",
            ),
        ),
        (
            exploding,
            (
                "recurrent weights that grow by 6 % a step",
                "a ReLU cell of radius 3.5",
                "targets in another unit",
            ),
        ),
    )
    for name, case in room.CASES.items()
    if name in names
}
RUNS = [*BY_HAND, *SICK]
QUICK = (
    "a deep bidirectional LSTM with projection",
    "an encoder and a decoder",
    "a loss scaler",
    "two optimizers",
    "the handle",
    "an input that is NaN, under a scaler",
    "a ReLU cell of radius 3.5",
)


class _Lines(logging.Handler):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.found: list[list[str]] = []
        self._folder = str(folder)

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage().replace(self._folder, "FOLDER")
        self.found.append([record.levelname, text])


def run(name: str, folder: Path) -> dict[str, Any]:
    """Train one run in a folder; return all that it leaves, in plain values."""
    log, lines = logging.getLogger("gradwatch"), _Lines(folder)
    log.addHandler(lines)
    saved: dict[str, Any] = {}
    try:
        if name in BY_HAND:
            build, train = BY_HAND[name]
            model = build()
            torch.manual_seed(3)
            with gradwatch.watch(
                model, dir=folder, name="run", wandb=None, budget=None
            ) as watch:
                train(model)(watch)
                watch.flush()
                saved = {"state": watch.state_dict(), "table": repr(watch)}
        else:
            torch.manual_seed(0)
            case: Run = SICK[name].build(True)
            watch = trained(case, folder)
    finally:
        log.removeHandler(lines)
    assert watch.dir is not None
    left = _folder(watch.dir)
    text = json.dumps(lines.found).replace(watch.dir.name, "NAME")
    for part in ("steps", "costs"):  # measured times
        saved.get("state", {}).get("schedule", {}).pop(part, None)
    return {**left, **saved, "console": json.loads(text)}


def _folder(where: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (where / "records.jsonl").open()]
    alerts = [json.loads(line) for line in (where / "alerts.jsonl").open()]
    meta = json.loads((where / "meta.json").read_text())
    for name in ("started", "versions"):
        del meta[name]
    del meta["health"]["overhead"]
    incidents = {
        path.name: _incident(json.loads(path.read_text()))
        for path in sorted((where / "incidents").glob("*"))
    }
    return {
        "records": _columns(rows),
        "alerts": alerts,
        "incidents": incidents,
        "meta": meta,
        "files": sorted(str(p.relative_to(where)) for p in where.rglob("*")),
    }


def _incident(content: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is in the records already, and what differs from run to run."""
    del content["environment"]["versions"]
    content["latest"].pop("gradwatch/overhead", None)
    content["records"] = [row["step"] for row in content["records"]]
    return content


def _columns(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the rows of a run by column, the time and our own cost left out."""
    metrics: dict[str, list[Any]] = {}
    for row in rows:
        for key, value in row.get("metrics", {}).items():
            if key != "gradwatch/overhead":
                metrics.setdefault(key, []).append([row["step"], value])
    rest = {
        part: {str(row["step"]): row[part] for row in rows if part in row}
        for part in ("profiles", "facts", "events")
    }
    return {"steps": [row["step"] for row in rows], "metrics": metrics, **rest}
