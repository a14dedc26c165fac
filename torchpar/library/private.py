# SPDX-License-Identifier: MIT
"""Private names of PyTorch that operators need; tests/library/test_library.py guards each."""

from torch._C import (
    _any_output_is_alias_to_input_or_output as any_output_is_alias_to_input_or_output,
)
from torch._C import (
    _AutoDispatchBelowAutograd as AutoDispatchBelowAutograd,
)
from torch._C import (
    _get_fp32_precision_getter as get_fp32_precision,  # of torch.backends, six times as fast
)
from torch._C import (
    _len_torch_dispatch_stack as num_dispatch_modes,
)
from torch._C._functorch import peek_interpreter_stack
from torch._functorch.utils import enable_single_level_autograd_function
from torch._library.triton import (
    get_inner_triton_kernels,
    set_wrap_triton_enabled,
    triton_ops_to_kernels,
)
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.autograd import Function
from torch.autograd.forward_ad import _set_fwd_grad_enabled as set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction as SingleLevelFunction
from torch.library import _impls as implementations  # by Python, of all operators
from torch.utils._python_dispatch import (
    _get_current_dispatch_mode_stack as dispatch_modes,
)

compiled_autograd_key = Function._compiled_autograd_key

__all__ = [
    "AutoDispatchBelowAutograd",
    "FunctionalTensorMode",
    "SingleLevelFunction",
    "any_output_is_alias_to_input_or_output",
    "compiled_autograd_key",
    "dispatch_modes",
    "enable_single_level_autograd_function",
    "get_fp32_precision",
    "get_inner_triton_kernels",
    "implementations",
    "num_dispatch_modes",
    "peek_interpreter_stack",
    "set_fwd_grad_enabled",
    "set_wrap_triton_enabled",
    "triton_ops_to_kernels",
]
