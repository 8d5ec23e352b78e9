"""What the site of the docs needs beside its pages: a hook of MkDocs.

The pages are read in the repository too, where they link to the README, to examples and
to tests. Here those files become part of the site, and links that lead out of ``docs/``
are made to lead to them.

Run: make site
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any, Final

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT: Final = Path(__file__).parent.parent
PAGES: Final = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "ARCHITECTURE.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
}
"""Pages of the repository's root -> where they are on the site."""
LINK: Final = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the root, and every file that a page links to outside docs."""
    for source, place in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, place, content=text))
    for file in list(files.documentation_pages()):
        text = file.content_string
        for link in LINK.findall(text):
            target = _outside(link, _origin(file.src_uri))
            if target is None or files.get_file_from_path(target) is not None:
                continue
            path = ROOT / target
            if path.is_file() and path.suffix != ".md":
                content = path.read_bytes()
                files.append(File.generated(config, target, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Make links that lead out of ``docs/`` lead to where those files are here."""
    origin = _origin(page.file.src_uri)
    here = posixpath.dirname(page.file.src_uri)

    def moved(found: re.Match[str]) -> str:
        link = found.group()
        path, mark, anchor = link.partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return link
        whole = posixpath.normpath(posixpath.join(posixpath.dirname(origin), path))
        place = PAGES.get(whole, whole.removeprefix("docs/"))
        return f"{posixpath.relpath(place, here or '.')}{mark}{anchor}"

    return LINK.sub(moved, markdown)


def _origin(place: str) -> str:
    """Return where a page of the site is in the repository."""
    known = {target: source for source, target in PAGES.items()}
    return known.get(place, f"docs/{place}")


def _outside(link: str, origin: str) -> str | None:
    """Return the path from the root of a link that leads out of ``docs/``, or None."""
    path = link.partition("#")[0]
    if not path or re.match(r"[a-z]+:", path):
        return None
    whole = posixpath.normpath(posixpath.join(posixpath.dirname(origin), path))
    return None if whole.startswith("docs/") or whole in PAGES else whole


def on_post_build(config: MkDocsConfig) -> None:
    """Put the sources beside the pages: ``llms.txt`` names them."""
    for path in (ROOT / "docs").rglob("*.md"):
        target = Path(config.site_dir) / path.relative_to(ROOT / "docs")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    for source in PAGES:
        (Path(config.site_dir) / source).write_bytes((ROOT / source).read_bytes())
