# SPDX-License-Identifier: MIT
"""Exact mode: models and optimizers compute the same bits on every processor."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch._ops import OpOverload
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)
from torch.utils._pytree import tree_leaves, tree_map_only

from torchpar.decorating import context_manager
from torchpar.errors import ConfigError
from torchpar.exact import products as products  # which register rules
from torchpar.exact import random as random
from torchpar.exact import reductions as reductions
from torchpar.exact.attention import scaled_dot_product_attention
from torchpar.exact.loader_workers import workers_enter
from torchpar.exact.native import Metadata, check_native, like_native
from torchpar.exact.reductions import batch_norm, batch_norm_of_torch, group_norm
from torchpar.exact.registry import (
    COMPOSED,
    EXACT_RULES,
    INTEGERS,
    METADATA,
    NARROW,
    PASSING,
    PRIVATE,
    STATISTICS,
    Result,
    Rule,
)
from torchpar.exact.watch import Watch, marks
from torchpar.exact.within import within
from torchpar.ops.exact_digits import DIGITS, rounded_to

_FUNCTIONS: dict[object, Callable[..., Tensor]] = {
    F.scaled_dot_product_attention: scaled_dot_product_attention,
    F.group_norm: group_norm,
    F.batch_norm: batch_norm,
    torch.batch_norm: batch_norm_of_torch,
}
# PyTorch's versions of these are called for their errors: the rules would take negative indices.
_INDEXED = {"scatter", "scatter_add", "index_add", "index_copy"}
_TRACED = (FakeTensor, torch.SymInt, torch.SymFloat)
Kind = Literal["passing", "rules", "missing"]
Operator = OpOverload[..., object]


@context_manager("torchpar.exact.mode")
def mode() -> Iterator[None]:
    """Compute in exact arithmetic: the same bits for any number of threads and any processor.

        with torchpar.exact.mode():
            model = Model()
            loss = model(x)
            loss.backward()
            optimizer.step()

    Make the model in the mode, too, so that its first weights are the same everywhere. Each row of
    a result depends only on its own row of the input, and not on the other rows of the batch.

    The mode holds wherever autograd calls functions, such as in activation checkpoints. Workers of
    a `DataLoader` that is iterated in the mode are in it. After the mode, a warning names each line
    that computes with its tensors what depends on the processor.

    Raises:
        ConfigError: an operator that has no exact version, or floats of another dtype than float32,
            bfloat16 and float16.
    """
    if is_active():
        yield
    else:
        with _computed_by(_Operators()):
            yield


@contextmanager
def _computed_by(operators: "_Operators") -> Iterator[None]:
    _watch.end()
    try:
        with workers_enter(mode, is_active), _Functions(), operators:
            yield
    finally:
        if not any(isinstance(one, _Functions) for one in _get_current_function_mode_stack()):
            _watch.begin()


def is_active() -> bool:
    return any(
        isinstance(active, _Operators) and active.is_exact
        for active in _get_current_dispatch_mode_stack()
    )


class _Functions(TorchFunctionMode):
    """Replace functions whose operators do not show which sums must be exact, such as attention.

    In attention, a sum must not depend on the keys that a query does not attend to.
    """

    is_exact = True  # but in a block of `ordinary`

    def __init__(self) -> None:
        super().__init__()
        self._within = within(self)

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs, replacement = kwargs or {}, _FUNCTIONS.get(func)
        if not self.is_exact:
            return func(*args, **kwargs)
        if replacement is None:
            return self._within.get(func, func)(*args, **kwargs)
        (native,) = check_native(func, args, kwargs)
        result = replacement(*args, **kwargs)
        return result if native is None else like_native(result, native.strides)


class _Operators(TorchDispatchMode):
    knows_aten_alone = True  # so that operators of torchpar.ops decompose, where they can
    is_exact = True  # so that Muon computes in float32; False in a block of `ordinary`
    marks = True  # whether arithmetic outside of the mode with the results is warned of

    def __torch_dispatch__(
        self,
        func: Operator,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if not self.is_exact:
            return func(*args, **kwargs or {})
        if types and any(_answers(t, func) for t in tree_leaves((args, kwargs))):
            return NotImplemented  # its operators on the tensors that it holds arrive here
        if _is_traced(args) and kind_of(func, args)[0] == "rules":
            return func(*args, **kwargs or {})
        result = self._compute(func, args, kwargs)
        if self.marks and not _returns_views(func):
            marks.add(result)
        return result

    def _compute(
        self, func: Operator, args: Sequence[object], kwargs: Mapping[str, object] | None
    ) -> object:
        kwargs, (known, own_rule, _) = dict(kwargs or {}), _look_up(func)
        kind, foreign = kind_of(func, [*args, *kwargs.values()])
        if kind == "passing":
            result = _passed(func, args, kwargs)
            if known == "passing" or not _has_float(result):
                return result
        elif kind == "rules":
            name = func._schema.name.partition("::")[2]
            if name.removesuffix("_") in _INDEXED:
                func(
                    *tree_map_only(Tensor, torch.clone, args),
                    **tree_map_only(Tensor, torch.clone, kwargs),
                )
            native = () if name in PRIVATE else check_native(func, _saved(name, args), kwargs)
            if own_rule is not None:
                # Rules do not call attention, and their calls are many. Autocast would change
                # their dtypes.
                with torch._C.DisableTorchFunction(), torch._C._DisableAutocast():
                    return _call_rule(own_rule, func, args, kwargs, native)
        if not foreign and kind == known:
            with self:  # without autograd, composite operators arrive here undecomposed
                result = _composition(func)(*args, **kwargs)
            if result is not NotImplemented:
                return result
        raise ConfigError(f"no exact version of {func}{foreign}; {_remedy(func)}")


def _remedy(func: Operator) -> str:
    if "_amp_" in str(func):
        return "train without GradScaler, such as in bfloat16"
    if any(word in str(func) for word in ("_foreach_", "_fused_ad", "_fused_sgd")):
        return "give foreach=False to clip_grad_norm_ and the optimizer, no fused=True"
    if func.namespace in ("c10d", "fsdp"):
        return "add gradients by torchpar.exact.DataParallel"
    return "make it of other operators; torchpar.exact.coverage lists what is missing"


def _answers(operand: object, func: Operator) -> bool:
    """Whether an operand computes the operator itself, as a DTensor does with its local tensor.

    A subclass with values of its own does not: it could compute with them outside of the mode.
    Tensors with which PyTorch traces answer for their metadata alone, where an error would end the
    process.
    """
    if (
        not isinstance(operand, Tensor)
        or type(operand).__torch_dispatch__ is Tensor.__torch_dispatch__
    ):
        return False
    if func._schema.name in METADATA:
        return True
    return not isinstance(operand, FakeTensor | FunctionalTensor) and not _has_values(operand)


def _has_values(t: Tensor) -> bool:
    """Whether a tensor has values of its own, and does not only hold other tensors."""
    try:
        with torch._C.DisableTorchFunction():
            t.untyped_storage().data_ptr()
    except RuntimeError:
        return False
    return True


def _is_traced(operands: Sequence[object]) -> bool:
    """Whether an operand, or its size, has no value yet."""
    return any(
        isinstance(one, _TRACED) or (isinstance(one, Tensor) and one._has_symbolic_sizes_strides)
        for one in operands
    )


def kind_of(func: Operator, operands: Sequence[object]) -> tuple[Kind, str]:
    """The kind of an operator with these operands, and the kind of operands that is refused."""
    leaves = tree_leaves(operands)
    if foreign := next(filter(None, map(_foreign, leaves)), ""):
        return "missing", f" for {foreign} operands"
    kind, _, of_integers = _look_up(func)
    return "passing" if of_integers and not _has_float(leaves) else kind, ""


def _is_same_outside(func: Operator, operands: Sequence[object], result: object) -> bool:
    """Whether an operator has the same bits on every processor, except for the sign of 0."""
    name = func._schema.name.removeprefix("aten::").removesuffix("_")
    return (
        not _has_float(result)
        or name in reductions.CHOOSING
        or (name in ("add", "sub") and len(operands) == 2)  # with alpha there is a product
        or kind_of(func, operands)[0] == "passing"
    )


_watch = Watch(_is_same_outside)


def _foreign(operand: object) -> str:
    """The kind of an operand for which processors compute different bits, or "".

    Processors fuse complex products, add sparse terms in any order, and saturate sums of quantized
    products.
    """
    if not isinstance(operand, Tensor):
        return "complex" if isinstance(operand, complex) else ""
    if operand.is_complex():
        return "complex"
    if operand.is_quantized:
        return "quantized"
    return "" if operand.layout == torch.strided else "sparse"


@cache
def _look_up(func: Operator) -> tuple[Kind, Rule | None, bool]:
    """The kind of an operator, its own rule if there is one, and whether it passes for integers."""
    namespace, _, name = func._schema.name.partition("::")
    # Collectives, and scatters with a reduction, add in any order.
    adds = "reduce" in str(func)
    if namespace in ("c10d", "_c10d_functional"):
        return "missing" if adds else "passing", None, True
    arguments = (*func._schema.arguments, *func._schema.returns)
    if namespace == "profiler" or not any("Tensor" in str(one.type) for one in arguments):
        return "passing", None, True
    if namespace not in ("aten", "torchpar") or _is_implicit(func):
        return "missing", None, False
    names = {name, name.removesuffix("_")}
    of_integers = bool(names & INTEGERS)
    if adds:
        return "missing", None, of_integers
    own_rule = next((EXACT_RULES[name] for name in names if name in EXACT_RULES), None)
    if own_rule is not None or names & COMPOSED:
        return "rules", own_rule, of_integers
    return "passing" if names & PASSING else "missing", None, of_integers


def _is_implicit(func: Operator) -> bool:
    """Whether PyTorch always decomposes the operator, except in inference mode."""
    has_kernel = partial(torch._C._dispatch_has_kernel_for_dispatch_key, func.name())
    return has_kernel("CompositeImplicitAutograd") and not has_kernel("CPU")


@cache
def _is_cast(func: Operator) -> bool:
    return func._schema.name in ("aten::copy_", "aten::_to_copy")


def _rounded_once(func: Operator, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[Any]:
    """The arguments, where in a cast to 16 bits the operand is rounded already.

    PyTorch would round wider operands to float32 before.
    """
    if not _is_cast(func):
        return args
    place = int(len(args) > 1)  # of the operand; the target comes before it
    dtype = kwargs.get("dtype") if place == 0 else args[0].dtype
    operand = args[place]
    if dtype not in NARROW or operand.dtype in DIGITS or operand.dtype.itemsize < 4:
        return args
    return [*args[:place], rounded_to(operand.double(), dtype), *args[place + 1 :]]


def _passed(func: Operator, args: Sequence[Any], kwargs: dict[str, Any]) -> object:
    """Call an operator that passes, so that it rounds in the same way on every device."""
    if _takes_wide_number(func, args):
        return _written(_by_wide_number(func), func, args, kwargs, ())
    args = _rounded_once(func, args, kwargs)
    with torch._C.DisableTorchFunction():
        return func(*args, **kwargs)


@cache
def _is_product(func: Operator) -> bool:
    return func._schema.name.removesuffix("_") in ("aten::mul", "aten::div")


def _takes_wide_number(func: Operator, args: Sequence[Any]) -> bool:
    """Whether a product or quotient has an operand of 16 bits, and one of a single number.

    PyTorch takes a number that is the second operand in float32 on a CPU. It rounds the first
    operand to 16 bits, and on a GPU the second, too.
    """
    if not _is_product(func) or not isinstance(args[1], Tensor):
        return False
    a, b = args[:2]
    narrow, number = (b, a) if a.dim() == 0 else (a, b)
    if narrow.dim() == 0 or number.dim() > 0:
        return False
    return narrow.dtype in NARROW and narrow.dtype != number.dtype


@cache
def _by_wide_number(func: Operator) -> Rule:
    """The rule of an operator that `_takes_wide_number`: float32, as with a Python number."""
    compute = torch.mul if "mul" in func._schema.name else torch.div

    def call(a: Tensor, b: Tensor, **options: Any) -> Tensor:
        dtype = torch.result_type(a, b)
        result: Tensor = compute(a.float(), b.float(), **options)
        return result.to(dtype)

    return call


@cache
def _returns_views(func: Operator) -> bool:
    """Whether an operator's results may be operands, or views of them, that it does not change."""
    return func.is_view or (_is_implicit(func) and not func._schema.is_mutable)


@cache
def _composition(func: Operator) -> Callable[..., object]:
    """A function that calls the operators of which ``func`` consists, or returns NotImplemented."""
    composition: Callable[..., object] = func.decompose
    if _look_up(func)[0] == "rules":
        key = torch._C.DispatchKey.CompositeExplicitAutograd
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key):
            return partial(func._op_dk, key)
        composition = decomposition_table.get(func, composition)
    return composition


def _saved(name: str, args: Sequence[Any]) -> Sequence[Any]:
    """The operands, with a norm's statistics in the dtype in which PyTorch saves them on a CPU."""
    places = STATISTICS.get(name.removesuffix("_backward"))
    if places is None or not name.endswith("_backward") or args[places[0]].dtype not in NARROW:
        return args
    operand, mean, deviation, weight = places
    like = args[operand] if args[weight] is None else args[weight]
    return [one.to(like.dtype) if i in (mean, deviation) else one for i, one in enumerate(args)]


def _call_rule(
    own_rule: Rule,
    func: Operator,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    native: Sequence[Metadata | None],
) -> object:
    """Call an own rule, or the operator where the rule reads values, which a meta tensor lacks.

    The operator refuses what a rule failed at for another reason.
    """
    try:
        return _written(own_rule, func, args, dict(kwargs), native)
    except RuntimeError:
        if not any(isinstance(t, Tensor) and t.is_meta for t in args):
            raise
        return func(*args, **kwargs)


def _written(
    own_rule: Rule,
    func: Operator,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    native: Sequence[Metadata | None],
) -> Result | None:
    """Call an operator's rule. In-place and ``out`` variants write the result to their tensors."""
    outs: list[Tensor] = [kwargs.pop(one.name) for one in func._schema.arguments if one.is_out]
    result = own_rule(*args, **kwargs)
    if func._schema.name.endswith("_"):
        written: Tensor = args[0].copy_(result)
        return written if func._schema.returns else None
    if not outs:
        return _as_native(func, result, native)
    results = result if isinstance(result, tuple) else (result,)
    for into, found in zip(outs, results, strict=True):
        assert found is not None
        if into.dtype != found.dtype and into.dtype not in NARROW:
            raise ConfigError(
                f"out is {into.dtype}, expected {found.dtype}, in which {func} is exact"
            )
        if into.shape != found.shape:
            into.resize_(found.shape)
        into.copy_(found)
    return tuple(outs) if isinstance(result, tuple) else outs[0]


def _as_native(func: Operator, result: Result, native: Sequence[Metadata | None]) -> Result:
    """The results of a rule, in the native operator's order of elements."""
    if not native:
        return result
    if isinstance(result, Tensor):
        (expected,) = native
        return _in_order(func, result, expected)
    keeps_float32 = func._schema.name.removeprefix("aten::") in STATISTICS
    return tuple(
        [
            None if found is None else _in_order(func, found, expected, i and keeps_float32)
            for i, (found, expected) in enumerate(zip(result, native, strict=True))
        ]
    )


def _in_order(
    func: Operator, found: Tensor, expected: Metadata | None, keeps_float32: bool | int = False
) -> Tensor:
    if expected is None:
        return found
    if expected.dtype in NARROW and found.dtype == torch.float32:
        if keeps_float32:
            return found
        found = found.to(expected.dtype)
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        raise RuntimeError(
            f"the rule of {func} returns {found.dtype} of shape {tuple(found.shape)}, "
            f"expected {expected.dtype} of shape {tuple(expected.shape)}"
        )
    return like_native(found, expected.strides)


def _has_float(tree: object) -> bool:
    return any(isinstance(t, Tensor) and t.is_floating_point() for t in tree_leaves(tree))


@dataclass
class Coverage:
    """The operators that a function calls, with the number of calls.

    Attributes:
        passing: operators whose ordinary results have the same bits everywhere.
        rules: operators with an exact version.
        missing: operators with neither; `mode` refuses them.
    """

    passing: Counter[str] = field(default_factory=Counter)
    rules: Counter[str] = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = []
        for title, calls in vars(self).items():
            names = ", ".join(f"{name} ({n})" for name, n in sorted(calls.items())) or "none"
            lines.append(f"{title}: {names}")
        return "\n".join(lines)


def coverage(function: Callable[..., object], *inputs: object, **options: object) -> Coverage:
    """Return which operators ``function`` calls in `mode`, and which of them the mode refuses.

    Those that it refuses are computed in ordinary arithmetic. Include the backward pass and the
    optimizer's step in the function.
    """
    found = Coverage()

    class _Recorder(_Operators):
        marks = False

        def __torch_dispatch__(
            self,
            func: Operator,
            types: Sequence[type],
            args: Sequence[object] = (),
            kwargs: Mapping[str, object] | None = None,
        ) -> object:
            kwargs = kwargs or {}
            kind, _ = kind_of(func, [*args, *kwargs.values()])
            calls = found.passing if kind == "passing" else found.rules
            try:
                result = super().__torch_dispatch__(func, types, args, kwargs)
            except ConfigError:
                calls, result = found.missing, func(*args, **kwargs)
            if result is not NotImplemented:
                calls[str(func)] += 1
            return result

    with _disable_current_modes(), _computed_by(_Recorder()):
        function(*inputs, **options)
    return found
