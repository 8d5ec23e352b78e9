"""The gallery by symptom: what its scripts promise, without running them."""

import importlib.util
import sys
from pathlib import Path

import pytest

from gradwatch.kinds.catalogue import CATALOGUE

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "examples" / "gallery").glob("*.py"))
SOURCE = ROOT / "docs" / "gallery.py"


@pytest.fixture(scope="module")
def gallery():
    if not SOURCE.exists():
        pytest.skip("the docs are not here")
    spec = importlib.util.spec_from_file_location("gallery", SOURCE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gallery"] = module  # its dataclasses look it up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gallery"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_names_an_alarm_of_the_catalogue(gallery, path):
    example = gallery.read(path)
    assert example.symptom and example.fault
    assert CATALOGUE[example.kind].severity != "info"
    assert example.cause in CATALOGUE[example.kind].causes


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_the_page_shows_a_script_as_it_is(gallery, path):
    page = gallery.PAGE.read_text(encoding="utf-8")
    example = gallery.read(path)
    assert f"(../examples/gallery/{path.name})" in page
    assert f"## {example.symptom}\n\n{example.fault}\n" in page
    assert f"```diff\n{gallery.mending(path)}\n```" in page
