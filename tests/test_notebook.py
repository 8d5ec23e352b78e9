"""What a notebook shows: static, small and harmless; and the one of the examples."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import gradwatch
from gradwatch.record import Alert, StepRecord
from gradwatch.records import Records
from gradwatch.report import inline
from testbed.models import batches, lstm
from tests.support.runs import run, stream

NOTEBOOK = Path(__file__).parents[1] / "examples" / "notebook.ipynb"
LIMIT = 20_000
"""Bytes of what a cell shows."""
PLAIN = "div p b small table tr th td ul li pre svg polyline path"
"""The tags that may occur."""
HOSTILE = "</td><script>alert(1)</script><img src=x onerror=alert(1)>\x1b[31m"


class Reading(HTMLParser):
    """Collects the tags and the text of a page, and checks that all tags are closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def static(text):
    """Return what was read of HTML that is small and runs nothing."""
    read = Reading(text)
    assert len(text.encode()) < LIMIT
    names = {name for name, _ in read.tags}
    assert names <= set(
        [
            "div",
            "p",
            "b",
            "table",
            "tr",
            "th",
            "td",
            "svg",
            "polyline",
            "path",
            "ul",
            "li",
            "pre",
            "small",
        ]
    )
    for _, attributes in read.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert "href" not in attributes and "src" not in attributes
    return read


def shown(made):
    latest = {}
    for record in made.records:
        latest.update(record.metrics)
    facts = made.records[0].facts.modules if len(made.records) else {}
    return static(inline.of_run(made, latest, facts))


def test_a_watch_shows_its_streams_its_flow_and_its_alarms():
    model = lstm()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watch = gradwatch.watch(model, dir=None, wandb=None, every=1, budget=None)
    assert "no step yet" in static(watch._repr_html_()).text
    for x in batches(30):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    read = static(watch._repr_html_())
    assert "rnn.l0" in read.text and "step 29" in read.text and "no alarm" in read.text
    drawn = [tag for tag, _ in read.tags if tag in ("polyline", "path")]
    assert drawn.count("polyline") == 3 and drawn.count("path") == 1
    labels = [a["aria-label"] for tag, a in read.tags if tag == "svg"]
    assert len(labels) == 4 and any(label.startswith("rho from") for label in labels)
    watch.close()
    assert "rnn.l0" in static(watch._repr_html_()).text


def test_a_watch_that_is_off_says_so(monkeypatch):
    monkeypatch.setenv("GRADWATCH_DISABLED", "1")
    assert "off here" in static(gradwatch.watch(lstm())._repr_html_()).text


def test_the_numbers_of_an_incident():
    read = shown(run())
    assert "vanishing since step 20, still open in rnn.l0" in read.text
    assert "from the first time step" in read.text


@pytest.mark.parametrize("count", [1, 9, 200])
def test_any_run_is_small_and_harmless(count):
    names = [f"{HOSTILE * 9}{n}.l0" for n in range(count)]
    read = shown(run(name=HOSTILE, streams=[stream(name) for name in names]))
    assert ("more streams" in read.text) == (count > 10)
    assert "\x1b" not in read.text


def test_numbers_that_are_not_finite_are_drawn_around():
    own = stream("rnn.l0")
    made = run(streams=[own], sick=False)
    odd = [math.nan, math.inf, -math.inf, 1.0]
    rows = [
        StepRecord(
            step=n,
            metrics={"gradwatch/rnn/l0/rho": value},
            profiles={"gradwatch/rnn/l0/adjoint": odd},
        )
        for n, value in enumerate(odd)
    ]
    for records in (rows, rows[:1], []):
        object.__setattr__(made, "records", Records(records))
        text = inline.of_run(made, {}, {})
        assert not re.search(r"(points|d)=\"[^\"]*(nan|inf)", text)
        static(text)


def test_an_alert_is_its_message():
    alert = Alert(
        kind="exploding",
        severity="error",
        step=3,
        since=2,
        message=f"first\n  do: {HOSTILE}" + "x" * 99_999,
    )
    read = static(alert._repr_html_())
    assert read.text.startswith("error: first\n  do: </td><script>")


def test_the_notebook_of_the_examples_runs():
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    outputs = [
        out.data["text/html"]
        for cell in notebook.cells
        if cell.cell_type == "code"
        for out in cell.outputs
        if "text/html" in out.get("data", {})
    ]
    before, alarm, after, table = outputs
    assert "vanishing since step" in static(before).text
    assert "init.chrono_" in static(alarm).text and "rnn.l0" in static(after).text
    assert "gradwatch/loss" in table
    assert all(not cell.get("outputs") for cell in nbformat.read(NOTEBOOK, 4).cells)
