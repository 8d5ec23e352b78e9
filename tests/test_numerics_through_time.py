"""The replay of a forward against a cell that is unrolled by hand in float64."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from gradwatch.depths.trajectory import Trajectory, trajectory
from gradwatch.numerics import activation, through_time
from gradwatch.numerics.through_time import Weights, replay_layer, turned
from gradwatch.recurrent import recurrences
from testbed import reference
from testbed.looking import STATES, looking_at
from testbed.replays import KINDS, Case, cases, errors

ALL = list(cases())
SOME = ALL[::11] + [case for case in ALL if case.chain]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def test_the_grid_has_every_layout_of_every_kind():
    assert len(ALL) >= 600 and {case.kind for case in ALL} == set(KINDS)
    fused = [c for c in SOME if not c.chain]
    for name, values in {"layers": {1, 2, 3}, "two_way": {True, False}}.items():
        assert {getattr(c, name) for c in fused} == values
    assert len({(c.kind, c.layout) for c in fused}) == 25


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_states_gates_and_metrics_are_those_of_an_unrolled_cell(dtype):
    for case in SOME:
        assert max(errors(case, dtype)) <= TOLERANCE[dtype], case


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_whole_grid(dtype):
    for case in ALL:
        assert max(errors(case, dtype)) <= TOLERANCE[dtype], case


# ---- laws


@pytest.mark.parametrize("lengths", [None, (3, 1, 5)])
def test_turning_twice_changes_nothing(lengths):
    x = torch.arange(30.0).reshape(5, 3, 2)
    lengths = None if lengths is None else torch.tensor(lengths)
    assert torch.equal(turned(turned(x, lengths), lengths), x)
    if lengths is not None:
        assert torch.equal(turned(x, lengths)[:3, 0], x[:3, 0].flip(0))
        assert torch.equal(turned(x, lengths)[3:, 0], x[3:, 0])


def constant_layer(kind, h, sigmoid=None):
    """A layer whose states are all the same."""
    states = torch.full((4, 2, 3), h, dtype=torch.float64)
    gates = None
    if sigmoid is not None:
        count = len(through_time.SIGMOID_GATES[kind])
        gates = torch.full((4, 2, count, 3), sigmoid, dtype=torch.float64)
    cell = states if kind == "LSTM" else None
    log = None if gates is None else gates[:, :, 1].log()
    return through_time.Layer(states, cell, states, gates, log)


def named(found):
    return {
        name: value
        for names, values in found
        for name, value in zip(names, values.reshape(-1).tolist(), strict=True)
    }


def test_what_the_metrics_are_at_the_ends_of_their_ranges():
    linear = named(activation.statistics("RNN_TANH", constant_layer("RNN_TANH", 1e-9)))
    assert linear["act_deriv"] == 1 and linear["saturated"] == 0
    flat = named(activation.statistics("RNN_TANH", constant_layer("RNN_TANH", 0.999)))
    assert flat["saturated"] == 1 and flat["act_deriv"] == pytest.approx(0.001999)
    assert flat["h_growth"] == pytest.approx(0)
    assert flat["h_norm"] == pytest.approx(0.999)
    off = named(activation.statistics("RNN_RELU", constant_layer("RNN_RELU", 0.0)))
    assert off["dead"] == 1 and off["act_deriv"] == 0
    assert off["h_growth"] != off["h_growth"]  # no state has a logarithm
    shut = named(activation.statistics("LSTM", constant_layer("LSTM", 0.1, 0.01)))
    assert shut["shut/i"] == shut["shut/f"] == shut["shut/o"] == 1
    assert shut["forget"] == pytest.approx(0.01)
    wide = named(activation.statistics("GRU", constant_layer("GRU", 0.1, 1.0)))
    assert wide["open/z"] == 1 and wide["timescale"] == 1e6
    half = named(activation.statistics("GRU", constant_layer("GRU", 0.1, 0.5)))
    assert half["act_deriv/r"] == 0.25
    assert half["timescale"] == pytest.approx(1.442695)


def test_an_exploding_state_grows_by_its_rate():
    weights = Weights(torch.zeros(2, 1), 1.1 * torch.eye(2))
    layer = replay_layer(
        "RNN_RELU", torch.zeros(20, 1, 1), torch.ones(1, 2), None, weights
    )
    found = named(activation.statistics("RNN_RELU", layer))
    assert found["h_growth"] == pytest.approx(0.0953102, rel=1e-4)


# ---- what the hooks saw


class Watched:
    """A module under a probe that looks at every call."""

    def __init__(self, module, samples=None):
        self.module = module
        self.probe = looking_at(module, STATES, samples)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.probe.close()

    def replay(self):
        chain = self.probe.take()
        return trajectory(recurrences(self.module), chain) if chain else None


def agrees(replayed, tolerance=1e-5):
    assert isinstance(replayed, Trajectory), replayed
    assert replayed.mismatch is not None and float(replayed.mismatch) <= tolerance
    return replayed


DROPPED = list(
    itertools.product(
        (nn.RNN, nn.LSTM, nn.GRU),
        (False, True),
        ("time first", "batch first", "unbatched", "packed"),
    )
)


@pytest.mark.parametrize("samples", [None, 2])
@pytest.mark.parametrize(("kind", "two_way", "layout"), DROPPED)
def test_dropout_between_layers_is_drawn_again_exactly(kind, two_way, layout, samples):
    torch.manual_seed(1)
    first = layout == "batch first"
    module = kind(
        4, 6, num_layers=3, dropout=0.4, bidirectional=two_way, batch_first=first
    )
    x = torch.randn(7, 5, 4)
    given = {"batch first": x.transpose(0, 1), "unbatched": x[:, 0]}.get(layout, x)
    if layout == "packed":
        given = nn.utils.rnn.pack_padded_sequence(
            x, torch.tensor([3, 7, 1, 5, 2]), enforce_sorted=False
        )
    with Watched(module, samples) as watched:
        out = watched.module(given)[0]
        data = out if isinstance(out, torch.Tensor) else out.data
        state = torch.get_rng_state()
        data.square().mean().backward()
        agrees(watched.replay(), 1e-6)
        assert torch.equal(torch.get_rng_state(), state)


def test_dropout_whose_draws_are_unknown_is_marked_approximate():
    torch.manual_seed(0)
    module = nn.LSTM(4, 6, num_layers=2)
    x = torch.randn(7, 5, 4)
    with Watched(module) as watched:
        module.dropout = 0.3  # after the hooks were put on
        module(x)[0].square().mean().backward()
        replayed = watched.replay()
        assert isinstance(replayed, Trajectory) and replayed.mismatch is None


def test_evaluation_mode_has_no_dropout():
    module = nn.GRU(4, 6, num_layers=2, dropout=0.5).eval()
    with Watched(module) as watched:
        module(torch.randn(7, 5, 4))[0].square().mean().backward()
        agrees(watched.replay())


@pytest.mark.parametrize(
    ("batch", "samples", "taken"),
    [(32, 4, [0, 8, 16, 24]), (5, 4, [0, 1, 2, 3]), (3, 4, [0, 1, 2]), (7, 2, [0, 3])],
)
def test_the_sequences_looked_at_are_spread_over_the_batch(batch, samples, taken):
    module = nn.GRU(4, 6)
    x = torch.randn(7, batch, 4)
    with Watched(module, samples) as watched:
        out = module(x)[0]
        out.sum().backward()
        layer = agrees(watched.replay()).layers[0][0]
        torch.testing.assert_close(layer.h, out[:, taken].detach())


def test_the_output_may_be_edited_in_place_after_the_call():
    module = nn.GRU(4, 6)
    x = torch.randn(7, 5, 4)
    with Watched(module) as watched:
        module(x)[0].mul_(0.5).sum().backward()
        x.fill_(9.0)
        agrees(watched.replay())


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_a_loop_over_a_cell_is_one_trajectory(kind):
    module = kind(4, 6)
    x = torch.randn(7, 5, 4)
    with Watched(module) as watched:
        state, out = None, []
        for row in x:
            state = module(row, state)
            out.append(state[0] if kind is nn.LSTMCell else state)
        out[-1].sum().backward()
        layer = agrees(watched.replay()).layers[0][0]
        torch.testing.assert_close(layer.h, torch.stack(out).detach())


def test_truncated_backpropagation_cuts_the_trajectory():
    module = nn.GRU(4, 6)
    x = torch.randn(10, 5, 4)
    with Watched(module) as watched:
        state, losses = None, []
        for number, row in enumerate(x):
            if number in (3, 8) and state is not None:
                state = state.detach()
            out, state = module(row[None], state)
            losses.append(out.square().mean())
        torch.stack(losses).sum().backward()
        replayed = agrees(watched.replay())
        assert len(replayed.layers[0][0].h) == 5  # the longest: steps 3 to 7


def test_a_state_that_was_edited_is_no_link():
    module = nn.GRUCell(4, 6)
    x = torch.randn(4, 5, 4)
    with Watched(module) as watched:
        state = module(x[0])
        state = module(x[1], state)
        with torch.no_grad():
            state.zero_()
        state = module(x[2], state)
        state.sum().backward()
        assert len(agrees(watched.replay()).layers[0][0].h) == 2


def test_states_of_another_call_at_the_same_address_are_no_link():
    module = nn.GRU(4, 6)
    with Watched(module) as watched:
        losses = []
        for _ in range(4):
            start = torch.zeros(1, 5, 6, requires_grad=True) * 1.0
            losses.append(module(torch.randn(3, 5, 4), start)[0].mean())
            del start
        torch.stack(losses).sum().backward()
        assert len(agrees(watched.replay()).layers[0][0].h) == 3


def test_calls_that_no_gradient_reaches_do_not_count():
    module = nn.GRU(4, 6)
    with Watched(module) as watched:
        used = module(torch.randn(5, 2, 4))[0]
        module(torch.randn(9, 2, 4))  # looked at, and thrown away
        with torch.no_grad():
            module(torch.randn(11, 2, 4))
        used.sum().backward()
        assert len(agrees(watched.replay()).layers[0][0].h) == 5


def test_steps_of_a_decoder_after_the_last_one_that_is_read_do_not_count():
    module = nn.GRUCell(4, 6)
    with Watched(module) as watched:
        state = module(torch.randn(3, 4))
        state = read = module(torch.randn(3, 4), state)
        for _ in range(3):
            state = module(torch.randn(3, 4), state)
        read.sum().backward()
        assert len(agrees(watched.replay()).layers[0][0].h) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda m: parametrizations.weight_norm(m, "weight_hh_l0"),
        lambda m: parametrizations.spectral_norm(m, "weight_ih_l0"),
        lambda m: parametrizations.orthogonal(m, "weight_hh_l0"),
    ],
)
def test_parametrised_weights_are_those_that_the_forward_used(change):
    torch.manual_seed(0)
    module = nn.RNN(4, 6)
    change(module)
    with Watched(module) as watched:
        module(torch.randn(7, 5, 4))[0].sum().backward()
        agrees(watched.replay())


def test_a_cell_with_every_weight_parametrised():
    module = nn.LSTMCell(4, 6)
    parametrizations.spectral_norm(module, "weight_hh")
    parametrizations.spectral_norm(module, "weight_ih")
    with Watched(module) as watched:
        state = None
        for row in torch.randn(5, 3, 4):
            state = module(row, state)
        state[0].sum().backward()
        replayed = watched.replay()
        # spectral_norm iterates at every read: the weights differ from call to call.
        assert isinstance(replayed, Trajectory)
        assert len(replayed.layers[0][0].h) == 5


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_autocast_to_bfloat16(kind):
    torch.manual_seed(0)
    module = kind(4, 6, num_layers=2)
    with Watched(module) as watched:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = module(torch.randn(7, 5, 4))[0]
        out.float().sum().backward()
        replayed = watched.replay()
        assert isinstance(replayed, Trajectory)
        assert replayed.tolerance == 3e-2 and float(replayed.mismatch) <= 3e-2


def test_weights_of_half_precision():
    torch.manual_seed(0)
    module = nn.GRU(4, 6).bfloat16()
    with Watched(module) as watched:
        module(torch.randn(7, 5, 4).bfloat16())[0].float().sum().backward()
        replayed = watched.replay()
        assert float(replayed.mismatch) <= replayed.tolerance == 3e-2


def test_a_module_that_does_something_else_is_noticed():
    class Doubling(nn.GRU):
        def forward(self, x, hx=None):
            out, last = super().forward(x, hx)
            return 2 * out, last

    class Summing(nn.GRU):
        def forward(self, x, hx=None):
            return super().forward(x, hx)[0].sum(-1)

    with Watched(Doubling(4, 6)) as watched:
        watched.module(torch.randn(7, 5, 4))[0].sum().backward()
        assert float(watched.replay().mismatch) == pytest.approx(0.5)
    with Watched(Summing(4, 6)) as watched:
        watched.module(torch.randn(7, 5, 4)).sum().backward()
        assert "its output is not that of the module" in watched.replay()


def test_one_step_and_one_sequence():
    module = nn.LSTM(4, 6)
    with Watched(module, 4) as watched:
        module(torch.randn(1, 1, 4))[0].sum().backward()
        replayed = agrees(watched.replay())
        found = named(activation.statistics("LSTM", replayed.layers[0][0]))
        assert found["h_growth"] != found["h_growth"] and found["h_norm"] > 0


def test_nothing_is_kept_after_the_step_even_where_the_graph_is():
    module = nn.GRU(4, 6)
    with Watched(module) as watched:
        out = module(torch.randn(7, 5, 4))[0]
        out.sum().backward(retain_graph=True)
        chain = watched.probe.take()
        watched.probe.used()
        watched.probe.forget()
        assert all(c.sequences is None and not c.weights and not c.used for c in chain)
        out.sum().backward()  # a second pass over the graph of a step that is over
        assert watched.probe.take() == []


def test_the_oracle_agrees_with_torch():
    """The reference is checked too, against the fused module itself."""
    torch.manual_seed(0)
    module = nn.LSTM(4, 6, num_layers=2, bidirectional=True).double()
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    out = module(x)[0]
    runs = reference.unrolled(module, [x[:, i] for i in range(3)])
    ahead = torch.stack([step["h"] for step in runs[1, 0][2]])
    back = torch.stack([step["h"] for step in runs[1, 1][2]]).flip(0)
    torch.testing.assert_close(torch.cat([ahead, back], 1), out[:, 2].detach())
    assert Case("LSTM").cell is False
