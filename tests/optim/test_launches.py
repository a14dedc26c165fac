# SPDX-License-Identifier: MIT
"""Launches and calls of a step of Muon on a GPU, counted without one; the kernels emulated.

Small matrices stand for large ones: sizes are divided by 48, and so is what the rules compare.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

import nogpu
from benchmarks.driver import gpu_of_cpu_tensors
from torchpar import reference
from torchpar.kernels import tiles
from torchpar.kernels.launch import Plan
from torchpar.optim import Muon, elementwise, matrices, muon, newton_schulz, orthogonalize
from torchpar.optim.muon import _is_read_at_once, _update_all
from torchpar.optim.newton_schulz import _gram_is_faster

slow = pytest.mark.slow

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


@contextmanager
def emulated() -> Iterator[nogpu.Emulator]:
    """Execute kernels that are launched straight, at any size."""
    with nogpu.emulate() as gpu, by_kernels(True):
        yield gpu
    assert not gpu.faults


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """The launches of our kernels, by their names."""
    calls: Counter[str] = Counter()
    launch = Plan.launch

    def launch_one(plan: Plan, *args: object) -> None:
        calls[plan.kernel.__name__] += 1
        launch(plan, *args)

    with patch.object(Plan, "launch", launch_one):
        yield calls


def launching(
    device: str, lr: float | Tensor
) -> tuple[AbstractContextManager[object], float | Tensor]:
    """A context in which kernels are launched for tensors on ``device``, and ``lr`` on it."""
    lr = lr.to(device) if isinstance(lr, Tensor) else lr
    return (emulated() if device == "cpu" else nullcontext()), lr


def count(
    shapes: Sequence[tuple[int, int]],
    kernels: bool,
    lr: float | Tensor = 0.1,
    dtype: torch.dtype = torch.float32,
) -> Counter:
    """The launches of our kernels, and the calls of PyTorch that launch some, in a step."""
    params = [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    with gpu_of_cpu_tensors(), by_kernels(kernels):
        optimizer = Muon(params, lr)
        optimizer.step()  # makes momenta
        activities = [ProfilerActivity.CPU]
        with counted() as calls, profile(activities=activities, acc_events=True) as profiled:
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
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((N, N), torch.float32),
        ((N, N), torch.bfloat16),
        ((N, N), torch.float16),
        ((N, 4 * N), torch.float32),
        ((4 * N, N), torch.float32),
        ((4 * N, N), torch.bfloat16),
    ],
)
def test_a_single_matrix_is_few_launches(scaled, kernels, lr, shape, dtype):
    calls = count([shape], kernels, lr, dtype)
    # Three products in each of five iterations. Beside them: the momentum, Nesterov's, the norm,
    # the division by it, and the update.
    assert calls.total() == 5 * 3 + 5, calls
    assert calls["normalize_kernel"] == calls["update_kernel"] == 1, calls
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


@pytest.mark.parametrize(
    "shape, ns",
    [
        ((40, 96), "standard"),
        ((2, 96, 40), "gram"),
        pytest.param((33, 45), "gram", marks=slow),
        pytest.param((40, 96), "gram", marks=slow),
        pytest.param((2, 96, 40), "standard", marks=slow),
        pytest.param((33, 45), "standard", marks=slow),
    ],
)
def test_the_kernels_orthogonalise(shape, ns):
    """Executed on an emulated H100, from buffers that are written again."""
    torch.manual_seed(0)
    x = torch.randn(shape)
    with emulated() as gpu:
        found = orthogonalize(x, ns=ns)
    expected = 1 + (10 if ns == "standard" else 12 if shape == (33, 45) else 16)
    assert len(gpu.launches) == expected, gpu.launches
    # The kernels round to bfloat16, as the library does where the CPU has products of it.
    with patch.object(newton_schulz, "has_bfloat16", lambda: True):
        by_library = orthogonalize(x, ns=ns)
    ideal = reference.orthogonalize(x.double())
    error, allowed = ((t.double() - ideal).norm() for t in (found, by_library))
    assert error <= 2 * allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (1, 127), (40, 129), (3, 33, 45)])
def test_the_kernel_normalises(shape, dtype, device):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype).to(device)
    for given in (x, x.mT):
        with launching(device, 0.0)[0], counted() as launches:
            found = elementwise.normalized(given, 1e-7, torch.bfloat16)
            with FlopCounterMode(display=False):
                by_functions = elementwise.normalized(given, 1e-7, torch.bfloat16)
        assert launches == {"normalize_kernel": 1}
        assert torch.equal(found, by_functions)  # a mode may be active on one rank alone
        wide = given.double()
        expected = wide / wide.square().sum((-2, -1), keepdim=True).sqrt()
        # Rounded to bfloat16 once. The norm's terms are added in some tree, which is less deep
        # than a chain of them.
        limit = 2**-8 + x.numel() * torch.finfo(torch.float32).eps
        assert ((found.double() - expected).abs() <= limit * expected.abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_a_matrix_in_a_batch_is_normalised_as_one_alone(dtype):
    """With zeros around it, and beside a matrix of another dtype."""
    generator = torch.Generator().manual_seed(0)
    # Of 10 bits, so that bfloat16 would round them. Any tree adds the squares without rounding.
    x = torch.randint(-511, 512, (7, 20), generator=generator).to(dtype)
    arguments = newton_schulz.COEFFICIENTS, 0, 1e-7, "standard"  # no iterations
    with emulated() as gpu:
        alone = orthogonalize(x, *arguments)
        others = [[], [x], [x.mT], [x.bfloat16()]]
        batched = [matrices.orthogonalize_all([x, *other], *arguments)[0] for other in others]
    assert len(gpu.launches) == 1 + 1 + 1 + 1 + 2
    for one in batched:
        assert torch.equal(one.bfloat16(), alone)


def test_a_negated_view_is_orthogonalised_with_its_sign():
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    with emulated():
        expected = orthogonalize(-x)
        assert torch.equal(orthogonalize(torch._neg_view(x)), expected)
        assert not elementwise.update_alone(x, torch._neg_view(x), 0.1, 0.1, 1.0)


def test_an_inference_tensor_is_updated_in_inference_mode_alone():
    with torch.inference_mode():
        p, update = torch.ones(4, 6), torch.ones(4, 6)
    with emulated() as gpu:
        assert not elementwise.update_alone(p, update, 0.5, 0.0, 1.0)
        assert not gpu.launches
        with torch.inference_mode():
            assert elementwise.update_alone(p, update, 0.5, 0.0, 1.0)
    assert torch.equal(p, torch.full((4, 6), 0.5))
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        _update_all([p], [update], 0.5, 0.0, [1.0])


def test_the_kernel_divides_by_eps_at_least():
    x = torch.tensor([0.0, 2.0**-8, 2.0**-6, float("nan")]).view(4, 1, 1) * torch.ones(4, 1, 2)
    with emulated():
        found = elementwise.normalized(x, 2**-7, torch.bfloat16)
    # The second norm is below eps, and the third is √2/64.
    expected = torch.tensor([0, 0.5, 0.5**0.5, float("nan")]).bfloat16()
    assert torch.equal(found[:, 0].nan_to_num(7), expected[:, None].expand(4, 2).nan_to_num(7))


RATES = 0.3, torch.tensor(0.3), torch.tensor(0.3, dtype=torch.float64)
UPDATED = torch.float32, torch.bfloat16, torch.float16, torch.float64


@pytest.mark.parametrize(
    "dtype, lr",
    [  # in any run each dtype, and each kind of rate
        pytest.param(dtype, lr, marks=[slow] * ((i + j) % 3 > 0))
        for i, dtype in enumerate(UPDATED)
        for j, lr in enumerate(RATES)
    ],
)
def test_the_kernel_updates_with_the_bits_of_pytorch(dtype, lr, device):
    """A rank that launches it, and another that cannot, keep the same parameters."""
    torch.manual_seed(0)
    for shape in ((1, 1), (40, 129), (129, 40)):
        for of_update in (torch.bfloat16, torch.float32):
            p = torch.randn(shape, dtype=dtype).to(device)
            update = torch.randn(shape).to(device, of_update)
            for given, step in ((p, update), (p.mT, update.mT)):
                expected, found = given.clone(), given.clone()
                version = found._version
                context, rate = launching(device, lr)
                _update_all([expected], [step.clone()], rate, 0.1, [1.7])
                with context, counted() as launches:
                    assert elementwise.update_alone(found, step, rate, 0.1, 1.7)
                assert launches == {"update_kernel": 1}
                assert torch.equal(found, expected)
                assert found._version > version  # autograd notices


@pytest.mark.parametrize("lr", [0.3, torch.tensor(0.3)], ids=["number", "tensor"])
@pytest.mark.parametrize("shape", [(40, 72), (72, 40)])
def test_a_step_of_a_single_matrix_is_that_of_pytorch(monkeypatch, shape, lr):
    monkeypatch.setattr(matrices, "_PADDED_UP_TO", 0)
    torch.manual_seed(0)
    start, grads = torch.randn(shape), [torch.randn(shape) for _ in range(3)]

    def train(optimizer: type[torch.optim.Optimizer], dtype: torch.dtype) -> Tensor:
        p = start.to(dtype, copy=True).requires_grad_()
        of_p = optimizer([p], lr=lr, weight_decay=0.1)
        for grad in grads:
            p.grad = grad.to(dtype)
            of_p.step()
        return p.detach()

    with emulated() as gpu:
        found = train(Muon, torch.float32)
    kernels = Counter(launch.kernel for launch in gpu.launches)
    assert kernels["normalize_kernel"] == kernels["update_kernel"] == 3
    refuse = {"update_by_words": lambda *args: False}
    with emulated() as gpu, patch.multiple(muon, **refuse), patch.multiple(elementwise, **refuse):
        assert torch.equal(train(Muon, torch.float32), found)
    assert "update_kernel" not in {launch.kernel for launch in gpu.launches}
    with patch("torch.Tensor.bfloat16", lambda x: x):  # no step rounds to bfloat16
        ideal = train(torch.optim.Muon, torch.float64)
    error = (found - ideal).norm()
    assert error <= 2 * (train(torch.optim.Muon, torch.float32) - ideal).norm()


@pytest.mark.parametrize("is_capturing", [False, True])
def test_a_rate_on_the_cpu_is_not_copied_to_a_gpu(monkeypatch, is_capturing):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_capturing)
    lr = torch.tensor(0.1)
    with FakeTensorMode():
        p, of_gpu = torch.empty(2, 2, device="cuda"), torch.empty((), device="cuda")
    assert _is_read_at_once(lr, p) == (not is_capturing)  # a graph would keep the number
    assert not _is_read_at_once(of_gpu, p)
    assert not _is_read_at_once(lr, torch.empty(2, 2))


def test_the_kernel_updates_no_other_layouts():
    p, update = torch.ones(4, 6), torch.ones(6, 4).mT
    for params, steps in ((p, update), (p[:, ::2], p[:, ::2]), (p[:0], p[:0])):
        with emulated() as gpu:
            assert not elementwise.update_alone(params, steps, 0.1, 0.1, 1.0)
        assert not gpu.launches
    assert torch.equal(p, torch.ones(4, 6))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (3, 0, 4), (0, 3, 4)])
def test_no_kernel_is_launched_for_nothing(shape):
    with nogpu.emulate() as gpu, by_kernels(True):
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
