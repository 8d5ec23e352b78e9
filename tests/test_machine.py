"""What users do, in any order: the training is the same with a watch as without."""

import copy
import pickle

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import nn

import gradwatch
from tests.test_watch import hooks_of


class Model(nn.Module):
    """A fused layer, a cell in a loop, and a head; it can be told to fail."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(3, 4, num_layers=2, dropout=0.2)
        self.cell = nn.GRUCell(4, 4)
        self.head = nn.Linear(4, 2)
        self.fails = None

    def forward(self, x):
        out, _ = self.rnn(x)
        hidden = out.new_zeros(x.shape[1], 4)
        for row in out:
            hidden = self.cell(row, hidden)
        if self.fails is not None:
            raise self.fails
        return self.head(hidden)


class Twin:
    """One of two trainings that are given the same."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = Model()
        self.renew()

    def renew(self, kind=torch.optim.SGD):
        self.optimizer = kind(self.model.parameters(), 0.05)

    def train(self, seed, length, batch, spoil):
        torch.manual_seed(seed)
        dtype = self.model.head.weight.dtype
        x = torch.randn(length, batch, 3, dtype=dtype)
        self.optimizer.zero_grad()
        loss = self.model(x).square().mean() * spoil
        loss.backward()
        if bool(loss.isfinite()):
            self.optimizer.step()
        return loss.detach()

    def state(self):
        return [*self.model.state_dict().values(), torch.get_rng_state()]


class Machine(RuleBasedStateMachine):
    """Both are given the same; one of them is watched."""

    def __init__(self):
        super().__init__()
        self.bare, self.watched = Twin(), Twin()
        self.watch, self.seed, self.saved = None, 0, None

    def both(self, action):
        """Do something with both; what it returns or raises is the same."""
        found = []
        for twin in (self.bare, self.watched):
            torch.manual_seed(self.seed)
            try:
                result = action(twin)
            except (ValueError, RuntimeError, KeyboardInterrupt) as error:
                result = torch.tensor(float(len(type(error).__name__)))
            found.append([result, *twin.state()])
        for a, b in zip(*found, strict=True):
            assert a is b or torch.equal(a, b) or bool((a != a).all())
        self.seed += 1

    @rule(
        length=st.integers(1, 6),
        batch=st.integers(1, 3),
        spoil=st.sampled_from([1.0, 1.0, 1.0, float("nan")]),
    )
    def train(self, length, batch, spoil):
        self.both(lambda twin: twin.train(self.seed, length, batch, spoil))

    @rule(error=st.sampled_from([ValueError, KeyboardInterrupt]))
    def fail(self, error):
        def failing(twin):
            twin.model.fails = error()
            try:
                return twin.train(self.seed, 3, 2, 1.0)
            finally:
                twin.model.fails = None

        self.both(failing)

    @rule()
    def evaluate(self):
        def evaluated(twin):
            twin.model.eval()
            with torch.no_grad():
                x = torch.randn(4, 2, 3, dtype=twin.model.head.weight.dtype)
                out = twin.model(x)
            twin.model.train()
            return out

        self.both(evaluated)

    @rule()
    def accumulate(self):
        def twice(twin):
            x = torch.randn(4, 2, 3, dtype=twin.model.head.weight.dtype)
            for _ in range(2):
                twin.model(x).mean().backward()
            twin.optimizer.step()

        self.both(twice)

    @rule(kind=st.sampled_from([torch.optim.SGD, torch.optim.Adam]))
    def swap_optimizers(self, kind):
        self.both(lambda twin: twin.renew(kind))

    @rule(dtype=st.sampled_from([torch.float32, torch.float64]))
    def change_type(self, dtype):
        self.both(lambda twin: (twin.model.to(dtype), None)[1])

    @rule()
    def replace_weights(self):
        def replaced(twin):
            cell = twin.model.cell
            cell.weight_hh = nn.Parameter(torch.randn_like(cell.weight_hh))
            twin.renew()

        self.both(replaced)

    @rule(how=st.sampled_from([copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]))
    def copy_model(self, how):
        def copied(twin):
            made = how(twin.model)
            assert hooks_of(made) == []
            return made(torch.zeros(3, 1, 3, dtype=made.head.weight.dtype)).detach()

        self.both(copied)

    # ---- the watch

    @precondition(lambda self: self.watch is None)
    @rule(every=st.sampled_from([None, 1, 3]))
    def attach(self, every):
        before = torch.get_rng_state()
        self.watch = gradwatch.watch(
            self.watched.model, every=every, dir=None, wandb=None, budget=None
        )
        assert torch.equal(torch.get_rng_state(), before)

    @precondition(lambda self: self.watch is not None)
    @rule()
    def close(self):
        self.watch.close()
        assert self.watch.health["failed"] == {}
        self.watch = None
        assert hooks_of(self.watched.model) == []

    @precondition(lambda self: self.watch is not None)
    @rule(what=st.sampled_from(["pause", "resume", "probe_now", "flush", "__repr__"]))
    def ask(self, what):
        getattr(self.watch, what)()

    @precondition(lambda self: self.watch is not None)
    @rule()
    def save(self):
        self.saved = pickle.dumps(self.watch.state_dict())

    @precondition(lambda self: self.watch is not None and self.saved is not None)
    @rule()
    def load(self):
        self.watch.load_state_dict(pickle.loads(self.saved))

    @invariant()
    def the_watch_is_well(self):
        if self.watch is not None:
            assert self.watch.health["failed"] == {}
            assert len(self.watch.records) <= 1024

    def teardown(self):
        if self.watch is not None:
            self.watch.close()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "examples", [25, pytest.param(300, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_any_order_of_what_users_do(examples):
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
