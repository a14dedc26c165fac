# SPDX-License-Identifier: MIT
"""Trial of an optimizer in many situations, on several ranks.

`check_optimizer` trains in each of `situations.SITUATIONS`, where a `trial.Trial` records weights
and gradients on each rank. `replay` takes the same steps on unsharded matrices, by the optimizer
and by its formula of `formulas`. `judge` compares them, `refusals` judges errors, and `conformance`
holds the verdicts.
"""
