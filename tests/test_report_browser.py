"""Reports in headless Chromium: no error, no request, and what is pointed at answers.

Run where Chromium is installed (``apt-get install chromium``), and playwright.
"""

import dataclasses
import math
import shutil

import pytest

from gradwatch.record import StepRecord
from gradwatch.records import Records
from gradwatch.report import save
from tests.support.runs import record, run, stream
from tests.support.seldom import seldom
from tests.test_report import HOSTILE

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

ALONE = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=ALONE)
        yield chromium
        chromium.close()


class Visit:
    """A page in the browser, and all that it has said and asked for."""

    def __init__(self, browser, path, **options):
        self.page = browser.new_page(
            viewport={"width": 1200, "height": 1400}, **options
        )
        self.said, self.asked = [], []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(dialog.message))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())
        assert self.asked == [path.as_uri()]


@pytest.fixture
def visit(browser, tmp_path):
    def of(*runs, **options):
        return Visit(browser, save(runs, tmp_path / "report.html"), **options)

    return of


def nan():
    made = [record(n, [stream("rnn.l0")]) for n in range(60)]
    broken = {"gradwatch/loss": math.nan, "gradwatch/grad_norm": math.inf}
    made += [StepRecord(step=n, metrics=broken) for n in range(60, 90)]
    return dataclasses.replace(run("cause"), records=Records(made, limit=None))


def long():
    made = [
        StepRecord(
            step=n, metrics={"gradwatch/loss": 1 / (1 + n), "gradwatch/grad_norm": 1.0}
        )
        for n in range(100_000)
    ]
    return dataclasses.replace(run(sick=False), records=Records(made, limit=None))


RUNS = {
    "healthy": lambda: run(sick=False),
    "sick": lambda: run("cause"),
    "NaN": nan,
    "40 streams": lambda: run("cause", [stream(f"a{n}.l0") for n in range(40)]),
    "100,000 steps": long,
    "nothing": lambda: dataclasses.replace(run(sick=False), records=Records()),
}


@pytest.mark.parametrize("scheme", seldom(["light", "dark"], ["dark"]))
@pytest.mark.parametrize("name", RUNS)
def test_a_report_is_shown_without_an_error_or_a_request(visit, name, scheme):
    seen = visit(RUNS[name](), color_scheme=scheme)
    assert seen.said == [] and len(seen.asked) == 1
    wide = seen.page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 1200
    paper = seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")


def test_a_mark_that_is_pointed_at_says_its_number(visit):
    page = visit(run("cause")).page
    mark = page.locator(".chart [data-t*='steps back']").first
    told = mark.get_attribute("data-t")
    mark.scroll_into_view_if_needed()
    mark.hover(force=True)
    assert (
        page.locator("#tip").is_visible() and page.locator("#tip").inner_text() == told
    )
    page.mouse.move(5, 5)
    assert page.locator("#tip").is_hidden()


def test_a_time_step_that_is_pointed_at_shows_what_its_state_depends_on(visit):
    page = visit(run("cause")).page
    strip, found = page.locator(".strip").first, page.locator(".found").first
    assert "The state at step 19 depends on" in found.inner_text()
    assert strip.locator("i").count() == 20
    strip.scroll_into_view_if_needed()
    box = strip.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + 20)
    assert "The state at step 10 depends on 10 steps" in found.inner_text()
    assert strip.locator("i.off").count() == 9 and strip.locator("i.at").count() == 1
    strip.focus()
    page.keyboard.press("End")
    assert "The state at step 19" in found.inner_text()
    page.keyboard.press("ArrowLeft")
    assert strip.get_attribute("aria-valuenow") == "10"


def test_two_runs_are_shown_side_by_side(visit):
    seen = visit(run("cause"), run("other", sick=False))
    assert seen.said == []
    first, second = (
        box.bounding_box() for box in seen.page.locator(".runs > div").all()
    )
    assert first["y"] == second["y"] and first["x"] < second["x"]


def named(name, *inner):
    """A run of that name, with streams of modules of other names."""
    streams = [
        dataclasses.replace(stream("rnn.l0"), name=f"{own}.l0", module=own)
        for own in inner or (name,)
    ]
    return run(name, streams, steps=12)


@pytest.mark.parametrize(
    "names",
    [
        [("".join(HOSTILE), *HOSTILE)],
        pytest.param([(name,) for name in HOSTILE], marks=pytest.mark.slow),
    ],
    ids=["together", "each"],
)
def test_no_hostile_name_runs_anything(names, visit):
    for each in names:
        seen = visit(named(*each))
        assert seen.said == [], each
        assert seen.page.evaluate("typeof hit") == "undefined"
        assert seen.page.url.endswith("/report.html")
        seen.page.close()


def test_it_can_be_printed(visit):
    page = visit(run("cause")).page
    page.emulate_media(media="print", color_scheme="dark")
    assert (
        page.evaluate("getComputedStyle(document.body).backgroundColor")
        == "rgb(255, 255, 255)"
    )
    assert page.locator(".strip").first.is_hidden()
