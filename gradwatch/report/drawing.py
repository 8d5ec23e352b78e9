"""Charts as SVG and PNG, drawn without a browser.

What the renderer wrote is read again, and only shapes and text are kept: nothing that a
page could run or fetch. Colours become variables of the page, which has a light and a
dark set of them.
"""

from __future__ import annotations

import importlib.util
import io
import json
import re
import subprocess
import sys
import tempfile
from typing import Any, Final
from xml.etree import ElementTree as ET

from gradwatch.plot import panels
from gradwatch.record import printable

_SVG: Final = "http://www.w3.org/2000/svg"
_TAGS: Final = frozenset(
    {"svg", "g", "path", "rect", "line", "text", "defs", "linearGradient", "stop"}
    | {"clipPath", "tspan"}
)
_ATTRIBUTES: Final = frozenset(
    {"width", "height", "viewBox", "transform", "d", "x", "y", "x1", "x2", "y1", "y2"}
    | {"fill", "fill-opacity", "stroke", "stroke-width", "stroke-dasharray", "opacity"}
    | {"stroke-opacity", "stroke-miterlimit", "text-anchor", "font-family", "font-size"}
    | {"font-weight", "font-style", "id", "clip-path", "offset", "stop-color", "dx"}
    | {"dy", "gradientUnits"}
)
_LOCAL: Final = re.compile(r"url\(#[A-Za-z0-9_-]+\)")
_LONG: Final = re.compile(r"(\d+\.\d)\d+")
"""A number with more digits than a pixel needs."""
_VARIABLES: Final = {
    panels.INK: "--ink",
    panels.FAINT: "--faint",
    panels.GRID: "--grid",
    **{colour: f"--line-{n}" for n, colour in enumerate(panels.COLOURS)},
}
PNG_SCALE: Final = 1.5
_LONGEST: Final = 300
"""Characters of a text in a chart, at most."""


class DrawingError(RuntimeError):
    """A chart could not be drawn; the message says why, and the way out."""


def can_draw() -> bool:
    """Tell whether what draws pictures is installed; it is not imported."""
    return all(importlib.util.find_spec(name) for name in ("vl_convert", "PIL"))


def renderer() -> Any:
    """Return the module that draws.

    Raises:
        ModuleNotFoundError: If it is not installed.
    """
    try:
        import jinja2
        import vl_convert
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Pictures are drawn by vl-convert: pip install 'gradwatch[plot]'."
        ) from error
    assert jinja2 is not None  # the page is laid out by it
    return vl_convert


def svg(spec: panels.Spec, title: str, name: str, *, texts: bool = True) -> str:
    """Return a chart as an SVG element for a page.

    Args:
        spec: The chart.
        title: Its title: what was found. It is the alternative text, too.
        name: What its ids begin with; another one for each chart of a page.
        texts: Whether marks keep the text to show when they are pointed at.

    Returns:
        The element; a mark's text is in ``data-t``.
    """
    plain = safe(panels.whole(spec, title))
    plain.pop("title")  # the page has it as text
    drawn = renderer().vegalite_to_svg(plain)
    root = ET.parse(io.StringIO(drawn)).getroot()
    _clean(root, name)
    for mark in [] if texts else root.iter():
        mark.attrib.pop("data-t", None)
    root.set("role", "img")
    root.set("aria-label", printable(title[:_LONGEST]))
    root.set("class", "chart")
    return ET.tostring(root, encoding="unicode")


def safe(value: Any) -> Any:
    """Return a chart whose texts are printable: no control character reaches XML."""
    if isinstance(value, str):
        return printable(value[:_LONGEST])
    if isinstance(value, dict):
        return {printable(key): safe(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [safe(part) for part in value]
    return value


def _clean(element: ET.Element, name: str, *, marks: bool = False) -> None:
    """Keep shapes and text, in place.

    Args:
        element: From here on down.
        name: What ids begin with.
        marks: Whether it is one of the marks of a layer.
    """
    own = element.attrib
    text = own.get("aria-label") if marks else None
    inner = "role-mark" in own.get("class", "").split()
    kept = {key: own[key] for key in own if key in _ATTRIBUTES}
    for key, value in kept.items():
        if key in ("d", "transform"):
            kept[key] = _LONG.sub(r"\1", value)
        elif key == "id":
            kept[key] = f"{name}-{value}"
        elif "url(" in value:
            kept[key] = value.replace("url(#", f"url(#{name}-")
            if not _LOCAL.fullmatch(kept[key]):
                kept[key] = "none"
        elif value.lower() in _VARIABLES:
            kept[key] = f"var({_VARIABLES[value.lower()]})"
    kept.pop("font-family", None)
    if text:
        kept["data-t"] = text
    if kept.get("opacity") == "0":  # there to be pointed at
        kept["pointer-events"] = "all"
    own.clear()
    own.update(kept)
    element.tag = element.tag.removeprefix(f"{{{_SVG}}}")
    element.tail = None
    for child in list(element):
        if child.tag.removeprefix(f"{{{_SVG}}}") not in _TAGS:
            element.remove(child)
            continue
        _clean(child, name, marks=inner)
        empty = (
            child.tag in ("g", "path") and not len(child) and "d" not in child.attrib
        )
        if empty:
            element.remove(child)


class Picture:
    """A chart that is drawn as a PNG in a process of its own.

    The renderer holds Python's lock while it draws, a second at first: here that would
    be a second of the training. Nothing waits until the picture is asked for.

    Args:
        spec: The chart.
        title: Its title: what was found.

    Raises:
        DrawingError: If no process could be started.
    """

    def __init__(self, spec: panels.Spec, title: str) -> None:
        self.title = title
        whole = {**safe(panels.whole(spec, title)), "background": "white"}
        try:  # files in place of pipes: nobody has to read while it is written
            with tempfile.TemporaryFile() as given:
                given.write(json.dumps(whole).encode())
                given.seek(0)
                self._out = tempfile.TemporaryFile()  # noqa: SIM115 - png() closes it
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _DRAW, str(PNG_SCALE)],
                    stdin=given,
                    stdout=self._out,
                    stderr=subprocess.DEVNULL,
                )
        except OSError as error:
            raise DrawingError(f"no picture could be drawn ({error}).") from error

    @property
    def ready(self) -> bool:
        """Whether it has been drawn, or has failed."""
        return self._process.poll() is not None

    def png(self, timeout: float) -> bytes:
        """Return the picture, once; a process that takes longer is ended.

        Args:
            timeout: Seconds to wait for it.

        Raises:
            DrawingError: If it could not be drawn in that time.
        """
        with self._out as out:
            try:
                code = self._process.wait(timeout)
            except subprocess.TimeoutExpired as error:
                self._process.kill()
                self._process.wait()
                raise DrawingError(
                    f"a picture was not drawn within {timeout:g} seconds."
                ) from error
            out.seek(0)
            drawn = out.read()
        if code or not drawn:
            raise DrawingError(f"a picture could not be drawn (exit code {code}).")
        return drawn


_DRAW: Final = """
import json, sys
import vl_convert
spec = json.load(sys.stdin.buffer)
sys.stdout.buffer.write(vl_convert.vegalite_to_png(spec, scale=float(sys.argv[1])))
"""
