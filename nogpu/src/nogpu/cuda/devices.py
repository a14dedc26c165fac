# SPDX-License-Identifier: MIT
"""Operators and launches that are given tensors of the host beside those of the device.

A GPU refuses most of them: PyTorch's kernels for CUDA ask that all tensors be on one device. These
are allowed: copies; a number of the host, which is a tensor without dimensions, as an operand of an
operator that works element by element; indices of the host for a tensor of the device; and
operators that take the shape of a tensor, or its elements as numbers. A tensor whose place is not
known is never refused.
"""

from collections.abc import Iterator, Sequence
from enum import Enum

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from nogpu.cuda import places
from nogpu.cuda.types import Arguments, Keywords, Operator
from nogpu.triton.torch_operators import is_plain


class Devices(Enum):
    """Devices that the tensors of an operator may be on."""

    ONE = "one"
    INDEXED = "that of a tensor, and the host for its indices"
    ANY = "any"


# Operators of ATen that take tensors of several devices. In PyTorch's list of them, they have
# "device_check: NoCheck", or call others that copy.
ALLOWED = {
    *("copy", "copy_", "_to_copy", "fill", "fill_", "bernoulli", "bernoulli_"),
    *("slice_scatter", "select_scatter", "diagonal_scatter", "as_strided_scatter"),
    *("set_", "is_set_to", "is_same_size", "resize_as_", "_has_same_storage_numel"),
    *("_new_zeros_with_same_feature_meta", "_pack_padded_sequence", "linspace", "logspace"),
    *("_unsafe_masked_index", "_unsafe_masked_index_put_accumulate"),
    *("unsafe_split", "_scaled_dot_product_flash_attention_for_cpu_backward"),
    *("aten.index_fill.int_Tensor", "aten.index_fill_.int_Tensor"),
}
# Lists of tensors, each of which may be elsewhere; losses with lengths on the host; other layouts;
# and what has the state of a generator.
ALLOWED_PARTS = ("foreach", "_fused_", "ctc_loss", "nested", "sparse", "attention_backward")
# Of operators that PyTorch makes of others, which arrive here in inference mode: these are refused.
COMPOSED = {"linear", "matmul", "conv1d", "conv2d", "conv3d", "batch_norm", "layer_norm"}
COMPOSITE = "CompositeImplicitAutograd"
MASKS = (torch.bool, torch.uint8)  # types of indices that stand for a mask
INDEXED = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
INDEXED |= {"_unsafe_index_put"}

# Operators beside PyTorch's "pointwise" ones that take a number of the host: in PyTorch's list they
# have "device_check: NoCheck".
TAKE_NUMBERS = {"binary_cross_entropy", "binary_cross_entropy_with_logits", "binomial", "copysign_"}
TAKE_NUMBERS |= {"dist", "eq_", "floor_divide", "floor_divide_", "ge_", "gt_", "heaviside_", "le_"}
TAKE_NUMBERS |= {"lt_", "mse_loss", "ne_", "rsub", "smooth_l1_loss", "__irshift__"}
FILLS = {"index_fill", "index_fill_", "masked_fill", "masked_fill_"}  # as their value alone
# "Pointwise" operators that have not: `x.clamp(min=number_of_the_host)` is refused on a GPU.
TAKE_NONE = {"clamp", "clamp_", "clamp_max", "clamp_max_", "clamp_min", "clamp_min_", "equal"}
TAKE_NONE |= {"gcd", "gelu_backward", "igamma", "igamma_", "igammac", "igammac_", "lcm"}
TAKE_NONE |= {"logaddexp", "logaddexp2", "logit_backward", "native_dropout_backward", "nextafter"}
TAKE_NONE |= {"nextafter_", "sigmoid_backward", "silu_backward", "tanh_backward"}
TAKE_NONE |= {"threshold_backward"}

WHAT_TO_DO = "call .cuda() on the tensor, or on the module, that is on the CPU"
WITHOUT_THE_FLAG = "leave out --cuda-is-cpu, if the script makes all tensors on the CPU"


def devices_of(func: Operator) -> Devices:
    """Return which devices an operator takes; ANY also where that is not known."""
    name = func.overloadpacket.__name__
    if func.namespace != "aten" or name in ALLOWED or str(func) in ALLOWED:
        return Devices.ANY
    if any(part in name for part in ALLOWED_PARTS):
        return Devices.ANY
    if name in INDEXED:
        return Devices.INDEXED
    # In C++: of some operators PyTorch has a function in Python, too, which it does not call here.
    is_composed = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), COMPOSITE)
    return Devices.ANY if is_composed and name not in COMPOSED else Devices.ONE


def takes_numbers(func: Operator, argument: str) -> bool:
    """Whether a GPU takes a number of the host as an argument of an operator."""
    name = func.overloadpacket.__name__
    if name in FILLS:
        return argument == "value"
    return name in TAKE_NUMBERS or (torch.Tag.pointwise in func.tags and name not in TAKE_NONE)


def check_operator(
    func: Operator, args: Arguments, kwargs: Keywords, written: Sequence[Tensor]
) -> None:
    """Refuse tensors of the host beside those of the device, where a GPU does.

    Args:
        written: operands that the operator writes.

    Raises:
        RuntimeError: with PyTorch's words, as on a GPU.
    """
    is_indexed = devices_of(func) is Devices.INDEXED
    first: tuple[str, bool] | None = None
    for name, t in _operands(func, args, kwargs):
        is_there = places.mark_of(t)
        if not isinstance(is_there, bool) or t.is_nested:
            continue
        is_number = not is_there and t.dim() == 0 and not any(t is one for one in written)
        if is_number and takes_numbers(func, name):
            continue
        if is_indexed:
            if name == "indices":
                if is_there and first is not None and not first[1]:
                    raise RuntimeError(
                        "indices should be either on cpu or on the same device as the indexed "
                        f"tensor (cpu), but one is on cuda:0; {WHAT_TO_DO}"
                    )
                continue
            if name == "values" and (t.dim() == 0 or fills_mask(args)):
                continue
        if first is None:
            first = name, is_there
        elif first[1] is not is_there:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but got {name} is on "
                f"{_shown(is_there)}, different from other tensors on {_shown(first[1])} (when "
                f"checking argument in {func.overloadpacket}); {WHAT_TO_DO}"
            )


def fills_mask(args: Arguments) -> bool:
    """Whether index_put with these arguments puts one number of the host where a mask is true.

    PyTorch calls masked_fill for that (`canDispatchToMaskedFill`). The place of a number that the
    program writes in Python is not known.
    """
    to, indices, value, *others = args
    if not isinstance(value, Tensor) or value.numel() != 1 or any(others):
        return False
    masks = [t for t in tree_leaves(indices) if isinstance(t, Tensor)]
    if places.is_on_device(value) or len(masks) != 1 or masks[0].dtype not in MASKS:
        return False
    return places.mark_of(masks[0]) is not False or not places.is_on_device(to)


def _operands(func: Operator, args: Arguments, kwargs: Keywords) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of an operator's arguments, with the arguments' names."""
    names = (one.name for one in func._schema.arguments)
    for name, value in (*zip(names, args, strict=False), *kwargs.items()):
        for t in tree_leaves(value):
            if is_plain(t):
                yield name, t


def _shown(is_there: bool) -> str:
    return "cuda:0" if is_there else "cpu"


def check_launch(arguments: Sequence[object]) -> None:
    """Refuse a launch of a Triton kernel with a pointer to the host's memory, unless it is pinned.

    Raises:
        ValueError: with Triton's words, as on a GPU.
    """
    pointers = [(n, t) for n, value in enumerate(arguments) for t in _pointers(value)]
    for position, t in pointers:
        if places.mark_of(t) is False and t.numel() and not places.is_pinned(t):
            is_all_on_host = all(places.mark_of(one) is False for _, one in pointers)
            what_to_do = f"{WHAT_TO_DO}; or {WITHOUT_THE_FLAG}" if is_all_on_host else WHAT_TO_DO
            raise ValueError(
                f"Pointer argument (at {position}) cannot be accessed from Triton (cpu tensor?); "
                f"{what_to_do}"
            )


def _pointers(value: object) -> Iterator[Tensor]:
    """Yield the tensors of an argument whose addresses a kernel is given, without descriptors'."""
    if isinstance(value, (tuple, list)):
        for one in value:
            yield from _pointers(one)
    elif hasattr(value, "data_ptr"):
        base = getattr(value, "base", value)  # of triton.reinterpret
        if isinstance(base, Tensor):
            yield base
