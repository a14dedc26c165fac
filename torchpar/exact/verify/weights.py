# SPDX-License-Identifier: MIT
"""The SHA-256 of a model's weights, by which trainings in exact arithmetic are compared."""

import hashlib
from collections.abc import Iterable

from torch import Tensor


def sha256_of(named: Iterable[tuple[str, Tensor]]) -> str:
    """The SHA-256 of names and of float32 tensors, as little-endian bytes, in the names' order."""
    total = hashlib.sha256()
    for name, t in sorted(named, key=lambda one: one[0]):
        total.update(name.encode() + t.detach().cpu().numpy().astype("<f4").tobytes())
    return total.hexdigest()
