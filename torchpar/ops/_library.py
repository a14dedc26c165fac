# SPDX-License-Identifier: MIT
"""Registration of operators with PyTorch, including every use of PyTorch's private names.

`operator` replaces `torch.library.triton_op`, which imports Triton and Inductor when an operator is
defined: that would be during ``import torchpar``. `register_autograd` replaces
`torch.library.register_autograd`, which supports neither torch.func nor forward-mode differentiation
(pytorch#168393, #170834, #179652). tests/test_registration.py guards each private name.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd
from torch._C._functorch import peek_interpreter_stack
from torch._functorch.utils import enable_single_level_autograd_function
from torch._library.triton import triton_ops_to_kernels
from torch._prims_common import compute_elementwise_output_strides
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.autograd import forward_ad
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction
from torch.library import _impls

NAMESPACE = "torchpar"
library = torch.library.Library(NAMESPACE, "FRAGMENT")
ops = getattr(torch.ops, NAMESPACE)

Wrap = Callable[[Any], Any] | None
"""A function that a launcher applies to a Triton kernel before launching it; None for a real launch."""

Rule = Callable[[Callable[..., Any]], Callable[..., Any]]
"""A decorator that registers a function."""


def supports_tma(wrap: Wrap) -> bool:
    """Whether a kernel that ``wrap`` launches may make TMA descriptors, which need memory at the launch.

    Inductor's Python wrapper allocates that memory. Its C++ wrapper, and so AOTInductor, allocates enough for
    one program in torch 2.11, and for all in 2.15. Other compilers, and uncompiled graphs, allocate nothing.
    """
    if wrap is None:
        return True
    from torch._inductor import config
    from torch._inductor.virtualized import V

    by_inductor = V.aot_compilation or isinstance(V.fake_mode, FakeTensorMode)
    if not by_inductor or config.fx_wrapper:
        return False
    return not config.cpp_wrapper or tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 15)


_functions: dict[str, Callable[..., Any]] = {}  # by name
_PLAIN = (Tensor, torch.nn.Parameter)


class _Kernels:
    """The Triton kernels of an operator, imported when a compiler asks for their source."""

    def __init__(self, module: str):
        self.module = module

    def __iter__(self) -> Iterator[Any]:
        from triton import JITFunction

        module = import_module(f"..kernels.{self.module}", __package__)
        return (value for value in vars(module).values() if isinstance(value, JITFunction))


def operator(
    schema: str, *, kernels: str, opaque: Callable[..., bool] = lambda *args, **kwargs: False
) -> Rule:
    """Register the decorated function as ``torch.ops.torchpar.<name>`` for every device.

    The function takes the operator's arguments and ``wrap``, which it passes to the kernel launcher.
    `torch.compile` and AOTInductor decompose the operator: they trace the kernel, or the ATen operators of
    the CPU path. The operator stays whole in `torch.export`, as triton_op does; for DTensors, whose sharding
    rules are the operator's; and for data-dependent sizes, for which no tiles can be chosen.

    Args:
        schema: as in `torch.library.define`, without the namespace.
        kernels: the module in `torchpar.kernels` whose source belongs in a compiler's cache key.
        opaque: a function of the arguments; where it is true, the operator also stays whole.
    """
    name = schema.partition("(")[0]

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def eager(*args: Any, **kwargs: Any) -> Any:
            with _device_of(args):
                return function(*args, **kwargs, wrap=None)

        def traced(mode: Any, op: Any, types: Any, args: Any, kwargs: Any) -> Any:
            from torch.export._trace import custom_triton_ops_decomposition_disabled
            from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

            tensors = [arg for arg in args if isinstance(arg, Tensor)]
            if (
                any(map(is_dtensor, tensors))
                or free_unbacked_symbols(tensors)
                or custom_triton_ops_decomposition_disabled()
                or opaque(*args, **kwargs)
            ):
                return mode.__torch_dispatch__(op, types, args, kwargs)
            with mode, _device_of(args):
                return function(*args, **kwargs, wrap=torch.library.wrap_triton)

        _functions[name] = function
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, eager, "CompositeExplicitAutograd")
        torch.library.register_torch_dispatch(qualified(name), FunctionalTensorMode, traced, lib=library)
        triton_ops_to_kernels[qualified(name)] = _Kernels(kernels)  # type: ignore[assignment]
        return function

    return register


def _device_of(args: tuple[Any, ...]) -> AbstractContextManager[None]:
    """Make the tensors' GPU current: Triton launches on the current one, and tiles are chosen for it."""
    device = next((arg.device for arg in args if isinstance(arg, Tensor) and arg.is_cuda), None)
    if device is None:
        return nullcontext()
    if torch.cuda.is_initialized():
        is_current = device.index == torch.cuda.current_device()
        return nullcontext() if is_current else torch.cuda.device(device)
    return torch.cuda.device(device) if torch.cuda.is_available() else nullcontext()


def qualified(name: str) -> str:
    return f"{NAMESPACE}::{name}"


def register_fake(name: str) -> Rule:
    rule: Rule = torch.library.register_fake(qualified(name), lib=library)
    return rule


def register_vmap(name: str) -> Rule:
    rule: Rule = torch.library.register_vmap(qualified(name), lib=library)
    return rule


def batch_first(t: Tensor, dim: int | None, batch_size: int) -> Tensor:
    """``t`` with its batch dimension first, or expanded to a batch if ``dim`` is None."""
    return t.expand(batch_size, *t.shape) if dim is None else t.movedim(dim, 0)


def sample(t: Tensor, dim: int | None) -> Tensor:
    """A tensor of the shape, dtype and device of one sample of ``t``; its values are undefined."""
    return t if dim is None else t.new_empty(()).expand([size for d, size in enumerate(t.shape) if d != dim])


def register_autograd(
    name: str,
    backward: Callable[..., Any],
    *,
    setup_context: Callable[..., None],
    formula: Callable[..., Any],
    decompose: Callable[..., bool] = lambda *args, **kwargs: False,
) -> None:
    """Register a backward as `torch.library.register_autograd` does, and a formula for all other derivatives.

    ``formula`` computes the operator from differentiable ATen operators. It is evaluated under
    torch.func transforms, inside `torch.autograd.forward_ad.dual_level`, and for arguments for which
    ``decompose`` is true. ``ctx.kwargs`` holds the keyword arguments; ``ctx.needs_input_grad`` has one entry
    for all of them, its last.
    """
    overload = getattr(ops, name).default

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
            _register_sharding_rules()
        # With plain tensors on a CPU, and no mode, the dispatcher would take 8 µs to find the function.
        direct = not (torch._C._len_torch_dispatch_stack() or f"{NAMESPACE}/{name}/CPU" in _impls)
        requires_grad = False
        for arg in args:
            if isinstance(arg, Tensor):
                requires_grad = requires_grad or arg.requires_grad
                direct = direct and arg.is_cpu and type(arg) in _PLAIN
        if (
            peek_interpreter_stack() is not None
            or forward_ad._current_level >= 0
            or decompose(*args, **kwargs)
        ):
            return formula(*args, **kwargs)
        if requires_grad and torch.is_grad_enabled():
            return Differentiable.apply(*args, kwargs)
        with _AutoDispatchBelowAutograd():
            if direct:
                return _functions[name](*args, **kwargs, wrap=None)
            return overload(*args, **kwargs)

    library.impl(name, autograd, "Autograd")


def with_derivatives(
    name: str,
    backward: Callable[..., Any],
    *,
    setup_context: Callable[..., None],
    jvp: Callable[..., Any],
) -> Callable[..., Any]:
    """A formula for `register_autograd` that computes the operator itself, also under transforms.

    ``jvp`` takes ``ctx`` and the tangents; ``ctx.saved_tensors`` are those that ``setup_context`` saves.
    """
    overload = getattr(ops, name).default

    # `torch.autograd.Function` would dispatch to the transforms again, which have called the operator.
    class Formula(_SingleLevelFunction):
        @staticmethod
        def forward(*args: Any) -> Any:
            # The transforms below this one differentiate too.
            with torch.enable_grad(), _set_fwd_grad_enabled(True), _AutoDispatchBelowAutograd():
                return overload(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            setup_context(ctx, inputs, output)
            ctx.save_for_forward(*ctx.to_save)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            return backward(ctx, *grads)

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
            # PyTorch turns forward mode off here, so that the tangents of the transforms below would be 0.
            with _set_fwd_grad_enabled(True):
                primals = [forward_ad.unpack_dual(t, level=0).primal for t in ctx.saved_tensors]
                return jvp(SimpleNamespace(saved_tensors=primals), *tangents)

    def formula(*args: Any) -> Any:
        with enable_single_level_autograd_function():
            return Formula.apply(*args)  # type: ignore[attr-defined]

    return formula


def register_autocast(name: str, *, cast: bool = True, dtype: torch.dtype | None = None) -> None:
    """Run the operator in ``dtype``, by default autocast's, or without ``cast`` in that of its arguments.

    `torch.library.register_autocast` fixes the dtype at registration; this rule follows
    ``torch.autocast(dtype=...)``. Without a rule, autocast would act on the operators inside.
    """
    overload = getattr(ops, name).default

    def register(device: str, key: str) -> None:
        def autocast(*args: Any, **kwargs: Any) -> Any:
            chosen = dtype or torch.get_autocast_dtype(device)

            def converted(arg: Any) -> Any:
                if isinstance(arg, Tensor) and arg.is_floating_point() and arg.dtype != torch.float64:
                    return arg.to(chosen)
                return arg

            with torch.autocast(device, enabled=False):
                return overload(*(map(converted, args) if cast else args), **kwargs)

        library.impl(name, autocast, key)

    register("cpu", "AutocastCPU")
    register("cuda", "AutocastCUDA")


def is_dtensor(t: Tensor) -> bool:
    """Whether ``t`` is a DTensor; this does not import DTensor's module."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def is_split(t: Any, dim: int) -> bool:
    """Whether ``t`` is a DTensor whose dimension ``dim`` (negative) is split over ranks."""
    return (
        is_dtensor(t)
        and t.dim() >= -dim
        and any(placement.is_shard(dim % t.dim()) for placement in t.placements)
    )


_sharding_rules: dict[str, Callable[..., Any]] = {}


def register_sharding(name: str) -> Rule:
    """Register a sharding rule as `torch.distributed.tensor.experimental.register_sharding` does, but later.

    Importing DTensor would slow ``import torchpar``. The first call of an operator after DTensor was imported
    registers the rules, in time: the operator's Autograd key comes before DTensor's dispatch.
    """

    def register(rule: Callable[..., Any]) -> Callable[..., Any]:
        _sharding_rules[name] = rule
        return rule

    return register


def _register_sharding_rules() -> None:
    if "torch.distributed.tensor" not in sys.modules:
        return
    from torch.distributed.tensor.experimental import register_sharding

    while _sharding_rules:
        name, rule = _sharding_rules.popitem()
        register_sharding(getattr(ops, name).default)(rule)


def empty_elementwise(operands: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor of the broadcast shape of ``operands``, with ATen's strides."""
    shape = operands[0].shape
    if all(t.shape == shape and t.is_contiguous() for t in operands):  # the general rule takes 40 µs
        return torch.empty(shape, dtype=dtype, device=device)
    shape = torch.broadcast_shapes(*(t.shape for t in operands))
    strides = compute_elementwise_output_strides(*(t.expand(shape) for t in operands))
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)
