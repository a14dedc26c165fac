# SPDX-License-Identifier: MIT
"""Split: layers, pipeline stages, gradients and their sums, divided over the ranks of a mesh.

`layers` are linear layers cut by rows or columns, and `mlp` cuts a whole MLP. `styles` shard
torchpar's layers by PyTorch's `parallelize_module`. `pipeline` holds stages, and `schedules` the
order of their passes. `parts` says which part of a parameter a rank has. `reduction` adds over
ranks, `shared_memory` between processes of one machine. `clip` limits the norm of gradients, and
`scaler` scales losses in float16.
"""
