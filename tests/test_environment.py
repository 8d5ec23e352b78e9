"""What the environment sets for a machine, and what it says wrongly."""

import re
from pathlib import Path

import pytest
import torch

import gradwatch
from testbed.models import batches, lstm

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("word", ["1", "true", "Yes", " ON "])
def test_every_yes_disables(monkeypatch, word):
    monkeypatch.setenv("GRADWATCH_DISABLED", word)
    assert gradwatch.watch(lstm()).health["state"] == "off"


@pytest.mark.parametrize("word", ["", "0", "false", "No", "off", "perhaps"])
def test_nothing_else_does(monkeypatch, word, caplog):
    monkeypatch.setenv("GRADWATCH_DISABLED", word)
    with gradwatch.watch(lstm(), dir=None, wandb=None) as watch:
        assert len(watch.streams) == 1
    assert ("GRADWATCH_DISABLED is 'perhaps'" in caplog.text) == (word == "perhaps")


@pytest.fixture
def watched():
    open_ = []

    def make(**arguments):
        watch = gradwatch.watch(lstm(), dir=None, wandb=None, **arguments)
        open_.append(watch)
        return watch, watch._settings

    yield make
    for watch in open_:
        watch.close()


@pytest.mark.parametrize(
    ("said", "given", "expected"),
    [
        ("0.01", {}, 0.01),
        (" none ", {}, None),
        ("0.01", {"budget": 0.2}, 0.2),
        ("0.01", {"budget": None}, None),
        ("", {}, 0.03),
        ("much", {}, 0.03),
        ("0", {}, 0.03),
        ("nan", {}, 0.03),
        ("7", {}, 0.03),
    ],
)
def test_the_budget(said, given, expected, monkeypatch, watched, caplog):
    monkeypatch.setenv("GRADWATCH_BUDGET", said)
    _, settings = watched(**given)
    assert settings.budget == expected
    wrong = said in ("much", "0", "nan", "7")
    assert ("GRADWATCH_BUDGET is" in caplog.text) == wrong


@pytest.mark.parametrize(
    ("said", "given", "raises"),
    [
        ("raise", {}, True),
        ("Raise", {}, True),
        ("none", {}, False),
        ("page me", {}, False),
        ("raise", {"on_alert": print}, False),
    ],
)
def test_what_an_alarm_does(said, given, raises, monkeypatch, watched, caplog):
    monkeypatch.setenv("GRADWATCH_ON_ALERT", said)
    _, settings = watched(**given)
    assert settings.raising == raises
    assert ("GRADWATCH_ON_ALERT is 'page me'" in caplog.text) == (said == "page me")


def test_an_alarm_really_raises(monkeypatch):
    monkeypatch.setenv("GRADWATCH_ON_ALERT", "raise")
    model = lstm()
    [x] = batches(1)
    with gradwatch.watch(model, dir=None, wandb=None):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        (model(x).sum() * float("nan")).backward()
        with pytest.raises(gradwatch.TrainingAlert):
            optimizer.step()


def test_what_is_muted(monkeypatch, watched, caplog):
    said = "spike, vanishing:rnn.l0,,explosion, spike:rnn.l9"
    monkeypatch.setenv("GRADWATCH_MUTE", said)
    _, settings = watched(mute=["drift"])
    assert settings.mute == ["drift", "spike", ("vanishing", "rnn.l0")]
    assert caplog.text.count("GRADWATCH_MUTE: ") == 2
    assert "'explosion'" in caplog.text and "'rnn.l9'" in caplog.text


def test_every_variable_is_in_the_table():
    """That of ``docs/environment.md`` has what the code reads, and no more."""
    code = "".join(p.read_text("utf-8") for p in (ROOT / "gradwatch").rglob("*.py"))
    read = set(re.findall(r"[\"'](GRADWATCH_[A-Z_]+)[\"']", code))
    page = (ROOT / "docs" / "environment.md").read_text("utf-8")
    assert read == set(re.findall(r"^\| `(GRADWATCH_[A-Z_]+)`", page, re.M))
