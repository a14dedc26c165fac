# SPDX-License-Identifier: MIT
"""One HTML page of all committed results: ``python -m benchmarks report [--output FILE]``.

The page needs no network: tables, pictures and scripts are inside. A table shows the machines side by side.
Where git has an earlier version of a CSV, each row is compared with it.
"""

import argparse
import base64
import importlib.util
import io
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.__main__ import NAMES, title
from torchpar.errors import ConfigError

RESULTS = Path(__file__).parent / "results"
TEMPLATE = Path(__file__).parent / "report.html"
# Columns that describe the work, beside those in front of the times. Rows of other seeds are summarised.
WORK = ("epoch", "nbytes", "way", "validate")
SHOWN = {
    "p50_ms": "ms",
    "speedup": "speed-up",
    "accuracy": "accuracy",
    "test_accuracy": "accuracy",
    "change": "change",
}
ORIGIN = ("device", "cores", "gpu", "torch", "triton", "numpy", "python", "clocks", "commit", "dirty", "date")
TIMES = ("p20_ms", "p80_ms", "mean_ms", "samples", "ok", "reason")
NOT_OK = "NOT OK"


def read(text: str) -> Any:
    """Return the rows of a CSV by their work, of all seeds one row; None if it has no times."""
    import pandas

    frame = pandas.read_csv(io.StringIO(text), dtype={"commit": str, "clocks": str, "reason": str})
    columns = list(frame.columns)
    if "p20_ms" not in columns:
        return None
    work = list(dict.fromkeys([*columns[: columns.index("p20_ms")], *(n for n in WORK if n in columns)]))
    frame[work] = frame[work].astype(object).where(frame[work].notna(), "")
    if "seconds" in columns:  # one row for each seed
        times = frame["p50_ms"].fillna(1000 * frame["seconds"])
        quantiles = times.groupby([frame[name] for name in work], sort=False)
        for name, q in (("p20_ms", 0.2), ("p50_ms", 0.5), ("p80_ms", 0.8)):
            frame[name] = quantiles.transform("quantile", q)
        if "accuracy" in columns:
            frame["accuracy"] = frame.groupby(work, sort=False)["accuracy"].transform("mean")
    return frame.drop_duplicates(work).set_index(work)


def change(now: Any, before: Any) -> Any:
    """Return "slower", "faster" or "" for each row of ``now``.

    A row is slower if its 20% quantile is above the earlier 80% quantile, so that noise does not mark it, and
    its speed-up over the reference of the same run has fallen, so that a slower machine does not.
    """
    import pandas

    marks = pandas.Series("", now.index)
    if before is None or list(now.index.names) != list(before.index.names):
        return marks
    before = before.reindex(now.index)
    old, new = (frame["speedup"] for frame in (before, now))
    unknown = old.isna() | new.isna() | ((old == 1) & (new == 1))  # the reference itself
    slower = (now["p20_ms"] > before["p80_ms"]) & (unknown | (new < old))
    faster = (now["p80_ms"] < before["p20_ms"]) & (unknown | (new > old))
    return marks.mask(slower, "slower").mask(faster, "faster")


def earlier(path: Path) -> str | None:
    """Return the CSV's version before the last commit that changed it, or None."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(path.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    try:
        commits = git("log", "-n", "2", "--format=%H", "--", path.name).split()
        return git("show", f"{commits[1]}:./{path.name}") if len(commits) == 2 else None
    except (OSError, subprocess.CalledProcessError):
        return None


def origin(frame: Any) -> str:
    """Return the environment of all rows: each version, clock, commit and day that they have."""
    parts = []
    for name in ORIGIN:
        if name not in frame or frame[name].isna().all():
            continue
        values = frame[name].dropna().astype(str)
        if name == "date":
            values = values.str[:10]
        elif name == "commit":
            values = values.str[:9]
        elif name == "dirty":
            if (values == "True").any():
                parts.append("with changes that are not committed")
            continue
        text = ", ".join(dict.fromkeys(values))
        parts.append(text if name in ("device", "clocks") else f"{name} {text}")
    return "; ".join(parts)


def side_by_side(frames: Mapping[str, Any]) -> Any:
    """Return a table of the work and, for each machine, the shown columns; what all have done comes first."""
    import pandas

    work = list(dict.fromkeys(name for frame in frames.values() for name in frame.index.names))
    parts = []
    for machine, frame in frames.items():
        names = [name for name in SHOWN if name in frame and frame[name].replace("", None).notna().any()]
        if "p50_ms" not in names:  # something other than time was counted
            hidden = (*TIMES, *ORIGIN, *SHOWN)
            names = [name for name in frame if name not in hidden and frame[name].notna().any()]
        part = frame[names].rename(columns={name: f"{machine}: {SHOWN.get(name, name)}" for name in names})
        parts.append(part.reset_index().assign(**dict.fromkeys(set(work) - set(frame.index.names), "")))
    table = pandas.concat([part[work] for part in parts]).drop_duplicates()
    for part in parts:
        table = table.merge(part, how="left", on=work)
    table = table.iloc[table.isna().sum(axis=1).argsort(kind="stable")]
    constant = [name for name in work if table[name].nunique() == 1 and len(table) > 1]
    return table.drop(columns=constant)


def as_html(table: Any) -> str:
    """Return a table that a reader can sort and search; numbers have three digits."""
    from itables.javascript import to_html_datatable

    from benchmarks.rows import number

    def text(cell: object) -> str:
        if isinstance(cell, float):
            return "" if math.isnan(cell) else number(cell)
        return str(cell)

    style = "width:auto; margin:0"
    return to_html_datatable(
        table.map(text), connected=False, showIndex=False, maxBytes=0, order=[], style=style
    )


def sections(results: Path) -> Iterator[dict[str, Any]]:
    """The parts of the page, one for each kind of CSV."""
    paths: dict[str, dict[str, Path]] = {}
    for path in sorted(results.glob("*/*.csv")):
        paths.setdefault(path.stem, {})[path.parent.name] = path
    pictures = {path for path in results.glob("*/*.png")}
    for stem in sorted(paths, key=lambda stem: ((*NAMES, "").index(_benchmark(stem)), stem)):
        frames = {}
        for machine, path in paths[stem].items():
            frames[machine] = frame = read(path.read_text())
            previous = earlier(path)
            frame["change"] = change(frame, read(previous) if previous else None)
            if "ok" in frame:
                frame.loc[frame["ok"] == False, "change"] = NOT_OK  # noqa: E712
        own = sorted(path for path in pictures if path.stem == stem)
        pictures -= set(own)
        yield {
            "name": stem,
            "title": title(_benchmark(stem)) if _benchmark(stem) else "",
            "table": as_html(side_by_side(frames)),
            "slower": sum(int((frame["change"] == "slower").sum()) for frame in frames.values()),
            "failed": sum(int((frame["change"] == NOT_OK).sum()) for frame in frames.values()),
            "origins": {machine: origin(frame) for machine, frame in frames.items()},
            "pictures": [_picture(path) for path in own],
        }
    if pictures:
        yield {"name": "further pictures", "pictures": [_picture(path) for path in sorted(pictures)]}


def _benchmark(stem: str) -> str:
    """The benchmark that wrote a CSV, such as "train" of "train-2-threads", or ""."""
    name = stem.partition("-")[0]
    return name if name in NAMES else ""


def _picture(path: Path) -> dict[str, str]:
    data = base64.b64encode(path.read_bytes()).decode()
    return {"text": f"{path.parent.name}/{path.name}", "source": f"data:image/png;base64,{data}"}


def write(output: Path, results: Path = RESULTS) -> None:
    """Write the page of all CSVs and pictures in the folders of ``results``."""
    from itables.javascript import generate_init_offline_itables_html
    from itables.utils import find_package_file
    from jinja2 import Template

    parts = list(sections(results))
    if not parts:
        raise ConfigError(f"{results} has no results, expected MACHINE/NAME.csv")
    scripts = generate_init_offline_itables_html(find_package_file("html/dt_bundle.js"))
    output.write_text(Template(TEMPLATE.read_text()).render(sections=parts, scripts=scripts))


def screenshot(page: Path, picture: Path) -> None:
    """Save the beginning of a page as a picture."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright, playwright.chromium.launch(**browser_options()) as browser:
        tab = browser.new_page(viewport={"width": 1440, "height": 900})
        tab.goto(page.absolute().as_uri())
        tab.wait_for_selector("tbody tr td")
        tab.screenshot(path=picture)


def browser_options() -> dict[str, Any]:
    """Return what playwright needs to launch the system's Chromium; without one it takes its own."""
    root = hasattr(os, "getuid") and os.getuid() == 0  # whom Chromium's sandbox refuses
    return {"executable_path": shutil.which("chromium"), "args": ["--no-sandbox"] if root else []}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks report", description=__doc__.partition("\n")[0])
    default = Path(tempfile.gettempdir()) / "torchpar-report.html"
    parser.add_argument("--output", type=Path, metavar="FILE", default=default, help=f"by default {default}")
    parser.add_argument(
        "--results", type=Path, metavar="DIR", default=RESULTS, help="folders of CSVs and pictures"
    )
    parser.add_argument(
        "--screenshot", type=Path, metavar="PNG", help="also the page's beginning, by Chromium"
    )
    options = parser.parse_args(arguments)
    needed = ("itables", "pandas", "jinja2", *(["playwright"] if options.screenshot else []))
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"{' and '.join(missing)} not installed; pip install -e '.[report]'")
    try:
        write(options.output, options.results)
    except OSError as e:
        raise ConfigError(f"the page cannot be written: {e}") from e
    print(options.output)
    if options.screenshot:
        screenshot(options.output, options.screenshot)
    return 0
