# SPDX-License-Identifier: MIT
"""Results of operators by shapes alone: for a capture, whose operands may hold any values."""

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from nogpu.cuda import places
from nogpu.cuda.types import Arguments, Keywords, Operator
from nogpu.triton.torch_operators import is_plain


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


def check_with_other_values(func: Operator, args: Arguments, kwargs: Keywords) -> None:
    """Raise an operator's error if it refuses its operands also where they hold zeros, and ones.

    The device "meta" checks no values, but also fewer types, numbers and overlaps.
    """
    try:
        _execute_filled(0, func, args, kwargs)
    except (IndexError, RuntimeError):
        _execute_filled(1, func, args, kwargs)


def _execute_filled(number: int, func: Operator, args: Arguments, kwargs: Keywords) -> None:
    made: dict[int, torch.UntypedStorage] = {}  # by storages in C++: operands may share one

    def filled(value: object) -> object:
        if not is_plain(value):
            return value
        if places.mark_of(value) is False:  # a capture takes the host's numbers
            return value.clone()
        storage = value.untyped_storage()
        if storage._cdata not in made:
            whole = torch.full((storage.nbytes() // value.itemsize,), number, dtype=value.dtype)
            other = whole.untyped_storage()
            other.resize_(storage.nbytes())
            made[storage._cdata] = other
        place = value.storage_offset(), value.size(), value.stride()
        return torch.empty(0, dtype=value.dtype).set_(made[storage._cdata], *place)

    func(*tree_map(filled, args), **tree_map(filled, kwargs))
