# SPDX-License-Identifier: MIT
"""The products whose tiles the rule chooses, by the names of their launch functions."""

from torchpar.kernels.linear_sigmoid import LINEAR_SIGMOID
from torchpar.kernels.matmul_t import SYMMETRIC_MATMUL

PRODUCTS = {one.name: one for one in (SYMMETRIC_MATMUL, LINEAR_SIGMOID)}
