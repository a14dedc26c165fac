# SPDX-License-Identifier: MIT
"""Rules for modes, tensor subclasses, compilers, DTensors and a GPU, and the cost of a call."""

import copy
import io
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.func import functionalize, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map_only

from torchpar.testing.case import (
    LAYOUTS,
    LOW,
    Attempts,
    Case,
    NotRun,
    Rules,
    Tensors,
    Wrong,
    accurate,
    cast,
    close,
    expect_floating,
    gradients,
    normal_like,
    rolled,
    same_bits,
    same_metadata,
)
from torchpar.testing.derivatives import pulled_back
from torchpar.testing.placements import every_placement

RULES = Rules()


# Modes, and other kinds of tensors


@RULES.add("autocast")
def _(case: Case) -> Attempts:
    expect_floating(case)

    def check(dtype: torch.dtype, given: torch.dtype, batch: bool = False) -> None:
        operands = cast(case.operands, given)
        native, device = case.takes(operands), operands[0].device.type
        with torch.autocast(device, dtype):
            actual = case.op(*operands)
            if batch:
                actual = tuple(y[0] for y in vmap(case.op)(*(t[None] for t in operands)))
            theirs = case.plain(*operands)
            with torch.autocast(device, enabled=False):
                same_bits(case.op(*operands), native)
        if case.reference is not None:
            native = theirs
        elif given == torch.float32 and actual[0].dtype != native[0].dtype:
            native = case.op(*cast(operands, dtype))
        accurate(actual, native, case.plain(*cast(operands, torch.float64)))
        if actual[0].dtype == torch.float32:
            keeps.append(dtype)

    keeps: list[torch.dtype] = []
    for dtype in LOW:
        yield f"to {dtype}", partial(check, dtype, torch.float32)
        yield f"to {dtype}, in vmap", partial(check, dtype, torch.float32, True)
    yield "of float64", partial(check, torch.bfloat16, torch.float64)
    return "it keeps float32" if keeps else "it casts to autocast's dtype"


@RULES.add("grad modes")
def _(case: Case) -> Attempts:
    def check(mode: Any) -> None:
        expected = case.op(*case.operands)
        xs = [t.clone().requires_grad_(t.is_floating_point()) for t in case.operands]
        with mode():
            ys = case.op(*xs)
            close(case.op(*(t.clone() for t in case.operands)), expected)
        close(ys, expected)
        if any(y.requires_grad or y.is_inference() != (mode is torch.inference_mode) for y in ys):
            raise Wrong("the result requires a gradient, or is no inference tensor")

    for mode in (torch.no_grad, torch.inference_mode):
        yield mode.__name__, partial(check, mode)


@RULES.add("functionalize, and a copied graph")
def _(case: Case) -> None:
    expected = case.op(*case.operands)
    close(functionalize(case.op)(*case.operands), expected)
    graph = make_fx(functionalize(case.op))(*case.operands)
    close(copy.deepcopy(graph)(*case.operands), expected)


class _Wrapped(Tensor):
    """A tensor subclass that computes with the tensor inside."""

    @staticmethod
    def __new__(cls, inside: Tensor) -> Any:
        how: Any = {"strides": inside.stride(), "dtype": inside.dtype, "device": inside.device}
        wrapped = Tensor._make_wrapper_subclass(cls, inside.shape, **how)
        wrapped.inside = inside  # type: ignore[attr-defined]
        return wrapped

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map_only(_Wrapped, lambda t: t.inside, (args, kwargs or {}))
        return tree_map_only(Tensor, cls, func(*args, **kwargs))


def _inner(tensors: Tensors) -> Tensors:
    if any(not isinstance(t, _Wrapped) for t in tensors):
        raise Wrong("the result is no tensor of the subclass")
    return tuple(t.inside for t in tensors)  # type: ignore[attr-defined]


@RULES.add("tensor subclass")
def _(case: Case) -> Attempts:
    def pulled() -> None:
        xs = tuple(_Wrapped(t).requires_grad_() for t in case.floating)
        ys = case.smooth(case.op)(*xs)
        incoming = [_Wrapped(normal_like(y)) for y in case.oracle(*case.floating)]
        case.compare(_inner(gradients(ys, xs, incoming)), pulled_back(case.oracle, case))

    yield "values", lambda: close(_inner(case.op(*map(_Wrapped, case.operands))), case.op(*case.operands))
    if case.floating:
        yield "gradients", pulled


# Compilers


def _compiled(case: Case, **how: Any) -> Attempts:
    def call(*args: Any, **kwargs: Any) -> Any:
        return case.callable(*args, **kwargs)

    def values(operands: Tensors) -> None:
        expected, actual = case.takes(operands), compiled(*operands)
        close(actual, expected)
        same_metadata(actual, expected)

    def pulled() -> None:
        transform = partial(pulled_back, case=case, layout=LAYOUTS["permuted"])
        case.compare(transform(case.smooth(compiled)), transform(case.oracle))

    torch._dynamo.reset()
    compiled = case.bind(torch.compile(call, fullgraph=True, **how))
    yield "values", partial(values, case.operands)
    if case.floating:
        yield "gradients", pulled
    for name, operands in case.resized(lambda t, dim: torch.cat([t, t], dim)) if "dynamic" in how else ():
        yield f"twice {name}", partial(values, operands)
    torch._dynamo.reset()


def _expect_compiler() -> None:
    if not any(map(shutil.which, filter(None, [os.environ.get("CXX"), "g++", "clang++"]))):
        raise NotRun("no C++ compiler")


def _by_inductor(case: Case) -> Attempts:
    _expect_compiler()
    from torch._inductor import config

    with config.patch(compile_threads=1):  # processes would take longer to start
        yield from _compiled(case, backend="inductor")


RULES.add("torch.compile")(partial(_compiled, backend="aot_eager"))
RULES.add("torch.compile, dynamic")(partial(_compiled, backend="aot_eager", dynamic=True))
RULES.add("torch.compile by Inductor", once=True)(_by_inductor)


def _export(case: Case) -> Any:
    class Module(torch.nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return case.callable(*args, **kwargs)

    return torch.export.export(Module(), *case.arguments(case.operands))


@RULES.add("torch.export, save and load", once=True)
def _(case: Case) -> Attempts:
    def reloaded() -> Any:
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        return torch.export.load(file)

    def check(stage: Callable[[], Any]) -> None:
        close(case.bind(stage().module())(*case.operands), case.op(*case.operands))

    program = _export(case)
    yield "exported", partial(check, lambda: program)
    yield "loaded", partial(check, reloaded)
    yield "decomposed", partial(check, program.run_decompositions)
    whole = any(node.target is case.overload for node in program.graph.nodes)
    return "the graph holds the operator" if whole else "the graph holds other operators"


@RULES.add("AOTInductor", once=True, slow=True)
def _(case: Case) -> None:
    _expect_compiler()
    with TemporaryDirectory() as folder:
        package = str(Path(folder) / "operator.pt2")
        torch._inductor.aoti_compile_and_package(_export(case), package_path=package)
        close(case.bind(torch._inductor.aoti_load_package(package))(*case.operands), case.op(*case.operands))


# Ranks, a GPU, and speed

RULES.add("DTensor")(every_placement)


@RULES.add("CUDA graph")
def _(case: Case) -> None:
    """Captured on another stream, and replayed with other operands in the same memory."""
    if not torch.cuda.is_available():
        raise NotRun("no GPU")
    operands = [t.cuda() for t in case.operands]
    others = [rolled(t, 1).cuda() for t in case.operands]
    case.takes(operands)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = case.op(*operands)
    for t, changed in zip(operands, others, strict=True):
        t.copy_(changed)
    graph.replay()
    close(actual, case.op(*others))


@RULES.add("cost of a call")
def _(case: Case) -> str:
    def microseconds(function: Callable[..., Any]) -> float:
        (args, kwargs), times = case.arguments(case.operands), []
        for _ in range(100):
            start = time.perf_counter()
            function(*args, **kwargs)
            times.append(1e6 * (time.perf_counter() - start))
        return median(times)

    if any(t.is_cuda for t in case.operands):
        raise NotRun("operands on a GPU, which works later")
    own = f"{microseconds(case.callable):.1f} µs"
    return own if case.reference is None else f"{own}, the reference {microseconds(case.reference):.1f} µs"
