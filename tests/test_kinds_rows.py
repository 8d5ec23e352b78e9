"""The rows of the kinds: all numbers of a rule, and the words about them."""

import ast
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from gradwatch import kinds
from gradwatch.kinds.catalogue import CATALOGUE

ROOMS = {path.stem: path for path in Path(kinds.__file__).parent.glob("*.py")}
HARMLESS = (0, 1)
"""Nothing and one: a start, a step, a first place."""


def numbers_outside(tree, allowed):
    """Return the numbers of a room that stand in no allowed node."""
    inside = {id(node) for part in allowed for node in ast.walk(part)}
    return [
        f"line {node.lineno}: {node.value}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and type(node.value) in (int, float)
        and node.value not in HARMLESS
        and id(node) not in inside
    ]


def rows_of(tree):
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Kind"
    ]


@pytest.mark.parametrize("room", ROOMS)
def test_a_rule_holds_no_number_outside_its_row(room):
    tree = ast.parse(ROOMS[room].read_text(encoding="utf-8"))
    rows = rows_of(tree)
    # What several rules share has constants of the room, each with its reason.
    shared = [
        node
        for node, told in zip(tree.body, tree.body[1:], strict=False)
        if isinstance(node, ast.AnnAssign)
        and isinstance(told, ast.Expr)
        and isinstance(told.value, ast.Constant)
        and not rows
    ]
    assert numbers_outside(tree, [*rows, *shared]) == []


def test_that_test_can_fail():
    tree = ast.parse("A: Final = 3\nROW = Kind(a=4)\ndef f(x):\n    return x > 2.5")
    assert numbers_outside(tree, rows_of(tree)) == ["line 1: 3", "line 4: 2.5"]


def values_of(kind):
    for evidence in kind.evidence.values():
        yield from (v for v in (evidence.at, evidence.clear) if v is not None)
    for number in kind.numbers.values():
        several = isinstance(number.value, Sequence)
        yield from number.value if several else [number.value]


@pytest.mark.parametrize("name", CATALOGUE)
def test_the_numbers_in_the_words_of_a_row_are_those_of_the_row(name):
    """As they are when it is judged, confirmed and over; words name no others."""
    kind = CATALOGUE[name]
    known = set(values_of(kind))
    for words in (kind.warm_up, kind.confirmed, kind.over):
        told = re.findall(r"(?<![\w.])-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)", words)
        named = {float(n.replace(",", "")) for n in told} - {*HARMLESS}
        assert named <= known, words


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_number_of_a_row_is_used(name):
    """A number that no rule asks for is decoration."""
    text = "".join(path.read_text(encoding="utf-8") for path in ROOMS.values())
    row = CATALOGUE[name]
    names = rf"(?:{name.upper()}|self\._row|row)"
    for key in row.numbers:
        used = rf"{names}\.(?:number|count|counts)\(\s*\"{key}\"\s*\)"
        assert re.search(used, text), key
