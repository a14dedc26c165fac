# SPDX-License-Identifier: MIT
"""An operator with one sample of arguments: its calls, and its right values and derivatives."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from torchpar.testing.operators.attempts import FALLS_BACK, INTERNAL, REFUSALS, OutcomeException
from torchpar.testing.operators.compare import ALIKE, close, near
from torchpar.testing.operators.tensors import Function, Tensors, cast, is_differentiable

Operator = OpOverload[..., object]


@dataclass(frozen=True)
class Sample:
    """Arguments of an operator: tensors, numbers, and lists of tensors.

    Attributes:
        args: the positional arguments.
        kwargs: the keyword arguments, by name.
    """

    args: Sequence[object]
    kwargs: Mapping[str, object] = field(default_factory=dict)


def name_of(op: Callable[..., object]) -> str:
    """The name of an operator or of a function, for messages."""
    if isinstance(op, OpOverload):
        return str(op)
    return getattr(op, "__name__", type(op).__name__)


def shapes_of(tensors: Sequence[Tensor]) -> str:
    """The tensors of a sample in a message, as "float64 (4, 3), int64 ()"."""
    return ", ".join(f"{t.dtype} {tuple(t.shape)}".removeprefix("torch.") for t in tensors)


def _with_memory(t: Tensor) -> Tensor:
    return torch.zeros(t.shape, dtype=t.dtype, device=t.device) if torch._is_zerotensor(t) else t


class Calls(TorchDispatchMode):
    """Record the operators that are called below autograd and all transforms."""

    def __init__(self) -> None:
        super().__init__()
        # The arguments of each operator's last call.
        self.seen: dict[Operator, tuple[Sequence[object], Mapping[str, object]]] = {}

    def __torch_dispatch__(
        self,
        func: Operator,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        # Forward mode makes zeros without memory, on which some operators end the process if a mode
        # is active.
        args, kwargs = tree_map_only(Tensor, _with_memory, (args, kwargs or {}))
        self.seen[func] = args, kwargs
        return func(*args, **kwargs)


class Case:
    """An operator and a sample.

    Attributes:
        overload: the operator in PyTorch's registry, if it is known.
        operands: all tensors among the arguments, detached.
        floating: the operands of a floating-point or complex dtype.
        indices: the indices of ``floating``: 0, 1 and so on.
        op: the operator, as a function of ``operands`` to the tensors that it returns.
        plain: the reference, as such a function; the operator if there is no reference.
        name: the operator's name in PyTorch's registry, or the name of the function.
        changed_first: the settings of the process that the first call of the forward and of the
            backward changed, and how; empty for cases whose first call nobody has noted.
    """

    def __init__(
        self,
        op: Callable[..., object],
        overload: Operator | None,
        reference: Callable[..., object] | None,
        sample: Sample,
    ) -> None:
        self._leaves, self._spec = tree_flatten((tuple(sample.args), dict(sample.kwargs)))
        self.callable, self.overload, self.reference = op, overload, reference
        self.name = name_of(op if overload is None else overload)
        self.operands: Tensors = tuple(t.detach() for t in self._leaves if isinstance(t, Tensor))
        self.floating: Tensors = tuple(filter(is_differentiable, self.operands))
        self.indices = tuple(range(len(self.floating)))
        self.op = self.bind(op)
        self.plain = self.bind(op if reference is None else reference)
        self.changed_first: dict[str, dict[str, str]] = {}

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[tuple[object, ...], dict[str, object]]:
        """The arguments of a call, with ``tensors`` for the operands."""
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        args, kwargs = tree_unflatten(leaves, self._spec)
        return args, kwargs

    def bind(self, function: Callable[..., object]) -> Function:
        """A function of the operator's arguments, as a function of ``operands``."""

        def bound(*tensors: Tensor) -> Tensors:
            args, kwargs = self.arguments(tensors)
            return tuple(
                leaf for leaf in tree_leaves(function(*args, **kwargs)) if isinstance(leaf, Tensor)
            )

        return bound

    @cached_property
    def is_smooth(self) -> list[bool]:
        """For each result, whether it is differentiable: floating, and not marked as constant."""
        leaves = iter(self.leaves())
        results = self.plain(*(next(leaves) if is_differentiable(t) else t for t in self.operands))
        marked = [is_differentiable(y) and y.requires_grad for y in results]
        return marked if any(marked) else list(map(is_differentiable, results))

    def smooth(self, function: Function) -> Function:
        """A function of the floating operands alone, to its differentiable results alone."""
        is_smooth = self.is_smooth
        if not any(is_smooth):
            raise OutcomeException("not run", "no differentiable result")

        def of_floating(*floating: Tensor) -> Tensors:
            given = iter(floating)
            results = function(*(next(given) if is_differentiable(t) else t for t in self.operands))
            return tuple(y for y, smooth in zip(results, is_smooth, strict=True) if smooth)

        return of_floating

    def leaves(self, operands: Sequence[Tensor] | None = None) -> Tensors:
        """Copies of the floating operands that require a gradient."""
        chosen = self.floating if operands is None else list(filter(is_differentiable, operands))
        return tuple(t.detach().clone().requires_grad_() for t in chosen)

    def of(self, operands: Sequence[Tensor]) -> "Case":
        """The same operator and sample, with ``operands`` as its tensors."""
        return Case(self.callable, self.overload, self.reference, Sample(*self.arguments(operands)))

    @cached_property
    def wide(self) -> "Case":
        """This case in float64. The results of its reference count as exact."""
        return self.of(cast(self.operands, torch.float64))

    def takes(self, operands: Sequence[Tensor], function: Function | None = None) -> Tensors:
        """The results of the operator, or of ``function``, for operands that it may refuse."""
        try:
            return (function or self.op)(*operands)
        except (*REFUSALS, TypeError, IndexError) as e:  # IndexError: too few dimensions
            if INTERNAL in str(e):
                raise  # a crash
            raise OutcomeException("not run", f"eager mode refuses: {e}") from e

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
            raise OutcomeException("not run", "no floating operand")
        if self.reference is None:
            raise OutcomeException("not run", "no reference")

    def close(
        self, actual: object, expected: object, exact: Callable[[], object] | None = None
    ) -> None:
        """`close` for results or derivatives, whose sums may have any order."""
        close(actual, expected, exact, operands=self.operands)

    def transformed(
        self,
        transform: Callable[..., object],
        numerical: Callable[..., tuple[object, float]] | None = None,
        **how: object,
    ) -> None:
        """Compare ``transform(f, case, **how)`` of the operator with that of the reference.

        ``numerical`` computes the same by finite differences. If operator and reference differ, and
        the differences tell that the reference is wrong, the operator is compared with them.
        """
        oracle = self.oracle
        try:
            expected = transform(oracle, self, **how)
        except OutcomeException:
            raise
        except Exception as e:  # a gap of PyTorch, such as an IndexError of an empty hessian
            raise OutcomeException("not run", f"the reference refuses: {e}") from e
        actual = transform(self.smooth(self.op), self, **how)
        try:
            self.close(actual, expected, lambda: transform(self.wide.oracle, self.wide, **how))
        except OutcomeException:
            if numerical is None or not {t.dtype for t in self.floating} <= {
                torch.float64,
                torch.float32,
            }:
                raise
            wide = self.wide
            by_differences, rtol = numerical(wide.oracle, wide, **how)
            theirs, mine = (
                transform(wide.oracle, wide, **how),
                cast(tuple(tree_leaves(actual)), torch.float64),
            )
            if near(theirs, by_differences, rtol) or not near(
                mine, by_differences, max(rtol, ALIKE)
            ):
                raise
        self.expect_call(lambda: transform(self.smooth(self.op), self, **how))

    def expect_call(self, compute: Callable[[], object]) -> None:
        """Raise "falls back" if a computation whose result was right skips the operator."""
        calls = Calls()
        try:
            with calls:
                compute()
        except Exception:  # some computations do not work within a mode
            return
        if self.overload is not None and self.is_visible and self.overload not in calls.seen:
            raise OutcomeException(FALLS_BACK, "")

    def resized(self, change: Callable[[Tensor, int], Tensor]) -> Iterator[tuple[str, Tensors]]:
        """For each size, operands whose dimensions of that size are changed by ``change(t, dim)``.

        Dimensions of equal size change together, so that the changed operands still fit.
        """
        for size in sorted({size for t in self.operands for size in t.shape}):
            changed = []
            for t in self.operands:
                for dim in range(t.dim()):
                    t = change(t, dim) if t.shape[dim] == size else t
                changed.append(t)
            yield f"every size of {size}", tuple(changed)
