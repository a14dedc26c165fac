# SPDX-License-Identifier: MIT
"""Dispatch of a call: from autograd through an operator's rules to its kernel, and errors."""

import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from inspect import getmodule
from traceback import walk_tb
from types import new_class
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter

from torchpar.library import player
from torchpar.library.derivatives import Call, Differentiable, DifferentiableOnce
from torchpar.library.dispatch_keys import OTHER_KEYS, bits_of
from torchpar.library.private import (
    enable_single_level_autograd_function,
    implementations,
    peek_interpreter_stack,
    profiler_enabled,
)
from torchpar.library.rules import Function, Gradient
from torchpar.library.sharding import register_sharding_rules, sharding_rules
from torchpar.library.transforms import is_transformed, tensors_of

if TYPE_CHECKING:
    from torch._ops import OpOverload

_unsafe_view = torch.ops.aten._unsafe_view.default
# Which Python objects fit a type of the schema, only PyTorch's parser knows, whose RuntimeError has
# no attributes. tests/ops/test_operators_misuse.py fails when the message has other words.
_MISFIT = re.compile(
    r".*\(\) Expected a value of type '(.+)' for argument '(.+)' but instead found type '(.+)'\."
)
_SIMPLE = frozenset((type(None), bool, int, float))  # arguments that are no tensors
_LISTS = frozenset((list, tuple))


# Keys of the trusted kernel's tensors, for which others may register a kernel of the operator.
_KEYS_OF_OTHERS = "CPU", "CUDA"
_KEYS_OF_NESTED = torch.DispatchKey.NestedTensorCPU, torch.DispatchKey.NestedTensorCUDA


def _keys_below(key: str) -> torch.DispatchKeySet:
    """The keys that the dispatcher takes after ``key``: it takes the highest bit first."""
    # PythonDispatcher passes each call on to the next key.
    return torch.DispatchKeySet.from_raw_repr((bits_of(key) - 1) | bits_of("PythonDispatcher"))


_BELOW_ADINPLACEORVIEW = _keys_below("ADInplaceOrView")
_BELOW_AUTOGRAD = _keys_below("AutogradOther")  # the last of the keys of autograd


def key_of(device: str) -> str:
    """The dispatch key of a type of device."""
    torch.device(device)  # raises for what is no type of device
    names = {name.lower(): name for name in torch.DispatchKey.__members__}
    return names.get(device, "PrivateUse1")  # a library has named this key's device


class DispatchedOp(torch.library.CustomOpDef):  # type: ignore[name-defined, misc]
    """An operator as its calls see it: its schema, its rules, and the way of a call through them.

    `CustomOpDef` registers the rules, and the methods here that the dispatcher calls.
    """

    _opoverload: "OpOverload[..., Any]"
    # The base class's; PyTorch's tools look for the fake by this name.
    _abstract_fn: Function | None

    def __init__(
        self, namespace: str, name: str, schema: str, function: Function, tags: Sequence[torch.Tag]
    ):
        super().__init__(namespace, name, schema, function, tags)
        parsed = torch.parse_schema(name + schema)
        arguments = parsed.arguments
        writes = [bool(one.alias_info and one.alias_info.is_write) for one in arguments]
        self._written_at = [i for i, is_written in enumerate(writes) if is_written]
        self._mutated = any(writes)
        self._positional = [one for one in arguments if not one.kwarg_only]
        self._defaults = tuple(one.default_value for one in self._positional)
        self._keywords = [one for one in arguments if one.kwarg_only]
        self._are_lists = [
            "List" in (kind := str(one.type)) and "Tensor" in kind for one in self._positional
        ]
        self._has_lists = any(self._are_lists)
        self._returns = [str(one.type) for one in parsed.returns]
        count = len(self._returns) if set(self._returns) == {"Tensor"} else 0
        self._returns_tensor = count == 1
        # From torch 2.14 on, tensors are not converted for C++. Among other arguments, such as
        # `Tensor?`, they are, and then dispatch in Python takes longer than dispatch in C++.
        only_tensors = {str(one.type) for one in arguments} <= {"Tensor", "List[Tensor]"}
        if hasattr(self._opoverload, "_enable_pyobj_dispatch") and only_tensors:
            self._opoverload._enable_pyobj_dispatch(True)
        # Errors and `grad_fn` show this name, which is made as PyTorch makes it.
        base, _, overload = name.partition(".")
        generated = f"GeneratedBackwardFor_{namespace}_{base}_{overload or 'default'}"
        self._node_name = generated + "Backward"
        once: Any = new_class(generated, (DifferentiableOnce,))
        self._apply_once = once.apply
        # Up to torch 2.13 the method of `torch.autograd.Function` is written in Python, and takes
        # 3 µs longer than its base's.
        differentiable: Any = new_class(generated, (Differentiable,))
        self._apply: Any = super(torch.autograd.Function, differentiable).apply  # type: ignore[misc]
        self._player: player.Player | None = None  # C++ in front of this operator
        self._not_played = "it is not made by triton_op"  # or "", or another reason
        self._asks_player = True
        self._kernels: dict[str | None, Function] = {}  # by device; None for other devices
        self._trusted: Function | None = None  # the kernel for other devices, if it is trusted
        self._other_kernels = {f"{namespace}/{name}/{key}" for key in _KEYS_OF_OTHERS}
        self._backward: Callable[..., Gradient | tuple[Gradient, ...]] | None = None
        self._setup_context: Callable[..., None] | None = None
        self._jvp: Function | None = None
        self._formula: Function | None = None
        self._decompose: Callable[..., bool] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Here, too, since in inference mode the Autograd key is passed over.
        if is_dynamo_compiling():  # Dynamo would otherwise follow changes of `sharding_rules`
            register_sharding_rules()
            return self._opoverload(*args, **kwargs)
        if sharding_rules:
            register_sharding_rules()
        op: Any = self._opoverload
        try:
            if self._player is not None and not kwargs:
                result = self._player.call(*args)
                if result is not NotImplemented:
                    return result
            if profiler_enabled():
                # PyTorch's dispatch in Python (2.14) records no event.
                op = getattr(op, "_cpp_dispatch_handle", op)
            return op(*args, **kwargs)
        except RuntimeError as e:
            if line := self._misfit(str(e)) or self._nested(args, kwargs):
                raise RuntimeError(line) from None
            raise

    def _autograd(self, keyset: torch.DispatchKeySet, /, *args: object, **kwargs: object) -> object:
        if player.core.module is not None and self._asks_player:
            self._start_player(args)
        try:
            if self._trusted is not None and self._player is None and self._is_direct(keyset, args):
                return self._call_directly(keyset, args, kwargs)
            return self._call_by_rules(keyset, args, kwargs)
        except Exception as e:
            self._refuse_none(e, args, kwargs)
            raise

    def _start_player(self, args: tuple[object, ...]) -> None:
        """Put C++ in front of this operator, for the calls after this one."""
        devices = {t.device.type.upper() for t in tensors_of(args)}
        if devices & {*player.core.devices}:
            self._asks_player = False
            if not player.why_not(self):
                self._player = player.Player(self)

    def _stop_player(self) -> None:
        """Let Python compute again, as where a rule has changed."""
        if self._player is not None:
            self._player.remove()
        player.core.forget()  # another operator's function may call this one
        self._player, self._asks_player = None, True

    def _is_direct(self, keyset: torch.DispatchKeySet, args: tuple[Any, ...]) -> bool:
        """Whether the dispatcher would find nothing between autograd and the trusted kernel.

        All tensors must be on the current GPU, or on the CPU. No mode, subclass or transform may be
        active, and nobody else may have registered a kernel of this operator.
        """
        # The keys of modes and transforms, of sparse, nested, functional or negated tensors, and
        # those for which others have registered a kernel in Python or C++, except for a device.
        if keyset.raw_repr() & OTHER_KEYS:
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
        is_exporting = _is_in_onnx_export()
        if self._formula and (
            transformed or is_exporting or (self._decompose and self._decompose(*args, **kwargs))
        ):
            return self._formula(*args, **kwargs)
        if is_exporting:
            self._warn_of_onnx()
        if transformed:
            return self._call_transformed(keyset, args, kwargs)
        if torch.is_grad_enabled() and _any_requires_grad(args):
            call = Call(self, keyset, kwargs, False)
            return call.result(self._apply(*call.flat(args), call))
        return self._below(keyset, *args, **kwargs)

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

    def _below(self, keyset: torch.DispatchKeySet, /, *args: object, **kwargs: object) -> Any:
        """Call what the dispatcher finds below autograd, where it has called with ``keyset``."""
        return self._opoverload.redispatch(keyset & _BELOW_AUTOGRAD, *args, **kwargs)

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
        keyset = torch.DispatchKeySet(getattr(torch.DispatchKey, key_of(device)))
        return self._opoverload.redispatch(keyset, *args, **kwargs)

    def _run(self, device: str | None, /, *args: object, **kwargs: object) -> object:
        if player.core.module is not None and self._asks_player:
            self._start_player(args)
        is_trusted = device is None and self._trusted is not None
        return self._compute(self._kernels[device], is_trusted, args, kwargs)

    def _compute(
        self,
        kernel: Function,
        is_trusted: bool,
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> object:
        """The result of a kernel, which is new memory."""
        try:
            with torch.no_grad():
                result = kernel(*args, **kwargs)
        except Exception as e:
            self._refuse_none(e, args, kwargs)
            self._add_note(e, args)
            raise
        if is_trusted or not self._returns:
            return self._checked(result)
        if _share_memory(args, result):
            raise self._alias_error(kernel)
        return self._checked(result)

    def _checked(self, result: Any) -> object:
        """Check that the kernel's result is what the schema says, and return it without views.

        PyTorch's dispatch in Python (2.14) would pass on any other result.
        """
        if self._returns_tensor and isinstance(result, Tensor):
            # Asking first takes less time than calling `_without_view` for each result.
            return _without_view(result) if result._is_view() else result
        expected = self._returns
        values = result if len(expected) != 1 else (result,)
        if not expected:
            return result
        is_right = isinstance(values, tuple) and len(values) == len(expected)
        if not is_right or not all(
            kind != "Tensor" or isinstance(value, Tensor)
            for kind, value in zip(expected, values, strict=True)
        ):
            is_tuple = is_right and len(expected) != 1
            kinds = [type(one).__name__ for one in values] if is_tuple else type(result).__name__
            raise RuntimeError(
                f"{self._qualname} returns {kinds}, expected {expected}, as its schema says"
            )
        if len(expected) == 1:
            return result
        return tuple(map(_without_view, values))

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

    def _run_fake(self, *args: object, **kwargs: object) -> object:
        assert self._abstract_fn is not None
        try:
            return self._abstract_fn(*args, **kwargs)
        except Exception as e:
            if _is_refused_launch(e):
                way = "launch it as torch.library.wrap_triton(kernel)[grid]"
                e.add_note(f"{self._qualname} launches a kernel on fake tensors; {way}")
            raise

    def _raise_versions(
        self, keyset: torch.DispatchKeySet, /, *args: object, **kwargs: object
    ) -> object:
        torch.autograd.graph.increment_version(self._written(args))
        return self._opoverload.redispatch(keyset & _BELOW_ADINPLACEORVIEW, *args, **kwargs)

    def _check_write(self, args: tuple[object, ...]) -> None:
        """Refuse a call that would write to a tensor and leave its derivative as it was."""
        if is_transformed(args):
            raise RuntimeError(self._refusal_of_transforms())
        if torch.is_grad_enabled() and _any_requires_grad(self._written(args)):
            raise RuntimeError(
                f"{self._qualname} has no gradient, and an argument that it writes to requires "
                "a gradient; detach it, or call the operator under torch.no_grad()"
            )

    def _written(self, args: tuple[object, ...]) -> list[Tensor]:
        # No keyword-only argument is a tensor.
        found: list[Any] = [args[i] for i in self._written_at if i < len(args)]
        if not all(isinstance(t, Tensor) for t in found):
            found = list(tensors_of(found))
        return found

    def _keyword_only(self, kwargs: dict[str, object]) -> dict[str, object]:
        """All keyword-only arguments: PyTorch leaves out arguments that equal their defaults."""
        return {one.name: one.default_value for one in self._keywords} | kwargs

    def _named(
        self, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> Iterator[tuple[str, object]]:
        yield from zip([one.name for one in self._positional], args, strict=False)
        yield from kwargs.items()

    def _misfit(self, message: str) -> str:
        """The line for an argument that the schema refuses, or "" for another error.

        PyTorch's own message (2.14) has five lines.
        """
        match = _MISFIT.match(message)
        if match is None:
            return ""
        expected, name, found = match.groups()
        is_tensor = expected in ("Tensor", "Optional[Tensor]")
        remedy = "; pass a tensor, as by torch.tensor" if is_tensor else ""
        return f"{self._qualname}: {name} has type {found}, expected {expected}{remedy}"

    def _nested(self, args: tuple[object, ...], kwargs: dict[str, object]) -> str:
        """The line for an error of a call with a nested tensor, which no kernel takes, or "".

        PyTorch's own message (2.14) has 115 lines, or only the operator's name.
        """
        if any(map(self._opoverload.has_kernel_for_dispatch_key, _KEYS_OF_NESTED)):
            return ""  # somebody else's kernel
        for name, value in self._named(args, kwargs):
            if isinstance(value, Tensor) and value.is_nested:
                found = f"{name} is a nested tensor, expected a dense one"
                return f"{self._qualname}: {found}; pass each tensor of {name}.unbind()"
        return ""

    def _refuse_none(
        self, error: Exception, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        """Raise a RuntimeError in the place of ``error`` if a tensor is None.

        PyTorch's schema lets None pass, as a tensor that is not defined. Python has then raised an
        AttributeError or a TypeError.
        """
        if not isinstance(error, AttributeError | TypeError):
            return
        required = {one.name for one in self._positional if str(one.type) == "Tensor"}
        for name, value in self._named(args, kwargs):
            if value is None and name in required:
                line = f"{self._qualname}: {name} is None, expected Tensor; pass a tensor"
                raise RuntimeError(line) from error

    def _refuse_vmap(self, *_: object, **__: object) -> NoReturn:
        if self._mutated:
            raise RuntimeError(self._refusal_of_transforms())
        raise RuntimeError(
            f"{self._qualname}: vmap needs a rule for lists of tensors, and for results that are "
            "no tensors; register one by register_vmap"
        )

    def _warn_of_onnx(self) -> None:
        """Warn that PyTorch cannot translate this operator for ONNX, unless somebody tells it how.

        Whether a translation is given, only the exporter knows.
        """
        warnings.warn(
            f"{self._qualname} has no formula, and stays one operator in the export to ONNX; "
            f"translate it by custom_translation_table={{torch.ops.{self._opoverload}: …}}, or "
            "register a formula by register_autograd",
            stacklevel=2,
        )

    def _refusal_of_transforms(self) -> str:
        return (
            f"{self._qualname} writes to an argument, which torch.func and forward mode cannot "
            "follow; call it outside of them"
        )

    def _alias_error(self, kernel: Function) -> RuntimeError:
        module = getattr(getmodule(kernel), "__name__", "an unknown module")
        return RuntimeError(
            f"{self._qualname} (implemented in {module}): a result may not alias any inputs or "
            "another result; return a clone"
        )

    def _add_note(self, error: Exception, args: tuple[object, ...]) -> None:
        if any(t.is_meta for t in tensors_of(args)):  # a kernel also sees fake tensors as such
            error.add_note(f"{self._qualname} has no fake; register one by register_fake")
        elif (
            "cpu" not in self._kernels
            and _is_refused_launch(error)
            and all(t.device.type == "cpu" for t in tensors_of(args))
        ):
            error.add_note(
                f"{self._qualname} has no kernel for the CPU; register one by "
                'register_kernel("cpu"), or execute its Triton kernels by python -m nogpu'
            )


def _is_in_onnx_export() -> bool:
    """`torch.onnx.is_in_onnx_export`, without the import of `torch.onnx`."""
    onnx = sys.modules.get("torch.onnx")
    return onnx is not None and onnx.is_in_onnx_export()


def _any_requires_grad(values: Iterable[object]) -> bool:
    for value in values:  # `any` of a generator would take longer
        if isinstance(value, Tensor):
            if value.requires_grad:
                return True
        elif type(value) in _LISTS and _any_requires_grad(value):  # type: ignore[arg-type]
            return True
    return False


def _is_refused_launch(error: Exception) -> bool:
    """Whether Triton raised the error: there is no GPU, or an argument is not in a GPU's memory.

    Triton raises a RuntimeError or a ValueError. Fake tensors, whose address Triton takes, raise a
    RuntimeError. So the place decides. Triton's interpreter launches kernels on a CPU.
    """
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    module = str(frames[-1].f_globals.get("__name__"))
    return module.startswith("triton.") and module != "triton.runtime.interpreter"


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
