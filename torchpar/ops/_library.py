# SPDX-License-Identifier: MIT
"""Registration of operators: what torch.library lacks, and every use of what is private to PyTorch.

`operator` does what `torch.library.triton_op` does, which cannot be used here: it imports Triton and
Inductor when the operator is defined, that is during ``import torchpar``. `register_autograd` adds
what `torch.library.register_autograd` lacks: torch.func and forward-mode differentiation
(pytorch#168393, #170834, #179652). tests/test_registration.py guards each private name.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd
from torch._C._functorch import peek_interpreter_stack
from torch._library.triton import triton_ops_to_kernels
from torch._prims_common import compute_elementwise_output_strides
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.autograd import forward_ad

NAMESPACE = "torchpar"
library = torch.library.Library(NAMESPACE, "FRAGMENT")

Wrap = Callable[[Any], Any]
"""What a launcher applies to a Triton kernel before launching it."""

Rule = Callable[[Callable[..., Any]], Callable[..., Any]]
"""A decorator that registers a function."""


def _launch_directly(kernel: Any) -> Any:
    return kernel


def may_describe(wrap: Wrap) -> bool:
    """Whether a kernel that is wrapped so may make TMA descriptors.

    The C++ wrapper of torch 2.11's Inductor makes room for those of one program; 2.15's for those of all.
    """
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    return wrap is _launch_directly or version >= (2, 15)


class _Kernels:
    """The Triton kernels behind an operator, imported when a compiler asks for their source."""

    def __init__(self, module: str):
        self.module = module

    def __iter__(self) -> Iterator[Any]:
        from triton import JITFunction

        module = import_module(f"torchpar.kernels.{self.module}")
        return (value for value in vars(module).values() if isinstance(value, JITFunction))


def operator(
    schema: str, *, kernels: str, opaque: Callable[..., bool] = lambda *args, **kwargs: False
) -> Rule:
    """Register the decorated function as ``torch.ops.torchpar.<name>`` for every device.

    The function takes the operator's arguments and ``wrap``, which it hands to the kernel launcher.
    Tracers (`torch.compile`, AOTInductor) look through the operator: they see the kernel, or the
    ATen operators of the CPU path. `torch.export` keeps the operator whole, as it does for triton_op;
    so does any tracer for operands of a size that only the data tells, by which no tiles can be chosen.

    Args:
        schema: as in `torch.library.define`, without the namespace.
        kernels: the module in `torchpar.kernels` whose source belongs in a compiler's cache key.
        opaque: tells by the arguments whether tracers are to keep the operator whole.
    """
    name = schema.partition("(")[0]

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def eager(*args: Any, **kwargs: Any) -> Any:
            with _device_of(args):
                return function(*args, **kwargs, wrap=_launch_directly)

        def traced(mode: Any, op: Any, types: Any, args: Any, kwargs: Any) -> Any:
            from torch.export._trace import custom_triton_ops_decomposition_disabled
            from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

            unknown = free_unbacked_symbols([arg for arg in args if isinstance(arg, Tensor)])
            if custom_triton_ops_decomposition_disabled() or unknown or opaque(*args, **kwargs):
                return mode.__torch_dispatch__(op, types, args, kwargs)
            with mode, _device_of(args):
                return function(*args, **kwargs, wrap=torch.library.wrap_triton)

        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, eager, "CompositeExplicitAutograd")
        torch.library.register_torch_dispatch(qualified(name), FunctionalTensorMode, traced, lib=library)
        triton_ops_to_kernels[qualified(name)] = _Kernels(kernels)  # type: ignore[assignment]
        return function

    return register


def _device_of(args: tuple[Any, ...]) -> AbstractContextManager[None]:
    """Makes the tensors' GPU the current one, on which Triton launches, and for which tiles are chosen."""
    device = next((arg.device for arg in args if isinstance(arg, Tensor) and arg.is_cuda), None)
    return torch.cuda.device(device) if device and torch.cuda.is_available() else nullcontext()


def qualified(name: str) -> str:
    return f"{NAMESPACE}::{name}"


def register_fake(name: str) -> Rule:
    rule: Rule = torch.library.register_fake(qualified(name), lib=library)
    return rule


def register_vmap(name: str) -> Rule:
    rule: Rule = torch.library.register_vmap(qualified(name), lib=library)
    return rule


def batch_first(t: Tensor, dim: int | None, batch_size: int) -> Tensor:
    """An argument of a vmap rule with its batch dimension first; repeated without a copy if it has none."""
    return t.expand(batch_size, *t.shape) if dim is None else t.movedim(dim, 0)


def sample(t: Tensor, dim: int | None) -> Tensor:
    """What an argument of a vmap rule is to the function under the vmap: for its checks, not its values."""
    return t if dim is None else t.new_empty(()).expand([size for d, size in enumerate(t.shape) if d != dim])


def register_autograd(
    name: str,
    backward: Callable[..., Any],
    *,
    setup_context: Callable[..., None],
    formula: Callable[..., Any],
    decompose: Callable[..., bool] = lambda *args, **kwargs: False,
) -> None:
    """As `torch.library.register_autograd`, with ``formula`` in its place where that does not work.

    ``formula`` computes the operator from differentiable ATen operators. It is evaluated under
    torch.func transforms, inside `torch.autograd.forward_ad.dual_level`, and for arguments for which
    ``decompose`` is true. A call also costs less than through the function that
    `torch.library.register_autograd` generates. Keyword arguments are ``ctx.kwargs``, and stand last in
    ``ctx.needs_input_grad``.
    """
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            *args, kwargs = inputs
            with _AutoDispatchBelowAutograd():
                output = overload(*args, **kwargs)
            ctx.kwargs = kwargs
            setup_context(ctx, tuple(args), output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            gradients = backward(ctx, *grads)
            return *(gradients if isinstance(gradients, tuple) else (gradients,)), None

    def autograd(*args: Any, **kwargs: Any) -> Any:
        if _sharding_rules:
            _hand_over_sharding_rules()
        if (
            peek_interpreter_stack() is not None
            or forward_ad._current_level >= 0
            or decompose(*args, **kwargs)
        ):
            return formula(*args, **kwargs)
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            return Differentiable.apply(*args, kwargs)
        with _AutoDispatchBelowAutograd():
            return overload(*args, **kwargs)

    library.impl(name, autograd, "Autograd")


def register_autocast(name: str, *, cast: bool = True) -> None:
    """Run the operator in the autocast dtype, as ATen's matrix products are, or in its arguments' own.

    `torch.library.register_autocast` fixes the dtype at registration; this one follows
    ``torch.autocast(dtype=...)``. Without a rule, autocast would act on what an operator calls.
    """
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default

    def register(device: str, key: str) -> None:
        def autocast(*args: Any, **kwargs: Any) -> Any:
            dtype = torch.get_autocast_dtype(device)

            def lowered(arg: Any) -> Any:
                if isinstance(arg, Tensor) and arg.is_floating_point() and arg.dtype != torch.float64:
                    return arg.to(dtype)
                return arg

            with torch.autocast(device, enabled=False):
                return overload(*(map(lowered, args) if cast else args), **kwargs)

        library.impl(name, autocast, key)

    register("cpu", "AutocastCPU")
    register("cuda", "AutocastCUDA")


def is_dtensor(t: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def is_split(t: Any, dim: int) -> bool:
    """Whether ``t`` is a DTensor and ``dim`` is split over ranks."""
    return (
        is_dtensor(t)
        and t.dim() >= -dim
        and any(placement.is_shard(dim % t.dim()) for placement in t.placements)
    )


_sharding_rules: dict[str, Callable[..., Any]] = {}


def register_sharding(name: str) -> Rule:
    """As `torch.distributed.tensor.experimental.register_sharding`, once DTensor has been imported.

    Importing it takes longer than importing torchpar may. An operator's first call after that import
    hands the rules over: its Autograd key comes before DTensor's dispatch.
    """

    def register(rule: Callable[..., Any]) -> Callable[..., Any]:
        _sharding_rules[name] = rule
        return rule

    return register


def _hand_over_sharding_rules() -> None:
    if "torch.distributed.tensor" not in sys.modules:
        return
    from torch.distributed.tensor.experimental import register_sharding

    while _sharding_rules:
        name, rule = _sharding_rules.popitem()
        register_sharding(getattr(getattr(torch.ops, NAMESPACE), name).default)(rule)


def empty_elementwise(a: Tensor, b: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised result of the broadcast of ``a`` and ``b``, laid out as ATen would lay it out."""
    shape = torch.broadcast_shapes(a.shape, b.shape)
    strides = compute_elementwise_output_strides(a.expand(shape), b.expand(shape))
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)
