# SPDX-License-Identifier: MIT
"""The lesson that counts the first kernels of GPU courses."""

from importlib.util import find_spec

import pytest
import torch
from commands import lesson, rows_of

pytest.importorskip("tyro", reason="tyro reads the flags")
pytest.importorskip("triton", reason="the kernels are Triton's")

from support.kernels import by_unit

import course_kernels
import triton
import triton.language as tl

from torchpar.errors import ConfigError


def products(**ways: course_kernels.Product) -> course_kernels.Work:
    """A·Bᵀ of 64 rows by the lesson's ways, or by others."""
    torch.manual_seed(0)
    (work,) = (
        one for one in course_kernels.works(course_kernels.Flags(size=64)) if "tiled" in one.ways
    )
    return work._replace(ways=ways or work.ways)


def test_a_tile_of_64_has_16_operations_a_byte():
    naive, tiled = course_kernels.count(products())
    # A block of 64 × 64 sums loads 2·64 numbers for 64² multiply-adds: 64/4.
    assert tiled["intensity"] == 16
    assert (tiled["programs"], naive["programs"]) == (1, 4)
    # Both read and write 3 matrices of 64 × 64 numbers; one of 8 numbers is a sector.
    distinct = 3 * 64 * 64 / 8
    for row in (naive, tiled):
        assert row["reuse"] == pytest.approx(1 - distinct / row["sectors"], abs=1e-12)
    assert tiled["sectors"] == distinct  # one program loads each number once
    # Each multiply-add loads two numbers, and takes no less than 4 bytes of them a thread.
    assert naive["intensity"] <= 1 / 4
    assert 0 < tiled["at_least_µs"] < tiled["about_µs"]
    assert (naive["unit"], tiled["unit"]) == ("floating point", "shared memory")


def test_products_in_cuda_have_the_counts_of_their_tiles(capsys):
    """Padding takes the conflicts, and a tile of 16 has 16/4 operations a byte."""
    pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC is not installed")
    torch.manual_seed(0)
    (work,) = course_kernels.cuda_products(torch.randn(64, 64), torch.randn(64, 64))
    naive, blocked, padded = course_kernels.count(work)
    assert [row["programs"] for row in (naive, blocked, padded)] == [16] * 3
    assert naive["conflicts"] == 0
    assert naive["intensity"] <= 1 / 4
    assert blocked["intensity"] == padded["intensity"] == 16 / 4
    # A warp has two rows of 16 threads. Its numbers of `right` lie in banks 0 and 16, 8 in each.
    reads = 64**3 // 32  # of `right`, by warps
    assert blocked["conflicts"] == 7 * reads
    assert padded["conflicts"] < blocked["conflicts"] / 100
    assert course_kernels.bank_conflicts([blocked, padded]) == (
        f"bank conflicts in shared memory: blocked {7 * reads:,}, padded {padded['conflicts']:,}"
    )
    assert course_kernels.bank_conflicts([naive]) == ""


def test_a_missing_barrier_in_cuda_is_named_with_both_lines(monkeypatch, tmp_path):
    pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC is not installed")
    before, _, after = course_kernels.CUDA.read_text("utf-8").rpartition("__syncthreads();")
    (file := tmp_path / "mine.cu").write_text(before + after, "utf-8")
    monkeypatch.setattr(course_kernels, "CUDA", file)
    (work,) = course_kernels.cuda_products(torch.randn(32, 32), torch.randn(32, 32))
    with pytest.raises(ConfigError, match=r"blocked: mine\.cu:\d+, .*race.*mine\.cu:\d+"):
        course_kernels.count(work)


def test_a_product_in_cuda_that_nvrtc_refuses_is_one_line(monkeypatch, tmp_path):
    pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC is not installed")
    (file := tmp_path / "mine.cu").write_text(
        course_kernels.CUDA.read_text("utf-8").replace("float total = 0", "float totals = 0", 1),
        "utf-8",
    )
    monkeypatch.setattr(course_kernels, "CUDA", file)
    with pytest.raises(
        ConfigError, match=r'^mine\.cu:\d+: identifier "total" is undefined; mend it$'
    ):
        course_kernels.cuda_products(torch.ones(2, 2), torch.ones(2, 2))


def first_works() -> list[course_kernels.Work]:
    flags = course_kernels.Flags(side=40, rows=24, columns=30, size=16)
    return course_kernels.works(flags)


def test_kernels_of_numba_have_the_counts_of_their_launches():
    pytest.importorskip("numba_cuda", reason="numba-cuda compiles them")
    torch.manual_seed(0)
    works = {work.name: work for work in first_works()}
    (maximum,) = course_kernels.count(works["maximum, 40 × 40, in numba.cuda"])
    assert (maximum["by"], maximum["programs"]) == ("by rows", 40)
    assert maximum["sectors"] == 3 * 40 * 40 * 4 / 32  # each number is read or written once
    (product,) = course_kernels.count(works["X·Xᵀ, 24 × 30, in numba.cuda"])
    assert (product["by"], product["programs"]) == ("one block", 1)
    assert product["intensity"] <= 1 / 4  # of a multiply-add, which loads two numbers


@pytest.mark.parametrize(
    "right, wrong, said",
    [
        ("range(x.shape[1])", "range(x.shape[1] + 1)", r"mine\.py:2\d, .*out of bounds"),
        ("x[i, k] * x[j, k]", "x[i, k] * x[i, k]", r"one block is off by"),
    ],
)
def test_a_kernel_of_numba_that_is_wrong_ends_the_lesson(monkeypatch, tmp_path, right, wrong, said):
    pytest.importorskip("numba_cuda", reason="numba-cuda compiles it")
    text = course_kernels.NUMBA.read_text("utf-8")
    assert right in text
    (file := tmp_path / "mine.py").write_text(text.replace(right, wrong), "utf-8")
    monkeypatch.setattr(course_kernels, "NUMBA", file)
    (work,) = (one for one in first_works() if one.name == "X·Xᵀ, 24 × 30, in numba.cuda")
    with pytest.raises(ConfigError, match=said):
        course_kernels.count(work)


def test_where_numba_cuda_is_missing_a_line_names_it(monkeypatch, capsys):
    monkeypatch.setattr(course_kernels, "find_spec", lambda name: None)
    assert not [work for work in first_works() if work.by_numba]
    assert "left out: course_kernels_numba.py. numba-cuda compiles" in capsys.readouterr().out


def test_a_bound_below_that_of_a_faster_way_has_its_reason():
    names = "by", "at_least_µs", "about_µs", "reuse", "sectors", "unit", "programs"
    naive, tiled, mine = (
        dict(zip(names, row, strict=True))
        for row in (
            ("naive", 1.0, 300.0, 0.996, 5000, "floating point", 64),
            ("tiled", 50.0, 75.0, 0.5, 40, "shared memory", 16),
            ("mine", 60.0, 310.0, 0.5, 40, "memory", 1),
        )
    )
    assert list(course_kernels.low_bounds([tiled, mine, naive])) == [
        "naive: at least 1.00 µs is less than tiled's 50.00 µs, because the bound lets caches"
        " serve 100% of 5,000 sectors in no time, and floating point alone counts. The bound "
        "of tiled, which takes 40 sectors, is by the shared memory of 16 blocks, which it "
        "reads in place of the caches. By the estimate, which counts caches and latency, "
        "tiled is 4 times as fast"
    ]
    assert list(course_kernels.low_bounds([naive, mine])) == []  # in one order by both


def test_the_kernels_of_each_unit_are_named_together():
    pairs = [("naive", "memory"), ("tiled", "shared memory"), ("mine", "memory")]
    assert by_unit(pairs) == "by memory: naive, mine; by shared memory: tiled"


def test_a_wrong_way_is_refused():
    wrong = products(mine=lambda a, b: (a @ b.T).sub_(1e-3))
    with pytest.raises(ConfigError, match=r"^A·Bᵀ, 64³ by mine is off by .* of shape "):
        course_kernels.count(wrong)
    maximum, *_ = course_kernels.works(course_kernels.Flags(side=10))
    with pytest.raises(ConfigError, match=r"^maximum, 10 × 10 by mine: \d+ numbers are wrong: \["):
        course_kernels.count(maximum._replace(ways={"mine": torch.minimum}))


@triton.jit
def past_the_end_kernel(a, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(a + BLOCK + i))


def past_the_end(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    out = a @ b.T
    past_the_end_kernel[(1,)](a, out, 64 * 64)
    return out


def not_compiled(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    not_compiled_kernel[(1,)](a, a.shape[0])
    return a


@triton.jit
def not_compiled_kernel(a, n):
    tl.store(a, tl.sum(tl.zeros((n,), tl.float32), 0))


@pytest.mark.parametrize(
    "way, says",
    [
        (
            past_the_end,
            r"^A·Bᵀ, 64³ by mine: (.|\n)*outside of a .*; mend the kernel or its launch$",
        ),
        (
            not_compiled,
            r"^A·Bᵀ, 64³ by mine: Triton cannot(.|\n)*Shape element 0 must.*; mend",
        ),
        (lambda a, b: None, r"^A·Bᵀ, 64³ by mine is NoneType, expected a tensor; return the"),
        (lambda a, b: a @ b.T, r"^A·Bᵀ, 64³ by mine: no kernel loads a number; compute it"),
    ],
)
def test_a_way_that_is_no_right_kernel_is_named_with_its_fault(way, says):
    with pytest.raises(ConfigError, match=says):
        course_kernels.count(products(mine=way))


@pytest.mark.slow
def test_the_kernels_are_counted_and_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="--plots draws with it")
    flags = ["--device=cpu", "--size=128", "--rows=40", "--columns=50", "--side=100"]
    files = [f"--metrics={tmp_path / 'metrics'}", f"--plots={tmp_path / 'plots'}"]
    code, out, err = lesson("course_kernels", *flags, *files)
    assert (code, err) == (0, "")
    assert "an H100 needs 20 operations per byte" in out
    assert out.count(course_kernels.RIGHT) == out.count(course_kernels.MEANING) == 1
    assert out.endswith("left out: times, as PyTorch finds no GPU or --device is cpu\n")
    rows = {(row["work"], row["by"]): row for row in rows_of(tmp_path / "metrics")}
    has_nvrtc = bool(find_spec("cuda") and find_spec("cuda.bindings"))
    of_cuda = [by for work, by in rows if work == "A·Bᵀ, 128³, in CUDA C++"]
    assert of_cuda == (["naive", "blocked", "padded"] if has_nvrtc else [])
    of_numba = [by for work, by in rows if work.endswith("in numba.cuda")]
    assert of_numba == (["by rows", "one block"] if find_spec("numba_cuda") else [])
    assert len(rows) == 8 + len(of_cuda) + len(of_numba)
    # Two matrices are read and one is written, each number once: 3 · 100² / 8 sectors.
    for by in ("by rows", "torchpar"):
        assert rows["maximum, 100 × 100", by]["sectors"] >= 3750
        assert rows["maximum, 100 × 100", by]["intensity"] == 0
    assert rows["X·Xᵀ, 40 × 50", "one block"]["programs"] == 1
    assert (tmp_path / "plots" / "roofline.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_missing_is_refused_before_anything_is_counted(monkeypatch):
    counted = []
    monkeypatch.setattr(course_kernels, "count", lambda work: counted.append(work) or [])
    with pytest.raises(ConfigError, match="device is cuda, but PyTorch finds no GPU"):
        course_kernels.main(course_kernels.Flags(device="cuda"))
    assert counted == []
