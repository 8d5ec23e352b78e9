"""Reads the log that the wandb client keeps of a run, offline or online.

The file is framed like a LevelDB log: after seven bytes of header, blocks of 32 KiB
hold fragments, each behind its checksum, length and type; the records are protobuf.
"""

import json
import struct
import time
from dataclasses import dataclass
from pathlib import Path

from wandb.proto import wandb_internal_pb2 as proto

_BLOCK = 32 * 1024
_HEAD = struct.Struct("<IHB")
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclass
class Log:
    """What a run's log holds.

    Attributes:
        rows: The committed rows, in order.
        alerts: The alerts: objects with ``title``, ``text`` and ``level``.
        metrics: Defined metric or glob -> its step metric, or None.
        config: The config, by top-level key.
        whole: Whether the run has ended and all of it is here.
    """

    rows: list
    alerts: list
    metrics: dict
    config: dict
    whole: bool


def read_log(path, timeout=5.0):
    """Read a log; ``finish()`` returns before its end is on the disk."""
    end = time.monotonic() + timeout
    while not (log := _parse(path)).whole and time.monotonic() < end:
        time.sleep(0.01)
    return log


def _parse(path):
    log = Log([], [], {}, {}, False)
    data = Path(path).read_bytes() if Path(path).exists() else b""
    for raw in _records(data):
        record = proto.Record.FromString(raw)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            log.rows.append(_values(record.history.item))
        elif kind == "alert":
            log.alerts.append(record.alert)
        elif kind == "metric":
            name = record.metric.name or record.metric.glob_name
            log.metrics[name] = record.metric.step_metric or None
        elif kind in {"config", "run"}:
            config = record.config if kind == "config" else record.run.config
            log.config.update(_values(config.update))
        log.whole |= kind == "exit"
    return log


def _records(data):
    at, parts = 7, b""
    while at + _HEAD.size <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _HEAD.size:
            at += left
            continue
        _, length, kind = _HEAD.unpack_from(data, at)
        fragment = data[at + _HEAD.size : at + _HEAD.size + length]
        if kind == 0 or len(fragment) < length:
            return  # it is still being written
        at += _HEAD.size + length
        parts = fragment if kind in {_WHOLE, _FIRST} else parts + fragment
        if kind in {_WHOLE, _LAST}:
            yield parts


def _values(items):
    return {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items}
