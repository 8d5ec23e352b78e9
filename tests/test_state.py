"""The state and spectrum depths end to end: what a watched training is told."""

import itertools
import math

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch import metrics
from testbed import reference
from testbed.models import Loop, Tagger, batches, lstm


def train(model, steps=6, data=None, lr=0.05, **watching):
    """Train under a watch that measures everything at every step."""
    options = {"every": 1, "budget": None, "dir": None, "flow_samples": None}
    optimizer = torch.optim.SGD(model.parameters(), lr)
    with gradwatch.watch(model, **(options | watching)) as watch:
        for x in batches(steps) if data is None else data:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        watch.flush()
        text = repr(watch)
    return watch, text


def of(watch, metric, stream="rnn/l0"):
    return watch.records.series(f"gradwatch/{stream}/{metric}")[1]


def depth_of(key):
    return metrics.of(key).depth


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.RNN, {}),
        (nn.RNN, {"nonlinearity": "relu"}),
        (nn.LSTM, {}),
        (nn.LSTM, {"proj_size": 5}),
        (nn.GRU, {"num_layers": 2, "bidirectional": True}),
    ],
)
def test_every_metric_of_the_catalogue_is_there_and_right(kind, options):
    torch.manual_seed(0)
    width = (options.get("proj_size") or 8) * (1 + options.get("bidirectional", 0))
    model = Tagger(kind(4, 8, **options), width)
    x = batches(1)[0]
    truth = reference.unrolled(model.rnn, [x[:, i] for i in range(x.shape[1])])
    weights = {k: v.detach().clone() for k, v in model.rnn.named_parameters()}
    watch, _ = train(model, 1)
    for stream in watch.streams:
        suffix = stream.name.removeprefix("rnn.")
        runs = truth[stream.layer, int(stream.direction == "reverse")]
        expected = reference.state_metrics(
            stream.kind, runs, weights[f"weight_hh_{suffix}"]
        )
        tanh = {"LSTM": "g", "GRU": "n"}.get(stream.kind)
        if tanh is not None:
            for metric in ("act_deriv", "act_deriv_rms", "saturated"):
                expected[metric] = expected[f"{metric}/{tanh}"]
            for metric in ("shut", "open"):
                own = [v for k, v in expected.items() if k.startswith(f"{metric}/")]
                expected[metric] = max(own)
        else:
            expected["gain_log10"] = 6 * math.log10(expected["chi"])
            rho = reference.spectral_radius(weights[f"weight_hh_{suffix}"])
            expected["rho_eff"] = rho * expected["act_deriv"]
            expected["rho_gain_log10"] = 6 * math.log10(expected["rho_eff"])
        for metric, value in expected.items():
            [got] = of(watch, metric, stream.key)
            assert got == pytest.approx(value, rel=1e-4, abs=1e-5), metric
        assert of(watch, "replay_mismatch", stream.key) <= 1e-5
        start = f"gradwatch/{stream.key}/"
        measured = {k.removeprefix(start) for k in watch.latest if k.startswith(start)}
        by_state = {name for name in measured if metrics.of(start + name) is None}
        by_state |= {n for n in measured - by_state if depth_of(start + n) == "state"}
        by_state -= {n for n in by_state if n.startswith("update_")}  # see test_parts
        assert by_state - {"replay_mismatch"} <= expected.keys()  # each has an oracle


def test_the_drift_of_rho_is_that_of_the_update_that_ends_the_step():
    torch.manual_seed(0)
    model = lstm()
    rhos = []
    model.rnn.register_forward_hook(
        lambda m, a, o: rhos.append(
            [reference.spectral_radius(w) for w in m.weight_hh_l0.detach().chunk(4)]
        )
    )
    watch, _ = train(model, 8)
    for index, gate in enumerate("ifgo"):
        drift = of(watch, f"rho_drift/{gate}")
        exact = [b[index] - a[index] for a, b in itertools.pairwise(rhos)]
        assert drift[:-1] == pytest.approx(exact, abs=2e-6)
        assert (of(watch, f"rho_drift_reliable/{gate}") == 1).all()
    lead = max(range(4), key=lambda g: rhos[-1][g])
    assert of(watch, "rho_drift")[-1] == of(watch, f"rho_drift/{'ifgo'[lead]}")[-1]
    total = of(watch, "rho_total_drift")[-1]
    assert total == pytest.approx(math.log(rhos[-1][lead] / rhos[0][lead]), rel=1e-4)
    trend = of(watch, "rho_trend")
    assert len(trend) == 5  # from the fourth radius on
    steps = list(range(8))
    expected = reference.theil_sen(steps, [r[lead] for r in rhos])
    assert trend[-1] == pytest.approx(expected, rel=1e-4)


def test_the_drift_of_a_projected_lstm_is_of_the_product():
    torch.manual_seed(0)
    model = lstm(proj_size=3)
    rhos = []

    def keep(module, args, output):
        gates = module.weight_hh_l0.detach().chunk(4)
        projection = module.weight_hr_l0.detach()
        rhos.append([reference.spectral_radius(g @ projection) for g in gates])

    model.rnn.register_forward_hook(keep)
    watch, _ = train(model, 5)
    for index, gate in enumerate("ifgo"):
        drift = of(watch, f"rho_drift/{gate}")
        exact = [b[index] - a[index] for a, b in itertools.pairwise(rhos)]
        assert drift[:-1] == pytest.approx(exact, abs=1e-5)


def test_parametrised_weights_have_no_drift_and_their_neighbours_do():
    torch.manual_seed(0)
    model = Tagger(nn.LSTM(4, 8, num_layers=2), 8)
    nn.utils.parametrizations.weight_norm(model.rnn, "weight_hh_l0")
    watch, _ = train(model, 3)
    keys = watch.records.keys()
    assert "gradwatch/rnn/l0/rho" in keys and "gradwatch/rnn/l0/rho_drift" not in keys
    assert len(of(watch, "rho_drift", "rnn/l1")) == 3
    assert len(of(watch, "act_deriv", "rnn/l0")) == 3


def test_gate_gradients_are_the_parts_of_the_whole():
    watch, _ = train(lstm(), 3)
    parts = [of(watch, f"grad_norm_hh/{gate}") for gate in "ifgo"]
    whole = of(watch, "grad_norm_hh")
    assert whole == pytest.approx([math.hypot(*p) for p in zip(*parts, strict=True)])


def test_gate_gradients_are_accumulated_and_unscaled():
    torch.manual_seed(0)
    model = lstm()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with gradwatch.watch(model, dir=None, every=1, scaler=scaler) as watch:
        for x in batches(2):
            scaler.scale(model(x).square().mean()).backward()
        scaler.step(optimizer)
        watch.flush()
        parts = [watch.latest[f"gradwatch/rnn/l0/grad_norm_hh/{g}"] for g in "ifgo"]
        whole = watch.latest["gradwatch/rnn/l0/grad_norm_hh"]
    assert whole == pytest.approx(math.hypot(*parts))
    assert whole < 1


def test_a_replay_that_fails_its_check_is_dropped_counted_and_explained():
    class Doubling(nn.GRU):
        def forward(self, x, hx=None):
            out, last = super().forward(x, hx)
            return 2 * out, last

    watch, text = train(Tagger(Doubling(4, 8), 8), 3)
    keys = watch.records.keys()
    assert "gradwatch/rnn/l0/act_deriv" not in keys
    assert of(watch, "replay_mismatch") == pytest.approx(0.5, rel=1e-3)
    assert "rnn.l0: states left out (3 times): the replay differs" in text
    assert "left out" in watch.records[0].facts.modules["rnn"].replay
    assert len(of(watch, "rho")) == 3 and watch.health["failed"] == {}


def test_states_that_are_not_finite_are_left_out():
    model = lstm()
    x = batches(2)
    x[1] = math.nan
    watch, text = train(model, data=x)
    assert len(of(watch, "act_deriv")) == 1
    assert "its states hold NaN or Inf" in text


def test_unknown_dropout_is_approximate_and_says_so():
    model = Tagger(nn.LSTM(4, 8, num_layers=2), 8)
    with gradwatch.watch(model, every=1, dir=None) as watch:
        model.rnn.dropout = 0.2
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        model(batches(1)[0]).square().mean().backward()
        optimizer.step()
        assert "approximate: dropout" in repr(watch)
        assert "gradwatch/rnn/l1/act_deriv" in watch.latest
        assert "gradwatch/rnn/l1/replay_mismatch" not in watch.latest


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_a_cell_in_a_loop_has_the_length_of_its_chain(cell):
    watch, text = train(Loop(cell(4, 8), 8), 2)
    assert watch.records[0].facts.modules["cell"].T == 6
    assert len(of(watch, "act_deriv", "cell")) == 2
    assert of(watch, "replay_mismatch", "cell").max() <= 1e-5
    assert "6/6" in text


def test_flow_samples_is_how_many_sequences_are_looked_at():
    """A batch whose sequences differ by ten times in size."""
    torch.manual_seed(0)
    model = Tagger(nn.RNN(4, 8), 8)
    x = torch.randn(6, 8, 4) * torch.tensor([0.01, 3.0] * 4)[:, None]
    small, _ = train(model, data=[x], flow_samples=4)  # every second one: the small
    torch.manual_seed(0)
    both, _ = train(Tagger(nn.RNN(4, 8), 8), data=[x], flow_samples=8)
    assert of(small, "h_norm") < 0.8 * of(both, "h_norm")


def test_dead_is_of_the_whole_batch_where_the_output_shows_it():
    torch.manual_seed(0)
    model = Tagger(nn.RNN(4, 8, nonlinearity="relu"), 8)
    x = 3 * batches(1, batch=16)[0]
    x[:, 0] = -5.0
    out = model.rnn(x)[0]
    expected = float((out.flatten(0, 1).amax(0) <= 0).float().mean())
    with torch.no_grad():
        one = float((out[:, 0].amax(0) <= 0).float().mean())
    watch, _ = train(model, data=[x], flow_samples=1)
    assert of(watch, "dead") == [expected] and one > expected


def test_the_first_micro_batch_is_measured():
    torch.manual_seed(0)
    model = lstm()
    short, long = torch.randn(3, 2, 4), torch.randn(9, 2, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradwatch.watch(model, every=1, dir=None) as watch:
        for x in (short, long):
            model(x).square().mean().backward()
        optimizer.step()
        watch.flush()
        assert watch.records[0].facts.modules["rnn"].T == 3


def test_evaluation_between_steps_is_not_measured():
    torch.manual_seed(0)
    model = lstm()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradwatch.watch(model, every=1, dir=None) as watch:
        for x in batches(3):
            model(torch.randn(20, 2, 4))  # gradients on, and never used
            with torch.no_grad():
                model(torch.randn(30, 2, 4))
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        watch.flush()
        told = [f for r in watch.records for f in r.facts.modules.values()]
        assert {facts.T for facts in told} == {6}


def test_captured_sequences_are_released_with_the_step():
    """A graph that the user keeps does not keep our copies."""
    model = lstm()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    kept = []
    with gradwatch.watch(model, every=1, dir=None) as watch:
        for x in batches(4):
            loss = model(x).square().mean()
            loss.backward(retain_graph=True)
            optimizer.step()
            kept.append(loss)
        [probe] = watch._engine._modules.probes
        assert all(c.sequences is None for c in probe._captures)
        assert all(not c.weights and not c.used for c in probe._captures)


def test_a_failure_of_the_replay_switches_off_the_states_alone(
    lenient, monkeypatch, lines
):
    def broken(*args):
        raise RuntimeError("out of luck")

    monkeypatch.setattr("gradwatch.depths.launch.trajectory", broken)
    watch, _ = train(lstm(), 3)
    assert "out of luck" in watch.health["failed"]["state"]
    assert len(of(watch, "rho")) == 3 and len(of(watch, "grad_norm_hh")) == 3
    said = [line for level, line in lines if level == "WARNING"]
    assert "state failed; training is not affected" in said[0]
    assert "state has failed 3 times" in said[1] and len(said) == 2
    assert watch.health["off"] == ["state"]


def test_the_table_shows_what_the_user_asked_for():
    torch.manual_seed(0)
    model = nn.ModuleList([Tagger(nn.LSTM(4, 8), 8)])
    relu = Tagger(nn.RNN(4, 8, nonlinearity="relu"), 8)
    _, text = train(model[0], 3)
    head, row, *_ = text.split("\n")
    for column in ("rho", "drift", "sigma'", "saturated"):
        assert column in head
    assert "-" not in row.split()
    assert "dead " in train(relu, 3)[1]


def test_a_resumed_run_goes_on_with_its_trend_and_reference():
    torch.manual_seed(0)
    model = lstm()
    watch, _ = train(model, 6)
    state = watch.state_dict()
    with gradwatch.watch(model, every=1, budget=None, dir=None) as again:
        again.load_state_dict(state)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        model(batches(1)[0]).square().mean().backward()
        optimizer.step()
        again.flush()
        assert "gradwatch/rnn/l0/rho_trend" in again.latest
        moved = again.latest["gradwatch/rnn/l0/rho_total_drift"]
    assert moved == pytest.approx(of(watch, "rho_total_drift")[-1], abs=0.05)
    assert moved != 0
