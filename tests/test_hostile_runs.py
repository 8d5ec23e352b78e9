"""Run folders with odd lines: the odd lines are noted, and all else is there."""

import json
import math
import os
import tracemalloc

import pytest

import gradwatch
from gradwatch.facts import NO_FACTS
from gradwatch.record import Alert, StepRecord, dump_line
from gradwatch.rules import replay

STREAM = {
    "name": "rnn.l0",
    "module": "rnn",
    "kind": "LSTM",
    "layer": 0,
    "direction": "forward",
    "input_size": 4,
    "hidden_size": 8,
    "gates": ["i", "f", "g", "o"],
}
META = {"format": 2, "started": 1.7e9, "streams": [STREAM], "health": {"state": "off"}}
ALERT = {
    "kind": "spike",
    "severity": "warning",
    "step": 3,
    "since": 2,
    "message": "a\nb\nc\nd",
    "streams": ["rnn.l0"],
    "evidence": {"gradwatch/grad_norm": [5.0, 1.0]},
    "remedy": {"name": "clip", "args": {"norm": 1.0}},
}
STEPS = 10


def row(step, **more):
    return {"step": step, "time": 1.0, "metrics": {"gradwatch/grad_norm": 2.0}, **more}


def line(value):
    return json.dumps(value).encode()


def good(folder):
    """A run of ten steps, three alerts and two incidents."""
    (folder / "incidents").mkdir()
    (folder / "meta.json").write_bytes(line(META) + b"\n")
    rows = [line(row(step)) for step in range(STEPS)]
    (folder / "records.jsonl").write_bytes(b"\n".join(rows) + b"\n")
    alerts = [line({**ALERT, "step": step}) for step in (3, 4, 5)]
    (folder / "alerts.jsonl").write_bytes(b"\n".join(alerts) + b"\n")
    for since in (2, 7):
        incident = {**ALERT, "since": since, "alerts": [ALERT]}
        path = folder / "incidents" / f"{since}-spike.json"
        path.write_bytes(line(incident) + b"\n")
    return folder


def replaced(path, number, content):
    lines = path.read_bytes().split(b"\n")
    lines[number - 1] = content
    path.write_bytes(b"\n".join(lines))


def checked(run):
    """Check that every value has its type; return the run."""
    json.dumps([run.meta, run.skipped])
    for record in run.records:
        assert type(record.step) is int and 0 <= record.step < 2**63
        assert type(record.time) is float and 0 <= record.time < math.inf
        assert of(record.metrics, str, float) and of(record.events, str)
        for values in record.profiles.values():
            assert of(values, float)
        dump_line(record)
    for alert in (*run.alerts, *(a for i in run.incidents for a in i.alerts)):
        assert type(alert.step) is int and alert.severity in (
            "info",
            "warning",
            "error",
        )
        assert type(alert.kind) is str and of(alert.streams, str)
    for found in (*run.alerts, *run.incidents):
        assert type(found.since) is int and type(found.cause) in (str, type(None))
        assert found.remedy is None or type(found.remedy.name) is str
        for value, threshold in found.evidence.values():
            assert type(value) is float and type(threshold) in (float, type(None))
    for stream in run.streams:
        assert type(stream.hidden_size) is int and of(stream.gates, str)
    steps = [record.step for record in run.records]
    assert steps == sorted(set(steps))
    assert isinstance(replay(run.records, run.streams), list)
    return run


def of(values, *kinds):
    items = values.items() if isinstance(values, dict) else [(v,) for v in values]
    return all(
        type(v) is kind for item in items for v, kind in zip(item, kinds, strict=True)
    )


DEEP = b"[" * 10**5
ODD_RECORDS = {
    "bad JSON": b"{]",
    "no JSON": b"hello",
    "nothing but a brace": b"{",
    "two objects in a line": line(row(5)) * 2,
    "a list": b"[1]",
    "a number": b"5",
    "null": b"null",
    "a string": b'"step"',
    "an empty object": b"{}",
    "deep lists": DEEP,
    "deep lists in a field": b'{"step":5,"metrics":{"a":' + DEEP,
    "deep objects that close": b'{"step":5,"x":'
    + b'{"a":' * 5000
    + b"1"
    + b"}" * 5001,
    "NUL": b"\0",
    "NUL inside": b'{"step":5,"ti\0me":1}',
    "NUL in place of the line": bytes(300),
    "no UTF-8": b'{"step":5,"events":["\xff\xfe"]}',
    "UTF-16": '{"step":5}'.encode("utf-16"),
    "a BOM alone": b"\xef\xbb\xbf",
    "no step": line({"time": 1.0}),
    "a step that is a string": line(row("5")),
    "a step that is a float": line(row(5.0)),
    "a step that is true": line(row(True)),
    "a step that is null": line(row(None)),
    "a step that is NaN": b'{"step":NaN}',
    "a step that is a list": line(row([5])),
    "a step below 0": line(row(-1)),
    "a step of 10**400": line(row(10**400)),
    "a step of 10**5000": b'{"step":1' + b"0" * 5000 + b"}",
    "a step of 2**63": line(row(2**63)),
    "a step of 2**62": line(row(2**62)),
    "a step that was there": line(row(4)),
    "a step that goes back": line(row(0)),
    "a time that is a string": line(row(5, time="noon")),
    "a time that is NaN": line(row(5, time="nan")),
    "a time below 0": line(row(5, time=-1.0)),
    "a time of 10**400": line(row(5, time=10**400)),
    "a time that is null": line(row(5, time=None)),
    "metrics that are a list": line(row(5, metrics=["a"])),
    "metrics that are null": line(row(5, metrics=None)),
    "a metric that is a word": line(row(5, metrics={"a": "many"})),
    "a metric that is null": line(row(5, metrics={"a": None})),
    "a metric that is true": line(row(5, metrics={"a": True})),
    "a metric that is a list": line(row(5, metrics={"a": [1.0]})),
    "a metric of 10**400": line(row(5, metrics={"a": 10**400})),
    "profiles that are a number": line(row(5, profiles=1)),
    "a profile that is a number": line(row(5, profiles={"a": 1.0})),
    "a profile that is a string": line(row(5, profiles={"a": "12"})),
    "a profile of words": line(row(5, profiles={"a": ["b"]})),
    "facts that are a list": line(row(5, facts=[1])),
    "facts of a step that are a string": line(row(5, facts={"step": "skipped_by"})),
    "facts of modules that are a list": line(row(5, facts={"modules": ["rnn"]})),
    "facts of a module that are a number": line(row(5, facts={"modules": {"rnn": 1}})),
    "a fact of another type": line(row(5, facts={"modules": {"rnn": {"T": "x"}}})),
    "a fact of 10**400": line(row(5, facts={"modules": {"rnn": {"T": 10**400}}})),
    "parameters that are a string": line(row(5, facts={"step": {"nonfinite": "abc"}})),
    "carriers of words": line(row(5, facts={"step": {"carriers": {"a": "b"}}})),
    "events that are a string": line(row(5, events="resume")),
    "events that are numbers": line(row(5, events=[1])),
    "events that are an object": line(row(5, events={"resume": 1})),
}  # fmt: skip
ODD_ALERTS = {
    "bad JSON": b'{"kind":',
    "an empty object": b"{}",
    "deep lists": DEEP,
    "no message": line({k: v for k, v in ALERT.items() if k != "message"}),
    "a kind that is a number": line({**ALERT, "kind": 1}),
    "a severity that there is not": line({**ALERT, "severity": "fatal"}),
    "a severity that is a list": line({**ALERT, "severity": ["info"]}),
    "a step below 0": line({**ALERT, "step": -3}),
    "since that is a string": line({**ALERT, "since": "2"}),
    "a stream that is a number": line({**ALERT, "stream": 1}),
    "streams that are a string": line({**ALERT, "streams": "rnn.l0"}),
    "streams that are numbers": line({**ALERT, "streams": [1]}),
    "a cause that is a number": line({**ALERT, "cause": 4}),
    "evidence that is a list": line({**ALERT, "evidence": [1]}),
    "evidence of a number": line({**ALERT, "evidence": {"a": 1.0}}),
    "evidence of one value": line({**ALERT, "evidence": {"a": [1.0]}}),
    "evidence of words": line({**ALERT, "evidence": {"a": ["b", "c"]}}),
    "evidence without a value": line({**ALERT, "evidence": {"a": [None, 1.0]}}),
    "a remedy that is a string": line({**ALERT, "remedy": "clip"}),
    "a remedy that is 0": line({**ALERT, "remedy": 0}),
    "a remedy without a name": line({**ALERT, "remedy": {}}),
    "a remedy with a list": line({**ALERT, "remedy": {"name": "clip", "args": [1]}}),
}  # fmt: skip
INCIDENT = {**ALERT, "since": 7, "alerts": [ALERT]}
ODD_INCIDENTS = {
    "empty brackets": b"[]",
    "an empty object": b"{}",
    "deep lists": DEEP,
    "since that is null": line({**INCIDENT, "since": None}),
    "until that is a string": line({**INCIDENT, "until": "9"}),
    "until below 0": line({**INCIDENT, "until": -9}),
    "alerts that are an object": line({**INCIDENT, "alerts": ALERT}),
    "an alert that is a number": line({**INCIDENT, "alerts": [1]}),
    "an alert without a step": line({**INCIDENT, "alerts": [{"kind": "spike"}]}),
}
ODD_META = {
    "bad JSON": (b"{", ()),
    "a list": (b"[]", ()),
    "deep lists": (DEEP, ()),
    "NUL": (b"\0\0", ()),
    "a format that is a string": (line({**META, "format": "two"}), ("rnn.l0",)),
    "a format that is a list": (line({**META, "format": [2]}), ("rnn.l0",)),
    "streams that are a string": (line({**META, "streams": "rnn"}), ()),
    "streams that are null": (line({**META, "streams": None}), ()),
    "a stream that is a number": (line({**META, "streams": [1, STREAM]}), ("rnn.l0",)),
    "a stream of no size": (
        line({**META, "streams": [{**STREAM, "hidden_size": -8}]}),
        (),
    ),
    "a stream that leads nowhere": (
        line({**META, "streams": [{**STREAM, "direction": "up"}, STREAM]}),
        ("rnn.l0",),
    ),
    "a stream that is there twice": (
        line({**META, "streams": [STREAM, STREAM]}),
        ("rnn.l0",),
    ),
    "health that is a number": (line({**META, "health": 1}), ("rnn.l0",)),
}


@pytest.mark.parametrize("name", ODD_RECORDS)
def test_an_odd_record_is_noted_and_the_rest_is_there(name, tmp_path):
    replaced(good(tmp_path) / "records.jsonl", 6, ODD_RECORDS[name])
    run = checked(gradwatch.load(tmp_path))
    assert run.skipped == ["records.jsonl: line 6"]
    assert [r.step for r in run.records] == [s for s in range(STEPS) if s != 5]
    assert len(run.alerts) == 3 and len(run.incidents) == 2 and run.closed


@pytest.mark.parametrize("name", ODD_ALERTS)
def test_an_odd_alert_is_noted_and_the_rest_is_there(name, tmp_path):
    replaced(good(tmp_path) / "alerts.jsonl", 2, ODD_ALERTS[name])
    run = checked(gradwatch.load(tmp_path))
    assert run.skipped == ["alerts.jsonl: line 2"]
    assert [alert.step for alert in run.alerts] == [3, 5]
    assert len(run.records) == STEPS


@pytest.mark.parametrize("name", ODD_INCIDENTS)
def test_an_odd_incident_is_noted_and_the_rest_is_there(name, tmp_path):
    path = good(tmp_path) / "incidents" / "7-spike.json"
    path.write_bytes(ODD_INCIDENTS[name])
    run = checked(gradwatch.load(tmp_path))
    assert run.skipped == ["7-spike.json: line 1"]
    assert [incident.since for incident in run.incidents] == [2]


@pytest.mark.parametrize("name", ODD_META)
def test_an_odd_meta_is_noted_and_the_rest_is_there(name, tmp_path):
    content, streams = ODD_META[name]
    facts = {"modules": {"rnn": {"T": 9}}}
    replaced(good(tmp_path) / "records.jsonl", 1, line(row(0, facts=facts)))
    (tmp_path / "meta.json").write_bytes(content)
    run = checked(gradwatch.load(tmp_path))
    assert run.skipped == ["meta.json: line 1"]
    assert tuple(stream.name for stream in run.streams) == streams
    assert len(run.records) == STEPS and run.records[0].facts.modules["rnn"].T == 9


def directory(path):
    path.unlink()
    path.mkdir()


def lost(path):
    path.unlink()
    path.symlink_to(path.parent / "gone")


def pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("change", [directory, lost, pipe])
@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("records.jsonl", (0, 3, 2)),
        ("alerts.jsonl", (STEPS, 0, 2)),
        ("meta.json", (STEPS, 3, 2)),
        ("incidents/7-spike.json", (STEPS, 3, 1)),
    ],
)
def test_what_should_be_a_file_and_is_none_is_noted(name, left, change, tmp_path):
    change(good(tmp_path) / name)
    run = checked(gradwatch.load(tmp_path))
    assert run.skipped == [f"{name.rpartition('/')[2]}: line 1"]
    assert (len(run.records), len(run.alerts), len(run.incidents)) == left


def test_incidents_that_are_a_file_are_noted(tmp_path):
    for path in (good(tmp_path) / "incidents").iterdir():
        path.unlink()
    (tmp_path / "incidents").rmdir()
    (tmp_path / "incidents").write_bytes(b"{}")
    run = checked(gradwatch.load(tmp_path))
    assert run.skipped == ["incidents: line 1"] and len(run.records) == STEPS


KEPT = {
    "a BOM": b"\xef\xbb\xbf" + line(row(5)),
    "CRLF": line(row(5)) + b"\r",
    "spaces": b"  " + line(row(5)) + b"\t ",
    "fields of a newer version": line(row(5, colour="red", parts=[{"a": 1}])),
    "facts of a newer version": line(
        row(5, facts={"step": {"mood": 1}, "run": {}, "weather": 3})
    ),
    "an event of a newer version": line(row(5, events=["moved:rnn"])),
    "NaN in three spellings": b'{"step":5,"metrics":{"a":NaN,"b":"nan","c":-Infinity}}',
    "a metric that is an integer": line(row(5, metrics={"a": 3})),
    "nothing but a step": b'{"step":5}',
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_unusual_and_not_odd_is_kept(name, tmp_path):
    replaced(good(tmp_path) / "records.jsonl", 6, KEPT[name])
    run = checked(gradwatch.load(tmp_path))
    assert run.skipped == [] and [r.step for r in run.records] == [*range(STEPS)]
    assert run.records[5].facts == NO_FACTS


def test_a_kind_of_the_users_own_and_a_newer_versions_fields_are_kept(tmp_path):
    own = {**ALERT, "kind": "my_own", "shade": 1, "stream": None, "cause": "mine"}
    own["remedy"] = {"name": "mine", "args": {}, "cost": 3}
    replaced(good(tmp_path) / "alerts.jsonl", 2, line(own))
    streams = [{**STREAM, "kind": "MAMBA", "heads": 4}]
    newer = {**META, "format": 3, "streams": streams, "cluster": {}}
    (tmp_path / "meta.json").write_bytes(line(newer))
    run = checked(gradwatch.load(tmp_path))
    assert run.skipped == [] and run.alerts[1].kind == "my_own"
    assert run.meta["cluster"] == {} and run.streams[0].kind == "MAMBA"
    assert run.alerts[1].remedy.name == "mine"


def test_a_truncated_last_line_and_blank_lines(tmp_path):
    path = good(tmp_path) / "records.jsonl"
    path.write_bytes(b"\n\r\n" + path.read_bytes() + b'\n{"step":10,"metr')
    run = checked(gradwatch.load(tmp_path))
    assert run.skipped == ["records.jsonl: line 14"] and len(run.records) == STEPS


@pytest.mark.parametrize(
    ("steps", "kept"),
    [
        ([0, 1, 2, 1, 2, 3, 4], [0, 1, 2, 3, 4]),  # gone back to a checkpoint
        ([9, 0, 1, 2], [0, 1, 2]),
        ([0, 1, 2**62, 2, 3], [0, 1, 2, 3]),
        ([5, 6, 7, 0, 1, 2], [5, 6, 7]),
        ([3, 3, 3], [3]),
        ([4, 2], [4]),
        ([], []),
    ],
)
def test_as_many_steps_as_can_ascend_are_kept(steps, kept, tmp_path):
    path = good(tmp_path) / "records.jsonl"
    path.write_bytes(b"".join(line(row(s)) + b"\n" for s in steps))
    run = checked(gradwatch.load(tmp_path))
    assert [r.step for r in run.records] == kept
    assert len(run.skipped) == len(steps) - len(kept)
    numbers = [int(where.rpartition(" ")[2]) for where in run.skipped]
    assert numbers == sorted(numbers)


def test_odd_lines_of_all_kinds_at_once(tmp_path):
    path = good(tmp_path) / "records.jsonl"
    odd = [*ODD_RECORDS.values()]
    path.write_bytes(b"\n".join([line(row(4)), *odd, line(row(2**63 - 1))]))
    alerts = b"\n".join([*ODD_ALERTS.values(), line(ALERT)])
    (tmp_path / "alerts.jsonl").write_bytes(alerts)
    run = checked(gradwatch.load(tmp_path))
    assert run.records[0].step == 4 and run.records[-1].step == 2**63 - 1
    assert len(run.alerts) == 1
    assert len(run.skipped) >= len(odd) - 1 + len(ODD_ALERTS)


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no run folder"):
        gradwatch.load(tmp_path / "gone")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="is no run folder"):
        gradwatch.load(tmp_path / "file")


@pytest.mark.parametrize("ends", [True, False])
def test_a_line_of_256_MB_takes_a_bounded_part_of_memory(ends, tmp_path):
    path = good(tmp_path) / "records.jsonl"
    with path.open("r+b") as file:  # a hole, which takes no room on the disk
        file.seek(0, os.SEEK_END)
        file.truncate(file.tell() + 2**28)
        if ends:
            file.seek(0, os.SEEK_END)
            file.write(b"\n" + line(row(20)) + b"\n")
    tracemalloc.start()
    try:
        run = gradwatch.load(tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 * 2**20
    assert run.skipped == ["records.jsonl: line 11"]
    assert [r.step for r in run.records] == [*range(STEPS), *[20] * ends]


def test_a_replay_of_steps_that_go_back_says_what_to_do():
    for steps in ([0, 1, 2, 1], [3, 3]):
        records = [StepRecord(step=step) for step in steps]
        with pytest.raises(ValueError, match="comes after step") as caught:
            replay(records, [])
        assert f"step {steps[-1]} comes after step {steps[-2]}" in str(caught.value)
        assert "Sort the records" in str(caught.value)
    assert replay([StepRecord(step=s) for s in (0, 7, 2**63 - 1)], []) == []


def test_an_alert_of_a_users_rule_survives_its_line():
    alert = Alert(
        kind="mine",
        severity="info",
        step=1,
        since=1,
        message="",
        evidence={"a": (math.inf, None)},
    )
    assert gradwatch.record.parse(Alert, json.loads(dump_line(alert))) == alert
