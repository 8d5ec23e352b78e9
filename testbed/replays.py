"""Every layout that a fused module or a cell can be called in, replayed."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from gradwatch.depths.state import State
from gradwatch.depths.trajectory import Trajectory, trajectory
from gradwatch.numerics.activation import SIGMOID_GATES
from gradwatch.recurrent import recurrences
from testbed import reference
from testbed.looking import STATES, looking_at

KINDS: dict[str, Callable[..., nn.Module]] = {
    "RNN tanh": nn.RNN,
    "RNN relu": lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k),
    "LSTM": nn.LSTM,
    "LSTM, projection": lambda *a, **k: nn.LSTM(*a, proj_size=3, **k),
    "GRU": nn.GRU,
    "RNNCell": nn.RNNCell,
    "RNNCell relu": lambda *a, **k: nn.RNNCell(*a, nonlinearity="relu", **k),
    "LSTMCell": nn.LSTMCell,
    "GRUCell": nn.GRUCell,
}

LAYOUTS = ("time first", "batch first", "unbatched", "packed", "packed, sorted")

LENGTHS = (5, 2, 7, 1, 7)

FEATURES, HIDDEN, STEPS = 4, 6, 7


@dataclass(frozen=True)
class Case:
    """One way to call a recurrent module."""

    kind: str
    layers: int = 1
    two_way: bool = False
    layout: str = "time first"
    states: bool = False
    bias: bool = True
    chain: bool = False

    @property
    def cell(self) -> bool:
        """Whether the module is a cell."""
        return "Cell" in self.kind


def cases() -> Iterator[Case]:
    """Yield every case of the grid, then cells and decoders called step by step."""
    fused = [kind for kind in KINDS if "Cell" not in kind]
    for kind, layers, two_way, layout, states, bias in itertools.product(
        fused, (1, 2, 3), (False, True), LAYOUTS, (False, True), (True, False)
    ):
        yield Case(kind, layers, two_way, layout, states, bias)
    for kind in KINDS:
        for states, bias in itertools.product((False, True), repeat=2):
            if "Cell" in kind:
                for layout in ("time first", "unbatched"):
                    yield Case(kind, 1, False, layout, states, bias, chain=True)
            else:
                yield Case(kind, 2, False, "batch first", states, bias, chain=True)


def run(
    case: Case, dtype: torch.dtype, seed: int = 0
) -> tuple[nn.Module, Trajectory, dict[Any, Any], dict[str, Any]]:
    """Call a module as a case says, and replay it from what a probe saw.

    Returns:
        The module, the replay, the unrolled truth by layer and direction, and the
        measured state metrics by name of the stream.
    """
    torch.manual_seed(seed)
    options: dict[str, Any] = {"bias": case.bias}
    if not case.cell:
        first = case.layout == "batch first"
        options |= {"num_layers": case.layers, "bidirectional": case.two_way}
        options["batch_first"] = first
    module = KINDS[case.kind](FEATURES, HIDDEN, **options).to(dtype)
    for parameter in module.parameters():
        parameter.data.mul_(1.5)  # nearer to saturation than the default
    batch = 1 if case.layout == "unbatched" else len(LENGTHS)
    lengths = [STEPS] * batch
    if "packed" in case.layout:
        lengths = sorted(LENGTHS, reverse=True) if "sorted" in case.layout else LENGTHS
    x = torch.randn(STEPS, batch, FEATURES, dtype=dtype)
    states = first_states(module, case, batch, dtype) if case.states else None
    probe = looking_at(module, STATES)
    _call(module, case, x, lengths, states).square().mean().backward()
    chain, members = probe.take(), recurrences(module)
    replayed = trajectory(members, chain)
    assert isinstance(replayed, Trajectory), replayed
    measured = State()
    measured.add(members[0].stream.module, members, replayed)
    probe.close()
    sequences = [x[:n, i] for i, n in enumerate(lengths)]
    if "packed" in case.layout:  # looked at in the order of their lengths
        order = sorted(range(batch), key=lambda i: -lengths[i])
        sequences = [sequences[i] for i in order]
        states = states and tuple(s if s is None else s[:, order] for s in states)
    truth = reference.unrolled(module, sequences, states)
    found = {
        s.name: dict(
            zip(names, measured.numbers[s.name, "statistics"].tolist(), strict=True)
        )
        for s, names in measured.streams
    }
    return module, replayed, truth, found


def first_states(
    module: nn.Module, case: Case, batch: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Return first states (h, c) for a case; c is None but for an LSTM."""
    count = case.layers * (1 + case.two_way)
    width = getattr(module, "proj_size", 0) or HIDDEN
    h = torch.randn(count, batch, width, dtype=dtype)
    c = torch.randn(count, batch, HIDDEN, dtype=dtype) if "LSTM" in case.kind else None
    return h, c


def given_states(case: Case, states: tuple[Tensor, Tensor | None] | None) -> Any:
    """Return first states as the module of a case takes them; None for none."""
    if states is None:
        return None
    parts = [s.clone() for s in states if s is not None]
    flat = case.layout == "unbatched"
    if case.cell:
        parts = [p[0, 0] if flat else p[0] for p in parts]
    elif flat:
        parts = [p[:, 0] for p in parts]
    return tuple(parts) if "LSTM" in case.kind else parts[0]


def _call(
    module: nn.Module,
    case: Case,
    x: Tensor,
    lengths: Any,
    states: tuple[Tensor, Tensor | None] | None,
) -> Tensor:
    """Call as a user would; return what a loss reads."""
    lstm = "LSTM" in case.kind
    hx = given_states(case, states)
    if case.layout == "unbatched":
        x = x[:, 0]
    if case.cell:
        for step in x:
            hx = module(step, hx)
        return hx[0] if lstm else hx
    if case.chain:
        for step in x:
            _, hx = module(step[:, None], hx)
        return hx[0] if lstm else hx
    given: Any = x
    if case.layout == "batch first":
        given = x.transpose(0, 1)
    elif "packed" in case.layout:
        given = pack_padded_sequence(
            x, torch.tensor(lengths), enforce_sorted="sorted" in case.layout
        )
    out = module(given, hx)[0]
    return out.data if isinstance(out, PackedSequence) else out


def errors(case: Case, dtype: torch.dtype) -> tuple[float, float]:
    """Return the largest error of the states and gates, and of the metrics."""
    module, replayed, truth, measured = run(case, dtype)
    worst = metric_worst = 0.0
    for member in recurrences(module):
        stream = member.stream
        place = stream.layer, int(stream.direction == "reverse")
        layer, runs = replayed.layers[place[0]][place[1]], truth[place]
        tensors = {"h": layer.h, "c": layer.c, "tanh": layer.tanh}
        letters = {"tanh": {"LSTM": "g", "GRU": "n"}.get(stream.kind, "h")}
        for i, gate in enumerate(SIGMOID_GATES[stream.kind]):
            assert layer.sigmoid is not None
            tensors[gate] = layer.sigmoid[:, :, i]
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            for n, steps in enumerate(runs):
                true = torch.stack([step[letters.get(name, name)] for step in steps])
                gap = (tensor[: len(steps), n].double() - true).abs().max().item()
                worst = max(worst, gap)
        recurrent = getattr(module, "weight_hh" + member.suffix).detach()
        true_metrics = reference.state_metrics(stream.kind, runs, recurrent)
        assert set(true_metrics) == set(measured[stream.name]), case
        for name, true in true_metrics.items():
            got = measured[stream.name][name]
            if math.isnan(true) and math.isnan(got):
                continue
            gap = abs(got - true) / max(1.0, abs(true))
            metric_worst = max(metric_worst, gap)
    return worst, metric_worst
