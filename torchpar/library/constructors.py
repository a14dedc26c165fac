# SPDX-License-Identifier: MIT
"""`custom_op` and `triton_op`: make an operator of a function."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from torchpar.library.flops import Formula
from torchpar.library.kernel_search import TritonKernels
from torchpar.library.private import (
    FunctionalTensorMode,
    has_unbacked_symbols,
    is_decomposition_disabled,
    set_wrap_triton_enabled,
    triton_ops_to_kernels,
)
from torchpar.library.registration import CustomOpDef
from torchpar.library.rules import Function
from torchpar.library.sharding import is_dtensor
from torchpar.library.transforms import tensors_of

if TYPE_CHECKING:
    from torch._ops import OpOverload


@overload
def custom_op(
    name: str,
    fn: None = None,
    /,
    *,
    mutates_args: str | Iterable[str],
    device_types: str | Sequence[str] | None = None,
    schema: str | None = None,
    tags: torch.Tag | Sequence[torch.Tag] | None = None,
) -> Callable[[Function], "CustomOpDef"]: ...


@overload
def custom_op(
    name: str,
    fn: Function,
    /,
    *,
    mutates_args: str | Iterable[str],
    device_types: str | Sequence[str] | None = None,
    schema: str | None = None,
    tags: torch.Tag | Sequence[torch.Tag] | None = None,
) -> "CustomOpDef": ...


def custom_op(
    name: str,
    fn: Function | None = None,
    /,
    *,
    mutates_args: str | Iterable[str],
    device_types: str | Sequence[str] | None = None,
    schema: str | None = None,
    tags: torch.Tag | Sequence[torch.Tag] | None = None,
) -> "CustomOpDef | Callable[[Function], CustomOpDef]":
    """Make an operator of a function, which compilers do not look into: `torch.library.custom_op`.

    Args:
        name: ``"namespace::name"``.
        fn: the function; without it, a decorator is returned.
        mutates_args: the names of the tensors that the function writes to, or "unknown". Such an
            operator has no gradient.
        device_types: the devices that the function serves, such as "cpu" or "cuda"; by default all.
        schema: ``"(Tensor x) -> Tensor"``; by default the schema of the function's annotations.
        tags: the operator's tags.

    Returns:
        A `CustomOpDef`, or a decorator that makes one.

    Raises:
        ValueError: a name or a schema that PyTorch does not take; a schema that contradicts
            ``mutates_args``; ``device_types`` of a function that has neither a tensor nor a device
            among its arguments.
        NotImplementedError: a keyword-only tensor, which has no gradient and no placement
            (pytorch#167977); a schema whose results alias arguments, and the tags for them, inplace
            and out.
    """

    def make(fn: Function) -> CustomOpDef:
        return CustomOpDef(name, fn, _schema(name, fn, mutates_args, schema), device_types, tags)

    return make if fn is None else make(fn)


@overload
def triton_op(
    name: str,
    fn: None = None,
    /,
    *,
    mutates_args: str | Iterable[str],
    schema: str | None = None,
    kernels: Callable[[], Iterable[object]] | None = None,
    opaque: Callable[..., bool] = ...,
    trusted: bool = False,
    played: bool = True,
    flops: Formula | None = None,
) -> Callable[[Function], "CustomOpDef"]: ...


@overload
def triton_op(
    name: str,
    fn: Function,
    /,
    *,
    mutates_args: str | Iterable[str],
    schema: str | None = None,
    kernels: Callable[[], Iterable[object]] | None = None,
    opaque: Callable[..., bool] = ...,
    trusted: bool = False,
    played: bool = True,
    flops: Formula | None = None,
) -> "CustomOpDef": ...


def triton_op(
    name: str,
    fn: Function | None = None,
    /,
    *,
    mutates_args: str | Iterable[str],
    schema: str | None = None,
    kernels: Callable[[], Iterable[object]] | None = None,
    opaque: Callable[..., bool] = lambda *args, **kwargs: False,
    trusted: bool = False,
    played: bool = True,
    flops: Formula | None = None,
) -> "CustomOpDef | Callable[[Function], CustomOpDef]":
    """Make an operator of a function that launches Triton kernels: `torch.library.triton_op`.

    Compilers look into the operator: `torch.compile` and AOTInductor trace the kernels, and the
    ATen operators beside them. The operator stays one node in `torch.export`; for DTensors, since
    the operator has the sharding rules; for data-dependent sizes, for which no tiles can be chosen;
    and on devices for which `CustomOpDef.register_kernel` has registered another function.
    Triton is imported when a compiler asks for the kernels, and not before.

    The function wraps its kernels in `torch.library.wrap_triton`. Or it takes a keyword argument
    ``wrap``, which the schema leaves out: None for a real launch, else a function to apply to a
    kernel.

    Args:
        name, fn, mutates_args, schema: as for `custom_op`.
        kernels: returns the kernels, whose source belongs in a compiler's cache key; by default
            the kernels that the function wraps.
        opaque: a function of the arguments; where it returns True, compilers do not look into the
            operator.
        trusted: you promise that the function returns new tensors, and that it may be called
            without the dispatcher. Then results are not searched for memory of the arguments. A
            call with dense tensors, which nothing intercepts, is dispatched once, to autograd,
            which calls the function. Grad mode is as the caller has it if no argument requires a
            gradient. Kernels that C++ registers for this operator are passed over.
        played: whether C++ may play calls on a GPU, where ``python -m torchpar build`` has run: the
            function's launches, instead of the function (docs/operators.md). It is then
            called for the first three calls with operands of the same layouts, or for the first if
            it is trusted. Give False for a function that depends on more than the layouts of its
            tensors and its other arguments, or that has an effect beside its results.
        flops: what `FlopCounterMode` counts for a call, as `CustomOpDef.register_flops` takes it.

    Returns:
        A `CustomOpDef`, or a decorator that makes one.

    Raises:
        ValueError, NotImplementedError: as `custom_op`.
    """

    def make(fn: Function) -> CustomOpDef:
        parameter = signature(fn).parameters.get("wrap")
        takes_wrap = parameter is not None and parameter.kind == parameter.KEYWORD_ONLY
        traced = partial(fn, wrap=torch.library.wrap_triton) if takes_wrap else fn
        untraced = partial(fn, wrap=None) if takes_wrap else set_wrap_triton_enabled(False)(fn)

        def launch(*args: object, **kwargs: object) -> object:
            gpu = _gpu_of(args)
            if gpu is None or gpu.index == torch.cuda.current_device():
                return untraced(*args, **kwargs)
            with torch.cuda.device(gpu):
                return untraced(*args, **kwargs)

        def trace(
            mode: FunctionalTensorMode,
            func: "OpOverload[..., Any]",
            types: Sequence[type],
            args: tuple[object, ...],
            kwargs: dict[str, object],
        ) -> object:
            tensors = list(tensors_of(args))
            if (
                any(map(is_dtensor, tensors))
                or has_unbacked_symbols(*tensors)
                or is_decomposition_disabled()
                or opaque(*args, **kwargs)
                or any(t.device.type in op._kernels for t in tensors)
            ):
                return mode.__torch_dispatch__(func, types, args, kwargs)
            gpu = _gpu_of(args)
            with mode, nullcontext() if gpu is None else torch.cuda.device(gpu):
                return traced(*args, **kwargs)

        launch.__module__ = fn.__module__  # messages of errors show it
        op = CustomOpDef(name, launch, _schema(name, fn, mutates_args, schema))
        op.__doc__ = fn.__doc__
        op.register_torch_dispatch(FunctionalTensorMode, trace)
        op._not_played = "" if played else "played=False was given"
        if trusted and not op._mutated:
            op._trusted = untraced
        found = _Kernels(kernels) if kernels else TritonKernels(fn)
        triton_ops_to_kernels[op._qualname] = found  # type: ignore[assignment]
        if not takes_wrap:
            op.register_fake(fn)
        if flops is not None:
            op.register_flops(flops)
        return op

    return make if fn is None else make(fn)


def _schema(name: str, fn: Function, mutates_args: str | Iterable[str], schema: str | None) -> str:
    """The schema that is given, or the annotations' schema; it must agree with ``mutates_args``."""
    if schema is None:
        return torch.library.infer_schema(fn, mutates_args=mutates_args)
    arguments = torch.parse_schema("f" + schema).arguments
    mutated = {one.name for one in arguments if one.alias_info and one.alias_info.is_write}
    if mutates_args == "unknown":  # infer_schema then takes all tensors as written
        expected = {one.name for one in arguments if "Tensor" in str(one.type)}
    else:
        expected = {mutates_args} if isinstance(mutates_args, str) else set(mutates_args)
    if mutated != expected:  # a compiler would drop a write of which the schema says nothing
        given = f"mutates_args is {mutates_args!r}, but by its schema {schema!r}"
        raise ValueError(f"{name}: {given} the op mutates {mutated or '{}'}; make them agree")
    return schema


class _Kernels:
    """The Triton kernels of an operator, imported when a compiler asks for their source."""

    def __init__(self, kernels: Callable[[], Iterable[object]]):
        self.kernels = kernels

    def __iter__(self) -> Iterator[object]:
        return iter(self.kernels())


def _gpu_of(args: tuple[object, ...]) -> torch.device | None:
    """The tensors' GPU, which must be current: Triton launches on, and for, the current GPU."""
    for arg in args:
        # A fake tensor may name a GPU that this machine lacks.
        if isinstance(arg, Tensor) and arg.is_cuda:
            # Asked first, since to ask whether there is a GPU takes microseconds.
            has_gpu = torch.cuda.is_initialized() or torch.cuda.is_available()
            return arg.device if has_gpu else None
    return None
