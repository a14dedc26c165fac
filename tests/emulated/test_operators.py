# SPDX-License-Identifier: MIT
"""Within `emulate`, operators on CPU tensors run their kernels for a GPU, forward and backward.

Ours do, and those that others define by PyTorch's ways to do so.
"""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import torchpar
import torchpar.library
from nogpu import emulate

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
slow = pytest.mark.slow


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def exact(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() @ b.double().mT).float()


OURS = {
    "maximum": (torchpar.maximum, torch.maximum, (normal(5, 70), normal(70))),
    "matmul_t": (torchpar.matmul_t, lambda x: x @ x.mT, (normal(70, 40),)),
    "matmul_t of halves": (
        torchpar.matmul_t,
        lambda x: x @ x.mT,
        (normal(128, 64, dtype=torch.bfloat16),),
    ),
    "symmetric_matmul": (
        lambda a: torchpar.symmetric_matmul(a, a, alpha=0.5),
        lambda a: 0.5 * (a @ a.mT),
        (normal(70, 40),),
    ),
    "linear_sigmoid": (
        torchpar.linear_sigmoid,
        lambda x, w, b: torch.nn.functional.linear(x, w, b).sigmoid(),
        (normal(33, 40), normal(17, 40), normal(17)),
    ),
    "exact_matmul": (torchpar.exact_matmul, exact, (normal(33, 40), normal(20, 40))),
}
# What is launched, forward and backward.
KERNELS = {
    "maximum": {"maximum_strided_kernel", "maximum_backward_sums_kernel"},
}


def test_a_product_of_float32_has_the_bits_of_one_chain():
    """A library that adds a sum in parts may have less than half of its error: see
    `assert_accurate` of the tests."""
    x = normal(70, 300)
    chain = torch.zeros(70, 70)
    for column in x.double().mT:  # the product of two float32 is exact in float64
        chain = (chain + column[:, None] * column[None, :]).float()
    with emulate("sm_90"):
        assert torch.equal(torchpar.matmul_t(x), chain)


@pytest.mark.parametrize(
    "name, arch",
    [
        # The exact product takes longest to compile; tests/kernels/test_ptx.py executes it.
        pytest.param(name, arch, marks=[slow] * (arch != "sm_90" or name == "exact_matmul"))
        for arch in ARCHITECTURES
        for name in OURS
    ],
)
def test_our_operators_run_their_kernels(name, arch):
    op, reference, operands = OURS[name]
    mine, theirs = ([t.clone().requires_grad_() for t in operands] for _ in range(2))
    with emulate(arch) as gpu:
        found = op(*mine)
        assert gpu.launches
        forward = len(gpu.launches)
        found.sum().backward()
        assert len(gpu.launches) > forward or name == "symmetric_matmul"
    expected = reference(*theirs)
    expected.sum().backward()
    error = 0.05 if found.dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(found, expected, rtol=error, atol=error)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=error, atol=10 * error)
    assert gpu.report().errors == []
    assert not torchpar.ops._operator.is_emulating()


@triton.jit
def double_kernel(x, out, n, factor, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, factor * tl.load(x + at, at < n), at < n)


def by_kernel(x: Tensor, factor: float) -> Tensor:
    out = torch.empty_like(x)
    double_kernel[(triton.cdiv(x.numel(), 64),)](x, out, x.numel(), factor, BLOCK=64)
    return out


def by_wrapped_kernel(x: Tensor, factor: float) -> Tensor:
    out = torch.empty_like(x)
    kernel = torch.library.wrap_triton(double_kernel)
    kernel[(triton.cdiv(x.numel(), 64),)](x, out, x.numel(), factor, BLOCK=64)
    return out


def with_custom_op():
    @torch.library.custom_op("torchpar_tests::by_custom_op", mutates_args=(), device_types="cpu")
    def op(x: Tensor, factor: float) -> Tensor:
        return factor * x

    op.register_kernel("cuda")(by_kernel)
    return op


def with_triton_op():
    @torch.library.triton_op("torchpar_tests::by_triton_op", mutates_args=())
    def op(x: Tensor, factor: float) -> Tensor:
        return by_wrapped_kernel(x, factor)

    op.register_kernel("cpu")(lambda x, factor: factor * x)
    return op


def with_library():
    library = torch.library.Library("torchpar_tests_2", "DEF")
    library.define("by_library(Tensor x, float factor) -> Tensor")
    library.impl("by_library", lambda x, factor: factor * x, "CPU")
    library.impl("by_library", by_kernel, "CUDA")
    op = torch.ops.torchpar_tests_2.by_library.default
    op.library = library  # which must live as long
    return op


def with_our_library():
    @torchpar.library.custom_op(
        "torchpar_tests::by_our_library", mutates_args=(), device_types="cpu"
    )
    def op(x: Tensor, factor: float) -> Tensor:
        return factor * x

    op.register_kernel("cuda", by_kernel)
    return op


@pytest.mark.parametrize("make", [with_custom_op, with_triton_op, with_library, with_our_library])
def test_others_operators_run_their_kernels(make):
    """The memory that a kernel's function takes from torch.empty is followed, too."""
    op = make()
    with emulate() as gpu:
        found = op(torch.ones(100), 3.0)
    assert found.tolist() == [3.0] * 100
    assert [launch.kernel for launch in gpu.launches] == ["double_kernel"]
    assert gpu.faults == []
    assert op(torch.ones(100), 3.0).tolist() == [3.0] * 100
    assert len(gpu.launches) == 1


def test_kernels_of_operators_are_followed_into_their_memory():
    @torch.library.custom_op("torchpar_tests::reads_too_much", mutates_args=(), device_types="cuda")
    def op(x: Tensor) -> Tensor:
        return by_kernel(torch.empty(100), 2.0)

    with emulate() as gpu:
        op(torch.ones(1))
    assert {fault.name for fault in gpu.faults} == {"uninitialised memory"}


def test_kernels_in_c_plus_plus_stay_on_their_device():
    torchvision = pytest.importorskip("torchvision")
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.9]])
    with emulate() as gpu:
        kept = torchvision.ops.nms(boxes, torch.tensor([1.0, 0.5]), 0.5)
    assert kept.tolist() == [0]
    assert gpu.launches == []


def test_both_houses_have_the_same_facts_of_gpus():
    from nogpu import DATA_SHEETS
    from torchpar.kernels.device import GPUS

    found = {name: (one.capability, one.multiprocessors) for name, one in GPUS.items()}
    assert found == {
        name: (one.capability, one.multiprocessors) for name, one in DATA_SHEETS.items()
    }
