"""What is saved: versions, what does not fit, and what an older version wrote."""

import copy
import json
import math
from dataclasses import dataclass, field

import pytest
import torch

import gradwatch
from gradwatch import saved
from gradwatch.facts import ModuleFacts
from gradwatch.kinds.catalogue import default_rules
from gradwatch.kinds.growth import Growth
from gradwatch.kinds.lr_too_high import LrTooHigh
from gradwatch.kinds.spike import Spike
from testbed.models import batches, lstm


@dataclass(slots=True)
class Part:
    count: int = 0
    levels: dict[str, list[float]] = field(default_factory=dict)


@dataclass(slots=True)
class Whole:
    part: Part = field(default_factory=Part)
    pair: tuple[int, str] = (0, "")
    window: tuple[float, ...] = ()
    best: float = math.inf
    maybe: int | None = None
    facts: dict[str, ModuleFacts] = field(default_factory=dict)


def example():
    facts = {"rnn": ModuleFacts(T=5, input_finite=False)}
    return Whole(Part(3, {"a": [1.0, 2.5]}), (1, "b"), (0.5,), 2.0, 7, facts)


def test_a_state_comes_back_as_it_was():
    plain = json.loads(json.dumps(saved.write(example())))
    assert plain["version"] == 1 and plain["facts"] == {
        "rnn": {"T": 5, "input_finite": False}
    }
    assert saved.read(Whole, plain, "a test") == example()


def test_a_state_is_replaced_in_place_or_not_at_all():
    state = Whole()
    part = state.part
    saved.restore(state, saved.write(example()), "a test")
    assert state == example() and state.part is part
    wrong = saved.write(example()) | {"best": "far"}
    with pytest.raises(ValueError, match="best, is 'far'; expected float"):
        saved.restore(state, wrong, "a test")
    assert state == example()
    saved.reset(state, keep=("pair",))
    assert state == Whole(pair=(1, "b")) and state.part is part


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"version": 2},
            "layout of version 2; this version of gradwatch reads version",
        ),
        ({"version": 0}, "layout of version 0"),
        ({"other": 1}, "has other; expected part, pair"),
        ({"pair": [1]}, "pair, is"),
        ({"part": 3}, "part, is 3; expected a mapping"),
        ({"part": {"count": 1}}, "lacks levels"),
        ({"maybe": "x"}, "maybe, is 'x'; expected int"),
        ({"facts": {"rnn": {"T": "x"}}}, "facts, rnn, T, is 'x'"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_sentence(change, told):
    with pytest.raises(ValueError, match=told):
        saved.read(Whole, saved.write(example()) | change, "a test")
    with pytest.raises(ValueError, match="expected a mapping"):
        saved.read(Whole, [1], "a test")


def test_an_older_layout_is_brought_up_to_date():
    def named(raw):
        return {**saved.write(Whole()), "maybe": raw["perhaps"]}

    assert saved.read(Whole, {"perhaps": 4}, "a test", {0: named}) == Whole(maybe=4)


# ---- the watch


def trained(steps=12, **options):
    model = lstm()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watch = gradwatch.watch(model, dir=None, wandb=None, every=1, **options)
    for number, x in enumerate(batches(steps)):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        watch.log(loss=loss)
        (loss * (100 if number == 8 else 1)).backward()
        optimizer.step()
    return watch


def test_every_part_of_a_watch_has_its_version():
    with trained() as watch:
        state = watch.state_dict()
    parts = [state["schedule"], state["pipeline"]["memory"]]
    parts += state["pipeline"]["rules"].values()
    assert len(state["pipeline"]["rules"]) == len(default_rules([]))
    versions = [part["version"] for part in parts]
    assert versions == [1, 2, *[1] * (len(parts) - 2)]


def spoil(state, path, value):
    *way, last = path
    for name in way:
        state = state[name]
    state[last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schedule", "steps"), "soon"),
        (("pipeline", "memory", "version"), 9),
        (("pipeline", "rules", "Vanishing", "past"), 3),
        (("pipeline", "rules", "RepeatedBatch", "version"), 2),
        (("pipeline", "rules"), None),
        (("pipeline", "incidents"), {}),
        (("step",), "soon"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(path, value):
    with trained(20) as other:
        state = json.loads(json.dumps(other.state_dict()))
    spoil(state, path, value)
    with trained() as watch:
        before = copy.deepcopy(watch.state_dict())
        with pytest.raises(ValueError, match=r"expected|version"):
            watch.load_state_dict(state)
        after = watch.state_dict()
    assert after == before


def test_states_without_a_version_are_read():
    """As the versions before this one wrote them."""
    streams = trained().streams
    spike, rates, growth = Spike(streams), LrTooHigh(streams), Growth(streams)
    losses = {"last": [1.0], "start": None, "largest": 1.0, "signed": False}
    losses |= {"best": math.inf, "improved": 0}
    spike.load_state_dict(
        {
            "_logs": [0.5, 0.25],
            "_taken": 2,
            "_largest": 0.5,
            "_raised": None,
            "_losses": losses,
        }
    )
    assert spike.state_dict()["logs"] == [0.5, 0.25]
    assert spike.state_dict()["losses"] == losses | {"mean": 0.0, "taken": 0}
    running = {"steps": 3, "since": 4, "_back": 1, "raised": True, "back": 25}
    rates.load_state_dict(
        {
            "ratios": {"rnn.l0": [0.5]},
            "usual": {"rnn.l0": [0.1, 2.0]},
            "running": {"rnn.l0": running},
            "losses": losses,
            "taken": 9,
            "burst": 2.0,
        }
    )
    assert rates.active and rates.state_dict()["running"]["rnn.l0"]["away"] == 1
    gone = LrTooHigh([])
    gone.load_state_dict(rates.state_dict())
    assert not gone.active  # its stream is no more
    growth.load_state_dict(
        {
            "levels": {"over": {"rnn.l0": [3, 5]}, "raised": {"rnn.l0": 0}},
            "seen": {
                "values": {"rnn.l0": {"rho": 1.5}},
                "facts": {"modules": {"rnn": {"T": 6}}, "streams": {}},
            },
            "past": {},
            "rising": {},
            "measured": {"rnn.l0": 7},
            "probed": 7,
        }
    )
    assert growth.active
    assert growth.state_dict()["seen"]["modules"] == {"rnn": {"T": 6}}
