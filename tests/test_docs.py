"""The pages that come from the catalogues, as docs/generate.py makes them."""

import importlib.util
import inspect
import re
from pathlib import Path

import pytest
import yaml

import gradwatch
from gradwatch import remedies
from gradwatch.kinds.catalogue import CATALOGUE

DOCS = Path(__file__).parent.parent / "docs"
SOURCE = DOCS / "generate.py"
BY_HAND = "\n## What it means\n\nThis was written by hand.\n"


@pytest.fixture(scope="module")
def generate():
    if not SOURCE.exists():
        pytest.skip("the docs are not here")
    spec = importlib.util.spec_from_file_location("generate", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def docs(generate, tmp_path):
    """Pages as they should be, in a folder of their own."""
    (tmp_path / "alerts").mkdir()
    for name in ("alerts.md", "files.md", "shell.md"):
        (tmp_path / name).write_text(
            f"# Above\n\n{generate.BEGIN}\n{generate.END}\n\nbelow\n", encoding="utf-8"
        )
    for name in CATALOGUE:
        text = f"{generate.BEGIN}\n{generate.END}\n{BY_HAND}"
        (tmp_path / "alerts" / f"{name}.md").write_text(text, encoding="utf-8")
    for path, text in generate.due(tmp_path).items():
        path.write_text(text, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_page_has_all_that_the_catalogue_knows(generate, name):
    kind = CATALOGUE[name]
    page = generate.alert_head(kind)
    assert page == generate.alert_head(kind)
    for evidence in kind.evidence.values():
        row = next(row for row in page.split("\n") if evidence.what in row)
        assert f"| {evidence.at:,.6g} |" in row
    for cause in kind.causes.values():
        row = next(row for row in page.split("\n") if cause.known in row)
        assert not row.endswith("| `` |")  # something is said to do
    assert "{}" not in page


def test_a_page_names_the_remedy_of_a_cause(generate):
    for kind in CATALOGUE.values():
        for cause in kind.causes:
            for remedy in generate.named(kind, cause):
                assert remedy in remedies.REMEDIES
    assert generate.named(CATALOGUE["vanishing"], "small_radius") == [
        "init.orthogonal_"
    ]
    assert generate.named(CATALOGUE["vanishing"], "forget_gate") == ["init.chrono_"]
    assert generate.named(CATALOGUE["nonfinite"], "nan_data") == []


def test_placeholders_are_shown_and_braces_are_not_doubled(generate):
    assert generate.plain("f({{'a': [{weight}]}}, {usual:.2g})") == (
        "f({'a': [<weight>]}, <usual>)"
    )


def test_what_is_by_hand_is_kept(generate, docs):
    assert generate.stale(docs) == []
    page = (docs / "alerts" / "spike.md").read_text(encoding="utf-8")
    assert page.startswith(generate.BEGIN) and page.endswith(BY_HAND)
    overview = (docs / "alerts.md").read_text(encoding="utf-8")
    assert overview.startswith("# Above\n") and overview.endswith("\n\nbelow\n")
    assert "(alerts/spike.md)" in overview


def test_a_page_that_is_stale_missing_empty_or_of_no_kind_is_told_of(generate, docs):
    alerts = docs / "alerts"
    (alerts / "spike.md").unlink()
    (alerts / "drift.md").write_text("# Drift\n", encoding="utf-8")
    empty = generate.alert_head(CATALOGUE["vanishing"])
    (alerts / "vanishing.md").write_text(empty, encoding="utf-8")
    (alerts / "nothing.md").write_text("# Nothing\n", encoding="utf-8")
    told = generate.stale(docs)
    assert len(told) == 4
    for page in ("spike", "drift", "vanishing", "nothing"):
        assert any(f"alerts/{page}.md" in line for line in told)


# ---- the site


def test_the_api_page_has_all_that_is_public_and_nothing_else():
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^::: gradwatch\.(\S+)$", page, re.M)
    assert len(listed) == len(set(listed))
    public = {name for name in gradwatch.__all__ if name != "__version__"}
    modules = {n for n in public if inspect.ismodule(getattr(gradwatch, n))}
    expected = public - modules
    above = [getattr(gradwatch, name) for name in expected]
    for module in modules:
        own = getattr(gradwatch, module)
        expected |= {
            f"{module}.{name}"
            for name in own.__all__
            if not any(getattr(own, name) is there for there in above)
        }
    assert set(listed) == expected


@pytest.mark.parametrize("module", ["clip", "init", "parametrize", "plot", "rules"])
def test_what_a_module_names_is_there(module):
    found = getattr(gradwatch, module)
    assert sorted(found.__all__) == list(found.__all__)
    for name in found.__all__:
        assert getattr(found, name).__doc__


def test_every_page_has_its_place_on_the_site():
    site = yaml.safe_load((DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8"))
    placed = [
        path
        for part in site["nav"]
        for pages in part.values()
        for item in (pages if isinstance(pages, list) else [{"": pages}])
        for path in item.values()
    ]
    of_root = {"index.md", "CONTRIBUTING.md", "ARCHITECTURE.md", "CHANGELOG.md"}
    assert len(placed) == len(set(placed))
    pages = [*DOCS.glob("*.md"), *DOCS.glob("tasks/*.md")]
    assert {p.relative_to(DOCS).as_posix() for p in pages} == set(placed) - of_root


def test_programs_that_read_are_given_a_map(generate):
    text = (DOCS / "llms.txt").read_text(encoding="utf-8")
    assert text.startswith("# gradwatch\n\n> ")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (DOCS / target).exists() or (DOCS.parent / target).exists()
    for page in DOCS.glob("*.md"):
        assert f"]({page.name})" in text
