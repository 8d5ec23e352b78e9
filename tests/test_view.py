"""The saved view of a W&B project, against the stand-in for the server."""

import json
import subprocess
import sys

import pytest

from gradwatch.cli import main
from gradwatch.metrics import headline_keys
from tests.support.runs import stream
from tests.support.wandb_server import WandbServer
from tests.test_sinks_wandb import WITHOUT_WANDB


def asked(*arguments, environment):
    """Run the command in a process of its own: wandb keeps who is logged in."""
    return subprocess.run(
        [sys.executable, "-m", "gradwatch", "wandb-view", *arguments],
        env={**WITHOUT_WANDB, **environment, "WANDB_SILENT": "true"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_view_has_every_headline_metric_in_a_section(tmp_path):
    pytest.importorskip("wandb_workspaces")
    with WandbServer() as server:
        environment = {**server.environment, "HOME": str(tmp_path)}
        done = asked("me/digits", environment=environment)
        assert done.returncode == 0, done.stderr
        [view] = server.views
        assert server.unknown == []
    assert done.stdout.strip().startswith("http") and "digits" in done.stdout
    own = view["entityName"], view["projectName"], view["displayName"]
    assert own == ("me", "digits", "gradwatch")
    bank = json.loads(view["spec"])["section"]["panelBankConfig"]
    names = [section["name"] for section in bank["sections"]]
    assert names[:2] == ["gradwatch: flow and alarms", "gradwatch: gradients"]
    text = view["spec"]
    for key in headline_keys([stream("rnn.l0"), stream("a.l0", "RNN_TANH", ())]):
        last = key.rpartition("/")[2]
        assert f"/{last}" in text, key
    assert "gradwatch/media/flow" in text and "gradwatch/step" in text


@pytest.mark.slow
def test_a_server_that_refuses_is_told_in_a_sentence(tmp_path):
    pytest.importorskip("wandb_workspaces")
    with WandbServer() as server:
        server.fail(403, "UpsertView2")
        environment = {**server.environment, "HOME": str(tmp_path)}
        done = asked("me/digits", environment=environment)
    assert done.returncode == 2 and "did not take the view of me/digits" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("given", ["digits", "a/b/c", "/b", "a b/c"])
def test_what_is_no_project_is_an_error(given, capsys):
    assert main(["wandb-view", given]) == 2
    assert "expected ENTITY/PROJECT" in capsys.readouterr().err
