# SPDX-License-Identifier: MIT
"""Directional derivatives by finite differences, which judge where the reference may be wrong."""

from collections.abc import Sequence

import torch
from torch import Tensor

from torchpar.testing.operators.case import Case
from torchpar.testing.operators.tensors import Function, Tensors, normal_like


def _at_moved_operands(
    f: Function, xs: Tensors, step: float, chosen: Sequence[int]
) -> list[Tensor]:
    moved = [x + step * normal_like(x) if i in chosen else x for i, x in enumerate(xs)]
    return [y.double() for y in f(*moved)]


def difference_of(
    f: Function, case: Case, chosen: Sequence[int] | None = None
) -> tuple[list[Tensor], float]:
    """The directional derivative by (f(x + h·v) − f(x − h·v))/2h, in float64, and its tolerance.

    The error of the difference is about h², and the error of the roundings ε/h. Both are ε^⅔ for
    h = ε^⅓.
    """
    h = torch.finfo(torch.float64).eps ** (1 / 3)
    every = case.indices if chosen is None else chosen
    after, before = (_at_moved_operands(f, case.floating, step, every) for step in (h, -h))
    return [(a - b) / (2 * h) for a, b in zip(after, before, strict=True)], 1000 * h**2


def value_and_difference_of(f: Function, case: Case) -> tuple[list[Tensor], float]:
    differences, tolerance = difference_of(f, case)
    return [*f(*case.floating), *differences], tolerance


def second_difference_of(f: Function, case: Case) -> tuple[list[Tensor], float]:
    """The first directional derivative, and the second by (f(x + h·v) − 2·f(x) + f(x − h·v))/h².

    For h = ε^¼ the errors of the difference and of the roundings are both about √ε.
    """
    h = torch.finfo(torch.float64).eps ** (1 / 4)
    after, middle, before = (
        _at_moved_operands(f, case.floating, step, case.indices) for step in (h, 0.0, -h)
    )
    second = [(a - 2 * m + b) / h**2 for a, m, b in zip(after, middle, before, strict=True)]
    return [*difference_of(f, case)[0], *second], 1000 * h**2
