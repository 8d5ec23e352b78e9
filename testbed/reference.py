"""Slow truths in float64 that the fast numerics are tested against."""

import math
import statistics

import torch
from torch import Tensor

# ---- spectra


def spectral_radius(matrix: Tensor) -> float:
    """From all eigenvalues of the matrix as it is stored; NaN where it is not finite.

    Never from the formula it was made by: in float32 a rotated Jordan block is another
    matrix. Finiteness is asked first, because LAPACK on a NaN ends the process.
    """
    if not torch.isfinite(matrix).all():
        return math.nan
    return torch.linalg.eigvals(matrix.double()).abs().max().item()


def sigma_max(matrix: Tensor) -> float:
    """The largest singular value, from all of them."""
    return torch.linalg.svdvals(matrix.double())[0].item()


def orthogonality(matrix: Tensor) -> float:
    """The distance of W^T W from the identity, over sqrt(H)."""
    double = matrix.double()
    gap = double.T @ double - torch.eye(len(double), dtype=torch.float64)
    return gap.norm().item() / math.sqrt(len(double))


def radius_change(before: Tensor, after: Tensor) -> float:
    """The exact change of the spectral radius."""
    return spectral_radius(after) - spectral_radius(before)


def single_pair_drift(before: Tensor, after: Tensor) -> float:
    """Re(conj(l)/|l| y^H dW x / (y^H x)) of the leading eigenvalue l alone."""
    matrix, change = before.double(), after.double() - before.double()
    values, rights = torch.linalg.eig(matrix)
    lead = values.abs().argmax()
    lefts = torch.linalg.inv(rights)  # rows y^H, with y^H x = 1
    moved = lefts[lead] @ change.to(rights.dtype) @ rights[:, lead]
    return (values[lead].conj() / values[lead].abs() * moved).real.item()


def singular_vector_drift(before: Tensor, after: Tensor) -> float:
    """u^T dW v with the leading *singular* vectors: the change of sigma_max instead."""
    matrix, change = before.double(), after.double() - before.double()
    u, _, v = torch.linalg.svd(matrix)
    return (u[:, 0] @ change @ v[0]).item()


def norm(tensors) -> float:
    """The L2 norm over several tensors, exactly summed squares of float64 values."""
    values = [v for t in tensors for v in t.detach().double().flatten().tolist()]
    return math.sqrt(math.fsum(v * v for v in values))


# ---- recurrent layers, one sequence and one step after the other, in float64


def unrolled(module, sequences, states=None):
    """Every state and gate of a recurrent module or cell.

    ``sequences``: one tensor ``(T_i, I)`` each; ``states``: first states (h, c or None)
    of shape ``(layers * directions, sequences, .)``. Returns, for each layer and
    direction, one list of steps per sequence, in the direction's own time: dicts of
    ``h``, ``c`` and the gates by letter.
    """
    cell = isinstance(module, torch.nn.RNNCellBase)
    layers = 1 if cell else module.num_layers
    ways = 1 if cell else 1 + module.bidirectional
    inputs = [list(s.detach().double()) for s in sequences]
    found = {}
    for layer in range(layers):
        outputs = []
        for way in range(ways):
            suffix = "" if cell else f"_l{layer}" + ("_reverse" if way else "")
            runs = []
            for n, steps in enumerate(inputs):
                first = (None, None)
                if states is not None:
                    place = layer * ways + way
                    first = [None if s is None else s[place, n] for s in states]
                ordered = steps[::-1] if way else steps
                runs.append(_one_sequence(module, suffix, ordered, *first))
            found[layer, way] = runs
            hs = [[step["h"] for step in run] for run in runs]
            outputs.append([h[::-1] for h in hs] if way else hs)
        inputs = [
            [torch.cat(parts) for parts in zip(*own, strict=True)]
            for own in zip(*outputs, strict=True)
        ]
    return found


def _one_sequence(module, suffix, inputs, h, c):
    def get(name):
        weight = getattr(module, name + suffix, None)
        return None if weight is None else weight.detach().double()

    w_ih, w_hh, w_hr = get("weight_ih"), get("weight_hh"), get("weight_hr")
    nothing = torch.zeros(len(w_ih), dtype=torch.float64)
    b_ih = nothing if get("bias_ih") is None else get("bias_ih")
    b_hh = nothing if get("bias_hh") is None else get("bias_hh")
    lstm = isinstance(module, (torch.nn.LSTM, torch.nn.LSTMCell))
    gru = isinstance(module, (torch.nn.GRU, torch.nn.GRUCell))
    relu = "relu" in str(getattr(module, "nonlinearity", "")).lower()
    hidden = module.hidden_size
    h = torch.zeros(w_hh.shape[1], dtype=torch.float64) if h is None else h.double()
    c = torch.zeros(hidden, dtype=torch.float64) if c is None else c.double()
    steps = []
    for x in inputs:
        given, carried = w_ih @ x + b_ih, w_hh @ h + b_hh
        if lstm:
            i, f, g, o = (given + carried).split(hidden)
            i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
            c = f * c + i * g
            h = o * c.tanh()
            h = h if w_hr is None else w_hr @ h
            steps.append({"h": h, "c": c, "i": i, "f": f, "g": g, "o": o})
        elif gru:
            (r, z, n), (hr, hz, hn) = given.split(hidden), carried.split(hidden)
            r, z = (r + hr).sigmoid(), (z + hz).sigmoid()
            n = (n + r * hn).tanh()
            h = (1 - z) * n + z * h
            steps.append({"h": h, "r": r, "z": z, "n": n})
        else:
            h = (given + carried).relu() if relu else (given + carried).tanh()
            steps.append({"h": h})
    return steps


def adjoints(module, sequences, states, loss_of):
    """The gradients of every h and c, by autograd through the unrolled cell.

    ``states``: first states as in :func:`unrolled`, or None for zeros. ``loss_of``
    takes the runs of :func:`unrolled` and returns the loss. Returns, for each layer and
    direction, one ``(T_i, .)`` gradient of h and of c (or None) per sequence.
    """
    if states is None:
        count = len(sequences)
        cell = isinstance(module, torch.nn.RNNCellBase)
        rows = 1 if cell else module.num_layers * (1 + module.bidirectional)
        width = getattr(module, "proj_size", 0) or module.hidden_size
        states = (
            torch.zeros(rows, count, width, dtype=torch.float64),
            torch.zeros(rows, count, module.hidden_size, dtype=torch.float64),
        )
    states = [None if s is None else s.double().requires_grad_() for s in states]
    runs = unrolled(module, sequences, states)
    loss = loss_of(runs)
    found = {}
    for place, own in runs.items():
        found[place] = []
        for run in own:
            parts = []
            for name in ("h", "c"):
                tensors = [step[name] for step in run if name in step]
                grads = (
                    torch.autograd.grad(
                        loss, tensors, retain_graph=True, allow_unused=True
                    )
                    if tensors
                    else ()
                )
                filled = [
                    torch.zeros_like(t) if g is None else g
                    for t, g in zip(tensors, grads, strict=True)
                ]
                parts.append(torch.stack(filled).detach() if filled else None)
            found[place].append(tuple(parts))
    return found


def state_metrics(kind, runs, recurrent):
    """Every metric of the state depth of one layer and direction, by its definition."""
    steps = [step for run in runs for step in run]
    tanh = {"LSTM": "g", "GRU": "n"}.get(kind, "h")
    sigmoid = {"LSTM": "ifo", "GRU": "rz"}.get(kind, "")
    vanilla = not sigmoid
    found = {}
    values = _all(steps, tanh)
    slopes = [float(v > 0) if kind == "RNN_RELU" else 1 - v * v for v in values]
    gate = "" if vanilla else f"/{tanh}"
    found[f"act_deriv{gate}"] = _mean(slopes)
    found[f"act_deriv_rms{gate}"] = math.sqrt(_mean([s * s for s in slopes]))
    if kind != "RNN_RELU":
        found[f"saturated{gate}"] = _mean([s < 0.05 for s in slopes])
    for letter in sigmoid:
        values = _all(steps, letter)
        slopes = [v * (1 - v) for v in values]
        found[f"act_deriv/{letter}"] = _mean(slopes)
        found[f"act_deriv_rms/{letter}"] = math.sqrt(_mean([s * s for s in slopes]))
        found[f"shut/{letter}"] = _mean([v < 0.05 for v in values])
        found[f"open/{letter}"] = _mean([v > 0.95 for v in values])
    if not vanilla:
        keep = torch.stack([step["f" if kind == "LSTM" else "z"] for step in steps])
        by_unit = [_mean([math.log(v) for v in unit]) for unit in keep.T.tolist()]
        found["forget"] = math.exp(_mean(by_unit))
        found["timescale"] = median([min(-1 / m, 1e6) for m in by_unit])
    if kind == "RNN_RELU":
        units = torch.stack([step["h"] for step in steps]).T.tolist()
        found["dead"] = _mean([all(v <= 0 for v in unit) for unit in units])
    if vanilla:
        size = math.sqrt(sum(v * v for v in recurrent.double().flatten().tolist()))
        rms = found["act_deriv_rms"]
        found["chi"] = size / math.sqrt(recurrent.shape[1]) * rms
    for name in ("h", "c") if kind == "LSTM" else ("h",):
        norms = [step[name].norm().item() for step in steps]
        found[f"{name}_norm"] = _mean(norms) / math.sqrt(len(steps[0][name]))
    slopes = [s for s in map(_slope, runs) if s is not None]
    found["h_growth"] = _mean(slopes) if slopes else math.nan
    return found


def _slope(run):
    logs = [(t, step["h"].norm().item()) for t, step in enumerate(run)]
    logs = [(t, math.log(n)) for t, n in logs if n > 0]
    if len(logs) < 2:
        return None
    t_mean, n_mean = _mean([t for t, _ in logs]), _mean([n for _, n in logs])
    above = sum((t - t_mean) * (n - n_mean) for t, n in logs)
    return above / sum((t - t_mean) ** 2 for t, _ in logs)


def _all(steps, name):
    return [v for step in steps for v in step[name].tolist()]


def _mean(values):
    return math.fsum(values) / len(values)


# ---- running statistics


def median(values) -> float:
    """By sorting; NaN where there are none."""
    ranked = sorted(values)
    if not ranked:
        return math.nan
    return (ranked[(len(ranked) - 1) // 2] + ranked[len(ranked) // 2]) / 2


def robust_z(values, value, floor) -> float:
    """Distance from the median over 1.4826 MAD + floor; needs that to be above 0."""
    deviations = [abs(v - median(values)) for v in values]
    return (value - median(values)) / (1.4826 * median(deviations) + floor)


def theil_sen(steps, values) -> float:
    """The median slope over all pairs, by two loops."""
    slopes = []
    for i in range(len(steps)):
        for j in range(i):
            slopes.append((values[i] - values[j]) / (steps[i] - steps[j]))
    return median(slopes)


# ---- clippers, spelled out over a list of norms


def autoclip_thresholds(norms, percentile=10.0):
    """The percentile by linear interpolation between the sorted norms so far."""
    found = []
    for n in range(1, len(norms) + 1):
        ranked = sorted(norms[:n])
        place = (n - 1) * percentile / 100
        low = math.floor(place)
        high = min(low + 1, n - 1)
        found.append(ranked[low] + (place - low) * (ranked[high] - ranked[low]))
    return found


def zclip_thresholds(norms, z_max=2.5, warm_up=25, memory=0.97):
    """Return the threshold of ZClip at every norm."""
    first = norms[:warm_up]
    mean = sum(first) / warm_up
    variance = sum((g - mean) ** 2 for g in first) / warm_up
    found = [math.inf] * warm_up
    for g in norms[warm_up:]:
        sigma = max(math.sqrt(variance), 1e-3 * mean)
        z = (g - mean) / sigma
        limit = mean + z_max * sigma
        if z > z_max:
            limit = mean + z_max**2 * sigma / z
        found.append(limit)
        used = min(g, limit)
        variance = memory * variance + (1 - memory) * (used - mean) ** 2
        mean = memory * mean + (1 - memory) * used
    return found


def logzclip_thresholds(norms, z_max=4.0, warm_up=25, memory=0.97, floor=0.1):
    """Return the threshold of LogZClip at every norm."""
    logs = [math.log(g) for g in norms]
    mean = statistics.median(logs[:warm_up])
    off = statistics.median(abs(v - mean) for v in logs[:warm_up])
    variance = (1.4826 * off) ** 2
    found = [math.inf] * warm_up
    for value in logs[warm_up:]:
        limit = mean + z_max * max(math.sqrt(variance), floor)
        found.append(math.exp(limit))
        used = min(value, limit)
        variance = memory * variance + (1 - memory) * (used - mean) ** 2
        mean = memory * mean + (1 - memory) * used
    return found
