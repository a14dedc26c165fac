# SPDX-License-Identifier: MIT
"""Formulas of the floating-point operations of operators, for PyTorch's `FlopCounterMode`.

`torch.utils.flop_counter` imports Triton, which an import of operators must not do. So formulas
wait until somebody imports it, and are registered by its `register_flop_formula` then.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch._ops import OpOverloadPacket

Formula = Callable[..., int]
"""A function of an operator's arguments, with the shapes of tensors in the tensors' places."""

_COUNTER = "torch.utils.flop_counter"
_waiting: "dict[OpOverloadPacket[..., Any], Formula]" = {}


def register_formula(packet: "OpOverloadPacket[..., Any]", formula: Formula) -> None:
    """Let `FlopCounterMode` count ``formula`` for each call of an operator's overloads."""
    if counter := sys.modules.get(_COUNTER):
        _register(counter, packet, formula)
        return
    if not _waiting:
        sys.meta_path.insert(0, _CounterFinder())
    _waiting[packet] = formula


def _register(counter: ModuleType, packet: "OpOverloadPacket[..., Any]", formula: Formula) -> None:
    counter.flop_registry.pop(packet, None)  # a notebook may define an operator again
    counter.register_flop_formula(packet)(formula)


class _CounterFinder(MetaPathFinder):
    """Find the counter's module as others do, and register the formulas that wait for it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _COUNTER:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(counter: ModuleType) -> None:
            execute(counter)
            sys.meta_path.remove(self)
            while _waiting:
                _register(counter, *_waiting.popitem())

        spec.loader.exec_module = execute_and_register  # type: ignore[assignment, method-assign]
        return spec
