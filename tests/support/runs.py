"""Runs as their folders hold them, made by hand: what a report is drawn of."""

import math
from pathlib import Path

from gradwatch.facts import Facts, ModuleFacts, RunFacts
from gradwatch.record import Alert, Incident, StepRecord, Stream
from gradwatch.records import Records
from gradwatch.runs import Run

MESSAGE = """{name} at step {step}: something in {stream}
  evidence: {stream} 3 (reported at 2)
  why: {name}
  do: {name}()"""


def stream(name, kind="LSTM", gates=("i", "f", "g", "o")):
    module = name.rpartition(".")[0]
    return Stream(
        name=name,
        module=module,
        kind=kind,
        layer=0,
        direction="forward",
        input_size=4,
        hidden_size=8,
        gates=gates,
    )


def record(step, streams, length=20):
    """A step at which all there is was measured."""
    metrics = {
        "gradwatch/loss": 2.0 / (1 + step),
        "gradwatch/loss_constant": 2.3,
        "gradwatch/grad_norm": 1.0 + step % 7,
        "gradwatch/grad_norm_clipped": 1.0,
        "gradwatch/clip_ratio": 1 / (1 + step % 7),
    }
    profiles = {}
    for own in streams:
        key = f"gradwatch/{own.key}"
        metrics |= {f"{key}/rho": 1 + step / 100, f"{key}/rho_drift": 1e-3}
        metrics |= {f"{key}/horizon": 7.0, f"{key}/update_ratio": 1e-3 + step * 1e-5}
        metrics |= {f"{key}/act_deriv": 0.5, f"{key}/forget": 0.6}
        metrics |= {f"{key}/timescale": 2.0, f"{key}/saturated": 0.1}
        metrics |= {f"{key}/grad_norm_hh": 0.5, f"{key}/open/f": 0.2}
        if step % 10 == 0:
            decay = [10.0 ** -(length - 1 - t) for t in range(length)]
            profiles[f"{key}/adjoint"] = decay
            for seed in (length // 2, length - 1):
                row = [0.5 ** (seed - t) if t <= seed else 0.0 for t in range(length)]
                profiles[f"{key}/adjoint_from/{seed}"] = row
    facts = Facts()
    if step == 0:
        adam = {"Adam 0": {"lr": 1e-3, "betas": [0.9, 0.999]}}
        facts = Facts(
            run=RunFacts(optimizers=adam, loss_kind="cross_entropy"),
            modules={own.module: ModuleFacts(T=length, B=3) for own in streams},
        )
    return StepRecord(
        step=step, time=1.7e9, metrics=metrics, profiles=profiles, facts=facts
    )


def alert(name, streams, step=30, kind="vanishing", cause=None):
    key = f"gradwatch/{streams[0].key}/rho"
    return Alert(
        kind=kind,
        severity="warning",
        step=step,
        since=20,
        message=MESSAGE.format(name=name, step=step, stream=streams[0].name),
        stream=streams[0].name,
        streams=tuple(own.name for own in streams[:3]),
        cause=cause or name,
        evidence={key: (1.3, 1.1)},
    )


def run(name="mine", streams=None, steps=60, sick=True, **parts):
    """A run whose every text is, or has in it, the name."""
    streams = streams or [stream("rnn.l0")]
    given = [alert(name, streams)] if sick else []
    incidents = [
        Incident(
            kind=one.kind,
            severity=one.severity,
            since=one.since,
            streams=one.streams,
            cause=one.cause,
            evidence=one.evidence,
            alerts=(one,),
        )
        for one in given
    ]
    meta = {
        "started": 1.7e9,
        "settings": {"every": None, name: name, "budget": math.pi},
        "versions": {"torch": name},
        "health": {"failed": {}, "dropped": {}, "overhead": 0.012},
    }
    return Run(
        dir=Path(parts.pop("dir", name)),
        meta=meta,
        streams=tuple(streams),
        records=Records([record(n, streams) for n in range(steps)], limit=None),
        alerts=given,
        incidents=incidents,
        closed=parts.pop("closed", True),
        **parts,
    )
