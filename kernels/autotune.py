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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import triton
from torch import Tensor

from . import Wrap
from .launch import Plan

ENABLED = os.environ.get("TORCHPAR_AUTOTUNE") == "1"  # read when the kernels are imported


@dataclass(eq=False)
class Candidates:
    """Configurations of one kernel, for a launch by which Triton's autotuner times them.

    Times on disk are taken only if Triton's own variable TRITON_CACHE_AUTOTUNING is set.

    Attributes:
        configurations: at least two.
        times: of each in ms, once launched: the median, the 20% and the 80% quantile. The times of
            a configuration that does not fit into the GPU are infinite.
    """

    configurations: Sequence[Any]
    times: dict[Any, Sequence[float]] = field(default_factory=dict)

    def keep(self, tuner: Any) -> None:
        """Take the times of Triton's autotuner, which has them in the order of configurations."""
        self.times = dict(zip(self.configurations, tuner.configs_timings.values(), strict=True))


class AutotunedPlan(Plan):
    """The fastest of several plans of a kernel; Triton's autotuner finds it at the first launch.

    Args:
        plans: for the same tensors; no two with the same constants and options.
        restore: the names of tensors that the kernel reads and writes.
        candidates: the object that receives the times. By default Triton keeps them on disk.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        restore: Sequence[str] = (),
        candidates: Candidates | None = None,
    ):
        one = plans[0]
        self._candidates = candidates
        first_constant = one.kernel.arg_names.index(next(iter(one.constants)))
        self._configured = _Configured(plans)
        self._tuner = triton.autotune(
            configs=[triton.Config(dict(plan.constants), **plan.options) for plan in plans],
            # The integer arguments.
            key=one.kernel.arg_names[first_constant - len(one.arguments) : first_constant],
            restore_value=list(restore),
            cache_results=candidates is None,
        )(self._configured)
        super().__init__(self._tuner, 0, one.arguments, {}, {}, one.descriptors)

    def _compile(self, wrap: Wrap, *varying: Tensor | int) -> None:
        assert wrap is None, "a tracer has no tensors to time"
        compiled = self._tuner[None](*varying, *self.arguments)
        if self._candidates is not None:
            self._candidates.keep(self._tuner)
        fastest = self._configured.plan(self._tuner.best_config.all_kwargs())
        self.constants, self.grid = fastest.constants, fastest.grid
        self._keep(compiled)


class _Configured:
    """A kernel whose grid depends on all of a configuration.

    Triton calls a function of the grid with the constants alone, without the number of warps.
    """

    def __init__(self, plans: Sequence[Plan]):
        one = plans[0]
        self.fn: Any = one.kernel
        self.arg_names = one.kernel.arg_names
        self._names = *one.constants, *one.options
        self._plans = {self._key({**plan.constants, **plan.options}): plan for plan in plans}

    def _key(self, options: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(options[name] for name in self._names)

    def plan(self, options: Mapping[str, Any]) -> Plan:
        return self._plans[self._key(options)]

    def run(self, *arguments: Tensor | int, **options: Any) -> Any:
        """Launch as Triton's autotuner does, with the grid of the configuration."""
        return self.fn.run(*arguments, **options | {"grid": self.plan(options).grid})
