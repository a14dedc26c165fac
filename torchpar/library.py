# SPDX-License-Identifier: MIT
"""Custom operators that all of PyTorch supports: in place of `torch.library.custom_op` and `triton_op`.

    @torchpar.library.custom_op("mylib::gram", mutates_args=())
    def gram(x: Tensor) -> Tensor: ...

    gram.register_fake(...)
    gram.register_autograd(backward, setup_context=setup_context)

The decorators and the methods take what PyTorch's take, so that a changed import moves an operator. It then
also has derivatives under torch.func and in forward mode (pytorch#168393, #170834, #179652), and sharding
rules that wait for DTensor. docs/citizen.md shows each rule.

All private names of PyTorch that operators need are used here. tests/test_library.py guards each.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd
from torch._C._functorch import peek_interpreter_stack
from torch._functorch.utils import enable_single_level_autograd_function
from torch._library import custom_ops
from torch._library.triton import (
    get_inner_triton_kernels,
    set_wrap_triton_enabled,
    triton_ops_to_kernels,
)
from torch._library.utils import _c_check_aliasing_constraint
from torch._prims_common import compute_elementwise_output_strides
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.autograd import forward_ad
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

__all__ = ["CustomOpDef", "batch_first", "custom_op", "sample", "triton_op"]

Wrap = Callable[[Any], Any] | None
"""A function that a launcher applies to a Triton kernel before launching it; None for a real launch."""


def custom_op(
    name: str,
    fn: Callable[..., Any] | None = None,
    /,
    *,
    mutates_args: str | Iterable[str],
    device_types: str | Sequence[str] | None = None,
    schema: str | None = None,
    tags: torch.Tag | Sequence[torch.Tag] | None = None,
) -> Any:
    """Make an operator of a function, which compilers do not look into: `torch.library.custom_op`.

    Args:
        name: ``"namespace::name"``.
        fn: the function; without it, a decorator is returned.
        mutates_args: the names of the tensors that the function writes to, or "unknown". Such an operator
            has no gradient.
        device_types: "cpu", "cuda" or others that the function serves; by default all.
        schema: ``"(Tensor x) -> Tensor"``; by default that of the function's annotations.
        tags: of the operator.

    Returns:
        A `CustomOpDef`, or a decorator that makes one.

    Raises:
        ValueError: a name or a schema that PyTorch does not take, or a keyword-only tensor, which has no
            gradient and no placement (pytorch#167977).
    """

    def make(fn: Callable[..., Any]) -> CustomOpDef:
        inferred = schema or torch.library.infer_schema(fn, mutates_args=mutates_args)
        return CustomOpDef(name, fn, inferred, device_types, tags)

    return make if fn is None else make(fn)


def triton_op(
    name: str,
    fn: Callable[..., Any] | None = None,
    /,
    *,
    mutates_args: str | Iterable[str],
    schema: str | None = None,
    kernels: Callable[[], Iterable[Any]] | None = None,
    opaque: Callable[..., bool] = lambda *args, **kwargs: False,
) -> Any:
    """Make an operator of a function that launches Triton kernels: `torch.library.triton_op`.

    Compilers look into it, as into triton_op: `torch.compile` and AOTInductor trace the kernels, and the ATen
    operators beside them. It stays whole in `torch.export`; for DTensors, whose sharding rules are the
    operator's; and for data-dependent sizes, for which no tiles can be chosen. Triton is imported when a
    compiler asks for the kernels, and not before.

    The function wraps its kernels in `torch.library.wrap_triton`. Or it takes a keyword argument ``wrap``, of
    which the schema says nothing: None for a real launch, else a function to apply to a kernel.

    Args:
        name, fn, mutates_args, schema: as for `custom_op`.
        kernels: returns the kernels, whose source belongs in a compiler's cache key; by default those that
            the function wraps.
        opaque: a function of the arguments; where it is true, compilers do not look into the operator.

    Returns:
        A `CustomOpDef`, or a decorator that makes one.
    """

    def make(fn: Callable[..., Any]) -> CustomOpDef:
        parameter = signature(fn).parameters.get("wrap")
        takes_wrap = parameter is not None and parameter.kind == parameter.KEYWORD_ONLY
        traced = partial(fn, wrap=torch.library.wrap_triton) if takes_wrap else fn

        def launch(*args: Any, **kwargs: Any) -> Any:
            with _device_of(args):
                if takes_wrap:
                    return fn(*args, **kwargs, wrap=None)
                with set_wrap_triton_enabled(False):
                    return fn(*args, **kwargs)

        def trace(mode: Any, overload: Any, types: Any, args: Any, kwargs: Any) -> Any:
            from torch.export._trace import custom_triton_ops_decomposition_disabled
            from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

            tensors = [arg for arg in args if isinstance(arg, Tensor)]
            if (
                any(map(is_dtensor, tensors))
                or free_unbacked_symbols(tensors)
                or custom_triton_ops_decomposition_disabled()
                or opaque(*args, **kwargs)
            ):
                return mode.__torch_dispatch__(overload, types, args, kwargs)
            with mode, _device_of(args):
                return traced(*args, **kwargs)

        inferred = schema or torch.library.infer_schema(fn, mutates_args=mutates_args)
        op = CustomOpDef(name, launch, inferred)
        op.__doc__ = fn.__doc__
        op.register_torch_dispatch(FunctionalTensorMode, trace)
        found = _Kernels(kernels or partial(get_inner_triton_kernels, fn))
        triton_ops_to_kernels[op._qualname] = found  # type: ignore[assignment]
        if not takes_wrap:
            op.register_fake(fn)
        return op

    return make if fn is None else make(fn)


_libraries: dict[str, torch.library.Library] = {}  # by the operator's name


class CustomOpDef(custom_ops.CustomOpDef):
    """An operator, ``torch.ops.<namespace>.<name>``, and its rules; `custom_op` and `triton_op` make it.

    The base class lets `opcheck` and the functions of `torch.library` take it; each method is replaced.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        schema: str,
        device_types: str | Sequence[str] | None = None,
        tags: torch.Tag | Sequence[torch.Tag] | None = None,
    ):
        namespace, separator, own = name.partition("::")
        if not (separator and namespace and own):
            raise ValueError(f"the operator's name is {name!r}, expected 'namespace::name'")
        arguments = torch._C.parse_schema(own + schema).arguments  # before an earlier operator is replaced
        tensors = [one.name for one in arguments if one.kwarg_only and "Tensor" in str(one.type)]
        if tensors:
            raise ValueError(f"{name}: {tensors[0]} is a keyword-only tensor; make it positional")
        self._namespace, self._name = namespace, own
        self.__name__, self.__doc__ = own, function.__doc__
        if name in _libraries:  # a notebook defines the operator again
            _libraries.pop(name)._destroy()
        self._lib = _libraries[name] = torch.library.Library(namespace, "FRAGMENT")
        tags = [tags] if isinstance(tags, torch.Tag) else tags or ()
        self._lib.define(own + schema, tags={torch.Tag.pt2_compliant_tag, *tags})
        self._opoverload = getattr(getattr(torch.ops, namespace), own).default
        self._positional = [one for one in arguments if not one.kwarg_only]
        self._keywords = [one for one in arguments if one.kwarg_only]
        self._mutated = [one.name for one in arguments if one.alias_info and one.alias_info.is_write]
        self._is_nested = "Tensor[]" in schema or "Tensor?[]" in schema
        self._kernels: dict[str | None, Callable[..., Any]] = {}  # by device; None for all others
        self._backward: Callable[..., Any] | None = None
        self._setup_context: Callable[..., Any] | None = None
        self._formula = _with_derivatives(self, None)  # which asks for a backward
        self._decompose: Callable[..., bool] | None = None
        self._function = _make_function(own)
        self.register_kernel(device_types, function)
        self._lib.impl(own, self._autograd, "Autograd")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _register_sharding_rules()  # in inference mode the Autograd key is passed over
        return self._opoverload(*args, **kwargs)

    def register_kernel(
        self, device_types: str | Sequence[str] | None, fn: Callable[..., Any] | None = None, /
    ) -> Any:
        """Register a function for tensors on these devices; None means all others."""

        def register(fn: Callable[..., Any]) -> Callable[..., Any]:
            devices: Any = [device_types] if isinstance(device_types, str) else device_types or [None]
            for device in devices:
                if device not in self._kernels:
                    key = torch._C._dispatch_key_for_device(device) if device else "CompositeExplicitAutograd"
                    self._lib.impl(self.__name__, partial(self._run, device), key)
                self._kernels[device] = fn
            return fn

        return register if fn is None else register(fn)

    def _run(self, device: str | None, /, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad() if torch.is_grad_enabled() else nullcontext():  # which takes a microsecond
            result = self._kernels[device](*args, **kwargs)
        _c_check_aliasing_constraint(self._qualname, args, kwargs, result)
        return result

    def set_kernel_enabled(self, device_type: str, enabled: bool = True) -> Any:
        """Refuse to switch kernels; `register_kernel` replaces one."""
        raise NotImplementedError(f"{self._qualname}: kernels cannot be switched, register another instead")

    def register_fake(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Register a function that allocates the result, with its shape, strides, dtype and device."""
        torch.library.register_fake(self._qualname, fn, lib=self._lib)
        return fn

    def register_vmap(self, fn: Callable[..., Any] | None = None) -> Any:
        """Register a batching rule, ``fn(info, in_dims, *args) -> (result, out_dim)``."""

        def register(fn: Callable[..., Any]) -> Callable[..., Any]:
            torch.library.register_vmap(self._qualname, fn, lib=self._lib)
            return fn

        return register if fn is None else register(fn)

    def register_torch_dispatch(self, cls: Any, fn: Callable[..., Any] | None = None) -> Any:
        """Register what the operator does for a tensor subclass, or in a mode."""
        return torch.library.register_torch_dispatch(self._qualname, cls, fn, lib=self._lib)

    def register_autograd(
        self,
        backward: Callable[..., Any],
        /,
        *,
        setup_context: Callable[..., None] | None = None,
        formula: Callable[..., Any] | None = None,
        jvp: Callable[..., Any] | None = None,
        decompose: Callable[..., bool] | None = None,
    ) -> None:
        """Register derivatives: `torch.library.register_autograd`, and more for torch.func and forward mode.

        Under transforms and in forward mode ``formula`` is called in the operator's place, if it is given.
        Otherwise the operator is called, and has the derivatives ``backward`` and ``jvp``.

        Args:
            backward: ``backward(ctx, *grads)`` returns the gradient, or None, of each positional argument.
            setup_context: ``setup_context(ctx, inputs, output)`` saves what the derivatives need. If the
                operator has keyword-only arguments, it also gets ``keyword_only_inputs``.
            formula: the same function, made of differentiable operators of PyTorch.
            jvp: ``jvp(ctx, *tangents)`` returns the tangent of the result; a tangent that is 0 may be None.
                By default it is computed by differentiating ``backward``, which is linear in ``grads``.
            decompose: a function of the arguments; where it is true, ``formula`` is called in any case.

        Raises:
            ValueError: the operator writes to an argument; ``formula`` and ``jvp``; ``decompose`` alone.
        """
        if self._mutated:
            raise ValueError(f"{self._qualname} writes to an argument and cannot have a gradient")
        if formula and jvp:
            raise ValueError(f"{self._qualname}: formula and jvp are given, expected at most one of them")
        if decompose and not formula:
            raise ValueError(f"{self._qualname}: decompose is given without formula, pass both")
        self._backward, self._setup_context, self._decompose = backward, setup_context, decompose
        self._formula = formula or _with_derivatives(self, jvp)

    def register_autocast(
        self, device_type: str | None = None, cast_inputs: torch.dtype | None = None, /, *, cast: bool = True
    ) -> None:
        """Run the operator in ``cast_inputs`` under autocast, by default in the dtype that autocast has.

        `torch.library.register_autocast` fixes the dtype; by default this rule follows
        ``torch.autocast(dtype=…)``. Tensors of float64 and of integers are left as they are. Without a rule,
        autocast would act on the operators inside.

        Args:
            device_type: "cpu" or "cuda"; by default both.
            cast: False leaves all arguments as they are.
        """
        for device in ("cpu", "cuda") if device_type is None else (device_type,):
            rule = partial(self._autocast, device, cast_inputs, cast)
            self._lib.impl(self.__name__, rule, f"Autocast{torch._C._dispatch_key_for_device(device)}")

    def _autocast(
        self, device: str, dtype: torch.dtype | None, cast: bool, /, *args: Any, **kwargs: Any
    ) -> Any:
        chosen = dtype or torch.get_autocast_dtype(device)

        def converted(t: Tensor) -> Tensor:
            return t.to(chosen) if t.is_floating_point() and t.dtype != torch.float64 else t

        if cast:
            args, kwargs = tree_map_only(Tensor, converted, (args, kwargs))
        with torch.autocast(device, enabled=False):
            return self._opoverload(*args, **kwargs)

    def register_sharding(self, rule: Callable[..., Any]) -> Callable[..., Any]:
        """Register a rule for DTensors, as `torch.distributed.tensor.experimental.register_sharding` does.

        Importing DTensor would slow the import of a package. The first call after DTensor was imported
        registers the rule, in time: the operator's Autograd key comes before DTensor's dispatch.

        Raises:
            ValueError: the operator has no result (pytorch#167219).
        """
        schema = self._opoverload._schema
        if not schema.returns:
            raise ValueError(f"{self._qualname}: DTensor shards results, and there is none; return a tensor")
        _sharding_rules[self._opoverload] = rule
        return rule

    def _autograd(self, *args: Any, **kwargs: Any) -> Any:
        _register_sharding_rules()
        if self._mutated:
            return self._write(args, kwargs)
        if is_transformed() or (self._decompose and self._decompose(*args, **kwargs)):
            return self._formula(*args, **kwargs)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            call = _Call(self, kwargs)
            return call.result(self._function.apply(call, *call.flat(args)))
        return self._below(*args, **kwargs)

    def _below(self, *args: Any, **kwargs: Any) -> Any:
        with _AutoDispatchBelowAutograd():
            return self._opoverload(*args, **kwargs)

    def _write(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call an operator that writes to arguments."""
        if is_transformed():
            raise RuntimeError(f"{self._qualname} writes to an argument: no torch.func, no forward mode")
        given = dict(zip((one.name for one in self._positional), args, strict=False)) | kwargs
        written = [t for t in tree_flatten([given.get(name) for name in self._mutated])[0] if t is not None]
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*written):
            raise RuntimeError(
                f"{self._qualname} has no gradient, and an argument that it writes to requires one; detach "
                "it, or call the operator under torch.no_grad()"
            )
        torch.autograd.graph.increment_version(written)
        return self._below(*args, **kwargs)


class _Call:
    """A call on its way through an autograd function of flat tensors; it keeps none of the arguments."""

    def __init__(self, op: CustomOpDef, kwargs: dict[str, Any]):
        self.op, self.kwargs = op, kwargs
        self.is_nested = op._is_nested

    def flat(self, args: tuple[Any, ...]) -> Sequence[Any]:
        """The leaves of all positional arguments."""
        self.given = len(args)
        if len(args) < len(self.op._positional):
            args = (*args, *(one.default_value for one in self.op._positional[len(args) :]))
        if not self.is_nested:
            return args
        self.sizes = [len(tree_flatten(arg)[0]) for arg in args]
        flat, self.spec = tree_flatten(args)
        return flat

    def compute(self, flat: Sequence[Any]) -> Any:
        if not self.is_nested:
            return self.op._below(*flat, **self.kwargs)
        output = self.op._below(*tree_unflatten(list(flat), self.spec), **self.kwargs)
        leaves, self.output_spec = tree_flatten(output)
        return tuple(leaves)

    def result(self, output: Any) -> Any:
        return tree_unflatten(list(output), self.output_spec) if self.is_nested else output

    def set_up(self, ctx: Any, flat: Sequence[Any], output: Any) -> None:
        ctx.call = self
        if self.op._setup_context:
            keywords = {}
            if self.op._keywords:
                given = {one.name: self.kwargs.get(one.name, one.default_value) for one in self.op._keywords}
                keywords = {"keyword_only_inputs": given}
            if self.is_nested:
                flat, output = tree_unflatten(list(flat), self.spec), self.result(output)
            self.op._setup_context(ctx=ctx, inputs=tuple(flat), output=output, **keywords)
        self.kwargs = {}

    def backward(self, ctx: Any, grads: Sequence[Any], needs: Sequence[bool]) -> tuple[Any, ...]:
        """The gradients of the leaves."""
        if self.op._backward is None:
            raise RuntimeError(f"{self.op._qualname} has no backward; register one by register_autograd")
        before = ctx.needs_input_grad
        ctx.needs_input_grad = needs
        if self.is_nested:
            ctx.needs_input_grad = tree_unflatten(list(needs), self.spec)
            grads = tree_unflatten(list(grads), self.output_spec)
            grads = grads if isinstance(grads, tuple) else (grads,)
        try:
            found = self.op._backward(ctx, *grads)
        finally:
            ctx.needs_input_grad = before
        found = found if isinstance(found, tuple) else (found,)
        count = len(self.op._positional)
        if len(found) == self.given:  # arguments at their defaults need no gradient
            found += (None,) * (count - self.given)
        if len(found) != count:
            raise RuntimeError(
                f"{self.op._qualname}: backward returns {len(found)} gradients, expected {count}, one for "
                "each positional argument"
            )
        if not self.is_nested:
            return found
        flat: list[Any] = []
        for size, gradient in zip(self.sizes, found, strict=True):
            flat += gradient if isinstance(gradient, list | tuple) else [gradient] * size
        return tuple(flat)


def _make_function(name: str) -> type[torch.autograd.Function]:
    """An operator recorded by autograd."""

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, call: _Call, *flat: Any) -> Any:
            output = call.compute(flat)
            call.set_up(ctx, flat, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return None, *ctx.call.backward(ctx, grads, ctx.needs_input_grad[1:])

    Differentiable.__name__ = Differentiable.__qualname__ = f"{name}Function"
    return Differentiable


class _Context:
    """The ``ctx`` of a derivative in forward mode: that of the operator, with other tensors."""

    def __init__(self, ctx: Any, saved_tensors: Sequence[Any]):
        self._ctx, self.saved_tensors = ctx, saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def _with_derivatives(op: CustomOpDef, jvp: Callable[..., Any] | None) -> Callable[..., Any]:
    """A formula that computes the operator itself, also under transforms."""

    # `torch.autograd.Function` would dispatch to the transforms again, which have called the operator.
    class Formula(_SingleLevelFunction):
        @staticmethod
        def forward(*inputs: Any) -> Any:
            *flat, call = inputs
            # The transforms below this one differentiate too.
            with torch.enable_grad(), _set_fwd_grad_enabled(True):
                return call.compute(flat)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            *flat, call = inputs
            call.set_up(ctx, flat, output)
            ctx.save_for_forward(*(ctx.to_save or ()))
            outputs = output if isinstance(output, tuple) else (output,)
            constant = set(map(id, ctx.non_differentiable or ()))
            ctx.outputs = []
            for t in outputs:
                is_smooth = (t.is_floating_point() or t.is_complex()) and id(t) not in constant
                ctx.outputs.append((t.shape, t.dtype, t.device, is_smooth))

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return *ctx.call.backward(ctx, grads, ctx.needs_input_grad[:-1]), None

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
            # PyTorch turns forward mode off here, so that the tangents of the transforms below would be 0.
            with _set_fwd_grad_enabled(True):
                own = _Context(ctx, list(map(_primal, ctx.saved_tensors)))
                *flat, _ = tangents
                if jvp:
                    nested = tree_unflatten(flat, ctx.call.spec) if ctx.call.is_nested else flat
                    return jvp(own, *nested)
                return _transposed_backward(own, flat)

    def formula(*args: Any, **kwargs: Any) -> Any:
        call = _Call(op, kwargs)
        with enable_single_level_autograd_function():
            return call.result(Formula.apply(*call.flat(args), call))  # type: ignore[attr-defined]

    return formula


def _primal(t: Tensor | None) -> Tensor | None:
    return None if t is None else forward_ad.unpack_dual(t, level=0).primal


def _transposed_backward(ctx: _Context, tangents: list[Tensor | None]) -> Any:
    """The tangent of the result: ``backward`` is linear in ``grads``, and this is its transpose."""
    with torch.enable_grad():
        zeros = [
            torch.zeros(shape, dtype=dtype, device=device, requires_grad=is_smooth)
            for shape, dtype, device, is_smooth in ctx.outputs
        ]
        smooth = [t for t in zeros if t.requires_grad]
        found: Sequence[Any] = [t.detach() for t in smooth]
        gradients = ctx.call.backward(ctx, zeros, tuple(t is not None for t in tangents)) if smooth else ()
        pairs = [(g, t) for g, t in zip(gradients, tangents, strict=False) if g is not None and t is not None]
        if any(not g.requires_grad for g, _ in pairs):  # a 0 of its own, or made by another library
            raise RuntimeError(
                f"{ctx.call.op._qualname}: backward returns a gradient that PyTorch cannot differentiate; "
                "return None for 0, or register jvp or formula"
            )
        if pairs:
            outputs, incoming = zip(*pairs, strict=True)
            found = torch.autograd.grad(outputs, smooth, incoming, create_graph=True, materialize_grads=True)
    rest = iter(found)
    of_results = tuple(next(rest) if t.requires_grad else None for t in zeros)
    return of_results if len(of_results) > 1 else of_results[0]


class _Kernels:
    """The Triton kernels of an operator, imported when a compiler asks for their source."""

    def __init__(self, kernels: Callable[[], Iterable[Any]]):
        self.kernels = kernels

    def __iter__(self) -> Iterator[Any]:
        return iter(self.kernels())


def supports_tma(wrap: Wrap) -> bool:
    """Whether a kernel that ``wrap`` launches may make TMA descriptors, which need memory at the launch.

    Inductor's Python wrapper allocates that memory. Its C++ wrapper, and so AOTInductor, allocates enough for
    one program in torch 2.11. Other compilers, and uncompiled graphs, allocate nothing.
    """
    if wrap is None:
        return True
    from torch._inductor import config
    from torch._inductor.virtualized import V

    return isinstance(V.fake_mode, FakeTensorMode) and not (config.fx_wrapper or config.cpp_wrapper)


def _device_of(args: tuple[Any, ...]) -> AbstractContextManager[None]:
    """Make the tensors' GPU current: Triton launches on the current one, and tiles are chosen for it."""
    device = next((arg.device for arg in args if isinstance(arg, Tensor) and arg.is_cuda), None)
    is_real = device is not None and torch.cuda.is_available()  # a fake one may be on a machine without
    return torch.cuda.device(device) if is_real else nullcontext()


def batch_first(t: Tensor, dim: int | None, batch_size: int) -> Tensor:
    """For rules of vmap: ``t`` with its batch dimension first, or expanded to a batch if ``dim`` is None."""
    return t.expand(batch_size, *t.shape) if dim is None else t.movedim(dim, 0)


def sample(t: Tensor, dim: int | None) -> Tensor:
    """For rules of vmap: a tensor like one sample of ``t``, whose values are undefined."""
    return t if dim is None else t.new_empty(()).expand([size for d, size in enumerate(t.shape) if d != dim])


def is_dtensor(t: Tensor) -> bool:
    """Whether ``t`` is a DTensor; this does not import DTensor's module."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def is_transformed() -> bool:
    """Whether torch.func transforms or forward mode act on a call."""
    return peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def needs_formula(g: Tensor) -> bool:
    """Whether the backward pass of ``g`` must consist of operators with derivatives and sharding rules."""
    return torch.is_grad_enabled() or is_transformed() or is_dtensor(g)


_sharding_rules: dict[Any, Callable[..., Any]] = {}  # by overload


def _register_sharding_rules() -> None:
    if not _sharding_rules or "torch.distributed.tensor" not in sys.modules:
        return
    from torch.distributed.tensor.experimental import register_sharding

    for overload, rule in list(_sharding_rules.items()):
        register_sharding(overload)(rule)
        _sharding_rules.pop(overload, None)  # another thread may have registered it, too


# `torch.compile` calls it while it traces. It would trace PyTorch's registration, and fail.
# `torch.compiler.assume_constant_result` sets this mark and imports the compiler, which takes a second.
_register_sharding_rules._dynamo_marked_constant = True  # type: ignore[attr-defined]


def empty_elementwise(operands: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor of the broadcast shape of ``operands``, with ATen's strides."""
    shape = operands[0].shape
    if all(t.shape == shape and t.is_contiguous() for t in operands):  # the general rule takes 40 µs
        return torch.empty(shape, dtype=dtype, device=device)
    shape = torch.broadcast_shapes(*(t.shape for t in operands))
    strides = compute_elementwise_output_strides(*(t.expand(shape) for t in operands))
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)
