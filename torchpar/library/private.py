# SPDX-License-Identifier: MIT
"""Private names of PyTorch that operators need, each with the public way that does not do.

tests/library/test_private_names.py counts them, and fails where PyTorch has mended a gap.
Times are of a call on a CPU of two cores; a call of an operator takes about 8 µs. Not counted are
private attributes of objects and of public modules, such as `Tensor._is_view`,
`OpOverload._enable_pyobj_dispatch`, `Library._register_fake` and `forward_ad._current_level`.

On the path of each call:

- ``AutoDispatchBelowAutograd``: call the operator below autograd. ``OpOverload.redispatch`` with
  the keys below takes 0.8 µs longer.
- ``any_requires_grad``: ask all arguments, whatever they are. A loop over ``requires_grad`` takes
  0.4 µs longer.
- ``set_grad_enabled``: turn gradients off in a kernel. `torch.set_grad_enabled` takes 0.7 µs
  longer.
- ``any_output_is_alias_to_input_or_output``: refuse results that share memory. To compare
  `Tensor.untyped_storage` takes 0.6 µs longer.
- ``get_fp32_precision``: the flag of float32. `torch.backends.cuda.matmul.fp32_precision` takes
  1.2 µs longer.
- ``dispatch_keys``, ``num_dispatch_modes``, ``implementations``: know that the dispatcher would
  find nothing between autograd and a trusted kernel. Nothing public tells a tensor's keys, the
  modes of this thread, or the kernels that others registered in Python.
- ``dispatch_modes``: tell the mode of an emulator from others; nothing public lists the modes.
- ``profiler_enabled``: PyTorch's dispatch in Python (2.14) records no event, and no public function
  tells that a profiler is active.

For torch.func and forward mode, in which `torch.library.register_autograd` fails (pytorch#168393,
#170834, #179652):

- ``peek_interpreter_stack``: whether transforms are active; nothing public tells.
- ``SingleLevelFunction``, ``enable_single_level_autograd_function``: differentiate for the one
  transform that calls the operator. `torch.autograd.Function` would call all of them again. It can
  be called earlier, from a kernel for the key FuncTorchDynamicLayerFrontMode. Then reverse mode,
  `torch.func.vmap` and `torch.func.hessian` are right, but forward over forward mode is 0; and an
  operator without a rule of vmap would lose PyTorch's loop.
- ``compiled_autograd_key``: compiled autograd asks for it, and ``SingleLevelFunction`` has none.
- ``set_fwd_grad_enabled``: PyTorch turns forward mode off around ``jvp``, so that the tangents of
  outer transforms would be 0. `torch.autograd.forward_ad` has no public switch.

For operators made of Triton kernels, in which `torch.library.triton_op` does not do, because it
looks for the kernels at the definition, which imports Triton and the compiler, and because it
cannot keep a call opaque:

- ``FunctionalTensorMode``: the mode in which a compiler looks into an operator, for
  `torch.library.register_torch_dispatch`.
- ``triton_ops_to_kernels``, ``get_inner_triton_kernels``: the kernels' source, for compilers' keys.
- ``set_wrap_triton_enabled``: launch kernels of `torch.library.wrap_triton` without a compiler's
  operator around each.
- ``is_decomposition_disabled``: `torch.export` keeps an operator as one node.
"""

from torch._C import (
    _any_output_is_alias_to_input_or_output as any_output_is_alias_to_input_or_output,
)
from torch._C import _any_requires_grad as any_requires_grad
from torch._C import _AutoDispatchBelowAutograd as AutoDispatchBelowAutograd
from torch._C import _dispatch_keys as dispatch_keys
from torch._C import _get_fp32_precision_getter as get_fp32_precision
from torch._C import _len_torch_dispatch_stack as num_dispatch_modes
from torch._C import _set_grad_enabled as set_grad_enabled
from torch._C._autograd import _profiler_enabled as profiler_enabled
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
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as dispatch_modes

compiled_autograd_key = Function._compiled_autograd_key


def is_decomposition_disabled() -> bool:
    # Its module takes long to import.
    from torch.export._trace import custom_triton_ops_decomposition_disabled

    return bool(custom_triton_ops_decomposition_disabled())


__all__ = [
    "AutoDispatchBelowAutograd",
    "FunctionalTensorMode",
    "SingleLevelFunction",
    "any_output_is_alias_to_input_or_output",
    "any_requires_grad",
    "compiled_autograd_key",
    "dispatch_keys",
    "dispatch_modes",
    "enable_single_level_autograd_function",
    "get_fp32_precision",
    "get_inner_triton_kernels",
    "implementations",
    "is_decomposition_disabled",
    "num_dispatch_modes",
    "peek_interpreter_stack",
    "profiler_enabled",
    "set_fwd_grad_enabled",
    "set_grad_enabled",
    "set_wrap_triton_enabled",
    "triton_ops_to_kernels",
]
