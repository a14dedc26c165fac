# SPDX-License-Identifier: MIT
"""Functions in Python that a capture of a CUDA graph forbids: they read values back.

Each rule returns words on what the program does, or "" if that is allowed. What operators read
stands in `reading_operators`, and what is copied in `host_copies`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from nogpu.cuda import places
from nogpu.cuda import reading_operators as reading
from nogpu.cuda.devices import MASKS
from nogpu.cuda.host_copies import MAKING, MAKING_SPARSE, PUT, UPDATE_AFTER
from nogpu.cuda.reading_operators import DEPENDENT, NUMBER
from nogpu.cuda.types import Function, Keywords, Operator
from nogpu.libraries import instead_of_optimizer
from nogpu.record.source import calls_under_way, variables_of

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
ONE_HOT = "one_hot without num_classes"
CTC = "ctc_loss, which copies its lengths between host and device,"
SMOOTHED = "the mean of cross_entropy with weight and label_smoothing, which selects by a mask,"
LISTED = "a list with tensors of the device, whose numbers PyTorch takes,"
POSITION = "a tensor that is one number, as an index,"
BOUND = "a tensor as the bound of a slice"
TO_HOST = "a copy to the host"
# What is read by a copy into memory that is not pinned.
COPIED_TO_READ = {TO_HOST, READING_FUNCTIONS["tolist"]}
SPARSE_SIZE = "a sparse tensor without a size, which PyTorch finds in the indices,"


def read_by_function(func: Function, args: Sequence[object], kwargs: Keywords) -> str:
    """Name what a function of PyTorch reads back of a tensor on the device."""
    name = getattr(func, "__name__", "")
    if name in MAKING | MAKING_SPARSE and args:
        return _read_to_make(name, args, kwargs)
    if not args or not places.is_on_device(args[0]):
        return ""
    what, reads = SOMETIMES.get(func, ("", None))
    if reads is not None:
        return what if reads(*args, **kwargs) else ""
    return READING_FUNCTIONS.get(name, "")


def _read_to_make(name: str, args: Sequence[object], kwargs: Keywords) -> str:
    """Name what is read to make a tensor: of tensors in a list, or of a sparse tensor's indices."""
    given = args[1:] if name == "new_tensor" else args
    lists = [one for one in given if isinstance(one, (list, tuple))]
    if any(map(places.is_on_device, tree_leaves(lists))):
        return LISTED
    if name not in MAKING_SPARSE or not places.is_on_device(args[0]):
        return ""
    has_size = len(args) > (2 if name == "sparse_coo_tensor" else 3)
    return "" if has_size or kwargs.get("size") is not None else SPARSE_SIZE


def _selects_weights(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: object = None,
    ignore_index: object = -100,
    reduce: object = None,
    reduction: object = "mean",
    label_smoothing: float = 0.0,
) -> bool:
    """Whether cross_entropy divides by weights that it selects by a mask.

    `cross_entropy_loss_label_smoothing` of PyTorch does so without a mode of dispatch.
    """
    is_mean = reduction == "mean" and size_average is not False and reduce is not False
    has_classes = logits.shape != target.shape
    return bool(weight is not None and label_smoothing > 0 and is_mean and has_classes)


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


def _infers_classes(tensor: object, num_classes: object = -1) -> bool:
    return num_classes == -1


# Functions that read for some arguments, by what they read.
SOMETIMES: dict[Function, tuple[str, Callable[..., bool]]] = {
    torch.nn.functional.one_hot: (ONE_HOT, _infers_classes),
    cross_entropy: (SMOOTHED, _selects_weights),
    **dict.fromkeys(
        (torch.nn.functional.ctc_loss, torch.ctc_loss),
        (CTC, lambda *args, **kwargs: not _takes_cudnn(*args, **kwargs)),
    ),
}


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
    """Name what a call reads back: by its operator, or as it fills memory of the host."""
    is_put = func.overloadpacket.__name__ in PUT
    if is_put and places.mark_of(args[0]) is False and places.is_on_device(args[2]):
        return TO_HOST
    return reading.read_by_operator(func, args, kwargs)


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
        optimizer = variables_of(frame).get("self")
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
    other = instead_of_optimizer(type(optimizer))
    other = f", or take {other}" if other else ""
    return (
        f"{name} has neither fused nor capturable: give it a number as the learning rate, and "
        f"capture again when it changes{other}"
    )


COMPUTE_OUTSIDE = "compute it before the capture, or after graph.replay()"
INSTEAD = {
    reading.REPEAT: "give output_size",
    ONE_HOT: "give num_classes",
    reading.SINGULAR: (
        "call torch.linalg.inv_ex, solve_ex, cholesky_ex, lu_factor_ex or ldl_factor_ex without "
        "check_errors, and check the info that it returns after graph.replay()"
    ),
    CTC: (
        "give what cuDNN takes: float32, blank 0, concatenated targets, and targets and lengths as "
        "int32 on the device; or call it after graph.replay()"
    ),
    SMOOTHED: 'give reduction="sum", and divide by weight[target].sum()',
    LISTED: "write torch.stack(list)",
    POSITION: "index by a tensor of one dimension: x[n.reshape(1)], or index_select",
    BOUND: "give numbers of Python, or compute with all elements, as by torch.where(mask, x, 0)",
    SPARSE_SIZE: "give the size",
    reading.MASKED_FILL: "write torch.where(mask, value, x)",
    reading.INDEX_FILL: "write x[index] = value",
    reading.ISIN: (
        "write (x[..., None] == values).any(-1), or give assume_unique=True if it is so of both"
    ),
    reading.HISTOGRAM: "give min and max",
    reading.SORTER: "sort the sequence before: torch.searchsorted(sequence[sorter], x)",
    reading.LENGTHS: "give unsafe=True",
    reading.NESTED: "give nn.TransformerEncoder enable_nested_tensor=False",
    **dict.fromkeys(
        (
            *(reading.SPECTRUM, reading.MODE, reading.EXPONENTIAL, reading.LEAST_SQUARES),
            *(reading.QUANTIZED, reading.SPARSE, reading.PRODUCT, reading.SCATTERED),
            reading.FILLED,
        ),
        COMPUTE_OUTSIDE,
    ),
    **dict.fromkeys(
        (reading.MASK, *DEPENDENT.values()),
        "compute with all elements, as by torch.where(mask, x, 0)",
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


def generators_of(args: Sequence[object], kwargs: Keywords) -> list[Any]:
    return [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch._C.Generator)]
