"""Recurrent weights that are held orthogonal while they train, gate by gate.

    gradwatch.parametrize.orthogonal(model)     # before the optimizer is made
    gradwatch.parametrize.remove(model)         # plain weights again, of the same value

It is a parametrization of PyTorch (:mod:`torch.nn.utils.parametrize`): what trains is a
set of free coordinates, and every forward computes W_hh from them. PyTorch's own
``parametrizations.orthogonal`` does the same to one matrix, but takes the stacked gates
of an LSTM or GRU for one.

A fused module computes its weights once a forward, a cell once a call: run a loop over
a cell under ``torch.nn.utils.parametrize.cached()``.

Axes: G gates, H units, P features of a projected state (H without projection).
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from gradwatch import _torch
from gradwatch.init import Streams
from gradwatch.recurrent import Recurrence, named, recurrences
from gradwatch.rewrite import Changed, Optimizers, forget, holders, holding, radii

__all__ = ["OrthogonalGates", "orthogonal", "remove"]


class OrthogonalGates(nn.Module):
    """The map from free coordinates to a stack of orthogonal blocks.

    Each block is its start times the Cayley transform of a skew-symmetric matrix: of
    the maps that PyTorch and geotorch offer the fastest by far, and the most exact.
    The start is fixed, so that the moments of an optimizer keep their meaning.

    Args:
        weight: The stacked weight, shape ``(G * H, P)``; its nearest orthogonal blocks
            are where training starts.
        gates: G, how many blocks are stacked.

    Shape:
        ``(G * H, P)`` to ``(G * H, P)``.

    References:
        Lezcano-Casado & Martinez-Rubio (2019), arXiv:1901.08428.
    """

    def __init__(self, weight: Tensor, gates: int) -> None:
        super().__init__()
        self.gates = gates
        holder = nn.Module()
        holder.weight = nn.Parameter(self._split(weight).detach().clone())
        parametrizations.orthogonal(holder, "weight", orthogonal_map="cayley")
        self.blocks: Any = holder.parametrizations["weight"][0]  # type: ignore[index]  # nn.Module types attributes loosely

    def forward(self, coordinates: Tensor) -> Tensor:
        """Return the stacked orthogonal blocks."""
        split = self._split(coordinates)
        wide = torch.promote_types(split.dtype, torch.float32)
        # Half precision would leave them orthogonal to three digits.
        with torch.autocast(coordinates.device.type, enabled=False):
            if split.dtype == wide:
                blocks = self.blocks(split)
            else:  # after model.half(); linear systems are not solved in it
                base = {"base": self.blocks.base.to(wide)}
                blocks = torch.func.functional_call(self.blocks, base, split.to(wide))
        stacked: Tensor = blocks.reshape(coordinates.shape)
        return stacked.to(coordinates.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Start from a weight, or from the nearest one whose blocks are orthogonal."""
        blocks = self._split(weight)
        u, _, vh = torch.linalg.svd(blocks.double(), full_matrices=False)
        nearest = (u @ vh).to(weight)
        coordinates: Tensor = self.blocks.right_inverse(nearest)
        return coordinates.reshape(weight.shape)

    def extra_repr(self) -> str:
        """Say how many blocks there are."""
        return f"gates={self.gates}"

    def _split(self, stacked: Tensor) -> Tensor:
        return stacked.reshape(self.gates, -1, stacked.shape[-1])


def orthogonal(
    model: nn.Module, *, streams: Streams = None, optimizer: Optimizers = None
) -> list[Changed]:
    r"""Hold the recurrent matrix of every gate orthogonal from now on.

    Training starts from the nearest orthogonal matrices, so initialise before: by
    :func:`gradwatch.init.orthogonal_`, or else the weights change at once. The
    parameter behind a weight stays the same object, under the name
    ``parametrizations.weight_hh_l0.original``, with another meaning: coordinates. A
    checkpoint of the state dict has these and is loaded into a model that is
    parametrised alike; one from before is loaded between :func:`remove` and
    :func:`orthogonal`. Deep copies work. A gradient that waits is dropped.

    Args:
        model: A recurrent module, or any module that contains some. With a projection
            the blocks ``(H, P)`` of W_hh are held, W_hr is not.
        streams: Names of streams, or of modules, that are meant; None: all.
        optimizer: Where it exists already: what it remembers of these weights is
            deleted.

    Returns:
        What is held, one entry a stream, with rho before and after.

    Raises:
        TypeError: If ``model`` is no nn.Module.
        ValueError: If it has no recurrent module, or a weight is parametrised already,
            shared, not finite, of half precision, or else cannot be held.

    Example:
        >>> lstm = nn.LSTM(3, 16)
        >>> [held] = orthogonal(lstm)
        >>> forget = lstm.weight_hh_l0.detach()[16:32]
        >>> torch.allclose(forget.T @ forget, torch.eye(16), atol=1e-5)
        True

    References:
        Helfrich, Willmott & Ye (2018), arXiv:1707.09520; Vorontsov et al. (2017),
        arXiv:1702.00071, on what hard orthogonality can cost.
    """
    found = named(recurrences(model), streams)
    if torch.is_inference_mode_enabled():
        raise ValueError("torch.inference_mode() is on; hold weights outside of it.")
    params = [_can_be_held(recurrence, model) for recurrence in found]
    held = holders(optimizer, params)
    before = [radii(recurrence) for recurrence in found]
    with ExitStack() as undo:
        for recurrence in found:
            module, name = recurrence.module, _name(recurrence)
            weight = module._parameters[name]
            assert weight is not None
            gates = OrthogonalGates(weight, max(len(recurrence.stream.gates), 1))
            undo.callback(_put_back, module, name, weight, weight.detach().clone())
            parametrize.register_parametrization(module, name, gates)
            weight.grad = None  # it was that of the weight, not of the coordinates
            _make_copyable(module)
        undo.pop_all()
    for one in held:
        forget(one, params)
    return _changed(found, before)


def remove(
    model: nn.Module, *, streams: Streams = None, optimizer: Optimizers = None
) -> list[Changed]:
    """Let the recurrent weights go: plain parameters again, with their present values.

    Args:
        model: A model that :func:`orthogonal` was called on.
        streams: Names of streams, or of modules, that are meant; None: all.
        optimizer: What it remembers of the coordinates is deleted.

    Returns:
        What was let go, one entry a stream.

    Raises:
        TypeError: If ``model`` is no nn.Module.
        ValueError: If no weight that is meant is held.
    """
    found = [r for r in named(recurrences(model), streams) if _is_held(r)]
    if not found:
        raise ValueError(
            "no recurrent weight of this model is held by "
            "gradwatch.parametrize.orthogonal()."
        )
    params = [tensor for r in found for tensor in holding(r, _name(r))]
    held = holders(optimizer, params)
    before = [radii(recurrence) for recurrence in found]
    for recurrence in found:
        parametrize.remove_parametrizations(recurrence.module, _name(recurrence))
        recurrence.module.get_parameter(_name(recurrence)).grad = None
    for one in held:
        forget(one, params)
    return _changed(found, before)


def _name(recurrence: Recurrence) -> str:
    return "weight_hh" + recurrence.suffix


def _changed(found: list[Recurrence], before: list[dict[str, float]]) -> list[Changed]:
    return [
        Changed(stream=r.stream.name, weights=(_name(r),), before=b, after=radii(r))
        for r, b in zip(found, before, strict=True)
    ]


def _is_held(recurrence: Recurrence) -> bool:
    module, name = recurrence.module, _name(recurrence)
    if not parametrize.is_parametrized(module, name):
        return False
    steps: Any = module.parametrizations[name]  # type: ignore[index]  # nn.Module types attributes loosely
    return len(steps) == 1 and isinstance(steps[0], OrthogonalGates)


def _can_be_held(recurrence: Recurrence, model: nn.Module) -> Tensor:
    """Return the parameter behind a weight, or say why it cannot be held."""
    where = f"{_name(recurrence)} of {recurrence.stream.module}"
    if parametrize.is_parametrized(recurrence.module, _name(recurrence)):
        raise ValueError(f"{where} is parametrised already; remove that first.")
    [param] = holding(recurrence, _name(recurrence))
    used = [p for m in model.modules() for p in m._parameters.values() if p is param]
    if len(used) > 1:
        raise ValueError(
            f"{where} is shared: {len(used)} places use this parameter, and the others "
            "would get the coordinates for the weight. Untie it first."
        )
    if param.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{where} is {param.dtype}; expected float32 or float64. Under autocast "
            "the parameters stay float32."
        )
    if not torch.isfinite(param).all():
        raise ValueError(
            f"{where} holds NaN or Inf; go back to a checkpoint before that, or call "
            "gradwatch.init.orthogonal_(model) first."
        )
    return param


def _put_back(module: nn.Module, name: str, param: Tensor, value: Tensor) -> None:
    """Undo a registration, as far as it came."""
    if parametrize.is_parametrized(module, name):
        parametrize.remove_parametrizations(module, name)
    with torch.no_grad():
        param.copy_(value)


def _make_copyable(module: nn.Module) -> None:
    """Let a parametrised nn.RNNBase be deep-copied after a forward.

    It keeps the weights that its last forward used, which are no leaves of the graph
    here, and deepcopy refuses those. The class is the module's own: torch made it for
    the parametrization, and it goes with it.
    """
    kind: Any = type(module)
    if _torch.flat_weights(module) is None or "_gradwatch_copies" in vars(kind):
        return
    plain = kind.__deepcopy__

    def copied(self: Any, memo: dict[int, Any]) -> Any:
        used = self._flat_weights
        self._flat_weights = [w if w is None or w.is_leaf else w.detach() for w in used]
        try:
            return plain(self, memo)
        finally:
            self._flat_weights = used

    kind.__deepcopy__ = copied
    kind._gradwatch_copies = True
