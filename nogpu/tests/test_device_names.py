# SPDX-License-Identifier: MIT
"""Devices as programs under the stand-in see them: tensors that would be on a GPU say "cuda"."""

import copy
import io
import pickle

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from nogpu import emulate
from nogpu.cuda.stand_in import cuda_is_cpu

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@triton.jit
def double(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, 2 * tl.load(x + i))


@pytest.fixture(autouse=True)
def gpu():
    with emulate() as gpu, cuda_is_cpu(gpu):
        yield gpu


def numbers(*shape, **options):
    return torch.randn(*shape, device="cuda", **options)


def test_a_tensor_says_where_it_would_be():
    x, h = numbers(4), torch.zeros(4)
    assert type(x.device) is torch.device
    assert (x.device, x.device.type, x.device.index) == (CUDA, "cuda", 0)
    assert (x.is_cuda, x.is_cpu, x.get_device()) == (True, False, 0)
    assert (h.is_cuda, h.is_cpu, h.get_device()) == (False, True, -1)
    assert (x.type(), h.type()) == ("torch.cuda.FloatTensor", "torch.FloatTensor")
    assert h.device == CPU
    assert "device='cuda:0'" in repr(x)
    assert "device" not in repr(h)


def in_a_block(device):
    with torch.device(device):
        return [torch.ones(2), torch.tensor([1.0]), torch.arange(3), nn.Linear(2, 2).weight]


def by_default(device):
    torch.set_default_device(device)
    try:
        assert torch.get_default_device() == CUDA
        return [torch.ones(2), torch.tensor(1.0)]
    finally:
        torch.set_default_device(None)


def drawn(device):
    generator = torch.Generator(device=device)
    assert generator.device == CUDA
    return torch.randn(3, device=device, generator=generator)


def of_autocast(device):
    with torch.autocast(device.type, torch.bfloat16):
        product = numbers(4, 4) @ numbers(4, 4)
    assert product.dtype == torch.bfloat16
    return product


# What a program makes with the device of a tensor on the GPU.
MADE = {
    "a factory": lambda d: torch.empty(3, device=d),
    "data": lambda d: [torch.tensor([1.0], device=d), torch.as_tensor([1.0], device=d)],
    "by its type": lambda d: [torch.ones(2, device=d.type), torch.ones(2).to(d.type)],
    "by its number": lambda d: [
        torch.ones(2, device=0),
        torch.ones(2).to(0),
        torch.ones(2).cuda(0),
    ],
    "by its name": lambda d: torch.ones(2, device=str(d)),
    "a copy": lambda d: [torch.ones(3).to(d), torch.ones(3).to(device=d, dtype=torch.half)],
    "a module": lambda d: nn.Linear(2, 2, device=d)(torch.ones(2, device=d)),
    "a module that is moved": lambda d: list(nn.BatchNorm1d(3).to(d).state_dict().values()),
    "a module of meta": lambda d: nn.Linear(2, 2, device="meta").to_empty(device=d).weight,
    "a block": in_a_block,
    "the default": by_default,
    "a generator": drawn,
    "autocast": of_autocast,
    "another shape": lambda d: numbers(3).new_tensor([1.0]),
}


@pytest.mark.parametrize("name", MADE)
def test_what_is_made_on_the_device_of_a_tensor_is_there(name):
    made = MADE[name](numbers(3).device)
    found = made if isinstance(made, list) else [made]
    assert [t.device for t in found] == [CUDA] * len(found)
    assert all(t.is_cuda for t in found)
    for t in found:
        (t.float().sum() + numbers(1)).item()


def attention():
    q = numbers(1, 2, 8, 4)
    yield F.scaled_dot_product_attention(q, q, q)
    yield nn.MultiheadAttention(4, 2).cuda()(*[numbers(3, 2, 4)] * 3)[0]
    yield nn.TransformerEncoderLayer(4, 2).cuda().eval()(numbers(3, 2, 4))


def recurrent():
    lstm = nn.LSTM(4, 2).cuda()
    lstm.flatten_parameters()
    yield lstm(numbers(3, 2, 4))[0]
    yield nn.GRU(4, 2, device="cuda")(numbers(3, 2, 4))[0]


def checkpointed():
    x = numbers(4, requires_grad=True)
    for use_reentrant in (False, True):
        y = torch.utils.checkpoint.checkpoint(F.dropout, x, 0.5, use_reentrant=use_reentrant)
        y.sum().backward()
    yield x.grad


def scaled():
    model = nn.Linear(4, 4).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler("cuda")
    scaler.scale(model(numbers(4)).sum()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    yield model.weight.grad


def transformed():
    def loss(y):
        assert y.device == CUDA
        return (y * torch.ones(2, device=y.device)).sum()

    yield torch.func.grad(loss)(numbers(2))
    yield torch.vmap(torch.func.grad(loss))(numbers(3, 2))
    yield torch.vmap(lambda y: y + torch.zeros(1, device=y.device))(numbers(3, 2))


def others():
    x = numbers(6, 4)
    window = torch.hann_window(16, device=x.device)
    yield torch.stft(numbers(100), 16, return_complex=True, window=window)
    yield torch.einsum("ij,kj->ik", x, x)
    yield x.unique()
    yield x.softmax(1).multinomial(2)
    yield nn.Conv2d(3, 2, 3).cuda()(numbers(1, 3, 8, 8))
    yield F.one_hot(torch.arange(3, device=x.device))
    yield torch.eye(3, device=x.device).to_sparse()
    yield torch.from_dlpack(x)
    yield copy.deepcopy(x)
    yield copy.deepcopy(nn.Linear(2, 2).cuda()).weight
    yield pickle.loads(pickle.dumps(x))


@pytest.mark.parametrize(
    "make",
    [attention, recurrent, checkpointed, scaled, transformed, others],
    ids=lambda f: f.__name__,
)
def test_functions_of_pytorch_that_ask_for_the_device_compute_there(make):
    for t in make():
        assert t.device == CUDA


class Composed(TorchDispatchMode):
    """Instead of a sine it calls operators that PyTorch composes, where autograd does not."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.sin.default:
            return args[0].double().reshape(2, 2).to(torch.float32)
        return func(*args, **(kwargs or {}))


def test_a_composed_operator_in_a_mode_computes_where_its_operands_are():
    x, h = numbers(4), torch.zeros(4)
    with Composed():
        assert [torch.sin(t).device for t in (x, h)] == [CUDA, CPU]


class Passes(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_copies_below_which_another_mode_stands_are_where_they_are_copied_to():
    """As that of `torch.set_default_device`, and those that were entered before the emulation."""
    with _pop_mode_temporarily() as stand_in, Passes(), stand_in:
        check_copies()
    torch.set_default_device("cuda")
    try:
        check_copies()
    finally:
        torch.set_default_device(None)


def check_copies():
    x = numbers(3)
    h = torch.zeros(1, device="cpu")
    assert [t.device for t in (x.cpu(), x.to("cpu"), x.to(h), x.double().to(CPU))] == [CPU] * 4
    assert [t.device for t in (h.cuda(), h.to(x), h.to(CUDA))] == [CUDA] * 3


def test_a_saved_tensor_returns_to_its_place():
    buffer = io.BytesIO()
    torch.save({"x": numbers(3), "h": torch.ones(3)}, buffer)
    expected = {None: (CUDA, CPU), "cpu": (CPU, CPU), "cuda": (CUDA, CUDA), "cuda:0": (CUDA, CUDA)}
    for place, devices in expected.items():
        buffer.seek(0)
        found = torch.load(buffer, map_location=place)
        assert (found["x"].device, found["h"].device) == devices
    buffer.seek(0)
    assert torch.load(buffer, map_location={"cuda:0": "cpu"})["x"].device == CPU


def test_a_file_of_another_gpu_is_refused():
    buffer = io.BytesIO()
    torch.save(numbers(3), buffer)
    buffer.seek(0)
    with pytest.raises(RuntimeError, match="the device is cuda:3, expected cuda:0"):
        torch.load(buffer, map_location="cuda:3")


def test_a_device_that_is_not_there_may_be_named_and_not_used():
    other = torch.device("cuda", 2)
    assert (other.type, other.index) == ("cuda", 2)
    assert other != numbers(1).device
    for use in (
        lambda: torch.ones(2, device=other),
        lambda: numbers(2).to(other),
        lambda: torch.cuda.set_device(other),
        lambda: torch.set_default_device(other),
        lambda: torch.Generator(other),
    ):
        with pytest.raises(RuntimeError, match="the device is cuda:2, expected cuda:0"):
            use()


def test_moving_a_tensor_to_where_it_is_copies_nothing():
    x, h = numbers(4), torch.ones(4)
    assert x.to(x.device) is x.cuda() is x.to("cuda") is x
    assert h.to(h.device) is h.cpu() is h
    assert x.cpu().device == x.to("cpu").device == CPU
    assert torch.zeros_like(x).device == torch.zeros_like(h, device=x.device).device == CUDA


def test_a_tensor_of_the_host_is_still_refused():
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        numbers(4) + torch.zeros(4, device=torch.zeros(1).device)
    with pytest.raises(AssertionError, match="cuda:0 != cpu"):
        torch.testing.assert_close(x := numbers(4), x.cpu())


# Operators of libraries

log: list[tuple[str, torch.device]] = []


@torch.library.custom_op("nogpu_names::twice", mutates_args=(), device_types="cuda")
def twice(x: Tensor) -> Tensor:
    out = torch.empty(x.shape, device=torch.device("cuda"))
    double[(1,)](x, out, x.numel())
    log.append(("cuda", x.device))
    return out


@twice.register_kernel("cpu")
def _twice_of_host(x: Tensor) -> Tensor:
    log.append(("cpu", x.device))
    return 2 * x.to(torch.tensor(0, device=x.device).device)


@torch.library.custom_op("nogpu_names::for_cuda", mutates_args=(), device_types="cuda")
def for_cuda(x: Tensor) -> Tensor:
    return x.clone()


@torch.library.custom_op("nogpu_names::for_cpu", mutates_args=(), device_types="cpu")
def for_cpu(x: Tensor) -> Tensor:
    return x.clone()


def test_an_operator_takes_the_kernel_of_its_tensors_device(gpu):
    log.clear()
    for device in (CPU, CUDA):
        x = torch.ones(16, device=device)
        assert torch.equal(twice(x), 2 * x)
    assert log == [("cpu", CPU), ("cuda", CUDA)]
    assert len(gpu.launches) == 1
    assert for_cuda(numbers(2)).device == CUDA
    assert for_cpu(torch.ones(2)).device == CPU
    for refused, given in ((for_cuda, torch.ones(2)), (for_cpu, numbers(2))):
        with pytest.raises(NotImplementedError, match="Could not run 'nogpu_names::for_c"):
            refused(given)


# Compiled functions


def test_a_kernel_is_launched_by_wrap_triton_outside_of_an_operator(gpu):
    x, out = numbers(16), torch.empty(16, device="cuda")
    torch.library.wrap_triton(double)[(1,)](x, out, 16)
    assert torch.equal(out, 2 * x)
    assert [one.kernel for one in gpu.launches] == ["double"]


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_function_runs_uncompiled(fullgraph):
    calls = []

    @torch.compile(fullgraph=fullgraph)
    def function(x):
        calls.append(x.device)
        return 2 * x

    x = numbers(3)
    assert torch.equal(function(x), 2 * x)
    function(x)
    assert calls == [CUDA, CUDA]
    branch = torch.cond(x.sum() > 1e9, torch.cos, torch.sin, (x,))
    assert torch.equal(branch, x.sin())
    assert branch.device == CUDA
