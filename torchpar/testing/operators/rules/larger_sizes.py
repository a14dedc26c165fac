# SPDX-License-Identifier: MIT
"""Rule of more elements than the samples have, past which a kernel's mask or grid can be wrong.

Sizes of the sample grow until the largest operand or result has more elements than a limit: each
size alone, in all dimensions that have it, and all sizes together. So operands fit together as
those of the sample do.
"""

import math
from collections.abc import Mapping, Sequence
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
from torchpar.testing.operators.rules.values import same_values
from torchpar.testing.operators.tensors import Tensors, is_differentiable, normal_like

# Elements. A block of a kernel seldom has more than the first two. The second dimension of a grid
# has fewer blocks than the last.
LIMITS = (1024, 4096, 65536)
# Elements of the largest tensor within the reference, such as the square of a long dimension.
MOST = 2**24
# Calls of operators by the reference, as those of a loop over a long dimension.
MOST_CALLS = 10_000


def larger_sizes(case: Case) -> AttemptsAndRemark:
    if case.reference is None:  # larger operands are contiguous: the same call would be its oracle
        raise OutcomeException("not run", "no reference")
    reached: list[int] = []
    refused: dict[str, str] = {}

    def check(growth: "Growth", *limits: int) -> None:
        """Compare results and gradients past the first limit that is not refused."""
        for limit in limits:
            try:
                _compare(case, growth.operands(limit))
            except OutcomeException as e:
                outcome, message = e.args
                if outcome == "not run":
                    refused.setdefault(f"{growth.label}, past {limit}", message)
                    if limit != limits[-1]:
                        continue
                raise OutcomeException(outcome, f"past {limit} elements: {message}") from e
            reached.append(limit)
            return

    growths = _growths(case)
    for limit in LIMITS if growths else ():
        yield growths[-1].label, partial(check, growths[-1], limit)
    for growth in growths[:-1]:
        yield growth.label, partial(check, growth, *reversed(LIMITS))
    most = f"up to {max(reached)} elements" if reached else ""
    return "; ".join([most, *(f"{label}: {message}" for label, message in [*refused.items()][:1])])


def _compare(case: Case, operands: Tensors) -> None:
    same_values(case, operands)
    if case.floating and any(case.is_smooth):
        other = case.of(operands)
        try:
            found = pulled_back(other.smooth(other.op), other)
        except (*REFUSALS, TypeError):  # the rows of gradients say why
            return
        expected = pulled_back(other.oracle, other)
        other.close(found, expected, lambda: pulled_back(other.wide.oracle, other.wide))


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
        if (most := self._elements(high, of_reference=True)) > MOST:
            message = f"the reference would need a tensor of {most:.1e} elements"
            raise OutcomeException("not run", message)
        if (calls := self._powers.calls.at(high)) > MOST_CALLS:
            raise OutcomeException("not run", f"the reference would call {calls:.1e} operators")
        return _resized(self.case.operands, self._changed(high))

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
