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
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.__main__ import NAMES, first_line
from torchpar.errors import ConfigError

RESULTS = Path(__file__).parent / "results"
TEMPLATE = Path(__file__).parent / "report.html"
WORK = ("epoch", "nbytes", "way", "validate")  # columns of the work, besides those left of p20_ms
TIMES = ("p20_ms", "p50_ms", "p80_ms", "speedup")
SHOWN = {
    **{"p50_ms": "ms", "speedup": "speed-up", "accuracy": "accuracy", "test_accuracy": "accuracy"},
    "change": "change",
}
HIDDEN = ("mean_ms", "samples", "ok", "reason", "seed")
ORIGIN = (
    "device",
    "instruction_sets",
    "cores",
    "gpu",
    "torch",
    "triton",
    "numpy",
    "python",
    "clocks",
    "commit",
    "dirty",
    "date",
)


def read_csv(text: str) -> Any:
    """Return the rows of a benchmark's CSV by their work, as a table of pandas.

    Rows that differ only by seed become one.

    Raises:
        ValueError: it is no CSV of a benchmark.
    """
    import pandas

    frame = pandas.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)
    frame = frame.rename(columns={"provider": "contestant"})  # its name in earlier versions
    columns = list(frame.columns)
    if "p20_ms" not in columns or "contestant" not in columns:
        raise ValueError("expected the columns contestant and p20_ms")
    names = (*columns[: columns.index("p20_ms")], *(name for name in WORK if name in columns))
    work = list(dict.fromkeys(names))
    for name in dict.fromkeys((*TIMES, *columns)):
        if name not in (*work, *ORIGIN, "ok", "reason"):
            cells = frame[name] if name in columns else pandas.Series("", frame.index)
            numbers = pandas.to_numeric(cells, errors="coerce")
            frame[name] = numbers if name in TIMES or numbers.notna().any() else cells
    groups = [frame[name] for name in work]
    if "seconds" in columns:  # one row for each seed
        times = frame["p50_ms"].fillna(1000 * frame["seconds"]).groupby(groups)
        for name, q in (("p20_ms", 0.2), ("p50_ms", 0.5), ("p80_ms", 0.8)):
            frame[name] = times.transform("quantile", q)
        frame["speedup"] = frame["speedup"].groupby(groups).transform("median")
        if "accuracy" in columns:
            frame["accuracy"] = frame["accuracy"].groupby(groups).transform("mean")
    wrong = frame["ok"] == "False" if "ok" in columns else pandas.Series(False, frame.index)
    frame["failed"] = wrong.groupby(groups).transform("any")
    return frame.drop_duplicates(work).set_index(work)


def change(now: Any, before: Any) -> Any:
    """Return "slower", "faster" or "" for each row of ``now``.

    A row is slower if its 20% quantile is above the previous 80% quantile, so that noise does not mark it,
    and its speed-up over the reference of the same run has fallen, so that a slower machine does not.
    References, and rows without a speed-up, are not marked.
    """
    import pandas

    before = before.reindex(now.index)
    slower = (now["p20_ms"] > before["p80_ms"]) & (now["speedup"] < before["speedup"])
    faster = (now["p80_ms"] < before["p20_ms"]) & (now["speedup"] > before["speedup"])
    return pandas.Series("", now.index).mask(slower, "slower").mask(faster, "faster")


def previous(path: Path) -> str | None:
    """Return the last committed text of a CSV that differs from the file, or None."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(path.parent), *arguments]
        done = subprocess.run(command, capture_output=True, check=True)
        return done.stdout.decode("utf-8")

    try:
        commits = git("log", "-n", "2", "--format=%H", "--", path.name).split()
        texts = (git("show", f"{commit}:./{path.name}") for commit in commits)
        return next(
            (text for text in texts if text.splitlines() != path.read_text("utf-8").splitlines()), None
        )
    except (OSError, UnicodeDecodeError, subprocess.CalledProcessError):
        return None


def with_changes(path: Path) -> tuple[Any, str]:
    """Return a CSV's rows with their changes, and with what they were compared."""
    try:
        frame = read_csv(path.read_text("utf-8"))
    except (OSError, ValueError) as e:
        reason = str(e).partition("\n")[0]
        raise ConfigError(f"{path} is no CSV of a benchmark ({reason}); measure again, or remove it") from e
    frame["change"] = ""
    compared = "no earlier version to compare with"
    if text := previous(path):
        compared = "the previous version has other columns"
        before = frame.iloc[:0]
        with suppress(ValueError):  # an old version may lack columns that read_csv needs
            before = read_csv(text)
        if len(before) and list(before.index.names) == list(frame.index.names):
            frame["change"] = change(frame, before)
            compared = "compared with the previous version"
    frame.loc[frame["failed"], "change"] = "NOT OK"
    return frame, compared


def origin(frame: Any) -> str:
    """Return the environment of all rows: each version, clock, commit and day that they have."""
    parts = []
    for name in ORIGIN:
        values = [value for value in frame[name].unique() if value] if name in frame else []
        if name == "dirty":
            parts += ["with changes that are not committed"] * ("True" in values)
        elif values:
            short = {"date": 10, "commit": 9}.get(name)
            text = ", ".join(dict.fromkeys(value[:short] for value in values))
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
            hidden = (*TIMES, *HIDDEN, *ORIGIN, "failed")
            names = [
                name for name in frame if name not in hidden and frame[name].replace("", None).notna().any()
            ]
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

    from benchmarks.results import number

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
    pictures = set(results.glob("*/*.png"))
    for stem in sorted(paths, key=lambda stem: ((*NAMES, "").index(_benchmark(stem)), stem)):
        frames, origins = {}, {}
        for machine, path in paths[stem].items():
            frames[machine], compared = with_changes(path)
            origins[machine] = f"{origin(frames[machine])}; {compared}"
        own = sorted(path for path in pictures if path.stem == stem)
        pictures -= set(own)
        yield {
            "name": stem,
            "title": first_line(_benchmark(stem)) if _benchmark(stem) else "",
            "table": as_html(side_by_side(frames)),
            "slower": sum(int((frame["change"] == "slower").sum()) for frame in frames.values()),
            "failed": sum(int(frame["failed"].sum()) for frame in frames.values()),
            "origins": origins,
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
    """Write the page of all CSVs and pictures in the folders of ``results``.

    Raises:
        ConfigError: there are none, or one cannot be read.
    """
    from itables.javascript import generate_init_offline_itables_html
    from itables.utils import find_package_file
    from jinja2 import Template

    parts = list(sections(results))
    if not parts:
        raise ConfigError(f"{results} has no results, expected MACHINE/NAME.csv")
    scripts = generate_init_offline_itables_html(find_package_file("html/dt_bundle.js"))
    template = Template(TEMPLATE.read_text("utf-8"), autoescape=True)
    output.write_text(template.render(sections=parts, scripts=scripts), "utf-8")


def screenshot(page: Path, picture: Path) -> None:
    """Save the beginning of a page as a picture.

    Raises:
        ConfigError: there is no Chromium, or the picture cannot be written.
    """
    from playwright.sync_api import Error, sync_playwright

    try:
        with sync_playwright() as playwright, playwright.chromium.launch(**browser_options()) as browser:
            tab = browser.new_page(viewport={"width": 1440, "height": 900})
            tab.goto(page.absolute().as_uri())
            tab.wait_for_selector("tbody tr td")
            tab.screenshot(path=picture)
    except (Error, OSError) as e:
        raise ConfigError(
            f"no screenshot ({str(e).partition(chr(10))[0]}); it needs Chromium and a FILE.png"
        ) from e


def browser_options() -> dict[str, Any]:
    """Return what playwright needs to launch the system's Chromium; without one it takes its own."""
    root = hasattr(os, "getuid") and os.getuid() == 0  # Chromium's sandbox refuses root
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
        raise ConfigError(
            f"the page cannot be written ({e}); give --output a file in a folder that exists"
        ) from e
    print(options.output)
    if options.screenshot:
        screenshot(options.output, options.screenshot)
    return 0
