# SPDX-License-Identifier: MIT
"""Photograph the pages that the project writes, in Chromium: ``python docs/screenshots.py``.

``report.png`` shows the page of all committed results, ``run.png`` that of a run of
``train_ddp.py`` on two ranks, ``ptx.png`` that of the slow transpose of ptx.md, and
``ptx_replay.png`` the page that plays its missing wait. The pictures in ``start/`` are parts of
such pages on a phone: the README and the site's first page show them at their own size, where
letters are as large as the text.
"""

import html
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

FOLDER = Path(__file__).parent
START = FOLDER / "start"
ROOT = FOLDER.parent
WIDTH = 360  # of a phone's page, in pixels of CSS
MARGIN = 4
TORCHPAR = [sys.executable, "-m", "torchpar"]

# An operator whose backward lacks a factor of 2.
SQUARE = """
import torch

square = torch.library.custom_op(
    "mylib::square", lambda x: x * x, mutates_args=(), schema="(Tensor x) -> Tensor"
)
square.register_fake(torch.empty_like)
square.register_autograd(
    lambda ctx, g: g * ctx.saved_tensors[0],
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
samples = [(torch.randn(3, 4, dtype=torch.float64),)]
"""
RULES = (
    "values",
    "gradcheck",
    "vmap over one operand",
    "torch.compile",
    "torch.export, save and load",
    "DTensor",
)


def photograph(
    browser: Browser, page: Path, picture: Path, width: int, height: int, chosen: str = ""
) -> None:
    tab = browser.new_page(viewport={"width": width, "height": height}, color_scheme="light")
    tab.goto(page.as_uri())
    if chosen:
        tab.locator(chosen).first.click(force=True)
    tab.screenshot(path=picture)
    tab.close()


def phone(browser: Browser, page: Path) -> Page:
    """Open ``page`` on a phone; pictures of it have two pixels for one of CSS."""
    viewport = {"width": WIDTH, "height": 800}
    tab = browser.new_page(viewport=viewport, device_scale_factor=2, color_scheme="light")
    tab.goto(page.as_uri())
    return tab


def clip(tab: Page, name: str, first: str, last: str | None = None) -> None:
    """Photograph a phone's page into ``start/NAME.png``: from one element to the end of another."""
    top, bottom = (tab.locator(one).first.bounding_box() for one in (first, last or first))
    if top is None or bottom is None:
        sys.exit(f"start/{name}.png: the page shows no {first!r} or no {last!r}")
    y = top["y"] - MARGIN
    height = bottom["y"] + bottom["height"] - y
    area = {"x": 0, "y": y, "width": WIDTH, "height": height}
    tab.screenshot(path=START / f"{name}.png", full_page=True, clip=area)
    tab.close()


def script(name: str) -> str:
    """The script of ptx.md that begins with its name."""
    text = (FOLDER / "ptx.md").read_text("utf-8")
    (code,) = re.findall(rf"```py\n(# {name}.py\n.*?)```", text, re.DOTALL)
    return str(code)


def emulate(folder: Path, name: str, flag: str = "--report") -> Path:
    """Run a script of ptx.md on the emulator, and return the page of its report."""
    page = folder / f"{name}.html"
    (folder / f"{name}.py").write_text(script(name), "utf-8")
    subprocess.run([sys.executable, "-m", "nogpu", flag, page.name, f"{name}.py"], cwd=folder)
    return page


def check(folder: Path) -> Path:
    """Check the operator `SQUARE`, and write some rows of its table as a page."""
    (folder / "mylib.py").write_text(SQUARE, "utf-8")
    command = [*TORCHPAR, "check", "mylib:square", "--samples", "mylib:samples", "--json"]
    found = subprocess.run(
        [*command, "--rules", *RULES], cwd=folder, stdout=subprocess.PIPE, text=True
    )
    rows = "".join(
        f"<tr class={row['outcome']}><td>{html.escape(row['rule'])}<td>{row['outcome']}"
        for row in json.loads(found.stdout)["rows"]
    )
    style = "body{font:16px/1.9 sans-serif;margin:16px}td{padding-right:2em}.wrong{color:#d03030}"
    page = folder / "check.html"
    page.write_text(
        f"<meta charset=utf-8><style>{style}</style><table><caption>mylib::square{rows}</table>",
        "utf-8",
    )
    return page


def train(folder: Path) -> Path:
    """Train on two ranks, and return the page of the run."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    lesson = [*torchrun, "train_ddp.py", "--report", folder]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(lesson, cwd=ROOT / "examples", env=one_thread, check=True)
    return folder / "run.html"


def main() -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("there is no Chromium; apt-get install chromium")
    START.mkdir(exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as name,
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"]) as browser,
    ):
        folder = Path(name)
        measured = folder / "report.html"
        report = [sys.executable, "-m", "benchmarks", "report", "--output", measured]
        subprocess.run(report, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        run = train(folder)
        transpose, scale = emulate(folder, "transpose"), emulate(folder, "scale")
        photograph(browser, measured, FOLDER / "report.png", 1440, 900)
        photograph(browser, run, FOLDER / "run.png", 1100, 1180)
        photograph(browser, transpose, FOLDER / "ptx.png", 1000, 1000)
        double = emulate(folder, "double", "--replay")
        photograph(browser, double, FOLDER / "ptx_replay.png", 1000, 640, "b.mark")

        clip(phone(browser, scale), "fault", ".error")
        clip(phone(browser, transpose), "sectors", "summary", "details figure, details svg")
        clip(phone(browser, run), "curves", "figure")
        clip(phone(browser, run), "step", "section:has(.legend) figure", ".legend")
        clip(phone(browser, measured), "measured", "figure:has(h2:text('step of Muon'))")
        clip(phone(browser, check(folder)), "check", "table")


if __name__ == "__main__":
    main()
