"""What a million steps cost when an alarm comes and goes all the while.

Made-up steps, of which every 30th is NaN, are judged and written as a watch does:
memory, files and the time a step takes have to stay where they are.

Run: python -m benchmarks.flapping [--quick]
"""

import argparse
import math
import resource
import tempfile
import time
from pathlib import Path

from benchmarks.results import Results
from gradwatch.kinds.catalogue import CATALOGUE, default_rules
from gradwatch.kinds.incidents import Incidents
from gradwatch.kinds.judge import Judge
from gradwatch.metrics import run_key
from gradwatch.record import StepRecord
from gradwatch.sinks.jsonl import Jsonl

NORM, NONFINITE = map(run_key, ("grad_norm", "nonfinite"))


def step_of(number: int) -> StepRecord:
    """Return a made-up step."""
    bad = number % 30 == 29
    metrics = {NORM: math.nan if bad else 1.0, NONFINITE: float(bad)}
    return StepRecord(step=number, time=1.7e9 + 0.01 * number, metrics=metrics)


def main() -> None:
    """Judge and write the steps; print what they have come to on the way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few seconds")
    quick = parser.parse_args().quick
    marks = [10**3, 10**4] if quick else [10**4, 10**5, 10**6]
    results = Results("flapping", keep=not quick)
    results.table(
        "growth",
        ["steps", "alerts given", "incidents", "peak memory, MiB", "files, MiB", "us"],
        "The last column is the time a step took since the row before.",
    )
    judge, given = Judge(default_rules([]), Incidents(CATALOGUE)), 0
    with tempfile.TemporaryDirectory() as place:
        sink = Jsonl(Path(place), {}, say=print)
        began, done = time.perf_counter(), 0
        for number in range(marks[-1]):
            record = step_of(number)
            alerts, changed = judge.take(record)
            given += len(alerts)
            sink.write(record, alerts)
            for incident in changed:
                sink.write_incident(incident, {})
            if number % 16 == 15:
                sink.flush()
            if number + 1 in marks:
                taken = time.perf_counter() - began
                sizes = (p.stat().st_size for p in Path(place).rglob("*.json*"))
                results.row(
                    f"{number + 1:,}",
                    given,
                    len(judge.incidents.all()),
                    resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                    f"{sum(sizes) / 2**20:.1f}",
                    f"{1e6 * taken / (number + 1 - done):.0f}",
                )
                began, done = time.perf_counter(), number + 1
        sink.close()
    results.save()


if __name__ == "__main__":
    main()
