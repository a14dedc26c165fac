# SPDX-License-Identifier: MIT
"""Rules of a capture of a CUDA graph: a GPU forbids to read values back, and to wait.

Each rule returns words on what the program does, or "" if that is allowed.
"""

from collections.abc import Iterator, Sequence
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from torchpar.ptx.cuda import places
from torchpar.ptx.cuda.devices import MASKS, fills_mask
from torchpar.ptx.cuda.operations import tensors_in
from torchpar.ptx.cuda.types import Function, Keywords, Operator
from torchpar.ptx.report.source import calls_under_way

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
ONE_HOT = "one_hot without num_classes"
SINGULAR = "the check of a matrix that may be singular"
SPECTRUM = "a decomposition into eigenvalues or singular values"
CTC = "ctc_loss, which copies its lengths between host and device,"
POSITION = "a tensor that is one number, as an index,"
BOUND = "a tensor as the bound of a slice"
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
    "_linalg_check_errors": SINGULAR,
    # By their documentation these synchronize the device with the CPU.
    **dict.fromkeys(("_linalg_eigh", "linalg_eig", "_linalg_eigvals", "linalg_eigvals"), SPECTRUM),
    **dict.fromkeys(("_linalg_svd", "linalg_pinv"), SPECTRUM),
}
# Operators that fill by the number of a tensor, and that one's position.
FILLING = {
    "masked_fill": (2, "masked_fill by the number of a tensor"),
    "masked_fill_": (2, "masked_fill by the number of a tensor"),
    "index_fill": (3, "index_fill by the number of a tensor"),
    "index_fill_": (3, "index_fill by the number of a tensor"),
}
SPACED = {"linspace", "logspace"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
PUT = INDEXED - {"index"}
MAKING = {"tensor", "as_tensor", "asarray", "new_tensor"}  # tensors from numbers of Python
TO_HOST = "a copy to the host"


def read_by_function(func: Function, args: Sequence[object], kwargs: Keywords) -> str:
    """Name what a function of PyTorch reads back of a tensor on the device."""
    name = getattr(func, "__name__", "")
    if name in READING_FUNCTIONS and args and places.is_on_device(args[0]):
        return READING_FUNCTIONS[name]
    if func is torch.nn.functional.one_hot and args and places.is_on_device(args[0]):
        number = args[1] if len(args) > 1 else kwargs.get("num_classes", -1)
        return ONE_HOT if number == -1 else ""
    if func in CTC_LOSSES and args and places.is_on_device(args[0]):
        return "" if _takes_cudnn(*args, **kwargs) else CTC
    return ""


CTC_LOSSES = (torch.nn.functional.ctc_loss, torch.ctc_loss)


def _takes_cudnn(
    log_probs: Any,
    targets: Any,
    input_lengths: Any,
    target_lengths: Any,
    blank: Any = 0,
    *others: object,
    **kwargs: object,
) -> bool:
    """Whether ctc_loss in a capture calls cuDNN, which has the lengths on the device.

    `_use_cudnn_ctc_loss_tensor` of PyTorch is the source.
    """
    given = targets, input_lengths, target_lengths
    is_there = all(
        isinstance(t, Tensor) and t.dtype == torch.int32 and places.is_on_device(t) for t in given
    )
    if not is_there or targets.dim() != 1 or not targets.is_contiguous():
        return False
    return bool(blank == 0 and log_probs.dtype == torch.float32)


def read_by_index(func: Function, args: Sequence[object]) -> str:
    """Name what `x[index]` reads back of numbers in the index."""
    if func not in (Tensor.__getitem__, Tensor.__setitem__):
        return ""
    for one in args[1] if isinstance(args[1], tuple) else (args[1],):
        if isinstance(one, slice) and any(map(_is_number, (one.start, one.stop, one.step))):
            return BOUND
        if _is_number(one):
            return POSITION
    return ""


def _is_number(value: object) -> bool:
    """Whether a value is one whole number on the device."""
    if not isinstance(value, Tensor) or value.dim() > 0 or value.is_floating_point():
        return False
    return value.dtype not in MASKS and places.is_on_device(value)


def read_by_operator(func: Operator, args: Sequence[object], kwargs: Keywords) -> str:
    """Name what an operator reads back, some of whose operands are on the device."""
    name = func.overloadpacket.__name__
    if name in INDEXED and _has_mask(args[1]) and not _fills(func, args):
        return MASK
    if name in PUT and places.mark_of(args[0]) is False and places.is_on_device(args[2]):
        return TO_HOST
    if name in FILLING and places.mark_of(args[FILLING[name][0]]) is True:
        return FILLING[name][1]
    if name in SPACED and any(places.mark_of(t) is True for t in args[:2]):
        return NUMBER
    if func is torch.ops.aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
        return REPEAT
    return READING_OPERATORS.get(name, "") if func.namespace == "aten" else ""


def instead_of(what: str) -> str:
    """Say what to write in the place of a function or an operator that reads values now."""
    return INSTEAD.get(what) or _instead_of_callers(what) or INSTEAD_ALONE.get(what, READ_AFTER)


def _instead_of_callers(what: str) -> str:
    """Say what to write in the place of a function that has called the one which reads values."""
    is_in_backward = torch._C._current_graph_task_id() >= 0
    if what == NUMBER and is_in_backward and torch.is_anomaly_enabled():
        return "call set_detect_anomaly(False): with True a backward pass reads its gradients"
    for frame in calls_under_way():
        place = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if place in INSTEAD_WITHIN:
            return INSTEAD_WITHIN[place]
        optimizer = frame.f_locals.get("self")
        if what == NUMBER and isinstance(optimizer, Optimizer):
            return _instead_of_optimizer(optimizer)
    return ""


def _instead_of_optimizer(optimizer: Optimizer) -> str:
    """Say what to write in the place of an optimizer that takes a number from a tensor."""
    if optimizer.defaults.keys() & {"fused", "capturable"}:
        return (
            f"{INSTEAD_ALONE[NUMBER]}; an optimizer whose learning rate is a tensor does so with "
            "fused=True or capturable=True"
        )
    if not any(isinstance(group.get("lr"), Tensor) for group in optimizer.param_groups):
        return ""
    name = type(optimizer).__name__
    other = ", or take torchpar.optim.Muon" if isinstance(optimizer, torch.optim.Muon) else ""
    return (
        f"{name} has neither fused nor capturable: give it a number as the learning rate, and "
        f"capture again when it changes{other}"
    )


INSTEAD = {
    REPEAT: "give output_size",
    ONE_HOT: "give num_classes",
    SINGULAR: (
        "call torch.linalg.inv_ex, solve_ex, cholesky_ex, lu_factor_ex or ldl_factor_ex, and check "
        "the info that it returns after graph.replay()"
    ),
    SPECTRUM: "compute it before the capture, or after graph.replay()",
    CTC: (
        "give what cuDNN takes: float32, blank 0, concatenated targets, and targets and lengths as "
        "int32 on the device; or call it after graph.replay()"
    ),
    POSITION: "index by a tensor of one dimension: x[n.reshape(1)], or index_select",
    BOUND: "give numbers of Python, or compute with all elements, as by torch.where(mask, x, 0)",
    FILLING["masked_fill"][1]: "write torch.where(mask, value, x)",
    FILLING["index_fill"][1]: "write x[index] = value",
    **dict.fromkeys(
        (MASK, *DEPENDENT.values()), "compute with all elements, as by torch.where(mask, x, 0)"
    ),
}
# Where no caller has other advice.
INSTEAD_ALONE = {
    NUMBER: "keep the number on the device",
    READING_FUNCTIONS["__bool__"]: (
        "write torch.where for a condition, or read the tensor after graph.replay()"
    ),
}
READ_AFTER = "keep the tensor, and read it after graph.replay()"
WITHOUT_CHECK = (
    "call it without error_if_nonfinite, and check the norm that it returns after graph.replay()"
)
UPDATE_AFTER = "call update_parameters after graph.replay()"
UNCHECKED = "give the distribution validate_args=False"
# By modules and functions of PyTorch that read values in Python.
INSTEAD_WITHIN = {
    ("torch.amp.grad_scaler", "step"): (
        "capture the forward and the backward pass alone, and call scaler.step(optimizer) and "
        "scaler.update() after graph.replay()"
    ),
    ("torch.nn.utils.clip_grad", "clip_grad_norm_"): WITHOUT_CHECK,
    ("torch.nn.utils.clip_grad", "_get_total_norm"): WITHOUT_CHECK,
    ("torch.distributions.distribution", "__init__"): UNCHECKED,
    ("torch.distributions.distribution", "_validate_sample"): UNCHECKED,
    ("torch.optim.swa_utils", "update_parameters"): UPDATE_AFTER,
    ("torch.nn.modules.batchnorm", "forward"): "give the layer a momentum that is not None",
}


def _has_mask(indices: object) -> bool:
    """Whether PyTorch finds on the device where a mask is true; for one of the host it does not."""
    masks = [t for t in tensors_in([indices]) if t.dtype in MASKS]
    return any(places.mark_of(t) is not False for t in masks)


def _fills(func: Operator, args: Sequence[object]) -> bool:
    """Whether one number is put where a mask is true, for which PyTorch calls masked_fill."""
    value = args[2] if len(args) > 2 else None
    if not isinstance(value, Tensor) or value.numel() != 1:
        return False
    # The zero that autograd puts there is the host's as the number was; its place is a guess.
    is_zero = places.mark_of(value) is places.GUESS and torch._C._current_graph_task_id() >= 0
    if places.is_on_device(value) and not is_zero:
        return False
    return len(args) < 4 or not args[3]


def copied_by_operator(func: Operator, args: Sequence[object], kwargs: Keywords) -> str:
    """Name a copy between host and device that the program waits for.

    PyTorch puts a number of Python into several elements by a kernel, and into one element, as in
    x[0] = 1.0, by such a copy.
    """
    name = func.overloadpacket.__name__ if func.namespace == "aten" else ""
    if name in INDEXED:
        return _copied_by_index(name, args)
    if name in COPYING and places.is_on_device(args[0]):
        return TO_DEVICE if any(map(_is_on_host, args[1:2])) else ""
    if func is torch.ops.aten.where.self and any(map(places.is_on_device, args)):
        return NUMBER_IN_WHERE if any(map(_is_on_host, args)) else ""
    is_copy = func.overloadpacket in COPIES
    return _copied_by_copy(name, args, is_asynchronous(args, kwargs)) if is_copy else ""


# Operators whose second operand PyTorch copies to where the first one is.
COPYING = {"bernoulli", "bernoulli_", "slice_scatter", "select_scatter", "diagonal_scatter"}
COPYING |= {"as_strided_scatter", "copy"}


def _is_on_host(t: object) -> bool:
    return isinstance(t, Tensor) and places.mark_of(t) is False and t.numel() > 0


def _copied_by_copy(name: str, args: Sequence[object], is_asynchronous: bool) -> str:
    if name == "_foreach_copy_":
        pairs = zip(tensors_in(args[:1]), tensors_in(args[1:2]), strict=False)
        found = (_copied(*pair, is_asynchronous) for pair in pairs)
        return next(filter(None, found), "")
    if name != "copy_":
        return ""
    to, source = args[:2]
    is_number = isinstance(source, Tensor) and source.dim() == 0
    if is_number and isinstance(to, Tensor) and to.dim() > 0:
        return ""
    copied = _copied(to, source, is_asynchronous)
    return ONE_ELEMENT if is_number and copied == TO_DEVICE else copied


def _copied_by_index(name: str, args: Sequence[Any]) -> str:
    """Name what PyTorch copies for an operator with indices (`make_info`, `_index_put_impl_`).

    Of a mask of the host it copies from pinned memory, and does not wait.
    """
    if not places.is_on_device(args[0]):
        return ""
    if any(_is_on_host(t) and t.dtype not in MASKS for t in tensors_in([args[1]])):
        return INDEX
    is_put = name in PUT and _is_on_host(args[2])
    return NUMBER_BY_INDEX if is_put and not fills_mask(tuple(args)) else ""


def copied_by_function(func: Function, args: Sequence[Any], kwargs: Keywords) -> str:
    """Name a copy as `copied_by_operator` does; also those of numbers and lists of Python."""
    if func in (Tensor.__getitem__, Tensor.__setitem__) and places.is_on_device(args[0]):
        indices = list(_indices(args[1]))
        if any(isinstance(one, SEQUENCES) and len(one) for one in indices):
            return INDEX
        is_number = func is Tensor.__setitem__ and isinstance(args[2], Number)
        return NUMBER_BY_INDEX if is_number and _is_by_tensors(indices) else ""
    if func != torch.Tensor.copy_ or len(args) < 2:
        return ""
    to, source = args[:2]
    return _copied(to, source, is_asynchronous(args, kwargs))


SEQUENCES = (list, tuple, range, np.ndarray)  # of which PyTorch makes an index on the host
MOST_AS_TUPLE = 32  # a list that is shorter is a tuple if one of its items is no number


def _indices(index: object) -> Iterator[object]:
    """Yield the indices of ``x[index]``, as `treatSequenceAsTuple` of PyTorch does."""
    is_tuple = isinstance(index, tuple)
    if isinstance(index, (list, range)) and len(index) < MOST_AS_TUPLE:
        kinds = (Tensor, slice, type(None), type(...), *SEQUENCES)
        is_tuple = any(isinstance(one, kinds) for one in index)
    if is_tuple:
        yield from index  # type: ignore[misc]
    elif not isinstance(index, np.ndarray) or index.ndim:
        yield index


def _is_by_tensors(indices: Sequence[object]) -> bool:
    """Whether a number of Python goes to where tensors point, and not to where one mask is true."""
    tensors = [t for t in indices if isinstance(t, Tensor) and (t.dim() or t.dtype in MASKS)]
    is_mask = len(tensors) == 1 and tensors[0].dtype in MASKS
    return bool(tensors) and not (is_mask and places.mark_of(tensors[0]) is not False)


def _copied(to: object, source: object, is_asynchronous: bool) -> str:
    if not isinstance(to, Tensor) or not isinstance(source, Tensor):
        return ""
    if places.is_on_device(to) == places.is_on_device(source) or not to.numel():
        return ""
    if places.is_on_device(to):
        return copied_from_host(source, is_asynchronous)
    if is_asynchronous:
        return "" if places.is_pinned(to) else NOT_PINNED
    return "copy_ of a tensor to the host"


def copied_from_host(source: Tensor, is_asynchronous: bool) -> str:
    """Name a copy to the device that a capture refuses (`copy_kernel_cuda` of PyTorch)."""
    if not is_asynchronous:
        return TO_DEVICE
    return "" if places.is_pinned(source) or not source.numel() else NOT_PINNED


def is_later(func: Operator, args: Sequence[object], kwargs: Keywords) -> bool:
    """Whether a replay reads the memory of the host that an operator copies to the device."""
    if func.overloadpacket not in COPIES or not is_asynchronous(args, kwargs):
        return False
    source = args[0] if func.overloadpacket is torch.ops.aten._to_copy else args[1]
    return all(map(places.is_pinned, tensors_in([source])))


COPIES = {torch.ops.aten.copy_, torch.ops.aten._to_copy, torch.ops.aten._foreach_copy_}


def is_asynchronous(args: Sequence[object], kwargs: Keywords) -> bool:
    """Whether copy_ with these arguments returns before it has copied."""
    return bool(args[2] if len(args) > 2 else kwargs.get("non_blocking", False))


TO_DEVICE = "a copy from the host's memory"
NOT_PINNED = "a copy with non_blocking=True between the device and memory that is not pinned"
INDEX = "the copy of an index from the host's memory"
NUMBER_BY_INDEX = "the copy of a number of the host to where an index points"
NUMBER_IN_WHERE = "the copy of a number of the host that torch.where makes"
ONE_ELEMENT = (
    "the copy of a number into one element (x[0:1] = number makes none, x[0] = number does)"
)


INSTEAD_OF_COPIES = {
    NOT_PINNED: "call pin_memory() on the tensor of the host before the capture",
    INDEX: "make the index on the device before the capture",
    NUMBER_BY_INDEX: "give a value on the device, or call index_fill_ or masked_fill_",
    NUMBER_IN_WHERE: "give a number of Python, or a tensor on the device",
}
COPY_BEFORE = "copy before the capture, into a tensor that the graph reads"


def instead_of_copy(what: str) -> str:
    """Say what to write in the place of a copy between host and device."""
    for frame in calls_under_way():
        place = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if place == ("torch.optim.swa_utils", "update_parameters"):
            return UPDATE_AFTER
    return INSTEAD_OF_COPIES.get(what, COPY_BEFORE)


def makes_from_host(func: Function, args: Sequence[object], kwargs: Keywords) -> bool:
    """Whether a function makes a tensor on the device from numbers of Python."""
    if func is torch.unravel_index:  # of the shape
        return any(map(places.is_on_device, (*args[:1], kwargs.get("indices"))))
    name = getattr(func, "__name__", "")
    if name == "new" and places.is_on_device(args[0]):
        return any(isinstance(one, SEQUENCES) and len(one) for one in args[1:])
    if name not in MAKING:
        return False
    if func is torch.Tensor.new_tensor and kwargs.get("device") is None:
        return places.is_on_device(args[0])
    is_there = len(args) > 0 and places.is_on_device(args[0])
    return bool(kwargs.get("device") == places.DEVICE and not is_there)


def generators_of(args: Sequence[object], kwargs: Keywords) -> list[Any]:
    return [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch._C.Generator)]
