"""The page of a run: what it says, what it holds, and that nothing escapes."""

import dataclasses
import json
import math
import re
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch import runs
from gradwatch.cli import main
from gradwatch.facts import NO_FACTS
from gradwatch.kinds.catalogue import CATALOGUE
from gradwatch.plot.columns import columns
from gradwatch.record import StepRecord, printable
from gradwatch.records import Records
from gradwatch.report import MARK, cards, content, report, save
from gradwatch.report.content import Subject
from gradwatch.report.drawing import DrawingError, Picture, svg
from gradwatch.report.trust import trust
from testbed.models import Tagger, batches
from tests.support.runs import alert, record, run, stream
from tests.support.seldom import seldom

LIMIT = 1.5 * 2**20
"""Bytes of a report."""

HOSTILE = [
    "<script>hit()</script>",
    "</script><script>hit()</script>",
    "<img src=x onerror=hit()>",
    "</style><script>hit()</script>",
    "</title><script>hit()</script>",
    '"><svg onload=hit()>',
    "' onmouseover='hit()",
    '" autofocus onfocus="hit()',
    "javascript:hit()",
    "<a href=javascript:hit()>x</a>",
    "<iframe srcdoc='<script>hit()</script>'>",
    "<!--<script>hit()//-->",
    "]]><script>hit()</script>",
    "{{ 7 * 7 }}",
    "{% for x in y %}",
    "{{ ''.__class__ }}",
    "<svg><script>hit()</script></svg>",
    "<math><mtext><script>hit()</script>",
    "\\u003cscript\\u003ehit()\\u003c/script\\u003e",
    "&lt;script&gt;",
    "&#60;script&#62;hit()",
    "<base href=//evil>",
    "<meta http-equiv=refresh content=0>",
    "<link rel=stylesheet href=//evil>",
    "<object data=//evil>",
    "<form action=//evil><input>",
    "datum.value; hit()",
    "\x1b[31mred\x07",
    "\u202eright to left",
    "nul\x00and\ud800half",
    "*" * 3000,
]
TAGS = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "a",
    "main",
    "h1",
    "h2",
    "h3",
    "h4",
    "p",
    "span",
    "strong",
    "header",
    "div",
    "section",
    "article",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "ul",
    "li",
    "dl",
    "dt",
    "dd",
    "code",
    "figure",
    "figcaption",
    "script",
    "details",
    "summary",
    "footer",
    "svg",
    "g",
    "path",
    "rect",
    "line",
    "text",
    "defs",
    "lineargradient",
    "stop",
    "clippath",
}


class Page(HTMLParser):
    """What a browser would make of a page: its tags, and the text of each."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.data, self._in = [], "", [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._in = [tag] if tag in ("script", "style") else []

    def handle_endtag(self, tag):
        self._in = []

    def handle_data(self, data):
        if self._in == ["script"]:
            self.data.append(data)
        elif not self._in:
            self.text += data


def says(run, **more):
    return re.sub(r"\s+", " ", Page(report([run], say=lambda line: None, **more)).text)


# ---- nothing escapes


SOME = seldom(HOSTILE, set(HOSTILE) - set(HOSTILE[::3]))


@pytest.mark.parametrize("name", SOME)
def test_a_hostile_name_is_text_and_nothing_else(name):
    nameless = stream("rnn.l0")
    streams = [dataclasses.replace(nameless, name=f"{name}.l0", module=name)]
    page = Page(report([run(name, streams, steps=30)], say=lambda line: None))
    assert {tag for tag, _ in page.tags} <= TAGS
    for tag, own in page.tags:
        assert not [key for key in own if key.startswith("on")]
        for value in (own.get("href"), own.get("src"), own.get("style")):
            assert value in (None, "#incidents")
        if tag == "script":
            assert set(own) <= {"type"}
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 2
    numbers, script = page.data
    assert json.loads(numbers)["rows"] and "hit()" not in script
    shown = printable(name)[:40]
    assert re.sub(r"\s+", "", shown) in re.sub(r"\s+", "", page.text)


def test_the_page_asks_for_nothing_and_runs_its_own_script_alone():
    text = report([run()], say=lambda line: None)
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1]
    assert policy.startswith(
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-"
    )
    assert "http" not in re.sub(r'http-equiv|xmlns="[^"]+"', "", text)
    assert "url(" not in re.sub(r"url\(#", "", text) and "@import" not in text


def test_what_a_chart_is_given_is_text_and_never_a_formula():
    drawn = svg(
        {"mark": "text", "encoding": {"text": {"value": "<b>&\x00"}}}, "<i>", "a"
    )
    assert "<b>" not in drawn and "<i>" not in drawn and "\x00" not in drawn


# ---- what it says


def test_the_verdict_names_the_alarm_its_place_and_its_state():
    text = says(run("cause"))
    assert "1 alarm in 60 steps, the first from step 20 on: vanishing (cause)" in text
    assert "in rnn.l0, still open." in text


def test_a_healthy_run_is_told_in_a_sentence():
    text = says(run(sick=False))
    assert "No alarm in 60 steps." in text and "There were none." in text
    assert "Every step was recorded, and nothing was lost." in text


def with_losses(values, **more):
    made = [
        StepRecord(step=n, metrics={"gradwatch/loss": loss, **more})
        for n, loss in enumerate(values)
    ]
    whole = run(sick=False)
    return dataclasses.replace(whole, records=Records(made, limit=None))


@pytest.mark.parametrize(
    ("losses", "more", "told"),
    [
        ([2.3] * 50, {"gradwatch/loss_constant": 2.3}, "no better than a constant"),
        ([1.0 + n for n in range(50)], {}, "higher at the end than at the start"),
        ([1.0] * 50, {}, "where it began"),
        ([1.0] * 30 + [float("nan")] * 5, {}, "not finite from step 30 on"),
        ([1.0] * 5, {}, "too few steps to judge"),
    ],
)
def test_where_no_alarm_came_the_loss_is_looked_at(losses, more, told):
    assert told in says(with_losses(losses, **more))


def test_a_run_without_a_step_says_so():
    empty = dataclasses.replace(run(sick=False), records=Records())
    text = says(empty)
    assert "Nothing was measured: no step was seen." in text


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"closed": False}, "The run was not closed: what came after step 59 is lost."),
        ({"skipped": ["records.jsonl: line 7"]}, "records.jsonl: line 7"),
        (
            {"meta": {"health": {"failed": {"flow": "E"}, "dropped": {"W&B": 3}}}},
            "flow failed: E.",
        ),
    ],
)
def test_what_is_missing_in_a_record_is_told(change, told):
    notes = [
        note.text for note in trust(Subject.of(dataclasses.replace(run(), **change)))
    ]
    assert any(told in text for text in notes)
    assert not any("nothing was lost" in text for text in notes)


def test_gaps_cadences_and_short_steps_are_told():
    made = [
        StepRecord(
            step=n,
            partial=n % 2 == 1,
            events=("cadence: flow every 500 steps",) if n == 3 else (),
        )
        for n in (0, 1, 2, 3, 9)
    ]
    whole = dataclasses.replace(run(sick=False), records=Records(made, limit=None))
    notes = " ".join(note.text for note in trust(Subject.of(whole)))
    assert "5 of 10 steps have no row of their own, from step 4 on" in notes
    assert "flow every 500 steps from step 3 on" in notes
    assert "At 3 short steps" in notes
    assert (
        "No loss was found" in notes and "No gradient was measured in rnn.l0" in notes
    )


def test_an_incident_is_told_as_the_alert_said_it():
    [card] = cards.incident_cards(Subject.of(run("cause")))
    told = dict(card.lines)
    assert told["what"] == "cause at step 30: something in rnn.l0"
    assert told["evidence"] == "rnn.l0 3 (reported at 2)" and told["do"] == "cause()"
    right, raised = cards.measured()["vanishing"]
    assert f"right in {right} of {raised} labelled runs" in card.right


def test_of_every_kind_that_was_raised_it_is_told_how_often_it_is_right():
    found = cards.measured()
    assert set(found) <= set(CATALOGUE) and len(found) >= 15
    assert all(0 <= right <= raised for right, raised in found.values())


def test_many_incidents_are_counted():
    whole = run("cause")
    [one] = whole.incidents
    many = [dataclasses.replace(one, since=n) for n in range(30)]
    text = says(dataclasses.replace(whole, incidents=many))
    assert "18 more are in the run folder" in text


def test_a_memory_is_told_in_words_for_each_time_step():
    page = Page(report([run()], say=lambda line: None))
    rows = json.loads(page.data[0])["rows"]
    assert [row["seed"] for row in rows] == [10, 19]
    assert "depends on 10 steps up to it" in rows[1]["text"]  # .5^9 > 1e-3 > .5^10


def test_streams_of_alarms_and_short_reach_come_first():
    streams = [stream(f"a{n}.l0") for n in range(40)]
    whole = run("cause", streams)
    sick = dataclasses.replace(whole.incidents[0], streams=("a33.l0",))
    whole = dataclasses.replace(whole, incidents=[sick])
    rows = content.stream_rows(Subject.of(whole))
    assert len(rows) == 40 and rows[0].name == "a33.l0" and rows[0].sick


def test_forty_streams_stay_below_the_limit():
    text = report(
        [run(streams=[stream(f"a{n}.l0") for n in range(40)])], say=lambda line: None
    )
    assert len(text.encode()) < LIMIT and text.count('class="chart"') > 80


def full(length=128, flows=60):
    """A run in which all that can be drawn is there: four streams, twelve incidents."""
    streams = [stream(f"a{n}.l0") for n in range(4)]
    made = [record(n, streams, length) for n in range(flows * 10)]
    for place, one in enumerate(made):
        if one.profiles:
            rows = {}
            for own in streams:
                for seed in range(7, length, 8):
                    key = f"gradwatch/{own.key}/adjoint_from/{seed}"
                    rows[key] = [1e-3 * (t + 1) for t in range(64)]
            made[place] = dataclasses.replace(one, profiles={**one.profiles, **rows})
    whole = run("cause", streams)
    [one] = whole.incidents
    many = [dataclasses.replace(one, since=20 + n) for n in range(12)]
    records = Records(made, limit=None)
    return dataclasses.replace(whole, records=records, incidents=many)


@pytest.mark.parametrize("count", seldom([1, 2], [2]))
def test_whatever_there_is_to_draw_a_page_stays_below_the_limit(count):
    text = report([full()] * count, say=lambda line: None)
    assert len(text.encode()) < LIMIT


def test_of_many_streams_the_table_has_the_first():
    many = [stream(f"{'a' * 200}{n}.l0") for n in range(2000)]
    text = report([run("cause", many, steps=12)], say=lambda line: None)
    assert len(text.encode()) < LIMIT
    assert "1800 more are in the run folder" in Page(text).text


def test_a_spike_of_one_step_survives_in_a_long_run():
    made = [
        StepRecord(step=n, metrics={"gradwatch/grad_norm": 1e6 if n == 70_001 else 1.0})
        for n in range(100_000)
    ]
    whole = dataclasses.replace(run(sick=False), records=Records(made, limit=None))
    text = report([whole], say=lambda line: None)
    assert 'data-t="step 70001: 1e+06"' in text and len(text.encode()) < LIMIT


# ---- two runs


def test_two_runs_are_laid_side_by_side():
    other = run("other", sick=False, steps=40)
    text = Page(report([run("cause"), other], say=lambda line: None)).text
    assert "loss at the end: 0.0348 (cause), 0.052 (other)" in text
    assert "What is set otherwise" in text and "version, torch" in text
    assert (
        "gradwatch, budget"
        not in text.partition("What is set otherwise")[2].partition("The run over")[0]
    )


def test_two_runs_of_one_name_are_told_apart():
    text = Page(report([run("a"), run("a")], say=lambda line: None)).text
    assert "a (1)" in text and "a (2)" in text


@pytest.mark.parametrize("count", [0, 3])
def test_a_report_is_of_one_run_or_two(count):
    with pytest.raises(ValueError, match="one run or two"):
        report([run()] * count)


# ---- where it goes


def trained(tmp_path, **options):
    torch.manual_seed(0)
    model = Tagger(nn.LSTM(4, 8), 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradwatch.watch(
        model, dir=tmp_path, name="run", wandb=None, **options
    ) as watch:
        for x in batches(6, length=20):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        if options.get("live", True):
            yield watch
    yield watch


def test_a_watch_writes_its_report_while_it_goes_on_and_at_close(tmp_path):
    running = trained(tmp_path, report=True)
    watch = next(running)
    path = watch.report()
    assert path == watch.dir / "report.html" and MARK in path.read_bytes()[:1000]
    early = path.read_text()
    assert "not closed" not in early and "6 steps" in early
    path.unlink()
    next(running)
    assert path.exists() and watch.health["failed"] == {}


def test_without_a_folder_it_needs_a_file(tmp_path):
    model = nn.LSTM(4, 8)
    with gradwatch.watch(model, dir=None, wandb=None) as watch:
        model(torch.randn(5, 2, 4))[0].sum().backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
        with pytest.raises(ValueError, match=r'watch\.report\("report.html"\)'):
            watch.report()
        assert "1 steps" in watch.report(tmp_path / "a.html").read_text()
    with pytest.raises(ValueError, match="dir=None makes none"):
        gradwatch.watch(nn.LSTM(4, 8), dir=None, report=True)


def test_another_file_is_never_replaced_and_a_report_is(tmp_path):
    mine = tmp_path / "mine.html"
    mine.write_text("precious")
    with pytest.raises(FileExistsError, match="no report of gradwatch"):
        save([run()], mine)
    assert mine.read_text() == "precious"
    with pytest.raises(FileExistsError, match="is a folder"):
        save([run()], tmp_path)
    made = save([run()], tmp_path / "a.html")
    assert save([run()], made) == made


def test_the_command_writes_a_page_and_prints_its_path(tmp_path, capsys, monkeypatch):
    list(trained(tmp_path))
    folder = tmp_path / "run"
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    monkeypatch.setenv("GRADWATCH_DIR", str(tmp_path))
    shown = []
    monkeypatch.setattr("webbrowser.open", shown.append)
    out = tmp_path / "two.html"
    assert main(["report", "latest", str(folder), "-o", str(out), "--open"]) == 0
    assert shown == [out.as_uri()] and "run (2)" in out.read_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere"], "there is no run"),
        (["latest"], "holds no run"),
        (["a", "b", "c"], "there is no run"),
    ],
)
def test_the_command_says_in_a_sentence_what_is_wrong(
    tmp_path, capsys, monkeypatch, arguments, told
):
    monkeypatch.setenv("GRADWATCH_DIR", str(tmp_path))
    assert main(["report", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and told in said.err and said.err.count("\n") == 1


def test_latest_is_the_run_that_was_written_last(tmp_path, monkeypatch):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "records.jsonl").write_text("")
    import os

    os.utime(tmp_path / "old" / "records.jsonl", (1, 1))
    monkeypatch.setenv("GRADWATCH_DIR", str(tmp_path))
    assert runs.latest().name == "new"


def test_the_run_folder_of_an_unclosed_run_can_be_read(tmp_path):
    running = trained(tmp_path)
    watch = next(running)
    watch.flush()
    text = Page(report([gradwatch.load(watch.dir)], say=lambda line: None)).text
    assert "The run was not closed" in text
    next(running)


# ---- pictures


def test_a_picture_is_drawn_in_a_process_of_its_own():
    found = columns([record(0, [stream("rnn.l0")])])
    chart = gradwatch.plot.charts.rho(found, "rnn.l0")
    picture = Picture(chart, "<title>")
    assert picture.png(60).startswith(b"\x89PNG") and picture.ready


def test_a_picture_that_cannot_be_drawn_is_an_error_with_a_reason():
    picture = Picture({"mark": {"type": "nothing"}, "encoding": 3}, "")
    with pytest.raises(DrawingError, match="exit code 1"):
        picture.png(60)
    with pytest.raises(DrawingError, match="within 0 seconds"):
        Picture({"mark": "point"}, "").png(0)


def test_without_the_renderer_the_way_to_get_it_is_said(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "vl_convert", None)
    with pytest.raises(ModuleNotFoundError, match=r"gradwatch\[plot\]"):
        report([run()])
    with pytest.raises(ModuleNotFoundError, match=r"gradwatch\[plot\]"):
        gradwatch.watch(nn.LSTM(4, 8), report=True)


def test_facts_may_be_missing():
    made = [dataclasses.replace(record(0, [stream("rnn.l0")]), facts=NO_FACTS)]
    whole = dataclasses.replace(run(sick=False), records=Records(made, limit=None))
    assert "7 of ?" in says(dataclasses.replace(whole, meta={}))


def test_an_alert_of_an_unknown_kind_is_told():
    streams = [stream("rnn.l0")]
    given = alert("cause", streams, kind="of_mine")
    whole = run("cause", streams)
    mine = dataclasses.replace(whole.incidents[0], kind="of_mine", alerts=(given,))
    assert "1 of_mine in rnn.l0" in says(dataclasses.replace(whole, incidents=[mine]))


# ---- what an attack has found


def changed(**parts):
    """A run with other metrics or profiles at each step."""
    streams = [stream("rnn.l0")]
    made = [record(n, streams) for n in range(60)]
    made = [dataclasses.replace(r, **{k: f(r) for k, f in parts.items()}) for r in made]
    return dataclasses.replace(run(sick=False), records=Records(made, limit=None))


def test_what_no_float_can_hold_is_the_brightest_and_breaks_no_script():
    def profiles(r):
        return {k: [float("inf")] * 9 + list(v)[9:] for k, v in r.profiles.items()}

    page = Page(report([changed(profiles=profiles)]))
    shown = json.loads(page.data[0])["rows"][-1]["values"]
    assert shown[0] == 1 and min(shown) > 0


def test_a_peak_of_a_folded_row_is_seen():
    def metrics(r):
        peak = {"gradwatch/grad_norm_max": 4e4} if r.step == 50 else {}
        return {**r.metrics, **peak}

    assert "largest 4e+04 at step 50" in says(changed(metrics=metrics))


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (range(60), "not finite from step 0 on"),
        (range(20, 60), "not finite from step 20 on"),
        ([20], "not finite at step 20"),
        ([20, 30], "not finite at 2 steps, first at 20"),
    ],
)
def test_where_a_loss_is_not_finite_is_told_exactly(bad, told):
    def metrics(r):
        return {**r.metrics, **({"gradwatch/loss": math.nan} if r.step in bad else {})}

    assert told in says(changed(metrics=metrics))


def test_no_chart_is_taller_than_a_screen():
    text = report(
        [changed(metrics=lambda r: {**r.metrics, "gradwatch/rnn/l0/horizon": 1.0})]
    )
    heights = [int(h) for h in re.findall(r'<svg[^>]* height="(\d+)"', text)]
    assert max(heights) < 900 and len(heights) > 5


@pytest.mark.parametrize("name", ["enc\u200foder", "a/b", "tab\there"])
def test_odd_names_keep_their_numbers(name):
    own = dataclasses.replace(stream("rnn.l0"), name=f"{name}.l0", module=name)
    text = says(run("cause", [stream("rnn.l0"), own]))
    assert "No gradient was measured" not in text and "7 of ?" not in text
    assert f"{printable(name)}.l0: gradients reach 7 of 20" in text


def test_a_learning_rate_is_that_of_the_last_look():
    text = says(
        changed(metrics=lambda r: r.metrics if r.step < 40 else {"gradwatch/loss": 1.0})
    )
    assert "at step 39, the last look" in text


def test_an_old_page_outlives_a_write_that_fails(tmp_path, monkeypatch):
    made = save([run()], tmp_path / "a.html")
    before = made.read_bytes()

    def fail(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="No space"):
        save([run("other")], made)
    assert made.read_bytes() == before and [*tmp_path.iterdir()] == [made]


def test_what_is_no_regular_file_is_refused(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileExistsError, match="is no file"):
        save([run()], tmp_path / "pipe")


def test_the_start_of_a_record_and_an_empty_one_are_told():
    late = dataclasses.replace(run(sick=False), records=Records([record(276, [])]))
    assert "The record begins at step 276." in says(late)
    text = says(dataclasses.replace(run(sick=False), records=Records()))
    assert "No step was recorded." in text and "nothing was lost" not in text


def test_empty_profiles_are_left_out():
    whole = changed(profiles=lambda r: {"gradwatch/rnn/l0/adjoint": [], "x": []})
    assert "The gradient on its way back" not in says(whole)


def test_notices_do_not_say_how_often_alarms_are_right():
    whole = run("cause")
    notice = dataclasses.replace(whole.incidents[0], severity="info")
    text = says(dataclasses.replace(whole, incidents=[notice]))
    assert "labelled runs" not in text and "labelled runs" in says(whole)
