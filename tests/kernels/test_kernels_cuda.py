# SPDX-License-Identifier: MIT
"""Kernels of products on a GPU, at sizes and with tiles that go by TMA where there is one.

The operators' tests are of small shapes, which take pointers.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import run
from samples import widest_arguments
from torch import Tensor
from torch.testing import assert_close

import torchpar
from benchmarks.records import OPERATORS

pytest.importorskip("triton", reason="the kernels are written in Triton")
import kernel_cases as cases

from torchpar.kernels import exact_matmul, launch
from torchpar.kernels.rule import KINDS, Tiles
from torchpar.kernels.tiles import library_is_faster

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="the kernels take a GPU; there is none"
)


@pytest.fixture
def poison() -> Iterator[None]:
    """Fill new tensors with NaN, or with the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check(case: cases.Case, device: str = "cuda") -> None:
    """Compare the results of three launches, of which the last two have the plan of the first."""
    expected, first = case.expected(), None
    for _ in range(3):
        found = [t.cpu() for t in case.launch(None, [t.to(device) for t in case.draw()])]
        assert case.agrees(found, expected)
        first = first or found
        assert cases.same_bits(found, first), "two runs differ"


def fitting(kind: str, tiles: Tiles) -> tuple[torch.dtype, str, Tiles]:
    """The dtype, the precision of its products, and tiles that fit; skip if this GPU lacks their
    variant."""
    if tiles.by_tma and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the GPU has no TMA")
    tiles = tiles._replace(block_k=tiles.block_k // 2, num_stages=3) if kind == "tf32" else tiles
    return *KINDS[kind][:2], tiles


POINTERS, WIDE = Tiles(128, 128, 64, 8, 3), Tiles(128, 256, 64, 8, 4, "tma")
SMALL, SPLIT = Tiles(64, 128, 64, 4, 4, "tma"), Tiles(64, 64, 64, 4, 4, "split_k")


# Partial tiles everywhere, whose rows begin on 16 bytes
@pytest.mark.parametrize(
    "tiles", [POINTERS, Tiles(128, 128, 64, 8, 4, "tma"), WIDE, SMALL], ids=str
)
@pytest.mark.parametrize("transposed", ["", "ab", "bc"])
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "tf32"])
def test_symmetric_matmul(poison: None, kind: str, transposed: str, tiles: Tiles) -> None:
    options = {"batch": (2,), "transposed": transposed, "other": True, "c": True}
    check(cases.symmetric(1040, 272, *fitting(kind, tiles), **options))


@pytest.mark.parametrize("tiles", [POINTERS, SPLIT, WIDE, SMALL], ids=str)
@pytest.mark.parametrize("transposed", ["", "xw"])
@pytest.mark.parametrize("m, n, k", [(1040, 1040, 272), (8, 1001, 2000), (64, 2056, 784)])
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "tf32"])
def test_linear_sigmoid(
    poison: None, kind: str, m: int, n: int, k: int, transposed: str, tiles: Tiles
) -> None:
    if transposed and n % 8:
        pytest.skip("no row of this weight, transposed, begins at 16 bytes")
    check(cases.sigmoid(m, n, k, *fitting(kind, tiles), transposed=transposed))


@pytest.mark.parametrize(
    "layouts", [("contiguous",) * 2, ("transposed", "contiguous"), ("transposed",) * 2]
)
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(
    "m, n, k",
    [(2064, 1040, 272), (129, 127, 129), (2064, 1001, 272), (65, 33, exact_matmul.CHAIN + 17)],
)
def test_exact_product(
    poison: None, m: int, n: int, k: int, special: bool, layouts: tuple[str, str]
) -> None:
    """The CPU's bits, by large tiles and by small ones; of A·Bᵀ and A·Aᵀ, finite or not."""
    dtypes = [torch.float32] if special else [torch.int64, torch.float32]
    for shapes in (((m, k), (n, k)), ((m, k),)):
        check(cases.exact(*shapes, dtypes=dtypes, layouts=layouts, special=special))


@pytest.fixture
def rule(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the rule say who computes. The other tests launch the kernels at any size
    (`conftest`)."""
    monkeypatch.setattr("torchpar.kernels.tiles.library_is_faster", library_is_faster)
    launch.forget_launches()
    yield
    launch.forget_launches()


@pytest.mark.parametrize("k", [0, 1, 128])
@pytest.mark.parametrize("n", [0, 1, 127, 129, 1024])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_where_the_library_computes_the_result_is_right(
    rule: None, dtype: torch.dtype, n: int, k: int
) -> None:
    x = torch.randint(-3, 4, (2, n, k), device="cuda").to(dtype)  # all sums are exact
    found = torchpar.matmul_t(x)
    assert torch.equal(found, found.mT)
    assert torch.equal(found, (x.double() @ x.double().mT).to(dtype))
    weight = torch.ones(48, k, device="cuda", dtype=dtype)
    y = torchpar.linear_sigmoid(x, weight)
    assert_close(y, (x.double() @ weight.double().T).sigmoid().to(dtype))


def test_a_large_float32_layer_is_the_librarys(rule: None) -> None:
    x, weight = (torch.randint(-3, 4, (rows, 784), device="cuda").float() for rows in (8192, 512))
    y = torchpar.linear_sigmoid(x, weight / 64)
    assert list(launch._launches.values()) == [None], "a kernel was launched"
    assert_close(y, (x.double() @ weight.double().T / 64).sigmoid().float())


AUTOTUNED = """
import torch, torchpar
from torchpar.kernels import launch
from torchpar.kernels.autotune import AutotunedPlan

x, weight = (torch.randint(-3, 4, (1040, 272), device="cuda").bfloat16() for _ in range(2))
for _ in range(3):  # the first call times the configurations
    assert torch.equal(torchpar.matmul_t(x), (x.double() @ x.double().T).bfloat16())
    expected = (x.double() @ weight.double().T / 64).sigmoid().bfloat16()
    torch.testing.assert_close(torchpar.linear_sigmoid(x, weight / 64), expected)
for one in launch._launches.values():
    ((plan, _),) = one.steps
    assert isinstance(plan, AutotunedPlan), plan
    print(plan.kernel.base_fn.__name__, plan.kernel.best_config)
"""


def test_the_autotuner_measures_and_the_results_are_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHPAR_AUTOTUNE", "1")  # which the kernels read when they are imported
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for _ in range(2):  # the second process finds the times on disk
        status, out, error = run(sys.executable, "-c", AUTOTUNED)
        assert status == 0, error
        first, second = out.splitlines()
        assert first.startswith("symmetric_matmul_")
        assert second.startswith("linear_sigmoid_")
    assert list(tmp_path.rglob("*.autotune.json")), "nothing was kept"


def test_a_product_by_tma_is_captured_and_compiled() -> None:
    x = torch.randn(1024, 1024, device="cuda", dtype=torch.bfloat16)
    expected = torchpar.matmul_t(x)  # compiles the kernel before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torchpar.matmul_t(x)
    graph.replay()
    assert_close(captured, expected, rtol=0, atol=0)
    compiled = torch.compile(torchpar.matmul_t, fullgraph=True, dynamic=True)
    assert_close(compiled(x), expected, rtol=0, atol=0)
    assert_close(compiled(x[:768]), expected[:768, :768], rtol=0, atol=0)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_forward_and_a_backward_in_a_cuda_graph(name: str) -> None:
    operator = OPERATORS[name]
    made = operator.operands(*widest_arguments(name, operator.small[0], "cuda"))
    args = [t.detach().requires_grad_() for t in made]

    def step() -> tuple[Tensor, ...]:
        y = operator.function(*args, **operator.factors(len(args)))
        return y.detach(), *torch.autograd.grad(y, args, torch.ones_like(y))

    step()  # compiles the kernels before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for t in args:
            t.mul_(2)  # a replay reads them anew
    graph.replay()
    assert_close(captured, step())
