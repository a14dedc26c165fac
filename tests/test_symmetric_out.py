# SPDX-License-Identifier: MIT
"""`symmetric_matmul` with ``out``: products added to a matrix in place, also to float32 from bfloat16."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from operators import FLOATS
from samples import assert_symmetric, normal
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import torchpar
from torchpar.ops import symmetric_cpu

PAIRS = [(dtype, dtype) for dtype in FLOATS]
PAIRS += [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)]


def operands(shape: tuple[int, ...], dtype: torch.dtype, out: torch.dtype, device: str) -> list[Tensor]:
    x = normal(*shape, dtype=dtype, device=device)
    h = normal(*shape[:-1], shape[-2], dtype=out, device=device, seed=1)
    return [x, h.tril() + h.tril(-1).mT]


@pytest.mark.parametrize("shape", [(5, 3), (700, 30), (2, 300, 20), (0, 4), (4, 0)], ids=str)
@pytest.mark.parametrize("dtype, out", PAIRS, ids=str)
def test_the_error_is_at_most_twice_torchs(shape, dtype, out, device):
    for alpha, beta in ((1.0, 1.0), (-0.5, 2.0), (2.0, 0.0), (0.0, 0.5), (0.0, 0.0)):
        x, h = operands(shape, dtype, out, device)
        exact = beta * h.double() + alpha * x.double() @ x.double().mT
        theirs = (beta * h + alpha * (x.to(out) @ x.to(out).mT)).double()
        pointer = h.data_ptr()
        assert torchpar.symmetric_matmul(x, x, h, alpha=alpha, beta=beta, out=h) is h
        assert h.data_ptr() == pointer
        assert_symmetric(h)
        if h.numel():
            terms = abs(beta) * h.double().abs() + abs(alpha) * x.double().abs() @ x.double().abs().mT
            own = (x.shape[-1] + 2) * torch.finfo(torch.float64).eps * terms.max()  # of the sums in float64
            rounding = torch.finfo(out).eps * exact.abs().max() + own
            assert (h.double() - exact).abs().max() <= 2 * (theirs - exact).abs().max() + rounding


def test_other_arguments(device):
    """Two factors, a c that is not out, no c, NaN in an out that is not read, and other strides."""
    a = normal(300, 40, dtype=torch.float32, device=device)
    b = a * 2
    c = torch.eye(300, device=device)
    expected = torchpar.symmetric_matmul(a, b, c, alpha=3.0, beta=2.0)
    for out in (torch.empty_like(c), torch.full_like(c, torch.nan), torch.full_like(c, torch.nan).mT):
        torchpar.symmetric_matmul(a, b, c, alpha=3.0, beta=2.0, out=out)
        torch.testing.assert_close(out, expected)
        torchpar.symmetric_matmul(a, b, alpha=3.0, out=out.fill_(torch.nan))
        torch.testing.assert_close(out, expected - 2 * c)
    wide = torch.zeros(300, 600, device=device)
    torchpar.symmetric_matmul(a, b, out=wide[:, ::2])
    torch.testing.assert_close(wide[:, ::2], 2 * a @ a.mT)
    assert not wide[:, 1::2].any()
    with pytest.raises(RuntimeError, match=r"a @ b\.mT is not symmetric"):
        torchpar.symmetric_matmul(a, b.flip(0), check=True, out=c)


def test_only_the_lower_triangle_is_read(device):
    x, h = operands((300, 20), torch.float32, torch.float32, device)
    expected = torchpar.symmetric_matmul(x, x, h, beta=1.0)
    torchpar.symmetric_matmul(x, x, h.tril().add_(torch.full_like(h, 1e9).triu(1)), beta=1.0, out=h)
    torch.testing.assert_close(h, expected, rtol=0, atol=0)


class Sizes(TorchDispatchMode):
    """The number of elements of the largest tensor that is made meanwhile."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for t in (*args, *(kwargs or {}).values()) if isinstance(t, Tensor)]
        known = {t.untyped_storage().data_ptr() for t in given}
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in known:
            self.largest = max(self.largest, made.untyped_storage().nbytes() // made.itemsize)
        return made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_matrix_of_the_results_size_is_made(dtype):
    n = 2048
    x, h = operands((n, 8), dtype, torch.float32, "cpu")
    with Sizes() as sizes:
        symmetric_cpu.symmetric_product(x, x, h, 1.0, 1.0, h)
    assert 0 < sizes.largest <= n * n / 4
    with Sizes() as sizes:
        h.copy_(h + x.float() @ x.float().mT)
    assert sizes.largest == n * n


def test_gradients_are_refused(device):
    x, h = operands((4, 3), torch.float32, torch.float32, device)
    for a, out in ((x.clone().requires_grad_(), h), (x, h.clone().requires_grad_())):
        with pytest.raises(RuntimeError, match="don't support automatic differentiation, but one of the arg"):
            torchpar.symmetric_matmul(a, a, out, beta=1.0, out=out)
        with torch.no_grad():
            torchpar.symmetric_matmul(a, a, out, beta=1.0, out=out)
    square = (h.clone().requires_grad_() * h).sum()
    torchpar.symmetric_matmul(x, x, h, beta=1.0, out=h)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


def test_an_out_that_does_not_fit_is_refused():
    x = torch.ones(4, 3, dtype=torch.bfloat16)
    out = torch.zeros(4, 4)
    for wrong, text in (
        (out.double(), r"out is \(4, 4\), torch\.float64 on cpu, expected \(4, 4\)"),
        (out[:3, :3], r"out is \(3, 3\), torch\.float32 on cpu, expected \(4, 4\), torch\.bfloat16 or"),
        (torch.zeros(1, 4).expand(4, 4), "elements of out share memory"),
    ):
        with pytest.raises(RuntimeError, match=text):
            torchpar.symmetric_matmul(x, x, out=wrong)
    with pytest.raises(RuntimeError, match="c is given without beta, pass both"):
        torchpar.symmetric_matmul(x, x, out, out=out)
    for c in (torch.ones(()), torch.ones(4, 4, dtype=torch.int64)):
        with pytest.raises(RuntimeError, match="expected"):
            torchpar.symmetric_matmul(x, x, c, beta=1.0, out=out)
    for transform, text in (
        (torch.func.grad, "don't support automatic differentiation"),
        (lambda f: lambda x: torch.func.jvp(f, (x,), (x,)), r"no torch\.func, no forward mode"),
    ):
        with pytest.raises(RuntimeError, match=text):
            transform(lambda x: torchpar.symmetric_matmul(x, x, out=out).sum())(torch.ones(4, 3))
    with pytest.raises(RuntimeError, match="out shares its storage with a or b"):
        torchpar.symmetric_matmul(out, out, out=out)
    assert not out.any()


def test_the_documented_covariance_is_torchs():
    text = (Path(__file__).parents[1] / "docs" / "symmetric_matmul.md").read_text()
    (block,) = re.findall(r"```python\n(def covariance.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {"torch": torch, "torchpar": torchpar}
    exec(block, names)
    batches = [normal(70, 300, dtype=torch.float32, seed=seed) + 3 for seed in range(5)]
    expected = torch.cov(torch.cat(batches).double().T)
    theirs = (torch.cov(torch.cat(batches).T).double() - expected).abs().max()
    assert (names["covariance"](batches).double() - expected).abs().max() <= 10 * theirs


def test_it_compiles_and_keeps_pytorchs_rules(device):
    def update(h: Tensor, x: Tensor) -> Tensor:
        torchpar.symmetric_matmul(x, x, h, alpha=0.5, beta=0.9, out=h)
        return h.diagonal().sum()

    for n in (5, 300):
        x, h = operands((n, 3), torch.bfloat16, torch.float32, device)
        opcheck(torch.ops.torchpar.symmetric_addmm_.default, (h, x, x), {"alpha": 0.5, "beta": 2.0})
        eager = h.clone()
        expected = update(eager, x)
        found = torch.compile(update, fullgraph=True, backend="aot_eager")(h, x)
        torch.testing.assert_close((found, h), (expected, eager), rtol=0, atol=0)
