# SPDX-License-Identifier: MIT
"""Threads of a lesson in one process.

Threads meet at the end of each product. On a busy machine one of them waits some milliseconds for a
core, and the others wait for it. So a product is shared if each thread has work for a millisecond.
"""

import os
from collections.abc import Sequence
from itertools import pairwise

import torch

# Multiplications of float32, of which a core makes some 30 to 100 in a nanosecond.
SHARE = 2**25


def take(device: torch.device, multiplications: int) -> None:
    """Take as many threads as the largest product of a step can use on a CPU, and say so if these
    are fewer than there are.

    A number that is given by OMP_NUM_THREADS stays, such as that of torchrun.
    """
    there = torch.get_num_threads()
    threads = max(1, min(there, multiplications // SHARE))
    if device.type != "cpu" or threads == there or "OMP_NUM_THREADS" in os.environ:
        return
    torch.set_num_threads(threads)
    print(
        f"{threads} thread{'s' * (threads > 1)}: the largest product of a step has "
        f"{multiplications:,} multiplications; OMP_NUM_THREADS={there} takes {there}"
    )


def of_layers(sizes: Sequence[int], samples: int) -> int:
    """Return the multiplications of the largest product of an MLP of these widths."""
    return samples * max(n * m for n, m in pairwise(sizes))
