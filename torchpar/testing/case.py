# SPDX-License-Identifier: MIT
"""An operator with one sample of its arguments: its calls, layouts, right derivatives, and comparisons."""

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

Tensors = tuple[Tensor, ...]
Function = Callable[..., Tensors]
"""A function of tensors to a tuple of tensors."""

Layout = Callable[[Tensor], Tensor]
Attempts = Generator[tuple[str, Callable[[], Any]], None, Any]  # labels and trials; a remark

REFUSALS = (RuntimeError, NotImplementedError, ValueError)  # a TypeError is a mistake in a rule
FALLS_BACK = "falls back"  # right, and computed without the operator
LOW = (torch.bfloat16, torch.float16)


class Outcome(Exception):
    """An outcome of the table, and what happened."""


@dataclass(frozen=True)
class Sample:
    """Arguments of an operator. Tensors may stand in lists."""

    args: Sequence[Any]
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def _with_memory(t: Tensor) -> Tensor:
    return torch.zeros(t.shape, dtype=t.dtype, device=t.device) if torch._is_zerotensor(t) else t


class Calls(TorchDispatchMode):
    """Record the operators that are called below autograd and all transforms."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[Any, tuple[Any, Any]] = {}  # the last arguments of each

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # On zeros without memory, which forward mode makes, some operators end the process within a mode.
        args, kwargs = tree_map_only(Tensor, _with_memory, (args, kwargs or {}))
        self.seen[func] = args, kwargs
        return func(*args, **kwargs)


class Case:
    """An operator and a sample.

    Attributes:
        overload: the operator in PyTorch's registry, if it is known.
        operands: all tensors among the arguments, detached.
        floating: those of a floating-point dtype.
        op: the operator, as a function of ``operands`` to its tensors.
        plain: the same of the reference; without one, of the operator.
    """

    def __init__(self, op: Callable[..., Any], overload: Any, reference: Any, sample: Sample) -> None:
        self._leaves, self._spec = tree_flatten((tuple(sample.args), dict(sample.kwargs)))
        self.callable, self.overload, self.reference = op, overload, reference
        self.operands: Tensors = tuple(t.detach() for t in self._leaves if isinstance(t, Tensor))
        self.floating: Tensors = tuple(t for t in self.operands if t.is_floating_point())
        self.op = self.bind(op)
        self.plain = self.bind(op if reference is None else reference)

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call, with ``tensors`` for the operands."""
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        args, kwargs = tree_unflatten(leaves, self._spec)
        return args, kwargs

    def bind(self, function: Callable[..., Any]) -> Function:
        """A function of the operator's arguments, as one of ``operands``."""

        def bound(*tensors: Tensor) -> Tensors:
            args, kwargs = self.arguments(tensors)
            return tuple(leaf for leaf in tree_leaves(function(*args, **kwargs)) if isinstance(leaf, Tensor))

        return bound

    @cached_property
    def is_smooth(self) -> list[bool]:
        """Which results are differentiable: the floating ones, but for those that are marked as constant."""
        leaves = iter(self.leaves())
        results = self.plain(*(next(leaves) if t.is_floating_point() else t for t in self.operands))
        marked = [y.is_floating_point() and y.requires_grad for y in results]
        return marked if any(marked) else [y.is_floating_point() for y in results]

    def smooth(self, function: Function) -> Function:
        """A function of the floating operands to its differentiable results; other operands are constant."""
        is_smooth = self.is_smooth
        if not any(is_smooth):
            raise Outcome("not run", "no differentiable result")

        def of_floating(*floating: Tensor) -> Tensors:
            given = iter(floating)
            results = function(*(next(given) if t.is_floating_point() else t for t in self.operands))
            return tuple(y for y, smooth in zip(results, is_smooth, strict=True) if smooth)

        return of_floating

    def leaves(self, operands: Sequence[Tensor] | None = None) -> Tensors:
        """Copies of the floating operands that require a gradient."""
        chosen = self.floating if operands is None else [t for t in operands if t.is_floating_point()]
        return tuple(t.detach().clone().requires_grad_() for t in chosen)

    def takes(self, operands: Sequence[Tensor], function: Function | None = None) -> Tensors:
        """The results of the operator, or of another function, for operands that it may refuse."""
        try:
            return (function or self.op)(*operands)
        except (*REFUSALS, TypeError, IndexError) as e:  # IndexError: too few dimensions
            raise Outcome("not run", f"eager mode refuses: {e}") from e

    @cached_property
    def is_visible(self) -> bool:
        """Whether a call of the operator can be recorded."""
        with Calls() as calls:
            self.op(*self.operands)
        return self.overload in calls.seen

    @cached_property
    def oracle(self) -> Function:
        """The reference, a differentiable function, of the floating operands."""
        self.expect_reference()
        return self.smooth(self.plain)

    def expect_reference(self) -> None:
        if not self.floating:
            raise Outcome("not run", "no floating operand")
        if self.reference is None:
            raise Outcome("not run", "no reference")

    def transformed(self, transform: Callable[..., Any], **how: Any) -> None:
        """Compare ``transform(f, case, **how)`` of the operator with that of the reference."""
        expected = transform(self.oracle, self, **how)
        close(transform(self.smooth(self.op), self, **how), expected)
        self.expect_call(lambda: transform(self.smooth(self.op), self, **how))

    def expect_call(self, compute: Callable[[], Any]) -> None:
        """Raise an `Outcome` if a computation that was right does not call the operator."""
        calls = Calls()
        try:
            with calls:
                compute()
        except Exception:  # not all that works does so within a mode
            return
        if self.overload is not None and self.is_visible and self.overload not in calls.seen:
            raise Outcome(FALLS_BACK, "")

    def resized(self, change: Callable[[Tensor, int], Tensor]) -> Iterator[tuple[str, Tensors]]:
        """Operands in which all dimensions of one size have changed: ``change(t, dim)`` changes one.

        Dimensions of equal size are taken for the same one, so that the changed operands still fit.
        """
        for size in sorted({size for t in self.operands for size in t.shape}):
            changed = []
            for t in self.operands:
                for dim in range(t.dim()):
                    t = change(t, dim) if t.shape[dim] == size else t
                changed.append(t)
            yield f"every size of {size}", tuple(changed)


def normal_like(t: Tensor, seed: int = 9) -> Tensor:
    """Normally distributed numbers of the shape, dtype and device of a tensor, the same in each run."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device, t.dtype)


def cast(operands: Tensors, dtype: torch.dtype) -> Tensors:
    return tuple(t.to(dtype) if t.is_floating_point() else t for t in operands)


def rolled(t: Tensor, by: int) -> Tensor:
    """The same numbers in another order, which an operator with a restricted domain takes, too."""
    return t.flatten().roll(by).view(t.shape)


def gradients(ys: Sequence[Tensor], xs: Sequence[Tensor], incoming: Sequence[Tensor], **how: Any) -> Tensors:
    dependent = [i for i, y in enumerate(ys) if y.requires_grad] or range(len(ys))
    ys, incoming = [ys[i] for i in dependent], [incoming[i] for i in dependent]
    found: Tensors = torch.autograd.grad(ys, xs, incoming, allow_unused=True, materialize_grads=True, **how)
    return found


# Judges


def close(actual: Any, expected: Any) -> None:
    """Compare the tensors in two structures, by the tolerances of `torch.testing.assert_close`."""
    for a, e in _pairs(actual, expected):
        try:
            assert_close(a, e, equal_nan=True)
        except AssertionError as error:
            raise Outcome("wrong", _difference(a, e)) from error


def _pairs(actual: Any, expected: Any) -> Iterator[tuple[Tensor, Tensor]]:
    found, right = tree_leaves(actual), tree_leaves(expected)
    if len(found) != len(right):
        raise Outcome("wrong", f"{len(found)} results, expected {len(right)}")
    return zip(found, right, strict=True)


def _difference(actual: Tensor, expected: Tensor) -> str:
    if actual.shape != expected.shape:
        return f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    for what in ("dtype", "device"):
        if getattr(actual, what) != getattr(expected, what):
            return f"{what} {getattr(actual, what)}, expected {getattr(expected, what)}"
    a, e = actual.detach().double(), expected.detach().double()
    size = float(e.abs().max())
    return f"off by {float((a - e).abs().max()):.1e}, of {size:.1e}" if a.any() else f"0, of {size:.1e}"


def same_metadata(actual: Tensors, expected: Tensors) -> None:
    """Compare shape, dtype, device, and the strides that matter."""
    for a, e in _pairs(actual, expected):
        if (a.shape, a.dtype, a.device) != (e.shape, e.dtype, e.device):
            raise Outcome("wrong", _difference(a, e))
        long = [dim for dim, size in enumerate(e.shape) if size != 1 and e.numel()]
        if any(a.stride(dim) != e.stride(dim) for dim in long):
            raise Outcome("wrong", f"strides {a.stride()}, expected {e.stride()}")


def same_bits(actual: Tensors, expected: Tensors) -> None:
    for a, e in _pairs(actual, expected):
        bits = [t.detach().resolve_neg().contiguous().flatten().view(torch.uint8) for t in (a, e)]
        if not torch.equal(*bits):
            raise Outcome("wrong", f"other bits: {_difference(a, e)}")


def accurate(actual: Tensors, native: Tensors, exact: Tensors) -> None:
    """Accept an error of at most twice that of ``native``, and two roundings of the largest result."""
    for (a, n), wide in zip(_pairs(actual, native), exact, strict=True):
        if (a.shape, a.dtype) != (n.shape, n.dtype):
            raise Outcome("wrong", _difference(a, n))
        if a.numel() and a.is_floating_point():
            exactly = wide.detach().double()
            error, theirs = (float((t.detach().double() - exactly).abs().max()) for t in (a, n))
            limit = 2 * theirs + 2 * torch.finfo(a.dtype).eps * float(exactly.abs().max())
            if not error <= limit and limit < math.inf:
                raise Outcome("wrong", f"off by {error:.1e}, expected at most {limit:.1e}")


# Layouts


def _permuted(t: Tensor, dims: list[int]) -> Tensor:
    return t.permute(dims).contiguous().permute([dims.index(dim) for dim in range(t.dim())])


def _stepped(t: Tensor) -> Tensor:
    """A view of every second element, between which the buffer holds NaN."""
    every_second = (slice(None, None, 2),) * t.dim()
    buffer = t.new_full([2 * size for size in t.shape], math.nan if t.is_floating_point() else 1)
    buffer[every_second] = t
    return buffer[every_second]


# Functions of a tensor to one of the same shape, and (but for the expanded ones) of the same values.
LAYOUTS: dict[str, Layout] = {
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t.clone(),
    "permuted": lambda t: _permuted(t, [*range(t.dim())][1:] + [*range(t.dim())][:1]),
    "stepped": _stepped,
    "expanded": lambda t: t[:1].expand_as(t) if t.dim() and t.numel() else t,
    "expanded last": lambda t: t[..., :1].expand_as(t) if t.dim() and t.numel() else t,
    # Of an address that is not aligned.
    "offset": lambda t: torch.cat([t.new_zeros(3), t.flatten()])[3:].view(t.shape),
    # As z.conj().imag, whose sign is pending.
    "negated": lambda t: torch._neg_view(-t) if t.is_floating_point() else t,
}
