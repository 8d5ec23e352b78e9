"""Reading the recurrent weights in a file without trusting it.

Nothing in a file is executed: pickles are read with ``weights_only=True``, and what
they claim is compared with what is there before anything is computed. A file that
cannot be read ends in one sentence.
"""

from __future__ import annotations

import json
import os
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from gradwatch.record import Stream
from gradwatch.recurrent import GATES, clean_path

_PICKLE_LIMIT: Final = 16 * 2**20
"""Bytes of the part of a checkpoint that is not tensors; usually some hundred kB."""
_TOO_MUCH: Final = (
    "would allocate far more memory than weights need, and was not read; save "
    "model.state_dict() alone."
)
_HUNGRY: Final = b"builtins\nbytearray"
"""What a pickle may ask for by torch's rules, of any size, and weights never do."""
_WHOLE_LIMIT: Final = 4 * 2**30
"""Bytes of a file in torch's old format, which has to be read as a whole."""
_DEPTH: Final = 8
_ENTRIES: Final = 1_000_000
"""How deep, and how many entries, a checkpoint is searched for weights."""
_INDEX: Final = (
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "model.safetensors",
    "pytorch_model.bin",
)
"""What a folder of Hugging Face holds, in the order in which it is looked for."""


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


class CheckpointError(ValueError):
    """A file that cannot be read as weights; the message is one sentence."""


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint, by their names.

    Args:
        path: A file of torch.save or safetensors, an index of shards, or a folder that
            holds such.

    Returns:
        Name -> recurrent weight on the CPU, as :func:`tensors_of` names it.

    Raises:
        CheckpointError: If it is anything else, broken, or wants to run code.
    """
    file = Path(path)
    try:
        if file.is_dir():
            return _folder(file)
        if not file.exists():
            raise CheckpointError(f"{file} does not exist.")
        if not file.is_file():
            raise CheckpointError(f"{file} is not a regular file.")
        return _file(file)
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise CheckpointError(f"{file} cannot be read: {why}.") from error


def _folder(folder: Path) -> dict[str, Tensor]:
    if (folder / ".metadata").exists():
        raise CheckpointError(
            f"{folder} is a checkpoint of torch.distributed; convert it first: python "
            "-m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE."
        )
    for name in _INDEX:
        if (folder / name).is_file():
            return _file(folder / name)
    raise CheckpointError(
        f"{folder} holds none of {', '.join(_INDEX)}; expected a checkpoint file."
    )


def _file(file: Path, *, shard: bool = False) -> dict[str, Tensor]:
    with file.open("rb") as opened:
        start = opened.read(16)
    if not start:
        raise CheckpointError(f"{file} is empty.")
    if start.startswith(b"PK"):
        return _zipped(file)
    if start[8:9] == b"{" and start[5:8] == b"\0\0\0":
        return _safetensors(file)
    if start.lstrip().startswith(b"{"):
        if shard:
            raise CheckpointError(f"{file} is an index itself, and no shard.")
        return _shards(file)
    if start[:1] == b"\x80":
        return _old(file)
    raise CheckpointError(
        f"{file} is no checkpoint: neither of torch.save nor of safetensors, nor an "
        "index of shards."
    )


def _zipped(file: Path) -> dict[str, Tensor]:
    """Read what torch.save writes since 1.6, mapped into memory."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            small = [e for e in entries if e.file_size <= _PICKLE_LIMIT]
            pickles = [archive.read(e) for e in small if e.filename.endswith(".pkl")]
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise CheckpointError(f"{file} is broken or cut off: {error}.") from error
    if any("/code/" in entry.filename for entry in entries):
        raise CheckpointError(
            f"{file} is a TorchScript archive, which is code; save its state_dict()."
        )
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    if not stored or sum(e.file_size for e in entries) > file.stat().st_size:
        raise CheckpointError(
            f"{file} is compressed, or declares more data than it contains; "
            "torch.save writes no such file."
        )
    if any(_HUNGRY in data for data in pickles):
        raise CheckpointError(f"{file} {_TOO_MUCH}")
    if any(
        entry.filename.endswith(".pkl") and entry.file_size > _PICKLE_LIMIT
        for entry in entries
    ):
        raise CheckpointError(f"{file} holds more than 16 MB beside its tensors.")
    return tensors_of(_loaded(file, mmap=True))


def _old(file: Path) -> dict[str, Tensor]:
    if file.stat().st_size > _WHOLE_LIMIT:
        raise CheckpointError(
            f"{file} is in torch's old format and larger than 4 GB; save it again."
        )
    with file.open("rb") as opened:
        if _HUNGRY in opened.read(_PICKLE_LIMIT):
            raise CheckpointError(f"{file} {_TOO_MUCH}")
    return tensors_of(_loaded(file, mmap=False))


def _loaded(file: Path, *, mmap: bool) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
        except OSError:
            raise
        except Exception as error:  # whatever a hostile file provokes
            raise CheckpointError(f"{file} {_why(error)}") from error


def _why(error: Exception) -> str:
    """Return the rest of a sentence on what torch.load did not like."""
    words = " ".join(str(error).split())
    if found := re.search(r"(?:GLOBAL|[Ff]unction) ([\w.]+)", words):
        return (
            f"wants to run {found[1][:80]}, which is refused; save the weights alone: "
            "torch.save(model.state_dict(), path)."
        )
    first = re.split(r"(?<=\w)[.:] ", words, maxsplit=1)[0][:120].rstrip(".")
    return f"cannot be read as weights ({first or type(error).__name__})."


def _safetensors(file: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"{file} is in the format safetensors: pip install safetensors."
        ) from error
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            names = [name for name in list(opened.keys()) if _matters(name)]
            return {name: opened.get_tensor(name) for name in names}
    except (SafetensorError, ValueError, KeyError) as error:
        words = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{file} is broken or cut off ({words}).") from error


def _shards(file: Path) -> dict[str, Tensor]:
    """Read the shards that an index of Hugging Face names."""
    if file.stat().st_size > _PICKLE_LIMIT:
        raise CheckpointError(f"{file} is too large for an index of shards.")
    try:
        known = json.loads(file.read_bytes())["weight_map"]
        names = sorted({str(shard) for name, shard in known.items() if _matters(name)})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} is no index of shards.") from error
    found: dict[str, Tensor] = {}
    for name in names:
        if Path(name).name != name or not (file.parent / name).is_file():
            raise CheckpointError(f"{file} names the shard {name!r}, not beside it.")
        found |= _file(file.parent / name, shard=True)
    return found


def _matters(name: str) -> bool:
    return re.search(r"(weight|bias)_(hh|ih|hr)", str(name)) is not None


def tensors_of(loaded: Any) -> dict[str, Tensor]:
    """Return the recurrent weights of nested mappings, by dotted names.

    Where all lie in one container, such as ``checkpoint["state_dict"]``, its name is
    left out. Each container is looked at once: a file can hold one many times.
    """
    found: dict[tuple[str, str], Tensor] = {}
    stack = [("", loaded, 0)] if isinstance(loaded, Mapping) else []
    seen: set[int] = set()
    entries = 0
    while stack:
        path, container, depth = stack.pop()
        if id(container) in seen:
            continue
        seen.add(id(container))
        for key, item in container.items():
            entries += 1
            if entries > _ENTRIES or not isinstance(key, str):
                continue
            if isinstance(item, Tensor) and _matters(key):
                found[path, key] = item
            elif isinstance(item, Mapping) and depth < _DEPTH:
                stack.append((f"{path}{key}.", item, depth + 1))
    if len({path for path, _ in found}) == 1:
        return {key: tensor for (_, key), tensor in found.items()}
    return {path + key: tensor for (path, key), tensor in found.items()}


# ---- from names to streams

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
