"""Reading the recurrent weights in a file without trusting it.

Nothing in a file is executed, and nothing that it asks for is made: a pickle is walked
through by a reader of our own, and a tensor stays a claim on bytes of the file until it
is known to be a recurrent weight and its bytes are known to be there. Then they are
mapped. A file that cannot be read ends in one sentence.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import struct
import sys
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from gradwatch.checkpoint.pickles import CheckpointError, Claim, Pickle
from gradwatch.checkpoint.streams import Weights, streams_of, unreadable

__all__ = [
    "CheckpointError",
    "Weights",
    "read_weights",
    "streams_of",
    "tensors_of",
    "unreadable",
]

_PICKLE_LIMIT: Final = 16 * 2**20
"""Bytes of the part of a checkpoint that is not tensors; usually some hundred kB."""
_DIRECTORY_LIMIT: Final = 8 * 2**20
"""Bytes of a zip file's directory; enough for 100,000 tensors."""
_MAGIC: Final = 0x1950A86A20F9469CFC6C
"""What torch's old format starts with."""
_DEPTH: Final = 8
_ENTRIES: Final = 1_000_000
"""How deep, and how many entries, a checkpoint is searched for weights."""
_NAMES: Final = 10_000
"""Recurrent weights in one file, at most."""
_NESTED: Final = 1_000
"""Objects and lists in an index of shards, at most; it has two."""
_INDEX: Final = (
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "model.safetensors",
    "pytorch_model.bin",
)
"""What a folder of Hugging Face holds, in the order in which it is looked for."""
_Found = TypeVar("_Found", Tensor, Claim)


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
        return _safetensors(file, int.from_bytes(start[:8], "little"))
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


class _Wary(io.FileIO):
    """A file of which no more than a limit is read at once."""

    limit = _DIRECTORY_LIMIT

    def read(self, size: int | None = -1, /) -> Any:
        """Read; zipfile asks for the whole directory at once, however large."""
        if size is not None and size > self.limit:
            raise zipfile.BadZipFile("its directory is larger than 8 MB")
        return super().read(size)


def _zipped(file: Path) -> dict[str, Tensor]:
    """Read what torch.save writes since 1.6."""
    try:
        with _Wary(file) as opened, zipfile.ZipFile(opened) as archive:
            opened.limit = _PICKLE_LIMIT
            entries = {entry.filename: entry for entry in archive.infolist()}
            _check_entries(file, archive.infolist())
            names = [name for name in entries if re.fullmatch(r"[^/]+/data\.pkl", name)]
            if len(names) != 1:
                raise zipfile.BadZipFile(f"it holds {len(names)} files named data.pkl")
            data, top = archive.read(names[0]), names[0].removesuffix("data.pkl")
            order = f"{top}byteorder"
            big = order in entries and archive.read(order) == b"big"
    except (CheckpointError, OSError):
        raise
    except Exception as error:  # whatever zipfile meets in a hostile file
        raise CheckpointError(f"{file} is broken or cut off: {error}.") from error

    def extent(key: str) -> tuple[int, int]:
        entry = entries[f"{top}data/{key}"]
        with file.open("rb") as opened:
            opened.seek(entry.header_offset)
            after = sum(struct.unpack("<26x2H", opened.read(30)))  # name and padding
        return entry.header_offset + 30 + after, entry.file_size

    loaded, _ = _unpickled(file, io.BytesIO(data), len(data))
    return _mapped(file, loaded, extent, swapped=big != (sys.byteorder == "big"))


def _check_entries(file: Path, entries: list[zipfile.ZipInfo]) -> None:
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
    for entry in entries:
        if entry.filename.endswith(".pkl") and entry.file_size > _PICKLE_LIMIT:
            raise CheckpointError(f"{file} holds more than 16 MB beside its tensors.")


def _old(file: Path) -> dict[str, Tensor]:
    """Read what torch.save wrote before: five pickles, then all storages in a row."""
    with file.open("rb") as opened:
        data = opened.read(min(_PICKLE_LIMIT, file.stat().st_size))
    stream = io.BytesIO(data)
    magic, _ = _unpickled(file, stream, len(data))
    if type(magic) is not int or magic != _MAGIC:
        raise CheckpointError(f"{file} is a pickle, and none of torch.save.")
    for _ in range(2):  # the version, and the machine
        _unpickled(file, stream, len(data))
    loaded, widths = _unpickled(file, stream, len(data))
    keys, _ = _unpickled(file, stream, len(data))
    extents: dict[str, tuple[int, int]] = {}
    with _in_one_sentence(file), file.open("rb") as opened:
        place, end = stream.tell(), file.stat().st_size
        for key in keys:
            if type(key) is not str:
                raise ValueError("a storage has no name")
            opened.seek(place)
            [count] = struct.unpack("<q", opened.read(8))
            size = count * widths[key]
            if count < 0 or place + 8 + size > end:
                raise ValueError("cut off")
            extents[key] = (place + 8, size)
            place += 8 + size
    return _mapped(file, loaded, extents.__getitem__, swapped=False)


def _unpickled(file: Path, stream: io.BytesIO, size: int) -> tuple[Any, dict[str, int]]:
    """Return what the next pickle holds, and the bytes of a number in each storage."""
    reader = Pickle(size)
    with _in_one_sentence(file):
        return reader.load(stream), reader.widths


def _mapped(
    file: Path, loaded: Any, extent: Callable[[str], tuple[int, int]], *, swapped: bool
) -> dict[str, Tensor]:
    """Return the recurrent weights among what was unpickled, mapped into memory.

    Args:
        file: The file.
        loaded: Mappings that hold claims.
        extent: Returns where a storage lies in the file: its first byte, its bytes.
        swapped: Whether the file is of a machine with another order of bytes.
    """
    storages: dict[str, torch.UntypedStorage] = {}
    with _in_one_sentence(file):
        size = file.stat().st_size
        whole = torch.UntypedStorage.from_file(str(file), False, size)

        def storage(claim: Claim) -> torch.UntypedStorage:
            if claim.key not in storages:
                start, count = extent(claim.key)
                if start + count > size:
                    raise ValueError("cut off")
                part = whole[start : start + count]
                if swapped or start % 8:
                    part = part.clone()  # numbers are read where they are aligned
                if swapped:
                    part.byteswap(claim.dtype)
                storages[claim.key] = part
            return storages[claim.key]

        found = _search(loaded, Claim)
        tensors = itertools.islice(found.items(), _NAMES + 1)
        weights = {name: _tensor(claim, storage) for name, claim in tensors}
    _check_number(file, weights)
    return weights


def _tensor(claim: Claim, storage: Callable[[Claim], torch.UntypedStorage]) -> Tensor:
    """Return a claim as a tensor, once all its numbers are known to be there."""
    if claim.layout is not torch.strided:
        return torch.empty(claim.size, layout=torch.sparse_coo)
    if not claim.key:
        return torch.empty(claim.size, dtype=claim.dtype, device="meta")
    held, steps = storage(claim), zip(claim.size, claim.stride, strict=True)
    end = claim.offset + 1 + sum((n - 1) * step for n, step in steps)
    if 0 not in claim.size and end * claim.dtype.itemsize > held.nbytes():
        raise ValueError("a tensor is larger than its storage")
    empty = torch.empty(0, dtype=claim.dtype)
    return empty.set_(held, claim.offset, claim.size, claim.stride)


@contextlib.contextmanager
def _in_one_sentence(file: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{file} {error}") from error
    except OSError:
        raise
    except Exception as error:  # whatever a hostile file provokes
        words = " ".join(str(error).split())
        first = re.split(r"(?<=\w)[.:] ", words, maxsplit=1)[0][:120].rstrip(".")
        raise CheckpointError(
            f"{file} cannot be read as weights ({first or type(error).__name__})."
        ) from error


def _safetensors(file: Path, header: int) -> dict[str, Tensor]:
    if header > min(_PICKLE_LIMIT, file.stat().st_size):
        raise CheckpointError(f"{file} is broken or cut off, or has too long a header.")
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"{file} is in the format safetensors: pip install safetensors."
        ) from error
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            names = [name for name in list(opened.keys()) if _matters(name)]
            found = {name: opened.get_tensor(name) for name in names[: _NAMES + 1]}
    except (SafetensorError, ValueError, KeyError) as error:
        words = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{file} is broken or cut off ({words}).") from error
    _check_number(file, found)
    return found


def _shards(file: Path) -> dict[str, Tensor]:
    """Read the shards that an index of Hugging Face names."""
    if file.stat().st_size > _PICKLE_LIMIT:
        raise CheckpointError(f"{file} is too large for an index of shards.")
    try:
        data = file.read_bytes()
        if data.count(b"{") + data.count(b"[") > _NESTED:
            raise ValueError("it is nested")
        known = json.loads(data)["weight_map"]
        names = sorted({str(shard) for name, shard in known.items() if _matters(name)})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} is no index of shards.") from error
    found: dict[str, Tensor] = {}
    for name in names:
        if Path(name).name != name or not (file.parent / name).is_file():
            raise CheckpointError(f"{file} names the shard {name!r}, not beside it.")
        found |= _file(file.parent / name, shard=True)
        _check_number(file, found)
    return found


def _matters(name: str) -> bool:
    return re.search(r"(weight|bias)_(hh|ih|hr)", str(name)) is not None


def _check_number(file: Path, found: Collection[str]) -> None:
    if len(found) > _NAMES:
        raise CheckpointError(f"{file} holds more than {_NAMES:,} recurrent weights.")


def tensors_of(loaded: Any) -> dict[str, Tensor]:
    """Return the recurrent weights of nested mappings, by dotted names.

    Where all lie in one container, such as ``checkpoint["state_dict"]``, its name is
    left out. Each container is looked at once: a file can hold one many times.
    """
    return _search(loaded, Tensor)


def _search(loaded: Any, kind: type[_Found]) -> dict[str, _Found]:
    found: dict[tuple[str, str], _Found] = {}
    stack = [("", loaded, 0)] if isinstance(loaded, Mapping) else []
    seen: set[int] = set()
    entries = 0
    while stack:
        path, container, depth = stack.pop()
        if id(container) in seen:
            continue
        seen.add(id(container))
        for key, item in container.items():
            # A path is copied for each entry, so one of a thousand letters counts more.
            entries += 1 + (len(path) + len(key)) // 64 if isinstance(key, str) else 1
            if entries > _ENTRIES or not isinstance(key, str):
                continue
            if isinstance(item, kind) and _matters(key):
                found[path, key] = item
            elif isinstance(item, Mapping) and depth < _DEPTH:
                stack.append((f"{path}{key}.", item, depth + 1))
    if len({path for path, _ in found}) == 1:
        return {key: item for (_, key), item in found.items()}
    return {path + key: item for (path, key), item in found.items()}
