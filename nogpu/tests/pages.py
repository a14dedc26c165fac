# SPDX-License-Identifier: MIT
"""Pages that the project writes: what they hold, and how they look in Chromium on a phone."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

PHONE = {"width": 390, "height": 800}
VOID = {"br", "img", "input", "link", "meta"}
COLORS = {"dark": "rgb(255, 255, 255)", "light": "rgb(0, 0, 0)"}  # of text


class Page(HTMLParser):
    """A page's headings, tables, pictures and addresses; its elements are closed in turn."""

    def __init__(self, path: Path):
        super().__init__()
        self.headings: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.pictures = self.images = 0
        self.addresses: list[str] = []
        self._open: list[str] = []
        self.text = path.read_text("utf-8")
        self.feed(self.text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self._open.append(tag)
        if tag in ("h1", "h2", "h3"):
            self.headings.append("")
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        self.pictures += tag == "svg"
        self.images += tag == "img"
        names = ("href", "src", "xlink:href")
        self.addresses += [value or "" for name, value in attributes if name in names]

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("h1", "h2", "h3"):
            self.headings[-1] += data
        if {"td", "th"} & set(self._open):
            self.tables[-1][-1][-1] += data


@contextmanager
def chromium() -> Iterator[Any]:
    """Playwright's browser, in which `check_in` looks at pages one after the other."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives Chromium")
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("there is no Chromium; apt-get install chromium")
    with (
        sync_api.sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=program, args=["--no-sandbox"]) as browser,
    ):
        yield browser


def check_in(browser: Any, text: str, folder: Path, scheme: str) -> None:
    """In Chromium nothing is wider than the screen, and all text has the page's color."""
    path = folder / "page.html"
    path.write_text(text, "utf-8")
    with browser.new_page(viewport=PHONE, color_scheme=scheme) as tab:
        tab.set_default_timeout(0)  # a busy machine may take longer than Playwright's 30 seconds
        problems: list[str] = []
        tab.on("request", lambda request: problems.append(request.url))
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.goto(path.as_uri())
        assert [url for url in problems if not url.startswith("data:")] == [path.as_uri()]
        assert tab.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
        colors = tab.evaluate(
            "[...document.querySelectorAll('svg .xtick text, svg .ytick text, td, h2')]"
            ".map(one => { const s = getComputedStyle(one);"
            " return one.closest('svg') ? s.fill : s.color; })"
        )
        assert set(colors) == {COLORS[scheme]}
        widths = tab.evaluate(
            "[...document.querySelectorAll('figure > svg, details[open] svg')]"
            ".map(s => s.getBoundingClientRect().width)"
        )
        assert all(300 < width <= PHONE["width"] for width in widths)
        sizes = tab.evaluate(
            "[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height)"
        )
        assert all(size >= 7 for size in sizes if size)  # pixels of a line; 0 where it is closed
