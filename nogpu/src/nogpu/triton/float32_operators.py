# SPDX-License-Identifier: MIT
"""Operators of PyTorch on bfloat16 and float16, computed in float32 and rounded once.

On a CPU some of PyTorch's operators round each step to the type of their operands, where those of a
GPU compute in float32. A test then compares a kernel with a reference that is less exact.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from nogpu.record.operator_work import UncompiledMode, is_view
from nogpu.triton.emulator import Emulator, Operator
from nogpu.triton.torch_operators import EMPTY, changed, is_plain

REDUCED = (torch.bfloat16, torch.float16)
# Operators that move or convert numbers, or change what a tensor's memory is.
MOVING = {"copy_", "_to_copy", "clone", "lift_fresh", "set_", "resize_", "resize_as_"}


class Float32Operators(UncompiledMode):
    """A mode below `Host`, which computes what that one lets PyTorch compute."""

    def __init__(self, emulator: Emulator):
        super().__init__()
        self.emulator = emulator

    def __torch_dispatch__(
        self,
        func: Operator,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            if not self._widens(func, args, kwargs):
                return func(*args, **kwargs)
            try:
                expected = func(
                    *tree_map(_without_values, args), **_mapped(_without_values, kwargs)
                )
            except (RuntimeError, TypeError):  # PyTorch does not find the types of its results
                return func(*args, **kwargs)
            return _compute(func, args, kwargs, tree_leaves(expected))

    def _widens(self, func: Operator, args: Sequence[object], kwargs: dict[str, object]) -> bool:
        """Whether an operator computes with numbers of a reduced type, on the device."""
        if func.namespace != "aten" or func.overloadpacket.__name__ in MOVING:
            return False
        operands = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if not any(t.dtype in REDUCED for t in operands) or not all(map(is_plain, operands)):
            return False
        if func.overloadpacket in EMPTY or torch.Tag.nondeterministic_seeded in func.tags:
            return False
        watcher = self.emulator.watcher
        return not is_view(func) and (watcher is None or bool(watcher.has_device(operands)))


def _mapped(change: object, kwargs: dict[str, object]) -> dict[str, object]:
    found: dict[str, object] = tree_map(change, kwargs)  # type: ignore[arg-type]
    return found


def _without_values(one: object) -> object:
    """Return a tensor of the same type and shape without values, by which results have a type."""
    if isinstance(one, Tensor):
        return torch.empty_strided(one.size(), one.stride(), dtype=one.dtype, device="meta")
    return torch.device("meta") if isinstance(one, torch.device) else one


def _compute(
    func: Operator,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    expected: Sequence[object],
) -> object:
    """Compute an operator in float32; return its results in their types, each rounded once.

    Args:
        expected: tensors without values, of the types of the results.
    """
    wide: dict[int, Tensor] = {}
    originals: dict[int, Tensor] = {}

    def widened(one: object) -> object:
        if isinstance(one, Tensor) and one.dtype in REDUCED:
            if id(one) not in wide:
                made = wide[id(one)] = one.float()
                originals[id(made)] = one
            return wide[id(one)]
        return torch.float32 if isinstance(one, torch.dtype) and one in REDUCED else one

    def rounded(one: object, like: object) -> object:
        if id(one) in originals:
            return originals[id(one)]
        return one.to(like.dtype) if isinstance(one, Tensor) and isinstance(like, Tensor) else one

    result = func(*tree_map(widened, args), **_mapped(widened, kwargs))
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
    with torch._C._AutoDispatchBelowAutograd(), torch._C._ExcludeDispatchKeyGuard(keys):
        for t in tree_leaves(changed(func._schema, args, kwargs)):
            if id(t) in wide:
                if t.shape != wide[id(t)].shape:
                    t.resize_(wide[id(t)].shape)
                t.copy_(wide[id(t)])
        leaves, form = tree_flatten(result)
        return tree_unflatten(map(rounded, leaves, expected), form)
