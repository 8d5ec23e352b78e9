"""The command line: what each verb says of a run, in which form, with which code."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from importlib import resources
from xml.etree import ElementTree

import jsonschema
import pytest
import torch

import gradwatch
from gradwatch import cli
from gradwatch.record import dump_line
from gradwatch.runs import Tail, load, outline
from gradwatch.shell.explain import names
from gradwatch.shell.live import _PLAIN, Following, screen, sparkline
from testbed.models import batches, lstm
from tests.support.ranks import ROOT
from tests.support.runs import record, run, stream

VERBS = [verb.name for verb in cli.VERBS]
SCHEMA = json.loads(
    resources.files("gradwatch").joinpath("shell/schema.json").read_text("utf-8")
)


def written(parent, **parts):
    """Write a hand-made run as a watch would; return its folder."""
    made = run(dir=parent / parts.get("name", "mine"), **parts)
    folder = made.dir
    (folder / "incidents").mkdir(parents=True)
    meta = {"format": 2, **made.meta, "streams": [*map(_plain, made.streams)]}
    if not made.closed:
        del meta["health"]
    (folder / "meta.json").write_text(dump_line(meta))
    _lines(folder / "records.jsonl", made.records)
    _lines(folder / "alerts.jsonl", made.alerts)
    for number, incident in enumerate(made.incidents):
        _lines(folder / "incidents" / f"{number}.json", [incident])
    return folder


def _plain(value):
    return dataclasses.asdict(value)


def _lines(path, values):
    path.write_text("".join(f"{dump_line(value)}\n" for value in values))


def asked(capsys, *arguments):
    code = cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def valid(verb, text):
    """Return the JSON object that a verb printed, checked against its schema."""
    value = json.loads(text)
    jsonschema.validate(value, {"$ref": f"#/$defs/{verb}", "$defs": SCHEMA["$defs"]})
    return value


# ---- every verb


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_an_example_and_a_schema(verb, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([verb, "--help"])
    told = capsys.readouterr().out
    assert f"gradwatch {verb}" in told.partition("example:")[2]
    assert max(map(len, told.splitlines())) < 100
    assert "--json" in told and verb in SCHEMA["$defs"]


@pytest.mark.parametrize("verb", ["live", "check", "report", "runs"])
def test_a_folder_that_is_no_run_is_one_sentence(verb, tmp_path, capsys):
    given = tmp_path / "nothing"
    code, out, err = asked(capsys, verb, given)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith("gradwatch: ") and str(given) in err


@pytest.mark.parametrize("verb", ["live", "check", "report"])
@pytest.mark.parametrize("break_", ["empty", "binary", "folders"])
def test_a_broken_run_folder_gives_a_sentence_and_no_traceback(
    verb, break_, tmp_path, capsys
):
    folder = written(tmp_path, steps=0, sick=False)
    for name in ("records.jsonl", "alerts.jsonl", "meta.json"):
        path = folder / name
        if break_ == "empty":
            path.write_bytes(b"")
        elif break_ == "binary":
            path.write_bytes(os.urandom(999) + b"\n{}\n[1]\n")
        else:
            path.unlink()
            path.mkdir()
    more = ["--once"] if verb == "live" else []
    if verb == "report":
        pytest.importorskip("vl_convert")
        more = ["-o", tmp_path / "page.html"]
    code, out, err = asked(capsys, verb, folder, *more)
    assert code == {"live": 0, "check": 3, "report": 0}[verb], (out, err)
    assert "Traceback" not in err and len(out.splitlines()) < 20


def test_a_run_is_found_by_its_name(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("GRADWATCH_DIR", str(tmp_path))
    written(tmp_path, name="lstm", sick=False)
    assert asked(capsys, "check", "lstm")[0] == 0
    assert asked(capsys, "check", "latest")[0] == 0
    assert asked(capsys, "check", "gru")[0] == 2


def test_inspect_of_a_run_says_what_to_type(tmp_path, capsys):
    code, _, err = asked(capsys, "inspect", written(tmp_path))
    assert code == 2 and "gradwatch report" in err and "gradwatch check" in err


# ---- check


def lost(folder):
    (folder / "incidents" / "0.json").unlink()


def cut_off(folder):
    with (folder / "records.jsonl").open("a") as file:
        file.write('{"step": 99, "tim')


CHECKS = {
    "healthy": (dict(sick=False), None, [], 0),
    "an alarm": ({}, None, [], 1),
    "an alarm below the bar": ({}, None, ["--fail-on", "error"], 0),
    "never": ({}, None, ["--fail-on", "never"], 0),
    "not closed": (dict(sick=False, closed=False), None, [], 3),
    "an alarm, not closed": (dict(closed=False), None, [], 1),
    "nothing measured": (dict(sick=False, steps=0), None, [], 3),
    "a line cut off": (dict(sick=False), cut_off, [], 3),
    "an alert whose incident is lost": ({}, lost, [], 1),
}


@pytest.mark.parametrize("case", CHECKS)
def test_the_exit_code_of_check(case, tmp_path, capsys):
    parts, change, options, expected = CHECKS[case]
    folder = written(tmp_path, **parts)
    if change is not None:
        change(folder)
    code, out, _ = asked(capsys, "check", folder, *options)
    assert code == expected, out
    assert ("inconclusive: " in out) == (expected == 3 or "not closed" in case)
    short = out.replace(str(folder), "runs/mine")
    assert max(map(len, short.splitlines())) < 100
    told = valid("check", asked(capsys, "check", folder, *options, "--json")[1])
    assert told["code"] == expected and bool(told["found"]) == (expected == 1)
    assert told == valid(
        "check", asked(capsys, "check", folder, *options, "--format", "json")[1]
    )


def test_check_says_why_and_what_to_do_as_the_alert_did(tmp_path, capsys):
    out = asked(capsys, "check", written(tmp_path))[1]
    assert "         why: mine\n         do: mine()\n" in out
    folder = written(tmp_path, name="own")
    for path in [folder / "alerts.jsonl", *(folder / "incidents").iterdir()]:
        path.write_text(
            path.read_text()
            .replace('"vanishing"', '"mine"')
            .replace("why: ", "so: ")
            .replace("gradwatch/rnn/l0/rho", "val/loss")
        )
    out = asked(capsys, "check", folder)[1]
    assert "explain" not in out and "val/loss 1.3 (threshold 1.1)" in out


def test_a_name_that_is_nearly_right(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("GRADWATCH_DIR", str(tmp_path))
    written(tmp_path, name="demo")
    err = asked(capsys, "check", "dmo")[2]
    assert "there is no run 'dmo'" in err and "near it: demo" in err


def test_two_runs_leave_the_page_of_the_first(tmp_path, capsys):
    pytest.importorskip("vl_convert")
    one, two = written(tmp_path, name="one"), written(tmp_path, name="two")
    assert asked(capsys, "report", one, two)[1] == f"{one}/report-with-two.html\n"
    assert not (one / "report.html").exists()


def test_live_names_what_cannot_be_read(tmp_path, capsys):
    folder = written(tmp_path)
    (folder / "alerts.jsonl").write_text("nonsense\n")
    out = asked(capsys, "live", folder, "--once")[1]
    assert "1 line cannot be read, first alerts.jsonl: line 1" in out
    code, _, err = asked(capsys, "live", folder, "--every", 0)
    assert code == 2 and "--every is 0.0" in err


def test_what_was_lost_is_no_good_sign(tmp_path, capsys):
    folder = written(tmp_path, sick=False)
    meta = json.loads((folder / "meta.json").read_text())
    for part in ("dropped", "failed"):
        health = {"failed": {}, "dropped": {}, part: {"alerts.jsonl": 3}}
        (folder / "meta.json").write_text(json.dumps({**meta, "health": health}))
        code, out, _ = asked(capsys, "check", folder)
        assert code == 3 and "alerts.jsonl" in out


def test_a_notice_counts_where_it_is_asked_for(tmp_path, capsys):
    folder = written(tmp_path)
    [path] = (folder / "incidents").iterdir()
    content = json.loads(path.read_text())
    content["severity"] = content["alerts"][0]["severity"] = "info"
    path.write_text(json.dumps(content) + "\n")
    assert asked(capsys, "check", folder)[0] == 0
    assert asked(capsys, "check", folder, "--fail-on", "info")[0] == 1


def test_annotations_for_github(tmp_path, capsys):
    folder = written(tmp_path, name="50%")
    code, out, _ = asked(capsys, "check", folder, "--format", "github")
    first, *rest = out.splitlines()
    assert code == 1 and len(rest) == 1
    assert re.match(r"::warning title=gradwatch%3A [^:,]+::vanishing|::warning", first)
    assert "%0A  evidence: " in first and "50%25" in first


HOSTILE = "a\x1b[31m\n::error::</failure>&\x00"


def test_a_suite_of_tests_in_xml(tmp_path, capsys):
    streams = [stream("rnn.l0")]
    folder = written(tmp_path, streams=streams)
    [path] = (folder / "incidents").iterdir()
    content = json.loads(path.read_text())
    content["streams"] = content["alerts"][0]["streams"] = [HOSTILE]
    content["alerts"][0]["message"] = HOSTILE
    path.write_text(json.dumps(content) + "\n")
    code, out, _ = asked(capsys, "check", folder, "--format", "junit")
    suite = ElementTree.fromstring(out)
    assert code == 1 and suite.get("failures") == "1" and suite.get("errors") == "0"
    failed = [case.get("name") for case in suite if case.find("failure") is not None]
    assert failed == ["vanishing"] and len(suite) == int(suite.get("tests"))
    assert "\x1b" not in out and "\x00" not in out
    out = asked(capsys, "check", folder, "--format", "github")[1]
    assert not any(line.startswith("::error::") for line in out.splitlines())
    code, out, _ = asked(
        capsys,
        "check",
        written(tmp_path, name="b", sick=False, closed=False),
        "--format",
        "junit",
    )
    suite = ElementTree.fromstring(out)
    assert code == 3 and suite.get("errors") == "1" and suite.get("failures") == "0"


# ---- live


def test_a_sparkline_rises_and_shows_what_is_not_finite():
    assert sparkline([0.0, 1.0, 2.0, 7.0]) == "▁▂▃█"
    assert sparkline([1.0, 1.0]) == "▁▁" and sparkline([]) == ""
    assert sparkline([1.0, float("nan"), 2.0], _PLAIN) == "_x#"
    many = sparkline([float(n) for n in range(999)])
    assert len(many) == 30 and many[0] == "▁" and many[-1] == "█"
    spike = [0.0] * 500
    spike[77] = 9.0
    assert "█" in sparkline(spike)
    spike[300] = float("inf")
    assert sparkline(spike).count("x") == 1


def test_a_tail_reads_whole_lines_and_goes_on(tmp_path):
    path, streams = tmp_path / "records.jsonl", [stream("rnn.l0")]
    rows = [record(step, streams) for step in range(5)]
    tail = Tail(path)
    assert tail.read() == []  # it is not there yet
    text = "".join(f"{dump_line(row)}\n" for row in rows)
    path.write_text(text[:-40])
    assert tail.read() == rows[:4]
    path.write_text(text + "nonsense\n")
    assert tail.read() == rows[4:] and tail.read() == []


def test_the_outline_of_a_run_is_all_but_its_records(tmp_path):
    folder = written(tmp_path)
    whole, part = load(folder), outline(folder)
    assert [r.step for r in part.records] == [0, 59]
    assert dataclasses.replace(part, records=whole.records) == whole
    folder = written(tmp_path, name="one", steps=1)
    assert [r.step for r in outline(folder).records] == [0]


def test_a_screen_has_the_run_in_99_columns(tmp_path):
    streams = [stream(f"{'x' * n}.l0") for n in range(1, 90)]
    now = Following(written(tmp_path, streams=streams, closed=False))
    now.look()
    lines = screen(now)
    text = "\n".join(lines)
    assert max(map(len, lines)) < 100 and len(lines) < 24
    assert "step 59" in text and "7/20" in text and "more streams" in text
    assert "vanishing since step 20" in text and "█" in text


@pytest.mark.parametrize("name", ["mine", HOSTILE.replace("/", "").replace("\x00", "")])
def test_live_once(name, tmp_path, capsys):
    folder = written(tmp_path, name=name)
    code, out, _ = asked(capsys, "live", folder, "--once")
    assert code == 0 and "step 59" in out and "\x1b" not in out
    assert max(map(len, out.splitlines())) < 100 or name != "mine"
    told = valid("live", asked(capsys, "live", folder, "--json")[1])
    assert told["closed"] and told["step"] == 59
    assert told["latest"]["gradwatch/rnn/l0/horizon"] == 7


def followed(folder, *options):
    return subprocess.Popen(
        [sys.executable, "-m", "gradwatch", "live", str(folder), *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_live_in_a_pipe_follows_a_run_and_ends_with_it(tmp_path):
    model = lstm()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watch = gradwatch.watch(model, dir=tmp_path, name="run", wandb=None, every=1)
    process = followed(watch.dir, "--every", "0.1")
    for number, x in enumerate(batches(400)):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        if number == 390:
            loss = loss * float("nan")
        loss.backward()
        if number != 390:
            optimizer.step()
        if number % 20 == 0:
            watch.flush()
            time.sleep(0.15)
    watch.flush()
    time.sleep(1.5)
    watch.close()
    out, err = process.communicate(timeout=60)
    lines = out.splitlines()
    assert process.returncode == 0 and err == ""
    steps = [int(line.split()[1]) for line in lines if line.startswith("step ")]
    assert steps == sorted(steps) and len(steps) >= 3
    assert "nonfinite at step 390" in out and "ended" in out
    assert "gradwatch report" in lines[-1]


def test_live_leaves_a_run_that_was_killed(tmp_path):
    folder = written(tmp_path, closed=False)
    out, err = followed(folder, "--idle", "0.2").communicate(timeout=60)
    assert "step 59" in out and err == ""


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not here")
def test_live_in_tmux(tmp_path):
    folder = written(tmp_path, closed=False)
    socket = tmp_path / "tmux"
    command = f"{sys.executable} -m gradwatch live {folder}; sleep 60"

    def tmux(*arguments):
        done = subprocess.run(
            ["tmux", "-S", str(socket), "-f", "/dev/null", *arguments],
            cwd=ROOT,
            env={**os.environ, "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    tmux("new-session", "-d", "-x", "100", "-y", "24", command)
    try:

        def until(word):
            end = time.monotonic() + 60
            while word not in (seen := tmux("capture-pane", "-p")):
                assert time.monotonic() < end, seen
                time.sleep(0.2)
            return seen

        seen = until("step 59")
        assert "vanishing since step 20" in seen and "█" in seen
        with (folder / "records.jsonl").open("a") as file:
            file.write(f"{dump_line(record(1234, [stream('rnn.l0')]))}\n")
        seen = until("step 1,234")
        assert seen.count("loss") == 1  # drawn over, not below
        meta = json.loads((folder / "meta.json").read_text())
        meta["health"] = {"failed": {}, "dropped": {}}
        (folder / "meta.json").write_text(json.dumps(meta))
        until("to see all of it: gradwatch report")
    finally:
        tmux("kill-server")


# ---- runs


def test_runs_are_listed_with_their_verdicts(tmp_path, capsys):
    for age, parts in enumerate(
        [{}, dict(sick=False), dict(sick=False, steps=0), dict(closed=False)]
    ):
        folder = written(tmp_path, name=f"r{age}", **parts)
        then = time.time() - 7200 * age - 60
        os.utime(folder / "records.jsonl", (then, then))
    code, out, _ = asked(capsys, "runs", tmp_path)
    head, *rows = out.splitlines()
    assert code == 0 and head.split()[0] == "run"
    assert [row.split()[0] for row in rows] == ["r0", "r1", "r2", "r3"]
    assert "1 alarm (vanishing), 1 still open" in rows[0] and "no alarm" in rows[1]
    assert "nothing was measured" in rows[2] and "not closed" in rows[3]
    told = valid("runs", asked(capsys, "runs", tmp_path, "--json")[1])
    assert [one["alarms"] for one in told["runs"]] == [1, 0, 0, 1]
    assert [one["last_step"] for one in told["runs"]] == [59, 59, None, 59]


def test_no_run_and_no_folder(tmp_path, capsys, monkeypatch):
    assert asked(capsys, "runs", tmp_path)[:2] == (0, f"{tmp_path} holds no run\n")
    code, _, err = asked(capsys, "runs", written(tmp_path))
    assert code == 2 and "gradwatch check" in err


def test_prune_deletes_what_is_ours_and_nothing_else(tmp_path, capsys, monkeypatch):
    folders = []
    for age in range(5):
        folder = written(tmp_path, name=f"r{age}", closed=age != 4)
        then = time.time() - 60 * age
        os.utime(folder / "records.jsonl", (then, then))
        folders.append(folder)
    (folders[2] / "model.pt").write_text("mine")
    (folders[3] / "report.html").write_text("page")
    elsewhere = written(tmp_path.parent / f"{tmp_path.name}-other", name="r5")
    os.utime(elsewhere / "records.jsonl", (1e9, 1e9))
    (tmp_path / "r5").symlink_to(elsewhere)
    code, _, err = asked(capsys, "runs", tmp_path, "--prune", 2)
    assert code == 2 and "add --yes" in err and len([*tmp_path.iterdir()]) == 6
    code, out, _ = asked(capsys, "runs", tmp_path, "--prune", 2, "--yes", "--json")
    told = valid("runs", out)
    assert code == 0 and told["pruned"] == ["r3"]
    assert {*told["kept"]} == {"r2", "r4", "r5"}
    assert {p.name for p in tmp_path.iterdir()} == {"r0", "r1", "r2", "r4", "r5"}
    assert [p.name for p in folders[2].iterdir()] == ["model.pt"]
    assert (elsewhere / "records.jsonl").exists()
    code, _, err = asked(capsys, "runs", tmp_path, "--prune", -1, "--yes")
    assert code == 2 and "--prune is -1" in err


# ---- explain


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("schedule", "<since>"),
        ("rho", "spectral radius of W_hh"),
        ("gradwatch/rnn/l0/rho", "spectral radius of W_hh"),
        ("gradwatch/rnn/l0/shut/f", "share of sigmoid gate values below .05"),
        ("horizon_too_long", "a cause of vanishing"),
        ("saturated", "share of tanh sigma' below .05"),
    ],
)
def test_a_metric_and_a_cause_are_explained(name, told, capsys):
    code, out, _ = asked(capsys, "explain", name)
    assert code == 0 and told in out
    found = valid("explain", asked(capsys, "explain", name, "--json")[1])
    assert told in " ".join(part["text"] for part in found["found"])


def test_all_that_is_named_anywhere_is_explained(capsys):
    for name in names():
        code, out, _ = asked(capsys, "explain", name)
        assert code == 0 and name in out
    valid("explain", asked(capsys, "explain", "--json")[1])


# ---- completion, demo, report


def test_bash_completes_verbs_and_options(capsys):
    pytest.importorskip("shtab")
    script = valid("completion", asked(capsys, "completion", "bash", "--json")[1])
    ask = """
COMP_WORDS=({words}); COMP_CWORD={at}; COMP_TYPE=9
_shtab_gradwatch; echo "${{COMPREPLY[@]}}"
"""

    def replies(*words):
        text = script["script"] + ask.format(words=" ".join(words), at=len(words) - 1)
        done = subprocess.run(
            ["bash", "-c", text], capture_output=True, text=True, check=True
        )
        return done.stdout.split()

    assert replies("gradwatch", "che") == ["check"]
    assert replies("gradwatch", "check", "--fai") == ["--fail-on"]
    assert "github" in replies("gradwatch", "check", "--format", "git")
    code, out, _ = asked(capsys, "completion", "zsh")
    assert code == 0 and out.startswith("#compdef gradwatch")
    if shutil.which("zsh"):
        subprocess.run(["zsh", "-n"], input=out, text=True, check=True)


def test_report_and_inspect_in_json(tmp_path, capsys):
    pytest.importorskip("vl_convert")
    told = valid("report", asked(capsys, "report", written(tmp_path), "--json")[1])
    assert os.path.getsize(told["page"]) == told["bytes"] > 50_000
    torch.save(torch.nn.GRU(3, 4).state_dict(), tmp_path / "model.pt")
    valid("inspect", asked(capsys, "inspect", tmp_path / "model.pt", "--json")[1])


@pytest.mark.slow
def test_the_demo_fails_is_cured_and_shows_its_page(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("GRADWATCH_DIR", str(tmp_path))
    threads, began = torch.get_num_threads(), time.monotonic()
    try:
        code, out, err = asked(capsys, "demo", "--json")
    finally:
        torch.set_num_threads(threads)
    told = valid("demo", out)
    assert code == 0 and time.monotonic() - began < 60
    assert told["alarm"] == "vanishing" and "chrono_" in told["remedy"]
    assert told["accuracy_before"] < 0.4 and told["accuracy_after"] > 0.95
    assert "remedy" in err and told["run"] == str(tmp_path / "demo")


def test_the_schema_is_one(capsys):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert {"incident", "number", *VERBS} == SCHEMA["$defs"].keys()
