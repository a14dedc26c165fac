# SPDX-License-Identifier: MIT
"""Choose a launch: the library (no plan), the rule's tiles, or tiles that Triton measures.

``TORCHPAR_AUTOTUNE=1`` turns Triton's autotuner on. At the first launch for a layout of tensors it
times the kernel with each configuration that suits. Triton keeps the times on disk, in
$TRITON_CACHE_DIR. Later launches cost as much as launches without the autotuner.

Other tiles sum in another order, so that times decide the last bits of a result. A launch in a
compiled graph has no tensors to time, and takes the rule's tiles. Launches that split k, and
launches in Triton's interpreter, take the rule's tiles, too.
"""

import os
from collections.abc import Callable, Sequence

import triton
from torch import Tensor

from . import Wrap
from .launch import Plan
from .tiles import Tiles, choose_tiles, library_is_faster, suitable

ENABLED = os.environ.get("TORCHPAR_AUTOTUNE") == "1"  # read when the kernels are imported


def choose_plan(
    make: Callable[[Tiles], Plan],
    kernel: str,
    precision: str,
    sizes: Sequence[int],
    operands: Sequence[Tensor],
    tiles: Tiles | None,
    tma: bool,
    only_if_faster: bool,
    traced: bool,
    restore: Sequence[str] = (),
) -> Plan | None:
    """The plan of a launch; None if the library computes.

    Args:
        make: the plan for given tiles.
        sizes: m, n, k and batch.
        tiles, tma, only_if_faster: as the launch functions take them.
        traced: whether a compiler traces the launch, without tensors to time.
        restore: the names of tensors that the kernel reads and writes.
    """
    if only_if_faster and library_is_faster(kernel, precision, sizes, *operands, tma=tma):
        return None
    if tiles is not None:
        return make(tiles)
    tiles = choose_tiles(kernel, precision, sizes, *operands, tma=tma)
    if ENABLED and not traced and not operands[0].is_cpu and tiles.variant != "split_k":
        possible = suitable(kernel, precision, sizes[1], *operands, tma=tma)
        same_kernel = [t for t in possible if t.by_tma == tiles.by_tma and t.variant != "split_k"]
        plans = [make(one) for one in same_kernel]
        if len(plans) > 1:
            return AutotunedPlan(plans, restore)
    return make(tiles)


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
