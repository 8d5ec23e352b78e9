"""Frameworks: real trainings, with their loggers and checkpoints."""

import ast
import gc
import importlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gradwatch
from gradwatch import integrations
from gradwatch.integrations.fit import Fit, needs
from testbed.frameworks import CLIP, FRAMEWORKS, Net

MODULES = {
    "lightning": "lightning",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "ignite": "ignite",
    "skorch": "skorch",
    "sb3": "sb3_contrib",
}
quiet = pytest.mark.filterwarnings("ignore:::(?!gradwatch)")


@pytest.fixture(scope="module", autouse=True)
def _frameworks_are_no_work_for_the_collector():
    """Their hundreds of thousands of objects would slow all tests that come after."""
    for name in MODULES.values():
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(name)
    gc.collect()
    gc.freeze()


@pytest.fixture(params=FRAMEWORKS)
def fit(request, tmp_path, monkeypatch):
    """The training of each framework that is installed, in a folder of its own."""
    pytest.importorskip(MODULES[request.param])
    monkeypatch.chdir(tmp_path)

    def run(**options):
        return FRAMEWORKS[request.param](tmp_path, **options)

    run.name = request.param
    return run


def points(folder):
    """Return the tags of all that TensorBoard would show, with their steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for path in {file.parent for file in folder.rglob("events.out.*")}:
        read = EventAccumulator(str(path)).Reload()
        for tag in read.Tags()["scalars"]:
            found[tag] = [event.step for event in read.Scalars(tag)]
    return found


@quiet
def test_a_healthy_training_is_seen_as_it_is(fit, tmp_path, caplog):
    plain = fit(watched=False).model.state_dict()
    watch, losses, model = fit()
    told = [record for record in caplog.records if record.name == "gradwatch"]
    assert all(torch.equal(model.state_dict()[k], v) for k, v in plain.items())
    steps, seen = watch.records.series("gradwatch/loss")
    assert list(steps) == list(range(len(steps)))
    assert len(steps) >= 32
    if losses:
        assert list(seen) == pytest.approx(losses, rel=1e-6)
    assert not watch.alerts
    assert watch.health["state"] == "off"  # it is closed with the training
    assert not watch.health["failed"]
    _, clipped = watch.records.series("gradwatch/grad_norm_clipped")
    _, norms = watch.records.series("gradwatch/grad_norm")
    assert max(clipped) <= CLIP * 1.001
    assert max(norms) > CLIP
    assert len(told) == 2  # the watch's own first and last line
    if fit.name == "skorch":
        return
    shown = points(tmp_path)
    assert any(tag.endswith("/rho") or "/rho/" in tag for tag in shown)
    assert shown["gradwatch/grad_norm"][-1] <= {"sb3": 32 * 8}.get(fit.name, 40)


@quiet
def test_a_resumed_training_goes_on(fit):
    first = fit().watch
    last = first.records[-1].step
    second = fit(resume=True).watch
    assert second.records[0].step == last + 1
    assert second.records[-1].step == 2 * last + 1
    assert not second.alerts


@quiet
def test_a_sick_training_is_named(fit):
    lr = 10.0 if fit.name == "sb3" else 100.0
    watch = fit(lr=lr, steps=64).watch
    assert "lr_too_high" in [alert.kind for alert in watch.alerts]
    assert watch.health["state"] == "off"


@quiet
def test_an_alert_that_raises_ends_the_training_and_the_watch(fit):
    class Never:
        kind = "mine"
        active = False

        def update(self, record):
            alert = gradwatch.Alert(
                kind="mine", severity="error", step=record.step, since=0, message="no"
            )
            return [alert] if record.step == 5 else []

    with pytest.raises(gradwatch.TrainingAlert):
        fit(on_alert="raise", rules=[Never()])


@quiet
def test_unknown_arguments_are_refused_at_once(fit):
    with pytest.raises(TypeError, match="evry"):
        fit(evry=3)


@quiet
def test_a_checkpoint_of_a_training_without_a_watch_can_be_resumed(fit):
    if fit.name == "skorch":
        pytest.skip("the pickled net has its callbacks in it")
    fit(watched=False)
    watch = fit(resume=True).watch
    first, last = watch.records[0].step, watch.records[-1].step
    assert last - first >= 31
    assert not watch.alerts


@quiet
def test_and_the_other_way_round(fit):
    fit()
    assert fit(watched=False, resume=True).watch is None


def test_a_state_is_of_one_model():
    fit, model, other = Fit({"budget": None, "dir": None, "wandb": None}), Net(), Net()

    def step(model):
        model(torch.ones(2, 8, 8)).sum().backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
        fit.watch.flush()
        return fit.watch.records[-1].step

    fit.begin(model)
    step(model)
    fit.begin(model)
    assert step(model) == 1
    fit.begin(other)
    assert step(other) == 0
    fit.begin(other, start_step=0)
    assert step(other) == 0
    fit.end()


def test_ignite_leaves_exceptions_to_whoever_handles_them():
    pytest.importorskip("ignite")
    from ignite.engine import Engine, Events

    from gradwatch.integrations.ignite import GradwatchHandler

    def step(engine, batch):
        raise KeyboardInterrupt

    trainer, caught = Engine(step), []
    trainer.add_event_handler(
        Events.EXCEPTION_RAISED, lambda engine, error: caught.append(error)
    )
    handler = GradwatchHandler(Net(), dir=None).attach(trainer)
    trainer.run([1])
    assert len(caught) == 1
    first = handler.watch
    trainer.run([1])  # and it is watched again
    assert handler.watch is not first
    handler.watch.close()


def test_skorch_keeps_numbers_in_its_history_and_can_be_cloned(tmp_path):
    pytest.importorskip("skorch")
    from sklearn.base import clone
    from skorch import NeuralNetClassifier

    from gradwatch.integrations.skorch import GradwatchCallback
    from testbed.frameworks import digits

    net = NeuralNetClassifier(
        Net,
        criterion=torch.nn.CrossEntropyLoss,
        max_epochs=1,
        batch_size=64,
        train_split=None,
        callbacks=[("gradwatch", GradwatchCallback(budget=0.05))],
        verbose=0,
    )
    again = clone(net.fit(*digits()))
    [[losses]] = [net.history[:, "batches", :, "gradwatch/loss"]]
    assert len(losses) == 2  # of 16 steps: after ten, and what is left
    assert again.callbacks[0][1].get_params() == {"budget": 0.05}
    again.set_params(callbacks__gradwatch__budget=0.01).fit(*digits())
    assert dict(again.callbacks_)["gradwatch"].get_params() == {"budget": 0.01}
    watch = dict(again.callbacks_)["gradwatch"].watch_
    again.fit(*digits())
    second = dict(again.callbacks_)["gradwatch"].watch_
    assert watch is not second
    assert second.records[0].step == 0


def test_a_fit_can_be_copied_and_pickled_while_it_runs():
    fit, model = Fit({"budget": None, "dir": None}), Net()
    fit.begin(model)
    copy = pickle.loads(pickle.dumps(fit))
    assert copy.watch is None
    assert copy.state_dict()["step"] == 0
    fit.end()
    fit.end()
    assert fit.watch.health["state"] == "off"


def test_what_is_not_installed_is_said(monkeypatch):
    with pytest.raises(
        ModuleNotFoundError, match=r"pip install 'gradwatch\[nothing\]'"
    ):
        needs("not_a_package.part", extra="nothing")
    assert needs("not_a_package", "json", extra="nothing").dumps([]) == "[]"


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_rooms_are_thin_and_over_the_public_api(name):
    file = Path(integrations.__file__).parent / f"{name}.py"
    source = file.read_text(encoding="utf-8")
    assert len(source.splitlines()) < 120
    public = {"gradwatch", "gradwatch.sinks", "gradwatch.integrations.fit"}
    taken = [
        node.module
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and node.module != "__future__"
    ]
    assert public.issuperset(m for m in taken if m.startswith("gradwatch"))


def test_no_framework_is_imported_with_gradwatch():
    code = "import sys, gradwatch; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert not loaded & {*MODULES.values(), "stable_baselines3", "skorch"}
    assert importlib.util.find_spec("gradwatch.integrations.lightning") is not None
