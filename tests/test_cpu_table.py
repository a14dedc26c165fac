# SPDX-License-Identifier: MIT
"""Products of CPUs: each way to them, the table that chooses one, and its measurement."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import torchpar
from torchpar import doctor
from torchpar.kernels import folders
from torchpar.ops import cpu_table, processor, symmetric_cpu
from torchpar.ops.cpu_table import Choice
from torchpar.optim import orthogonalize
from torchpar.tune import command, cpu

LOAD = cpu_table.load
WAYS = [Choice(library, rows, 1.0) for library in ("blas", "onednn") for rows in (0, 64, 128, 500)]


def take(monkeypatch: pytest.MonkeyPatch, way: Choice) -> None:
    monkeypatch.setattr(symmetric_cpu, "choice", lambda *_: way)
    cpu_table.forget()  # what was derived from another choice


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_each_way_is_right(way: Choice, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, way)
    monkeypatch.setattr(processor, "has_onednn", torch.backends.mkldnn.is_available)
    for shape in ((128, 1), (129, 7), (257, 300), (515, 64), (1100, 3), (2, 130, 9)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        found = torchpar.matmul_t(x)
        for one, own in zip(found.view(-1, *found.shape[-2:]), x.view(-1, *shape[-2:]), strict=True):
            cpu.check(one, cpu.x_xt(own), way)
        h = found.clone()
        expected = h.double() + 2 * x.double() @ x.double().mT
        torchpar.symmetric_matmul(x, x, h, alpha=2.0, beta=1.0, out=h)
        # Each sum of float32 and float64 rounds at most once for a term; those of bfloat16 are of float32.
        roundings = shape[-1] + 2 if dtype != torch.bfloat16 else 4
        assert (h.double() - expected).abs().max() <= roundings * torch.finfo(
            dtype
        ).eps * expected.abs().max()
        assert torch.equal(h, h.mT)


def test_the_check_rejects_wrong_products() -> None:
    x, way = torch.randn(300, 20), WAYS[1]
    product = x @ x.T
    for wrong in (product * 1.001, product.tril()):
        with pytest.raises(ValueError, match=r"an error of .*, over"):
            cpu.check(wrong, cpu.x_xt(x), way)
    product[0, 1] = product[1, 0].nextafter(torch.tensor(torch.inf))
    with pytest.raises(ValueError, match="is not symmetric"):
        cpu.check(product, cpu.x_xt(x), way)


def table(**changes: Any) -> dict[str, Any]:
    entries = [["float32", 1, 1024, 1024, "blas", 128, 1.7], ["float32", 1, 256, 256, "blas", 0, 0.8]]
    header = {"processor": processor.processor_kind(), "torch": "2.15.0", "date": "2026-11-23"}
    return header | {"symmetric": entries} | changes


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TORCHPAR_CACHE", str(tmp_path))
    monkeypatch.setattr(folders, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(cpu_table, "load", LOAD)
    cpu_table.forget()
    yield tmp_path / cpu_table.file_name()
    cpu_table.forget()


def test_the_nearest_entry_chooses(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu_table.choice(torch.float32, 300, 300).rows == 0  # without a table
    assert cpu_table.save(table()) == file
    for sizes, rows in (((300, 300), 0), ((600, 2000), 128), ((4000, 100), 128), ((130, 130), 0)):
        assert cpu_table.choice(torch.float32, *sizes).rows == rows
    assert cpu_table.choice(torch.float32, 1000, 1000).gain == 1.7
    assert cpu_table.choice(torch.float64, 300, 300).rows == 0  # not in the table
    assert cpu_table.choice(torch.float32, 2**16, 2**16).rows == 256  # too far from what was measured
    for threads in (1, 2, 3, 64):  # up to an octave away
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert (cpu_table.choice(torch.float32, 1000, 1000).gain == 1.7) == (threads < 3)


def test_sizes_that_no_table_has(file: Path) -> None:
    cpu_table.save(table())
    for shape in ((0, 5), (5, 0), (3, 0, 4), (2, 130, 0)):
        x = torch.zeros(shape)
        assert torchpar.matmul_t(x).shape == (*shape[:-1], shape[-2])
        assert orthogonalize(x).shape == shape
    graph = make_fx(lambda x: orthogonalize(x), tracing_mode="symbolic")(torch.ones(130, 140))
    assert graph(torch.ones(131, 150)).shape == (131, 150)


# Of PyTorch's own flags (2.15).
@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")
def test_onednn_does_not_matter_to_later_calls(file: Path) -> None:
    """Which is off in one of them."""
    cpu_table.save(table(symmetric=[["float32", n, 256, 256, "onednn", 128, 1.5] for n in (1, 2)]))
    x = torch.randn(250, 300)
    expected = torchpar.matmul_t(x)
    with torch.backends.mkldnn.flags(enabled=False):
        torchpar.matmul_t(x)
    assert torch.equal(torchpar.matmul_t(x), expected)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"processor": "other-avx512-amx"}, "the table is of 'other-avx512-amx', expected"),
        ({"symmetric": [["float32", 1, 0, 1, "blas", 0, 1.0]]}, "expected a dtype, threads, n, k"),
        ({"symmetric": [["float32", 1, 1, 1, "mkl", 0, 1.0]]}, "expected a dtype, threads, n, k"),
        ({"symmetric": [["float32", 1, 1, 1, "blas", 0, math.nan]]}, "expected a dtype, threads, n, k"),
        ({"symmetric": [["nothing", 1, 1, 1, "blas", 0, 1.0]]}, "not the layout of a table"),
        ({"symmetric": 3}, "not the layout of a table"),
    ],
)
def test_other_tables_are_refused(file: Path, changes: dict[str, Any], message: str) -> None:
    file.write_text(json.dumps(table(**changes)))
    with pytest.warns(UserWarning, match=message):
        assert cpu_table.choice(torch.float32, 1024, 1024).gain != 1.7
    with pytest.raises(ValueError, match=message):
        cpu_table.save(table(**changes))
    with pytest.warns(UserWarning, match=message):
        (finding,) = [one for one in doctor.processor() if one.name == "measured products"]
    assert finding.state == "note"
    assert finding.remedy == "python -m torchpar tune --device cpu"


def test_tuning_takes_the_fastest_way(file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    ways = [Choice("blas", rows, 1.0) for rows in (0, 32, 64, 128)]
    monkeypatch.setattr(cpu, "SIZES", ((256, 8),))
    monkeypatch.setattr(cpu, "candidates", lambda dtype, n: ways)

    def take_turns(calls: dict[Any, Any], time_call: Any) -> dict[Any, float]:
        cold = time_call == cpu.time_cold
        return dict(zip(calls, [4.0, 9.0, 4.0, 4.0] if cold else [6.0, 4.0, 2.0, 1.99], strict=False))

    monkeypatch.setattr(cpu, "take_turns", take_turns)
    assert command.main(["--device", "cpu"]) == 0
    out = capsys.readouterr().out
    row = "blas by 128 rows 1990 ms, blas by 64 rows 2000 ms, blas by all rows 4000 ms, torch.mm 6000 ms"
    assert f"torch.float32 256x8, threads: 1: {row}" in out.splitlines()
    assert str(file) in out
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    before = json.loads(file.read_text())["symmetric"]
    assert command.main(["--device", "cpu"]) == 0
    both = json.loads(file.read_text())["symmetric"]
    assert [entry for entry in both if entry[1] == 1] == before  # kept, and measured again
    assert {entry[1] for entry in both} == {1, 2}
    # 1.99 is no gain; of 32 rows it loses when cold.
    assert before == [[name, 1, 256, 8, "blas", 64, 3.0] for name in ("float32", "float64", "bfloat16")]


def test_the_doctor_names_the_table(file: Path) -> None:
    for version, state, text in ((torch.__version__, "ok", file.name), ("1.0", "note", "of torch 1.0; ")):
        cpu_table.save(table(torch=version))
        (finding,) = [one for one in doctor.processor() if one.name == "measured products"]
        assert (finding.state, text in finding.value) == (state, True)
        assert finding.remedy == ("python -m torchpar tune --device cpu" if state == "note" else "")


def test_products_of_bfloat16_are_of_float32_where_those_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(130, 40).bfloat16(), torch.randn(30, 40).bfloat16().requires_grad_()
    bias = torch.randn(30).bfloat16()
    for name in ("linear_sigmoid", "symmetric_cpu"):
        monkeypatch.setattr(sys.modules[f"torchpar.ops.{name}"], "has_bfloat16", lambda: False)
    cpu_table.forget()
    wide = x.float()
    assert torch.equal(torchpar.matmul_t(x), symmetric_cpu.symmetric_product(wide, wide).bfloat16())
    cpu_table.forget()
    y = torchpar.linear_sigmoid(x, weight, bias)
    assert torch.equal(y, torch.nn.functional.linear(wide, weight.float(), bias.float()).sigmoid().bfloat16())
    (gradient,) = torch.autograd.grad(y.sum(), weight)
    dz = torch.ops.aten.sigmoid_backward(torch.ones_like(y), y.detach())
    assert torch.equal(gradient, (dz.float().T @ wide).bfloat16())
