# SPDX-License-Identifier: MIT
"""The documentation's site in Chromium, on a phone in dark mode."""

import os
import shutil
import subprocess
import sys

import pytest
from commands import ROOT

PHONE = {"width": 390, "height": 800}


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
        tab.problems = []
        tab.on("requestfailed", lambda request: tab.problems.append(request.url))
        tab.on("pageerror", lambda error: tab.problems.append(str(error)))
        tab.folder = folder
        yield tab


@pytest.mark.parametrize("page", ["index", "parallel", "tuning"])
def test_pages_are_legible_on_a_phone_in_dark_mode(tab, page):
    tab.goto((tab.folder / f"{page}.html").as_uri())
    assert tab.problems == []
    assert tab.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    pictures = tab.locator("article img").all()
    assert pictures
    for picture in pictures:
        assert picture.evaluate("one => one.naturalWidth") > 0
        assert picture.evaluate("one => one.clientWidth") == 640  # letters of 10 pixels
        # It scrolls.
        assert picture.evaluate("one => one.parentElement.clientWidth") < PHONE["width"]
        assert (
            picture.evaluate("one => getComputedStyle(one).backgroundColor") == "rgb(255, 255, 255)"
        )
