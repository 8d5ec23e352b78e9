"""Axes that are taken for each other: what is measured of them, and what is told."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import gradwatch
from gradwatch.hooks.graph import look, mixes_axes, views_of_states
from gradwatch.numerics.axes import roughness
from gradwatch.numerics.readout import negative_targets


def rough_slowly(lines):
    """The von Neumann ratio of lines of vectors, pair by pair."""
    gaps, spread, entries = [], 0.0, 0
    for line in lines:
        mean = line.mean(0)
        gaps += [((b - a) ** 2).sum() for a, b in itertools.pairwise(line)]
        spread += ((line - mean) ** 2).sum()
        entries += len(line) - 1
    gaps = [gap for gap in gaps if gap > 0]
    return (sum(gaps) / len(gaps)) / (2 * spread / entries)


def test_roughness_is_the_von_neumann_ratio_of_both_axes():
    generator = torch.Generator().manual_seed(0)
    for steps, rows, width in ((8, 9, 1), (20, 12, 3), (64, 64, 2)):
        x = torch.randn(steps, rows, width, generator=generator).cumsum(0)
        x[steps // 2 :, : rows // 3] = x[steps // 2, : rows // 3]  # padding
        found = roughness(x).tolist()
        exact = x.double().numpy()
        assert found[0] == pytest.approx(
            rough_slowly(np.moveaxis(exact, 1, 0)), rel=1e-4
        )
        assert found[1] == pytest.approx(rough_slowly(exact), rel=1e-4)


def test_roughness_of_what_has_no_two_neighbours_that_differ_is_not_known():
    assert all(map(math.isnan, roughness(torch.ones(9, 9, 2)).tolist()))


@pytest.mark.parametrize(
    ("before", "after", "mixes"),
    [
        ((20, 32, 8), (640, 8), False),
        ((640, 8), (20, 32, 8), False),
        ((20, 32, 8), (20, 32, 2, 4), False),
        ((20, 32, 8), (20, 128, 2), False),  # heads
        ((32, 20, 8), (32, 10, 16), False),  # pairs of steps
        ((32, 20, 8), (128, 5, 8), False),  # pieces of time
        ((1, 32, 8), (32, 8), False),
        ((20, 32, 8), (32, 20, 8), True),
        ((32, 16, 8), (16, 32, 8), True),
        ((32, 20), (20, 32), True),
        ((2, 32, 8), (32, 16), True),
        ((4, 32, 8), (32, 32), True),
        ((20, 32, 8), (32, 160), True),
    ],
)
def test_a_view_mixes_axes_or_does_not(before, after, mixes):
    assert mixes_axes(before, after) is mixes


def test_a_view_of_states_is_found_behind_other_weights():
    rnn, head = nn.GRU(3, 4, bidirectional=True), nn.Linear(8, 6)
    decoder, last = nn.RNN(6, 5), nn.Linear(5, 1)

    def loss(h):
        scores = last(decoder(head(h).expand(7, -1, -1))[0])
        return scores.square().mean()

    h = rnn(torch.randn(5, 10, 3))[1]
    assert list(views_of_states(loss(h.view(10, -1)))) == [((2, 10, 4), (10, 8))]
    assert not list(views_of_states(loss(h.transpose(0, 1).reshape(10, -1))))


def test_targets_below_0_are_seen_behind_a_relu():
    generator = torch.Generator().manual_seed(1)
    for scale in (1, 4):
        outputs = torch.randn(30, 2, generator=generator, requires_grad=True)
        targets = torch.randn(30, 2, generator=generator)
        (mse_loss(outputs.relu(), targets) / scale).backward()
        shown = outputs.detach() > 0
        exact = (targets < 0)[shown].float().mean().item()
        found = negative_targets(outputs.detach(), outputs.grad, 60).item()
        if scale == 1:
            assert found == pytest.approx(exact, abs=1e-6)
        assert 0 < found <= exact + 1e-6
        outputs.grad = None
        mse_loss(outputs.relu(), targets.abs()).backward()
        assert negative_targets(outputs.detach(), outputs.grad, 60).item() == 0


def test_of_how_many_errors_a_loss_is_the_mean():
    made = nn.Linear(3, 2)(torch.randn(5, 3)).relu()
    target = torch.zeros(5, 2)
    assert look(mse_loss(made, target)).mean_of == 10
    assert look(mse_loss(made, target) / 3).mean_of == 10
    assert look(3 * mse_loss(made, target)).mean_of == 0
    assert look(mse_loss(made, target, reduction="sum")).mean_of == 0


class Tagger(nn.Module):
    def __init__(self, **more):
        super().__init__()
        self.rnn, self.head = nn.GRU(3, 8, **more), nn.Linear(8, 1)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


def module_facts(model, give):
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    with gradwatch.watch(model, dir=None, wandb=None, budget=None) as watch:
        for _ in range(3):
            optimizer.zero_grad()
            give(model).square().mean().backward()
            optimizer.step()
    [facts] = [r.facts.modules["rnn"] for r in watch.records if r.facts.modules][-1:]
    return facts


def test_what_is_told_of_axes_is_told_of_fused_modules_cells_and_packed_input():
    start = torch.arange(40).mul(2.4).remainder(6.28)  # neighbours are far apart
    x = (torch.linspace(0, 3, 20)[:, None] + start).sin()[..., None].expand(20, 40, 3)
    facts = module_facts(Tagger(), lambda m: m(x))
    assert (facts.input_order, facts.sequences_read, facts.steps_read) == ("time", 1, 1)
    facts = module_facts(Tagger(), lambda m: m(x.transpose(0, 1)))
    assert facts.input_order == "batch"
    facts = module_facts(Tagger(), lambda m: m(x)[-1])
    assert (facts.sequences_read, facts.steps_read) == (1, 0.05)
    facts = module_facts(Tagger(), lambda m: m(x)[:, 3])
    assert (facts.sequences_read, facts.steps_read) == (0.03, 1)
    facts = module_facts(Tagger(), lambda m: m(x[:5, :5]))  # too short to tell
    assert facts.input_order is None

    def in_pieces(model):
        state, parts = None, []
        for piece in x[:, :1].split(5):
            out, state = model.rnn(piece, state)
            parts.append(out)
        return model.head(torch.cat(parts))

    facts = module_facts(Tagger(), in_pieces)
    assert (facts.T, facts.B, facts.call_steps) == (20, 1, 5)
