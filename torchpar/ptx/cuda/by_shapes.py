# SPDX-License-Identifier: MIT
"""Results of operators by shapes alone: for a capture, whose operands may hold any values."""

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from torchpar.ptx.cuda.types import Arguments, Keywords, Operator
from torchpar.ptx.triton.torch_operators import is_plain


def by_shapes(func: Operator, args: Arguments, kwargs: Keywords) -> object:
    """Return an operator's results without computing them: new ones hold zeros.

    PyTorch has each operator on the device "meta", where tensors have shapes and no memory.
    """
    operands: dict[Tensor, Tensor] = {}  # by those on "meta", which hash by identity

    def without_memory(value: object) -> object:
        if not is_plain(value):
            return "meta" if isinstance(value, torch.device) else value
        place = value.size(), value.stride()
        t = torch.empty_strided(*place, dtype=value.dtype, device="meta")
        operands[t] = value
        return t

    def with_memory(value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        if value in operands:  # of an operator that writes an operand
            return operands[value]
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype).zero_()

    result = func(*tree_map(without_memory, args), **tree_map(without_memory, kwargs))
    return tree_map(with_memory, result)
