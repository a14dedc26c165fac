# SPDX-License-Identifier: MIT
"""Custom operators that all of PyTorch supports: in place of `torch.library`'s.

    @torchpar.library.custom_op("mylib::gram", mutates_args=())
    def gram(x: Tensor) -> Tensor: ...

    gram.register_fake(...)
    gram.register_autograd(backward, setup_context=setup_context)

`custom_op` and `triton_op`, and the methods of what they return, take the arguments of PyTorch's
decorators and methods of these names. So a changed import moves an operator. The operator then also
has derivatives under torch.func and in forward mode (pytorch#168393, #170834, #179652), and
sharding rules that wait for DTensor. docs/citizen.md shows each rule.

`call_path` has operators and their rules, `rules` the types of the rules, `derivatives` the path
of a call through autograd and the transforms, `sharding` DTensor's rules, `kernel_search` the
search for an operator's kernels. `private` imports all private names of PyTorch that operators
need, and says for each name which public way does not do.
"""

from torchpar.library.call_path import CustomOpDef, custom_op, triton_op
from torchpar.library.transforms import batch_first, sample

__all__ = ["CustomOpDef", "batch_first", "custom_op", "sample", "triton_op"]
