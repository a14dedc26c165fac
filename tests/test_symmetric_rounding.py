# SPDX-License-Identifier: MIT
"""float32 symmetric products on the CPU: oneDNN in chains, and PyTorch's BLAS library."""

import pytest
import torch
from samples import assert_accurate, error, normal, oracle, to_numpy
from test_symmetric_matmul import contract, op, operands

from torchpar.ops import _cpu, _onednn


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the chains that oneDNN computes during a test, on any processor."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("oneDNN is not in this build of PyTorch")
    lengths: list[int] = []
    chain = _cpu.onednn
    monkeypatch.setattr(_onednn, "has_onednn", lambda: True)
    monkeypatch.setattr(_cpu, "onednn", lambda a, *rest: lengths.append(a.shape[1]) or chain(a, *rest))
    return lengths


# PyTorch's own context manager warns of a flag that it does not change (2.15).
@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")
@pytest.mark.parametrize("shape", [(385, 1), (600, 300)], ids=str)
def test_either_library_of_the_cpu_is_right(shape: tuple[int, ...], onednn: list[int]) -> None:
    a, b, c = operands(*shape, make=normal, dtype=torch.float32)
    for enabled in (True, False):
        with torch.backends.mkldnn.flags(enabled=enabled):
            contract(a, b)
            contract(a, a, c, alpha=-2.5, beta=1 / 3)
            actual = torch.ops.torchpar.matmul_t_backward(c.tril(), a)
        total = c.tril() + c.tril().mT
        assert_accurate(actual, total @ a, to_numpy(total) @ to_numpy(a), roundings=3)
        assert (max(onednn, default=0) > 0) == enabled
        assert max(onednn, default=0) <= 256
        onednn.clear()


def test_only_large_float32_matrices_go_to_onednn(onednn: list[int]) -> None:
    for n, dtype in ((383, torch.float32), (400, torch.float64), (400, torch.bfloat16)):
        op(*operands(n, 3, dtype=dtype), beta=1)
    assert onednn == []
    op(*operands(400, 0, dtype=torch.float32), beta=1)
    assert onednn == []
    op(*operands(400, 3, dtype=torch.float32), beta=1)
    assert onednn != []


@pytest.mark.skipif(
    not _onednn.has_onednn(),
    reason="float32 goes to oneDNN on AMD processors with AVX-512, for which chains were cut",
)
def test_chains_keep_pytorchs_accuracy_and_one_chain_would_lose_it(onednn: list[int], monkeypatch) -> None:
    for k in (200, 2000):
        x = normal(384, k, dtype=torch.float32)
        expected = oracle("matmul_t", (x,))
        in_chains = error(op(x, x), expected)
        assert_accurate(op(x, x), x @ x.mT, expected)
    assert sum(onednn) == 2 * 2 * (200 + 2000)  # two calls, of two blocks of rows
    # Beside chains, not beside PyTorch: how MKL sums depends on the processor.
    monkeypatch.setattr(_cpu, "_CHAIN", 2000)
    assert error(op(x, x), expected) > 1.5 * in_chains
