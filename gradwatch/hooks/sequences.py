"""A few sequences of one call: copies of what a module was given and returned.

Copies, because a user may change the input or the output in place right after the
call, and because a whole batch would be kept alive. The sequences are spread evenly
over the batch, in the order of their lengths where they are packed. No random numbers.

Axes: T time, B batch, K sequences looked at, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from gradwatch import _torch
from gradwatch.numerics import axes

_HALF: Final = (torch.float16, torch.bfloat16)


@dataclass(slots=True, eq=False, kw_only=True)
class Sequences:
    """What one call was given and returned, for K of its sequences.

    Attributes:
        x: The input, shape ``(T, K, F)``.
        lengths: Of each sequence; None where all have T steps.
        h0: The given first states, shape ``(layers * directions, K, P)``; or None.
        c0: The given first cell states of an LSTM; or None.
        y: The output, shape ``(T, K, directions * P)``.
        finite: Whether the input of the whole batch is; one element, on the device.
        roughness: How unlike neighbours are along time and along the batch, for an
            input that no weight has made: :func:`gradwatch.numerics.axes.roughness`.
        largest: Of a ReLU module: the largest output of each unit over the whole
            batch, shape ``(directions * H,)``; else None.
        dropout: Probability of dropout between layers; 0 for none.
        masks: Draws the masks of that dropout again, one for each layer but the last,
            shape ``(T, K, directions * P)``; None where they cannot be known.
        rounded: Whether the call computed in less than float32.
        batch: How many sequences the call had.
        carried: Whether the first states are those that an earlier call returned, with
            no gradient through them; they may still be new zeros at the old address.
        composite: Whether h was made from the returned c by operations of its own, so
            that the gradient of c holds what comes through h: an LSTMCell on the CPU,
            whose cell is not fused as other devices' are, but for an unbatched one,
            which returns views.
        pick: Takes the sequences out of what is laid out like the input; its
            ``of_states`` out of states.
        reached: For each of these the share of the batch's sequences that a gradient
            reaches, and of its time steps, 0 for states; shape (2,), on the device.
        grads: What backward brought to the output ``y`` and to the states ``h``, ``c``
            that the call returned, for these sequences; filled by the tensor hooks.
    """

    x: Tensor
    lengths: tuple[int, ...] | None
    h0: Tensor | None
    c0: Tensor | None
    y: Tensor
    finite: Tensor | None = None
    roughness: Tensor | None = None
    largest: Tensor | None = None
    dropout: float = 0.0
    masks: Callable[[], Iterator[Tensor]] | None = None
    rounded: bool = False
    batch: int = 0
    carried: bool = False
    composite: bool = False
    pick: Pick
    reached: dict[str, Tensor] = field(default_factory=dict)
    grads: dict[str, Tensor] = field(default_factory=dict)

    def take_grad(self, name: str, grad: Tensor) -> None:
        """Copy what backward brought to one of the tensors that the call returned."""
        of = self.pick if name == "y" else self.pick.of_states
        self.grads[name] = of(grad.detach())
        axis = self.pick.batch_axis if name == "y" else -2
        if axis is not None and self.pick.batch > 1:
            there = (grad.detach() != 0).any(-1)
            first = there.movedim(axis if name == "y" else -1, 0)
            sequences = first.reshape(len(first), -1).any(1)
            steps = there.any(axis) if name == "y" else torch.zeros_like(sequences)
            shares = sequences.float().mean(), steps.float().mean()
            self.reached[name] = torch.stack(shares)


class Pick(Protocol):
    """Takes the sequences looked at out of a batch.

    Attributes:
        batch: How many sequences there are.
        batch_axis: Of what is laid out like the input; None where it has none.
    """

    batch: int
    batch_axis: int | None

    def __call__(self, x: Tensor) -> Tensor:
        """Copy them from a tensor laid out like the input: ``(T, K, F)``."""

    def of_states(self, state: Tensor) -> Tensor:
        """Copy them from states as the module takes them."""

    def roughness(self, x: Tensor) -> Tensor | None:
        """Return that of an input; None where an axis is missing, or short."""


def tensors(output: object) -> Iterator[Tensor]:
    """Yield the tensors that a recurrent module returned, whatever it was made into."""
    if isinstance(output, PackedSequence):
        yield output.data
    elif isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for item in output.values():
            yield from tensors(item)
    elif isinstance(output, (tuple, list)):
        for item in output:
            yield from tensors(item)


def given_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    """Return the first states that a call was given: (h,), (h, c), or none."""
    hx = args[1] if len(args) > 1 else kwargs.get("hx")
    return () if hx is None else tuple(tensors(hx))


def take_sequences(
    module: nn.Module,
    given: object,
    states: tuple[Tensor, ...],
    output: object,
    *,
    count: int | None,
    rng: Tensor | None,
    carried: bool,
) -> Sequences | str:
    """Copy a few sequences of one call.

    Args:
        module: The nn.RNNBase or nn.RNNCellBase that was called.
        given: Its input.
        states: The first states that it was given; empty for none.
        output: What it returned.
        count: How many sequences to take; None for all.
        rng: The CPU generator's state just before the call, where dropout drew from it.
        carried: Whether the first states lie where an earlier call returned its own.

    Returns:
        The sequences; or, in words, why they cannot be had.
    """
    data = given.data if isinstance(given, PackedSequence) else given
    if not isinstance(data, Tensor) or not _torch.holds_values(data):
        return "its input is no ordinary tensor"
    if not all(map(_torch.holds_values, states)):
        return "its first states are no ordinary tensors"
    y = next(tensors(output)).detach()
    if isinstance(given, PackedSequence):
        pick: _Dense | _Packed = _Packed(given, count)
    else:
        pick = _Dense(module, data, count)
    if pick.wrong(y, module) or not pick.batch:
        return "its output is not that of the module it extends, or is empty"
    if not _are_states(module, states, pick.batch):
        return "its first states are not those of the module it extends"
    with torch.no_grad():
        h0, c0 = (*(pick.of_states(s.detach()) for s in states), None, None)[:2]
        dropout = _dropout(module)
        known = rng is not None and y.device.type == "cpu"
        relu = getattr(module, "mode", getattr(module, "nonlinearity", "")) in (
            "RNN_RELU",
            "relu",
        )
        return Sequences(
            x=pick(data.detach()),
            lengths=pick.lengths,
            h0=h0,
            c0=c0 if isinstance(module, (nn.LSTM, nn.LSTMCell)) else None,
            y=pick(y),
            finite=torch.isfinite(data).all(),
            roughness=None if data.requires_grad else pick.roughness(data),
            largest=y.flatten(0, -2).amax(0) if relu and y.dim() > 1 else None,
            dropout=dropout,
            masks=_masks(module, pick, y, rng) if dropout and known else None,
            rounded=y.dtype in _HALF or torch.is_autocast_enabled(y.device.type),
            batch=pick.batch,
            carried=carried,
            composite=isinstance(module, nn.LSTMCell)
            and y.dim() == 2
            and y.device.type in ("cpu", "mps"),
            pick=pick,
        )


def _width(module: nn.Module) -> int:
    """Return how wide the output of one direction is."""
    return int(getattr(module, "proj_size", 0) or module.hidden_size)  # type: ignore[arg-type]  # nn.Module types attributes loosely


def _are_states(module: nn.Module, states: tuple[Tensor, ...], batch: int) -> bool:
    """Tell whether tensors are first states (h,) or (h, c) of such a module."""
    layers = int(getattr(module, "num_layers", 1))
    rows = layers * (2 if getattr(module, "bidirectional", False) else 1)
    shapes = [(rows * batch * _width(module)), rows * batch * int(module.hidden_size)]  # type: ignore[arg-type]  # nn.Module types attributes loosely
    known = [s.is_floating_point() and s.numel() for s in states]
    return len(states) <= 2 and known == shapes[: len(states)]


def _dropout(module: nn.Module) -> float:
    layers = int(getattr(module, "num_layers", 1))
    if layers < 2 or not module.training:
        return 0.0
    return float(getattr(module, "dropout", 0.0))


def _masks(
    module: nn.Module, pick: _Dense | _Packed, y: Tensor, rng: Tensor | None
) -> Callable[[], Iterator[Tensor]]:
    """Return what draws the masks again: the generator's next draws, layer by layer."""
    shape, layers, p = pick.drawn(y), int(module.num_layers), _dropout(module)  # type: ignore[arg-type]  # nn.Module types attributes loosely
    dtype = y.dtype

    def draw() -> Iterator[Tensor]:
        assert rng is not None
        generator = torch.Generator().set_state(rng)
        for _ in range(layers - 1):
            drawn = torch.empty(shape, dtype=dtype).bernoulli_(
                1 - p, generator=generator
            )
            yield pick.of_drawn(drawn / (1 - p))

    return draw


def _spread(batch: int, count: int | None) -> slice:
    """Return ``count`` indices, evenly spread over a batch, as a slice."""
    wanted = batch if count is None else min(count, batch)
    step = batch // wanted if wanted else 1
    return slice(0, step * wanted, step)


class _Dense:
    """Picks sequences from a padded batch, an unbatched sequence, or one step."""

    lengths: tuple[int, ...] | None = None

    def __init__(self, module: nn.Module, x: Tensor, count: int | None) -> None:
        cell = isinstance(module, nn.RNNCellBase)
        self._steps = 1 if cell else None
        self._batched = x.dim() == (2 if cell else 3)
        self._batch_first = not cell and bool(getattr(module, "batch_first", False))
        self._time_first = cell or not self._batch_first or not self._batched
        if not self._batched:
            self.batch = 1
        else:
            self.batch = x.shape[0 if cell or self._batch_first else 1]
        self._leading = x.shape[:-1]
        own = 0 if cell or self._batch_first else 1
        self.batch_axis: int | None = own if self._batched else None
        self._rows = _spread(self.batch, count)

    def wrong(self, y: Tensor, module: nn.Module) -> bool:
        """Tell whether an output is not what such a module returns."""
        width = _width(module) * (2 if getattr(module, "bidirectional", False) else 1)
        return y.shape != (*self._leading, width)

    def __call__(self, x: Tensor) -> Tensor:
        """Copy the sequences of a tensor laid out like the input."""
        if self._steps:
            x = x[None]
        if not self._batched:
            return x.unsqueeze(1).clone()
        if self._time_first:
            return x[:, self._rows].clone()
        return x[self._rows].transpose(0, 1).contiguous().clone()

    def of_states(self, state: Tensor) -> Tensor:
        """Copy the sequences of first states, laid out as the module takes them."""
        if self._steps:
            state = state[None]
        return state[:, self._rows].clone() if self._batched else state[:, None].clone()

    def roughness(self, x: Tensor) -> Tensor | None:
        """Return how unlike neighbours are along time and along the batch."""
        if self._steps or not self._batched or min(x.shape[:2]) < axes.LEAST:
            return None
        return axes.roughness(x if self._time_first else x.transpose(0, 1))

    def drawn(self, y: Tensor) -> tuple[int, ...]:
        """Return the shape in which the module draws a mask of dropout."""
        steps = y.shape[1] if not self._time_first else y.shape[0]
        return steps, self.batch, y.shape[-1]

    def of_drawn(self, mask: Tensor) -> Tensor:
        """Return the sequences of such a mask."""
        return mask[:, self._rows].clone()


class _Packed:
    """Picks sequences from a packed batch, shorter and longer ones alike."""

    batch_axis: int | None = None

    def __init__(self, given: PackedSequence, count: int | None) -> None:
        sizes = given.batch_sizes
        self.batch = int(sizes[0]) if len(sizes) else 0
        rows = _spread(self.batch, count)
        place = torch.arange(self.batch)[rows]
        present = place < sizes[:, None]
        start = (sizes.cumsum(0) - sizes)[:, None]
        index = (start + place).clamp_(max=max(int(sizes.sum()) - 1, 0))
        device = given.data.device
        self._index = index.to(device, non_blocking=True)
        self._present = present[..., None].to(device, non_blocking=True)
        self.lengths = tuple(present.sum(0).tolist())
        order = given.sorted_indices
        self._order = None if order is None else order[rows]
        self._rows = rows
        self._length = len(given.data)

    def wrong(self, y: Tensor, module: nn.Module) -> bool:
        """Tell whether an output is not what such a module returns."""
        width = _width(module) * (2 if getattr(module, "bidirectional", False) else 1)
        return y.shape != (self._length, width)

    def __call__(self, x: Tensor) -> Tensor:
        """Copy the sequences of the packed data, 0 behind their ends."""
        return x[self._index].where(self._present, 0)

    def of_states(self, state: Tensor) -> Tensor:
        """Copy the sequences of first states, which are in the user's order."""
        if self._order is None:
            return state[:, self._rows].clone()
        return state.index_select(1, self._order)

    def roughness(self, x: Tensor) -> None:
        """Return nothing: no two of the packed rows are neighbours for sure."""

    def drawn(self, y: Tensor) -> tuple[int, ...]:
        """Return the shape in which the module draws a mask of dropout."""
        return tuple(y.shape)

    def of_drawn(self, mask: Tensor) -> Tensor:
        """Return the sequences of such a mask."""
        return self(mask)
