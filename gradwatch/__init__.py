"""Watch recurrent networks train: gradients, weights, and what goes wrong with them.

One call attaches to every nn.RNN, nn.LSTM, nn.GRU and their cells in a model:

    import gradwatch

    gradwatch.watch(model)
"""

from gradwatch import clip, init, parametrize, plot, rules, sinks
from gradwatch._version import __version__
from gradwatch.before import Preflight, preflight
from gradwatch.inspection import inspect
from gradwatch.kinds.judge import Rule
from gradwatch.record import (
    Alert,
    Incident,
    Remedy,
    StepRecord,
    Stream,
    TrainingAlert,
)
from gradwatch.records import Records
from gradwatch.reproducing import Reproduction, reproduce
from gradwatch.runs import Run, load
from gradwatch.sinks import Sink
from gradwatch.watcher import Watch, watch

__all__ = [
    "Alert",
    "Incident",
    "Preflight",
    "Records",
    "Remedy",
    "Reproduction",
    "Rule",
    "Run",
    "Sink",
    "StepRecord",
    "Stream",
    "TrainingAlert",
    "Watch",
    "__version__",
    "clip",
    "init",
    "inspect",
    "load",
    "parametrize",
    "plot",
    "preflight",
    "reproduce",
    "rules",
    "sinks",
    "watch",
]
