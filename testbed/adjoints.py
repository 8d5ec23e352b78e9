"""Losses that read what a recurrent module can return, and their adjoints."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from gradwatch.depths.flow import backward
from gradwatch.depths.trajectory import Trajectory, trajectory
from gradwatch.recurrent import recurrences
from testbed import reference
from testbed.looking import ALL, looking_at
from testbed.replays import (
    FEATURES,
    HIDDEN,
    KINDS,
    LENGTHS,
    STEPS,
    Case,
    first_states,
    given_states,
)

READS = ("output", "last output", "h_n", "c_n", "all")


def reads(case: Case) -> Iterator[str]:
    """Yield what a loss can read of a case."""
    yield from (r for r in READS if r != "c_n" or "LSTM" in case.kind)


def errors(case: Case, read: str, dtype: torch.dtype, seed: int = 0) -> float:
    """Return the largest error of an adjoint, relative to its stream's largest."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {"bias": case.bias}
    if not case.cell:
        options |= {"num_layers": case.layers, "bidirectional": case.two_way}
        options["batch_first"] = case.layout == "batch first"
    module = KINDS[case.kind](FEATURES, HIDDEN, **options).to(dtype)
    for parameter in module.parameters():
        parameter.data.mul_(1.5)
    batch = 1 if case.layout == "unbatched" else len(LENGTHS)
    lengths = [STEPS] * batch
    if "packed" in case.layout:
        ordered = sorted(LENGTHS, reverse=True)
        lengths = ordered if "sorted" in case.layout else list(LENGTHS)
    x = torch.randn(STEPS, batch, FEATURES, dtype=dtype)
    states = first_states(module, case, batch, dtype) if case.states else None
    width = (getattr(module, "proj_size", 0) or HIDDEN) * (1 + case.two_way)
    weigh = {
        "y": torch.randn(STEPS, batch, width, dtype=dtype),
        "h": torch.randn(case.layers * (1 + case.two_way), batch, width, dtype=dtype),
        "c": torch.randn(case.layers * (1 + case.two_way), batch, HIDDEN, dtype=dtype),
    }
    weigh["h"] = weigh["h"][..., : width // (1 + case.two_way)]
    chosen = _chosen(read, "LSTM" in case.kind)
    probe = looking_at(module, ALL)
    _loss(module, case, x, lengths, states, weigh, chosen).backward()
    members = recurrences(module)
    replayed = trajectory(members, probe.take())
    assert isinstance(replayed, Trajectory), replayed
    with torch.no_grad():
        found = backward(members, replayed)
    probe.close()
    order = sorted(range(batch), key=lambda i: -lengths[i])
    order = order if "packed" in case.layout else list(range(batch))
    sequences = [x[: lengths[i], i] for i in order]
    if states is not None:
        states = tuple(s if s is None else s[:, order] for s in states)
    true = reference.adjoints(
        module,
        sequences,
        states,
        lambda runs: _reference_loss(runs, order, weigh, chosen),
    )
    worst = 0.0
    for member, (_, back) in zip(members, found, strict=True):
        place = member.stream.layer, int(member.stream.direction == "reverse")
        largest = max(h.abs().max().item() for h, _ in true[place])
        for n, (h, c) in enumerate(true[place]):
            gap = (back.h[: len(h), n].double() - h).abs().max().item()
            worst = max(worst, gap / max(largest, 1e-30))
            if c is not None and back.c is not None:
                most = max(cell.abs().max().item() for _, cell in true[place])
                gap = (back.c[: len(c), n].double() - c).abs().max().item()
                worst = max(worst, gap / max(most, 1e-30))
    return worst


def _chosen(read: str, lstm: bool) -> set[str]:
    every = {"output", "h_n", "c_n"} if lstm else {"output", "h_n"}
    return every if read == "all" else {read}


def _loss(
    module: nn.Module,
    case: Case,
    x: Tensor,
    lengths: list[int],
    states: tuple[Tensor, Tensor | None] | None,
    weigh: dict[str, Tensor],
    chosen: set[str],
) -> Tensor:
    """Call as a user would, and weigh what the loss reads."""
    lstm, flat = "LSTM" in case.kind, case.layout == "unbatched"
    hx = given_states(case, states)
    x = x[:, 0] if flat else x
    outputs: list[Tensor] = []
    if case.cell or case.chain:
        for step in x:
            if case.cell:
                hx = module(step, hx)
                outputs.append(hx[0] if lstm else hx)
            else:
                out, hx = module(step[:, None], hx)
                outputs.append(out[:, 0])
        y = torch.stack(outputs)
    else:
        given: Any = x
        if case.layout == "batch first":
            given = x.transpose(0, 1)
        elif "packed" in case.layout:
            given = _packed(x, lengths, case)
        out, hx = module(given, hx)
        y = out.data if isinstance(out, PackedSequence) else out
    by = weigh["y"]
    if flat:
        by = by[:, 0]
    elif case.layout == "batch first" and not case.chain:
        by = by.transpose(0, 1)
    elif "packed" in case.layout:
        by = _packed(by, lengths, case).data
    loss = torch.zeros((), dtype=x.dtype)
    if "output" in chosen:
        loss = loss + (y * by).sum()
    if "last output" in chosen:
        last = weigh["y"].clone()
        for i, length in enumerate(lengths):
            last[: length - 1, i] = 0
        if flat:
            last = last[:, 0]
        elif case.layout == "batch first" and not case.chain:
            last = last.transpose(0, 1)
        elif "packed" in case.layout:
            last = _packed(last, lengths, case).data
        loss = loss + (y * last).sum()
    h, c = hx if lstm else (hx, None)
    for name, state, key in (("h_n", h, "h"), ("c_n", c, "c")):
        if name in chosen:
            loss = loss + (state * weigh[key].reshape(state.shape)).sum()
    return loss


def _packed(x: Tensor, lengths: list[int], case: Case) -> PackedSequence:
    return pack_padded_sequence(
        x, torch.tensor(lengths), enforce_sorted="sorted" in case.layout
    )


def _reference_loss(
    runs: dict[Any, Any], order: list[int], weigh: dict[str, Tensor], chosen: set[str]
) -> Tensor:
    top = max(layer for layer, _ in runs)
    ways = sorted(way for layer, way in runs if layer == top)
    loss = torch.zeros((), dtype=torch.float64)
    for n, i in enumerate(order):
        parts = []
        for way in ways:
            hs = [step["h"] for step in runs[top, way][n]]
            parts.append(torch.stack(hs[::-1] if way else hs))
        y, by = torch.cat(parts, -1), weigh["y"][:, i].double()
        if "output" in chosen:
            loss = loss + (y * by[: len(y)]).sum()
        if "last output" in chosen:
            loss = loss + (y[-1] * by[len(y) - 1]).sum()
        for name, key in (("h_n", "h"), ("c_n", "c")):
            if name not in chosen:
                continue
            for (layer, way), own in runs.items():
                row = weigh[key][layer * len(ways) + way, i].double()
                loss = loss + (own[n][-1][key] * row).sum()
    return loss
