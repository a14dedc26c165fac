# SPDX-License-Identifier: MIT
"""What crosses processes: layers split over ranks, pipelines, checkpoints."""

from torchpar.parallel.clip import clip_grad_norm_
from torchpar.parallel.layers import ColumnParallelLinear, RowParallelLinear
from torchpar.parallel.mlp import load_whole_state_dict, parallel_mlp, whole_state_dict
from torchpar.parallel.regions import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    scatter_to_tensor_model_parallel_region,
)
from torchpar.parallel.world import World, join_world

__all__ = [
    "ColumnParallelLinear",
    "RowParallelLinear",
    "World",
    "clip_grad_norm_",
    "copy_to_tensor_model_parallel_region",
    "gather_from_tensor_model_parallel_region",
    "join_world",
    "load_whole_state_dict",
    "parallel_mlp",
    "reduce_from_tensor_model_parallel_region",
    "scatter_to_tensor_model_parallel_region",
    "whole_state_dict",
]
