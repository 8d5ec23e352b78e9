"""What a kind means, from the shell; what is muted or missing."""

import json

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch import console, init
from gradwatch.cli import main
from gradwatch.kinds.catalogue import CATALOGUE
from gradwatch.record import Incident
from gradwatch.rules import replay
from testbed.models import batches, lstm


@pytest.mark.parametrize("kind", CATALOGUE)
def test_the_page_of_a_kind_is_printed(kind, capsys):
    assert main(["explain", kind]) == 0
    page = capsys.readouterr().out
    assert page.startswith("# ") and CATALOGUE[kind].meaning.split()[0] in page
    assert "<!--" not in page and "## How to confirm" in page


def test_all_kinds_are_listed(capsys):
    assert main(["explain"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [x.split()[0] for x in lines if not x.startswith(" ")] == list(CATALOGUE)
    assert max(map(len, lines)) < 100


def test_an_unknown_kind_is_an_error_that_lists_what_exists(capsys):
    assert main(["explain", "explosion"]) == 2
    told = capsys.readouterr().err
    assert "'explosion'" in told and "exploding" in told


@pytest.mark.parametrize(
    ("mute", "error", "told"),
    [
        (["explosion"], ValueError, "the kinds are axes_mixed, cleared_early"),
        ([("vanishing", "rnn.l7")], ValueError, r"the streams are rnn\.l0"),
        ([("vanishing",)], ValueError, "a pair of a kind"),
        ([3], ValueError, "mute holds 3"),
        ("spike", TypeError, r"mute=\['spike'\]"),
    ],
)
def test_what_cannot_be_muted_is_an_error(mute, error, told, tmp_path):
    model = lstm()
    with pytest.raises(error, match=told):
        gradwatch.watch(model, dir=tmp_path / "run", wandb=None, mute=mute)
    assert not (tmp_path / "run").exists()
    assert not model.rnn._forward_hooks


def test_what_exists_is_muted():
    mute = ("spike", ("vanishing", "rnn.l0"), ("nonfinite", None))
    with gradwatch.watch(lstm(), dir=None, wandb=None, mute=mute) as watch:
        assert watch.health["failed"] == {}
    with pytest.raises(ValueError, match="the kinds are"):
        replay([], watch.streams, mute=["explosion"])


def test_a_rule_that_names_no_kind_may_report_any():
    class Own:
        def update(self, record):
            return []

    with gradwatch.watch(lstm(), dir=None, rules=[Own()], mute=["mine"]) as watch:
        assert watch.health["failed"] == {}


def test_a_missing_key_names_its_neighbours():
    model = lstm()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradwatch.watch(model, dir=None, wandb=None) as watch:
        with pytest.raises(KeyError, match="nothing has been yet"):
            watch.latest["gradwatch/grad_norm"]
        for x in batches(2):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        with pytest.raises(KeyError, match="gradwatch/rnn/l0/rho"):
            watch.latest["gradwatch/rnn.l0/rho"]
        assert "gradwatch/nothing" not in watch.latest
        assert watch.latest.get("gradwatch/nothing") is None
        assert json.loads(json.dumps(watch.latest)) == dict(watch.latest)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_chrono_tells_the_memory_before_and_after(kind):
    torch.manual_seed(0)
    model = kind(4, 400)
    gate = 1  # f of i, f, g, o; z of r, z, n

    def memory():
        bias = (model.bias_ih_l0 + model.bias_hh_l0).detach().double()
        kept = bias.chunk(bias.numel() // 400)[gate].sigmoid()
        return float((1 / (1 - kept)).median())

    before = memory()
    [changed] = init.chrono_(model, 100)
    assert changed.memory == pytest.approx((before, memory()))
    assert changed.memory[1] == pytest.approx(51, rel=0.2)  # 1 + the median of U(1, 99)
    assert "; memory 2 -> " in str(changed) and str(changed).endswith(" steps")


def test_what_writes_no_bias_tells_no_memory():
    [changed] = init.orthogonal_(nn.LSTM(4, 8))
    assert changed.memory is None and "memory" not in str(changed)
    [changed] = init.zero_bias_(nn.RNN(4, 8))
    assert changed.memory is None


def incident(kind, severity, until=None, evidence=None):
    return Incident(
        kind=kind,
        severity=severity,
        since=7,
        until=until,
        streams=("rnn.l0",),
        cause="drift",
        evidence=evidence or {"gradwatch/rnn/l0/growth_log10": (20.63, 2.7)},
        remedy=None,
        alerts=(),
    )


def test_the_closing_lines_name_what_is_open_with_its_numbers():
    past = incident("exploding", "error", until=60)
    notice = incident("drift", "info", evidence={"gradwatch/rnn/l0/rho": (1.5, None)})
    over = incident("truncated", "info", until=8)
    lines = console.verdict(90, [past, notice, over], [], None).split("\n")
    assert lines == [
        "90 steps, 1 alarm, first at step 7, 1 notice; records in memory only",
        "  exploding since step 7, until step 60 in rnn.l0, cause drift: growth_log10 "
        "20.6 (threshold 2.7)",
        "  drift since step 7, still open in rnn.l0: rho 1.5 (notice)",
    ]
    [line] = console.verdict(90, [], [], None).split("\n")
    assert line == "90 steps, no alarm; records in memory only"
    line, _ = console.verdict(90, [notice], [], None).split("\n")
    assert line.startswith("90 steps, no alarm, 1 notice; ")


def test_a_nan_that_another_explains_is_a_dash():
    nan = float("nan")
    assert console.derived(nan, nan) == "-" and console.derived(nan, 1.0) == "nan"
    assert console.derived(0.5, nan) == "0.5" and console.derived(None, 1.0) == "-"
    assert console.derived(nan, None) == "nan"
