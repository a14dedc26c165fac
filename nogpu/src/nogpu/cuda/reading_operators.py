# SPDX-License-Identifier: MIT
"""Operators that read values of the device back, by their implementations for CUDA.

PyTorch marks two kinds by tags: operators whose result is a number of Python, and operators whose
result has a shape that depends on values. Others read within their implementation. The table below
names them, as the libraries of torch 2.14.1 have them: each function that is registered for CUDA or
for all devices, and that reaches `item`, `nonzero`, `equal` or `cudaStreamSynchronize`.

A function that PyTorch composes of operators needs no line: its operators are seen. An exception is
a function that asks whether there is a mode of dispatch, and takes other operators then, such as
the gradient of a product. The emulator is such a mode.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nogpu.cuda import places
from nogpu.cuda.devices import MASKS
from nogpu.cuda.operations import tensors_in
from nogpu.cuda.types import Keywords, Operator

# Functions and operators whose result has a shape that depends on values.
DEPENDENT = {
    name: f"{name}, whose shape depends on values,"
    for name in ("nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount")
}
NUMBER = "a function of PyTorch, which takes a number from a tensor,"
MASK = "indexing by a mask, whose number of elements depends on values,"
REPEAT = "repeat_interleave without output_size"
SINGULAR = "the check of a matrix that may be singular"
SPECTRUM = "a decomposition into eigenvalues or singular values"
MASKED_FILL = "masked_fill by the number of a tensor"
INDEX_FILL = "index_fill by the number of a tensor"
HOST_FILL = "fill_ of a tensor of the host by the number of a tensor"
ISIN = "isin with many elements, which takes those that are unique,"
MODE = "mode of more than 2048 elements"
HISTOGRAM = "histc without min and max"
SORTER = "searchsorted with a sorter, which it checks,"
LENGTHS = "segment_reduce, which checks its lengths,"
EXPONENTIAL = "the exponential of a matrix, which depends on its norm,"
LEAST_SQUARES = "linalg.lstsq, which checks its result,"
QUANTIZED = "a quantization, which takes its parameters as numbers,"
SPARSE = "a sparse tensor, whose number of elements depends on values,"
NESTED = "a nested tensor from a mask, whose shape depends on values,"
PRODUCT = "the gradient of a product, which asks for zeros,"
SCATTERED = "the gradient of masked_scatter, whose shape depends on values,"
FILLED = "the gradient of masked_fill's value, whose shape depends on the mask,"

INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
MOST_IN_A_BLOCK = 2048  # elements of which one block of threads finds the mode

Given = Mapping[str, Any]  # an operator's arguments by their names


class Reader(NamedTuple):
    """What an operator or a node of autograd reads, and for which arguments."""

    what: str
    reads: Callable[[Any], bool] = lambda given: True


def _has_many(given: Given) -> bool:
    """Whether isin sorts (`isin_Tensor_Tensor_out`)."""
    elements, tests = (given.get(name) for name in ("elements", "test_elements"))
    if not isinstance(tests, Tensor) or given["assume_unique"]:
        return False
    number = elements.numel() if isinstance(elements, Tensor) else 1
    return number > 0 and tests.numel() >= int(10 * number**0.145)


def _is_long(given: Given) -> bool:
    t = given["self"]
    return bool(t.dim() and t.size(given["dim"]) > MOST_IN_A_BLOCK)


def _is_sorted_by(given: Given) -> bool:
    sorter = given["sorter"]
    return isinstance(sorter, Tensor) and sorter.numel() > 0


def _has_whole_zero_points(given: Given) -> bool:
    return not given["zero_point"].is_floating_point()


def _from_device(*names: str) -> Callable[[Given], bool]:
    """Return whether one of the arguments is a tensor on the device."""
    return lambda given: any(places.mark_of(given.get(name)) is True for name in names)


# By the operators' names, without those of their overloads.
READERS = {
    **dict.fromkeys(("_local_scalar_dense", "is_nonzero"), Reader(NUMBER)),
    "item": Reader(".item()"),
    "equal": Reader("torch.equal"),
    "allclose": Reader("torch.allclose"),
    **{name: Reader(DEPENDENT[name]) for name in ("nonzero", "argwhere", "masked_select")},
    "nonzero_numpy": Reader(DEPENDENT["nonzero"]),
    **dict.fromkeys(("_unique", "_unique2", "unique_dim"), Reader(DEPENDENT["unique"])),
    "unique_consecutive": Reader(DEPENDENT["unique_consecutive"]),
    "unique_dim_consecutive": Reader(DEPENDENT["unique_consecutive"]),
    "bincount": Reader(DEPENDENT["bincount"], lambda given: given["self"].numel() > 0),
    "repeat_interleave": Reader(
        REPEAT, lambda given: "self" not in given and given["output_size"] is None
    ),
    "isin": Reader(ISIN, _has_many),
    "mode": Reader(MODE, _is_long),
    "histc": Reader(
        HISTOGRAM, lambda given: given["min"] == given["max"] and given["self"].numel() > 0
    ),
    "searchsorted": Reader(SORTER, _is_sorted_by),
    "segment_reduce": Reader(
        LENGTHS, lambda given: given["offsets"] is None and not given["unsafe"]
    ),
    **dict.fromkeys(("masked_fill", "masked_fill_"), Reader(MASKED_FILL, _from_device("value"))),
    **dict.fromkeys(("index_fill", "index_fill_"), Reader(INDEX_FILL, _from_device("value"))),
    **dict.fromkeys(
        ("fill", "fill_"),
        Reader(
            HOST_FILL,
            lambda given: (
                places.mark_of(given["self"]) is False and places.is_on_device(given["value"])
            ),
        ),
    ),
    **dict.fromkeys(("linspace", "logspace"), Reader(NUMBER, _from_device("start", "end"))),
    "randint_like": Reader(NUMBER, _from_device("high")),
    # Linear algebra. By their documentation the decompositions synchronize the device with the CPU.
    "_linalg_check_errors": Reader(SINGULAR),
    **dict.fromkeys(("_linalg_eigh", "linalg_eig", "_linalg_eigvals"), Reader(SPECTRUM)),
    **dict.fromkeys(("linalg_eigvals", "_linalg_svd", "linalg_pinv"), Reader(SPECTRUM)),
    "linalg_matrix_exp": Reader(EXPONENTIAL, lambda given: given["self"].size(-1) > 1),
    "linalg_lstsq": Reader(LEAST_SQUARES),
    # Quantization
    **dict.fromkeys(
        (
            *("_fused_moving_avg_obs_fq_helper", "quantize_per_tensor_dynamic"),
            *("_fake_quantize_learnable_per_tensor_affine", "quantize_per_channel"),
            "_fake_quantize_learnable_per_tensor_affine_backward",
            "_fake_quantize_learnable_per_channel_affine_backward",
        ),
        Reader(QUANTIZED),
    ),
    "quantize_per_tensor": Reader(QUANTIZED, _from_device("scale", "zero_point")),
    "fake_quantize_per_channel_affine_cachemask": Reader(QUANTIZED, _has_whole_zero_points),
    # Other layouts
    **dict.fromkeys(("_to_sparse", "_to_sparse_csr", "_to_sparse_csc"), Reader(SPARSE)),
    **dict.fromkeys(("_to_sparse_bsr", "_to_sparse_bsc"), Reader(SPARSE)),
    "_to_sparse_semi_structured": Reader(SPARSE),
    **dict.fromkeys(
        ("_nested_tensor_from_mask", "_nested_tensor_from_mask_left_aligned"), Reader(NESTED)
    ),
    "masked_scatter_backward": Reader(SCATTERED),
}
# Operators with such a tag whose rules stand elsewhere: a mask, a number of classes, and lengths.
TAGGED = {"index", "one_hot", "_ctc_loss", "_ctc_loss_backward"}
TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def _saved(node: object, name: str) -> Any:
    """What a node of autograd has saved."""
    return getattr(node, f"_saved_{name}")


def _is_a_product(node: object) -> bool:
    return bool(_saved(node, "self").dim() > 0)


def _is_a_product_of_several(node: object) -> bool:
    t, dim = _saved(node, "self"), _saved(node, "dim")
    dim = dim - 2**64 if dim >= 2**63 else dim  # PyTorch shows a negative one without its sign
    return bool(t.dim() > 0 and t.numel() > 1 and t.size(dim) > 1)


# By the names of autograd's nodes: `prod_backward`, `cumprod_backward` and `masked_fill_backward`.
BACKWARD = {
    **dict.fromkeys(("ProdBackward0", "ProdBackward1"), Reader(PRODUCT, _is_a_product)),
    "CumprodBackward0": Reader(PRODUCT, _is_a_product_of_several),
    "MaskedFillBackward1": Reader(FILLED, lambda node: node.next_functions[1][0] is not None),
}


def read_by_operator(func: Operator, args: Sequence[object], kwargs: Keywords) -> str:
    """Name what an operator reads back, some of whose operands are on the device."""
    name = func.overloadpacket.__name__
    if name in INDEXED and _has_mask(args[1]) and not _fills(func, args):
        return MASK
    reader = _reader_of(func)
    if reader is not None:
        return reader.what if reader.reads(_by_names(func, args, kwargs)) else ""
    return _read_by_node()


def _read_by_node() -> str:
    """Name what the node of autograd reads back that calls an operator."""
    if torch._C._current_graph_task_id() < 0:
        return ""
    node = torch._C._current_autograd_node()
    reader = None if node is None else BACKWARD.get(node.name())
    return reader.what if reader is not None and reader.reads(node) else ""


@cache
def _reader_of(func: Operator) -> Reader | None:
    name = func.overloadpacket.__name__
    if func.namespace == "aten":
        if name in READERS or name in TAGGED:
            return READERS.get(name)
        if any(one.name == "check_errors" for one in func._schema.arguments):
            return Reader(SINGULAR, lambda given: bool(given["check_errors"]))
    if TAGS.isdisjoint(func.tags):
        return None
    return Reader(f"{func.overloadpacket}, whose result depends on values,")


def _by_names(func: Operator, args: Sequence[object], kwargs: Keywords) -> Given:
    arguments = func._schema.arguments
    names = [one.name for one in arguments]
    defaults = {one.name: one.default_value for one in arguments}
    return {**defaults, **dict(zip(names, args, strict=False)), **kwargs}


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
