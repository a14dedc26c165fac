# SPDX-License-Identifier: MIT
"""Private names of PyTorch that operators need, each with the public way that does not do.

tests/library/test_private_names.py counts them, and fails where PyTorch has mended a gap.
Times are of a call on a CPU of two cores; a call of an operator takes about 8 µs. Not counted are
private attributes of objects and of public modules, such as `Tensor._is_view`,
`OpOverload._enable_pyobj_dispatch`, `Library._register_fake` and `forward_ad._current_level`.

On the path of each call:

- ``implementations``: know that others have registered no kernel for a device in Python, in whose
  place a trusted kernel would be called. `OpOverload.has_kernel_for_dispatch_key` takes 2.5 µs
  longer.
- ``dispatch_modes``: tell the mode of an emulator from others; nothing public lists the modes.
  ``count_dispatch_modes`` tells in a ninth of the time that there is none.
- ``profiler_enabled``: PyTorch's dispatch in Python (2.14) records no event, and no public function
  tells that a profiler is active.

For torch.func, in which `torch.library.register_autograd` fails (pytorch#168393, #170834, #179652):

- ``peek_interpreter_stack``: whether transforms are active; nothing public tells.
- ``SingleLevelFunction``, ``enable_single_level_autograd_function``: differentiate for the one
  transform that calls the operator. `torch.autograd.Function` would call all of them again. It can
  be called earlier, from a kernel for the key FuncTorchDynamicLayerFrontMode. Then reverse mode,
  `torch.func.vmap` and `torch.func.hessian` are right, but forward over forward mode is 0; an
  operator without a rule of vmap would lose PyTorch's loop; and `torch.func.functionalize` over a
  derivative would fail.

For operators made of Triton kernels, in which `torch.library.triton_op` does not do, because it
looks for the kernels at the definition, which imports Triton and the compiler, and because it
cannot keep a call opaque:

- ``FunctionalTensorMode``: the mode in which a compiler looks into an operator, for
  `torch.library.register_torch_dispatch`.
- ``triton_ops_to_kernels``: the kernels' source, for compilers' keys.
- ``set_wrap_triton_enabled``: launch kernels of `torch.library.wrap_triton` without a compiler's
  operator around each.
- ``is_decomposition_disabled``: `torch.export` keeps an operator as one node.
  `torch.compiler.is_exporting` is also True where AOTInductor and
  ``run_decompositions(decompose_custom_triton_ops=True)`` look into the operator.

For calls that C++ plays (`tape`):

- ``TorchDispatchMode``: note which operators a function calls. No public class is told of them.

For sizes that a compiler knows as symbols, which a plain comparison would fix:

- ``check``: let the graph check a size that depends on data. `torch.cond` has no error, and
  `torch._assert_async` takes a tensor.
- ``has_unbacked_symbols``, ``statically_known_true``: look at sizes without a guard. Their module
  has no underscore, but is "experimental", and takes long to import. `==` of two `torch.Size`
  guards.
"""

from typing import TYPE_CHECKING

from torch import Tensor
from torch import _check as check
from torch._C import _len_torch_dispatch_stack as count_dispatch_modes
from torch._C._autograd import _profiler_enabled as profiler_enabled
from torch._C._functorch import peek_interpreter_stack
from torch._functorch.utils import enable_single_level_autograd_function
from torch._library.triton import (
    set_wrap_triton_enabled,
    triton_ops_to_kernels,
)
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.autograd.function import _SingleLevelFunction as SingleLevelFunction
from torch.library import _impls as implementations  # by Python, of all operators
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as dispatch_modes

if TYPE_CHECKING:
    from torch.types import BoolLikeType


def statically_known_true(condition: "BoolLikeType") -> bool:
    from torch.fx.experimental import symbolic_shapes

    return symbolic_shapes.statically_known_true(condition)


def has_unbacked_symbols(*tensors: Tensor) -> bool:
    from torch.fx.experimental import symbolic_shapes

    return bool(symbolic_shapes.free_unbacked_symbols(list(tensors)))


def is_decomposition_disabled() -> bool:
    # Its module takes long to import.
    from torch.export._trace import custom_triton_ops_decomposition_disabled

    return bool(custom_triton_ops_decomposition_disabled())


__all__ = [
    "FunctionalTensorMode",
    "SingleLevelFunction",
    "TorchDispatchMode",
    "check",
    "count_dispatch_modes",
    "dispatch_modes",
    "enable_single_level_autograd_function",
    "has_unbacked_symbols",
    "implementations",
    "is_decomposition_disabled",
    "peek_interpreter_stack",
    "profiler_enabled",
    "set_wrap_triton_enabled",
    "statically_known_true",
    "triton_ops_to_kernels",
]
