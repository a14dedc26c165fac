# SPDX-License-Identifier: MIT
"""Dispatch keys of plain calls, which no mode, subclass or transform intercepts."""

from functools import reduce
from operator import or_

import torch


def bits_of(key: str) -> int:
    return int(torch.DispatchKeySet(getattr(torch.DispatchKey, key)).raw_repr())


_DENSE_KEYS = "CPU CUDA AutogradCPU AutogradCUDA AutocastCPU AutocastCUDA"
OTHER_KEYS = ~reduce(or_, map(bits_of, _DENSE_KEYS.split()))
"""All dispatch keys, as bits, except those of a dense tensor on a CPU or an NVIDIA GPU."""
