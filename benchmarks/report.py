# SPDX-License-Identifier: MIT
"""One HTML page of all committed results: ``python -m benchmarks report [--output FILE]``.

The page needs no network: charts, tables and scripts are inside. It begins with a panel for each
benchmark, its headline and its chart. Tables show the machines side by side.
"""

import argparse
import importlib.util
import math
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchpar.errors import ConfigError, writing

from . import NAMES, title
from .results import duration, number

if TYPE_CHECKING:
    from pandas import DataFrame

RESULTS = Path(__file__).parent / "results"
TEMPLATE = Path(__file__).parent / "report.html"
# Colors of the machines, legible on light and dark pages.
COLORS = ("#3f87c9", "#dd7733", "#46a36b", "#ad6cc2", "#b99316", "#7f8c8d")
CASE = ("note", "epoch", "nbytes", "validate")  # columns of the case, besides those left of p20_ms
TIMES = ["p20_ms", "p50_ms", "p80_ms", "speedup"]
SHOWN = {"p50_ms": "ms", "speedup": "speed-up", "accuracy": "accuracy", "wrong": "result"}
HIDDEN = ("mean_ms", "samples", "ok", "reason", "seed", "load")
VERSIONS = ("torch", "triton", "numpy", "python", "commit", "dirty")
ORIGIN = ("device", "processor", "instruction_sets", "cores", "gpu", *VERSIONS, "clocks", "date")
PANELS = tomllib.loads((Path(__file__).parent / "panels.toml").read_text("utf-8"))
Part = dict[str, Any]  # of the page, which the template reads


def load(path: Path) -> "DataFrame":
    """Return the rows of a benchmark's CSV by their case, as a table of pandas.

    Rows that differ only by seed become one, whose speed-up is over the first contestant: the
    median of the seeds' ratios.

    Raises:
        ConfigError: it is no CSV of a benchmark.
    """
    import pandas

    try:
        frame = pandas.read_csv(path, dtype=str, keep_default_na=False)
        columns = list(frame.columns)
        if not {"contestant", "p20_ms"} <= set(columns):
            raise ValueError("expected the columns contestant and p20_ms")
    except (OSError, ValueError) as e:
        reason = str(e).partition("\n")[0]
        raise ConfigError(
            f"{path} is no CSV of a benchmark ({reason}); measure again, or remove it"
        ) from e
    names = (*columns[: columns.index("p20_ms")], *(name for name in CASE if name in columns))
    case = list(dict.fromkeys(names))
    for name in dict.fromkeys((*TIMES, *columns)):
        if name not in (*case, *ORIGIN, "ok", "reason"):
            cells = frame[name] if name in columns else pandas.Series("", frame.index)
            numbers = pandas.to_numeric(cells, errors="coerce")
            frame[name] = numbers if name in TIMES or numbers.notna().any() else cells
    groups = [frame[name] for name in case]
    if "seconds" in columns:  # one row for each seed
        times = (1000 * frame["seconds"]).groupby(groups)
        for name, q in (("p20_ms", 0.2), ("p50_ms", 0.5), ("p80_ms", 0.8)):
            frame[name] = times.transform("quantile", q)
        first = frame[frame["contestant"].isin(frame["contestant"].head(1))]
        ratios = frame["seed"].map(first.groupby("seed")["seconds"].mean()) / frame["seconds"]
        frame["speedup"] = ratios.groupby(groups).transform("median")
        for name in {"accuracy"} & set(columns):
            frame[name] = frame[name].groupby(groups).transform("mean")
    wrong = frame["ok"] == "False" if "ok" in columns else pandas.Series(False, frame.index)
    frame["failed"] = wrong.groupby(groups).transform("any")
    frame["wrong"] = frame["failed"].map({True: "NOT OK", False: ""})
    return frame.drop_duplicates(case).set_index(case)


def origin(frame: "DataFrame") -> str:
    """Return the environment of all rows: each version, clock, commit and day that they have."""
    parts = []
    for name in ORIGIN:
        values = [value for value in frame[name].unique() if value] if name in frame else []
        if name == "dirty":
            parts += ["with changes that are not committed"] * ("True" in values)
        elif values:
            short = {"date": 10, "commit": 9}.get(name)
            text = ", ".join(dict.fromkeys(value[:short] for value in values))
            parts.append(text if name in ("device", "processor", "clocks") else f"{name} {text}")
    return "; ".join(dict.fromkeys(parts))  # on a CPU the device is the processor


def side_by_side(frames: Mapping[str, "DataFrame"]) -> "DataFrame":
    """Return a table of the cases with each machine's columns; what all have done comes first."""
    import pandas

    case = list(dict.fromkeys(name for frame in frames.values() for name in frame.index.names))
    parts = []
    for machine, frame in frames.items():
        names = [
            name for name in SHOWN if name in frame and frame[name].replace("", None).notna().any()
        ]
        if "p50_ms" not in names:  # something other than time was counted
            hidden = (*TIMES, *HIDDEN, *ORIGIN, "failed")
            names = [
                name
                for name in frame
                if name not in hidden and frame[name].replace("", None).notna().any()
            ]
        part = frame[names].rename(
            columns={name: f"{machine}: {SHOWN.get(name, name)}" for name in names}
        )
        parts.append(
            part.reset_index().assign(**dict.fromkeys(set(case) - set(frame.index.names), ""))
        )
    table = pandas.concat([part[case] for part in parts]).drop_duplicates()
    for part in parts:
        table = table.merge(part, how="left", on=case)
    table = table.iloc[table.isna().sum(axis=1).argsort(kind="stable")]
    constant = [name for name in case if table[name].nunique() == 1 and len(table) > 1]
    return table.drop(columns=constant)


def as_html(table: "DataFrame") -> str:
    """Return a table that a reader can sort and search; numbers have three digits."""
    from itables.javascript import to_html_datatable

    def text(cell: object) -> str:
        if isinstance(cell, float):
            return "" if math.isnan(cell) else number(cell)
        return str(cell)

    style = "width:auto; margin:0"
    return to_html_datatable(
        table.map(text), connected=False, showIndex=False, maxBytes=0, order=[], style=style
    )


def panel(spec: Part, frames: Mapping[str, "DataFrame"], colors: Mapping[str, str]) -> Part | None:
    """Return a headline, the machines that it tells of, and a chart; None if no machine has the
    best row."""
    spec = {"over": "", "value": "speedup", **spec}
    bars: dict[str, dict[str, float]] = {}
    best = {}
    for machine, frame in frames.items():
        for row in frame.reset_index().to_dict("records"):
            value = row.get(spec["value"], math.nan)
            if row["failed"] or isinstance(value, str) or not value > 0:
                continue
            if spec["rows"].items() <= row.items():
                row["n"] = row.get("n", row.get("shape", "").partition("x")[0])
                bars.setdefault(machine, {})[spec["bar"].format(**row)] = value
                if spec["best"].items() <= row.items():
                    best[machine] = value, spec["text"].format(**row)
    if not best:
        return None
    (low, text), (high, _) = min(best.values()), max(best.values())
    ends = dict.fromkeys(amount(value, spec) for value in (low, high))
    over = f" times {spec['over']}" if spec["over"] else ""
    return {
        "headline": f"{text}: {' to '.join(ends)}{over}",
        "machines": list(bars),
        "chart": chart(bars, spec, colors),
        "over": spec["over"],
    }


def amount(value: float, spec: Part) -> str:
    if spec["value"] == "bytes":
        return f"{number(value / 1e9)} GB"
    if spec["value"] == "p50_ms":
        return duration(value / 1e3)
    return f"{value:.2f}" if value < 0.995 else f"{value:.1f}" if value < 9.95 else number(value)


def chart(
    bars: Mapping[str, Mapping[str, float]], spec: Part, colors: Mapping[str, str]
) -> list[tuple[str, list[Part]]]:
    """Return the bars of each name on a logarithmic axis, from 1 on if the values are relative.

    Places and lengths are in percent of the axis.

    Args:
        bars: the values by machine and name.
    """
    names = dict.fromkeys(name for of in bars.values() for name in of)
    values = [value for of in bars.values() for value in of.values()]
    start = 1.0 if spec["over"] else min(values) / 2
    low, high = min(start, *values), max(start, *values)

    def bar(machine: str, value: float) -> Part:
        left, right = (100 * math.log(x / low, high / low) for x in sorted((start, value)))
        text = amount(value, spec) + "×" * bool(spec["over"])
        return {"left": left, "width": right - left, "color": colors[machine], "text": text}

    return [(name, [bar(m, of[name]) for m, of in bars.items() if name in of]) for name in names]


def content(results: Path) -> Part:
    """Return a section for each kind of CSV, and the processors and the colors of the machines."""

    def benchmark(stem: str) -> str:
        """Return the benchmark that wrote a CSV, such as "train" of "train-2-threads", or ""."""
        name = stem.partition("-")[0]
        return name if name in NAMES else ""

    paths: dict[str, dict[str, Path]] = {}
    for path in sorted(results.glob("*/*.csv")):
        paths.setdefault(path.stem, {})[path.parent.name] = path
    colors = dict(
        zip(sorted({name for of in paths.values() for name in of}), cycle(COLORS), strict=False)
    )
    order = [*dict.fromkeys(map(benchmark, PANELS)), *NAMES, ""]
    processors: dict[str, dict[str, None]] = {}
    sections: list[Part] = []
    for stem in sorted(paths, key=lambda stem: (order.index(benchmark(stem)), stem)):
        frames = {machine: load(path) for machine, path in paths[stem].items()}
        for machine, frame in frames.items():
            for name in ("device", "processor", "instruction_sets"):
                texts = frame[name].unique() if name in frame else ()
                processors.setdefault(machine, {}).update(dict.fromkeys(filter(None, texts)))
        sections.append(
            {
                "name": stem,
                "title": title(benchmark(stem)) if benchmark(stem) else "",
                "table": as_html(side_by_side(frames)),
                "failed": sum(int(frame["failed"].sum()) for frame in frames.values()),
                "origins": {name: origin(frame) for name, frame in frames.items()},
                "panels": list(
                    filter(None, (panel(spec, frames, colors) for spec in PANELS.get(stem, ())))
                ),
            }
        )
    machines = {name: ", ".join(",".join(texts).split(",")) for name, texts in processors.items()}
    return {"sections": sections, "machines": machines, "colors": colors}


def write(output: Path, results: Path = RESULTS) -> None:
    """Write the page of all CSVs in the folders of ``results``.

    Raises:
        ConfigError: there are none, or one cannot be read; or the page cannot be written.
    """
    from itables.javascript import generate_init_offline_itables_html
    from itables.utils import find_package_file
    from jinja2 import Template

    parts = content(results)
    if not parts["sections"]:
        raise ConfigError(f"{results} has no results, expected MACHINE/NAME.csv")
    scripts = generate_init_offline_itables_html(find_package_file("html/dt_bundle.js"))
    template = Template(TEMPLATE.read_text("utf-8"), autoescape=True)
    page = template.render(scripts=scripts, **parts)
    with writing(output, "--output"):
        output.write_text(page, "utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks report", description="Write all committed results as one page."
    )
    default = Path(tempfile.gettempdir()) / "torchpar-report.html"
    parser.add_argument(
        "--output", type=Path, metavar="FILE", default=default, help=f"by default {default}"
    )
    options = parser.parse_args(arguments)
    needs = ("itables", "pandas", "jinja2")
    if missing := [name for name in needs if importlib.util.find_spec(name) is None]:
        raise ConfigError(
            f"the report needs {' and '.join(missing)}; pip install 'torchpar[report]'"
        )
    write(options.output)
    print(options.output)
    return 0
