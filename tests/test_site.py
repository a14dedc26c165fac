# SPDX-License-Identifier: MIT
"""The documentation's site in Chromium, on a phone in dark mode."""

import os
import shutil
import subprocess
import sys

import pytest
from commands import ROOT

WITH_PICTURES = [
    page.stem
    for page in sorted((ROOT / "docs").glob("*.md"))
    if "![" in page.read_text("utf-8") and page.stem != "index"
]
PHONE = {"width": 390, "height": 800}


pytestmark = pytest.mark.slow  # to build the site takes seconds


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    """A page of Chromium, the site's address, and the requests and messages of all pages so far."""
    pytest.importorskip("mkdocs", reason="mkdocs builds the site")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings reads the docstrings")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives Chromium")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no Chromium; apt-get install chromium")
    folder = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--quiet",
        "--strict",
        "--no-directory-urls",
    ]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    subprocess.run([*command, "--site-dir", folder], cwd=ROOT, env=quiet, check=True)
    with (
        sync_api.sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"]) as browser,
    ):
        tab = browser.new_page(viewport=PHONE, color_scheme="dark")
        tab.set_default_timeout(0)  # a busy machine may take longer than Playwright's 30 seconds
        tab.problems = []
        tab.on("requestfailed", lambda request: tab.problems.append(request.url))
        tab.on("pageerror", lambda error: tab.problems.append(str(error)))
        tab.folder = folder
        yield tab


def pictures_of(tab, page):
    """Open a page, and return its pictures: they are loaded, have a light ground, and no page is
    wider than the phone."""
    tab.goto((tab.folder / f"{page}.html").as_uri())
    assert tab.problems == []
    assert tab.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    pictures = tab.locator("article img").all()
    assert pictures
    for picture in pictures:
        assert picture.evaluate("one => one.naturalWidth") > 0
        assert (
            picture.evaluate("one => getComputedStyle(one).backgroundColor") == "rgb(255, 255, 255)"
        )
    return pictures


def test_each_door_of_the_first_page_has_a_picture_at_its_own_size(tab):
    pictures = pictures_of(tab, "index")
    assert len(pictures) == tab.locator(".grid.cards > ul > li").count() == 6
    for picture in pictures:
        natural, shown = picture.evaluate("one => [one.naturalWidth, one.clientWidth]")
        # Two pixels for one of CSS; the least letters have 12 pixels of CSS there.
        assert 0.8 <= shown / (natural / 2) <= 1.05
        right = picture.evaluate("one => one.getBoundingClientRect().right")
        assert right <= PHONE["width"]


@pytest.mark.parametrize("page", WITH_PICTURES)
def test_pages_are_legible_on_a_phone_in_dark_mode(tab, page):
    for picture in pictures_of(tab, page):
        natural, shown = picture.evaluate(
            "one => [one.naturalWidth, one.getBoundingClientRect().width]"
        )
        # The least letters, of 12.5 pixels in the photographs of pages, are shown with 10 pixels.
        assert shown == pytest.approx(0.8 * natural, abs=2)
        # A wide picture scrolls.
        assert picture.evaluate("one => one.parentElement.clientWidth") < PHONE["width"]
