"""What is true of a run, measured: float64 autograd through loops, and exact counts.

Nothing here is gradwatch's, so that no tool is judged by its own measure.

Axes: T time, B batch, H units, S state (H, or h beside c for an LSTM), V vectors.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from functools import wraps
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from benchmarks.detection.case import Case, Draw, Family, History, Label, Measured
from benchmarks.remedies.unrolled import growth, step

REACH, GROWTH = -6.0, 2.4
DEAD, SHUT, CAUGHT = 0.5, 0.05, 0.95
MODES = {nn.LSTMCell: "LSTM", nn.GRUCell: "GRU"}

Truth = Callable[[Case, History], Measured]


def compared(build: Callable[[Draw, bool], Case]) -> Family:
    """Make a family of what builds the same run with the fault and without."""

    @wraps(build)
    def make(draw: Draw) -> Case:
        again = deepcopy(draw)

        def control() -> Case:
            torch.manual_seed(again.seed)
            case = build(deepcopy(again), False)
            case.label, case.truth = Label(), None
            return case

        case = build(draw, True)
        case.control = control
        return case

    return make


class Recurrence:
    """The states of one stream, and its gates.

    Attributes:
        states: One after the other as they were made, ``(B, S)``, part of the graph.
        gates: Gates of every step by letter, ``(B, H)``.
    """

    def __init__(self) -> None:
        self.states: list[Tensor] = []
        self.gates: list[dict[str, Tensor]] = []

    def begin(self, rows: int, width: int, given: Any) -> Tensor:
        """Return the first state of a call: the one given, or zeros."""
        if given is None:
            state = torch.zeros(rows, width, dtype=torch.float64)
        else:
            state = torch.cat(given, -1) if isinstance(given, tuple) else given
        if not state.requires_grad:
            state.requires_grad_()
            self.states.append(state)
        return state

    def advance(self, mode: str, now: Tensor, carried: Tensor, state: Tensor) -> Tensor:
        """Make one step of PyTorch's equations."""
        state, gates = step(mode, now, carried, state)
        self.states.append(state)
        self.gates.append(gates)
        return state


class UnrolledLayers(nn.Module):
    """An nn.RNNBase, batch second, as a loop over the steps; keeps all states."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn, self.mode = rnn, rnn.mode
        self.bidirectional = rnn.bidirectional
        self.directions = ["", "_reverse"] if rnn.bidirectional else [""]
        self.streams = {
            f"l{k}{d}": Recurrence()
            for k in range(rnn.num_layers)
            for d in self.directions
        }

    def forward(self, x: Tensor, given: Any = None) -> tuple[Tensor, Any]:
        """Return what the module returns."""
        last: list[Tensor] = []
        for k in range(self.rnn.num_layers):
            parts = []
            for direction in self.directions:
                begun = _nth(given, len(last))
                rows = x.flip(0) if direction else x
                states = self._direction(f"l{k}{direction}", rows, begun)
                last.append(states[-1])
                h = states[..., : self.rnn.hidden_size]
                parts.append(h.flip(0) if direction else h)
            x = torch.cat(parts, -1)
        stacked = torch.stack(last)
        return x, stacked.chunk(2, -1) if self.mode == "LSTM" else stacked

    def _direction(self, suffix: str, x: Tensor, given: Any) -> Tensor:
        def weight(name: str) -> Tensor:
            value: Tensor = getattr(self.rnn, f"{name}_{suffix}")
            return value

        recurrence, hidden = self.streams[suffix], self.rnn.hidden_size
        width = hidden * (2 if self.mode == "LSTM" else 1)
        state = recurrence.begin(x.shape[1], width, given)
        made = []
        for now in linear(x, weight("weight_ih"), weight("bias_ih")):
            h = state[:, :hidden]
            carried = linear(h, weight("weight_hh"), weight("bias_hh"))
            state = recurrence.advance(self.mode, now, carried, state)
            made.append(state)
        return torch.stack(made)


class UnrolledCell(nn.Module):
    """A cell of PyTorch's that keeps all states."""

    def __init__(self, cell: Any) -> None:
        super().__init__()
        self.cell = cell
        self.mode = MODES.get(type(cell)) or f"RNN_{cell.nonlinearity.upper()}"
        self.streams = {"": Recurrence()}

    def forward(self, x: Tensor, given: Any = None) -> Any:
        """Return what the cell returns."""
        cell, recurrence = self.cell, self.streams[""]
        width = cell.hidden_size * (2 if self.mode == "LSTM" else 1)
        state = recurrence.begin(len(x), width, given)
        now = linear(x, cell.weight_ih, cell.bias_ih)
        carried = linear(state[:, : cell.hidden_size], cell.weight_hh, cell.bias_hh)
        state = recurrence.advance(self.mode, now, carried, state)
        return state.chunk(2, -1) if self.mode == "LSTM" else state


def _nth(given: Any, index: int) -> Any:
    if given is None:
        return None
    if isinstance(given, tuple):
        return tuple(one[index] for one in given)
    return given[index]


def _wide(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch.double() if batch.is_floating_point() else batch
    return tuple(_wide(one) for one in batch)


def unrolled(
    case: Case, weights: dict[str, Tensor] | None = None
) -> tuple[Tensor, dict[str, Recurrence], nn.Module]:
    """Run a fresh batch in float64.

    Returns:
        The loss, what each stream did, and the copy of the model that did it.
    """
    model: Any = deepcopy(case.model)
    if weights is not None:
        model.load_state_dict(weights)
    model.double()
    streams = {}
    for name, module in [*model.named_children()]:
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            is_cell = isinstance(module, nn.RNNCellBase)
            loop = UnrolledCell(module) if is_cell else UnrolledLayers(module)
            setattr(model, name, loop)
            for suffix, one in loop.streams.items():
                streams[f"{name}.{suffix}" if suffix else name] = one
    loss = case.loss(model, _wide(next(case.batches)))
    return loss, streams, model


def reach(loss: Tensor, stream: Recurrence) -> float:
    """Return log10 of dL/ds_0 over the largest dL/ds_t, total; -Inf: exactly zero."""
    grads = torch.autograd.grad(
        loss,
        stream.states,
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    norms = torch.stack(grads).flatten(1).norm(dim=1)
    first, largest = norms[0].item(), norms.max().item()
    return math.log10(first / largest) if first > 0 else -math.inf


def keep(case: Case, steps: Iterable[int]) -> None:
    """Have the weights of some steps kept, for the truth to look at."""
    wanted, begun = frozenset(steps), case.before
    kept = case.notes.setdefault("weights", {})

    def before(number: int) -> None:
        if begun is not None:
            begun(number)
        if number in wanted:
            state = case.model.state_dict()
            kept[number] = {name: value.clone() for name, value in state.items()}

    case.before = before


def _looks(case: Case) -> Iterator[tuple[int, Any]]:
    """Yield each step that was kept, and the end, with what ``unrolled`` says."""
    for number, weights in case.notes.get("weights", {}).items():
        yield number, unrolled(case, weights)
    yield case.steps, unrolled(case)


def no_reach(case: Case, history: History) -> Measured:
    """No gradient reaches the first steps, from the onset to the end."""
    early, late = [], []
    for number, (loss, streams, _) in _looks(case):
        found = [reach(loss, streams[name]) for name in case.label.streams]
        (early if number < _settled(case) else late).extend(found)
    values = {"reach_largest": max(late), "reach_end": late[-1]}
    if early:
        values["reach_before"] = min(early)
    holds = max(late) <= REACH and min(early, default=0.0) > REACH
    return Measured(holds, values)


def grows(case: Case, history: History) -> Measured:
    """Gradients grow through time, from the onset to the end."""
    early, late = [], []
    for number, (_, streams, _) in _looks(case):
        found = [growth(streams[name]) for name in case.label.streams]
        (early if number < _settled(case) else late).extend(found)
    values = {"growth_smallest": min(late), "growth_end": late[-1]}
    if early:
        values["growth_before"] = max(early)
    holds = min(late) >= GROWTH and max(early, default=0.0) < GROWTH
    return Measured(holds, values)


def grows_to_nan(case: Case, history: History) -> Measured:
    """Gradients grow for 20 steps and more before the first NaN."""
    assert history.nonfinite is not None
    first, found = history.nonfinite, {}
    for number, weights in case.notes["weights"].items():
        if number <= first - 20:
            _, streams, _ = unrolled(case, weights)
            found[number] = max(growth(streams[n]) for n in case.label.streams)
    sick = [number for number, value in found.items() if value >= GROWTH]
    notice = first - min(sick, default=first)
    values = {"first_nonfinite": first, "notice": notice, "growth": max(found.values())}
    return Measured(notice >= 20 and found[0] < GROWTH, values)


def _settled(case: Case) -> int:
    """Return when a fault that comes about bit by bit is there in full."""
    return int(case.notes.get("settled", case.label.onset))


def dead(case: Case, history: History) -> Measured:
    """Half of the ReLU units are off at every step of every sequence."""
    early, late = [0.0], []
    for number, (_, streams, _) in _looks(case):
        for name in case.label.streams:
            states = torch.stack(streams[name].states[1:])
            share = (states <= 0).all(0).all(0).double().mean().item()
            (early if number < _settled(case) else late).append(share)
    values = {"dead_before": max(early), "dead_smallest": min(late)}
    return Measured(min(late) >= DEAD and max(early) < DEAD, values)


def stuck(gate: str) -> Truth:
    """Return what asks whether a gate is on one side: i, o shut; z open."""

    def truth(case: Case, history: History) -> Measured:
        shares, memory, longest = [], [math.inf], 0
        for _, (_, streams, _) in _looks(case):
            for name in case.label.streams:
                opened = torch.stack([one[gate] for one in streams[name].gates])
                side = opened > 1 - SHUT if gate == "z" else opened < SHUT
                shares.append(side.double().mean().item())
                longest = max(longest, len(opened))
                if gate == "z":
                    memory.append((1 / (1 - opened)).median().item())
        values = {"share_smallest": min(shares), "memory_in_T": min(memory) / longest}
        return Measured(min(shares) >= CAUGHT and min(memory) > 20 * longest, values)

    return truth


def count(case: Case, names: Iterable[str]) -> None:
    """Have gradients and updates of some weights counted, exactly, step by step."""
    watched = [case.model.get_parameter(name) for name in names]
    begun, behind = case.before, case.after
    last: list[Tensor] = []
    grads = case.notes.setdefault("grads", [])
    ratios = case.notes.setdefault("ratios", [])

    def before(number: int) -> None:
        if begun is not None:
            begun(number)
        now = [w.detach().clone() for w in watched]
        if last:
            ratios.append(
                max(
                    float((a - b).double().norm() / b.double().norm())
                    for a, b in zip(now, last, strict=True)
                )
            )
        last[:] = now

    def after(number: int) -> None:
        if behind is not None:
            behind(number)
        found = [w.grad for w in watched if w.grad is not None]
        grads.append(sum(int(g.count_nonzero()) for g in found))

    case.before, case.after = before, after


def no_gradient(case: Case, history: History) -> Measured:
    """Not one entry of the recurrent gradient is other than zero, at any step."""
    entries = sum(case.notes["grads"])
    values = {"steps": len(case.notes["grads"]), "nonzero_entries": entries}
    return Measured(entries == 0, values)


def no_update(case: Case, history: History) -> Measured:
    """The recurrent weights have a gradient and do not change by a bit."""
    missing = sum(n == 0 for n in case.notes["grads"])
    largest = max(case.notes["ratios"])
    values = {"steps_without_gradient": missing, "update_largest": largest}
    return Measured(missing == 0 and largest == 0, values)


def too_large_steps(case: Case, history: History) -> Measured:
    """The recurrent weights move by a quarter of their norm at the usual step."""
    ratios, onset = case.notes["ratios"], case.label.onset
    values = {"update_median": median(ratios[onset:])}
    if onset:
        values["update_before"] = max(ratios[:onset])
    holds = values["update_median"] >= 0.25 > values.get("update_before", 0.0)
    return Measured(holds, values)


def clipped_away(case: Case, history: History) -> Measured:
    """The clip leaves a hundredth of the gradient or less, and nothing moves."""
    assert case.clip is not None
    kept, moved = case.clip / min(history.norms), max(case.notes["ratios"])
    values = {"clip_ratio_largest": kept, "update_largest": moved}
    return Measured(kept <= 0.01 and moved < 1e-4, values)


def stands_out(case: Case, history: History) -> Measured:
    """One gradient norm is 25 times the usual; three steps later all is over."""
    at = case.label.onset
    usual = median(history.norms[at - 25 : at])
    ratio = history.norms[at] / usual
    behind = max(history.norms[at + 3 : at + 28]) / usual
    before = max(history.norms[at - 25 : at]) / usual
    values = {"ratio": ratio, "ratio_before": before, "ratio_behind": behind}
    return Measured(ratio >= 25 > max(behind, before), values)


def breaks(finite_loss: bool) -> Truth:
    """Return what asks whether a gradient breaks first at the onset."""

    def truth(case: Case, history: History) -> Measured:
        first = -1 if history.nonfinite is None else history.nonfinite
        finite = math.isfinite(history.losses[first])
        values = {"first_nonfinite": first, "loss_finite": float(finite)}
        return Measured(first == case.label.onset and finite == finite_loss, values)

    return truth


def loss_rises(case: Case, history: History) -> Measured:
    """The loss ends at more than 2.2 times its best before the onset, and stays."""
    onset = case.label.onset
    best = sum(history.losses[onset - 20 : onset]) / 20
    rest = history.losses[onset + 20 :]
    lowest = min(sum(rest[i : i + 20]) / 20 for i in range(0, len(rest) - 19, 20))
    values = {"before": best, "lowest_after": lowest, "end": history.final}
    return Measured(lowest > 2.2 * best, values)


def flushed(name: str) -> Truth:
    """Return what asks whether half precision has lost half of a weight's gradient."""

    def truth(case: Case, history: History) -> Measured:
        wide, _, model = unrolled(case)
        module, weight = name.rsplit(".", 1)
        exact = model.get_parameter(f"{module}.rnn.{weight}")
        (true,) = torch.autograd.grad(wide, exact)
        lost = 1 - sum(case.notes["grads"]) / (case.steps * true.numel())
        none = (true == 0).double().mean().item()
        return Measured(lost >= 0.5 > none, {"zero_half": lost, "zero_exact": none})

    return truth
