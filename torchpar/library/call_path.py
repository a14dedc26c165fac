# SPDX-License-Identifier: MIT
"""Operators and their rules: `custom_op`, `triton_op` and the `CustomOpDef` that they make."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial, reduce
from inspect import getmodule, signature
from itertools import chain, compress
from operator import or_
from types import new_class
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import Parameter

from torchpar.library.derivatives import Call, Differentiable, DifferentiableOnce
from torchpar.library.kernel_search import TritonKernels
from torchpar.library.private import (
    FunctionalTensorMode,
    enable_single_level_autograd_function,
    has_unbacked_symbols,
    implementations,
    is_decomposition_disabled,
    peek_interpreter_stack,
    profiler_enabled,
    set_wrap_triton_enabled,
    triton_ops_to_kernels,
)
from torchpar.library.rules import Gradient, VmapInfo
from torchpar.library.sharding import is_dtensor, register_sharding_rules, sharding_rules
from torchpar.library.transforms import is_transformed, tensors_of

if TYPE_CHECKING:
    from torch._ops import OpOverload

Function = Callable[..., object]
"""A function of an operator's arguments, which may be anything that a schema allows."""

_F = TypeVar("_F", bound=Function)

_unsafe_view = torch.ops.aten._unsafe_view.default
_MISFIT = re.compile(
    r".*\(\) Expected a value of type '(.+)' for argument '(.+)' but instead found type '(.+)'\."
)
# Words in the errors of a launch without a GPU, with tensors of the CPU, and with fake tensors.
_ERRORS_OF_LAUNCHES = "active drivers", "accessed from Triton", "Cannot access data pointer"
_SIMPLE = frozenset((type(None), bool, int, float))  # arguments that are no tensors
_LISTS = frozenset((list, tuple))


def _bit(key: str) -> int:
    return int(torch.DispatchKeySet(getattr(torch.DispatchKey, key)).raw_repr())


# Keys of the trusted kernel's tensors, for which others may register a kernel of the operator.
_KEYS_OF_OTHERS = "CPU", "CUDA"
_DENSE_KEYS = "CPU CUDA AutogradCPU AutogradCUDA AutocastCPU AutocastCUDA"
# All dispatch keys, as bits, except those of a dense tensor on a CPU or an NVIDIA GPU.
_OTHER_KEYS = ~reduce(or_, map(_bit, _DENSE_KEYS.split()))


def _keys_below(key: str) -> torch.DispatchKeySet:
    """The keys that the dispatcher takes after ``key``: it takes the highest bit first."""
    # PythonDispatcher passes each call on to the next key.
    return torch.DispatchKeySet.from_raw_repr((_bit(key) - 1) | _bit("PythonDispatcher"))


_BELOW_ADINPLACEORVIEW = _keys_below("ADInplaceOrView")
_BELOW_AUTOGRAD = _keys_below("AutogradOther")  # the last of the keys of autograd
_without_autograd: dict[int, torch.DispatchKeySet] = {}  # by the bits of the keys of a call

# To leave one of these sets gradients off or on again, in a third of the time of a new
# `torch.set_grad_enabled`.
with torch.no_grad():
    _gradients_off = torch.set_grad_enabled(False)
with torch.enable_grad():
    _gradients_on = torch.set_grad_enabled(True)


def _key_of(device: str) -> str:
    """The dispatch key of a type of device."""
    torch.device(device)  # raises for what is no type of device
    names = {name.lower(): name for name in torch.DispatchKey.__members__}
    return names.get(device, "PrivateUse1")  # which a library has given its own name


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
) -> "CustomOpDef | Callable[[Function], CustomOpDef]":
    """Make an operator of a function that launches Triton kernels: `torch.library.triton_op`.

    Compilers look into the operator: `torch.compile` and AOTInductor trace the kernels, and the
    ATen operators beside them. The operator stays one node in `torch.export`; for DTensors, since
    the sharding rules are the operator's; for data-dependent sizes, for which no tiles can be
    chosen; and on devices for which `CustomOpDef.register_kernel` has registered another function.
    Triton is imported when a compiler asks for the kernels, and not before.

    The function wraps its kernels in `torch.library.wrap_triton`. Or it takes a keyword argument
    ``wrap``, of which the schema says nothing: None for a real launch, else a function to apply to
    a kernel.

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
        if trusted and not op._mutated:
            op._trusted = untraced
        found = _Kernels(kernels) if kernels else TritonKernels(fn)
        triton_ops_to_kernels[op._qualname] = found  # type: ignore[assignment]
        if not takes_wrap:
            op.register_fake(fn)
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


class CustomOpDef(torch.library.CustomOpDef):  # type: ignore[name-defined, misc]
    """An operator, ``torch.ops.<namespace>.<name>``, and its rules.

    `custom_op` and `triton_op` make it. Because of its base class, `opcheck` and the functions of
    `torch.library` accept it. The base class's constructor names the operator and keeps it;
    `_register_to_dispatcher`, which it calls, defines the operator. `register_torch_dispatch` is
    the base class's, and `register_vmap` calls the base class's. All other methods are replaced.
    """

    _abstract_fn: (
        Function | None
    )  # the base class's; PyTorch's tools look for the fake by this name

    def __init__(
        self,
        name: str,
        function: Function,
        schema: str,
        device_types: str | Sequence[str] | None = None,
        tags: torch.Tag | Sequence[torch.Tag] | None = None,
    ):
        namespace, _, local_name = name.partition("::")
        base, dot, overload = local_name.partition(".")
        if not (
            namespace.isidentifier()
            and base.isidentifier()
            and (overload.isidentifier() or not dot)
        ):
            raise ValueError(
                f"the operator's name is {name!r}, expected 'namespace::name' of identifiers"
            )
        tags = [tags] if isinstance(tags, torch.Tag) else tags or ()
        # Before an earlier operator is replaced.
        parsed = torch.parse_schema(local_name + schema)
        arguments = parsed.arguments
        _refuse(name, parsed, tags)
        writes = [bool(one.alias_info and one.alias_info.is_write) for one in arguments]
        self._written_at = [i for i, is_written in enumerate(writes) if is_written]
        # Without a tensor among the arguments, an argument must name the device.
        self._needs_device = not any("Tensor" in str(one.type) for one in arguments)
        self._has_device = any(one.name == "device" for one in arguments)
        self._check_device(name, device_types)
        self.__name__, self.__doc__ = base, function.__doc__
        # A notebook may define the operator again: then PyTorch ends the operator before.
        super().__init__(namespace, local_name, schema, function, tags)
        self._positional = [one for one in arguments if not one.kwarg_only]
        self._defaults = tuple(one.default_value for one in self._positional)
        self._keywords = [one for one in arguments if one.kwarg_only]
        self._are_lists = [
            "List" in (kind := str(one.type)) and "Tensor" in kind for one in self._positional
        ]
        self._has_lists = any(self._are_lists)
        self._returns = [str(one.type) for one in parsed.returns]
        count = len(self._returns) if set(self._returns) == {"Tensor"} else 0
        self._returns_tensor, self._returns_tensors = count == 1, count > 1
        # From torch 2.14 on, tensors are not converted for C++. Among other arguments, such as
        # `Tensor?`, they are, and then dispatch in Python takes longer than dispatch in C++.
        only_tensors = {str(one.type) for one in arguments} <= {"Tensor", "List[Tensor]"}
        if hasattr(self._opoverload, "_enable_pyobj_dispatch") and only_tensors:
            self._opoverload._enable_pyobj_dispatch(True)
        # Errors and `grad_fn` show this name, which is made as PyTorch makes it.
        generated = f"GeneratedBackwardFor_{namespace}_{base}_{overload or 'default'}"
        once: Any = new_class(generated, (DifferentiableOnce,))
        self._apply_once = once.apply
        # Up to torch 2.13 the method of `torch.autograd.Function` is written in Python, and takes
        # 3 µs longer than its base's.
        differentiable: Any = new_class(generated, (Differentiable,))
        self._apply: Any = super(torch.autograd.Function, differentiable).apply  # type: ignore[misc]
        self._mutated = any(writes)
        self._kernels: dict[str | None, Function] = {}  # by device; None for other devices
        self._trusted: Function | None = None  # the kernel for other devices, if it is trusted
        self._other_kernels = {f"{namespace}/{local_name}/{key}" for key in _KEYS_OF_OTHERS}
        self._backward: Callable[..., Gradient | tuple[Gradient, ...]] | None = None
        self._setup_context: Callable[..., None] | None = None
        self._jvp: Function | None = None
        self._formula: Function | None = None
        self._decompose: Callable[..., bool] | None = None
        self.register_kernel(device_types, function)
        self._lib.impl(local_name, self._autograd, "Autograd", with_keyset=True)
        if self._mutated:  # below Autograd, since inference mode passes over the Autograd key
            self._lib.impl(local_name, self._raise_versions, "ADInplaceOrView", with_keyset=True)
        if self._mutated and not parsed.returns:
            self.register_fake(lambda *args, **kwargs: None)

    def _register_to_dispatcher(self, tags: Sequence[torch.Tag]) -> None:
        """Define the operator alone: called by PyTorch's constructor, whose rules are not ours."""
        self._lib.define(self._name + self._schema, tags={torch.Tag.pt2_compliant_tag, *tags})
        base, _, overload = self._name.partition(".")
        packet = getattr(getattr(torch.ops, self._namespace), base)
        self._opoverload: OpOverload[..., Any] = getattr(packet, overload or "default")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Here, too, since in inference mode the Autograd key is passed over.
        if is_compiling():  # Dynamo, which would otherwise follow changes of `sharding_rules`
            register_sharding_rules()
            return self._opoverload(*args, **kwargs)
        if sharding_rules:
            register_sharding_rules()
        op: Any = self._opoverload
        if profiler_enabled():
            # PyTorch's dispatch in Python (2.14) records no event.
            op = getattr(op, "_cpp_dispatch_handle", op)
        try:
            return op(*args, **kwargs)
        except RuntimeError as e:
            if line := self._misfit(str(e)) or self._nested(str(e), args, kwargs):
                raise RuntimeError(line) from None
            raise

    def _misfit(self, message: str) -> str:
        """The line for an argument that the schema or vmap refuses, or "" for another error.

        PyTorch's own message (2.14) has five lines, or says nothing of what to do.
        """
        if message.startswith(f"Batching rule not implemented for {self._qualname}"):
            if self._mutated:
                return self._refusal_of_transforms()
            needs = "vmap needs a rule for lists of tensors, and for results that are no tensors"
            return f"{self._qualname}: {needs}; register one by register_vmap"
        match = _MISFIT.match(message)
        if match is None:
            return ""
        expected, name, found = match.groups()
        is_tensor = expected in ("Tensor", "Optional[Tensor]")
        remedy = "; pass a tensor, as by torch.tensor" if is_tensor else ""
        return f"{self._qualname}: {name} has type {found}, expected {expected}{remedy}"

    def _nested(self, message: str, args: tuple[object, ...], kwargs: dict[str, object]) -> str:
        """The line for a nested tensor, which no kernel takes, or "" for another error.

        PyTorch's own message (2.14) has 115 lines, or only the operator's name.
        """
        if "NestedTensor" not in message and message != str(self._opoverload):
            return ""
        for name, value in self._named(args, kwargs):
            if isinstance(value, Tensor) and value.is_nested:
                found = f"{name} is a nested tensor, expected a dense one"
                return f"{self._qualname}: {found}; pass each tensor of {name}.unbind()"
        return ""

    def _refuse_none(
        self, error: Exception, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        """Raise a RuntimeError if ``error`` is of a tensor that is None.

        PyTorch's schema lets None pass, as a tensor that is not defined.
        """
        if "NoneType" not in str(error):
            return
        required = {one.name for one in self._positional if str(one.type) == "Tensor"}
        for name, value in self._named(args, kwargs):
            if value is None and name in required:
                line = f"{self._qualname}: {name} is None, expected Tensor; pass a tensor"
                raise RuntimeError(line) from error

    def _named(
        self, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> Iterator[tuple[str, object]]:
        yield from zip([one.name for one in self._positional], args, strict=False)
        yield from kwargs.items()

    def register_kernel(
        self, device_types: str | Sequence[str] | None, fn: Function | None = None, /
    ) -> Callable[..., Any]:
        """Register a function for tensors on these devices; None means all other devices."""
        if fn is None:
            return partial(self.register_kernel, device_types)
        devices: Sequence[str | None] = (
            [device_types] if isinstance(device_types, str) else device_types or [None]
        )
        self._check_device(self._qualname, device_types)
        if device_types is not None and self._needs_device and not any(self._kernels):
            self._lib.impl(self._name, self._select_device, "BackendSelect")
        for device in devices:
            if device not in self._kernels:
                key = _key_of(device) if device else "CompositeExplicitAutograd"
                self._lib.impl(self._name, partial(self._run, device), key)
            self._kernels[device] = fn
            if device is None:
                self._trusted = None
        return fn

    def _check_device(self, name: str, device_types: str | Sequence[str] | None) -> None:
        if device_types is not None and self._needs_device and not self._has_device:
            expected = "expected an argument `device: torch.device` to choose the kernel by"
            raise ValueError(
                f"{name}: there are device types, but no tensors among the arguments; {expected}"
            )

    def _select_device(self, *args: object, **kwargs: object) -> object:
        """Call the kernel of a function without tensors, for the device among its arguments."""
        # The defaults are for the choice only: the call passes on the arguments that were given.
        given = {one.name: one.default_value for one in self._positional + self._keywords}
        given |= dict(zip(given, args, strict=False)) | kwargs
        device = torch.device(given["device"] or "cpu").type
        chosen = device if device in self._kernels else None
        if chosen not in self._kernels:
            has = f"{self._qualname} does not have a kernel registered for {device}"
            raise RuntimeError(f"{has}; register one by register_kernel")
        keyset = torch.DispatchKeySet(getattr(torch.DispatchKey, _key_of(device)))
        return self._opoverload.redispatch(keyset, *args, **kwargs)

    def _run(self, device: str | None, /, *args: object, **kwargs: object) -> object:
        kernel = self._kernels[device]
        records = torch.is_grad_enabled()
        if records:
            _gradients_off.__exit__(None, None, None)
        try:
            result = kernel(*args, **kwargs)
        except Exception as e:
            self._refuse_none(e, args, kwargs)
            self._add_note(e, args)
            raise
        finally:
            if records:
                _gradients_on.__exit__(None, None, None)
        if (device is None and self._trusted is not None) or not self._returns:
            return self._checked(result)
        try:
            if self._returns_tensor and isinstance(result, Tensor) and not self._has_lists:
                # As by `_share_memory` and `_checked`, in less time.
                storage = result.untyped_storage()
                for t in args:
                    if isinstance(t, Tensor) and t.untyped_storage() is storage:
                        raise self._alias_error(kernel)
                return _without_view(result) if result._is_view() else result
            shares = _share_memory(args, result)
        except NotImplementedError:  # a sparse tensor has no storage
            shares = _share_memory(args, result)
        if shares:
            raise self._alias_error(kernel)
        return self._checked(result)

    def _alias_error(self, kernel: Function) -> RuntimeError:
        return RuntimeError(
            f"{self._qualname} (implemented in {getmodule(kernel)}): a result may not alias "
            "any inputs or another result; return a clone"
        )

    def _add_note(self, error: Exception, args: tuple[object, ...]) -> None:
        if any(t.is_meta for t in tensors_of(args)):  # a kernel also sees fake tensors as such
            error.add_note(f"{self._qualname} has no fake; register one by register_fake")
        elif (
            "cpu" not in self._kernels
            and any(words in str(error) for words in _ERRORS_OF_LAUNCHES)
            and all(t.device.type == "cpu" for t in tensors_of(args))
        ):
            error.add_note(
                f"{self._qualname} has no kernel for the CPU; register one by "
                'register_kernel("cpu"), or execute its Triton kernels by python -m nogpu'
            )

    def _checked(self, result: Any) -> object:
        """Check that the kernel's result is what the schema says, and return it without views.

        PyTorch's dispatch in Python (2.14) would pass on any other result.
        """
        if self._returns_tensor and isinstance(result, Tensor):
            # Asking first takes less time than calling `_without_view` for each result.
            return _without_view(result) if result._is_view() else result
        expected = self._returns
        if (  # as below, in less time
            self._returns_tensors
            and type(result) is tuple
            and len(result) == len(expected)
            and all([isinstance(one, Tensor) and not one._is_view() for one in result])
        ):
            return result
        values = result if len(expected) != 1 else (result,)
        if not expected:
            return result
        is_right = isinstance(values, tuple) and len(values) == len(expected)
        # Lists take less time here than generators.
        if not is_right or not all(
            [
                kind != "Tensor" or isinstance(value, Tensor)
                for kind, value in zip(expected, values, strict=True)
            ]
        ):
            is_tuple = is_right and len(expected) != 1
            kinds = [type(one).__name__ for one in values] if is_tuple else type(result).__name__
            raise RuntimeError(
                f"{self._qualname} returns {kinds}, expected {expected}, as its schema says"
            )
        if len(expected) == 1:
            return result
        views = [isinstance(one, Tensor) and one._is_view() for one in values]
        return tuple(map(_without_view, values)) if any(views) else result

    def set_kernel_enabled(self, device_type: str, enabled: bool = True) -> NoReturn:
        """Refuse to switch kernels; `register_kernel` replaces one."""
        raise NotImplementedError(
            f"{self._qualname}: kernels cannot be switched, register another instead"
        )

    def register_fake(self, fn: _F) -> _F:
        """Register a function that makes an empty result of the right shape, strides and dtype."""
        # Without a fake, kernels made of PyTorch's operators run on fake tensors.
        if self._abstract_fn is None:
            self._lib._register_fake(self._name, self._run_fake, _stacklevel=2)
        self._abstract_fn = fn
        return fn

    def _run_fake(self, *args: object, **kwargs: object) -> object:
        assert self._abstract_fn is not None
        try:
            return self._abstract_fn(*args, **kwargs)
        except Exception as e:
            if any(words in str(e) for words in _ERRORS_OF_LAUNCHES):
                way = "launch it as torch.library.wrap_triton(kernel)[grid]"
                e.add_note(f"{self._qualname} launches a kernel on fake tensors; {way}")
            raise

    def register_vmap(self, func: Function | None = None) -> Callable[..., Any]:
        """Register a batching rule, ``func(info, in_dims, *args) -> (result, out_dim)``."""
        if func is None:
            return self.register_vmap

        def with_defaults(
            info: VmapInfo, in_dims: tuple[object, ...], *args: object, **kwargs: object
        ) -> object:
            rest = self._defaults[len(args) :]
            found: Any = func(
                info, in_dims + (None,) * len(rest), *args, *rest, **self._keyword_only(kwargs)
            )
            is_pair = isinstance(found, tuple) and len(found) == 2
            if not is_pair or any(True for _ in tensors_of([found[1]])):
                given = [type(one).__name__ for one in found] if is_pair else type(found).__name__
                raise RuntimeError(
                    f"{self._qualname}: the vmap rule returns {given}, expected a tuple "
                    "(results, dimensions), with the batch's dimension of each result"
                )
            return found

        super().register_vmap(with_defaults)
        return func

    def register_autograd(
        self,
        backward: Callable[..., Gradient | tuple[Gradient, ...]],
        /,
        *,
        setup_context: Callable[..., None] | None = None,
        formula: Function | None = None,
        jvp: Function | None = None,
        decompose: Callable[..., bool] | None = None,
    ) -> None:
        """Register derivatives: `torch.library.register_autograd`, also for torch.func.

        Under transforms and in forward mode ``formula`` is called in the operator's place, if it is
        given. Otherwise the operator is called, and has the derivatives ``backward`` and ``jvp``.

        Args:
            backward: ``backward(ctx, *grads)`` returns the gradient, or None, of each positional
                argument.
            setup_context: ``setup_context(ctx, inputs, output)`` saves what the derivatives need.
                If the operator has keyword-only arguments, it also gets ``keyword_only_inputs``.
            formula: the operator's function, made of differentiable operators of PyTorch.
            jvp: ``jvp(ctx, *tangents)`` returns the tangent of the result; a tangent that is 0 may
                be None. By default it is computed by differentiating ``backward``, which is linear
                in ``grads``.
            decompose: a function of the arguments; where it returns True, ``formula`` is called
                in any case.

        Raises:
            ValueError: the operator writes to an argument; ``formula`` and ``jvp``; ``decompose``
                alone.
        """
        if self._mutated:
            raise ValueError(f"{self._qualname} writes to an argument and cannot have a gradient")
        if formula and jvp:
            raise ValueError(
                f"{self._qualname}: formula and jvp are given, expected at most one of them"
            )
        if decompose and not formula:
            raise ValueError(f"{self._qualname}: decompose is given without formula, pass both")
        self._backward, self._setup_context, self._jvp = backward, setup_context, jvp
        self._formula, self._decompose = formula, decompose

    def register_autocast(
        self,
        device_type: str | None = None,
        cast_inputs: torch.dtype | None = None,
        *,
        cast: bool = True,
    ) -> None:
        """Run the operator in ``cast_inputs`` under autocast, by default in autocast's dtype.

        `torch.library.register_autocast` fixes the dtype; by default this rule follows
        ``torch.autocast(dtype=…)``. Tensors of float64 and of integers are left as they are.
        Without a rule, autocast would act on the PyTorch operators that the kernel calls.

        Args:
            device_type: "cpu" or "cuda"; by default both.
            cast: False leaves all arguments as they are.

        Raises:
            ValueError: a device type that is no string; a dtype may have been given in its place.
        """
        if not isinstance(device_type, str | None):
            given = f"{self._qualname}: the device type is {device_type!r}"
            raise ValueError(
                f"{given}, expected 'cpu', 'cuda' or None; the dtype is the second argument"
            )
        for device in ("cpu", "cuda") if device_type is None else (device_type,):
            rule = partial(self._autocast, device, cast_inputs, cast)
            self._lib.impl(self._name, rule, f"Autocast{_key_of(device)}")

    def _autocast(
        self, device: str, dtype: torch.dtype | None, cast: bool, /, *args: object, **kwargs: object
    ) -> object:
        chosen = dtype or torch.get_autocast_dtype(device)

        def converted(value: object) -> object:
            if isinstance(value, list | tuple):
                return [converted(one) for one in value]
            if not isinstance(value, Tensor):
                return value
            is_cast = value.is_floating_point() and value.dtype != torch.float64
            return value.to(chosen) if is_cast else value

        if cast:  # no keyword-only argument is a tensor
            args = tuple([converted(one) for one in args])
        with torch.autocast(device, enabled=False):
            return self._opoverload(*args, **kwargs)

    def register_sharding(self, rule: _F) -> _F:
        """Register a rule of sharding: the placements of DTensors that the operator can take.

        The rule is the function that `torch.distributed.tensor.experimental.register_sharding`
        takes. Importing DTensor would slow the import of a package. So the first call after DTensor
        was imported registers the rule. That call already follows the rule, since the operator's
        Autograd key comes before DTensor's dispatch.

        Raises:
            ValueError: the operator has no result (pytorch#167219), or a list of them
                (pytorch#191488).
        """
        if not self._returns:
            raise ValueError(
                f"{self._qualname}: DTensor shards results, and there is none; return a tensor"
            )
        if "List[Tensor]" in self._returns:
            raise ValueError(
                f"{self._qualname}: DTensor counts a list of results as one tensor; return a tuple"
            )

        def with_defaults(*args: object, **kwargs: object) -> object:
            found: Any = rule(*args, *self._defaults[len(args) :], **self._keyword_only(kwargs))
            # A tensor comes as a spec. In a list that also holds None, it comes as a strategy.
            lists = [one if isinstance(one, list | tuple) else [one] for one in args]
            leaves = list(chain(*lists))
            is_tensor = [hasattr(t, "placements") or hasattr(t, "strategies") for t in leaves]
            sizes = [len(self._returns), sum(is_tensor)]
            pairs = found if isinstance(found, list | tuple) else [found]
            misfits = []
            for pair in pairs:
                are_lists = isinstance(pair, list | tuple) and [
                    isinstance(one, list | tuple) for one in pair
                ]
                if (
                    are_lists != [True, True]
                    or [len(pair[0]), sum(p is not None for p in pair[1])] != sizes
                ):
                    expected = "two lists, the placements of {} results and of {} tensors".format(
                        *sizes
                    )
                    raise ValueError(
                        f"{self._qualname}: the sharding rule has {pair}, expected {expected}"
                    )
                placed: Iterable[Any] = [one for one in pair[1] if one is not None]
                misfits += [
                    f"the sharding rule has {pair} for a tensor of {t.ndim} dimensions"
                    for t, placement in zip(compress(leaves, is_tensor), placed, strict=True)
                    if placement.is_shard() and not 0 <= placement.dim < t.ndim
                ][:1]
            # DTensor leaves out placements with a dimension that the tensor lacks.
            if pairs and len(misfits) == len(pairs):
                expected = "expected placements on its dimensions, from 0 on, or Replicate()"
                raise ValueError(f"{self._qualname}: {misfits[0]}, {expected}")
            return found

        sharding_rules[self._opoverload] = with_defaults
        return rule

    def _keyword_only(self, kwargs: dict[str, object]) -> dict[str, object]:
        """All keyword-only arguments: PyTorch leaves out arguments that equal their defaults."""
        return {one.name: one.default_value for one in self._keywords} | kwargs

    def _autograd(self, keyset: torch.DispatchKeySet, /, *args: object, **kwargs: object) -> object:
        try:
            if self._trusted is not None and self._is_direct(keyset, args):
                return self._call_directly(keyset, args, kwargs)
            return self._call_by_rules(keyset, args, kwargs)
        except (AttributeError, TypeError) as e:
            self._refuse_none(e, args, kwargs)
            raise

    def _call_by_rules(
        self, keyset: torch.DispatchKeySet, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> object:
        """`_autograd` for a call that something may intercept or differentiate."""
        if sharding_rules:
            register_sharding_rules()
        if self._mutated:
            self._check_write(args)
            if not self._returns:
                return self._below(keyset, *args, **kwargs)
        transformed = (
            (forward_ad._current_level >= 0 or peek_interpreter_stack() is not None)
            and not self._mutated
            and is_transformed(args)
        )
        if self._formula and (
            transformed or (self._decompose and self._decompose(*args, **kwargs))
        ):
            return self._formula(*args, **kwargs)
        if transformed:
            return self._call_transformed(keyset, args, kwargs)
        if torch.is_grad_enabled():
            for t in args:  # as by `_any_requires_grad`, whose call would take time
                if t.requires_grad if isinstance(t, Tensor) else _any_requires_grad((t,)):
                    call = Call(self, keyset, kwargs, False)
                    return call.result(self._apply(*call.flat(args), call))
        # As `_below`, whose call would take time.
        below = _without_autograd.get(keyset.raw_repr()) or _below_autograd(keyset)
        return self._opoverload.redispatch(below, *args, **kwargs)

    def _call_transformed(
        self, keyset: torch.DispatchKeySet, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> object:
        """`_autograd` for a call that torch.func or forward mode differentiates."""
        call = Call(self, keyset, kwargs, transformed=True)
        if peek_interpreter_stack() is None:  # forward mode without torch.func
            return call.result(self._apply(*call.flat(args), call))
        call.is_once = True
        with enable_single_level_autograd_function():
            return call.result(self._apply_once(*call.flat(args), call))

    def _call_directly(
        self, keyset: torch.DispatchKeySet, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> object:
        """`_autograd` for a call that goes to the trusted kernel, by `_is_direct`."""
        if self._decompose is not None and self._decompose(*args, **kwargs):
            assert self._formula is not None
            return self._formula(*args, **kwargs)
        if torch.is_grad_enabled() and _any_requires_grad(args):
            call = Call(self, keyset, kwargs, False, is_direct=True)
            output = self._apply(*call.flat(args), call)
            return output if self._returns_tensor else call.result(output)
        trusted: Any = self._trusted
        return self._checked(trusted(*args, **kwargs))

    def _below(self, keyset: torch.DispatchKeySet, /, *args: object, **kwargs: object) -> Any:
        """Call what the dispatcher finds below autograd, where it has called with ``keyset``."""
        below = _without_autograd.get(keyset.raw_repr()) or _below_autograd(keyset)
        return self._opoverload.redispatch(below, *args, **kwargs)

    def _is_direct(self, keyset: torch.DispatchKeySet, args: tuple[Any, ...]) -> bool:
        """Whether the dispatcher would find nothing between autograd and the trusted kernel.

        The tensors are to be on the current GPU, or on the CPU. No mode, subclass, transform or
        other kernel of this operator may be there.
        """
        # The keys of modes and transforms, of sparse, nested, functional or negated tensors, and
        # those for which others have registered a kernel in Python or C++, except for a device.
        if keyset.raw_repr() & _OTHER_KEYS:
            return False
        gpu = None
        for t in args:
            kind = type(t)
            if kind is Tensor or kind is Parameter:
                if t.is_cuda:
                    gpu = torch.cuda.current_device() if gpu is None else gpu
                    if t.get_device() != gpu:
                        return False
            elif kind not in _SIMPLE:
                return False
        return forward_ad._current_level < 0 and self._other_kernels.isdisjoint(implementations)

    def _check_write(self, args: tuple[object, ...]) -> None:
        """Refuse a call that would write to a tensor and leave its derivative as it was."""
        if is_transformed(args):
            raise RuntimeError(self._refusal_of_transforms())
        if torch.is_grad_enabled() and _any_requires_grad(self._written(args)):
            raise RuntimeError(
                f"{self._qualname} has no gradient, and an argument that it writes to requires "
                "a gradient; detach it, or call the operator under torch.no_grad()"
            )

    def _refusal_of_transforms(self) -> str:
        return (
            f"{self._qualname} writes to an argument, which torch.func and forward mode cannot "
            "follow; call it outside of them"
        )

    def _written(self, args: tuple[object, ...]) -> list[Tensor]:
        # No keyword-only argument is a tensor.
        found: list[Any] = [args[i] for i in self._written_at if i < len(args)]
        if not all(isinstance(t, Tensor) for t in found):
            found = list(tensors_of(found))
        return found

    def _raise_versions(
        self, keyset: torch.DispatchKeySet, /, *args: object, **kwargs: object
    ) -> object:
        torch.autograd.graph.increment_version(self._written(args))
        return self._opoverload.redispatch(keyset & _BELOW_ADINPLACEORVIEW, *args, **kwargs)


def _refuse(name: str, schema: torch.FunctionSchema, tags: Sequence[torch.Tag]) -> None:
    """Refuse the schemas that the rules here do not support."""
    tensors = [one.name for one in schema.arguments if one.kwarg_only and "Tensor" in str(one.type)]
    if tensors:
        raise NotImplementedError(
            f"{name}: {tensors[0]} is a keyword-only tensor; make it positional"
        )
    aliasing = [tag.name for tag in tags if tag.name in ("inplace", "out")]
    if aliasing or any(one.alias_info for one in schema.returns):
        tag = f"the tag {aliasing[0]} says" if aliasing else "the schema says"
        raise NotImplementedError(
            f"{name}: {tag} that a result is an argument or a view of one; return new memory, or "
            "None from an operator that writes to its argument"
        )


class _Kernels:
    """The Triton kernels of an operator, imported when a compiler asks for their source."""

    def __init__(self, kernels: Callable[[], Iterable[object]]):
        self.kernels = kernels

    def __iter__(self) -> Iterator[object]:
        return iter(self.kernels())


def _below_autograd(keyset: torch.DispatchKeySet) -> torch.DispatchKeySet:
    return _without_autograd.setdefault(keyset.raw_repr(), keyset & _BELOW_AUTOGRAD)


def _any_requires_grad(values: Iterable[object]) -> bool:
    for value in values:  # `any` of a generator would take longer
        if isinstance(value, Tensor):
            if value.requires_grad:
                return True
        elif type(value) in _LISTS and _any_requires_grad(value):  # type: ignore[arg-type]
            return True
    return False


def _share_memory(args: Iterable[object], result: object) -> bool:
    """Whether a result has the storage of an argument or of another result."""
    # Sparse tensors have none.
    known = [t.untyped_storage() for t in tensors_of(args) if t.layout is torch.strided]
    for t in tensors_of(result if isinstance(result, tuple) else (result,)):
        if t.layout is torch.strided:
            storage = t.untyped_storage()
            if any([storage is one for one in known]):  # `in` would compare the bytes
                return True
            known.append(storage)
    return False


def _without_view(t: Any) -> Any:
    """``t``, or a tensor of its memory that is no view.

    Autograd refuses to change a view that a Function returns, or that was made without gradients,
    although nobody has the base of a kernel's result.
    """
    if isinstance(t, Tensor) and t.layout == torch.strided and t._is_view():
        return _unsafe_view(t, [*t.shape])  # a `torch.Size` takes longer to convert
    return t


def _gpu_of(args: tuple[object, ...]) -> torch.device | None:
    """The tensors' GPU, which must be current: Triton launches on, and for, the current GPU."""
    for arg in args:
        # A fake tensor may name a GPU that this machine lacks.
        if isinstance(arg, Tensor) and arg.is_cuda:
            # Asked first, since to ask whether there is a GPU takes microseconds.
            has_gpu = torch.cuda.is_initialized() or torch.cuda.is_available()
            return arg.device if has_gpu else None
    return None
