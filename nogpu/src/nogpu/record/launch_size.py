# SPDX-License-Identifier: MIT
"""Limits of a launch's size: threads of a block, blocks of a grid, and shared memory.

They are those of "Technical Specifications per Compute Capability" in the "CUDA C++ Programming
Guide", and the same for all GPUs that are emulated.
"""

import math
from typing import NamedTuple

from nogpu.console import plural

Sizes = tuple[int, int, int]
MOST_THREADS = 1024  # of a block
MOST_OF_BLOCK: Sizes = (1024, 1024, 64)  # threads in each dimension
MOST_OF_GRID: Sizes = (2**31 - 1, 65_535, 65_535)  # blocks in each dimension
# Bytes of shared memory that a kernel's own variables may have, and that a block has unless its
# launch asks for more.
WITHOUT_ASKING = 48 * 1024


class Shared(NamedTuple):
    """Bytes of shared memory of a block.

    Attributes:
        static: those of the kernel's own variables.
        dynamic: those that the launch gives.
        most: of both together.
        giver: who gives no more, such as "sm_90".
    """

    static: int
    dynamic: int
    most: int
    giver: str


def why_out_of_bounds(kernel: str, block: Sizes, most: int, bounds: str) -> str:
    """Say why a GPU does not launch a block of more threads than a kernel promises; "" if it does.

    Args:
        most: the threads that it promises at most; 0: it does not.
        bounds: how the source promises it, such as "__launch_bounds__".
    """
    if not most or (threads := math.prod(block)) <= most:
        return ""
    return (
        f"the block of {kernel} has {plural(threads, 'thread')}, and {bounds} promises at most "
        f"{most:,}; launch smaller blocks, or raise the bound"
    )


def why_refused(kernel: str, grid: Sizes, block: Sizes, shared: Shared) -> str:
    """Say why no GPU launches a kernel in this size, and what is expected; "" if it does."""
    threads, (static, dynamic, most, giver) = math.prod(block), shared
    if min(block) < 1 or threads > MOST_THREADS:
        return (
            f"the block of {kernel} is {block}, {plural(threads, 'thread')}; expected 1 to "
            f"{MOST_THREADS:,} threads; launch more blocks instead"
        )
    for what, given, limits in (("block", block, MOST_OF_BLOCK), ("grid", grid, MOST_OF_GRID)):
        if not all(1 <= n <= limit for n, limit in zip(given, limits, strict=True)):
            return f"the {what} of {kernel} is {given}, expected 1 to {limits}"
    if dynamic < 0 or static + dynamic > most:
        return (
            f"{kernel} takes {plural(static + dynamic, 'byte')} of shared memory, {static:,} of "
            f"them for its variables; a block of {giver} has at most {most:,}; share fewer "
            "elements at a time"
        )
    if static > WITHOUT_ASKING:
        return (
            f"the variables of {kernel} in shared memory take {static:,} bytes, at most "
            f"{WITHOUT_ASKING:,} are compiled; more must be extern __shared__"
        )
    return ""
