# SPDX-License-Identifier: MIT
"""Trial of an operator with every part of PyTorch.

`check_operator` tries each rule of `rules` on a `case.Case`, an operator with a sample.
`attempts` says what the outcome of a rule is, `compare` how far results may differ, and `table`
holds the outcomes. `tensors` and `layouts` make operands, and `gradients` and `differences` their
derivatives. `process_settings` are what a call must leave as they were. `kernel_rules` adds the
rules of Triton kernels. `command_line` is ``python -m torchpar check``.
"""
