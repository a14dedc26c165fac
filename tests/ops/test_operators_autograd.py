# SPDX-License-Identifier: MIT
"""First and second derivatives: their values for any incoming gradient, and no more of them than
needed."""

import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch
from samples import arguments, assert_accurate, halves, normal, to_numpy
from torch import Tensor
from torch.profiler import profile
from torch.testing import assert_close

import torchpar
from benchmarks.records import OPERATORS, by_case
from benchmarks.records.record import FLOATS, Shapes


def gradients(op: Any, args: tuple[Tensor, ...], incoming: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(op(*args), [arg for arg in args if arg.requires_grad], incoming)


@pytest.mark.parametrize("name, shapes", by_case(), ids=str)
def test_gradients_are_as_accurate_as_pytorchs(name: str, shapes: Shapes, device: str) -> None:
    for dtype in {*FLOATS[:-1]} & {*OPERATORS[name].dtypes}:  # gradcheck judges fp64
        args = arguments(shapes, dtype, device, make=halves, requires_grad=True)
        wide = tuple(arg.detach().double().requires_grad_() for arg in args)
        incoming = halves(*OPERATORS[name].op(*args).shape, dtype=dtype, device=device, seed=9)
        actual = gradients(OPERATORS[name].op, args, incoming)
        native = gradients(OPERATORS[name].plain, args, incoming)
        expected = gradients(OPERATORS[name].plain, wide, incoming.double())
        for arg, a, n, e in zip(args, actual, native, expected, strict=True):
            assert (a.shape, a.dtype, a.device) == (arg.shape, arg.dtype, arg.device)
            if incoming.numel() > 1000:
                roundings = OPERATORS[name].roundings + 2 * bool(OPERATORS[name].factors(len(args)))
                assert_accurate(a, n, to_numpy(e), roundings)
            else:  # of a few results, PyTorch's error is chance
                few = 4 * torch.finfo(dtype).eps
                assert_close(
                    a.double(), e, rtol=few, atol=few * float(e.abs().max()) if e.numel() else few
                )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(1, 3), (400, 3), (2, 300, 3), (1030, 2)], ids=str)
def test_gradient_of_matmul_t_does_not_overflow_where_the_sum_of_g_and_its_transpose_does(
    shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    x = torch.full(shape, 1 / 4096, dtype=dtype, device=device, requires_grad=True)
    g = torch.full((*shape[:-1], shape[-2]), torch.finfo(dtype).max, dtype=dtype, device=device)
    assert (g + g.mT).isinf().all()
    expected = torch.full_like(x, torch.finfo(dtype).max / 2048 * shape[-2])  # (G + Gᵀ)·X
    assert expected.isfinite().all()
    assert_close(*gradients(torchpar.matmul_t, (x,), g), expected)
    (tracked,) = torch.func.vjp(torchpar.matmul_t, x.detach())[1](g)
    assert_close(tracked, expected)
    assert_close(torch.ops.torchpar.matmul_t_backward(g, x.detach()), expected)


@pytest.mark.parametrize("shape", [(5, 3), (300, 70)], ids=str)
def test_float16_gradients_on_a_cpu_under_loss_scaling(shape: tuple[int, int]) -> None:
    x = (normal(*shape) / 64).half().requires_grad_()
    g = (normal(shape[0], shape[0], seed=1) * 2**14).clamp(-65504, 65504).half()
    exact = (g.double() + g.double().mT) @ x.detach().double()
    assert_accurate(*gradients(torchpar.matmul_t, (x,), g), exact.half(), to_numpy(exact))


def test_a_layer_computes_only_the_gradients_that_are_needed(device: str) -> None:
    for required in [*itertools.product([False, True], repeat=3)][1:]:
        args = arguments(((3, 4), (5, 4), (5,)), device=device)
        y = torchpar.linear_sigmoid(
            *(t.requires_grad_(r) for t, r in zip(args, required, strict=True))
        )
        with profile(acc_events=True) as profiled:  # without it torch 2.12 warns
            y.backward(torch.ones_like(y))
        found = Counter(event.name.partition("::")[2] for event in profiled.events())
        assert found["mm"] + found["addmm"] == required[0] + required[1]
        assert found["sigmoid_backward"] + found["linear_sigmoid_backward"] == 1
        assert found["sum"] + found["linear_sigmoid_backward"] == required[2]
        assert not found.keys() & {"mul", "sigmoid", "linear", "linear_sigmoid"}


def test_linear_sigmoid_keeps_its_inputs_and_output_only(device: str) -> None:
    args = arguments(((3, 4), (5, 4), (5,)), device=device, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = torchpar.linear_sigmoid(*args)
    assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in (args[0], args[1], y)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_ties_share_the_gradient_of_maximum_and_nan_does_not_stop_it(
    dtype: torch.dtype, device: str
) -> None:
    nan = math.nan
    a = torch.tensor(
        [1.0, 2.0, 3.0, 0.0, nan, nan, 1.0], dtype=dtype, device=device, requires_grad=True
    )
    b = torch.tensor(
        [1.0, 3.0, 2.0, -0.0, nan, 1.0, nan], dtype=dtype, device=device, requires_grad=True
    )
    g = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0], dtype=dtype, device=device)
    actual = gradients(torchpar.maximum, (a, b), g)
    assert_close(actual, gradients(torch.maximum, (a, b), g), rtol=0, atol=0)
    assert_close(actual[0], g * torch.tensor([0.5, 0, 1, 0.5, 1, 1, 1], dtype=dtype, device=device))
    assert_close(actual[1], g * torch.tensor([0.5, 1, 0, 0.5, 1, 1, 1], dtype=dtype, device=device))
