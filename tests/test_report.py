# SPDX-License-Identifier: MIT
"""The HTML page of the committed results: headlines, marks, and the page in Chromium without a network."""

import shutil
import subprocess
from functools import partial
from pathlib import Path
from urllib.parse import unquote

import pytest

pytest.importorskip("pandas", reason="pandas reads the CSVs")
pytest.importorskip("itables", reason="itables makes tables that can be sorted")
pytest.importorskip("matplotlib", reason="matplotlib draws the charts")

from benchmarks import report
from benchmarks.__main__ import NAMES
from torchpar.errors import ConfigError


def csv(milliseconds: float, right: str = "True", head: str = "contestant") -> str:
    """Return a CSV of two contestants; the reference takes 10 ms and is compared with ``milliseconds``."""
    lines = [f"operator,mode,dtype,shape,{head},p20_ms,p50_ms,p80_ms,speedup,ok,device,instruction_sets"]
    for name, ms in (("torch.mm", 10.0), ("torchpar", milliseconds)):
        times = f"{0.9 * ms},{ms},{1.1 * ms},{10 / ms},{right}"
        lines.append(f'matmul_t,forward,float32,2048x2048,{name},{times},<b>EPYC</b>,"AVX2,AMX"')
    return "\n".join(lines)


@pytest.fixture
def results(tmp_path) -> Path:
    """A repository of two machines. On one matmul_t took 5 ms, in a folder of another name."""
    folder = tmp_path / "results"

    def commit(message: str) -> None:
        author = ("-c", "user.name=a", "-c", "user.email=a@b")
        for command in (("init",), ("add", "."), (*author, "commit", "-am", message)):
            subprocess.run(["git", *command], cwd=tmp_path, check=True, capture_output=True)

    for name, ms in (("cpu", 5.0), ("cpu-avx2", 1250.5)):
        (folder / name).mkdir(parents=True)
        (folder / name / "operators.csv").write_text(csv(ms, head="provider"))
    commit("measured")
    (folder / "cpu").rename(folder / "cpu-amx")
    commit("renamed")
    (folder / "cpu-amx" / "operators.csv").write_text(csv(8.0))
    commit("measured anew")
    return folder


def test_the_page_in_a_browser(results, tmp_path, monkeypatch, capsys):
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives Chromium")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no Chromium; apt-get install chromium")
    (results / "cpu-avx2" / "<i> b.csv").write_text(csv(8))
    monkeypatch.setattr(report, "write", partial(report.write, results=results))
    assert report.main([f"--output={tmp_path / 'page.html'}"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'page.html'}\n"
    with (
        sync_api.sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"]) as browser,
    ):
        tab = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme="dark")
        problems: list[str] = []
        tab.on("request", lambda request: problems.append(request.url))
        tab.on("console", lambda message: problems.append(message.text))
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.goto((tmp_path / "page.html").as_uri())
        tab.wait_for_selector(".dataTable tbody td")
        assert [one for one in problems if not one.startswith(("file://", "blob:"))] == []
        text = tab.locator("body").inner_text()
        assert text.index("X·Xᵀ of 2048 rows: 0.01 to 1.2 times torch.mm") < text.index(
            "Rows that became slower: 1."
        )
        assert all(markup in text for markup in ("<b>EPYC</b>", "AVX2, AMX", "<i>"))
        assert tab.locator(".panels svg text").all_text_contents() == ["2048x2048", "1.2×", "0.01×"]
        heads = tab.locator(".dataTable").first.locator("thead th")
        assert heads.all_inner_texts()[-3:] == ["cpu-amx: change", "cpu-avx2: ms", "cpu-avx2: speed-up"]
        heads.nth(4).locator(".dt-column-order").click()
        heads.nth(4).locator(".dt-column-order").click()  # as numbers: as text, "1,250" comes last
        cells = tab.locator(".dataTable").first.locator("tbody td:nth-child(5)")
        sync_api.expect(cells).to_have_text(["1,250", "10"])
        assert tab.evaluate("document.documentElement.scrollWidth") == 390
        anchors = [link.get_attribute("href")[1:] for link in tab.locator("a[href^='#']").all()]
        assert [unquote(anchor) for anchor in anchors] == ["operators", "operators", "<i> b"]
        assert all(tab.locator(f'[id="{unquote(anchor)}"]').count() == 1 for anchor in anchors)


def test_a_row_has_changed_if_its_times_and_its_ratio_have():
    slow_machine = csv(8).replace(",1.25,", ",2.0,")  # the ratio is the same
    for before, now, mark in (
        (csv(5), csv(8), "slower"),
        (csv(8), csv(5), "faster"),
        (csv(5), csv(5.5), ""),  # the times overlap
        (csv(5), slow_machine, ""),
        (csv(5).replace("matmul_t,", "maximum,"), csv(8), ""),
    ):
        assert list(report.change(report.read_csv(now), report.read_csv(before))) == ["", mark]


def test_a_csv_is_compared_with_the_last_other_times_also_from_before_it_was_renamed(results):
    path = results / "cpu-amx" / "operators.csv"
    head, _, torchpar = csv(8.0).splitlines()
    for text, mark in (
        (csv(8), "slower"),
        (f"{head}\n{torchpar}", "slower"),  # a row less is no other measurement
        (csv(6), "faster"),
        (csv(8, right="False"), "NOT OK"),
    ):
        path.write_text(text)
        frame, compared = report.with_changes(path)
        assert (frame["change"].iloc[-1], compared) == (mark, "compared with the previous version")
    other = results / "cpu-amx" / "muon.csv"
    other.write_text(csv(5))
    assert report.with_changes(other)[1] == "no earlier version to compare with"
    other.write_text("operator,contestant\nmatmul_t,torchpar")
    with pytest.raises(ConfigError, match=rf"{other} is no CSV of a benchmark \(.*\); measure again, or"):
        report.write(results / "page", results)


def test_seeds_are_summarised_and_notes_and_epochs_are_not():
    head = "contestant,p20_ms,p50_ms,p80_ms,speedup,seed,seconds,accuracy,note,epoch"
    rows = [f"a,,,,,{seed},{seed + 1},0.9{seed},," for seed in range(3)] + ["b,,,,,0,4,0.9,,"]
    slow, fast = report.read_csv("\n".join([head, *rows])).to_dict("records")
    assert (slow["p50_ms"], slow["accuracy"], fast["speedup"]) == pytest.approx((2000, 0.91, 0.5))
    rows = ["a,,,,,,,,x,1", "a,,,,,,,,x,2", "a,,,,,,,,y,1"]
    assert len(report.read_csv("\n".join([head.replace("seconds", "s"), *rows]))) == 3


def test_the_committed_results_have_panels_benchmarks_and_instruction_sets():
    content = report.content(report.RESULTS)
    panels = {part["name"]: len(part["panels"]) for part in content["sections"] if part.get("panels")}
    assert panels == {stem: len(specs) for stem, specs in report.PANELS.items()}
    assert all(", AVX2" in processor for processor in content["machines"].values())
    for path in report.RESULTS.glob("*/*.csv"):
        assert path.stem.partition("-")[0] in NAMES, path
        assert "instruction_sets" in path.read_text().partition("\n")[0]
