# SPDX-License-Identifier: MIT
"""CUDA C++ without a GPU: `nvrtc` compiles a file, `declarations` reads its kernels' parameters,
`launching` executes them, and `summary` says how to launch them. `on_gpu` launches them on a GPU,
where there is one."""
