# SPDX-License-Identifier: MIT
"""Operators in a capture that read values back within their implementation for CUDA.

Beside each stands a call of the same operator, or of one in its place, that reads none. A capture
refuses the one, and a graph computes the other one.
"""

import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from nogpu import emulate
from nogpu.cuda import reading_operators
from nogpu.cuda.stand_in import cuda_is_cpu
from nogpu.triton.torch_operators import Host

READ = "read-back in a capture"


def words(number, bound=5):
    return torch.arange(number, device="cuda") % bound


def two_lengths():
    return torch.full((2,), 2, device="cuda")


def quantized(x, zero_point):
    scale = torch.full((2,), 0.25, device="cuda")
    return torch.fake_quantize_per_channel_affine(x.view(2, 2), scale, zero_point, 0, 0, 255)


def gradient(function, x):
    p = x.detach().requires_grad_()
    (found,) = torch.autograd.grad(function(p).square().sum(), p)
    return found


def smoothed(x, **options):
    weight = 0.5 + words(2)
    return F.cross_entropy(x.view(2, 2), words(2), weight, label_smoothing=0.25, **options)


def encoded(x, **options):
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, device="cuda")
    for p in layer.parameters():
        nn.init.constant_(p, 0.25)
    encoder = nn.TransformerEncoder(layer, 1, **options).eval()
    padding = torch.zeros(1, 2, dtype=torch.bool, device="cuda")
    with torch.no_grad():
        return encoder(x.view(1, 1, 4).expand(1, 2, 4), src_key_padding_mask=padding)


# Of a tensor of four elements: what reads, and what does not.
PAIRS = {
    "isin": (
        lambda x: torch.isin(words(8), torch.arange(13, device="cuda")),
        lambda x: torch.isin(words(8), torch.arange(12, device="cuda")),
    ),
    "isin of a number": (
        lambda x: torch.isin(3, torch.arange(10, device="cuda")),
        lambda x: torch.isin(3, torch.arange(9, device="cuda")),
    ),
    "isin of unique elements": (
        lambda x: torch.isin(words(5), words(5).repeat(400)),
        lambda x: torch.isin(words(5), torch.arange(2000, device="cuda"), assume_unique=True),
    ),
    "_unique": (lambda x: torch._unique(words(8)), lambda x: torch.sort(words(8)).values),
    "unique rows": (lambda x: torch.unique(x.view(2, 2), dim=0), lambda x: x.view(2, 2).sort(0)),
    "mode": (lambda x: words(2049).mode(), lambda x: words(2048).mode()),
    "histc": (lambda x: x.histc(5), lambda x: x.histc(5, -3, 3)),
    "searchsorted": (
        lambda x: torch.searchsorted(x, x + 1, sorter=x.argsort()),
        lambda x: torch.searchsorted(x[x.argsort()], x + 1),
    ),
    "segment_reduce": (
        lambda x: torch.segment_reduce(x, "sum", lengths=two_lengths()),
        lambda x: torch.segment_reduce(x, "sum", lengths=two_lengths(), unsafe=True),
    ),
    "nonzero": (lambda x: torch.where(x > 0), lambda x: torch.nonzero_static(x, size=4)),
    "randint_like": (
        lambda x: torch.randint_like(x, x.abs().sum().long() + 1) * 0,
        lambda x: torch.randint_like(x, 5) * 0,
    ),
    "allclose": (lambda x: torch.ops.aten.allclose(x, x), lambda x: torch.isclose(x, x)),
    "matrix_exp": (
        lambda x: torch.linalg.matrix_exp(x.view(2, 2)),
        lambda x: torch.linalg.matrix_exp(x.view(4, 1, 1)),
    ),
    "lstsq": (
        lambda x: torch.linalg.lstsq(x.view(2, 2), x.view(2, 2)).solution,
        lambda x: torch.linalg.qr(x.view(2, 2)).R.abs(),
    ),
    "check_errors": (
        lambda x: torch.linalg.inv_ex(x.view(2, 2), check_errors=True),
        lambda x: torch.linalg.inv_ex(x.view(2, 2)),
    ),
    "solve_ex": (
        lambda x: torch.linalg.solve_ex(x.view(2, 2), x[:2], check_errors=True),
        lambda x: torch.linalg.solve_ex(x.view(2, 2), x[:2]),
    ),
    "fake quantization": (
        lambda x: quantized(x, words(2).int()),
        lambda x: quantized(x, words(2).float()),
    ),
    "sparse": (lambda x: x.view(2, 2).to_sparse(), lambda x: x.view(2, 2) * 2),
    "sparse rows": (lambda x: x.view(2, 2).to_sparse_csr(), lambda x: x.view(2, 2) * 3),
    "nested": (
        lambda x: encoded(x, enable_nested_tensor=True),
        lambda x: encoded(x, enable_nested_tensor=False),
    ),
    "cross_entropy": (
        lambda x: smoothed(x),
        lambda x: smoothed(x, reduction="sum") / 2.5,
    ),
    "CrossEntropyLoss": (
        lambda x: nn.CrossEntropyLoss(x[:2].abs(), label_smoothing=0.5)(x.view(2, 2), words(2)),
        lambda x: nn.CrossEntropyLoss(label_smoothing=0.5)(x.view(2, 2), words(2)),
    ),
    "gradient of prod": (
        lambda x: gradient(lambda p: p.prod(), x),
        lambda x: gradient(lambda p: p.sum().prod(), x),
    ),
    "gradient of prod along a dimension": (
        lambda x: gradient(lambda p: p.view(2, 2).prod(0), x),
        lambda x: gradient(lambda p: p.view(2, 2).sum(0), x),
    ),
    "gradient of cumprod": (
        lambda x: gradient(lambda p: p.cumprod(-1), x),
        lambda x: gradient(lambda p: p.view(4, 1).cumprod(-1), x),
    ),
    "gradient of masked_scatter": (
        lambda x: gradient(lambda p: torch.zeros_like(x).masked_scatter(x > 0, p), x),
        lambda x: gradient(lambda p: p.masked_scatter(x > 0, torch.ones_like(x)), x),
    ),
    "list of tensors": (
        lambda x: torch.tensor([x.sum(), x.mean()], device="cuda"),
        lambda x: torch.stack([x.sum(), x.mean()]),
    ),
    "list on the host": (
        lambda x: torch.as_tensor([[x.sum()]]) * 0,
        lambda x: torch.as_tensor(x) + 1,
    ),
    "fill_": (lambda x: torch.zeros(4).fill_(x.sum()), lambda x: torch.zeros_like(x).fill_(x[0])),
}

# What PyTorch captures, though on a CPU, or in other versions, it reads values.
CAPTURED = {
    "embedding": lambda x: F.embedding(words(8, 2), x.view(2, 2).clone(), max_norm=0.5),
    "embedding_bag": lambda x: F.embedding_bag(words(8, 2).view(2, 4), x.view(2, 2).clone()),
    "multinomial": lambda x: torch.multinomial(x.abs(), 2) * 0,
    "multinomial with replacement": lambda x: torch.multinomial(x.abs(), 2, True) * 0,
    "normal": lambda x: torch.normal(0.0, x.abs()) * 0,
    "quantile": lambda x: torch.quantile(x, words(2) / 4),
    "nanquantile": lambda x: x.nanquantile(words(2) / 4),
    "median": lambda x: (x.median(), x.nanmedian(), x.view(2, 2).nanmedian(0)),
    "combinations": lambda x: torch.combinations(x),
    "count_nonzero": lambda x: x.count_nonzero(),
    "kthvalue": lambda x: x.kthvalue(2),
    "bucketize": lambda x: torch.bucketize(x, words(5).float()),
    "accumulated": lambda x: x.index_put((words(2),), x[:2], accumulate=True),
    "determinant": lambda x: torch.linalg.det(x.view(2, 2)),
    "repeat_interleave": lambda x: x.repeat_interleave(2),
    "randperm": lambda x: torch.randperm(9, device="cuda") * 0,
    "masked_scatter": lambda x: x.masked_scatter(x > 0, x.flip(0)),
    "maximum": lambda x: gradient(lambda p: p.max() + p.median() + p.norm(), x),
    "asserted": lambda x: (torch._assert_async((x.abs() >= 0).all()), x + 1)[1],
}


def values():
    return torch.tensor([1.5, -2.0, 3.0, 0.5], device="cuda")


def check_captured(function):
    """Check that a replay computes what the function does, also of new values."""
    x = values()
    function(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(x)
    for factor in (1.0, -0.5):
        x.mul_(factor)
        graph.replay()
        for one, other in zip(tree_leaves(out), tree_leaves(function(x)), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("case", PAIRS)
@pytest.mark.filterwarnings("ignore:.*nested tensors", "ignore:Sparse", "ignore:enable_nested")
def test_what_an_operator_reads_is_refused_at_its_line(case):
    reads, other = PAIRS[case]
    with emulate() as gpu, cuda_is_cpu(gpu):
        check_captured(other)
        assert gpu.faults == []
        x = values()
        reads(x)
        read = pytest.raises(RuntimeError, match="CUDA error: operation not permitted")
        with read, torch.cuda.graph(torch.cuda.CUDAGraph()):
            reads(x)
    (fault,) = gpu.faults
    assert (fault.kind, fault.name, fault.source[0]) == ("error", READ, __file__)
    helpers = (reads, gradient, smoothed, encoded, quantized)
    assert any(fault.source[1] in lines_of(one) for one in helpers)


def lines_of(function):
    lines, first = inspect.getsourcelines(function)
    return range(first, first + len(lines))


@pytest.mark.parametrize("case", CAPTURED)
def test_what_pytorch_captures_is_captured(case):
    with emulate() as gpu, cuda_is_cpu(gpu):
        check_captured(CAPTURED[case])
    assert gpu.faults == []


def all_operators():
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = name.partition("::")
        packet, _, overload = rest.partition(".")
        if namespace == "aten":
            yield getattr(getattr(torch.ops.aten, packet), overload or "default")


def test_the_table_names_operators_of_pytorch():
    """And each operator that has a tag of PyTorch's for one that reads values is refused."""
    found = list(all_operators())
    names = {one.overloadpacket.__name__ for one in found}
    assert set(reading_operators.READERS) - names == set()
    assert set(reading_operators.TAGGED) - names == set()
    tagged = [one for one in found if not reading_operators.TAGS.isdisjoint(one.tags)]
    assert {"nonzero", "_local_scalar_dense"} <= {one.overloadpacket.__name__ for one in tagged}
    for one in tagged:
        name = one.overloadpacket.__name__
        assert (reading_operators._reader_of(one) is None) == (name in reading_operators.TAGGED)


def test_an_operator_of_others_is_known_by_its_tag(monkeypatch):
    """It stands for an operator in C++, for the CPU and for CUDA."""
    monkeypatch.setattr(Host, "_kernel", lambda *given: None)
    with torch.library._scoped_library("nogpu_test_reads", "FRAGMENT") as library:
        tag = torch.Tag.dynamic_output_shape
        library.define("positive(Tensor x) -> Tensor", tags=tag)
        library.impl("positive", lambda x: x[x > 0], "CPU")
        operator = torch.ops.nogpu_test_reads.positive.default
        with emulate() as gpu, cuda_is_cpu(gpu):
            x = values()
            assert operator(x).numel() == 3
            read = pytest.raises(RuntimeError, match="whose result depends on values, reads")
            with read, torch.cuda.graph(torch.cuda.CUDAGraph()):
                operator(x)
