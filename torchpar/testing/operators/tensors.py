# SPDX-License-Identifier: MIT
"""An operator with one sample of arguments: its calls, layouts, right derivatives, comparisons."""

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

Tensors = tuple[Tensor, ...]
Function = Callable[..., Tensors]
"""A function of tensors to a tuple of tensors."""

Layout = Callable[[Tensor], Tensor]
Operator = OpOverload[..., object]
Attempt = tuple[str, Callable[[], None]]  # a label, and a trial
Attempts = Iterator[Attempt]
AttemptsAndRemark = Generator[Attempt, None, str]

REFUSALS = (RuntimeError, NotImplementedError, ValueError)  # a TypeError is a mistake in a rule
INTERNAL = "INTERNAL ASSERT FAILED"  # in a message of PyTorch: a crash, not a refusal
FALLS_BACK = "falls back"  # the result is right, but was computed without the operator
ALIKE = 1e-3  # relative difference up to which numbers are equal when a cause is named
LOW = (torch.bfloat16, torch.float16)


class Outcome(Exception):
    """An outcome of the table, and what happened."""


@dataclass(frozen=True)
class Sample:
    """Arguments of an operator. Lists may hold tensors."""

    args: Sequence[object]
    kwargs: Mapping[str, object] = field(default_factory=dict)


def _with_memory(t: Tensor) -> Tensor:
    return torch.zeros(t.shape, dtype=t.dtype, device=t.device) if torch._is_zerotensor(t) else t


def is_differentiable(t: Tensor) -> bool:
    """Whether a tensor's dtype is a floating or a complex one."""
    return t.is_floating_point() or t.is_complex()


class Calls(TorchDispatchMode):
    """Record the operators that are called below autograd and all transforms."""

    def __init__(self) -> None:
        super().__init__()
        # The last arguments of each.
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
        op: the operator, as a function of ``operands`` to the tensors that it returns.
        plain: the reference, as such a function; the operator if there is no reference.
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
        self.operands: Tensors = tuple(t.detach() for t in self._leaves if isinstance(t, Tensor))
        self.floating: Tensors = tuple(filter(is_differentiable, self.operands))
        self.op = self.bind(op)
        self.plain = self.bind(op if reference is None else reference)

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
            raise Outcome("not run", "no differentiable result")

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
        except Outcome:
            raise
        except Exception as e:  # a gap of PyTorch, such as an IndexError of an empty hessian
            raise Outcome("not run", f"the reference refuses: {e}") from e
        actual = transform(self.smooth(self.op), self, **how)
        try:
            self.close(actual, expected, lambda: transform(self.wide.oracle, self.wide, **how))
        except Outcome:
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
        """Raise an `Outcome` if a computation whose result was right skips the operator."""
        calls = Calls()
        try:
            with calls:
                compute()
        except Exception:  # some computations do not work within a mode
            return
        if self.overload is not None and self.is_visible and self.overload not in calls.seen:
            raise Outcome(FALLS_BACK, "")

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


def normal_like(t: Tensor, seed: int = 9) -> Tensor:
    """Normally distributed numbers like ``t`` in shape, dtype and device, the same in each run."""
    generator = torch.Generator().manual_seed(seed)
    # Rounded to float32, so that a tensor and its copy in float64 get the same numbers.
    found = torch.randn(
        (*t.shape, 1 + t.is_complex()), generator=generator, dtype=torch.float64
    ).float()
    return (torch.view_as_complex(found) if t.is_complex() else found[..., 0]).to(t.device, t.dtype)


def moved_by_a_rounding(t: Tensor, seed: int) -> Tensor:
    """Change each number by about one rounding, otherwise for each seed."""
    return t * (1 + torch.finfo(t.dtype).eps * normal_like(t, seed)) if is_differentiable(t) else t


def cast(operands: Tensors, dtype: torch.dtype) -> Tensors:
    """Convert floating tensors to ``dtype``, and complex tensors to its complex counterpart.

    The counterpart is complex128 for float64, and complex64 for all other dtypes.
    """
    of_complex = torch.complex128 if dtype == torch.float64 else torch.complex64
    dtypes = [
        dtype if t.is_floating_point() else of_complex if t.is_complex() else t.dtype
        for t in operands
    ]
    return tuple(t.to(to) for t, to in zip(operands, dtypes, strict=True))


def real(t: Tensor) -> Tensor:
    """A real tensor, or the real and imaginary parts of a complex one."""
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def rolled(t: Tensor, by: int) -> Tensor:
    """The same numbers in another order, so that they stay in the domain of an operator."""
    return t.flatten().roll(by).view(t.shape)


def gradients(
    ys: Sequence[Tensor], xs: Sequence[Tensor], incoming: Sequence[Tensor], **how: bool
) -> Tensors:
    dependent = [i for i, y in enumerate(ys) if y.requires_grad] or range(len(ys))
    ys, incoming = [ys[i] for i in dependent], [incoming[i] for i in dependent]
    found: Tensors = torch.autograd.grad(
        ys, xs, incoming, allow_unused=True, materialize_grads=True, **how
    )
    return found


# Judges


def close(
    actual: object,
    expected: object,
    exact: Callable[[], object] | None = None,
    others: Callable[[], Iterable[tuple[object, object]]] = lambda: (),
    operands: Sequence[Tensor] = (),
) -> None:
    """Compare the tensors in two structures, by the tolerances of `torch.testing.assert_close`.

    These tolerances do not grow with the length of sums. ``exact`` computes ``expected`` in
    float64. With it, a result with a larger error is also right in one of three cases:

    - It is at most twice the error of ``expected``, plus two roundings of the largest number.
    - The error of ``expected`` may be small by chance, or in one layout. ``others`` gives results
      of similar operands, and of these in other layouts, each with its result in float64. The
      largest of all their errors takes the place of that of ``expected``.
    - It is an error of a sum of ``operands`` in one chain: see `chain_error`.

    Results of float64 are compared by the tolerances alone.
    """
    pairs = list(_pairs(actual, expected))
    for i, (a, e) in enumerate(pairs):
        try:
            assert_close(a, e, equal_nan=True)
        except AssertionError as error:
            wide = None
            if exact is not None and is_differentiable(a) and a.dtype != torch.float64:
                wide = tree_leaves(exact())[i]
            if wide is not None and _is_like(a, e):
                mine, limit = _errors(a, e, wide)
                if mine <= limit < math.inf:
                    continue
                limits = [
                    _errors(*(tree_leaves(one)[i] for one in (n, n, w)))[1] for n, w in others()
                ]
                limits.append(chain_error(operands) * float(real(wide.detach()).abs().max()))
                if mine <= max(limits) < math.inf:
                    continue
            which = f"[{i}] " if len(pairs) > 1 else ""
            raise Outcome("wrong", which + _difference(a, e)) from error


LARGEST_CHAIN_ERROR = 5e-5  # so that a relative error of 1e-4 is always found


def chain_error(operands: Sequence[Tensor]) -> float:
    """The largest error of a float32 sum in one chain, relative to the largest number.

    A chain adds term after term, as a plain loop does. Its errors were measured with products of
    100, 784 and 2000 terms k: √k/2·ε of the largest result, and k/8·ε if all terms are equal, whose
    roundings do not cancel. k is at most the longest dimension of an operand, and for equal terms
    the longest one along which an operand repeats. Sums of 16-bit numbers are sums of float32, too:
    their own ε would excuse a sum in 16 bits. No more than `LARGEST_CHAIN_ERROR` is accepted.
    """
    longest = max((size for t in operands for size in t.shape), default=0)
    repeated = max((_longest_repeat(t) for t in operands if is_differentiable(t)), default=0)
    eps = torch.finfo(torch.float32).eps
    return min(eps * max(math.sqrt(longest) / 2, repeated / 8), LARGEST_CHAIN_ERROR)


def _longest_repeat(t: Tensor) -> int:
    """The longest dimension along which all numbers are equal; 0 if there is none."""
    if t.layout != torch.strided or t.is_meta or not t.numel():
        return 0
    repeats = [
        size
        for dim, size in enumerate(t.shape)
        if size > 1 and bool((t == t.narrow(dim, 0, 1)).all())
    ]
    return max(repeats, default=0)


def near(actual: object, expected: object, rtol: float) -> bool:
    """Whether all numbers differ by at most ``rtol`` of the largest number."""
    found, right = tree_leaves(actual), tree_leaves(expected)
    return all(
        a.shape == e.shape and bool((a - e).abs().max() <= rtol * e.abs().max())
        for a, e in zip(found, right, strict=True)
        if e.numel()
    )


def _is_like(actual: Tensor, native: Tensor) -> bool:
    return (actual.shape, actual.dtype, actual.device) == (
        native.shape,
        native.dtype,
        native.device,
    )


def _errors(actual: Tensor, native: Tensor, exact: Tensor) -> tuple[float, float]:
    """The error of ``actual``, and the largest error that is accepted."""
    exactly = real(exact.detach()).double()
    error, theirs = (
        float((real(t.detach()).double() - exactly).abs().max()) for t in (actual, native)
    )
    return error, 2 * theirs + 2 * torch.finfo(actual.dtype).eps * float(exactly.abs().max())


def _pairs(actual: object, expected: object) -> Iterator[tuple[Tensor, Tensor]]:
    found, right = tree_leaves(actual), tree_leaves(expected)
    if len(found) != len(right):
        raise Outcome("wrong", f"{len(found)} results, expected {len(right)}")
    return zip(found, right, strict=True)


def _difference(actual: Tensor, expected: Tensor) -> str:  # noqa: PLR0911  # one for each mistake
    if actual.shape != expected.shape:
        if (
            actual.dim() > 1
            and actual.mT.shape == expected.shape
            and near(actual.mT, expected, ALIKE)
        ):
            return f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}; transposed"
        summed = _summed(actual, expected)
        if summed is not None and near(summed, expected, ALIKE):
            missing = "the sum over a broadcast dimension is missing"
            return f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}; {missing}"
        return f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    for what in ("dtype", "device"):
        if getattr(actual, what) != getattr(expected, what):
            return f"{what} {getattr(actual, what)}, expected {getattr(expected, what)}"
    a, e = (real(t.detach()).double() for t in (actual, expected))
    if not torch.equal(a.isnan(), e.isnan()):
        return (
            f"NaN at {int(a.isnan().sum())} of {a.numel()} places, expected at "
            f"{int(e.isnan().sum())}"
        )
    size = float(e.nan_to_num(0, math.inf, -math.inf).abs().max())
    is_infinite = a.isinf() | e.isinf()
    at_infinity = bool((a != e)[is_infinite].any())
    a, e = a.nan_to_num(0), e.nan_to_num(0)  # infinities count as the largest numbers
    if not a.any():
        return f"0, of {size:.1e}"
    is_conjugate = actual.is_complex() and near(actual.conj(), expected, ALIKE)
    cause = "conjugated" if is_conjugate else likely_cause(a, e)
    off = math.inf if at_infinity else float((a - e).abs().max())
    return with_cause(f"off by {off:.1e}, of {size:.1e}", cause)


def with_cause(message: str, cause: str) -> str:
    """A message, and a likely cause unless it is ""."""
    return f"{message}; {cause}" if cause else message


def _summed(t: Tensor, like: Tensor) -> Tensor | None:
    try:
        return t.sum_to_size(like.shape)
    except RuntimeError:  # the shape of ``like`` does not broadcast to the shape of t
        return None


def likely_cause(a: Tensor, e: Tensor) -> str:
    """The frequent mistake that would turn the right numbers ``e`` into ``a``, or ""."""
    size = float(e.abs().max())
    if not 0 < size < math.inf:
        return ""

    def is_(other: Tensor) -> bool:
        return float((a - other).abs().max()) <= ALIKE * size

    factor = float((a * e).sum() / e.square().sum())
    # A single number is a multiple of any other number.
    simple = min(abs(factor - one) for one in (-1.0, 2.0, 0.5)) <= ALIKE
    if (simple or a.count_nonzero() > 2) and abs(factor - 1) > ALIKE and is_(factor * e):
        return "the sign is flipped" if abs(factor + 1) <= ALIKE else f"a factor of {factor:.4g}"
    if a.dim() > 1 and a.shape[-1] == a.shape[-2] and is_(e.mT):
        return "transposed"
    return ""


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
        bits = [
            t.detach().resolve_conj().resolve_neg().contiguous().flatten().view(torch.uint8)
            for t in (a, e)
        ]
        if not torch.equal(*bits):
            raise Outcome("wrong", f"other bits: {_difference(a, e)}")


def accurate(
    actual: Tensors, native: Tensors, exact: Tensors, operands: Sequence[Tensor] = ()
) -> None:
    """Accept an error of twice that of ``native`` plus two roundings of the largest result.

    An error of a sum of ``operands`` in one chain is accepted, too: see `chain_error`.
    """
    for (a, n), wide in zip(_pairs(actual, native), exact, strict=True):
        if (a.shape, a.dtype) != (n.shape, n.dtype):
            raise Outcome("wrong", _difference(a, n))
        if a.dtype == torch.float64:  # ``exact`` is not more exact
            close(a, n)
        elif a.numel() and is_differentiable(a):
            error, limit = _errors(a, n, wide)
            if not error <= limit and limit < math.inf:
                limit = max(limit, chain_error(operands) * float(real(wide.detach()).abs().max()))
                if error <= limit:
                    continue
                raise Outcome("wrong", f"off by {error:.1e}, expected at most {limit:.1e}")


# Layouts


def _permuted(t: Tensor, dims: list[int]) -> Tensor:
    return t.permute(dims).contiguous().permute([dims.index(dim) for dim in range(t.dim())])


def _stepped(t: Tensor) -> Tensor:
    """A view of every second element, between which the buffer holds NaN."""
    every_second = (slice(None, None, 2),) * t.dim()
    buffer = t.new_full([2 * size for size in t.shape], math.nan if is_differentiable(t) else 1)
    buffer[every_second] = t
    return buffer[every_second]


def _channels_last(t: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.clone(memory_format=formats.get(t.dim(), torch.contiguous_format))


# Functions of a tensor to a tensor of the same shape and, if not expanded, of the same values.
LAYOUTS: dict[str, Layout] = {
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t.clone(),
    "permuted": lambda t: _permuted(t, [*range(t.dim())][1:] + [*range(t.dim())][:1]),
    "channels last": _channels_last,
    "stepped": _stepped,
    "expanded": lambda t: t[:1].expand_as(t) if t.dim() and t.numel() else t,
    "expanded last": lambda t: t[..., :1].expand_as(t) if t.dim() and t.numel() else t,
    # At an address that is not aligned.
    "offset": lambda t: torch.cat([t.new_zeros(3), t.flatten()])[3:].view(t.shape),
    # Like z.conj().imag, whose sign is pending.
    "negated": lambda t: torch._neg_view(-t) if is_differentiable(t) else t,
    # Like z.conj(), whose sign of the imaginary part is pending.
    "conjugated": lambda t: t.conj().resolve_conj().conj() if t.is_complex() else t,
}


def layouts(tensors: Sequence[Tensor]) -> dict[str, Layout]:
    """The layouts that differ from the contiguous layout for these tensors."""
    dims, is_complex = {t.dim() for t in tensors}, any(t.is_complex() for t in tensors)
    unlike = {"channels last": dims & {4, 5}, "conjugated": is_complex}
    return {name: layout for name, layout in LAYOUTS.items() if unlike.get(name, True)}
