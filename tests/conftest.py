"""What every test gets: one thread, run folders of its own, nothing left behind."""

import gc
import logging
import os
import weakref

import pytest
import torch
from torch.optim import optimizer as torch_optimizer

from gradwatch.hooks import every_step
from gradwatch.hooks.probe import Probe

os.environ.setdefault("GRADWATCH_STRICT", "1")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _run_folders_go_away(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADWATCH_DIR", str(tmp_path / "runs"))
    monkeypatch.delenv("GRADWATCH_DISABLED", raising=False)
    monkeypatch.delenv("RANK", raising=False)


_probes = weakref.WeakSet()
_begin = Probe.__init__


def _noted(self, *args, **options):
    _probes.add(self)
    _begin(self, *args, **options)


Probe.__init__ = _noted


@pytest.fixture(autouse=True)
def _nothing_outlives_its_test():
    hooks_before = _global_hooks()
    yield
    if any(not probe.closed for probe in _probes):
        gc.collect()
    assert not [probe for probe in _probes if not probe.closed]
    assert not [ref for ref in every_step._TOLD.now if ref() is not None]
    assert _global_hooks() == hooks_before


def _global_hooks():
    """Return the hooks on all optimizers, but for our one pair, which stays."""
    registries = (
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    )
    return [
        hook
        for known in registries
        for hook in known.values()
        if hook not in every_step.HOOKS
    ]


@pytest.fixture
def lines():
    """Yield the lines that the logger ``gradwatch`` is given in the test.

    Yields:
        ``(level name, message)`` pairs, in a list that grows.
    """
    found = []

    class Keep(logging.Handler):
        def emit(self, record):
            found.append((record.levelname, record.getMessage()))

    handler = Keep()
    log = logging.getLogger("gradwatch")
    log.addHandler(handler)
    yield found
    log.removeHandler(handler)


@pytest.fixture
def lenient(monkeypatch):
    """Absorb failures as users have it; elsewhere tests let them through."""
    monkeypatch.setenv("GRADWATCH_STRICT", "0")
