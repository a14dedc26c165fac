# SPDX-License-Identifier: MIT
"""Custom operators that all of PyTorch supports: in place of `torch.library`'s.

    @torchpar.library.custom_op("mylib::gram", mutates_args=())
    def gram(x: Tensor) -> Tensor: ...

    gram.register_fake(...)
    gram.register_autograd(backward, setup_context=setup_context)

`custom_op` and `triton_op`, and the methods of what they return, take the arguments of PyTorch's
decorators and methods of these names. So a changed import moves an operator. The operator then also
has derivatives under torch.func and in forward mode (pytorch#168393, #170834, #179652), sharding
rules that wait for DTensor, and a formula for `FlopCounterMode`. docs/citizen.md shows each rule.

`constructors` makes an operator of a function, `registration` registers the operator's rules, and
`call_path` leads a call through them, by its `dispatch_keys`. `derivatives` holds a call's part in
autograd and in the `transforms`, `rules` the types of the rules, `sharding` DTensor's rules, and
`kernel_search` the search for an operator's kernels, and `flops` what `FlopCounterMode` counts.
`player` puts C++ in front of the calls, where `build` has built it, and `tape` records what it
plays. `private` imports the private names of PyTorch that operators need, and says for each name
which public way does not do.
"""

from torchpar.library.constructors import custom_op, triton_op
from torchpar.library.registration import CustomOpDef
from torchpar.library.transforms import batch_first, sample

__all__ = ["CustomOpDef", "batch_first", "custom_op", "sample", "triton_op"]
