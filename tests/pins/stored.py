"""Pinned values in files: written, read, and compared place by place."""

import gzip
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DIGITS = 7
CLOSE = 1e-5


def write(part: str, values: Any, digits: int = DIGITS, folder: Path = HERE) -> None:
    """Store the values of a part; the same values make the same bytes."""
    text = json.dumps(_rounded(values, digits), separators=(",", ":"), sort_keys=True)
    data = gzip.compress(text.encode("ascii"), mtime=0)
    (folder / f"{part}.json.gz").write_bytes(data)


def read(part: str, folder: Path = HERE) -> Any:
    """Return the values of a part as they were stored."""
    return json.loads(gzip.decompress((folder / f"{part}.json.gz").read_bytes()))


def _rounded(value: Any, digits: int) -> Any:
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {str(k): _rounded(v, digits) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(v, digits) for v in value]
    return value


def differences(
    was: Any, now: Any, close: float = CLOSE, at: str = ""
) -> Iterator[str]:
    """Yield each place at which values differ, with both.

    Args:
        was: As stored.
        now: As they are; turned into what would be stored.
        close: Relative difference of two floats that is none.
        at: Where in the whole.
    """
    now = _rounded(now, 17)
    if isinstance(was, dict) and isinstance(now, dict):
        for key in sorted({*was, *now}):
            if key not in was or key not in now:
                found = "is new" if key not in was else "is gone"
                yield f"{at}/{key} {found}: {_short(was.get(key, now.get(key)))}"
            else:
                yield from differences(was[key], now[key], close, f"{at}/{key}")
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        for i, (one, two) in enumerate(zip(was, now, strict=True)):
            yield from differences(one, two, close, f"{at}[{i}]")
    elif not _same(was, now, close):
        yield f"{at} was {_short(was)}, is {_short(now)}"


def _same(was: Any, now: Any, close: float) -> bool:
    numbers = [type(x) in (int, float) for x in (was, now)]
    if all(numbers) and float in (type(was), type(now)):
        return math.isclose(was, now, rel_tol=close, abs_tol=1e-30)
    return bool(was == now)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 300 else f"{text[:300]}..."
