"""Which step, which norms, which change, in every kind of loop."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

import gradwatch
from gradwatch.depths.drain import Drain
from gradwatch.metrics import run_key
from testbed.models import batches, lstm
from tests import loops
from tests.causes.run import backward

NORM, CLIPPED, RATIO = map(run_key, ("grad_norm", "grad_norm_clipped", "clip_ratio"))
CLIP = 0.05


class Truth:
    """What the loop itself measured, to be compared with the records."""

    def __init__(self, model):
        self.model = model
        self.rows = []
        self.weight = None

    def norm(self):
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        return float(torch.stack([g.double().norm() for g in grads]).norm())

    def before(self):
        self.weight = self.model.rnn.weight_hh_l0.detach().clone()

    def add(self, pre, post, changed=True):
        now = self.model.rnn.weight_hh_l0.detach()
        change = float((now - self.weight).double().norm() / self.weight.norm())
        self.rows.append((pre, post, change if changed else None))


def compare(watch, rows, first=0):
    watch.flush()
    assert [r.step for r in watch.records] == list(range(first, first + len(rows)))
    for record, (pre, post, change) in zip(watch.records, rows, strict=True):
        measured = record.metrics
        assert measured[NORM] == pytest.approx(pre, rel=1e-5, nan_ok=True)
        if post is None:
            assert CLIPPED not in measured
        else:
            assert measured[CLIPPED] == pytest.approx(post, rel=1e-5)
            assert measured[RATIO] == pytest.approx(post / pre, rel=1e-4)
        key = "gradwatch/rnn/l0/update_ratio"
        if change is None:
            assert key not in measured
        else:
            assert measured[key] == pytest.approx(change, rel=1e-4)


def loss_of(model, x):
    return model(x).square().mean()


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), 0.5, **options)


def plain(model, truth, optimizer=None, data=None):
    optimizer = optimizer or sgd(model)
    for x in batches(6) if data is None else data:
        optimizer.zero_grad()
        loss_of(model, x).backward()
        step(model, truth, optimizer)


def step(model, truth, optimizer):
    pre = float(clip_grad_norm_(model.parameters(), CLIP))
    post = truth.norm()
    truth.before()
    optimizer.step()
    truth.add(pre, post)


def accumulated(times):
    def loop(model, truth):
        optimizer = sgd(model)
        for group in batches(3 * times).split(times):
            for x in group:
                (loss_of(model, x) / times).backward()
            step(model, truth, optimizer)
            optimizer.zero_grad()

    return loop


def zeroed_in_place(model, truth):
    optimizer = sgd(model)
    for x in batches(5):
        optimizer.zero_grad(set_to_none=False)
        loss_of(model, x).backward()
        step(model, truth, optimizer)


def scaled(unscale, fused=False, skip_at=None):
    def loop(model, truth):
        optimizer = torch.optim.Adam(model.parameters(), 1e-2, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for i, x in enumerate(batches(6)):
            optimizer.zero_grad()
            scale = scaler.get_scale() if i else 1024.0
            loss = loss_of(model, x)
            if i == skip_at:
                loss = loss * math.inf
            scaler.scale(loss).backward()
            pre = truth.norm() / scale
            post = pre
            if unscale:
                scaler.unscale_(optimizer)
                if math.isfinite(pre):
                    clip_grad_norm_(model.parameters(), CLIP)
                    post = truth.norm()
            truth.before()
            scaler.step(optimizer)
            scaler.update()
            if math.isfinite(pre):
                truth.add(pre, post)
            else:
                truth.rows.append((pre, None, None))

    return loop


def two_optimizers(recurrent_first):
    def loop(model, truth):
        rnn = torch.optim.SGD(model.rnn.parameters(), 0.5)
        head = torch.optim.SGD(model.head.parameters(), 0.1)
        order = (rnn, head) if recurrent_first else (head, rnn)
        for i, x in enumerate(batches(5)):
            model.zero_grad()
            loss_of(model, x).backward()
            pre = float(clip_grad_norm_(model.parameters(), CLIP))
            post = truth.norm()
            truth.before()
            for optimizer in order:
                optimizer.step()
            # The first step closes with its first optimizer: nothing else is known yet.
            truth.add(pre, post, changed=recurrent_first or i > 0)

    return loop


def lbfgs(model, truth):
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    for x in batches(3):
        norms = []

        def closure(x=x, norms=norms):
            optimizer.zero_grad()
            loss = loss_of(model, x)
            loss.backward()
            norms.append(truth.norm())
            return loss

        truth.before()
        optimizer.step(closure)
        truth.add(norms[-1], norms[-1])


def hand_written(model, truth):
    for x in batches(5):
        loss_of(model, x).backward()
        truth.rows.append((truth.norm(), None, None))
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(p.grad, alpha=0.1)
                p.grad = None


def failing_backward(model, truth):
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("out of memory, say")

    optimizer = sgd(model)
    for i, x in enumerate(batches(6)):
        optimizer.zero_grad()
        if i == 3:
            hidden = Fails.apply(model.rnn(x)[0])
            with pytest.raises(RuntimeError, match="out of memory"):
                model.head(hidden[-1]).square().mean().backward()
            optimizer.zero_grad()
        loss_of(model, x).backward()
        step(model, truth, optimizer)


def skipped_batch(model, truth):
    optimizer = sgd(model)
    for i, x in enumerate(batches(6)):
        optimizer.zero_grad()
        loss_of(model, x).backward()
        if i == 3:
            continue
        step(model, truth, optimizer)


def evaluation_between(model, truth):
    optimizer = sgd(model)
    for x in batches(5):
        optimizer.zero_grad()
        loss_of(model, x).backward()
        model.eval()
        with torch.no_grad():
            model(x)
        model(x)  # an evaluation that forgets no_grad
        model.train()
        step(model, truth, optimizer)


def stepping_in_backward(model, truth):
    optimizers = {p: torch.optim.SGD([p], 0.5) for p in model.parameters()}
    norms = []

    def on_grad(p):
        norms.append(float(p.grad.norm()))
        optimizers[p].step()
        p.grad = None

    hooks = [p.register_post_accumulate_grad_hook(on_grad) for p in optimizers]
    for x in batches(4):
        norms.clear()
        truth.before()
        loss_of(model, x).backward()
        total = math.hypot(*norms)
        truth.add(total, total)
    for hook in hooks:
        hook.remove()


def stepping_raises(model, truth):
    optimizer = sgd(model)
    plain(model, truth, optimizer, batches(2))
    broken = optimizer.param_groups[0].pop("lr")
    loss_of(model, batches(1)[0]).backward()
    with pytest.raises(KeyError):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = broken
    plain(model, truth, optimizer, batches(2, seed=3))


LOOPS = {
    "plain": plain,
    "zeroed in place": zeroed_in_place,
    "accumulation x3": accumulated(3),
    "accumulation x32": accumulated(32),
    "scaler, unscale_": scaled(True),
    "scaler, no unscale_": scaled(False),
    "scaler, fused, no unscale_": scaled(False, fused=True),
    "scaler, unscale_, inf": scaled(True, skip_at=3),
    "scaler, no unscale_, inf": scaled(False, skip_at=3),
    "scaler, inf at the first step": scaled(False, skip_at=0),
    "two optimizers, recurrent first": two_optimizers(True),
    "two optimizers, head first": two_optimizers(False),
    "LBFGS": lbfgs,
    "hand-written": hand_written,
    "exception in backward": failing_backward,
    "exception in step": stepping_raises,
    "skipped batch": skipped_batch,
    "evaluation between": evaluation_between,
    "optimizer in backward": stepping_in_backward,
}


@pytest.mark.parametrize("name", LOOPS)
def test_norms_and_numbers_of_every_loop(name):
    model = lstm()
    truth = Truth(model)
    with gradwatch.watch(model, dir=None) as watch:
        LOOPS[name](model, truth)
        compare(watch, truth.rows)
        if "scaler" in name:
            assert watch.alerts == []
        assert watch.health["failed"] == {}


# ---- loops written without sight of the clock, each with its truth


LIMITS = {
    "step is called twice": ("a first time is not foreseen", {"change": [0]}),
    "step retried at half the rate": ("a first time is not foreseen", {"change": [0]}),
    "conflicting gradients projected": (
        "no backward: what the optimizer is given stands in",
        {"pre": range(7)},
    ),
    "gradients averaged over copies": (
        "no backward: what the optimizer is given stands in",
        {"pre": range(6)},
    ),
    "dynamic loss scale by hand": (
        "nobody knows the scale",
        {"pre": range(2, 9)},
    ),
    "Lookahead around Adam": (
        "no hook sees what is done to the weights behind the optimizer",
        {"change": [2, 5]},
    ),
    "body unfrozen later": (
        "parameters that are new have no hook in the first backward",
        {"pre": [3]},
    ),
}
"""Loop -> why something cannot be known, and the rows where it is not."""


def unlike(one, other):
    if one is None or other is None:
        return one is not other
    if not math.isfinite(other):
        return math.isfinite(one)
    return one != pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"every": 1, "budget": None}], ids=["", "all"])
@pytest.mark.parametrize("name", loops.LOOPS)
def test_loops_as_people_write_them(name, options):
    model = lstm()
    truth = loops.Truth(model)
    with gradwatch.watch(model, dir=None, wandb=None, **options) as watch:
        loops.LOOPS[name](model, truth)
    assert watch.health["failed"] == {}
    assert [r.step for r in watch.records] == list(range(len(truth.rows)))
    wrong = {"pre": [], "post": [], "change": [], "skipped": []}
    for record, row in zip(watch.records, truth.rows, strict=True):
        of = record.metrics.get
        for column, measured, true in (
            ("pre", of(NORM), row.pre),
            ("post", of(CLIPPED), row.post),
            ("change", of("gradwatch/rnn/l0/update_ratio"), row.change),
        ):
            if unlike(measured, true):
                wrong[column].append(record.step)
        if ("skipped_step" in record.events) != row.skipped:
            wrong["skipped"].append(record.step)
    known = LIMITS.get(name, ("", {}))[1]
    for column, steps in wrong.items():
        assert set(steps) <= set(known.get(column, ())), column
    for column, steps in known.items():
        assert wrong[column], f"{name}: {column} is right at {steps}: no limit any more"


@pytest.mark.parametrize("name", loops.LOOPS)
def test_such_a_loop_trains_the_same(name):
    ends = []
    for watched in (False, True):
        model = lstm()
        if watched:
            watch = gradwatch.watch(model, dir=None, wandb=None, every=1, budget=None)
        loops.LOOPS[name](model, loops.Truth(model))
        if watched:
            watch.close()
        ends.append({k: v.clone() for k, v in model.state_dict().items()})
    assert ends[0].keys() == ends[1].keys()
    for key, value in ends[0].items():
        assert torch.equal(value, ends[1][key]), key


@pytest.mark.parametrize("clipping", [False, True])
def test_passes_before_the_first_optimizer_may_count_as_steps(clipping):
    """The limit of what can be told before any optimizer has stepped."""
    model = lstm()
    optimizer = sgd(model)
    with gradwatch.watch(model, dir=None) as watch:
        for group in batches(9).split(3):
            optimizer.zero_grad()
            for x in group:
                if not clipping:
                    optimizer.zero_grad()
                loss_of(model, x).backward()
                if clipping:
                    clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
    used = [CLIPPED in record.metrics for record in watch.records]
    assert used == [False, False, True, True, True]


# ---- the handle, and what is out of the ordinary


@pytest.mark.parametrize("on_alert", [None, "raise"])
@pytest.mark.parametrize("unscale", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_the_skipped_steps_of_a_scaler_are_counted(fused, unscale, on_alert):
    """A fused optimizer is called in these steps, too, and leaves the weights alone."""
    model = lstm()
    with gradwatch.watch(model, dir=None, on_alert=on_alert) as watch:
        scaled(unscale, fused=fused, skip_at=3)(model, Truth(model))
        watch.flush()
        skipped = [r.step for r in watch.records if "skipped_step" in r.events]
        assert skipped == [3]
        assert watch.latest[run_key("skipped")] == 1.0
        assert watch.alerts == []


@pytest.mark.parametrize("fused_first", [True, False])
def test_a_step_that_one_of_two_optimizers_refuses_is_not_skipped(fused_first):
    """The other one has moved weights by what is not finite."""
    model = lstm()
    fused = torch.optim.SGD(model.rnn.parameters(), 0.1, fused=True)
    plain = torch.optim.SGD(model.head.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    with gradwatch.watch(model, dir=None) as watch:
        for i, x in enumerate(batches(6)):
            fused.zero_grad(), plain.zero_grad()
            scaler.scale(loss_of(model, x) * (math.inf if i == 3 else 1)).backward()
            for mine in (fused_first, not fused_first):
                scaler.step(fused) if mine else plain.step()
            scaler.update()
    assert "skipped_step" not in watch.records[3].events
    assert [(a.kind, a.step) for a in watch.alerts] == [("nonfinite", 3)]


def test_a_first_overflow_of_a_scaler_that_nobody_passed_is_no_alert():
    model = lstm()
    with gradwatch.watch(model, dir=None) as watch:
        scaled(False, skip_at=0)(model, Truth(model))
        assert watch.alerts == []


@pytest.mark.parametrize("fused", [True, False])
def test_a_scaler_that_halves_for_ever_is_an_alert(fused):
    model = lstm()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    model.head.bias.register_hook(lambda grad: grad * math.nan)
    with gradwatch.watch(model, dir=None, scaler=scaler) as watch:
        for x in batches(14):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, x)).backward()
            scaler.step(optimizer)
            scaler.update()
        watch.flush()
        assert [(a.kind, a.step, a.cause) for a in watch.alerts] == [
            ("nonfinite", 10, "fp16_overflow")
        ]


def test_nan_gradients_that_the_user_skips_are_an_alert_and_a_skipped_step():
    model = lstm()
    optimizer = sgd(model)
    with gradwatch.watch(model, dir=None) as watch:
        for i, x in enumerate(batches(8)):
            optimizer.zero_grad()
            (loss_of(model, x) * (math.nan if i == 5 else 1)).backward()
            if i != 5:
                optimizer.step()
        watch.flush()
        assert [r.step for r in watch.records if "skipped_step" in r.events] == [5]
        assert [(a.kind, a.step) for a in watch.alerts] == [("nonfinite", 5)]


def test_a_refusing_clipper_skips_the_step_without_an_alert():
    model = lstm()
    optimizer = sgd(model)
    with gradwatch.watch(model, dir=None) as watch:
        for i, x in enumerate(batches(8)):
            optimizer.zero_grad()
            (loss_of(model, x) * (math.inf if i == 4 else 1)).backward()
            if i == 4:
                for p in model.parameters():
                    p.grad = None
            optimizer.step()
        watch.flush()
        assert len(watch.records) == 8
        assert watch.records[4].events == ("skipped_step",)
        assert watch.alerts == []


def test_a_refusing_clipper_skips_the_step_of_two_optimizers():
    model = lstm()
    pair = [sgd(model.rnn), sgd(model.head)]
    with gradwatch.watch(model, dir=None) as watch:
        for i, x in enumerate(batches(8)):
            model.zero_grad()
            (loss_of(model, x) * (math.inf if i == 4 else 1)).backward()
            if i == 4:
                model.zero_grad()
            for optimizer in pair:
                optimizer.step()
        watch.flush()
        skipped = [r.step for r in watch.records if "skipped_step" in r.events]
        assert [r.step for r in watch.records] == list(range(8)) and skipped == [4]
        assert watch.records[4].facts.step.skipped_by == "clipper"
        assert watch.alerts == []


class Late(Drain):
    """A transfer that is not over before it is waited for, as on an accelerator."""

    def __init__(self, parts):
        super().__init__(parts)
        self.over = False

    @property
    def immediate(self):
        return self.over

    def wait(self):
        self.over = True
        return super().wait()


@pytest.mark.parametrize("drain", [Drain, Late])
def test_a_refusal_raises_before_the_optimizer_steps(monkeypatch, drain):
    monkeypatch.setattr("gradwatch.depths.measured.Drain", drain)
    model = lstm()
    optimizer = sgd(model)
    with gradwatch.watch(model, dir=None, on_alert="raise") as watch:
        for x in batches(5):
            optimizer.zero_grad()
            loss_of(model, x).backward()
            optimizer.step()
        before = [p.clone() for p in model.parameters()]
        (loss_of(model, batches(1)[0]) * math.nan).backward()
        with pytest.raises(gradwatch.TrainingAlert, match="nonfinite at step 5"):
            optimizer.step()
        assert all(map(torch.equal, before, model.parameters()))
        assert watch.records[-1].facts.step.skipped_by == "refused"


def test_what_is_muted_is_not_refused():
    model = lstm()
    optimizer = sgd(model)
    with gradwatch.watch(
        model, dir=None, on_alert="raise", mute=["nonfinite"]
    ) as watch:
        for i, x in enumerate(batches(4)):
            optimizer.zero_grad()
            (loss_of(model, x) * (math.nan if i == 2 else 1)).backward()
            optimizer.step()  # as it would without a watch
        assert all(bool(p.isnan().all()) for p in model.head.parameters())
    assert not [r.step for r in watch.records if r.events]


# ---- the loss of a step


LOSS = run_key("loss")


def losses_of(watch):
    return [record.metrics.get(LOSS) for record in watch.records]


@pytest.mark.parametrize("when", ["before backward", "after it"])
def test_a_loss_that_is_not_found_is_of_the_step_it_was_logged_in(when):
    def by_hand(number, model, watch, optimizer):
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(p.grad, alpha=0.1)
                p.grad = None

    def used(number, model, watch, optimizer):
        optimizer.step()
        optimizer.zero_grad()

    def used_by_some(number, model, watch, optimizer):
        if number != 3:
            optimizer.step()
        optimizer.zero_grad()

    for finish in (by_hand, used, used_by_some):
        model = lstm()
        optimizer = sgd(model)
        spoilt = 3 if finish is used_by_some else None
        with gradwatch.watch(model, dir=None) as watch:
            for number, x in enumerate(batches(6)):
                loss = loss_of(model, x) * (math.nan if number == spoilt else 1)
                if when == "before backward":
                    watch.log(loss=float(number))
                backward(loss, known=False)
                if when == "after it":
                    watch.log(loss=float(number))
                finish(number, model, watch, optimizer)
        assert losses_of(watch) == [0, 1, 2, 3, 4, 5], finish


def test_the_loss_of_a_skipped_step_may_be_nan():
    model = lstm()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with gradwatch.watch(model, dir=None, scaler=scaler) as watch:
        for number, x in enumerate(batches(6)):
            optimizer.zero_grad()
            loss = loss_of(model, x) * (math.nan if number == 3 else 1)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    losses = losses_of(watch)
    assert [math.isnan(loss) for loss in losses] == [n == 3 for n in range(6)]


def test_a_loss_logged_after_the_optimizer_is_of_the_next_step():
    """It is too late for the step: the record of that is made as the step closes."""
    model = lstm()
    optimizer = sgd(model)
    with gradwatch.watch(model, dir=None) as watch:
        for number, x in enumerate(batches(4)):
            optimizer.zero_grad()
            backward(loss_of(model, x), known=False)
            optimizer.step()
            watch.log(loss=float(number))
    assert losses_of(watch) == [None, 0, 1, 2]


# ---- parameters that come and go


def test_a_gradient_set_by_hand_counts_beside_those_of_backward():
    """Of a parameter that the loss does not reach: nothing was noted of it."""
    model = lstm()
    model.register_parameter("extra", nn.Parameter(torch.zeros(3)))
    optimizer = sgd(model)
    with gradwatch.watch(model, dir=None) as watch:
        for x in batches(3):
            optimizer.zero_grad()
            loss_of(model, x).backward()
            model.extra.grad = torch.full((3,), 2.0)
            total = Truth(model).norm()
            optimizer.step()
            watch.flush()
            assert watch.latest[CLIPPED] == pytest.approx(total, rel=1e-5)


def test_a_body_unfrozen_later_with_an_optimizer_of_its_own():
    model = lstm()
    model.rnn.requires_grad_(False)
    head, body = sgd(model.head), sgd(model.rnn)
    truths = []
    with gradwatch.watch(model, dir=None) as watch:
        for number, x in enumerate(batches(8)):
            if number == 3:
                model.rnn.requires_grad_(True)
            model.zero_grad()
            loss_of(model, x).backward()
            truths.append(Truth(model).norm())
            head.step()
            if number >= 3:
                body.step()
    assert [r.step for r in watch.records] == list(range(8))
    norms = [record.metrics[NORM] for record in watch.records]
    assert norms[:3] == pytest.approx(truths[:3], rel=1e-5)
    assert norms[4:] == pytest.approx(truths[4:], rel=1e-5)


def test_a_norm_that_overflows_float32_is_not_a_nan():
    model = lstm()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with gradwatch.watch(model, dir=None) as watch:
        for x in batches(3):
            optimizer.zero_grad()
            loss_of(model, x).backward()
            for p in model.parameters():
                p.grad.fill_(1e30)
            optimizer.step()
        watch.flush()
        count = sum(p.numel() for p in model.parameters())
        last = watch.records[-1].metrics
        assert last[CLIPPED] == pytest.approx(1e30 * math.sqrt(count), rel=1e-5)
        assert watch.alerts == []


def test_replaced_parameters_are_found_again():
    model = lstm()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with gradwatch.watch(model, dir=None) as watch:
        plain(model, Truth(model))
        model.load_state_dict(state, assign=True)
        truth = Truth(model)
        plain(model, truth)
        plain(model, truth)
        watch.flush()
        # The first step on new parameters is seen by the optimizer's hooks alone.
        assert len(watch.records) >= 6 + 11
        assert watch.records[-1].metrics[NORM] == pytest.approx(truth.rows[-1][0])


def test_a_manual_clock_counts_what_no_hook_sees():
    model = lstm()
    with gradwatch.watch(model, dir=None) as watch:
        for x in batches(3):
            grads = torch.autograd.grad(loss_of(model, x), list(model.parameters()))
            for p, g in zip(model.parameters(), grads, strict=True):
                p.grad = g
            watch.step()
        assert [r.step for r in watch.records] == [0, 1, 2]
        assert watch.records[-1].metrics[NORM] == pytest.approx(Truth(model).norm())


def test_norms_of_streams_add_up_to_the_module():
    model = lstm(num_layers=2, bidirectional=True)
    truth = Truth(model)
    with gradwatch.watch(model, dir=None) as watch:
        plain(model, truth)
        watch.flush()
        last = watch.records[-1].metrics
    parts = [
        last[f"gradwatch/{stream.key}/grad_norm_{group}"]
        for stream in watch.streams
        for group in ("hh", "ih", "bias")
    ]
    # The gradients are the clipped ones by now; their ratio is the same for all.
    total = math.hypot(*(float(p.grad.norm()) for p in model.rnn.parameters()))
    assert math.hypot(*parts) * last[RATIO] == pytest.approx(total, rel=1e-4)


def test_sparse_and_bfloat16_gradients_have_norms():
    torch.manual_seed(0)
    words = nn.Embedding(20, 4, sparse=True)
    model = lstm()
    model.add_module("words", words)
    ids = torch.randint(20, (6, 5))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradwatch.watch(model, dir=None) as watch:
        loss_of(model, words(ids)).backward()
        dense = [p.grad.to_dense() for p in model.parameters()]
        optimizer.step()
        expected = math.hypot(*(float(g.norm()) for g in dense))
        watch.flush()
        assert watch.latest[NORM] == pytest.approx(expected, rel=1e-5)
    half = lstm().bfloat16()
    optimizer = torch.optim.SGD(half.parameters(), 0.1)
    with gradwatch.watch(half, dir=None) as watch:
        loss_of(half, batches(1)[0].bfloat16()).backward()
        expected = Truth(half).norm()
        optimizer.step()
        assert watch.latest[NORM] == pytest.approx(expected, rel=1e-5)
