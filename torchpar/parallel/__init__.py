# SPDX-License-Identifier: MIT
"""Training on several processes: launch connects them, split divides the model, save writes checkpoints.

The public names load their modules on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchpar.parallel.launch.world import World, join_world
    from torchpar.parallel.split.clip import clip_grad_norm_
    from torchpar.parallel.split.layers import ColumnParallelLinear, RowParallelLinear
    from torchpar.parallel.split.mlp import full_state_dict, load_full_state_dict, parallel_mlp
    from torchpar.parallel.split.pipeline import Pipeline, stage_mlp
    from torchpar.parallel.split.shared_memory import register_shared_memory_hook

_MODULES = {
    "World": "launch.world",
    "join_world": "launch.world",
    "clip_grad_norm_": "split.clip",
    "ColumnParallelLinear": "split.layers",
    "RowParallelLinear": "split.layers",
    "full_state_dict": "split.mlp",
    "load_full_state_dict": "split.mlp",
    "parallel_mlp": "split.mlp",
    "Pipeline": "split.pipeline",
    "stage_mlp": "split.pipeline",
    "register_shared_memory_hook": "split.shared_memory",
}

__all__ = [
    "ColumnParallelLinear",
    "Pipeline",
    "RowParallelLinear",
    "World",
    "clip_grad_norm_",
    "full_state_dict",
    "join_world",
    "load_full_state_dict",
    "parallel_mlp",
    "register_shared_memory_hook",
    "stage_mlp",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'torchpar.parallel' has no attribute {name!r}")
    return getattr(importlib.import_module(f"torchpar.parallel.{_MODULES[name]}"), name)
