# SPDX-License-Identifier: MIT
"""Comparison of sizes, some of which a compiler knows only as symbols.

A comparison of a symbol by `==` fixes its size: the graph is compiled for the answer alone, and a
data-dependent size has no answer. So sizes that must be equal are checked within the graph. Where
the answer only saves work, sizes count as unlike unless they are equal for all values of symbols.
"""

from collections.abc import Callable, Sequence

from torch import SymInt, Tensor
from torch.compiler import is_dynamo_compiling

from torchpar.library.private import check, statically_known_true


def has_symbols(a: Tensor, b: Tensor, c: Tensor | None = None) -> bool:
    """Whether a size or a stride is a symbol of a compiler."""
    return (  # a loop would take longer
        a._has_symbolic_sizes_strides
        or b._has_symbolic_sizes_strides
        or (c is not None and c._has_symbolic_sizes_strides)
    )


def are_alike(first: Sequence[int], second: Sequence[int]) -> bool:
    """Whether sizes are known to be equal; no graph is compiled for the answer alone."""
    if not any([isinstance(size, SymInt) for size in (*first, *second)]):
        return first == second
    return len(first) == len(second) and all(
        statically_known_true(one == other) for one, other in zip(first, second, strict=True)
    )


def check_alike(first: Sequence[int], second: Sequence[int], message: Callable[[], object]) -> None:
    """Raise a RuntimeError unless sizes are equal; the graph checks sizes that depend on data."""
    # Dynamo takes no message that it cannot compute.
    of_error = () if is_dynamo_compiling() else (message,)
    check(len(first) == len(second), *of_error)
    for one, other in zip(first, second, strict=True):
        check(one == other, *of_error)
