# SPDX-License-Identifier: MIT
"""Photograph the pages that the project writes, in Chromium: ``python docs/screenshots.py``.

``report.png`` shows the page of all committed results, ``run.png`` that of a run of
``train_ddp.py`` on two ranks, and ``ptx.png`` that of the slow transpose of ptx.md.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
PTX = FOLDER / "ptx.md"


def photograph(page: Path, picture: Path, width: int, height: int) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("there is no Chromium; apt-get install chromium")
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"]) as browser,
    ):
        tab = browser.new_page(viewport={"width": width, "height": height}, color_scheme="light")
        tab.goto(page.as_uri())
        tab.screenshot(path=picture)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report = [sys.executable, "-m", "benchmarks", "report", "--output", folder / "report.html"]
        subprocess.run(report, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        photograph(folder / "report.html", FOLDER / "report.png", 1440, 900)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
        lesson = [*torchrun, "train_ddp.py", "--report", folder]
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(lesson, cwd=ROOT / "examples", env=one_thread, check=True)
        photograph(folder / "run.html", FOLDER / "run.png", 1100, 1180)
        (code,) = re.findall(r"```py\n(# transpose.py\n.*?)```", PTX.read_text("utf-8"), re.DOTALL)
        (folder / "transpose.py").write_text(code, "utf-8")
        emulated = [sys.executable, "-m", "torchpar", "ptx", "--report", "ptx.html", "transpose.py"]
        subprocess.run(emulated, cwd=folder, check=True)
        photograph(folder / "ptx.html", FOLDER / "ptx.png", 1000, 1000)


if __name__ == "__main__":
    main()
