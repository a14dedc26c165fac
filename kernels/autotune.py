# SPDX-License-Identifier: MIT
"""Tiles that Triton measures, in place of those that the rule chooses.

``TORCHPAR_AUTOTUNE=1`` turns Triton's autotuner on. At the first launch for a layout of tensors it
times the kernel with each configuration that suits. Triton keeps the times on disk, in
$TRITON_CACHE_DIR. Later launches cost as much as launches without the autotuner.

Other tiles sum in another order, so that times decide the last bits of a result. A launch in a
compiled graph has no tensors to time, and takes the rule's tiles. Launches that split k, and
launches in Triton's interpreter, take the rule's tiles, too.
"""

import os
from collections.abc import Sequence

import triton
from torch import Tensor

from . import Wrap
from .launch import Plan

ENABLED = os.environ.get("TORCHPAR_AUTOTUNE") == "1"  # read when the kernels are imported


class AutotunedPlan(Plan):
    """The fastest of several plans of a kernel; Triton's autotuner finds it at the first launch.

    Args:
        plans: for the same tensors; no two with the same constants.
        restore: the names of tensors that the kernel reads and writes.
    """

    def __init__(self, plans: Sequence[Plan], restore: Sequence[str] = ()):
        one = plans[0]
        first_constant = one.kernel.arg_names.index(next(iter(one.constants)))
        tuner = triton.autotune(
            configs=[triton.Config(dict(plan.constants), **plan.options) for plan in plans],
            # The integer arguments.
            key=one.kernel.arg_names[first_constant - len(one.arguments) : first_constant],
            restore_value=list(restore),
            cache_results=True,
        )(one.kernel)
        self._tuner = tuner
        super().__init__(tuner, 0, one.arguments, {}, {}, one.descriptors)
        self._grids = {tuple(plan.constants.values()): plan.grid for plan in plans}

    def _compile(self, wrap: Wrap, *varying: Tensor | int) -> None:
        assert wrap is None, "a tracer has no tensors to time"
        names = list(self._tuner.configs[0].kwargs)
        compiled = self._tuner[lambda given: self._grids[tuple(given[name] for name in names)]](
            *varying, *self.arguments
        )
        self.constants = self._tuner.best_config.kwargs
        self.grid = self._grids[tuple(self.constants.values())]
        self._keep(compiled)
