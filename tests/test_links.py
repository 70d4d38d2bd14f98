"""Every link, anchor and image of the pages and notebooks leads somewhere."""

import re
from functools import cache
from urllib.parse import unquote, urlsplit

import house
import nbformat
import pytest

from helpers.course import notebooks, places

ROOT = notebooks.root()
PAGES = sorted(p.name for p in ROOT.glob("*.md")) + [f"{n}.ipynb" for n in notebooks.written()]
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*([^)\s]+)(?:\s+\"[^\"]*\")?\s*\)")


@cache
def text_of(name):
    """The Markdown of a page or notebook, without its code."""
    path = ROOT / name
    if path.suffix == ".ipynb":
        cells = nbformat.read(path, as_version=4).cells
        text = "\n\n".join(c.source for c in cells if c.cell_type == "markdown")
    else:
        text = path.read_text(encoding="utf-8")
    text = re.sub(r"(?ms)^```.*?^```", "", text)
    return re.sub(r"`[^`\n]+`", "", text)


@cache
def anchors(name):
    """The anchors that GitHub gives the headings of a page."""
    path = ROOT / name
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = nbformat.reads(source, as_version=4).cells
        source = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    found = []
    for line in re.sub(r"(?ms)^```.*?^```", "", source).splitlines():
        if match := re.match(r"#{1,6} +(.+?) *#*$", line):
            heading = re.sub(r"[^\w\- ]", "", match[1].lower()).replace(" ", "-")
            found.append(heading)
    return set(found)


def links(name):
    # A badge is an image inside a link: both addresses count.
    text = text_of(name)
    inner = re.findall(r"\[!\[[^\]]*\]\(([^)\s]+)\)\]\(([^)\s]+)\)", text)
    return [a for pair in inner for a in pair] + LINK.findall(text)


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    broken = [link for link in links(name) if (why := problem(name, link)) and print(why) is None]
    assert not broken


def problem(name, link):
    """What is wrong with a link, or ''."""
    parts = urlsplit(link)
    if parts.scheme in ("http", "https"):
        return remote(parts)
    if parts.scheme or parts.netloc:
        return f"{link}: scheme {parts.scheme!r}"
    target = unquote(parts.path) or name
    if not (ROOT / target).exists():
        return f"{link}: no such file"
    has_anchors = parts.fragment and target.endswith((".md", ".ipynb"))
    if has_anchors and unquote(parts.fragment) not in anchors(target):
        return f"{link}: no such heading; there are {sorted(anchors(target))}"
    return ""


def remote(parts):
    # Looked at by form only: the tests have no network.
    if parts.scheme != "https" or "." not in parts.netloc or " " in parts.path:
        return f"{parts.geturl()}: should be https and well-formed"
    match = re.fullmatch(rf"/github/{places.address()}/blob/main/(\w+)\.ipynb", parts.path)
    is_badge = parts.netloc == "colab.research.google.com" and parts.path.startswith("/github")
    if is_badge and (not match or match[1] not in notebooks.written()):
        return f"{parts.geturl()}: a badge of no notebook"
    return ""


def test_the_checks_notice_what_is_wrong():
    assert "no such file" in problem("README.md", "Chapter99.ipynb")
    assert "no such heading" in problem("README.md", "Chapter0.ipynb#nothing-of-the-kind")
    assert "https" in problem("README.md", "http://example.com/x")
    assert "no notebook" in problem(
        "README.md",
        f"https://colab.research.google.com/github/{places.address()}/blob/main/Chapter99.ipynb",
    )
    assert problem("README.md", "Chapter0.ipynb#8-train") == ""
    assert problem("README.md", "#quick-start") == ""
    assert len(links("README.md")) > 10


@pytest.mark.parametrize("name", notebooks.written())
def test_every_notebook_begins_with_its_own_badge(name):
    cells = nbformat.read(ROOT / f"{name}.ipynb", as_version=4).cells
    assert cells[1].source == house.badge(name)
    assert house.badge(name) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_page_can_be_reached_from_the_readme():
    linked = {urlsplit(link).path for link in links("README.md")}
    assert not set(PAGES) - linked - {"README.md"}
