"""From the names and shapes of recurrent weights to streams."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from gradwatch.record import Stream
from gradwatch.recurrent import GATES, clean_path

LARGEST: Final = 4096
"""Hidden size above which nothing is computed; a hostile file may claim any."""
_DTYPES: Final = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_KINDS: Final = {1: "RNN", 3: "GRU", 4: "LSTM"}
_NAME: Final = re.compile(
    r"(?P<path>.*?)(?P<what>weight_hh|weight_hr|bias_ih|bias_hh)"
    r"(?P<suffix>(_l\d{1,6}(_reverse)?)?)$",
    re.DOTALL,
)
_PARAMETRISED: Final = re.compile(
    r"(?P<path>.*?)parametrizations\.(?P<name>weight_hh\w*)\.", re.DOTALL
)

Weights = dict[str, Tensor]


def streams_of(
    tensors: Mapping[str, Tensor], left_out: dict[str, str]
) -> list[tuple[Stream, Weights]]:
    """Find streams by PyTorch's names and shapes.

    Args:
        tensors: Tensors by name, with any prefix.
        left_out: Is added to: name -> why it is no stream that can be looked at.

    Returns:
        Streams with their weights, named as in :func:`stored_weights`. The kind of a
        vanilla net is ``RNN``: its nonlinearity is not told.
    """
    groups: dict[tuple[str, str], Weights] = {}
    for name, tensor in tensors.items():
        if held := _PARAMETRISED.match(name):
            whole = clean_path(held["path"] + held["name"])
            left_out[whole] = (
                "computed by a parametrization; inspect the model that has loaded it"
            )
        elif match := _NAME.match(name):
            key = (match["path"], match["suffix"])
            groups.setdefault(key, {})[match["what"]] = tensor
    found = []
    for (path, suffix), weights in groups.items():
        if "weight_hh" not in weights:
            continue
        module = clean_path(path.rstrip("."))
        stream = _stream(module, suffix, weights)
        if isinstance(stream, str):
            left_out[f"{module}.{suffix[1:]}".strip(".")] = stream
        else:
            found.append((stream, weights))
    return found


def _stream(module: str, suffix: str, weights: Weights) -> Stream | str:
    """Return the stream that shapes tell of, or why they do not."""
    weight, projection = weights["weight_hh"], weights.get("weight_hr")
    for name, matrix in (("weight_hh", weight), ("weight_hr", projection)):
        if matrix is not None and matrix.is_nested:
            return f"{name} is nested; expected two dimensions"
        if matrix is not None and (matrix.dim() != 2 or 0 in matrix.shape):
            return f"{name} has shape {tuple(matrix.shape)}; expected two dimensions"
    shape = tuple(weight.shape)
    size = shape[1] if projection is None else int(projection.shape[-1])
    count = shape[0] / size
    if count not in _KINDS or (projection is not None and count != 4):
        return f"weight_hh has shape {shape}, which is of no nn.RNN, nn.GRU or nn.LSTM"
    kind = _KINDS[int(count)]
    module = module or kind.lower()
    layer = re.match(r"_l(\d+)", suffix)
    return Stream(
        name=module + (f".{suffix[1:]}" if suffix else ""),
        module=module,
        kind=kind,
        layer=int(layer[1]) if layer else 0,
        direction="reverse" if suffix.endswith("_reverse") else "forward",
        input_size=0,
        hidden_size=size,
        proj_size=0 if projection is None else shape[1],
        gates=GATES.get(kind, ()),
    )


def unreadable(stream: Stream, weights: Weights) -> str | None:
    """Return why weights cannot be looked at, before anything is computed from them.

    A file may claim any size, and a tensor more numbers than are stored.
    """
    if stream.hidden_size > LARGEST:
        return f"hidden size {stream.hidden_size:,} is above {LARGEST:,}"
    rows = max(len(stream.gates), 1) * stream.hidden_size
    width = stream.proj_size or stream.hidden_size
    expected = {"weight_hh": (rows, width), "weight_hr": (width, stream.hidden_size)}
    for name, tensor in weights.items():
        if tensor.is_nested:
            return f"{name} is nested; expected a plain tensor"
        shape = tuple(tensor.shape)
        wanted = (rows,) if name.startswith("bias") else expected.get(name, shape)
        if shape != wanted:
            return f"{name} has shape {shape}; expected {wanted}"
        if tensor.device.type == "meta":
            return f"{name} holds no values (device meta)"
        if tensor.layout != torch.strided or tensor.is_quantized:
            return f"{name} is sparse or quantised"
        if tensor.dtype not in _DTYPES:
            return f"{name} is {tensor.dtype}; expected floating-point numbers"
        if hasattr(tensor, "to_local"):
            return f"{name} is sharded over processes"
        held = tensor.untyped_storage().nbytes() // tensor.element_size()
        if held < tensor.numel():
            return f"{name} claims {tensor.numel():,} numbers and holds {held:,}"
    return None
