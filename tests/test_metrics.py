"""The catalogue of metrics is what is measured: no row too few, and none too many."""

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.nn.utils import clip_grad_norm_

import gradwatch
from gradwatch import metrics
from testbed.models import Tagger, batches

NETS = {
    "RNN_TANH": lambda: nn.RNN(4, 8),
    "RNN_RELU": lambda: nn.RNN(4, 8, nonlinearity="relu"),
    "LSTM": lambda: nn.LSTM(4, 8, 2),
    "GRU": lambda: nn.GRU(4, 8, bidirectional=True),
}


def measured(name):
    """Train a little and return the names of all metrics, and the keys of no row."""
    torch.manual_seed(0)
    recurrent = NETS[name]()
    model = Tagger(recurrent, 8 * (1 + recurrent.bidirectional))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    every = {"state": 1, "spectrum": 1, "flow": 1}
    with gradwatch.watch(
        model, dir=None, wandb=None, every=every, budget=None
    ) as watch:
        for number, x in enumerate(batches(12)):
            optimizer.zero_grad()
            out = model(x)
            loss = mse_loss(out, x[-1, :, : out.shape[-1]])
            loss = loss * (torch.nan if number == 10 else 1)
            loss.backward()
            if number != 10:  # a skipped step
                clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
    rows = {key: metrics.of(key) for record in watch.records for key in record.metrics}
    nameless = [key for key, row in rows.items() if row is None]
    return {row.name for row in rows.values() if row is not None}, nameless


@pytest.fixture(scope="module")
def found():
    return {name: measured(name) for name in NETS}


@pytest.mark.parametrize("net", NETS)
def test_what_is_measured_is_in_the_catalogue(found, net):
    names, nameless = found[net]
    assert nameless == []
    elsewhere = {
        n for n in names if net not in metrics._KINDS[metrics.CATALOGUE[n].nets]
    }
    assert elsewhere == set()


@pytest.mark.parametrize("net", NETS)
def test_what_is_in_the_catalogue_is_measured(found, net):
    rows = metrics.CATALOGUE.values()
    due = {row.name for row in rows if net in metrics._KINDS[row.nets]}
    assert due - found[net][0] == set()
