"""Clippers: what they let through, what they refuse, and what they remember."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gradwatch
from gradwatch.clip import AGC, AutoClip, LogZClip, NormClip, ZClip
from gradwatch.record import Incident
from testbed import reference
from testbed.models import Tagger
from tests.support.ranks import on_ranks
from tests.support.seldom import seldom

CLIPPERS = {
    "NormClip": NormClip,
    "AutoClip": AutoClip,
    "ZClip": ZClip,
    "LogZClip": LogZClip,
    "AGC": AGC,
}
ADAPTIVE = {k: v for k, v in CLIPPERS.items() if k in ("AutoClip", "ZClip", "LogZClip")}


def params(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(size, generator=generator)) for size in sizes]


def give(held, factor=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in held:
        p.grad = factor * torch.randn(p.shape, generator=generator, dtype=p.dtype)


def flat(held):
    return torch.cat([p.grad.double().flatten() for p in held])


# ---- against a slower truth


@given(st.integers(0, 10_000), st.floats(1e-3, 1e3), st.floats(1e-6, 1e6))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_norm_clip_is_torchs(seed, limit, size):
    held, theirs = params((4, 3), (7,)), params((4, 3), (7,))
    give(held, size, seed)
    give(theirs, size, seed)
    before = reference.norm([p.grad for p in held])
    result = NormClip(limit).clip_(held)
    nn.utils.clip_grad_norm_(theirs, limit)
    assert math.isclose(result.norm, before, rel_tol=1e-5)
    after = reference.norm([p.grad for p in held])
    assert after <= limit * (1 + 1e-5) or result.ratio == 1
    assert math.isclose(result.ratio * result.norm, after, rel_tol=1e-5)
    for p, q in zip(held, theirs, strict=True):
        # torch divides by the norm and 1e-6
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5 + 1e-6 / before, atol=0)


@pytest.mark.parametrize("kind", ADAPTIVE)
def test_thresholds_follow_a_slower_reference(kind):
    generator = np.random.default_rng(0)
    norms = np.exp(generator.normal(0, 0.3, 300))
    norms[[60, 61, 200]] *= 50
    clipper, [p] = CLIPPERS[kind](), params((1,))
    got = []
    for norm in norms:
        p.grad = torch.tensor([norm], dtype=torch.float32)
        got.append(clipper.clip_([p]).threshold)
    wanted = getattr(reference, kind.lower() + "_thresholds")(norms.tolist())
    np.testing.assert_allclose(got, wanted, rtol=1e-4)


def test_auto_clip_forgets_what_is_beyond_its_window():
    norms = np.exp(np.random.default_rng(0).normal(0, 1, 60)).tolist()
    clipper, [p] = AutoClip(40, window=7), params((1,))
    for n, norm in enumerate(norms):
        p.grad = torch.tensor([norm])
        wanted = np.percentile(norms[max(n - 6, 0) : n + 1], 40)
        assert math.isclose(clipper.clip_([p]).threshold, wanted, rel_tol=1e-5)


def test_agc_is_unit_wise():
    weight, bias = params((5, 4), (5,))
    with torch.no_grad():
        weight[0] = 0.0  # counts as 1e-3
    give([weight, bias], 10.0)
    weight.grad[1] *= 1e-6  # small enough already
    old = weight.grad.clone(), bias.grad.clone()
    result = AGC(0.01).clip_([weight, bias])
    for i in range(5):
        limit = 0.01 * max(weight[i].norm().item(), 1e-3)
        factor = min(1.0, limit / old[0][i].norm().item())
        torch.testing.assert_close(weight.grad[i], factor * old[0][i])
    limit = 0.01 * bias.norm().item()
    torch.testing.assert_close(bias.grad, limit / old[1].norm() * old[1])
    assert math.isnan(result.threshold)
    after = reference.norm([weight.grad, bias.grad])
    assert math.isclose(result.ratio, after / reference.norm(old), rel_tol=1e-5)


# ---- ten thousand steps with NaN and spikes


@pytest.mark.parametrize("kind", seldom(CLIPPERS, list(CLIPPERS)[1:3]))
def test_ten_thousand_steps_with_nan_and_spikes(kind):
    torch.manual_seed(0)
    held = params((8, 4), (8,))
    optimizer = torch.optim.Adam(held, 1e-3)
    clipper = CLIPPERS[kind]()
    rng = np.random.default_rng(1)
    broken, sizes = 0, []
    last = None
    for step in range(10_000):
        size = float(np.exp(rng.normal(0, 0.2))) * (1e4 if step % 100 == 50 else 1.0)
        give(held, size, step)
        nan = step % 100 == 7
        if nan:
            held[step // 100 % 2].grad[0] = math.nan if step % 200 == 7 else math.inf
            before = [p.detach().clone() for p in held]
            moments = copy.deepcopy(optimizer.state_dict()["state"])
        whole = flat(held)
        result = clipper.clip_([("w", held[0]), ("b", held[1])])
        assert result.skipped == nan
        if nan:
            broken += 1
            assert (
                result.nonfinite == (("w", "b")[step // 100 % 2],) and result.ratio == 0
            )
            assert all(p.grad is None for p in held)
        elif kind != "AGC" and step % 10 == 0:
            cosine = nn.functional.cosine_similarity(whole, flat(held), dim=0)
            assert math.isclose(cosine.item(), 1.0, abs_tol=1e-6)
        optimizer.step()
        if nan:
            assert all(torch.equal(p, q) for p, q in zip(held, before, strict=True))
            now = optimizer.state_dict()["state"]
            for i, state in moments.items():
                assert all(torch.equal(v, now[i][k]) for k, v in state.items())
        if step in (1500, 9999):
            sizes.append(len(json.dumps(clipper.state_dict())))
        last = result
    assert clipper.refused == broken == 100 and clipper.steps == 10_000
    assert all(p.isfinite().all() for p in held)
    assert all(v.isfinite().all() for s in optimizer.state.values() for v in s.values())
    text = json.dumps(clipper.state_dict(), allow_nan=False)
    assert math.isfinite(last.threshold) or kind == "AGC"
    assert sizes[1] < 1.1 * sizes[0] and len(text) < 60_000
    if kind in ("ZClip", "LogZClip"):
        assert 0.008 < clipper.clipped / 9_900 < 0.05  # the spikes, and little else


# ---- refusal


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_refusal_names_what_was_broken_and_says_so_seldom(bad, lines):
    held = params((3,), (2,))
    clipper = NormClip(patience=None)
    for _ in range(20):
        give(held)
        held[1].grad[0] = bad
        result = clipper.clip_(held)
        assert result.nonfinite == (1,) and not math.isfinite(result.norm)
    said = [text for level, text in lines if level == "WARNING"]
    assert len(said) == 5 and "the gradients of 1 hold NaN or Inf (1 in all)" in said[0]


def test_patience_ends():
    held = params((3,))
    clipper = LogZClip(patience=3)
    for refused in (2, 2):  # a good step in between starts the count anew
        for _ in range(refused):
            give(held, math.nan)
            assert clipper.clip_(held).skipped
        give(held)
        assert not clipper.clip_(held).skipped
    give(held, math.nan), clipper.clip_(held)
    give(held, math.nan), clipper.clip_(held)
    give(held, math.nan)
    with pytest.raises(FloatingPointError, match="3 consecutive steps were refused"):
        clipper.clip_(held)
    assert held[0].grad is None


def test_a_norm_that_overflows_is_not_broken():
    held = params((1000,))
    held[0].grad = torch.full((1000,), 1e38)
    result = NormClip(1.0).clip_(held)
    assert not result.skipped and math.isclose(
        result.norm, 1e38 * 1000**0.5, rel_tol=1e-5
    )
    assert math.isclose(reference.norm([held[0].grad]), 1.0, rel_tol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_and_a_mixture(dtype):
    held = [*params((40,)), nn.Parameter(torch.zeros(40, dtype=dtype))]
    give(held, 100.0)
    before = reference.norm([p.grad for p in held])
    result = NormClip(1.0).clip_(held)
    assert math.isclose(result.norm, before, rel_tol=1e-3)
    assert math.isclose(reference.norm([p.grad for p in held]), 1.0, rel_tol=1e-2)


@pytest.mark.parametrize("kind", CLIPPERS)
def test_sparse_gradients(kind):
    table = nn.Embedding(20, 4, sparse=True)
    table(torch.tensor([1, 1, 3])).square().sum().mul(1e3).backward()
    optimizer = torch.optim.SGD(table.parameters(), 0.1)
    result = CLIPPERS[kind]().clip_(table.parameters())
    assert result.norm > 1 and not result.skipped
    optimizer.step()
    table.weight.grad = None
    table(torch.tensor([2])).sum().mul(math.nan).backward()
    assert CLIPPERS[kind]().clip_(table.parameters()).skipped
    assert table.weight.grad is None


@pytest.mark.parametrize("kind", CLIPPERS)
def test_nothing_to_clip(kind):
    clipper, held = CLIPPERS[kind](), params((3,), ())
    result = clipper.clip_(held)
    assert result.norm == 0 and result.ratio == 1 and not result.skipped
    give(held, 0.0)
    assert clipper.clip_(held).ratio == 1
    for _ in range(60):
        give(held)
        assert math.isfinite(clipper.clip_(held).ratio)


@pytest.mark.parametrize("size", [1e20, 1e37])
@pytest.mark.parametrize("kind", CLIPPERS)
def test_gradients_near_the_end_of_float32(kind, size):
    held = params((4, 4), (4,))
    clipper = CLIPPERS[kind]()
    for step in range(30):
        give(held, 1.0, step)
        clipper.clip_(held)
    give(held, size)
    before = flat(held)
    result = clipper.clip_(held)
    assert not result.skipped and 0 < result.ratio < 1
    assert 1e-4 < flat(held).norm() < 20
    if kind != "AGC":
        cosine = nn.functional.cosine_similarity(before / size, flat(held), dim=0)
        assert math.isclose(cosine.item(), 1.0, abs_tol=1e-6)


def test_agc_with_weights_that_are_broken_or_huge():
    for weight in (1e20, math.nan):
        held = [nn.Parameter(torch.full((3, 3), weight))]
        give(held, 1e20)
        result = AGC().clip_(held)
        assert held[0].grad.isfinite().all() and 0 < result.ratio <= 1


def test_a_float64_norm_that_would_overflow():
    held = [nn.Parameter(torch.zeros(3, dtype=torch.float64))]
    held[0].grad = torch.full((3,), 1e200, dtype=torch.float64)
    result = NormClip(1.0).clip_(held)
    assert not result.skipped and math.isclose(result.norm, 3**0.5 * 1e200)
    assert math.isclose(held[0].grad.norm().item(), 1.0, rel_tol=1e-6)


def test_half_precision_gradients_get_the_factor_unrounded():
    held = [nn.Parameter(torch.zeros(8, dtype=torch.float16))]
    held[0].grad = torch.full((8,), 1000.0, dtype=torch.float16)
    NormClip(0.01).clip_(held)
    assert math.isclose(held[0].grad.double().norm().item(), 0.01, rel_tol=2e-3)


def test_z_clip_after_a_constant_start():
    clipper, [p] = ZClip(), params((1,))
    for size in [1.0] * 30 + [1e6, 1.0]:
        p.grad = torch.tensor([size])
        result = clipper.clip_([p])
    assert result.ratio == 1.0 and result.threshold < 1.1


def test_shared_parameters_count_once():
    [p] = params((3,))
    give([p], 10.0)
    before = p.grad.norm().item()
    assert math.isclose(NormClip().clip_([p, p]).norm, before, rel_tol=1e-6)
    assert math.isclose(p.grad.norm().item(), 1.0, rel_tol=1e-5)


def test_the_optimizers_other_parameters_refuse_the_step_too():
    one, two = params((3,), (2,))
    optimizer = torch.optim.SGD([{"params": [one]}, {"params": [two], "lr": 1.0}], 0.1)
    give([one, two], 100.0)
    big = two.grad.clone()
    assert NormClip().clip_([one], optimizer=optimizer).ratio < 1
    assert torch.equal(two.grad, big)
    two.grad[0] = math.nan
    assert NormClip().clip_([one], optimizer=optimizer).skipped
    assert one.grad is None and two.grad is None


# ---- adaptive ones


@pytest.mark.parametrize("kind", ["ZClip", "LogZClip"])
def test_a_spike_is_held_at_what_is_usual(kind):
    clipper, held = CLIPPERS[kind](), params((50,))
    for step in range(100):
        give(held, 1.0, step)
        assert clipper.clip_(held).ratio > 0.8
    give(held, 1e6, 1)
    result = clipper.clip_(held)
    assert result.ratio < 1e-5 and flat(held).norm() < 20
    give(held, 1.0, 2)
    assert clipper.clip_(held).ratio == 1.0


def test_log_z_follows_a_new_level():
    """A net that opens up has gradients 100 times as large; it is not held for long."""
    clipper, held = LogZClip(), params((50,))
    for step in range(100):
        give(held, 1.0, step)
        clipper.clip_(held)
    ratios = []
    for step in range(60):
        give(held, 100.0, step)
        ratios.append(clipper.clip_(held).ratio)
    assert ratios[0] < 0.1 and min(ratios[40:]) == 1.0


def test_log_z_begins_from_the_median():
    clipper, held = LogZClip(), params((50,))
    for step in range(25):
        give(held, 1e8 if step in (2, 3, 9) else 1.0, step)
        assert clipper.clip_(held).ratio == 1.0
    give(held, 1e3, 1)
    assert clipper.clip_(held).ratio < 0.01


class Exploding:
    """Stands for a watch: an exploding incident, open or over."""

    until = None

    def __init__(self):
        self.health = {"state": "on"}

    @property
    def incidents(self):
        return [Incident(kind="exploding", severity="error", since=0, until=self.until)]


@pytest.mark.parametrize("kind", ADAPTIVE)
def test_a_statistic_is_not_begun_while_gradients_explode(kind):
    watch, held = Exploding(), params((50,))
    clipper = CLIPPERS[kind](watch=watch)
    for step in range(40):
        give(held, 1e8, step)
        assert clipper.clip_(held).threshold == 1.0
    watch.until = 40
    for step in range(40):
        give(held, 1.0, step)
        result = clipper.clip_(held)
    assert 5 < result.threshold < 20
    watch.until = None  # once begun it goes on
    give(held, 1.0)
    assert clipper.clip_(held).threshold > 5


def test_a_watch_that_was_closed_holds_nothing_back():
    watch, held = Exploding(), params((50,))
    clipper = LogZClip(watch=watch)
    give(held)
    assert clipper.clip_(held).threshold == 1.0
    watch.health["state"] = "off"
    give(held)
    assert clipper.clip_(held).threshold == math.inf


# ---- attached


def trained(clip, optimizer=torch.optim.SGD, steps=12, attach=False, **options):
    torch.manual_seed(0)
    model = Tagger(nn.LSTM(3, 8), 8)
    opt = optimizer(model.parameters(), 0.5, **options)
    clipper = clip()
    if attach:
        clipper.attach(opt)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(6, 4, 3, generator=generator)
        y = torch.randint(3, (4,), generator=generator)
        opt.zero_grad()
        (5 * nn.functional.cross_entropy(model(x), y)).backward()
        if not attach:
            clipper.clip_(model.parameters())
        opt.step()
    return model, clipper


@pytest.mark.parametrize("kind", CLIPPERS)
def test_attached_equals_in_the_loop(kind):
    (one, a), (two, b) = trained(CLIPPERS[kind]), trained(CLIPPERS[kind], attach=True)
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q)
    assert a.state_dict().keys() == b.state_dict().keys()
    assert a.steps == b.steps == 12 and list(a._norms) == list(b._norms)


def test_a_handle_ends_it_and_a_clipper_serves_one_optimizer():
    held = params((3,))
    optimizer = torch.optim.SGD(held, 0.1)
    clipper = NormClip()
    handle = clipper.attach(optimizer)
    with pytest.raises(ValueError, match="attached already"):
        clipper.attach(optimizer)
    handle.remove()
    handle.remove()
    give(held, 100.0)
    optimizer.step()
    assert clipper.steps == 0 and not optimizer._optimizer_step_pre_hooks
    again = clipper.attach(optimizer)
    handle.remove()  # it is over, and does not end the second
    with pytest.raises(ValueError, match="attached already"):
        clipper.attach(optimizer)
    twin = copy.deepcopy(clipper)
    twin.attach(optimizer).remove()
    again.remove()
    clipper.attach(torch.optim.SGD(held, 0.1))  # gone at once
    clipper.attach(optimizer)
    with pytest.raises(TypeError, match="got a Tagger; expected its parameters"):
        NormClip().attach(optimizer, parameters=Tagger(nn.RNN(1, 1), 1))
    with pytest.raises(TypeError, match="got a Tagger; expected a"):
        NormClip().attach(Tagger(nn.RNN(1, 1), 1))


def test_attached_to_several_groups_clips_the_part_that_is_named():
    model = Tagger(nn.RNN(3, 8), 8)
    groups = [{"params": model.rnn.parameters()}, {"params": model.head.parameters()}]
    optimizer = torch.optim.SGD(groups, 0.1)
    NormClip(1e-3).attach(optimizer, parameters=model.rnn.named_parameters())
    model(torch.randn(5, 4, 3)).square().sum().backward()
    head = model.head.weight.grad.clone()
    optimizer.step()
    assert torch.equal(model.head.weight.grad, head)
    assert reference.norm([p.grad for p in model.rnn.parameters()]) < 1.001e-3
    old = [p.detach().clone() for p in model.parameters()]
    model.head.bias.grad[0] = math.nan
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), old, strict=True))


def test_named_parameters_of_an_optimizer_are_named():
    torch.manual_seed(0)
    model = Tagger(nn.RNN(3, 8), 8)
    optimizer = torch.optim.SGD(model.named_parameters(), 0.1)
    clipper = NormClip(1e-6)
    clipper.attach(optimizer)
    model(torch.randn(5, 4, 3)).square().sum().backward()
    optimizer.step()
    assert "head.weight 59 %, head.bias 28 %" in repr(clipper)


@pytest.mark.parametrize("by_keyword", [True, False])
def test_a_closure_is_followed_by_the_clip(by_keyword):
    held = params((3,))
    optimizer = torch.optim.SGD(held, 1.0)
    NormClip(1e-2).attach(optimizer)
    old = held[0].detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = held[0].mul(1e3).sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)
    assert loss is not None
    assert math.isclose((held[0].detach() - old).norm().item(), 1e-2, rel_tol=1e-3)


@pytest.mark.parametrize("broken", [2, 3, 4, 5, 7])
def test_a_line_search_turns_back_from_a_nan(broken):
    def descend(attach):
        p = nn.Parameter(torch.tensor([3.0, -2.0]))
        optimizer = torch.optim.LBFGS([p], max_iter=10, line_search_fn="strong_wolfe")
        if attach:
            NormClip(1e9, patience=None).attach(optimizer)
        calls = []

        def closure():
            optimizer.zero_grad()
            calls.append(0)
            loss = (p.square() * torch.tensor([1.0, 9.0])).sum() + p.pow(4).sum()
            loss = loss * (math.nan if len(calls) == broken else 1.0)
            loss.backward()
            return loss

        for _ in range(4):
            optimizer.step(closure)
        return p.detach()

    assert descend(attach=True).norm() < 1e-3


def test_lbfgs_survives_a_nan():
    held = params((3,))
    optimizer = torch.optim.LBFGS(held, 0.1)
    clipper = NormClip(10.0)
    clipper.attach(optimizer)
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = held[0].square().sum()
        loss.backward()
        calls.append(0)
        if len(calls) == 4:
            held[0].grad[0] = math.nan
        return loss

    for _ in range(5):
        optimizer.step(closure)
    assert held[0].isfinite().all() and clipper.refused == 1


# ---- GradScaler


def scaled_steps(attach, optimizer=torch.optim.SGD, overflow=False, **options):
    torch.manual_seed(0)
    model = Tagger(nn.RNN(3, 8), 8)
    opt = optimizer(model.parameters(), 0.1, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    clipper = NormClip(0.05)
    results = []
    if attach:
        clipper.attach(opt)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(5, 4, 3, generator=generator)
        loss = model(x).square().sum()
        if overflow and step == 2:
            loss = loss * math.inf
        opt.zero_grad()
        scaler.scale(loss).backward()
        if not attach:
            scaler.unscale_(opt)
            results.append(
                clipper.clip_(model.parameters(), optimizer=opt, scaler=scaler)
            )
        scaler.step(opt)
        scaler.update()
    return model, clipper, scaler, results


@pytest.mark.parametrize("overflow", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_under_a_grad_scaler(overflow, fused):
    plain, a, scaler, _ = scaled_steps(False, overflow=overflow)
    hooked, b, other, _ = scaled_steps(True, overflow=overflow, fused=fused)
    for p, q in zip(plain.parameters(), hooked.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert scaler.get_scale() == other.get_scale() == (512.0 if overflow else 1024.0)
    np.testing.assert_allclose(a._norms, b._norms, rtol=1e-5)
    assert a.refused == overflow and a._in_row == 0


def test_gradients_that_are_still_scaled_are_a_clear_error():
    held = params((3,))
    optimizer = torch.optim.SGD(held, 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(held[0].sum()).backward()
    clipper = NormClip()
    with pytest.raises(
        ValueError, match=r"still multiplied by the loss scale \(1024\)"
    ):
        clipper.clip_(held, optimizer=optimizer, scaler=scaler)
    with pytest.raises(ValueError, match="without optimizer="):
        clipper.clip_(held, scaler=scaler)
    scaler.unscale_(optimizer)
    assert clipper.clip_(held, optimizer=optimizer, scaler=scaler).ratio < 1
    scaler.step(optimizer)
    with pytest.raises(ValueError, match="has run already"):
        clipper.clip_(held, optimizer=optimizer, scaler=scaler)
    off = torch.amp.GradScaler("cpu", enabled=False)
    assert clipper.clip_(held, optimizer=optimizer, scaler=off).ratio <= 1


def test_a_scaler_that_halves_for_ever_ends_too():
    held = params((3,))
    optimizer = torch.optim.SGD(held, 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    clipper = NormClip(patience=3)

    def train():
        for _ in range(20):
            scaler.scale(held[0].sum() * math.nan).backward()
            scaler.unscale_(optimizer)
            clipper.clip_(held, optimizer=optimizer, scaler=scaler)
            scaler.step(optimizer)
            scaler.update()

    with pytest.raises(FloatingPointError, match="3 consecutive steps"):
        train()
    assert clipper.refused == 6  # at 8, 4, 2 it was the scaler's business


# ---- beside a watch


@pytest.mark.parametrize("kind", ["NormClip", "LogZClip", "AGC"])
def test_a_watch_sees_what_an_attached_clipper_did(kind):
    torch.manual_seed(0)
    model = Tagger(nn.LSTM(3, 8), 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    results, clipper = [], CLIPPERS[kind]()
    keep = clipper._clip

    def noted(*args, **kwargs):
        results.append(keep(*args, **kwargs))
        return results[-1]

    clipper._clip = noted
    clipper.attach(optimizer)
    with gradwatch.watch(model, dir=None, wandb=None) as watch:
        for step in range(30):
            optimizer.zero_grad()
            (3 * model(torch.randn(6, 4, 3)).square().mean()).backward()
            if step == 20:
                model.rnn.weight_hh_l0.grad[0] = math.nan
            optimizer.step()
        before = dict(zip(*watch.records.series("gradwatch/grad_norm"), strict=True))
        after = dict(
            zip(*watch.records.series("gradwatch/grad_norm_clipped"), strict=True)
        )
        assert len(watch.records) == 30
        assert not [alert for alert in watch.alerts if alert.kind == "nonfinite"]
    for step, result in enumerate(results):
        if step != 20:
            assert math.isclose(before[step], result.norm, rel_tol=1e-4)
            assert math.isclose(
                after[step], result.ratio * result.norm, rel_tol=1e-4, abs_tol=1e-9
            )
    assert not [
        h for h in optimizer._optimizer_step_pre_hooks.values() if "tap" in str(h)
    ]
    assert len(optimizer._optimizer_step_pre_hooks) == 1


# ---- saved, copied, printed


@pytest.mark.parametrize("kind", CLIPPERS)
def test_a_saved_clipper_goes_on(kind):
    held = params((6,))
    one, two = CLIPPERS[kind](), CLIPPERS[kind]()
    for step in range(60):
        give(held, 1.0 + step % 7, step)
        one.clip_(held)
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for step in range(40):
        give(held, 30.0, step)
        a = one.clip_(held)
        give(held, 30.0, step)
        b = two.clip_(held)
        assert repr(a) == repr(b)
    assert repr(one) == repr(two)
    with pytest.raises(ValueError, match="is of a Other"):
        two.load_state_dict({"kind": "Other"})
    with pytest.raises(ValueError, match="lacks carried, clipped"):
        two.load_state_dict({})
    with pytest.raises(ValueError, match="lacks"):
        two.load_state_dict({"kind": kind})


def test_printed():
    clipper = NormClip(1.0)
    assert repr(clipper) == "NormClip: no step yet"
    big, small = params((3,), (3,))
    for step in range(8):
        give([big, small], 10.0 if step % 2 else 0.01, step)
        small.grad *= 0.01
        clipper.clip_([("big\x1b[31m", big), ("small", small)])
    text = repr(clipper)
    assert text.startswith("NormClip: 8 steps, 50 % clipped, 0 refused")
    assert "quartiles" in text and "threshold 1" in text
    assert "big\\x1b[31m 100 %, small 0 %" in text


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: NormClip(0), "max_norm is 0"),
        (lambda: NormClip(math.nan), "max_norm is nan"),
        (lambda: AutoClip(101), "at most 100"),
        (lambda: AutoClip(window=0), "window is 0"),
        (lambda: ZClip(-1), "z_max is -1"),
        (lambda: AGC(0), "clipping is 0"),
        (lambda: NormClip(patience=0), "patience is 0"),
    ],
)
def test_bad_settings_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_bad_parameters_are_named():
    with pytest.raises(TypeError, match="got a NoneType; expected parameters"):
        NormClip().clip_(None)
    with pytest.raises(TypeError, match="got a RNN; expected its parameters"):
        NormClip().clip_(nn.RNN(1, 1))
    with pytest.raises(TypeError, match="got str at position 0"):
        NormClip().clip_(["weight"])


SHARDED = """
import math
from torch import nn
from torch.distributed.fsdp import fully_shard
from gradwatch.clip import AGC, LogZClip, NormClip
mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
for make in (lambda: NormClip(0.1), LogZClip, AGC):
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    fully_shard(model, mesh=mesh)
    one, two = make(), make()
    for step in range(30):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        size = 1e4 if step == 28 else 1.0
        results = []
        for net, clipper in ((whole, one), (model, two)):
            net.zero_grad()
            (size * net(x).square().mean()).backward()
            results.append(clipper.clip_(net.named_parameters()))
        a, b = results
        assert math.isclose(a.norm, b.norm, rel_tol=1e-4), (a, b)
        assert math.isclose(a.ratio, b.ratio, rel_tol=1e-4), (a, b)
        for p, q in zip(whole.parameters(), model.parameters()):
            torch.testing.assert_close(p.grad, q.grad.full_tensor())
    model(torch.ones(4, 6)).sum().backward()
    model[2].weight.grad.to_local()[:1] *= math.nan if rank == 0 else 1.0
    result = two.clip_(model.named_parameters())
    assert result.skipped and result.nonfinite == ("2.weight",), result
    assert all(p.grad is None for p in model.parameters())
"""


@pytest.mark.skipif(
    torch.__version__ < "2.7", reason="fully_shard of torch 2.6 fails on a CPU"
)
def test_sharded_gradients_are_clipped_and_refused_on_every_rank(tmp_path):
    on_ranks(SHARDED, tmp_path)
