# SPDX-License-Identifier: MIT
"""Registry of ATen operators in exact arithmetic: those with the same bits everywhere, and rules.

An operator *passes* if it moves data, compares, or rounds once for each element, as IEEE 754
defines. More operators pass if all operands are integers. A *rule* computes an operator by exact
products, exact sums and functions. Most rules get operands of bfloat16 and float16 as float32, and
their results are rounded to PyTorch's dtype. PyTorch makes a *composed* operator of operators that
pass or have a rule. `torchpar.exact.mode` refuses all other operators.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from torchpar.errors import ConfigError
from torchpar.ops.exact_digits import DIGITS

Result = Tensor | tuple[Tensor | None, ...]
Rule = Callable[..., Result]
R = TypeVar("R", bound=Rule)
NARROW = DIGITS.keys() - {torch.float32}

# In-place and out= variants count as their operators.
_PASSING = """
    alias as_strided broadcast_tensors cat clone constant_pad_nd contiguous copy detach diagonal
    expand flip gather im2col index index_select lift_fresh masked_select narrow new_empty new_full
    new_ones new_zeros permute pixel_shuffle repeat reshape roll select select_backward
    select_scatter set_ slice slice_backward slice_scatter split split_with_sizes squeeze stack t
    take_along_dim transpose tril triu unbind unfold unsafe_split unsqueeze view _unsafe_view
    _reshape_alias to _to_copy _pin_memory resize_ empty empty_like empty_strided full full_like
    ones ones_like scalar_tensor zeros zeros_like fill zero eye masked_fill masked_scatter
    index_fill where nan_to_num leaky_relu leaky_relu_backward abs neg sign sgn floor ceil round
    trunc relu threshold threshold_backward hardtanh hardtanh_backward eq ne lt le gt ge isnan isinf
    isneginf isposinf logical_and logical_or logical_not logical_xor all any equal argmax argmin mul
    div reciprocal max_pool2d_with_indices exact_matmul new_empty_strided _local_scalar_dense item
    is_same_size is_pinned _has_same_storage_numel embedding random rand rand_like
"""
PASSING = frozenset(_PASSING.split())
# Operators that PyTorch makes of other operators; put is refused. Of those on lists of tensors,
# Muon's: an optimizer of PyTorch takes more, and its bits with foreach=True are not those without.
_COMPOSED = """
    _foreach_copy _foreach_lerp _foreach_mul _foreach_sub
    bernoulli index_copy index_put put mse_loss nll_loss_forward nll_loss_backward
    nll_loss2d_forward nll_loss2d_backward randn randn_like _safe_softmax uniform _unsafe_index_put
"""
COMPOSED = frozenset(_COMPOSED.split())
# Operators that are the same everywhere for integers and booleans alone, beside those above. Sums
# and products of integers wrap around, in any order. `_int_mm` is not here: it saturates on
# processors without VNNI. Quantized products, interpolation of bytes, and `geometric`, which draws
# by a logarithm, are not here either.
_INTEGERS = """
    nansum trace prod cumsum cumprod cummax cummin count_nonzero addbmm addmv addr vdot linalg_cross
    remainder fmod floor_divide gcd lcm fmax fmin aminmax heaviside signbit hash_tensor bitwise_and
    bitwise_or bitwise_xor bitwise_not bitwise_left_shift bitwise_right_shift __and__ __or__ __xor__
    __iand__ __ior__ __ixor__ __lshift__ __rshift__ __ilshift__ __irshift__ bincount bucketize
    searchsorted isin nonzero nonzero_static is_nonzero kthvalue median nanmedian mode _unique
    _unique2 unique_dim unique_consecutive unique_dim_consecutive scatter_reduce index_reduce take
    _unsafe_index _unsafe_masked_index _unsafe_masked_index_put_accumulate randint randint_like
    randperm random tril_indices triu_indices repeat_interleave empty_permuted alias_copy
    as_strided_copy diagonal_copy expand_copy narrow_copy permute_copy split_with_sizes_copy
    squeeze_copy t_copy transpose_copy unbind_copy unfold_copy unsqueeze_copy view_copy
    as_strided_scatter diagonal_scatter diag_embed block_diag _chunk_cat rot90 channel_shuffle
    pixel_unshuffle reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d
    replication_pad2d replication_pad3d upsample_nearest1d upsample_nearest2d upsample_nearest3d
    _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
    max_pool3d_with_indices resize_as copy_from _copy_from _assert_async _functional_assert_async
    _assert_scalar
"""
INTEGERS = frozenset(_INTEGERS.split())
# What PyTorch asks tensors of some subclasses, such as those that torch.export traces.
_METADATA = """
    dim size stride numel storage_offset sym_size sym_stride sym_numel sym_storage_offset
    is_contiguous is_strides_like_format is_non_overlapping_and_dense
"""
METADATA = {"prim::device", "prim::layout", *(f"aten::{name}" for name in _METADATA.split())}

# Their means and deviations stay float32 with 16-bit operands, as PyTorch's on GPUs. On a CPU
# PyTorch's have the weight's dtype. The numbers are where the backward operator takes the operand,
# its mean, its deviation and the weight.
STATISTICS = {"native_layer_norm": (1, 3, 4, 5), "native_group_norm": (1, 2, 3, 4)}
EXACT_RULES: dict[str, Rule] = {}
PRIVATE: set[str] = set()
"""Names of operators that only torchpar's functions call, with shapes that PyTorch would refuse."""


def rule(
    *names: str, any_dtype: bool = False, narrow: bool = False, private: bool = False
) -> Callable[[R], R]:
    """Register a rule for ATen operators by their names.

    Args:
        any_dtype: whether it takes other dtypes than those of `DIGITS`.
        narrow: whether it takes bfloat16 and float16 as they are, and not as float32.
        private: whether only torchpar's functions call the operator.
    """
    if private:
        PRIVATE.update(names)

    def register(function: R) -> R:
        def checked(first: Tensor, *others: object, **options: object) -> Result:
            check_dtypes(first, *others)
            return function(first, *others, **options)

        registered: Rule = function if any_dtype else checked
        EXACT_RULES.update(dict.fromkeys(names, registered if narrow else widened(registered)))
        return function

    return register


def widened(function: Rule) -> Rule:
    """A rule that gets float32 in place of operands of bfloat16 and float16."""

    def call(*operands: object, **options: object) -> Result:
        return function(*map(wide, operands), **{name: wide(t) for name, t in options.items()})

    return call


def wide(operand: object) -> Any:
    """An operand in float32, if it is a tensor of bfloat16 or float16."""
    return operand.float() if isinstance(operand, Tensor) and operand.dtype in NARROW else operand


def check_dtypes(first: Tensor, *others: object) -> None:
    """Raise an error unless the first operand, and all other floats, have exact arithmetic."""
    for t in first, *(t for t in others if isinstance(t, Tensor) and t.is_floating_point()):
        if t.dtype not in DIGITS:
            raise ConfigError(
                f"exact arithmetic takes float32, bfloat16 and float16, an operand is {t.dtype}; "
                "convert it"
            )


def times(t: Tensor, factor: Tensor | float) -> Tensor:
    return t if isinstance(factor, int | float) and factor == 1 else t * factor
