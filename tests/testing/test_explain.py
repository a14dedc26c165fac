# SPDX-License-Identifier: MIT
"""``python -m torchpar explain`` says who computes, and by which times."""

import csv
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the rule is part of the kernels")

from nogpu.record.time import ESTIMATE_ACCURACY
from torchpar.kernels.matmul_t import SYMMETRIC_MATMUL
from torchpar.kernels.rule import KINDS
from torchpar.testing import explain

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "nvidia-h200"


def run(capsys, *arguments: str) -> list[str]:
    assert explain.main(arguments) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (
            "matmul_t 4096x4096 --dtype bfloat16 --gpu H200",
            "128x256x64 w8 s4 tma (measured, 100.6 µs; torch.mm 174.5 µs)",
        ),
        ("matmul_t 1024x4096", "torch.mm and mirror (measured, 22.2 µs)"),
        ("matmul_t 32x1024x1024", "128x256x64 w8 s3 flat (measured, 78.1 µs; torch.mm 100.1 µs)"),
        ("matmul_t 4x8x1024x1024", "128x256x64 w8 s3 flat (measured, 78.1 µs; torch.mm 100.1 µs)"),
        (
            "matmul_t 4096x4096 --dtype tf32",
            "128x256x32 w8 s3 tma (measured, 191.1 µs; torch.mm 335.8 µs)",
        ),
        (
            "matmul_t 4096x4096 --dtype tf32x3",
            "128x128x32 w8 s3 tma (measured, 825.7 µs; torch.mm 2,701 µs)",
        ),
        (
            "matmul_t 4096x4096 --dtype float64",
            "64x64x16 w4 s3 pointers (measured, 1,403 µs; torch.mm 2,437 µs)",
        ),
        (
            "symmetric_matmul 4096x4096",
            "128x256x64 w8 s4 tma (measured, 107.5 µs; torch.addmm 200.9 µs)",
        ),
        (
            "linear_sigmoid 4096x1024->4096",
            "128x256x64 w8 s4 tma (measured, 65.9 µs; addmm 54.1 µs)",
        ),
        ("linear_sigmoid 8192x4096->4096", "addmm and sigmoid_ (measured, 384.3 µs)"),
        (
            "linear_sigmoid 4096x1024->4096 --dtype float32",
            "addmm and sigmoid_ (measured, 734.7 µs)",
        ),
        (
            "matmul_t 256x256 --dtype tf32x3",
            "64x64x32 w4 s3 pointers (measured, 12.8 µs; torch.mm 11.4 µs)",
        ),
        (
            "symmetric_matmul 1024x1024",
            "64x64x128 w4 s3 pointers (measured, 12.4 µs; torch.addmm 12.7 µs)",
        ),
        (
            "linear_sigmoid 64x784->128 --dtype float32",
            "64x64x16 w4 s3 split_k (measured, 16.6 µs; addmm 15.7 µs)",
        ),
    ],
)
def test_measured_shapes_show_what_was_measured(capsys, arguments, expected):
    first, *others = run(capsys, *arguments.split())
    assert first == f"computed by: {expected}"
    assert others


@pytest.mark.parametrize(
    "arguments, basis",
    [
        ("matmul_t 12x768x768", "predicted from measurements"),
        ("matmul_t 4096x4096 --gpu H100", "predicted from measurements"),
        ("matmul_t 1024x1024 --dtype float16", "predicted from measurements"),
        ("matmul_t 1024x999 --dtype float32", "predicted from measurements"),
        ("linear_sigmoid 64x784->10 --dtype tf32x3", "predicted from measurements"),
        ("linear_sigmoid 64x784->10", "predicted from measurements"),
        ("linear_sigmoid 4096x1024->4096 --dtype float64", "estimated"),
        ("matmul_t 4096x4096 --gpu A100", "estimated"),
        ("linear_sigmoid 4096x1024->4096 --gpu B200 --dtype tf32", "estimated"),
    ],
)
def test_other_times_are_named_as_what_they_are(capsys, arguments, basis):
    first, *others = run(capsys, *arguments.split())
    assert f"({basis}, " in first
    assert not any("predicted" in line for line in others)
    times = [float(line.split(" µs")[0].split()[-1].replace(",", "")) for line in others]
    assert times[: explain.RUNNERS_UP] == sorted(times[: explain.RUNNERS_UP])


def test_the_runners_up_stand_below_in_the_order_of_their_times(capsys):
    _, *others = run(capsys, "matmul_t", "4096x4096")
    assert others == [
        "  128x128x64 w8 s4 tma       106.6 µs",
        "  128x128x64 w8 s3 pointers  128.3 µs",
        "  64x128x64 w4 s3 flat       131.1 µs",
        "  128x256x64 w8 s3 flat      140.7 µs",
        "  torch.mm and mirror        185.4 µs",
    ]
    _, *others = run(capsys, "matmul_t", "1024x4096")
    assert others[:2] == [
        "  64x64x128 w4 s3 tma        22.5 µs",
        "  64x64x128 w4 s3 pointers   25.5 µs, predicted",
    ]


def configurations(capsys, *arguments):
    """Return the lines of configurations, and what is said below them."""
    lines = run(capsys, *arguments)
    said = ESTIMATE_ACCURACY.count("\n") + 1
    return lines[:-said], "\n".join(lines[-said:])


def test_all_prints_an_estimate_of_each_configuration_and_what_was_measured(capsys):
    lines, trust = configurations(capsys, "matmul_t", "4096x4096", "--all")
    assert trust == ESTIMATE_ACCURACY
    assert not any("split_k" in line for line in lines)  # nothing is split here
    found = {line[:26].strip(): line[26:].split() for line in lines}
    assert set(map(str, SYMMETRIC_MATMUL.tiles["bfloat16"])) < set(found)
    time, unit, *measured = found["128x256x64 w8 s4 tma"]
    assert unit == "µs"
    assert float(time) == pytest.approx(100.6, rel=0.1)
    assert measured == ["measured", "100.6", "µs"]
    assert "measured" not in found["32x32x64 w4 s4 pointers"]
    times = [float(time) for time, *_ in found.values()]
    assert times == sorted(times)
    lines, _ = configurations(capsys, "matmul_t", "4096x4096", "--all", "--gpu", "A100")
    assert lines
    assert not any("tma" in line or "measured" in line for line in lines)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ("matmul_t 4096", "shape is '4096', expected NxK, or BATCHxNxK, such as 4096x4096 or"),
        ("matmul_t 4096x1024->4096", "shape is '4096x1024->4096', expected NxK"),
        ("linear_sigmoid 4096x4096", "expected MxK->N, such as 4096x1024->4096"),
        ("matmul_t 0x64", "shape is '0x64', expected sizes from 1 to 2147483647"),
        ("matmul_t 64x2147483648", "expected sizes from 1 to 2147483647"),
        ("matmul_t 64x64 --dtype int8", "argument --dtype: invalid choice: 'int8'"),
        ("matmul_t 64x64 --gpu H300", "argument --gpu: invalid choice: 'H300'"),
        ("maximum 64x64", "argument operator: invalid choice: 'maximum'"),
    ],
)
def test_wrong_arguments_end_in_one_line(capsys, monkeypatch, arguments, expected):
    monkeypatch.setattr(sys, "argv", ["torchpar", "explain", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("torchpar", run_name="__main__")
    assert ended.value.code == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m torchpar explain: error: ")
    assert expected in line


def test_the_packages_times_are_those_of_the_results():
    """The package holds the configurations, and the library, of each shape."""
    ours: dict[tuple[str, str, str], set[float]] = {}
    with explain.MEASURED.open() as file:
        for row in csv.DictReader(file):
            case = row["operator"], row["dtype"], row["shape"]
            ours.setdefault(case, set()).add(float(row["us"]))
    results: dict[tuple[str, str, str], set[float]] = {}
    for name in ("operators.csv", "operators-queued.csv"):
        with (RESULTS / name).open() as file:
            rows = [one for one in csv.DictReader(file) if one["mode"] == "forward"]
        for row in rows:
            if row["operator"] in explain.OPERATORS and row["p20_ms"]:
                case = row["operator"], row["dtype"], row["shape"]
                results.setdefault(case, set()).add(float(f"{1e3 * float(row['p20_ms']):.6g}"))
    assert set(ours) == set(results)
    for case, times in ours.items():
        assert times <= results[case], f"{case} has times that are not in {RESULTS.name}"
    assert {dtype for _, dtype, _ in ours} == set(KINDS)


def test_all_choices_of_the_rule_have_measured_times_if_the_csv_has_them():
    timed = explain.measured("matmul_t", (4096, 4096, 4096, 1), "bfloat16")
    names = {str(tiles) for tiles in SYMMETRIC_MATMUL.tiles["bfloat16"]}
    only_warm = {"64x64x128 w4 s3 pointers", "32x32x64 w4 s4 pointers"}
    assert set(timed) >= names - only_warm | {"torch.mm", "torch.mm and mirror"}
    assert explain.measured("matmul_t", (4096, 4096, 4095, 1), "bfloat16") == {}
