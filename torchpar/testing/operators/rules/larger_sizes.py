# SPDX-License-Identifier: MIT
"""Rule of more elements than the samples have, past which a kernel's mask or grid can be wrong.

Sizes of the sample grow until the largest operand or result has more elements than a limit: each
size alone, in all dimensions that have it, and all sizes together. So operands fit together as
those of the sample do. These sizes are odd, and the operands contiguous. All sizes together are
also tried in other layouts, and as powers of two.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchpar.errors import first_line
from torchpar.testing.operators.attempts import REFUSALS, AttemptsAndRemark, OutcomeException
from torchpar.testing.operators.case import Case, Operator
from torchpar.testing.operators.gradients import pulled_back
from torchpar.testing.operators.layouts import LAYOUTS
from torchpar.testing.operators.rules.values import same_values
from torchpar.testing.operators.tensors import Layout, Tensors, is_differentiable, normal_like

# Elements. A block of a kernel seldom has more than the first two. The second dimension of a grid
# has fewer blocks than the last.
LIMITS = (1024, 4096, 65536)
# Those that sizes of powers of two reach exactly, where the sizes of the sample allow it.
EXACT = (1024, 4096)
# Layouts of operands and of incoming gradients, tried past the second limit.
STRIDED = ("transposed", "stepped")
# Elements of the largest tensor within the reference, such as the square of a long dimension.
MOST = 2**24
# Calls of operators by the reference, as those of a loop over a long dimension.
MOST_CALLS = 10_000


def larger_sizes(case: Case) -> AttemptsAndRemark:
    if case.reference is None:  # larger operands are contiguous: the same call would be its oracle
        raise OutcomeException("not run", "no reference")
    reached: list[int] = []
    refused: dict[str, str] = {}

    def check(way: "Way") -> None:
        """Compare results and gradients for the first number of elements that is not refused."""
        for limit in way.limits:
            try:
                _compare(case, way.operands(limit), way.layout)
            except OutcomeException as e:
                outcome, message = e.args
                if outcome == "not run":
                    refused.setdefault(f"{way.label}, {way.where} {limit}", message)
                    if limit != way.limits[-1]:
                        continue
                raise OutcomeException(outcome, f"{way.where} {limit} elements: {message}") from e
            reached.append(limit)
            return

    for way in _ways(case):
        yield way.label, partial(check, way)
    most = f"up to {max(reached)} elements" if reached else ""
    return "; ".join([most, *(f"{label}: {message}" for label, message in [*refused.items()][:1])])


class Way(NamedTuple):
    """A way to make larger operands.

    Attributes:
        label: names it in the row.
        operands: operands for a number of elements.
        limits: the numbers of elements, of which the first that is not refused is tried.
        layout: that of the operands and of the incoming gradients.
        where: "past" or "of" a number of elements.
    """

    label: str
    operands: Callable[[int], Tensors]
    limits: Sequence[int]
    layout: Layout = lambda t: t
    where: str = "past"


def _ways(case: Case) -> Iterator[Way]:
    growths = _growths(case)
    if not growths:
        return
    *alone, every = growths
    for limit in LIMITS:
        yield Way(every.label, every.operands, [limit])
    for growth in alone:
        yield Way(growth.label, growth.operands, LIMITS[::-1])
    for name in STRIDED if max(t.dim() for t in case.operands) > 1 else STRIDED[1:]:
        label = f"{every.label}, {name}"
        yield Way(label, every.operands, LIMITS[1::-1], LAYOUTS[name])
    for limit in EXACT:
        yield Way(f"{every.label}, as powers of 2", every.powers_of_two, [limit], where="of")


def _compare(case: Case, operands: Tensors, layout: Layout = lambda t: t) -> None:
    operands = tuple(map(layout, operands))
    same_values(case, operands)
    if case.floating and any(case.is_smooth):
        other = case.of(operands)
        pulled = partial(pulled_back, layout=layout, of_operands=layout)
        try:
            found = pulled(other.smooth(other.op), other)
        except (*REFUSALS, TypeError):  # the rows of gradients say why
            return
        expected = pulled(other.oracle, other)
        other.close(found, expected, lambda: pulled(other.wide.oracle, other.wide))


def _growths(case: Case) -> list["Growth"]:
    """How the sizes grow: each size alone, and all together."""
    sizes = sorted({size for t in case.operands for size in t.shape if size > 0})
    chosen = [size for size in sizes if size > 1] or sizes  # a size of 1 may be broadcast
    alone = [Growth(case, f"every size of {size}", [size]) for size in chosen]
    return alone if len(chosen) < 2 else [*alone, Growth(case, "all sizes", chosen)]


class Growth:
    """Operands whose dimensions of some sizes grow by one factor.

    Attributes:
        label: names the sizes in the row.
        sizes: the sizes that grow.
    """

    def __init__(self, case: Case, label: str, sizes: Sequence[int]) -> None:
        self.case, self.label, self.sizes = case, label, sizes

    def operands(self, limit: int) -> Tensors:
        """Operands of odd sizes, so large that one of them, or a result, has more elements.

        They are the sample's own if one of these is so large.

        Raises:
            OutcomeException: no size is large enough, or the reference would need too much memory.
        """
        if max(t.numel() for t in self.case.operands) > limit:
            return self.case.operands
        largest = max(self.sizes)
        # The sizes of a result need not be a power of the sizes of operands.
        low, high = 1, math.ceil(2 * limit / largest) + 2
        if self._elements(high, of_reference=False) <= limit:
            raise OutcomeException("not run", f"no operand and no result gets {limit} elements")
        while high - low > 1:
            middle = (low + high) // 2
            if self._elements(middle, of_reference=False) > limit:
                high = middle
            else:
                low = middle
        self._expect_feasible(high)
        return _resized(self.case.operands, self._changed(high))

    def powers_of_two(self, elements: int) -> Tensors:
        """Operands whose sizes are powers of two, of which the largest has so many elements.

        The largest is an operand or a result. It has fewer elements where no powers of two reach
        them, as where a size occurs twice.

        Raises:
            OutcomeException: the sample is larger or empty, or the reference would need too much.
        """
        results = self.case.takes(self.case.operands, self.case.plain)
        largest = max((*self.case.operands, *results), key=Tensor.numel)
        if not 0 < largest.numel() <= elements:
            raise OutcomeException("not run", f"the sample has {largest.numel()} elements")
        dims = {size: largest.shape.count(size) for size in self.sizes}
        exponents = dict.fromkeys(self.sizes, 0)
        left = math.log2(elements / math.prod(n for n in largest.shape if n not in exponents))
        while fitting := [size for size in self.sizes if 0 < dims[size] <= left]:
            # The smallest first, and of equal ones the largest size.
            chosen = min(fitting, key=lambda size: (exponents[size], -size))
            exponents[chosen] += 1
            left -= dims[chosen]
        most = max(exponents.values())
        changed = {size: 2 ** (exponents[size] if dims[size] else most) for size in self.sizes}
        self._expect_feasible(max(-(-new // size) for size, new in changed.items()))
        return _resized(self.case.operands, changed)

    def _expect_feasible(self, factor: int) -> None:
        """Raise "not run" if the reference would need too much at sizes larger by a factor."""
        if (most := self._elements(factor, of_reference=True)) > MOST:
            message = f"the reference would need a tensor of {most:.1e} elements"
            raise OutcomeException("not run", message)
        if (calls := self._powers.calls.at(factor)) > MOST_CALLS:
            raise OutcomeException("not run", f"the reference would call {calls:.1e} operators")

    def _changed(self, factor: int) -> dict[int, int]:
        return {size: size * factor | 1 for size in self.sizes}

    def _elements(self, factor: int, of_reference: bool) -> float:
        """An estimate of the largest number of elements: of an operand or a result, or of any
        tensor within the reference."""
        changed = self._changed(factor)
        shapes = [[changed.get(size, size) for size in t.shape] for t in self.case.operands]
        powers = self._powers.within if of_reference else self._powers.results
        return max([*map(math.prod, shapes), *(power.at(factor) for power in powers)])

    @cached_property
    def _powers(self) -> "_Powers":
        """Those between the sample and twice the sample."""
        twice = _resized(self.case.operands, {size: 2 * size for size in self.sizes})
        try:
            return self._powers_to(twice)
        except OutcomeException:
            raise
        except Exception as e:  # such as an assertion
            message = f"the reference refuses twice the size: {first_line(e)}"
            raise OutcomeException("not run", message) from e

    def _powers_to(self, twice: Tensors) -> "_Powers":
        of_results, of_reference = list[list[int]](), list[list[int]]()
        for operands in (self.case.operands, twice):
            with _Elements() as elements:
                results = self.case.takes(operands, self.case.plain)
            of_results.append([y.numel() for y in results])
            of_reference.append(elements.counts)
        once, again = (max(len(counts), 1) for counts in of_reference)
        return _Powers(_powers_of(*of_results), _powers_of(*of_reference), Power(once, again))


class Power(NamedTuple):
    """A number that grows with a power of a factor, known at 1 and at 2."""

    first: int
    second: int

    def at(self, factor: int) -> float:
        return self.first * math.pow(factor, math.log2(self.second / self.first))


def _powers_of(first: Sequence[int], second: Sequence[int]) -> list[Power]:
    """The powers of numbers that are not 0; those that one of the sequences lacks are left out."""
    return [Power(*pair) for pair in zip(first, second, strict=False) if all(pair)]


class _Powers(NamedTuple):
    """The elements of the results and of the tensors within the reference, and its calls."""

    results: list[Power]
    within: list[Power]
    calls: Power


class _Elements(TorchDispatchMode):
    """Count the elements of each tensor that PyTorch's operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[int] = []

    def __torch_dispatch__(
        self,
        func: Operator,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        results = func(*args, **(kwargs or {}))
        self.counts += [t.numel() for t in tree_leaves(results) if isinstance(t, Tensor)]
        return results


def _resized(operands: Tensors, sizes: Mapping[int, int]) -> Tensors:
    """Operands with other sizes, of the numbers of the given ones.

    Floating numbers come in a random order, each moved by √ε of itself, so that no two are equal
    and no block is like another. Other numbers, such as indices, repeat in their order.
    """
    found = []
    for i, t in enumerate(operands):
        shape = [sizes.get(size, size) for size in t.shape]
        if shape == list(t.shape):
            found.append(t)
        elif is_differentiable(t):
            generator = torch.Generator().manual_seed(i)
            places = torch.randint(t.numel(), shape, generator=generator, device="cpu").to(t.device)
            drawn = t.flatten()[places]
            found.append(drawn * (1 + torch.finfo(t.dtype).eps ** 0.5 * normal_like(drawn)))
        else:
            times = [-(-new // old) for new, old in zip(shape, t.shape, strict=True)]
            cut = tuple(slice(size) for size in shape)
            found.append(t.repeat(times)[cut].contiguous())
    return tuple(found)
