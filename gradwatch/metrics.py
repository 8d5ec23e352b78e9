"""The catalogue of metrics: one table, from which everything else is derived.

The table is ``metrics.csv`` beside this file. W&B definitions, the reference page,
captions and the text of an alert read it; nothing else lists metrics.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType
from typing import Final

from gradwatch.record import Stream

PREFIX: Final = "gradwatch"
STEP_KEY: Final = f"{PREFIX}/step"


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the catalogue.

    Attributes:
        name: The last part of the key.
        scope: ``run``: one value a step; ``stream``: one for every stream.
        gates: Which gates have a value of their own, in words.
        nets: For which nets it exists: all, vanilla, gated, lstm, tanh or relu.
        depth: The depth that measures it: gradients, state, spectrum or flow.
        unsuffixed: What the value without a gate is, for a gated stream.
        headline: Whether it is sent to W&B by default.
        unit: Unit of the value.
        range: Interval of possible values.
        meaning: One sentence.
    """

    name: str
    scope: str
    gates: str
    nets: str
    depth: str
    unsuffixed: str
    headline: bool
    unit: str
    range: str
    meaning: str


def _read() -> Mapping[str, Metric]:
    text = resources.files("gradwatch").joinpath("metrics.csv").read_text("utf-8")
    table = {}
    for row in csv.DictReader(text.splitlines()):
        name, headline = row.pop("metric"), row.pop("wandb") == "yes"
        table[name] = Metric(name=name, headline=headline, **row)
    return MappingProxyType(table)


CATALOGUE: Final[Mapping[str, Metric]] = _read()

_KINDS: Final = {
    "all": {"RNN_TANH", "RNN_RELU", "LSTM", "GRU", "CELL"},
    "cell": {"CELL"},
    "vanilla": {"RNN_TANH", "RNN_RELU"},
    "gated": {"LSTM", "GRU"},
    "lstm": {"LSTM"},
    "tanh": {"RNN_TANH", "LSTM", "GRU", "CELL"},
    "relu": {"RNN_RELU"},
}


def run_key(metric: str) -> str:
    """Return the key of a metric of the whole run: ``gradwatch/<metric>``."""
    return f"{PREFIX}/{metric}"


def stream_key(stream: Stream, metric: str, gate: str = "") -> str:
    """Return the key of a stream's metric, of one gate where ``gate`` is given."""
    key = f"{PREFIX}/{stream.key}/{metric}"
    return f"{key}/{gate}" if gate else key


def of(key: str) -> Metric | None:
    """Return the catalogue's row for a metric key, gated or not, or None."""
    parts = key.split("/")
    for name in parts[:-3:-1]:
        if name in CATALOGUE:
            return CATALOGUE[name]
    return None


def headline_keys(streams: Sequence[Stream]) -> list[str]:
    """Return the unsuffixed keys that W&B gets: the run's, then each stream's."""
    rows = [m for m in CATALOGUE.values() if m.headline]
    run = [run_key(m.name) for m in rows if m.scope == "run"]
    return run + [
        stream_key(stream, m.name)
        for stream in streams
        for m in rows
        if m.scope == "stream" and stream.kind in _KINDS[m.nets]
    ]
