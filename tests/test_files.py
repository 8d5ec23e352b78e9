"""The run folder: what is written can be read, and it never outgrows the disk."""

import itertools
import json
import math
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gradwatch
from gradwatch.facts import Facts, ModuleFacts, RunFacts, StepFacts, StreamFacts
from gradwatch.folder import make_folder
from gradwatch.metrics import headline_keys
from gradwatch.record import (
    Alert,
    Incident,
    Remedy,
    StepRecord,
    Stream,
    dump_line,
    parse,
)
from gradwatch.records import Records
from gradwatch.sinks.fold import Fold
from gradwatch.sinks.jsonl import Jsonl

floats = st.floats(allow_nan=True, allow_infinity=True)
text = st.text(max_size=20)
records = st.builds(
    StepRecord,
    step=st.integers(0, 10**12),
    time=st.floats(0, 1e10),
    metrics=st.dictionaries(text, floats, max_size=4),
    profiles=st.dictionaries(text, st.lists(floats, max_size=4), max_size=2),
    facts=st.builds(
        Facts,
        step=st.builds(StepFacts, skipped_by=st.none() | text),
        run=st.builds(RunFacts, cleared=st.none() | st.booleans()),
        modules=st.dictionaries(text, st.builds(ModuleFacts, T=st.integers(0, 10**12))),
        streams=st.dictionaries(text, st.builds(StreamFacts, drive=text)),
    ),
    events=st.lists(text, max_size=3).map(tuple),
)


def same(one, two):
    return json.dumps(json.loads(dump_line(one))) == json.dumps(
        json.loads(dump_line(two))
    )


@settings(deadline=None, derandomize=True)
@given(records)
def test_any_record_survives_its_line(record):
    line = dump_line(record)
    assert line.isascii() and "\n" not in line
    back = parse(StepRecord, json.loads(line))
    assert same(back, record)
    assert (back.step, back.events) == (record.step, record.events)
    for key, value in record.metrics.items():
        assert back.metrics[key] == value or math.isnan(value)
        assert math.copysign(1, back.metrics[key]) == math.copysign(1, value) or (
            math.isnan(value)
        )


def test_an_incident_survives_its_file():
    alert = Alert(
        kind="spike",
        severity="warning",
        step=3,
        since=2,
        message="a\nb\nc\nd",
        streams=("x",),
        evidence={"k": (math.inf, None), "j": (1.0, 2.0)},
        remedy=Remedy(name="clip", args={"norm": 1.0}),
    )
    incident = Incident(
        kind="spike", severity="warning", since=2, until=5, alerts=(alert,)
    )
    assert parse(Incident, json.loads(dump_line(incident))) == incident


def test_series_and_keys():
    kept = Records(
        [
            StepRecord(step=0, metrics={"a/b": 1.0}),
            StepRecord(step=1),
            StepRecord(step=2, metrics={"a/b": 3.0, "c/b": 0.0}),
        ]
    )
    steps, values = kept.series("a/b")
    assert steps.tolist() == [0, 2] and values.tolist() == [1.0, 3.0]
    assert kept.keys() == ["a/b", "c/b"]
    assert [r.step for r in kept[1:]] == [1, 2]
    with pytest.raises(KeyError, match=r"near it: a/b, c/b"):
        kept.series("z/b")


def streams(count):
    return [
        Stream(
            name=f"encoder.rnn.l{i}",
            module="encoder.rnn",
            kind="LSTM",
            layer=i,
            direction="forward",
            input_size=64,
            hidden_size=128,
            gates=("i", "f", "g", "o"),
        )
        for i in range(count)
    ]


def synthetic(step, keys):
    return StepRecord(
        step=step,
        time=1.7e9 + step * 0.01,
        metrics={k: 0.1234567890123 * (1 + (step * 7 + i) % 1000) for i, k in keys},
    )


def test_the_file_is_folded_and_bounded(tmp_path):
    section = 20_000
    keys = list(enumerate(["gradwatch/grad_norm", "gradwatch/rnn/l0/rho"]))
    sink = Jsonl(tmp_path, {}, say=print, section=section)
    for step in range(20_000):
        sink.write(synthetic(step, keys))
        if step % 16 == 0:
            sink.flush()
    sink.close()
    size = (tmp_path / "records.jsonl").stat().st_size
    assert size < 4.5 * section  # one row a step, by 10, by 100, by 1,000
    rows = list(gradwatch.load(tmp_path).records)
    assert rows[0].step == 0 and rows[-1].step == 19_999
    gaps = [b.step - a.step for a, b in itertools.pairwise(rows)]
    assert set(gaps[:-1]) == {1, 10, 100, 1000} and gaps[:-1] == sorted(gaps[:-1])
    folded = rows[-2].metrics
    norms = [synthetic(s, keys).metrics["gradwatch/grad_norm"] for s in range(20_000)]
    window = norms[rows[-3].step + 1 : rows[-2].step + 1]
    assert folded["gradwatch/grad_norm"] == window[-1]
    assert folded["gradwatch/grad_norm_max"] == max(window)
    assert folded["gradwatch/grad_norm_min"] == min(window)
    assert "gradwatch/rnn/l0/rho_max" not in folded


def test_a_fold_keeps_what_is_not_a_number():
    fold = Fold()
    key, ratio = "gradwatch/grad_norm", "gradwatch/clip_ratio"
    for step, (norm, clip) in enumerate([(1.0, 1.0), (math.nan, 0.5), (2.0, 1.0)]):
        fold.add(StepRecord(step=step, metrics={key: norm, ratio: clip}))
    assert math.isnan(fold.envelope()[key])
    assert fold.envelope()[ratio] == 0.5
    assert fold.row().metrics[key] == 2.0


def test_no_folder_is_overwritten_and_no_name_leads_out(tmp_path):
    taken = {make_folder(tmp_path, "run")[0] for _ in range(3)}
    assert {p.name for p in taken} == {"run", "run-2", "run-3"}
    hostile = ["../../x", "CON", "a/b", "\0", "x" * 300, "", "..", "emoji \U0001f600"]
    for name in hostile:
        folder, why = make_folder(tmp_path, name)
        assert folder.parent == tmp_path and why is None
    assert (tmp_path / ".gitignore").read_text() == "*\n"


def test_what_a_kill_leaves_is_read(tmp_path):
    folder, _ = make_folder(tmp_path, "run")
    sink = Jsonl(folder, {"streams": []}, say=print)
    for step in range(5):
        sink.write(StepRecord(step=step))
    sink.flush()
    with (folder / "records.jsonl").open("ab") as file:
        file.write(b'{"step":5,"metr')
    run = gradwatch.load(folder)
    assert [r.step for r in run.records] == [0, 1, 2, 3, 4]
    assert run.skipped == ["records.jsonl: line 6"]
    assert not run.closed
    sink.close()


def test_a_folder_without_records_says_what_is_near(tmp_path):
    folder, _ = make_folder(tmp_path, "mine")
    Jsonl(folder, {}, say=print).close()
    with pytest.raises(FileNotFoundError, match="it holds the runs mine"):
        gradwatch.load(tmp_path)


def test_headline_keys_of_a_two_layer_bidirectional_lstm():
    keys = headline_keys(streams(4))
    assert len(keys) == len(set(keys)) == 33
    assert not [key for key in keys if "." in key]


def test_records_as_a_table_of_pandas():
    pytest.importorskip("pandas")
    rows = [
        StepRecord(step=2, time=5.0, metrics={"b": 1.0, "a": math.nan}),
        StepRecord(step=7, time=6.0, metrics={"b": math.inf}),
    ]
    table = Records(rows).to_pandas()
    assert list(table.columns) == ["time", "a", "b"] and table.index.name == "step"
    assert table.index.tolist() == [2, 7] and table["b"].tolist() == [1.0, math.inf]
    assert table["a"].isna().all() and {str(t) for t in table.dtypes} == {"float64"}
    assert Records().to_pandas().empty


def test_without_pandas_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match=r"gradwatch\[pandas\]"):
        Records().to_pandas()
