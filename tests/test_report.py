# SPDX-License-Identifier: MIT
"""The HTML page of the committed results, in Chromium: sorted, dark, on a phone, and without a network."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT

pytest.importorskip("pandas", reason="pandas reads the CSVs")
pytest.importorskip("itables", reason="itables makes tables that can be sorted")

from benchmarks import report
from benchmarks.__main__ import NAMES
from torchpar.errors import ConfigError

ENVIRONMENT = {
    "device": "AMD EPYC",
    "torch": "2.15.0",
    "commit": "a" * 40,
    "date": "2026-11-22T01:02:03+00:00",
}
HEAD = "operator,shape,contestant,p20_ms,p50_ms,p80_ms,mean_ms,samples,speedup,ok,reason"


def csv(milliseconds: float, right: str = "True") -> str:
    """A CSV of two contestants; the reference takes 10 ms and is compared with ``milliseconds``."""
    lines = [f"{HEAD},{','.join(ENVIRONMENT)}"]
    for name, ms in (("torch.mm", 10.0), ("torchpar", milliseconds)):
        times = f"{0.9 * ms},{ms},{1.1 * ms},{ms},20,{10 / ms},{right},"
        lines.append(f"matmul_t,64x64,{name},{times},{','.join(ENVIRONMENT.values())}")
    return "\n".join(lines)


@pytest.fixture
def results(tmp_path) -> Path:
    """A repository with two commits: on one of two machines matmul_t takes 5 ms, then 8 ms."""
    folder = tmp_path / "results"

    def git(*arguments: str) -> None:
        author = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *author, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    for milliseconds in (5.0, 8.0):
        for machine, ms in (("cpu-a", milliseconds), ("cpu-b", 1250.5)):
            (folder / machine).mkdir(parents=True, exist_ok=True)
            (folder / machine / "matmul_t.csv").write_text(csv(ms))
        git("add", ".")
        git("commit", "-m", "measured")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives Chromium")
    if shutil.which("chromium") is None:
        pytest.skip("there is no Chromium; apt-get install chromium")
    with (
        sync_api.sync_playwright() as playwright,
        playwright.chromium.launch(**report.browser_options()) as browser,
    ):
        yield browser


def opened(browser: Any, page: Path, **options: Any) -> Any:
    """A tab with the page, which must load without an error and without the network."""
    tab = browser.new_page(**options)
    problems: list[str] = []
    tab.on("request", lambda request: problems.append(request.url) if "://" in request.url[:8] else None)
    tab.on("console", lambda message: problems.append(message.text))
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.goto(page.as_uri())
    tab.wait_for_selector(".dataTable tbody td")
    assert [one for one in problems if not one.startswith(("file://", "blob:"))] == []
    return tab


def cells(tab: Any, column: int) -> list[str]:
    rows = tab.locator(".dataTable").first.locator("tbody tr").all()
    return [row.locator("td").nth(column).inner_text() for row in rows]


def test_machines_stand_side_by_side_and_what_became_slower_is_marked(browser, results, tmp_path):
    from playwright.sync_api import expect

    report.write(tmp_path / "page.html", results)
    tab = opened(browser, tmp_path / "page.html")
    heads = tab.locator(".dataTable").first.locator("thead th").all_inner_texts()
    shown = ["ms", "speed-up", "change"]
    assert heads == [
        "contestant",
        *(f"cpu-a: {name}" for name in shown),
        *(f"cpu-b: {name}" for name in shown[:2]),
    ]
    assert [cells(tab, i) for i in range(6)] == [
        *(["torch.mm", "torchpar"], ["10", "8"], ["1", "1.25"], ["", "slower"]),
        *(["10", "1,250"], ["1", "0.008"]),
    ]
    text = tab.locator("body").inner_text()
    assert "Rows that became slower: 1." in text
    assert text.count("AMD EPYC; torch 2.15.0; commit aaaaaaaaa; date 2026-11-22") == 2
    column = tab.locator(".dataTable").first.locator("thead th").nth(4)
    assert cells(tab, 4) == ["10", "1,250"]
    # As numbers: as text, "1,250" comes first. The page sorts some milliseconds after a click.
    for direction, order in (("ascending", ["10", "1,250"]), ("descending", ["1,250", "10"])):
        column.locator(".dt-column-order").click()
        expect(column).to_have_attribute("aria-sort", direction)
        expect(tab.locator(".dataTable").first.locator("tbody td:nth-child(5)")).to_have_text(order)


def test_colours_follow_the_reader_and_a_phone_shows_all(browser, results, tmp_path):
    report.write(tmp_path / "page.html", results)
    page = tmp_path / "page.html"
    brightness = {}
    for scheme in ("light", "dark"):
        tab = opened(browser, page, color_scheme=scheme, viewport={"width": 390, "height": 800})
        assert tab.evaluate("document.documentElement.scrollWidth") == 390
        colours = tab.evaluate(
            "[...document.querySelectorAll('h1, .dataTable td')].map(e => getComputedStyle(e).color)"
        )
        brightness[scheme] = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours]
    assert max(brightness["light"]) < 382 < min(brightness["dark"])


def test_the_committed_results_are_all_shown(browser, tmp_path):
    report.write(tmp_path / "page.html")
    tab = opened(browser, tmp_path / "page.html")
    heads = set(tab.locator("h2").all_inner_texts())
    assert heads >= {path.stem for path in report.RESULTS.glob("*/*.csv")}
    widths = tab.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert len(widths) == len(list(report.RESULTS.glob("*/*.png")))
    assert min(widths) > 100


SLOW_MACHINE = csv(8).replace(",1.25,", ",2.0,")  # the ratio is the same
FAST_MACHINE = csv(5).replace(",2.0,", ",1.25,")


@pytest.mark.parametrize(
    "before, now, mark",
    [
        (csv(5), csv(8), "slower"),
        (csv(8), csv(5), "faster"),
        (csv(5), csv(5.5), ""),  # the times overlap
        (csv(5), SLOW_MACHINE, ""),
        (csv(8), FAST_MACHINE, ""),
        (csv(5).replace(",2.0,", ",,"), csv(8), ""),
        (csv(5).replace("matmul_t,", "maximum,"), csv(8), ""),
    ],
)
def test_changes(before, now, mark):
    assert list(report.change(report.read_csv(now), report.read_csv(before))) == ["", mark]


def test_a_reference_is_not_marked():
    before = csv(5).replace("torch.mm,9.0,10.0,11.0", "torch.mm,0.9,1.0,1.1")
    assert before != csv(5)
    assert list(report.change(report.read_csv(csv(5)), report.read_csv(before))) == ["", ""]


def test_a_file_is_compared_with_the_last_committed_text_that_differs(results):
    path = results / "cpu-a" / "matmul_t.csv"
    committed = csv(8.0)  # after csv(5.0)
    for text, mark in ((committed, "slower"), (csv(6), "faster"), (csv(20), "slower")):
        path.write_text(text)
        frame, compared = report.with_changes(path)
        assert list(frame["change"]) == ["", mark]
        assert compared == "compared with the previous version"
    path.write_text(csv(8).replace("operator,", "kernel,"))
    assert report.with_changes(path)[1] == "the previous version has other columns"
    other = results / "cpu-a" / "muon.csv"
    other.write_text(csv(5))
    assert report.with_changes(other)[1] == "no earlier version to compare with"


@pytest.mark.parametrize("text", ["", "\n", "operator,contestant\nmatmul_t,torchpar", 'a,p20_ms\n"1', "\xe9"])
def test_what_is_no_csv_of_a_benchmark_is_named(results, text):
    path = results / "cpu-a" / "matmul_t.csv"
    path.write_text(text, "latin-1")
    with pytest.raises(
        ConfigError, match=rf"{path} is no CSV of a benchmark \(.*\); measure again, or remove it"
    ):
        list(report.sections(results))


def test_machines_with_other_columns():
    head = "n,threads,contestant,p20_ms,p50_ms,p80_ms,speedup"
    frames = {
        "a": report.read_csv(f"{head}\n512,1,x,1,2,3,1\nall,2,x,1,7,3,1"),
        "b": report.read_csv("n,contestant,p20_ms,p50_ms,p80_ms\n512,x,1,9,3\n,x,1,8,3"),
    }
    table = report.side_by_side(frames).map(lambda cell: "" if cell != cell else cell)
    assert table.to_dict("split")["data"] == [
        *(["512", "1", 2.0, 1.0, ""], ["all", "2", 7.0, 1.0, ""]),
        *(["512", "", "", "", 9.0], ["", "", "", "", 8.0]),
    ]
    assert "nan" not in report.as_html(report.side_by_side(frames)).partition("</style>")[0].lower()


def test_counts_are_shown_where_no_times_are():
    frame = report.read_csv(
        "ranks,contestant,p20_ms,p50_ms,calls,dirty\n64,counted,,,15,True\n512,counted,,,3,"
    )
    assert report.side_by_side({"a": frame})["a: calls"].tolist() == [15, 3]
    assert report.origin(frame) == "with changes that are not committed"


def test_epochs_are_rows_of_their_own():
    frame = report.read_csv("contestant,p20_ms,epoch,accuracy\nmuon,,1,0.9\nmuon,,2,0.95")
    assert frame["accuracy"].tolist() == [0.9, 0.95]


def test_seeds_are_summarised():
    rows = [f"a,a,,,,,,{x},{seed},{seed + 1},0.9{seed},{seed != 1}" for seed, x in enumerate((5, 6, 7))]
    head = "recipe,contestant,p20_ms,p50_ms,p80_ms,mean_ms,samples,speedup,seed,seconds,accuracy,ok"
    (row,) = report.read_csv("\n".join([head, *rows])).to_dict("records")
    assert row["p50_ms"] == 2000
    assert row["speedup"] == 6
    assert row["accuracy"] == pytest.approx(0.91)
    assert row["failed"]


def test_wrong_results_are_marked(results):
    (results / "cpu-a" / "matmul_t.csv").write_text(csv(8, right="False"))
    (section,) = report.sections(results)
    assert section["failed"] == 2


def test_markup_is_text(browser, results, tmp_path):
    text = csv(8).replace("torchpar", "<script>alert(1)</script>").replace("AMD EPYC", "<b>AMD</b>")
    (results / "cpu-a" / "matmul_t.csv").write_text(text)
    (results / "cpu-a").rename(results / '<img src=x onerror="document.title=1">')
    (results / "cpu-b" / "<i>.csv").write_text(csv(8))
    report.write(tmp_path / "page.html", results)
    tab = opened(browser, tmp_path / "page.html")
    assert any("<script>alert(1)</script>" in text for text in tab.locator("tbody td").all_inner_texts())
    text = tab.locator("body").inner_text()
    assert all(markup in text for markup in ("<b>AMD</b>", "<img src=x", "<i>"))
    assert tab.title() == "torchpar: measured"


def test_without_scripts_the_figures_can_be_read(browser, results, tmp_path):
    report.write(tmp_path / "page.html", results)
    tab = browser.new_page(java_script_enabled=False)
    tab.goto((tmp_path / "page.html").as_uri())
    text = tab.locator("body").inner_text()
    assert text.startswith("torchpar: measured")
    assert "slower" in text
    assert "1,250" in text


def test_a_screenshot_that_fails_is_one_line(results, tmp_path, monkeypatch):
    pytest.importorskip("playwright", reason="playwright drives Chromium")
    monkeypatch.setattr(report, "browser_options", lambda: {"executable_path": "/nonexistent"})
    with pytest.raises(ConfigError, match=r"no screenshot \(.*\); it needs Chromium and a FILE\.png"):
        report.main(
            [f"--output={tmp_path / 'page'}", f"--results={results}", f"--screenshot={tmp_path / 'a.png'}"]
        )


def test_no_results_are_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"has no results, expected MACHINE/NAME\.csv"):
        report.write(tmp_path / "page.html", tmp_path)


def test_each_csv_belongs_to_a_benchmark():
    for path in report.RESULTS.glob("*/*.csv"):
        assert path.stem.partition("-")[0] in NAMES, path
    assert (ROOT / "benchmarks" / "report.html").exists()
