"""Blocks of rows: what passes on, and when."""

import pytest
import torch

import gradwatch
from gradwatch.block import ROWS, Block, Extras
from gradwatch.facts import Facts, ModuleFacts
from gradwatch.pipeline import Pipeline
from gradwatch.record import StepRecord
from testbed.models import batches, lstm


def test_rows_are_records_on_demand():
    block = Block(("a", "b", "c"))
    facts = Facts(modules={"rnn": ModuleFacts(T=5)})
    block.add(7, 1.5, [1.0, None, 3.0], None)
    block.add(
        8,
        2.5,
        [1.0, 2.0, None],
        Extras(metrics={"d": 4.0}, facts=facts, events=("skipped_step",)),
    )
    assert list(block.records()) == [
        StepRecord(step=7, time=1.5, metrics={"a": 1.0, "c": 3.0}),
        StepRecord(
            step=8,
            time=2.5,
            metrics={"a": 1.0, "b": 2.0, "d": 4.0},
            facts=facts,
            events=("skipped_step",),
        ),
    ]


@pytest.fixture
def passed(monkeypatch):
    """Return the steps of each block that is passed on."""
    found, take = [], Pipeline.take

    def note(self, block):
        found.append(list(block.steps))
        return take(self, block)

    monkeypatch.setattr(Pipeline, "take", note)
    return found


def train(model, steps, loud_at=None):
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for i, x in enumerate(batches(steps)):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        (loss * 1e3 if i == loud_at else loss).backward()
        optimizer.step()


def test_blocks_close_at_fixed_numbers_of_steps_and_at_what_is_remarkable(passed):
    model = lstm()
    with gradwatch.watch(model, dir=None, wandb=None, budget=None):
        train(model, 48, loud_at=30)
    # 12 norms are needed before a step can be told to be usual; flow is due at 16 and
    # 32, and at 31, as the norm of step 30 made a rule ask for it.
    assert passed[:12] == [[n] for n in range(12)]
    assert passed[12:] == [
        [12, 13, 14, 15, 16],
        list(range(17, 31)),
        [31],
        [32],
        list(range(33, 48)),
    ]


def test_a_block_has_at_most_sixteen_rows(passed):
    model = lstm()
    with gradwatch.watch(model, dir=None, wandb=None, every=1000, budget=None):
        train(model, 80)
    lengths = [len(steps) for steps in passed]
    assert max(lengths) == ROWS and sum(lengths) == 80
    assert lengths[12:] == [ROWS] * 4 + [4]


def test_where_others_look_at_each_step_none_waits(passed):
    class Sink:
        def write(self, record, alerts=()):
            pass

        def close(self):
            pass

    model = lstm()
    with gradwatch.watch(model, dir=None, wandb=None, sinks=[Sink()]):
        train(model, 40)
    assert passed == [[n] for n in range(40)]
