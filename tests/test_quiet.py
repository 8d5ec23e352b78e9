"""The quiet path: what is found on it is what would have been found without."""

import contextlib
import gc
import json
import math
import re
import threading
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gradwatch
from gradwatch import clock, quiet
from gradwatch.block import Block
from gradwatch.clock import (
    BackwardBegins,
    BackwardEnds,
    ClockState,
    OptimizerBegins,
    OptimizerEnds,
)
from gradwatch.kinds.catalogue import CATALOGUE, default_rules
from gradwatch.kinds.incidents import Incidents
from gradwatch.kinds.judge import ByBlock, Judge
from gradwatch.quiet import Quiet
from gradwatch.record import Stream, dump_line
from testbed.models import Tagger, lstm
from tests.support.seldom import seldom

STEPS = 220


class Train:
    """One way to train, step by step, with what is done to it on the way."""

    def __init__(self, build, optimizer=torch.optim.Adam, rate=1e-2, **watch):
        torch.manual_seed(0)
        self.model = Tagger(build(), 8, 2)
        self.optimizer = optimizer(self.model.parameters(), rate)
        watch = {"budget": None, "dir": None, "wandb": None} | watch
        self.watch = gradwatch.watch(self.model, **watch)

    def run(
        self,
        *,
        steps=STEPS,
        log=False,
        clip=None,
        on=lambda i, train: None,
        closure=lambda i: False,
    ):
        for i in range(steps):
            x = torch.randn(12, 3, 4)
            on(i, self)

            def whole(i=i, x=x):
                self.optimizer.zero_grad()
                loss = self.model(x).square().mean() * (50 if i % 97 == 96 else 1)
                loss.backward()
                if log:
                    self.watch.log(loss=loss)
                if clip:
                    nn.utils.clip_grad_norm_(self.model.parameters(), clip)
                if i % 59 == 58 and closure(i) == "raises":
                    raise OSError
                return loss

            if closure(i):
                with contextlib.suppress(OSError):
                    self.optimizer.step(whole)
            else:
                whole()
                self.optimizer.step()
        return self

    def found(self):
        """Return all that is to be the same."""
        self.watch.flush()
        records = [json.loads(dump_line(record)) for record in self.watch.records]
        for record in records:
            del record["time"], record["metrics"]["gradwatch/overhead"]
        state = json.dumps(self.watch.state_dict(), default=str, sort_keys=True)
        found = (
            records,
            [repr(alert) for alert in self.watch.alerts],
            repr(self.watch.incidents),
            re.sub(r'"steps": \[[^]]*\]', "", state),  # what steps took, in seconds
        )
        self.watch.close()
        return found


def more_passes(i, train):
    if 60 < i < 70:
        train.model(torch.randn(12, 3, 4)).square().mean().backward()


def reading(i, train):
    if i % 13 == 5:
        train.watch.flush()
    if i % 29 == 17:
        assert train.watch.records[-1].step == i - 1


def probing(i, train):
    if i in (77, 150):
        train.watch.probe_now()
    if i == 90:
        train.watch.pause()
    if i == 101:
        train.watch.resume()


def no_rate(i, train):
    if i == 110:
        train.optimizer.param_groups[0]["lr"] = 0.0


def freezing(i, train):
    weight = train.model.rnn.weight_hh_l0
    if i in (80, 170):
        weight.requires_grad_(i == 170)


def breaking(i, train):
    if i == 130:
        train.model.rnn.weight_ih_l0.data[0, 0] = math.nan
    if i == 133:
        for p in train.model.parameters():
            p.data.nan_to_num_()


def steps_twice(i, train):
    if i > 100 and i % 3 == 0:
        train.optimizer.step()


def throws_away(i, train):
    if i % 41 == 40:
        train.model(torch.randn(12, 3, 4)).square().mean().backward()
        train.optimizer.zero_grad()


def by_another(i, train):
    if i == 60:
        train.other = torch.optim.SGD([train.model.head.bias], 1e-3)
    if i > 60 and i % 7 == 0:
        train.other.step()


def in_place(i, train):
    for p in train.model.parameters():
        if p.grad is not None and i % 2:
            p.grad.detach_().zero_()


def not_cleared(i, train):
    if i == 100:
        train.optimizer.zero_grad = lambda: None


def a_bad_loss(i, train):
    if i == 140:
        train.watch.log(loss=math.nan)


def always(i):
    return True


DEEP = dict(build=lambda: nn.LSTM(4, 8, 2))
PLAIN = dict(build=lambda: nn.RNN(4, 8))
RUNS = {
    "LSTM": (DEEP, {}),
    "losses": (DEEP, {"log": True}),
    "losses, a large rate": (
        dict(PLAIN, rate=0.3),
        {"log": True},
    ),
    "clipped": (DEEP, {"clip": 0.01}),
    "clipped to nothing": (dict(DEEP, optimizer=torch.optim.SGD), {"clip": 1e-7}),
    "rate too high": (dict(DEEP, optimizer=torch.optim.SGD, rate=50.0), {}),
    "ReLU": (dict(build=lambda: nn.RNN(4, 8, nonlinearity="relu"), rate=0.5), {}),
    "GRU": (dict(build=lambda: nn.GRU(4, 8)), {}),
    "often": (dict(DEEP, every=7), {}),
    "gradients seldom": (dict(DEEP, every={"gradients": 3}), {}),
    "several passes": (DEEP, {"on": more_passes}),
    "read on the way": (DEEP, {"on": reading}),
    "probed and paused": (DEEP, {"on": probing}),
    "no rate": (DEEP, {"on": no_rate}),
    "frozen for a while": (DEEP, {"on": freezing}),
    "NaN": (dict(DEEP, optimizer=torch.optim.SGD), {"on": breaking}),
    "steps twice": (DEEP, {"on": steps_twice}),
    "gradients thrown away": (DEEP, {"on": throws_away}),
    "another optimizer": (DEEP, {"on": by_another}),
    "zeroed in place": (DEEP, {"on": in_place}),
    "never cleared": (DEEP, {"on": not_cleared}),
    "a loss that is NaN": (DEEP, {"on": a_bad_loss, "log": True}),
    "a closure": (DEEP, {"closure": always}),
    "a closure, losses": (DEEP, {"closure": always, "log": True}),
    "a closure, clipped": (DEEP, {"closure": always, "clip": 0.01}),
    "a closure now and then": (DEEP, {"closure": lambda i: i % 30 < 15}),
    "a closure that raises": (DEEP, {"closure": lambda i: "raises"}),
    "a closure, read on the way": (DEEP, {"closure": always, "on": reading}),
    "a closure, NaN": (
        dict(DEEP, optimizer=torch.optim.SGD),
        {"closure": always, "on": breaking},
    ),
    "a closure, steps twice": (DEEP, {"closure": always, "on": steps_twice}),
    "a closure, another optimizer": (DEEP, {"closure": always, "on": by_another}),
    "a closure, zeroed in place": (DEEP, {"closure": always, "on": in_place}),
    "a closure, thrown away": (DEEP, {"closure": always, "on": throws_away}),
    "LBFGS": (dict(DEEP, optimizer=torch.optim.LBFGS), {"closure": always}),
}


SLOW = {
    "LBFGS",
    "GRU",
    "often",
    "ReLU",
    "a loss that is NaN",
    "a closure, losses",
    "a closure, clipped",
    "a closure, read on the way",
    "a closure, NaN",
    "a closure, another optimizer",
    "a closure, zeroed in place",
    "a closure, thrown away",
}


@pytest.mark.parametrize("name", seldom(RUNS, SLOW))
def test_what_is_found_is_what_is_found_without_it(name, monkeypatch):
    how, training = RUNS[name]
    followed, real = [], Quiet.stepped

    def note(self, *args, **options):
        done = real(self, *args, **options)
        followed.append(done)
        return done

    with monkeypatch.context() as patched:
        patched.setattr(Quiet, "stepped", note)
        quietly = Train(**how).run(**training).found()
    monkeypatch.setattr(Quiet, "consider", lambda self, state, soonest: None)
    monkeypatch.setattr(
        Judge, "busy", lambda self, block: [r for r, _ in self._working]
    )
    assert quietly == Train(**how).run(**training).found()
    assert any(followed) == (name not in ("rate too high", "gradients seldom"))


# ---- the clock


@given(
    number=st.integers(3, 10**6),
    optimizer=st.integers(0, 5),
    late=st.integers(-16, 0),
    tasks=st.lists(st.integers(0, 10**6), min_size=1, max_size=20, unique=True),
)
def test_usual_steps_in_one_are_the_same_as_their_events(
    number, optimizer, late, tasks
):
    state = ClockState(
        number=number,
        task=-1,
        regulars=(clock.Regular(optimizer, number - 1),),
        late=late if number - late >= clock.MEMORY else -clock.MEMORY,
        optimizers=True,
        taken=True,
    )
    if clock.only_one(state) is None:
        assert number - state.late < clock.MEMORY
        return
    slow = state
    for task in tasks:
        for event in (
            BackwardBegins(task),
            BackwardEnds(True),
            OptimizerBegins(optimizer),
            OptimizerEnds(optimizer),
        ):
            slow, done = clock.advance(slow, event)
        assert [closed.number for closed in done.closed] == [slow.number - 1]
    assert clock.after_usual(state, number + len(tasks), tasks[-1]) == slow


# ---- the rules

STREAM = Stream(
    name="rnn.l0",
    module="rnn",
    kind="RNN_TANH",
    layer=0,
    direction="forward",
    input_size=4,
    hidden_size=8,
)
KEYS = (
    "gradwatch/loss",
    "gradwatch/grad_norm",
    "gradwatch/nonfinite",
    "gradwatch/grad_norm_clipped",
    "gradwatch/clip_ratio",
    "gradwatch/rnn/l0/grad_norm_hh",
    "gradwatch/rnn/l0/grad_norm_ih",
    "gradwatch/rnn/l0/update_ratio",
)


@st.composite
def rows(draw):
    """Return the rows of a run, mostly usual ones, and which of them are in full."""
    length = draw(st.integers(20, 150))
    every = draw(st.sampled_from([1, 1, 4]))
    logged = draw(st.booleans())
    odd = draw(
        st.sets(st.integers(0, length), max_size=draw(st.sampled_from([0, 2, 40])))
    )
    seed = draw(st.integers(0, 10**6))
    noise = torch.Generator().manual_seed(seed)
    found = []
    for step in range(length):
        norm, loss, ratio, clip = torch.rand(
            4, generator=noise, dtype=torch.float64
        ).tolist()
        norm, ratio, clip = 0.5 + norm, 0.001 + 0.01 * ratio, 0.5 + clip / 2
        if step in odd:
            kind = draw(st.integers(0, 5))
            norm *= (1.0, 1e3, 1e6, 1e-3, 1.0, 1.0)[kind]
            ratio = (ratio, ratio, ratio, 0.0, 0.4, 3.0)[kind]
            clip = (1e-3, clip, clip, 0.0, clip, 1.0)[kind]
        full = step % every == 0 or step in odd
        rest = (clip * norm, clip, norm / 2, norm / 3, ratio) if full else (None,) * 5
        found.append(((1 + loss if logged else None, norm, 0.0, *rest), full))
    return found


def judged(found, sizes):
    """Judge rows in blocks of some sizes; return all that the judge knows then."""
    judge = Judge(default_rules([STREAM]), Incidents(CATALOGUE))
    given, start, quiet = [], 0, 0
    sizes = iter(sizes)
    while start < len(found):
        block = Block(KEYS)
        for step, (row, full) in list(enumerate(found))[start : start + next(sizes)]:
            block.add(step, 0.0, row, full=full)
        start += len(block)
        busy = judge.busy(block)
        quiet += not busy
        for record in block.records() if busy else ():
            given += judge.take(record, busy)[0]
        given.append((block.steps[-1], sorted(judge.wanted()), sorted(judge.wished())))
    given = [g for g in given if not isinstance(g, tuple)] + given[-1:]
    return repr(given), judge.state_dict(), repr(judge.incidents.all()), quiet


@settings(max_examples=60, deadline=None)
@given(rows(), st.lists(st.integers(1, 64), min_size=150, max_size=150))
def test_blocks_of_any_size_are_judged_as_their_records_are(found, sizes):
    *by_block, _ = judged(found, sizes)
    *by_row, _ = judged(found, [1] * len(found))
    judge = Judge(default_rules([STREAM]), Incidents(CATALOGUE))
    block = Block(KEYS)
    for step, (row, full) in enumerate(found):
        block.add(step, 0.0, row, full=full)
    given = [alert for r in block.records() for alert in judge.take(r)[0]]
    plain = [repr(given), judge.state_dict(), repr(judge.incidents.all())]
    assert by_block[1:] == by_row[1:] == plain[1:]
    assert by_block[0].startswith(plain[0][:-1])


def test_every_rule_of_the_catalogue_can_take_a_block():
    assert all(isinstance(rule, ByBlock) for rule in default_rules([STREAM]))


def test_usual_rows_keep_no_rule_busy():
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(200, generator=generator).tolist()
    found = [((None, 1 + z, 0.0, 1 + z, 1.0, 0.5, 0.5, 0.01), True) for z in noise]
    assert judged(found, [16] * 13)[-1] >= 11


# ---- steps of which little is read


def partial(steps=150, on=lambda i, train: None, **how):
    train = Train(**{**PLAIN, "every": 10**6, **how})
    schedule, norms = train.watch._settings.schedule, []
    schedule.in_full = 8

    def note(i, train):
        grads = [p.grad for p in train.model.parameters() if p.grad is not None]
        if grads:
            norms.append(
                float(
                    torch.linalg.vector_norm(
                        torch.cat([g.flatten() for g in grads]).double()
                    )
                )
            )
        on(i, train)

    train.run(steps=steps, on=note)
    train.watch.flush()
    return train, norms


def test_the_total_norm_is_read_at_every_step():
    train, norms = partial()
    steps, found = train.watch.records.series("gradwatch/grad_norm")
    assert steps.tolist() == list(range(150))
    assert found[:-1] == pytest.approx(norms, rel=1e-5)
    assert set(train.watch.records.series("gradwatch/nonfinite")[1]) == {0.0}
    full = [r.step for r in train.watch.records if not r.partial]
    assert set(full) >= {0, 8, 80, 96, 136} and len(full) < 90
    ratios, _ = train.watch.records.series("gradwatch/rnn/l0/update_ratio")
    assert ratios.tolist() == full
    train.watch.close()


def test_what_is_not_finite_is_told_at_its_own_step():
    train, _ = partial(on=breaking, optimizer=torch.optim.SGD)
    [alert] = [a for a in train.watch.alerts if a.kind == "nonfinite"]
    assert alert.step == 130
    [record] = [r for r in train.watch.records if r.step == 130]
    assert not record.partial and record.facts.step.nonfinite
    train.watch.close()


def test_cumulative_updates_are_estimated_within_a_tenth():
    train, _ = partial(steps=400)
    train.watch.close()
    truth = Train(**PLAIN, every=10**6).run(steps=400)
    truth.watch.flush()
    _, ratios = truth.watch.records.series("gradwatch/rnn/l0/update_ratio")
    truth.watch.close()
    known = {"travel": 0.0}
    from gradwatch.kinds.seen import add_travel

    key = "gradwatch/rnn/l0/update_ratio"
    add_travel(
        known, [(r.metrics.get(key), not r.partial) for r in train.watch.records]
    )
    assert known["travel"] == pytest.approx(sum(ratios), rel=0.1)


def test_while_an_alarm_is_open_every_step_is_read_in_full():
    train, _ = partial(on=no_rate, steps=200)
    # The loss has gone up in the step before, and has no way back.
    kinds = [a.kind for a in train.watch.alerts]
    assert sorted(kinds) == ["loss_divergence", "not_updating"]
    opened = train.watch.alerts[0].step
    assert opened < 110 + 80 + 64 + 16
    assert not any(r.partial for r in train.watch.records if r.step > opened + 1)
    train.watch.close()


@pytest.mark.parametrize(
    "how", [{"budget": None}, {"every": 50}, {"on_alert": "raise"}]
)
def test_whoever_asks_for_every_step_gets_it(how):
    train = Train(**{**PLAIN, **how})
    schedule = train.watch._settings.schedule
    for _ in range(200):
        schedule.stepped(1e-3, 5e-4)
    assert schedule.choose() is None and schedule.in_full == 1
    train.watch.close()


# ---- what it leaves behind


def test_the_model_is_freed_with_the_watch_on_the_path():
    train = Train(**DEEP).run(steps=60)
    assert train.watch._engine._quiet.phase == quiet.BETWEEN
    gone = weakref.ref(train.model.rnn.weight_hh_l0)
    train.watch.close()
    del train
    gc.collect()
    assert gone() is None


def test_a_model_that_is_thrown_away_on_the_path_is_freed():
    model = lstm()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    gradwatch.watch(model, dir=None, wandb=None, every=1000, budget=None)
    for _ in range(40):
        optimizer.zero_grad()
        model(torch.randn(5, 3, 4)).square().mean().backward()
        optimizer.step()
    gone = weakref.ref(next(model.parameters()))
    del model, optimizer
    gc.collect()
    assert gone() is None


def test_a_watch_is_flushed_in_another_thread_while_steps_are_quiet():
    train = Train(**dict(DEEP, every=1000))
    done = threading.Event()

    def flush():
        while not done.wait(1e-3):  # else it waits for its turn most of the time
            train.watch.flush()
            len(train.watch.records)

    thread = threading.Thread(target=flush)
    thread.start()
    train.run(steps=150)
    done.set()
    thread.join()
    train.watch.flush()
    assert [r.step for r in train.watch.records] == list(range(150))
    assert train.watch.health["failed"] == {}
    train.watch.close()


def test_a_failure_on_the_path_costs_no_step(monkeypatch):
    monkeypatch.setenv("GRADWATCH_STRICT", "0")
    train, real, calls = Train(**dict(DEEP, every=1000)), quiet.read, []

    def fail(grads):
        calls.append(1)
        if len(calls) == 25:
            raise RuntimeError("once")
        return real(grads)

    monkeypatch.setattr(quiet, "read", fail)
    train.run(steps=100)
    train.watch.flush()
    assert "once" in train.watch.health["failed"]["gradients"]
    assert [r.step for r in train.watch.records] == list(range(100))
    train.watch.close()
