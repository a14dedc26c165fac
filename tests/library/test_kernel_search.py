# SPDX-License-Identifier: MIT
"""The search for the Triton kernels of an operator that does not list them."""

from functools import partial, wraps
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.library import wrap_triton

import torchpar
from torchpar.library.kernel_search import TritonKernels

triton: Any = pytest.importorskip("triton", reason="the kernels are written in Triton")


@triton.jit
def one(x: Any) -> None: ...


@triton.jit
def two(x: Any) -> None: ...


@triton.jit
def unnamed(x: Any) -> None: ...


tuned = triton.autotune([triton.Config({})], key=[])(triton.heuristics({})(two))
module: Any = ModuleType("module")
module.one = one


def by_a_name(x: Any) -> None:
    wrap_triton(one)[1,](x)


def by_the_documented_name(x: Any) -> None:
    torch.library.wrap_triton(one)[1,](x)


def of_a_namespace(x: Any) -> None:
    torch.library.wrap_triton(module.one)[1,](x)


def by_functions(x: Any) -> None:
    by_a_name(x)
    [of_a_namespace(each) for each in x]


def within_a_function(x: Any) -> None:
    def launch() -> None:
        wrap_triton(one)[1,](x)

    launch()


def of_both(x: Any) -> None:
    wrap_triton(tuned)[1,](x)
    by_functions(x)


def of_a_closure(kernel: Any) -> Any:
    def launch(x: Any) -> None:
        wrap_triton(kernel)[1,](x)

    return launch


def by_defaults(x: Any, kernel: Any = one, *, other: Any = two) -> None:
    wrap_triton(kernel)[1,](wrap_triton(other))


class Launcher:
    def launch(self, x: Any) -> None:
        wrap_triton(two)[1,](x)


launcher = Launcher()


def by_a_method(x: Any) -> None:
    launcher.launch(x)


def recursive(x: Any) -> None:
    recursive(wrap_triton(two))


@torchpar.library.triton_op("kernel_search::named", mutates_args=("x",))
def operator(x: torch.Tensor) -> None:
    wrap_triton(one)[1,](x)
    if len(x) > 1:
        operator(x[1:])
        torch.ops.kernel_search.named(x[1:])


def of_an_operator(x: Any) -> None:
    operator(x)


def of_an_operators_name(x: Any) -> None:
    torch.ops.kernel_search.named(x)


class Raises:
    @property
    def kernel(self) -> Any:
        raise RuntimeError


raises = Raises()


def of_a_property(x: Any) -> None:
    raises.kernel[1,](wrap_triton(two))


def of_none(x: Any) -> None:
    torch.nn.functional.linear(x, x)


@wraps(of_both)
def wrapper(x: Any) -> None: ...


@pytest.mark.parametrize(
    "function, expected",
    [
        (by_a_name, {one}),
        (by_the_documented_name, {one}),
        (of_a_namespace, {one}),
        (by_functions, {one}),
        (within_a_function, {one}),
        (of_both, {one, two}),
        (of_a_closure(tuned), {two}),
        (partial(of_a_closure(two), x=1), {two}),
        (by_defaults, {one, two}),
        (by_a_method, {two}),
        (recursive, {two}),
        (wrapper, {one, two}),
        (of_an_operator, {one}),
        (of_an_operators_name, {one}),
        (of_a_property, {two}),
        (of_none, set()),
        (len, set()),
    ],
)
def test_the_kernels_that_a_function_names_are_found(function: Any, expected: set[Any]) -> None:
    found = [*TritonKernels(function)]
    assert set(found) == expected
    assert len(found) == len(expected)


@pytest.mark.slow
def test_pytorchs_search_overlooks_the_documented_name() -> None:
    from torch._library.triton import get_inner_triton_kernels

    assert get_inner_triton_kernels(by_a_name) == [one]
    overlooked = get_inner_triton_kernels(by_the_documented_name) == []
    assert overlooked, "it finds them now: no search of our own is needed"
