# SPDX-License-Identifier: MIT
"""Launches and calls of a step of Muon on a GPU, counted without one; the kernels emulated.

Small matrices stand for large ones: sizes are divided by 48, and so is what the rules compare.
"""

from collections import Counter
from collections.abc import Sequence
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

pytest.importorskip("triton")

from benchmarks.host import gpu_of_cpu_tensors
from torchpar import ptx, reference
from torchpar.kernels import tiles
from torchpar.kernels.launch import Plan
from torchpar.optim import Muon, matrices, newton_schulz, orthogonalize
from torchpar.optim.newton_schulz import _gram_is_faster

N = 16  # for 768
GPT2_SMALL = [(N, N)] * 12 + [(N, 3 * N)] * 12 + [(N, 4 * N)] * 12 + [(4 * N, N)] * 12
# Calls of PyTorch that launch nothing themselves.
VIEWS = {
    "alias",
    "as_strided",
    "detach",
    "diagonal",
    "expand",
    "lift_fresh",
    "mT",
    "numpy_T",
    "permute",
    "select",
    "slice",
    "squeeze",
    "t",
    "transpose",
    "unbind",
    "unsqueeze",
    "view",
    "_unsafe_view",
    "reshape",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "resize_",
    "to",
    "contiguous",
}


@pytest.fixture
def scaled(monkeypatch):
    monkeypatch.setattr(matrices, "_PADDED_UP_TO", 0)
    monkeypatch.setattr(newton_schulz, "_GRAM_ROWS", N)
    scale = (N / 768) ** 3
    multiplications = int(newton_schulz._GRAM_MULTIPLICATIONS * scale)
    monkeypatch.setattr(newton_schulz, "_GRAM_MULTIPLICATIONS", multiplications)


def by_kernels(do: bool) -> object:
    return patch.object(tiles, "library_is_faster", lambda *args, **kwargs: not do)


def count(shapes: Sequence[tuple[int, int]], kernels: bool, lr: float | Tensor = 0.1) -> Counter:
    """The launches of our kernels, and the calls of PyTorch that launch some, in a step."""
    params = [torch.randn(shape).requires_grad_() for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    calls: Counter[str] = Counter()
    launch = Plan.launch

    def counted(plan: Plan, *args: object) -> None:
        calls[plan.kernel.__name__] += 1
        launch(plan, *args)

    with gpu_of_cpu_tensors(), by_kernels(kernels):
        optimizer = Muon(params, lr)
        optimizer.step()  # makes momenta
        activities = [ProfilerActivity.CPU]
        with (
            patch.object(Plan, "launch", counted),
            profile(activities=activities, acc_events=True) as profiled,
        ):
            optimizer.step()
    for event in profiled.events():
        name = event.name.removeprefix("aten::")
        if name != event.name and name not in VIEWS and not is_inner(event):
            calls[name] += 1
    return calls


def is_inner(event) -> bool:  # a type of PyTorch's that is not public
    """Whether a call of PyTorch that launches something makes this one."""
    outer = event.cpu_parent
    while outer is not None:
        name = outer.name.removeprefix("aten::")
        if name != outer.name and name not in VIEWS:
            return True
        outer = outer.cpu_parent
    return False


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_gpt2_small_is_few_launches(scaled, kernels, lr):
    """48 matrices are 3 batches."""
    calls = count(GPT2_SMALL, kernels, lr)
    assert calls.total() <= 90, calls
    # 768 × 768 by the standard iteration, whose five iterations have two symmetric products each.
    # The two other batches iterate on two Gram matrices, two and three times.
    symmetric, others = 5 * 2 + 2 * 16, 5 * 1 + 2 * 2
    assert calls["symmetric_matmul_kernel"] == symmetric * kernels, calls
    of_library = calls["baddbmm"] + calls["matmul"]
    assert of_library == others + symmetric * (not kernels), calls


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("shape", [(N, N), (N, 4 * N), (4 * N, N)])
def test_a_single_matrix_is_few_launches(scaled, kernels, shape):
    calls = count([shape], kernels)
    # Three products in each of five iterations. Beside them: the momentum, Nesterov's, bfloat16,
    # three for the norm, the decay, and the update: float32, the rate, the difference.
    assert calls.total() == 5 * 3 + 10, calls
    assert calls["symmetric_matmul_kernel"] == 10 * kernels, calls


def test_matrices_that_lie_side_by_side_are_not_copied():
    """Those of stacked experts, in bfloat16."""
    torch.manual_seed(0)
    stacked = torch.randn(6, 300, 400).bfloat16()
    arguments = newton_schulz.COEFFICIENTS, 5, 1e-7, "standard"
    for x, copies in ((stacked, 0), (stacked.mT, 1)):
        with patch.object(torch, "_foreach_copy_", wraps=torch._foreach_copy_) as copied:
            found = matrices.orthogonalize_all(list(x), *arguments)
        assert copied.call_count == copies * (-(-6 // matrices._batch_size((300, 400), False)))
        expected = [orthogonalize(one, ns="standard") for one in x]
        for one, other in zip(found, expected, strict=True):
            # Five iterations of three products round to bfloat16.
            assert (one - other).norm() <= 15 * 2**-9 * other.float().norm()
    odd = [stacked[0], stacked[2], stacked[1]]
    for one, other in zip(matrices.orthogonalize_all(odd, *arguments), odd, strict=True):
        other = orthogonalize(other, ns="standard")
        assert (one - other).norm() <= 15 * 2**-9 * other.float().norm()


@pytest.mark.parametrize("ns", ["standard", "gram"])
@pytest.mark.parametrize("shape", [(40, 96), (2, 96, 40), (33, 45)])
def test_the_kernels_orthogonalise(shape, ns):
    """Executed on an emulated H100, from buffers that are written again."""
    torch.manual_seed(0)
    x = torch.randn(shape)
    with ptx.emulate() as gpu, by_kernels(True):
        found = orthogonalize(x, ns=ns)
    assert not gpu.faults
    expected = 10 if ns == "standard" else 12 if shape == (33, 45) else 16
    assert len(gpu.launches) == expected, gpu.launches
    by_library = orthogonalize(x, ns=ns)
    ideal = reference.orthogonalize(x.double())
    error, allowed = ((t.double() - ideal).norm() for t in (found, by_library))
    assert error <= 2 * allowed


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (3, 0, 4), (0, 3, 4)])
def test_no_kernel_is_launched_for_nothing(shape):
    with ptx.emulate() as gpu, by_kernels(True):
        assert orthogonalize(torch.ones(shape)).shape == shape
    assert not gpu.launches


def test_the_choice_is_what_was_measured():
    """On an H200: Gram iterations where a step from Python was faster with them."""
    for batch, n, m, gram in (
        (1, 768, 3072, False),
        (1, 1024, 4096, False),
        (12, 768, 768, False),
        (1, 2048, 2048, False),
        (12, 768, 2304, True),
        (24, 768, 3072, True),
        (8, 1024, 4096, True),
        (1, 1536, 6144, False),
        (1, 2048, 8192, True),
        (1, 4096, 11008, True),
    ):
        x = torch.empty(batch, n, m, device="meta")
        with patch.object(newton_schulz, "runs_kernels", lambda x: True):
            assert _gram_is_faster(x) == gram, (batch, n, m)
