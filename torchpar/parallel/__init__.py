# SPDX-License-Identifier: MIT
"""Training on several processes: connect them, divide the model, write checkpoints.

`launch` connects the ranks, `split` divides a model and its gradients, `save` writes checkpoints.
"""

from importlib.util import find_spec

from torchpar.optional import needs_torch

if find_spec("torch"):
    from torchpar.parallel.launch.world import World, join_world
    from torchpar.parallel.split.clip import clip_grad_norm_
    from torchpar.parallel.split.layers import ColumnParallelLinear, RowParallelLinear
    from torchpar.parallel.split.mlp import full_state_dict, load_full_state_dict, parallel_mlp
    from torchpar.parallel.split.parts import mark_shard
    from torchpar.parallel.split.pipeline import Pipeline, stage_mlp
    from torchpar.parallel.split.scaler import GradScaler
    from torchpar.parallel.split.shared_memory import register_shared_memory_hook

__all__ = [
    "ColumnParallelLinear",
    "GradScaler",
    "Pipeline",
    "RowParallelLinear",
    "World",
    "clip_grad_norm_",
    "full_state_dict",
    "join_world",
    "load_full_state_dict",
    "mark_shard",
    "parallel_mlp",
    "register_shared_memory_hook",
    "stage_mlp",
]

if not find_spec("torch"):
    __getattr__ = needs_torch(__name__, __all__)
