# SPDX-License-Identifier: MIT
"""Comparison of a float32 result with PyTorch's and with float64."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchpar.errors import ConfigError


def compare(part: str, result: Tensor, reference: Callable[..., Tensor], *inputs: Tensor) -> dict[str, Any]:
    """Print the errors of ``result`` and of PyTorch's ``reference(*inputs)``, and return them.

    An error is the largest distance from ``reference`` in float64.

    Raises:
        ConfigError: the error is more than twice PyTorch's plus a rounding of the largest number.
    """
    exact = reference(*(t.double() for t in inputs))
    error, native = ((t - exact).abs().max().item() for t in (result, reference(*inputs)))
    most = 2 * native + torch.finfo(result.dtype).eps * exact.abs().max().item()
    print(f"{part}: error {error:.1e}, PyTorch's {native:.1e}")
    if not error <= most:
        raise ConfigError(
            f"{part} has an error of {error:.1e}, expected {most:.1e} at most; mend its formula"
        )
    return {"part": part, "error": error, "pytorch_error": native}
