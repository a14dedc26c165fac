# SPDX-License-Identifier: MIT
"""The HTML page of the committed results: headlines and tables, in a file that needs no network."""

import re
from importlib.util import find_spec

import pytest

from benchmarks import NAMES, report
from torchpar.errors import ConfigError

# Each worker of pytest-xdist imports this file, and pandas takes a third of a second.
pytestmark = [
    pytest.mark.skipif(find_spec("pandas") is None, reason="pandas reads the CSVs"),
    pytest.mark.skipif(
        find_spec("itables") is None, reason="itables makes tables that can be sorted"
    ),
]


def csv(milliseconds: float, right: str = "True") -> str:
    """Return a CSV of two contestants; the reference takes 10 ms and is compared with
    ``milliseconds``."""
    lines = [
        "operator,mode,dtype,shape,contestant,p20_ms,p50_ms,p80_ms,speedup,ok,device,instruction_sets"
    ]
    for name, ms in (("torch.mm", 10.0), ("torchpar", milliseconds)):
        times = f"{0.9 * ms},{ms},{1.1 * ms},{10 / ms},{right}"
        lines.append(f'matmul_t,forward,float32,2048x2048,{name},{times},<b>EPYC</b>,"AVX2,AMX"')
    return "\n".join(lines)


def test_the_page_has_the_machines_side_by_side_and_needs_no_network(tmp_path, monkeypatch, capsys):
    results = tmp_path / "results"
    for machine, ms in (("cpu-amx", 8.0), ("cpu-avx2", 1250.5)):
        (results / machine).mkdir(parents=True)
        (results / machine / "operators.csv").write_text(csv(ms))
    (results / "cpu-avx2" / "<i> b.csv").write_text(csv(8, right="False"))
    monkeypatch.setattr(report.write, "__defaults__", (results,))
    assert report.main([f"--output={tmp_path / 'page.html'}"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'page.html'}\n"
    page = (tmp_path / "page.html").read_text()
    assert re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', page) == []
    assert "<h2>X·Xᵀ of 2048 rows: 0.01 to 1.2 times torch.mm</h2>" in page
    assert re.findall(r"<span>(\S+×)</span>", page) == ["1.2×", "0.01×"]  # the charts' texts
    assert all(
        text in page for text in ("&lt;b&gt;EPYC&lt;/b&gt;", "AVX2, AMX", '<h2 id="&lt;i&gt; b">')
    )
    assert all(f"cpu-avx2: {head}" in page for head in ("ms", "speed-up", "result"))
    assert "Rows with wrong results: 2." in page
    assert "1,250" in page
    other = results / "cpu-amx" / "muon.csv"
    other.write_text("operator,contestant\nmatmul_t,torchpar")
    with pytest.raises(
        ConfigError, match=rf"{other} is no CSV of a benchmark \(.*\); measure again, or"
    ):
        report.write(tmp_path / "page", results)


def test_the_committed_results_have_panels_benchmarks_and_instruction_sets():
    content = report.content(report.RESULTS)
    panels = {
        part["name"]: len(part["panels"]) for part in content["sections"] if part.get("panels")
    }
    assert panels == {stem: len(specs) for stem, specs in report.PANELS.items()}
    assert all(", AVX2" in processor for processor in content["machines"].values())
    for path in report.RESULTS.glob("*/*.csv"):
        assert path.stem.partition("-")[0] in NAMES, path
        assert "instruction_sets" in path.read_text().partition("\n")[0]
