# SPDX-License-Identifier: MIT
"""Triton operators that work with all of PyTorch, and parallel training on them.

Importing this package registers ``torch.ops.torchpar.*``. Triton is imported on the first call that
needs a kernel, and `torchpar.optim`, `torchpar.parallel` and others on first use: so
``import torchpar`` is cheap, and works where Triton is not installed. Where PyTorch is not
installed, `torchpar.baselines` and `torchpar.data.files` still work.
"""

import importlib
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torchpar.errors import needs_torch

if find_spec("torch"):
    from torchpar import library, nn
    from torchpar.ops import (
        exact_matmul,
        exact_matmul_t,
        fp32_products,
        linear_sigmoid,
        matmul_t,
        maximum,
        symmetric_matmul,
    )

if TYPE_CHECKING:
    from torchpar import exact, optim, parallel, ptx, testing

__version__ = "0.5.0"
__all__ = ["exact_matmul", "exact_matmul_t", "linear_sigmoid", "matmul_t", "maximum"]
__all__ += ["fp32_products"]
__all__ += ["exact", "library", "nn", "optim", "parallel", "ptx", "symmetric_matmul", "testing"]


def __getattr__(name: str) -> Any:
    if name not in ("exact", "optim", "parallel", "ptx", "testing") or not find_spec("torch"):
        needs_torch(__name__, __all__)(name)
    return importlib.import_module(f"torchpar.{name}")


# Modules that moved in version 0.5. Their old names work until version 0.6.
MOVED = {
    "torchpar.datasets": "torchpar.data.files",
    "torchpar.doctor": "torchpar.testing.doctor",
    "torchpar.drawing": "torchpar.ptx.report.drawing",
    "torchpar.explain": "torchpar.ptx.explain",
    "torchpar.machine": "torchpar.ops.machine",
    "torchpar.outcome": "torchpar.training.outcome",
    "torchpar.parts": "torchpar.parallel.split.parts",
    "torchpar.processes": "torchpar.parallel.launch.processes",
    "torchpar.profile": "torchpar.training.profile",
    "torchpar.profile.memory": "torchpar.training.profile.step_memory",
    "torchpar.rank_info": "torchpar.parallel.launch.rank_info",
    "torchpar.tables": "torchpar.errors",
    "torchpar.verify": "torchpar.exact.verify",
    "torchpar.verify.command": "torchpar.exact.verify.verify",
}


class _Moved(MetaPathFinder, Loader):
    """Let a module that moved be imported by its old name, with a DeprecationWarning."""

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if self._old(name) in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        old = self._old(module.__name__)
        new = importlib.import_module(MOVED[old] + module.__name__.removeprefix(old))
        warnings.warn(
            f"{module.__name__} is now {new.__name__}; version 0.6 removes the old name",
            DeprecationWarning,
            stacklevel=2,
        )
        names = {name: value for name, value in vars(new).items() if not name.startswith("__")}
        vars(module).update(names)

    @staticmethod
    def _old(name: str) -> str:
        """Return the entry of `MOVED` for a module, which may lie within a moved package."""
        return name if name in MOVED else ".".join(name.split(".")[:2])


sys.meta_path.append(_Moved())
