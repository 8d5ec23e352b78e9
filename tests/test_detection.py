"""The measure of the alarms measures itself: its cases, scores and labels."""

import pytest
import torch
from torch import nn

from benchmarks.detection import families, score
from benchmarks.detection.case import (
    FAMILIES,
    Case,
    Draw,
    History,
    Label,
    Measured,
    held_out,
    loop,
    make,
    trained,
)
from benchmarks.detection.tools import TOOLS, Alarm, Report
from testbed import nets, tasks


def rows_of_digits(draw):
    """A small healthy run."""
    name = draw.module_name()
    model = nets.Reader(name, nn.GRU(8, draw.between(12, 20)), 10)
    return Case(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), 1e-2),
        batches=tasks.digits(draw.source(), 16, rows=True),
        loss=nets.classes,
        label=Label(),
        steps=60,
        clip=1.0,
        truth=lambda case, history: Measured(history.fell_to(0.9, 10), {}),
    )


@pytest.fixture
def family(monkeypatch):
    monkeypatch.setitem(FAMILIES, "rows_of_digits", rows_of_digits)
    return "rows_of_digits"


def test_a_seed_makes_the_same_run_again_and_another_one_another(family):
    one, two = trained(make(family, 0)), trained(make(family, 0))
    assert one.losses == two.losses and one.norms == two.norms
    assert trained(make(family, 1)).losses != one.losses


def test_the_ordinary_loop_is_torchs(family):
    case, plain = make(family, 0), make(family, 0)
    for _ in loop(case):
        pass
    for _, (x, y) in zip(range(60), plain.batches, strict=False):
        plain.optimizer.zero_grad()
        nn.functional.cross_entropy(plain.model(x), y).backward()
        nn.utils.clip_grad_norm_(plain.model.parameters(), 1.0)
        plain.optimizer.step()
    pairs = zip(case.model.parameters(), plain.model.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


def same_weights(one, two):
    pairs = zip(one.model.parameters(), two.model.parameters(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


def test_batches_that_are_accumulated_make_one_step_of_their_mean(family):
    case, plain = make(family, 0), make(family, 0)
    case.steps, case.accumulate, case.clip = 10, 3, None
    history = trained(case)
    means = []
    for _ in range(10):
        plain.optimizer.zero_grad()
        losses = [nets.classes(plain.model, next(plain.batches)) for _ in range(3)]
        for loss in losses:
            (loss / 3).backward()
        plain.optimizer.step()
        means.append(float(torch.stack(losses).detach().mean()))
    assert same_weights(case, plain) and history.losses == means


def test_gradients_that_are_not_cleared_add_up(family):
    case, plain = make(family, 0), make(family, 0)
    case.steps, case.clears, case.clip = 10, False, None
    trained(case)
    for _ in range(10):
        nets.classes(plain.model, next(plain.batches)).backward()
        plain.optimizer.step()
    assert same_weights(case, plain)


def test_a_scaler_changes_neither_norms_nor_steps(family):
    plain, case = make(family, 0), make(family, 0)
    case.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    seen = History()
    norms = [float(step.norm) for step in loop(case, seen)]
    history = trained(plain)
    torch.testing.assert_close(norms, history.norms, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(seen.norms, history.norms, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(seen.losses, history.losses, rtol=1e-4, atol=1e-6)


def test_a_clip_of_scaled_gradients_leaves_a_trace_of_them_alone(family):
    case = make(family, 0)
    case.optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    case.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    case.clip_scaled, case.steps = True, 20
    begun = [p.detach().clone() for p in case.model.parameters()]
    norms = [float(step.norm) for step in loop(case)]
    assert 0.01 < min(norms) < 100  # told as they are
    moved = zip(begun, case.model.parameters(), strict=True)
    assert max(float((p - q.detach()).norm()) for p, q in moved) < 1e-5


def test_a_step_that_a_scaler_skips_is_not_a_broken_one(family):
    case = make(family, 0)
    case.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    case.after = lambda number: (
        case.model.head.bias.grad.fill_(torch.inf) if number == 5 else None
    )
    history = trained(case)
    assert [i for i, n in enumerate(history.norms) if n == torch.inf] == [5]
    assert history.nonfinite is None
    case = make(family, 0)
    case.after = lambda number: case.model.head.bias.grad.fill_(torch.inf)
    assert trained(case).nonfinite == 0


@pytest.mark.parametrize("tool", TOOLS)
def test_no_tool_changes_the_run(family, tool):
    bare = trained(make(family, 0))
    case, history = make(family, 0), History()
    TOOLS[tool](case, loop(case, history), False)
    assert history.losses == bare.losses


def test_a_third_is_held_out_by_the_name_alone():
    names = [f"family_{i}" for i in range(600)]
    assert 160 < sum(map(held_out, names)) < 240
    assert held_out("family_1") == held_out("family_1")


def judged(label, alarms, open=(), nonfinite=None):
    history = History(losses=[1.0] * 40, nonfinite=nonfinite)
    return score.Judged(
        family="f", seed=0, label=label, history=history, seconds=1.0, bare=1.0,
        report=Report(alarms=list(alarms), open=set(open)),
    )  # fmt: skip


SICK = Label(
    kind="exploding",
    causes=frozenset({"chaos", "large_radius"}),
    streams=frozenset({"rnn.l0"}),
    onset=50,
    others=frozenset({"drift"}),
)
RIGHT = Alarm(
    kind="exploding", step=53, cause="chaos", streams=frozenset({"rnn.l0", "rnn.l1"})
)


def test_a_right_alarm_scores_everything():
    one = judged(SICK, [RIGHT], open={"exploding"}, nonfinite=90)
    assert one.right == [RIGHT] and not one.false
    assert one.cause and one.stream and one.ends_right
    assert one.delay == 3 and one.lead == 37
    assert not list(score.rows([one]))


def test_wrong_ones_are_told_apart():
    early = Alarm(kind="exploding", step=20)
    other = Alarm(kind="vanishing", step=60)
    true_too = Alarm(kind="drift", step=60)
    one = judged(SICK, [early, other, true_too], open={"vanishing"})
    assert not one.right and one.false == [early, other]
    assert one.cause is None and one.stream is None and one.delay is None
    assert not one.ends_right
    wrong = judged(SICK, [Alarm(kind="exploding", step=60, cause="drift")])
    assert wrong.cause is False and wrong.stream is False
    text = "\n".join(score.rows([one, wrong]))
    assert "exploding not seen" in text and "false alarm: exploding at 20" in text
    assert "cause is chaos or large_radius" in text


def test_healthy_runs_count_every_alarm_but_true_ones():
    well = Label(others=frozenset({"no_gradient"}))
    assert not judged(well, []).false and judged(well, []).ends_right
    assert not judged(well, [Alarm(kind="no_gradient", step=1)]).false
    one = judged(well, [RIGHT], open={"exploding"})
    assert one.false == [RIGHT] and not one.ends_right
    assert score.share(bool(j.false) for j in (one, judged(well, []))) == (1, 2)


def test_a_label_that_does_not_hold_is_violated(monkeypatch, family):
    assert not score.verify(family, 0).problems

    def liar(draw):
        """Says that it is sick, and is not."""
        case = rows_of_digits(draw)
        case.label = Label(kind="exploding")
        case.truth = lambda case, history: Measured(max(history.norms) > 1e6, {})
        case.control = lambda: rows_of_digits(Draw("liar", 0))
        return case

    monkeypatch.setitem(FAMILIES, "liar", liar)
    problems = score.verify("liar", 0).problems
    assert len(problems) == 2 and "the control" in problems[1]
    silent = rows_of_digits(Draw("x", 0))
    silent.truth = None
    monkeypatch.setitem(FAMILIES, "silent", lambda draw: silent)
    assert score.verify("silent", 0).problems == ("nothing measures this label",)


QUICK = [
    "healthy_rows_identity_relu",
    "healthy_cell_rnn",
    "exploding_large_radius_relu",
    "no_gradient_unused_module",
    "nonfinite_nan_backward",
]


@pytest.mark.parametrize("name", QUICK)
def test_some_labels_are_true_and_gradwatch_is_right_about_them(name):
    assert families.healthy and not score.verify(name, 0).problems
    [one] = score.judge(name, 0, {"gradwatch": TOOLS["gradwatch"]}).values()
    assert not one.false and (one.right or not one.sick)


def test_there_are_enough_families_and_half_are_healthy():
    labels = {name: make(name, 0).label for name in FAMILIES}
    well = [name for name, label in labels.items() if label.kind is None]
    assert len(labels) >= 48 and 0.4 < len(well) / len(labels) < 0.7
    ours = [name for name in well if name[1] != "_"]  # the sets are named a_ to d_
    assert all(name.startswith("healthy_") for name in ours)
    assert all(FAMILIES[name].__doc__ for name in FAMILIES)
    assert {name for name in FAMILIES if held_out(name)} != set()
