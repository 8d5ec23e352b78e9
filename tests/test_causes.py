"""Each cause of the catalogue on a small real run, its healthy twin beside it."""

import re
from collections import Counter

import pytest
import torch

from gradwatch.kinds.catalogue import CATALOGUE
from gradwatch.recurrent import recurrences
from gradwatch.rules import replay
from tests.causes import exploding, loop, outside, units, vanishing
from tests.causes.run import trained
from tests.support.seldom import seldom

ROOMS = (exploding, vanishing, loop, outside, units)
CASES = {name: case for room in ROOMS for name, case in room.CASES.items()}
NOTICES = {
    ("no_gradient", "frozen"),
    ("not_learning", None),
    ("not_learning", "eps"),
} | {
    (name, cause)
    for name, kind in CATALOGUE.items()
    for cause in kind.causes
    if kind.severity == "info"
}


LONGEST = "a tanh cell of one's own that forgets"


def built(case, sick):
    torch.manual_seed(0)
    return case.build(sick)


def alarms(alerts):
    return [a for a in alerts if a.severity != "info"]


@pytest.mark.parametrize("name", CASES)
def test_a_cause_is_told(name):
    case = CASES[name]
    run = built(case, sick=True)
    found = recurrences(run.model, run.cells)
    streams = {r.stream.name: r.stream for r in found}
    watch = trained(run)
    alerts = watch.alerts
    assert replay(watch.records, watch.streams) == alerts
    notice = (case.kind, case.cause) in NOTICES
    mine = alerts if notice else alarms(alerts)
    [alert] = [a for a in mine if a.kind == case.kind]
    assert {a.kind for a in alarms(alerts)} - {case.kind} <= case.beside
    assert alert.severity == ("info" if notice else CATALOGUE[case.kind].severity)
    assert (alert.cause, alert.stream) == (case.cause, case.stream)
    assert case.onset <= alert.since <= alert.step
    named = alert.remedy.name if alert.remedy is not None else None
    assert named == case.remedy
    if case.stream is not None and case.cause is not None:
        known = CATALOGUE[case.kind].remedy(case.cause, streams[case.stream])
        assert named == (known.name if known is not None else None)
    first, *rest = alert.message.split("\n")
    assert first.startswith(f"{case.kind.replace('_', ' ')} at step {alert.step}: ")
    assert [line.split(":")[0].strip() for line in rest] == ["evidence", "why", "do"]
    assert f"(gradwatch explain {case.kind})" in rest[1]


@pytest.mark.parametrize(
    "name", seldom(CASES, ["a tanh cell of one's own that forgets"])
)
def test_its_healthy_twin_gives_no_alarm(name):
    case = CASES[name]
    alerts = trained(built(case, sick=False)).alerts
    assert alarms(alerts) == []
    assert (case.kind, case.cause) not in NOTICES & {(a.kind, a.cause) for a in alerts}


def test_the_batch_that_a_divergence_names_is_the_bad_one():
    watch = trained(built(CASES["four batches that throw the weights out"], True))
    [alarm] = alarms(watch.alerts)
    named = int(re.search(r"at step (\d+), had", alarm.message)[1])
    assert 120 <= named < 124


def test_every_cause_of_the_catalogue_has_a_case():
    causes = {(n, cause) for n, kind in CATALOGUE.items() for cause in kind.causes}
    assert {(case.kind, case.cause) for case in CASES.values()} == causes
    assert len(CASES) == sum(len(room.CASES) for room in ROOMS)


def test_every_sort_of_net_has_a_case():
    sorts = Counter()
    for case in CASES.values():
        run = built(case, sick=True)
        for recurrence in recurrences(run.model, run.cells):
            stream = recurrence.stream
            if stream.name == case.stream:
                cell = stream.name == stream.module
                sorts[stream.kind, cell, stream.layer > 0, stream.direction] += 1
    kinds = {"RNN_TANH", "RNN_RELU", "LSTM", "GRU"}
    assert {kind for kind, cell, *_ in sorts if not cell} == kinds
    assert {kind for kind, cell, *_ in sorts if cell} == kinds | {"CELL"}
    upper, reverse = ({s[i] for s in sorts} for i in (2, 3))
    assert upper == {False, True} and reverse == {"forward", "reverse"}
