"""Facts: typed, by scope, written when they change; and what format 1 had of them."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gradwatch
from gradwatch.facts import (
    NO_FACTS,
    Facts,
    ModuleFacts,
    RunFacts,
    StepFacts,
    StreamFacts,
    from_format_1,
)
from testbed.models import Loop, batches, lstm

LAWS = settings(deadline=None, derandomize=True, database=None)
names = st.sampled_from(["rnn", "rnn.l0", "scaled", "nonfinite", "carriers", "cell"])


def some(kind, **values):
    return st.builds(kind, **{k: st.none() | v for k, v in values.items()})


facts = st.builds(
    Facts,
    step=some(StepFacts, skipped_by=st.text(max_size=5)),
    run=some(RunFacts, cleared=st.booleans(), scaled=st.booleans()),
    modules=st.dictionaries(
        names, some(ModuleFacts, T=st.integers(1, 9), reach=st.text(max_size=5))
    ),
    streams=st.dictionaries(
        names, some(StreamFacts, lr=st.floats(0, 1), requires_grad=st.booleans())
    ),
)


@LAWS
@given(facts)
def test_plain_values_make_the_same_facts(one):
    plain = json.loads(json.dumps(one.to_plain()))
    assert Facts.from_plain(plain) == one
    assert bool(one) == (one != NO_FACTS)


@LAWS
@given(facts, facts)
def test_what_has_changed_is_all_that_is_needed(known, now):
    now = dataclasses.replace(known.with_later(now), step=now.step)
    changed = now.since(known)
    assert known.with_later(changed) == known.with_later(now)
    still = now.since(now)
    assert not still.modules and not still.streams and still.run == RunFacts()


def test_names_that_are_unknown_are_ignored():
    later = {"modules": {"rnn": {"T": 5, "colour": "red"}}, "planets": {"mars": {}}}
    assert Facts.from_plain(later) == Facts(modules={"rnn": ModuleFacts(T=5)})


def test_a_module_may_be_called_like_a_fact():
    model = torch.nn.ModuleDict({"scaled": torch.nn.GRU(4, 8)})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradwatch.watch(model, dir=None, wandb=None) as watch:
        model["scaled"](batches(1)[0])[0].sum().backward()
        optimizer.step()
        told = watch.records[0].facts
    assert told.modules["scaled"].T == 6 and told.run.scaled is None
    assert told.streams["scaled.l0"].in_optimizer is True


def test_a_cell_and_its_stream_have_facts_of_their_own():
    torch.manual_seed(0)
    model = Loop(torch.nn.GRUCell(4, 8), 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradwatch.watch(model, dir=None, wandb=None) as watch:
        model(batches(1)[0]).sum().backward()
        optimizer.step()
        told = watch.records[0].facts
    assert told.modules["cell"].padding == 0.0
    assert told.streams["cell"].drive in ("input", "state", "both")


# ---- format 1: one dict


def flat(plain):
    """Return facts as format 1 had them."""
    found = {**plain.get("step", {}), **plain.get("run", {})}
    for scope in ("modules", "streams"):
        for name, own in plain.get(scope, {}).items():
            found[name] = {**found.get(name, {}), **own}
    return found


def flat_all(state):
    """Return a saved state with all facts in it as format 1 had them."""
    if not isinstance(state, dict):
        return state
    return {k: flat(v) if k == "facts" else flat_all(v) for k, v in state.items()}


def test_facts_of_format_1_are_read_by_scope():
    old = {
        "nonfinite": ["rnn.weight_hh_l0"],
        "carriers": {"head.weight": 0.7},
        "cleared": False,
        "rnn": {"T": 6, "reach": "reached"},
        "cell": {"T": 9, "requires_grad": True, "drive": "input"},
    }
    assert Facts.from_plain(from_format_1(old)) == Facts(
        step=StepFacts(nonfinite=("rnn.weight_hh_l0",), carriers={"head.weight": 0.7}),
        run=RunFacts(cleared=False),
        modules={
            "rnn": ModuleFacts(T=6, reach="reached"),
            "cell": ModuleFacts(T=9),
        },
        streams={"cell": StreamFacts(requires_grad=True, drive="input")},
    )


def train(model, steps=12):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for x in batches(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def test_a_run_folder_of_format_1_is_read(tmp_path):
    model = lstm()
    with gradwatch.watch(model, dir=tmp_path, name="run") as watch:
        train(model)
    now = gradwatch.load(watch.dir)
    rows = [json.loads(s) for s in (watch.dir / "records.jsonl").open()]
    assert rows[0]["facts"]["modules"]["rnn"]["T"] == 6
    for row in rows:
        if "facts" in row:
            row["facts"] = flat(row["facts"])
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (watch.dir / "records.jsonl").write_text(lines)
    meta = json.loads((watch.dir / "meta.json").read_text())
    assert meta["format"] == 2
    (watch.dir / "meta.json").write_text(json.dumps({**meta, "format": 1}))
    assert list(gradwatch.load(watch.dir).records) == list(now.records)


@pytest.mark.parametrize("old", [False, True])
def test_a_saved_state_of_format_1_is_loaded_whole(old):
    model = lstm()
    with gradwatch.watch(model, dir=None) as watch:
        train(model)
        state = json.loads(json.dumps(watch.state_dict()))
    assert state["format"] == 2
    given = {**flat_all(state), "format": 1} if old else state
    if old:
        del given["format"]  # as it was then
    with gradwatch.watch(lstm(), dir=None) as second:
        second.load_state_dict(given)
        again = json.loads(json.dumps(second.state_dict()))
    # Facts of the step alone are in no state; the rest comes back as it was.
    assert again["pipeline"]["memory"] == state["pipeline"]["memory"]
    assert again["pipeline"]["rules"] == state["pipeline"]["rules"]
    assert again["step"] == state["step"]
