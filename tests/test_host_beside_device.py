# SPDX-License-Identifier: MIT
"""Operators and Muon on tensors of the host, in a script whose "cuda" is the CPU."""

import pytest
import torch
from torch import nn

import torchpar

nogpu = pytest.importorskip("nogpu", reason="nogpu executes the kernels")


def run(device: str) -> list[torch.Tensor]:
    """The gradients of all operators, and weights after steps of Muon, on the CPU."""
    torch.manual_seed(0)
    x, w, b = (torch.randn(*size).to(device).requires_grad_() for size in ((9, 7), (5, 7), (5,)))
    ops = torch.ops.torchpar
    y = ops.linear_sigmoid(x, w, b)
    results = ops.maximum(y, b), ops.matmul_t(x), ops.exact_matmul(x, w)
    symmetric = ops.symmetric_matmul(x, x, None)
    sum(one.sum() for one in (*results, symmetric)).backward()
    with torchpar.exact.mode():
        (x @ w.mT).sum().backward()
    matrices = [nn.Parameter(t.detach().clone()) for t in (x, x, w)]
    optimizer = torchpar.optim.Muon(matrices)
    for matrix, like in zip(matrices, (x, x, w), strict=True):
        matrix.grad = like.grad.clone()
    optimizer.step()
    return [t.detach().cpu() for t in (x.grad, w.grad, b.grad, *matrices)]


def test_tensors_of_the_host_take_the_path_for_cpus():
    expected = run("cpu")
    with nogpu.emulate("sm_90") as gpu, nogpu.cuda_is_cpu(gpu):
        for a, e in zip(run("cpu"), expected, strict=True):
            assert torch.equal(a, e)
        assert not gpu.launches
        for a, e in zip(run("cuda"), expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-2, atol=1e-2)
        assert gpu.launches


def test_library_asks_for_its_tensors():
    x = torch.ones(2)
    assert not nogpu.is_emulating(x)
    with nogpu.emulate("sm_90"):
        assert nogpu.is_emulating()
        assert nogpu.is_emulating(x)
    with nogpu.emulate("sm_90") as gpu, nogpu.cuda_is_cpu(gpu):
        host, device = torch.ones(2), torch.ones(2, device="cuda")
        assert nogpu.is_emulating()
        assert nogpu.is_emulating(device)
        assert not nogpu.is_emulating(host)
        assert not nogpu.is_emulating(device, host)
