# SPDX-License-Identifier: MIT
"""A mode in which models and optimizers compute in exact arithmetic: the same bits on every processor."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)
from torch.utils._pytree import tree_leaves, tree_map_only

from torchpar.errors import ConfigError
from torchpar.exact import products as products  # which register rules
from torchpar.exact import random as random
from torchpar.exact import reductions as reductions
from torchpar.exact.attention import scaled_dot_product_attention
from torchpar.exact.reductions import group_norm
from torchpar.exact.registry import COMPOSED, PASSING, RULES

_FUNCTIONS = {F.scaled_dot_product_attention: scaled_dot_product_attention, F.group_norm: group_norm}
# PyTorch's own are called for their errors: the rules would take negative indices.
_INDEXED = {f"aten::{name}" for name in ("scatter", "scatter_add", "index_add", "index_copy")}
Kind = Literal["passing", "rules", "missing"]


@contextmanager
def mode() -> Iterator[None]:
    """Compute in exact arithmetic: the same bits for any number of threads and any processor.

        with torchpar.exact.mode():
            model = Model()
            loss = model(x)
            loss.backward()
            optimizer.step()

    Make the model in the mode, too, so that its first weights are the same everywhere. Each row of a result
    depends on its own row of the input alone, and not on the batch around it.

    Raises:
        ConfigError: an operator that has no exact version, or a dtype other than float32.
    """
    if is_active():
        yield
        return
    with _Functions(), _Operators():
        yield


def is_active() -> bool:
    return any(isinstance(active, _Operators) for active in _get_current_dispatch_mode_stack())


@contextmanager
def ordinary() -> Iterator[None]:
    """Leave the mode, for what is exact by itself."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


class _Functions(TorchFunctionMode):
    """Replace whole functions: attention's parts do not tell which sums must not depend on other keys."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _FUNCTIONS.get(func, func)(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, (known, own_rule) = dict(kwargs or {}), _look_up(func)
        kind = kind_of(func, [*args, *kwargs.values()])
        if kind == "rules" and func._schema.name.removesuffix("_") in _INDEXED:
            func(*tree_map_only(Tensor, torch.clone, args), **tree_map_only(Tensor, torch.clone, kwargs))
        if kind == "rules" and own_rule is not None:
            with torch._C.DisableTorchFunction():  # rules do not call attention, and their calls are many
                return _call(own_rule, func, args, kwargs)
        if kind == "passing":
            with torch._C.DisableTorchFunction():
                result = func(*args, **kwargs)
            if known == "passing" or not _has_float(result):
                return result
        elif own_rule is None:
            with self:  # without autograd, operators that are made of others come whole
                result = _composition(func)(*args, **kwargs)
            if result is not NotImplemented:
                return result
        remedy = "make it of other operators; torchpar.exact.coverage lists what is missing"
        if any(word in str(func) for word in ("_foreach_", "_fused_ad", "_fused_sgd")):
            remedy = "give foreach=False to clip_grad_norm_ and the optimizer, no fused=True; take no Muon"
        elif func.namespace in ("c10d", "fsdp"):
            remedy = "add gradients by torchpar.exact.DataParallel"
        raise ConfigError(f"no exact version of {func}; {remedy}")


def kind_of(func: Any, operands: list[Any]) -> Kind:
    """Whether an operator has a rule, passes, as one of integers does, or is missing."""
    kind, _ = _look_up(func)
    for t in operands:  # processors may fuse complex products, and add sparse terms in any order
        if t.is_complex() or t.layout != torch.strided if isinstance(t, Tensor) else isinstance(t, complex):
            return "missing"
    return kind if kind == "rules" or _has_float(operands) else "passing"


@cache
def _look_up(func: Any) -> tuple[Kind, Callable[..., Any] | None]:
    """The kind of an operator of floats, and its rule, which one that is made of others does not have."""
    namespace, _, name = func._schema.name.partition("::")
    adds = "reduce" in str(func)  # ranks, and scatters with a reduction, add in an order of their own
    names = {name, name.removesuffix("_")} if namespace in ("aten", "torchpar") and not adds else set()
    own_rule = next((RULES[name] for name in names if name in RULES), None)
    if own_rule is not None or names & COMPOSED:
        return "rules", own_rule
    passes = names & PASSING or namespace == "profiler" or (namespace == "c10d" and not adds)
    return "passing" if passes else "missing", None


@cache
def _composition(func: Any) -> Callable[..., Any]:
    """A function that calls the operators that PyTorch makes ``func`` of, or returns NotImplemented."""
    composition: Callable[..., Any] = func.decompose
    if _look_up(func)[0] == "rules":
        key = torch._C.DispatchKey.CompositeExplicitAutograd
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key):
            return partial(func._op_dk, key)
        composition = decomposition_table.get(func, composition)
    return composition


def _call(own_rule: Callable[..., Any], func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Call the rule of an operator, which may write to its first operand, or to ``out``."""
    into = args[0] if func._schema.name.endswith("_") else kwargs.pop("out", None)
    result = own_rule(*args, **kwargs)
    if into is None:
        return result
    if "out" in func._overloadname and into.shape != result.shape:
        into.resize_(result.shape)
    return into.copy_(result)


def _has_float(tree: Any) -> bool:
    return any(isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex()) for t in tree_leaves(tree))


@dataclass
class Coverage:
    """The operators that a function calls, with the number of calls.

    Attributes:
        passing: those that are the same everywhere.
        rules: those with an exact version.
        missing: the others; `mode` refuses them.
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


def coverage(function: Callable[..., Any], *inputs: Any, **options: Any) -> Coverage:
    """Call ``function`` in `mode`, and where that refuses an operator in ordinary arithmetic.

    Include the backward pass and the optimizer's step in the function.
    """
    found = Coverage()

    class _Recorder(_Operators):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            calls = found.passing if kind_of(func, [*args, *kwargs.values()]) == "passing" else found.rules
            try:
                result = super().__torch_dispatch__(func, types, args, kwargs)
            except ConfigError:
                calls, result = found.missing, func(*args, **kwargs)
            calls[str(func)] += 1
            return result

    with _disable_current_modes(), _Functions(), _Recorder():
        function(*inputs, **options)
    return found
