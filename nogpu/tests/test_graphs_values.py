# SPDX-License-Identifier: MIT
"""CUDA graphs on a CPU whose inputs hold no valid values: a capture computes nothing."""

import inspect

import pytest
import torch
from torch import nn

from nogpu import emulate
from nogpu.cuda.stand_in import cuda_is_cpu


def on_device(*values):
    return torch.tensor(values, device="cuda")


# A function of a table and indices; the gradient of the loss writes where the indices point.
INDEXED = {
    "cross_entropy": lambda x, i: nn.functional.cross_entropy(x, i, reduction="none"),
    "cast": lambda x, i: nn.functional.nll_loss(x, i.int().long()),
    "index": lambda x, i: x[i],
    "gather": lambda x, i: x.gather(1, i[:, None]),
    "embedding": lambda x, i: nn.functional.embedding(i, x),
    "index_select": lambda x, i: x.index_select(0, i),
    "index_add": lambda x, i: x.index_add(0, i, x),
}


@pytest.mark.parametrize("name", INDEXED)
def test_a_capture_does_not_depend_on_values_of_indices(name):
    function = INDEXED[name]
    with emulate() as gpu, cuda_is_cpu(gpu):
        x = torch.randn(4, 4, device="cuda", requires_grad=True)
        i = torch.full((4,), 10**9, device="cuda")

        def step():
            (grad,) = torch.autograd.grad((out := function(x, i)).square().sum(), x)
            return out, grad

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            graphed = step()
        for values in ((3, 0, 1, 1), (0, 2, 2, 3)):
            i.copy_(on_device(*values))
            graph.replay()
            for one, other in zip(graphed, step(), strict=True):
                assert torch.equal(one, other)
    assert gpu.faults == []


def test_probabilities_in_a_capture_may_be_none():
    with emulate() as gpu, cuda_is_cpu(gpu):
        p = torch.full((4,), 7.0, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            drawn = p.bernoulli()
        p.fill_(1.0)
        graph.replay()
        assert drawn.eq(1).all()
    assert gpu.faults == []


def test_one_hot_reads_no_values_where_the_number_of_classes_is_given():
    """On a CPU PyTorch reads the least and the greatest one also then."""
    with emulate() as gpu, cuda_is_cpu(gpu):
        x, i = torch.randn(3, 5, device="cuda"), torch.full((4,), 10**9, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            product = x @ nn.functional.one_hot(i, num_classes=5).T.float()
        i.copy_(on_device(3, 0, 1, 1))
        graph.replay()
        assert torch.equal(product, x[:, i])
        i.fill_(5)
        with pytest.raises(RuntimeError, match="device-side assert"):
            graph.replay()
    (fault,) = gpu.faults
    assert fault.name == "invalid value in a replay"


def test_a_wrong_shape_in_a_capture_is_an_error():
    with emulate() as gpu, cuda_is_cpu(gpu):
        x, i = torch.ones(4, device="cuda"), on_device(99)
        with (
            pytest.raises(RuntimeError, match="dimension"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            x.gather(0, i[:, None])


def number(x, i):
    x.bernoulli_(1.5)


def overlap(x, i):
    x[:1].expand(4).add_(x)


def type_of_refused_indices(x, i):
    x.index_select(0, i)
    x.double().index_add_(0, i, x)


REFUSED = {
    "type": (lambda x, i: nn.functional.linear(x[None], x[None].bfloat16()), "dtype"),
    "number": (number, "p"),
    "overlap": (overlap, "memory location"),
    "indices": (type_of_refused_indices, "scalar type|dtype"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_error_in_a_capture_that_no_values_mend_is_raised(name):
    function, message = REFUSED[name]
    with emulate() as gpu, cuda_is_cpu(gpu):
        x, i = torch.ones(4, device="cuda"), torch.full((4,), 99, device="cuda")
        with (
            pytest.raises(RuntimeError, match=message),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            function(x, i)


def test_two_rows_of_invalid_indices_may_share_memory():
    with emulate() as gpu, cuda_is_cpu(gpu):
        x, edges = torch.ones(4, 4, device="cuda"), torch.full((2, 3), 99, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = x[edges[0], edges[1]]
        edges.zero_()
        graph.replay()
        assert y.eq(1).all()
    assert gpu.faults == []


def test_an_invalid_index_in_a_replay_is_named_at_both_lines():
    with emulate() as gpu, cuda_is_cpu(gpu):
        x, i = torch.ones(4, device="cuda"), on_device(0, 3)
        graph = torch.cuda.CUDAGraph()
        first = inspect.currentframe().f_lineno
        with torch.cuda.graph(graph):
            x[i]
        i.fill_(4)
        with pytest.raises(RuntimeError, match="CUDA error: device-side assert"):
            graph.replay()
    (fault,) = gpu.faults
    assert (fault.kind, fault.name) == ("error", "invalid value in a replay")
    assert "index 4 is out of bounds" in fault.message
    assert fault.earlier == ("captured", (__file__, first + 2))
    assert fault.source == (__file__, first + 5)
