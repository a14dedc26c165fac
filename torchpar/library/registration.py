# SPDX-License-Identifier: MIT
"""An operator and the registration of its rules: `CustomOpDef`."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain, compress
from typing import Any, NoReturn, TypeVar

import torch

from torchpar.library.call_path import DispatchedOp, key_of
from torchpar.library.flops import Formula, register_formula
from torchpar.library.rules import Function, Gradient, VmapInfo
from torchpar.library.sharding import sharding_rules
from torchpar.library.tape import operators
from torchpar.library.transforms import tensors_of

_F = TypeVar("_F", bound=Function)


class CustomOpDef(DispatchedOp):
    """An operator, ``torch.ops.<namespace>.<name>``, and its rules.

    `custom_op` and `triton_op` make it. Because of its base class, `opcheck` and the functions of
    `torch.library` accept it. The base class's constructor names the operator and keeps it;
    `_register_to_dispatcher`, which it calls, defines the operator. `register_torch_dispatch` is
    the base class's, and `register_vmap` calls the base class's. All other methods are replaced.
    """

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
        # Without a tensor among the arguments, an argument must name the device.
        self._needs_device = not any("Tensor" in str(one.type) for one in arguments)
        self._has_device = any(one.name == "device" for one in arguments)
        self._check_device(name, device_types)
        self.__name__, self.__doc__ = base, function.__doc__
        # A notebook may define the operator again: then PyTorch ends the operator before.
        if name in operators:
            operators[name]._stop_player()
        super().__init__(namespace, local_name, schema, function, tags)
        operators[name] = self
        self.register_kernel(device_types, function)
        self._not_played = "it is not made by triton_op"
        self._lib.impl(local_name, self._autograd, "Autograd", with_keyset=True)
        if self._mutated:  # below Autograd, since inference mode passes over the Autograd key
            self._lib.impl(local_name, self._raise_versions, "ADInplaceOrView", with_keyset=True)
        # Without a rule, PyTorch (2.14) calls the operator for each sample of vmap, but not these.
        has_lists = any(str(one.type) == "List[Tensor]" for one in arguments)
        if self._mutated or has_lists or set(self._returns) != {"Tensor"}:
            super().register_vmap(self._refuse_vmap)
        if self._mutated and not parsed.returns:
            self.register_fake(lambda *args, **kwargs: None)

    def _register_to_dispatcher(self, tags: Sequence[torch.Tag]) -> None:
        """Define the operator alone: called by PyTorch's constructor, whose rules are not ours."""
        self._lib.define(self._name + self._schema, tags={torch.Tag.pt2_compliant_tag, *tags})
        base, _, overload = self._name.partition(".")
        packet = getattr(getattr(torch.ops, self._namespace), base)
        self._opoverload = getattr(packet, overload or "default")

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
        self._stop_player()
        if device_types is not None and self._needs_device and not any(self._kernels):
            self._lib.impl(self._name, self._select_device, "BackendSelect")
        for device in devices:
            if device not in self._kernels:
                key = key_of(device) if device else "CompositeExplicitAutograd"
                self._lib.impl(self._name, partial(self._run, device), key)
            self._kernels[device] = fn
            if device is None:
                self._trusted = None
                self._not_played = "its function is not the one that triton_op was given"
        return fn

    def _check_device(self, name: str, device_types: str | Sequence[str] | None) -> None:
        if device_types is not None and self._needs_device and not self._has_device:
            expected = "expected an argument `device: torch.device` to choose the kernel by"
            raise ValueError(
                f"{name}: there are device types, but no tensors among the arguments; {expected}"
            )

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
        self._stop_player()
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
            self._lib.impl(self._name, rule, f"Autocast{key_of(device)}")

    def register_flops(self, formula: Formula) -> Formula:
        """Register what `torch.utils.flop_counter.FlopCounterMode` counts for a call.

        Args:
            formula: a function of the operator's arguments as a call gives them, with shapes in the
                place of tensors, and of ``out_shape``, the shape of the result, or a tuple of
                shapes. It returns the number of floating-point operations. All overloads of a name
                share one formula. PyTorch counts 2·m·n·k for a product, and 0 for elementwise
                operators.
        """
        base, _, _ = self._name.partition(".")
        register_formula(getattr(getattr(torch.ops, self._namespace), base), formula)
        return formula

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
