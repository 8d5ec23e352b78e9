"""On an accelerator: the numbers of the CPU, and nobody waits for them."""

import functools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.nn.utils import parametrizations, rnn

import gradwatch
from gradwatch.depths.drain import Drain
from gradwatch.metrics import run_key
from testbed.models import Loop, Tagger, batches
from tests.support import accelerator
from tests.support.accelerator import NAME, NOTED

pytestmark = pytest.mark.skipif(
    not accelerator.POSSIBLE, reason="this torch lets no Python be a device"
)
STEPS = 6
DRAIN = "depths/drain.py"


@pytest.fixture(scope="module")
def there():
    """Yield what runs a function in a process that has the device.

    One of its own: the device stays, and comes before the first backward.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, accelerator.register) as pool:
        yield lambda function, *args: pool.submit(function, *args).result(timeout=60)


# ---- what is trained there


class ReadsBoth(Loop):
    """A loss that reads h and c: what c gets through h depends on the device."""

    def forward(self, x):
        state = None
        for row in x:
            state = self.cell(row, state)
        return self.head(state[0] + state[1])


class Packs(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Tagger(nn.GRU(4, 8, bidirectional=True), 16)

    def forward(self, x):
        lengths = torch.tensor([6, 2, 5, 1, 3])
        return self.inner(rnn.pack_padded_sequence(x, lengths, enforce_sorted=False))


class HalfParametrized(nn.Module):
    """Two modules of one size, measured as one batch; one update is not known."""

    def __init__(self):
        super().__init__()
        self.first = nn.LSTM(4, 8)
        self.inner = Tagger(nn.LSTM(8, 8), 8)
        parametrizations.weight_norm(self.inner.rnn, "weight_hh_l0")

    def forward(self, x):
        return self.inner(self.first(x)[0])


class CarriesState(Tagger):
    def __init__(self):
        super().__init__(nn.LSTM(4, 8), 8)
        self.state = None

    def forward(self, x):
        out, state = self.rnn(x, self.state)
        self.state = tuple(part.detach() for part in state)
        return self.head(out[-1])


def nilpotent():
    """Return a model whose radius no bound pins down."""
    model = Tagger(nn.RNN(4, 40), 40)
    with torch.no_grad():
        model.rnn.weight_hh_l0.copy_(torch.diag(torch.full((39,), 3.0), 1))
    return model


def fused(kind, width=8, **options):
    return lambda: Tagger(kind(4, 8, **options), width)


def looped(kind):
    return lambda: Loop(kind(4, 8), 8)


MODELS = {
    "RNN": fused(nn.RNN),
    "RNN relu": fused(nn.RNN, nonlinearity="relu"),
    "LSTM": fused(nn.LSTM),
    "GRU": fused(nn.GRU),
    "RNNCell": looped(nn.RNNCell),
    "LSTMCell": looped(nn.LSTMCell),
    "GRUCell": looped(nn.GRUCell),
    "LSTMCell, both states read": lambda: ReadsBoth(nn.LSTMCell(4, 8), 8),
    "LSTM 2 layers bidirectional": fused(nn.LSTM, 16, num_layers=2, bidirectional=True),
    "LSTM wide": lambda: Tagger(nn.LSTM(4, 40), 40),
    "states carried": CarriesState,
    "half parametrized": HalfParametrized,
    "packed": Packs,
}
OTHERS = {
    "nilpotent": nilpotent,
    "dropout": fused(nn.GRU, num_layers=2, dropout=0.4),
}


class Run(NamedTuple):
    losses: list
    weights: dict
    rows: list
    waits: list
    copies: list
    threads: int


@functools.cache
def trained(name, device, watched=True, clears=True, on_alert=None, broken=None):
    """Train a model; of what is noted, only what the steps themselves have done."""
    torch.manual_seed(0)
    model = (MODELS | OTHERS)[name]().to(device)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2, foreach=False)
    watch = None
    if watched:
        watch = gradwatch.watch(
            model, every=1, budget=None, dir=None, on_alert=on_alert
        )
    inputs = [x.to(device) for x in batches(STEPS)]
    losses, rows = [], []
    NOTED.clear()
    torch.manual_seed(1)
    try:
        for NOTED.step, x in enumerate(inputs):
            if clears:
                optimizer.zero_grad()
            out = model(x)
            loss = mse_loss(out, torch.ones_like(out))
            if NOTED.step == broken:
                loss = loss * float("nan")
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            losses.append(loss.detach().clone())
            optimizer.step()
    except gradwatch.TrainingAlert:
        losses.append(torch.tensor(-1.0))
    waits = [wait for wait in NOTED.waits if wait.line]
    copies, threads = list(NOTED.copies), len(NOTED.threads)
    if watch is not None:
        watch.close()
        rows = [dict(record.metrics) for record in watch.records]
    return Run(
        [loss.item() for loss in losses],
        {key: value.tolist() for key, value in model.state_dict().items()},
        rows,
        waits,
        copies,
        threads,
    )


@pytest.mark.parametrize("name", [*MODELS, "dropout"])
def test_watched_training_is_bitwise_that_of_the_cpu(there, name):
    bare, watched = there(trained, name, "cpu", False), there(trained, name, NAME)
    assert watched.losses == bare.losses
    assert watched.weights == bare.weights
    assert watched.threads == 2  # backward has a thread of its own


@pytest.mark.parametrize("name", MODELS)
def test_every_depth_measures_what_it_does_on_the_cpu(there, name):
    cpu, device = there(trained, name, "cpu").rows, there(trained, name, NAME).rows
    assert len(device) == len(cpu) == STEPS
    assert run_key("loss_constant") in device[-1]
    for here, elsewhere in zip(device, cpu, strict=True):
        measured = {part for key in here for part in key.split("/")}
        assert {"grad_norm", "update_ratio", "rho", "act_deriv", "horizon"} <= measured
        assert {"loss", "update_gradient"} <= measured
        for row in (here, elsewhere):
            row.pop(run_key("overhead"))
        assert here.keys() == elsewhere.keys()
        for key, value in here.items():
            small = 1e-6 if key.endswith("replay_mismatch") else 0
            assert value == pytest.approx(elsewhere[key], rel=1e-6, abs=small), key


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_found_from_the_thread_that_called_backward(there, name):
    run = there(trained, name, NAME)
    found = [row[run_key("loss")] for row in run.rows]
    assert found == pytest.approx(run.losses, rel=1e-6)


@pytest.mark.parametrize("name", [*MODELS, "dropout"])
def test_a_step_is_one_copy_that_the_next_step_waits_for(there, name):
    run = there(trained, name, NAME)
    assert [step for step, _ in run.copies] == list(range(STEPS))
    asked = [*(line for _, line in run.copies), *(wait.line for wait in run.waits)]
    assert {line.split(":")[0] for line in asked} == {DRAIN}
    if name != "packed":  # whose model waits by itself, to order the sequences
        waited = [(wait.step, wait.of) for wait in run.waits]
        assert waited == [(step + 1, (step,)) for step in range(STEPS - 1)]


def drained():
    """Send numbers on their way, and overwrite them before they have come."""
    NOTED.clear()
    sent = torch.arange(4.0).to(NAME, non_blocking=True)
    drain = Drain({"part": {"one": sent[:1], "two": sent[1:].reshape(3, 1)}})
    sent.zero_()
    on_the_way = accelerator.on_the_way()
    host = drain.wait()["part"]
    drain.wait()
    return (
        on_the_way,
        {name: values.tolist() for name, values in host.items()},
        len(NOTED.waits),
    )


def test_numbers_that_come_late_are_those_that_were_sent(there):
    on_the_way, host, waits = there(drained)
    assert on_the_way == waits == 1
    assert host == {"one": [0.0], "two": [[1.0], [2.0], [3.0]]}


def test_to_raise_waits_once_a_step(there):
    run = there(trained, "LSTM 2 layers bidirectional", NAME, True, True, "raise")
    assert [wait.step for wait in run.waits] == list(range(STEPS))
    assert {wait.line.split(":")[0] for wait in run.waits} == {"numerics/norms.py"}


def test_to_raise_keeps_what_is_broken_from_the_weights(there):
    run = there(trained, "LSTM", NAME, True, True, "raise", 3)
    whole = there(trained, "LSTM", "cpu", True, True, "raise", 3)
    assert len(run.rows) == 4
    assert run.losses[-1] == -1.0
    assert run.weights == whole.weights


def test_a_radius_that_no_bound_pins_down_is_waited_for(there):
    run = there(trained, "nilpotent", NAME)
    asked = {wait.line.split(":")[0] for wait in run.waits}
    assert asked == {"numerics/spectral.py", DRAIN}
    steps = [w.step for w in run.waits if w.line.startswith("numerics/spectral.py")]
    assert len(steps) == len(set(steps))


def test_gradients_that_nobody_clears_are_looked_at_once(there):
    run = there(trained, "LSTM", NAME, True, False)
    lines = [w.line.split(":")[0] for w in run.waits]
    assert lines.count("hooks/clearing.py") == 1
    assert set(lines) == {"hooks/clearing.py", DRAIN}


# ---- the device itself


def waiting():
    """Return what each of a few operations is noted to wait."""
    x = torch.randn(3, 3).to(NAME, non_blocking=True)
    host = torch.randn(3, 3)
    operations = {
        "item": lambda: x[0, 0].item(),
        "bool": lambda: bool(torch.isfinite(x).all()),
        "tolist": x.tolist,
        "equal": lambda: torch.equal(x, x),
        "nonzero": x.nonzero,
        "mask": lambda: x[x > 0],
        "list as index": lambda: x[[0, 2]],
        "eigenvalues": lambda: torch.linalg.eigvals(x),
        "inverse": lambda: torch.linalg.inv(x),
        "to the host": x.cpu,
        "from the host": lambda: host.to(NAME),
        "into the host's": lambda: host.copy_(x, non_blocking=True),
        "a number": lambda: torch.tensor(1.0, device=NAME),
        "product": lambda: (x @ x).sum(),
        "slice": lambda: x[:, ::2].clone(),
        "factors": lambda: torch.linalg.qr(x),
        "made there": lambda: (
            torch.zeros(3, device=NAME) + torch.arange(3, device=NAME)
        ),
        "not blocking": lambda: host.to(NAME, torch.float64, non_blocking=True),
    }
    found = {}
    for name, operation in operations.items():
        NOTED.clear()
        operation()
        found[name] = bool(NOTED.waits)
    return found


def test_the_device_notes_what_waits_and_nothing_else(there):
    free = {"product", "slice", "factors", "made there", "not blocking"}
    assert {name for name, waits in there(waiting).items() if not waits} == free


def late_copy():
    """Return what is read before a wait, and after it."""
    x = torch.ones(2).to(NAME, non_blocking=True)
    place, event = x.to("cpu", non_blocking=True), torch.Event(NAME)
    event.record()
    x.zero_()
    before, known = place.tolist(), event.query()
    event.synchronize()
    return before, known, place.tolist(), event.query()


def test_who_reads_before_a_copy_has_come_reads_nothing(there):
    before, known, after, known_after = there(late_copy)
    assert before == [pytest.approx(float("nan"), nan_ok=True)] * 2
    assert after == [1.0, 1.0]
    assert (known, known_after) == (False, True)


def mixed():
    return torch.ones(2, device=NAME) * torch.ones(2)


def test_an_operation_across_devices_raises(there):
    with pytest.raises(RuntimeError, match=r"same device|of the host"):
        there(mixed)


def test_this_process_has_no_such_device():
    with pytest.raises(RuntimeError, match="device"):
        torch.empty(1, device=NAME)


def recorded(device, folder):
    """Train with a recorder and one bad batch; return its files and the steps."""
    torch.manual_seed(0)
    model = MODELS["LSTM"]().to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    inputs = [x.to(device) for x in batches(STEPS)]
    inputs[4] = inputs[4] * float("nan")
    watch = gradwatch.watch(model, dir=folder, name="run", wandb=None, recorder=2)
    steps = 0
    for x in inputs:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        steps += 1
    kept = watch._recorder.step
    watch.close()
    return sorted(p.name for p in watch.dir.rglob("*.pt")), steps, kept


def test_a_flight_recorder_records_what_was_there(there, tmp_path):
    files, steps, kept = there(recorded, NAME, tmp_path)
    assert files == ["4-nonfinite.pt"] and steps == STEPS and kept == 2
    found = gradwatch.reproduce(tmp_path / "run", model=MODELS["LSTM"]())
    assert found.place == "input" and found.repeats
