# SPDX-License-Identifier: MIT
"""The library within ``with torch.device("meta")``: tensors that it makes inside name their
device."""

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import torchpar
from torchpar.data import Samples
from torchpar.data.samples import batches
from torchpar.nn import MLP
from torchpar.optim import Muon, orthogonalize

ROOT = Path(__file__).parents[1]
# The functions that take the default device, by PyTorch's page of `torch.set_default_device`.
_NAMES = """
    arange as_tensor asarray bartlett_window blackman_window empty empty_permuted empty_quantized
    empty_strided eye full hamming_window hann_window kaiser_window linspace logspace nested_tensor
    normal ones rand randint randn randperm range scalar_tensor sparse_bsc_tensor sparse_bsr_tensor
    sparse_compressed_tensor sparse_coo_tensor sparse_csc_tensor sparse_csr_tensor tensor
    tril_indices triu_indices zeros
"""
CONSTRUCTORS = frozenset(_NAMES.split())


def without_device(source: str) -> list[str]:
    """The calls of PyTorch's constructors that leave the device to the default device.

    A call with ``**options`` may have it among them.
    """
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return [
        f"line {call.lineno}: {ast.unparse(call)}"
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and ast.unparse(call.func.value) == "torch"
        and call.func.attr in CONSTRUCTORS
        and not {"device", None} & {keyword.arg for keyword in call.keywords}
    ]


def test_each_tensor_that_the_library_makes_names_its_device() -> None:
    assert without_device("x = torch.zeros(3)") == ["line 1: torch.zeros(3)"]
    assert without_device("torch.zeros(3, device=x.device) + torch.ones(1, **options)") == []
    sources = [path for room in ("torchpar", "kernels") for path in (ROOT / room).rglob("*.py")]
    assert len(sources) > 100
    found = {str(path): without_device(path.read_text("utf-8")) for path in sorted(set(sources))}
    assert {path: calls for path, calls in found.items() if calls} == {}


def cpu(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cpu")


def table() -> str:
    """A convolution has a view, which the optimizer tries."""
    layers = nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 16), nn.Linear(16, 2)
    return str(Muon.for_model(nn.Sequential(*layers), lr=0.02))


def step() -> list[Tensor]:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, device="cpu"), nn.Flatten(), nn.Linear(4, 3, device="cpu")
    )
    for i, p in enumerate(model.parameters()):
        p.data.copy_(cpu(*p.shape, seed=i))
        p.grad = cpu(*p.shape, seed=9 + i)
    Muon.for_model(model, lr=0.1).step()
    return [p.detach() for p in model.parameters()]


def operators() -> list[Tensor]:
    x, weight = cpu(5, 8).requires_grad_(), cpu(3, 8, seed=1).requires_grad_()
    y = torchpar.linear_sigmoid(x, weight, cpu(3, seed=2))
    gram = torchpar.matmul_t(y)
    c = torchpar.maximum(gram, gram.mean()) + torchpar.symmetric_matmul(gram, gram)
    return [c.detach(), *torch.autograd.grad(c.sum(), (x, weight))]


def exact() -> list[Tensor]:
    with torchpar.exact.mode():
        x = cpu(5, 8).requires_grad_()
        loss = torch.nn.functional.cross_entropy(x @ cpu(8, 4), torch.arange(5, device="cpu") % 4)
        parallel = torchpar.exact.DataParallel(nn.ParameterList([x]))
        parallel.backward(loss.pow(1.5))
        return [parallel.all_reduce(), x.grad]


def drawn() -> list[Tensor]:
    pixels = torch.arange(24, dtype=torch.uint8, device="cpu").view(6, 2, 2)
    samples = Samples(pixels, torch.arange(6, device="cpu"), ("a",) * 6)
    return [batch.labels for batch in batches(samples, 2, seed=1, epoch=2)]


def orthogonal() -> list[Tensor]:
    return [orthogonalize(cpu(4, 9)), orthogonalize(cpu(9, 4), ns="gram")]


@pytest.mark.parametrize("call", [table, step, operators, exact, drawn, orthogonal])
def test_results_are_those_without_a_default_device(call: Callable[[], list[Tensor] | str]) -> None:
    expected = call()
    with torch.device("meta"):
        found = call()
    if isinstance(expected, str):
        assert found == expected
    else:
        assert [t.is_cpu for t in found] == [True] * len(expected)
        assert all(map(torch.equal, found, expected))


def test_layers_are_made_on_the_default_device() -> None:
    with torch.device("meta"):
        assert all(p.is_meta for p in MLP((4, 3, 2)).parameters())
    assert not any(p.is_meta for p in MLP((4, 3, 2)).parameters())
