# SPDX-License-Identifier: MIT
"""Tiles that Triton measures, in place of those that the rule chooses.

``TORCHPAR_AUTOTUNE=1`` turns Triton's autotuner on. At the first launch for a layout of tensors it
times the kernel with each suitable configuration. Triton keeps the times on disk, in
$TRITON_CACHE_DIR. Later launches cost as much as launches without the autotuner.

Other tiles sum in another order, so that times decide the last bits of a result. A launch in a
compiled graph has no tensors to time, and takes the rule's tiles. Launches that split k, and
launches in Triton's interpreter, take the rule's tiles, too.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import triton
from torch import Tensor

from . import Wrap
from .launch import Plan

ENABLED = os.environ.get("TORCHPAR_AUTOTUNE") == "1"  # read when the kernels are imported


class AutotunedPlan(Plan):
    """The fastest of several plans of a kernel; Triton's autotuner finds it at the first launch.

    Args:
        plans: for the same tensors; no two with the same constants and options.
        restore: the names of tensors that the kernel reads and writes.
    """

    def __init__(self, plans: Sequence[Plan], restore: Sequence[str] = ()):
        one = plans[0]
        first_constant = one.kernel.arg_names.index(next(iter(one.constants)))
        configs = [triton.Config(dict(plan.constants), **plan.options) for plan in plans]
        self._configured = ConfiguredKernel(one.kernel, configs, [plan.grid for plan in plans])
        self._tuner = triton.autotune(
            configs=configs,
            # The integer arguments.
            key=one.kernel.arg_names[first_constant - len(one.arguments) : first_constant],
            restore_value=list(restore),
            cache_results=True,
        )(self._configured)
        super().__init__(self._tuner, 0, one.arguments, {}, {}, one.descriptors)

    def _compile(self, wrap: Wrap, *varying: Tensor | int) -> None:
        assert wrap is None, "a tracer has no tensors to time"
        compiled = self._tuner[None](*varying, *self.arguments)
        fastest = self._tuner.best_config
        self.constants = fastest.kwargs
        self.grid = self._configured.grid(fastest.all_kwargs())
        self._keep(compiled)


class ConfiguredKernel:
    """A kernel for Triton's autotuner, whose grid depends on all of a configuration.

    Triton calls a function of the grid with the constants alone, without the number of warps.

    Args:
        configs: the configurations, all of the same constants and options.
        grids: the grid of each configuration.
    """

    def __init__(self, kernel: Any, configs: Sequence[triton.Config], grids: Sequence[Any]):
        self.fn, self.arg_names = kernel, kernel.arg_names
        self._names = tuple(configs[0].all_kwargs())
        keys = [self._key(config.all_kwargs()) for config in configs]
        self._grids = dict(zip(keys, grids, strict=True))

    def _key(self, options: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(options[name] for name in self._names)

    def grid(self, options: Mapping[str, Any]) -> Any:
        """Return the grid of the configuration with these constants and options."""
        return self._grids[self._key(options)]

    def run(self, *arguments: Tensor | int, **options: Any) -> Any:
        """Launch as Triton's autotuner does, with the grid of the configuration."""
        return self.fn.run(*arguments, **options | {"grid": self.grid(options)})
