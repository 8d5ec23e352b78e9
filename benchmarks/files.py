"""How large records.jsonl gets: bytes a step, and after a million made-up steps.

Run: python -m benchmarks.files [--quick]
"""

import argparse
import random
import tempfile
from pathlib import Path

from benchmarks.results import Results
from gradwatch.metrics import CATALOGUE, run_key, stream_key
from gradwatch.record import StepRecord, Stream, dump_line
from gradwatch.sinks.jsonl import Jsonl


def streams(count: int) -> list[Stream]:
    """Return the streams of a stacked LSTM."""
    return [
        Stream(
            name=f"encoder.lstm.l{layer}",
            module="encoder.lstm",
            kind="LSTM",
            layer=layer,
            direction="forward",
            input_size=64,
            hidden_size=128,
            gates=("i", "f", "g", "o"),
        )
        for layer in range(count)
    ]


def main() -> None:
    """Write the steps and print the sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few seconds")
    quick = parser.parse_args().quick
    steps = 10**4 if quick else 10**6
    rows = [m for m in CATALOGUE.values() if m.depth == "gradients"]
    keys = [run_key(m.name) for m in rows if m.scope == "run"]
    keys += [
        stream_key(s, m.name) for s in streams(4) for m in rows if m.scope == "stream"
    ]
    value = random.Random(0).random
    with tempfile.TemporaryDirectory() as folder:
        sink = Jsonl(Path(folder), {}, say=print)
        for step in range(steps):
            record = StepRecord(
                step=step,
                time=1.7e9 + 0.013 * step,
                metrics={key: value() for key in keys},
            )
            sink.write(record)
            if step % 16 == 0:
                sink.flush()
        sink.close()
        size = (Path(folder) / "records.jsonl").stat().st_size
    results = Results("files", keep=not quick)
    results.table(
        "size", ["values a step", "bytes a step at first", "steps", "MiB in the end"]
    )
    line = len(dump_line(record)) + 1
    results.row(len(keys), line, f"{steps:,}", f"{size / 2**20:.0f}")
    results.save()


if __name__ == "__main__":
    main()
