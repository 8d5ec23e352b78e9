"""The chart of the flow: its numbers, its finding, and what it says when it cannot."""

import builtins
import math

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.record import StepRecord
from testbed.models import Tagger, batches


def records():
    torch.manual_seed(0)
    model = Tagger(nn.LSTM(4, 8), 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradwatch.watch(model, every=1, budget=None, dir=None) as watch:
        for x in batches(5, length=20):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    return watch.records


def test_the_title_is_the_finding_and_the_numbers_are_the_profile():
    found = records()
    cells, marks, title = gradwatch.plot.flow_points(found)
    horizon = found[-1].metrics["gradwatch/rnn/l0/horizon"]
    assert title == f"rnn.l0: gradients reach {horizon:.0f} of 20 time steps back"
    assert len(cells) == 5 * 20 and len(marks) == 5
    profile = found[-1].profiles["gradwatch/rnn/l0/adjoint"]
    shown = [c["decades"] for c in cells if c["step"] == 4]
    expected = [max(math.log10(v / max(profile)), -12) for v in profile]
    assert shown == pytest.approx(expected, abs=1e-3)


def test_the_chart_can_be_saved(tmp_path):
    chart = gradwatch.plot.flow(records())
    chart.save(tmp_path / "flow.svg")
    text = (tmp_path / "flow.svg").read_text()
    assert "steps back" in text and "training step" in text
    chart.save(tmp_path / "flow.html")


def test_a_long_run_is_thinned_and_zeros_have_a_colour():
    made = [
        StepRecord(
            step=step,
            metrics={"gradwatch/a/l0/horizon": 1.0},
            profiles={"gradwatch/a/l0/adjoint": [0.0, 0.0] if step else [0.0, 2.0]},
        )
        for step in range(500)
    ]
    cells, marks, _ = gradwatch.plot.flow_points(made, "a.l0")
    assert len(marks) <= 60 and marks[-1]["step"] == 499
    assert min(c["decades"] for c in cells) == -12


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match=r"flow of b\.l0; there are: rnn\.l0"):
        gradwatch.plot.flow_points(records(), "b.l0")
    with pytest.raises(ValueError, match=r"any stream; there are: none.*probe_now"):
        gradwatch.plot.flow_points([])


def test_without_altair_the_way_to_get_it_is_said(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "altair":
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"gradwatch\[plot\]"):
        gradwatch.plot.flow([])
