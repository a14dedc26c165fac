# SPDX-License-Identifier: MIT
"""Rules of a capture of a CUDA graph: a GPU forbids to read values back, and to wait.

Each rule returns words on what the program does, or "" if that is allowed.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from torchpar.ptx.cuda import places
from torchpar.ptx.cuda.operations import tensors_in
from torchpar.ptx.cuda.types import Function, Keywords, Operator

# Functions whose result has a shape that depends on values.
DEPENDENT = {
    name: f"{name}, whose shape depends on values,"
    for name in ("nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount")
}
# Functions in Python that read a tensor's values, by their names.
READING_FUNCTIONS = {
    "item": ".item()",
    "tolist": ".tolist()",
    "numpy": ".numpy()",
    "__array__": "numpy.asarray(tensor)",
    "__bool__": "bool(tensor), as an `if` calls it,",
    "__float__": "float(tensor)",
    "__int__": "int(tensor)",
    "__index__": "a tensor as an index of Python",
    "__complex__": "complex(tensor)",
    "__repr__": "printing a tensor",
    "__format__": "printing a tensor",
    "equal": "torch.equal",
    "allclose": "torch.allclose",
    **DEPENDENT,
}
NUMBER = "a function of PyTorch, which takes a number from a tensor,"
MASK = "indexing by a mask, whose number of elements depends on values,"
REPEAT = "repeat_interleave without output_size"
# Operators that do, also where another function of PyTorch or autograd calls them.
READING_OPERATORS = {
    "_local_scalar_dense": NUMBER,
    "item": ".item()",
    "is_nonzero": NUMBER,
    "equal": "torch.equal",
    "nonzero": DEPENDENT["nonzero"],
    "nonzero_numpy": DEPENDENT["nonzero"],
    "argwhere": DEPENDENT["argwhere"],
    "masked_select": DEPENDENT["masked_select"],
    "_unique2": DEPENDENT["unique"],
    "unique_dim": DEPENDENT["unique"],
    "unique_consecutive": DEPENDENT["unique_consecutive"],
    "bincount": DEPENDENT["bincount"],
    "_linalg_check_errors": "the check of a matrix that may be singular",
}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
MAKING = {"tensor", "as_tensor", "asarray", "new_tensor"}  # tensors from numbers of Python


def read_by_function(func: Function, args: Sequence[object]) -> str:
    """Name what a function of PyTorch reads back of a tensor on the device."""
    name = getattr(func, "__name__", "")
    if name in READING_FUNCTIONS and args and places.is_on_device(args[0]):
        return READING_FUNCTIONS[name]
    return ""


def read_by_operator(func: Operator, args: Sequence[object], kwargs: Keywords) -> str:
    """Name what an operator reads back, some of whose operands are on the device."""
    name = func.overloadpacket.__name__
    if name in INDEXED and _has_mask(args[1]) and not _fills(func, args):
        return MASK
    if func is torch.ops.aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
        return REPEAT
    return READING_OPERATORS.get(name, "") if func.namespace == "aten" else ""


def instead_of(what: str) -> str:
    """Say what to write in the place of a function or an operator that reads values."""
    if what == NUMBER:
        return (
            "keep the number on the device; an optimizer whose learning rate is a tensor does so "
            "with fused=True or capturable=True"
        )
    if what == READING_FUNCTIONS["__bool__"]:
        return "write torch.where for a condition, or read the tensor after graph.replay()"
    if what == REPEAT:
        return "give output_size"
    if what == MASK or what in DEPENDENT.values():
        return "compute with all elements, as by torch.where(mask, x, 0)"
    return "keep the tensor, and read it after graph.replay()"


def _has_mask(indices: object) -> bool:
    masks = (torch.bool, torch.uint8)
    return any(t.dtype in masks for t in tensors_in([indices]))


def _fills(func: Operator, args: Sequence[object]) -> bool:
    """Whether one number is put where a mask is true, for which PyTorch calls masked_fill."""
    value = args[2] if len(args) > 2 else None
    if not isinstance(value, Tensor) or value.numel() != 1 or places.is_on_device(value):
        return False
    return len(args) < 4 or not args[3]


def copied_by_operator(func: Operator, args: Sequence[object], kwargs: Keywords) -> str:
    """Name a copy between host and device that the program waits for.

    PyTorch puts a number of Python into several elements by a kernel, and into one element, as in
    x[0] = 1.0, by such a copy.
    """
    if func.overloadpacket is not torch.ops.aten.copy_:
        return ""
    to, source = args[:2]
    is_number = isinstance(source, Tensor) and source.dim() == 0
    if is_number and isinstance(to, Tensor) and to.dim() > 0:
        return ""
    copied = _copied(to, source, is_asynchronous(args, kwargs))
    return ONE_ELEMENT if is_number and copied == TO_DEVICE else copied


def copied_by_function(func: Function, args: Sequence[object], kwargs: Keywords) -> str:
    """Name a copy as `copied_by_operator` does; also one of a single number."""
    if func != torch.Tensor.copy_ or len(args) < 2:
        return ""
    to, source = args[:2]
    return _copied(to, source, is_asynchronous(args, kwargs))


def _copied(to: object, source: object, is_asynchronous: bool) -> str:
    if is_asynchronous or not isinstance(to, Tensor) or not isinstance(source, Tensor):
        return ""
    if places.is_on_device(to) == places.is_on_device(source) or not to.numel():
        return ""
    return TO_DEVICE if places.is_on_device(to) else "copy_ of a tensor to the host"


def is_asynchronous(args: Sequence[object], kwargs: Keywords) -> bool:
    """Whether copy_ with these arguments returns before it has copied."""
    return bool(args[2] if len(args) > 2 else kwargs.get("non_blocking", False))


TO_DEVICE = "a copy from the host's memory"
ONE_ELEMENT = (
    "the copy of a number into one element (x[0:1] = number makes none, x[0] = number does)"
)


def makes_from_host(func: Function, args: Sequence[object], kwargs: Keywords) -> bool:
    """Whether a function makes a tensor on the device from numbers of Python."""
    if getattr(func, "__name__", "") not in MAKING:
        return False
    if func is torch.Tensor.new_tensor and kwargs.get("device") is None:
        return places.is_on_device(args[0])
    is_there = len(args) > 0 and places.is_on_device(args[0])
    return bool(kwargs.get("device") == places.DEVICE and not is_there)


def generators_of(args: Sequence[object], kwargs: Keywords) -> list[Any]:
    return [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch._C.Generator)]
