"""The chart of the flow: its numbers, its finding, and what it says when it cannot."""

import builtins
import math
import re

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch import plot
from gradwatch.facts import Facts, ModuleFacts
from gradwatch.plot.columns import Series, columns, line, thinned
from gradwatch.plot.history import History
from gradwatch.plot.numbers import ROWS
from gradwatch.record import Incident, StepRecord
from testbed.models import Tagger, batches
from tests.support import runs


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
    assert len(marks) <= ROWS and marks[-1]["step"] == 499
    assert min(c["decades"] for c in cells) == -12


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match=r"of b\.l0; there are: rnn\.l0"):
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


NUMBERLESS = Incident(kind="spike", severity="warning", since=3)


def drawn(chart):
    """The title of a chart, and the values of all its data."""
    whole = chart.to_dict()
    return whole["title"]["text"], [
        r for rows in whole["datasets"].values() for r in rows
    ]


def test_a_picture_of_the_flow_goes_to_the_last_step_and_asks_for_nothing(tmp_path):
    made = [
        StepRecord(
            step=n,
            profiles={"gradwatch/a/l0/adjoint": [1e-3, 1.0]} if n % 100 == 0 else {},
        )
        for n in range(200)
    ]
    cells, _, _ = plot.flow_points(made)
    assert {(c["step"], c["until"]) for c in cells} == {(0, 100), (100, 200)}
    assert {(c["back"], c["to"]) for c in cells} == {(2, 1), (1, 0)}
    plot.flow(made).save(tmp_path / "a.html", inline=True)
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert not re.search(r"<script[^>]+src=", page)


def test_padding_is_marked_and_sequences_that_were_cut_have_all_their_steps():
    facts = Facts(modules={"a": ModuleFacts(T=400, padding=0.25)})
    made = [
        StepRecord(
            step=0, facts=facts, profiles={"gradwatch/a/l0/adjoint": [1.0] * 128}
        )
    ]
    cells, _, _ = plot.flow_points(made)
    assert max(c["back"] for c in cells) == 400 and len(cells) <= 50
    _, values = drawn(plot.flow(made))
    marks = [row for row in values if "padding" in str(row.get("text"))]
    assert (
        all(mark["back"] == 100 and "25%" in mark["text"] for mark in marks) and marks
    )


def test_a_long_sequence_of_a_module_with_a_slash_has_all_its_steps():
    facts = Facts(modules={"x/y": ModuleFacts(T=300)})
    profiles = {"gradwatch/x/y/l0/adjoint": [1.0] * 128}
    metrics = {"gradwatch/x/y/l0/horizon": 12.0}
    made = [StepRecord(step=0, facts=facts, profiles=profiles, metrics=metrics)]
    _, _, title = plot.flow_points(made, "x/y.l0")
    assert title == "x/y.l0: gradients reach 12 of 300 time steps back"


def test_a_line_keeps_the_smallest_and_the_largest_value_of_each_bin():
    import numpy as np

    values = np.ones(10_000)
    values[[123, 7_777]] = -5.0, 9.0
    points = line(Series(np.arange(10_000), values))
    assert len(points) <= 242
    shown = {p["step"]: p["value"] for p in points}
    assert shown[123] == -5 and shown[7_777] == 9 and {0, 9_999} <= shown.keys()


def test_indices_are_spread_from_the_first_to_the_last():
    assert thinned(3, 5) == [0, 1, 2] and thinned(100, 5) == [0, 25, 50, 74, 99]


def test_every_chart_says_what_was_found():
    whole = runs.run("cause")
    found = columns(whole.records)
    charts = [
        (
            plot.timeline(found, whole.incidents),
            "loss 0.583 to 0.0348; vanishing from step 20",
        ),
        (plot.rho(found, "rnn.l0"), "rnn.l0: spectral radius 1.02 to 1.56 (+53%)"),
        (
            plot.gates(found, "rnn.l0"),
            "rnn.l0: forget gate 0.6; keeps for 2 steps",
        ),
        (plot.updates(found, "rnn.l0"), "rnn.l0: W_hh changes by 0.00129 of its norm"),
        (
            plot.incident(found, whole.incidents[0]),
            "vanishing in rnn.l0: rho 1.3 (threshold 1.1)",
        ),
        (
            plot.compare({"a": found, "b": whole.records[:10]}),
            "loss at the end: 0.0348 (a), 0.2 (b)",
        ),
        (
            plot.dependence(found),
            "rnn.l0: the last state depends on 10 of 20 time steps",
        ),
    ]
    for chart, title in charts:
        assert drawn(chart)[0].startswith(title)


def test_a_timeline_has_rates_norms_and_incidents():
    whole = runs.run("cause")
    _, values = drawn(plot.timeline(whole.records, whole.incidents))
    assert {"before clipping", "after clipping"} <= {r.get("line") for r in values}
    assert any(r.get("line") == "Adam 0" and r["value"] == 1e-3 for r in values)
    assert any(r.get("text") == "1 vanishing from step 20, still open" for r in values)


def test_what_is_not_finite_is_marked():
    made = [
        StepRecord(step=n, metrics={"gradwatch/loss": math.nan if n else 1.0})
        for n in range(3)
    ]
    title, values = drawn(plot.timeline(made))
    assert title == "loss 1, not finite from step 1 on; no alarm in 3 steps"
    marked = {r["step"] for r in values if "not finite" in r.get("text", "")}
    assert marked == {1, 2}


def test_the_dependence_of_a_state_ends_at_its_own_step():
    found = plot.dependence_points(runs.run("a").records)
    assert found.seeds == [10, 19] and found.length == 20 and found.step == 50
    _, values = drawn(plot.dependence(runs.run("a").records))
    assert all(row["time"] <= row["until"] - 1 for row in values)


@pytest.mark.parametrize(
    ("draw", "told"),
    [
        (lambda r: plot.rho(r, "b.l0"), r"streams that have it: rnn\.l0"),
        (lambda r: plot.gates(r, "b.l0"), r"b/l0/act_deriv; streams"),
        (lambda r: plot.updates(r, "b.l0"), r"b/l0/update_ratio; streams"),
        (lambda r: plot.compare({"a": r}, "gradwatch/los"), r"no run holds .*/los'"),
        (lambda r: plot.dependence(r[1:9]), r"any stream; there are: none"),
        (lambda r: plot.dependence(r[:9], "b.l0"), r"of b\.l0; there are: rnn\.l0"),
        (
            lambda r: plot.incident(r, NUMBERLESS),
            r"no number of the evidence of spike at step 3",
        ),
    ],
)  # fmt: skip
def test_what_a_chart_lacks_is_named(draw, told):
    with pytest.raises(ValueError, match=told):
        draw(runs.run("a").records)


def test_a_history_spans_the_whole_run_in_few_records():
    history = History()
    streams = [runs.stream("a.l0"), runs.stream("b.l0")]
    for step in range(0, 5_000, 10):
        history.add(runs.record(step, streams))
    key, chart, title = history.picture(["c.l0", "b.l0"])
    assert key == "gradwatch/b/l0" and title.startswith("b.l0: gradients reach 7 of 20")
    steps = {row["step"] for row in chart["layer"][0]["data"]["values"]}
    assert len(steps) <= ROWS and min(steps) < 100 and max(steps) > 4_800
    with pytest.raises(ValueError, match="flow of any stream"):
        History().picture([])
