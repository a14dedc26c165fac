# SPDX-License-Identifier: MIT
"""The operators: one file for each, with all rules of the operator.

Importing a file registers its operator: `maximum`, `matmul_t`, `symmetric_matmul`,
`linear_sigmoid`, `exact_matmul` (by `exact_digits`) and `fp32_matmul`. They share the checks of
`matrix` and `sizes`, the products of `cpu`, and `fp32`, which sets a precision. `processor` and
`environment` say what this machine can do. `exact_squares` adds up squares on ranks for the norm of
gradients.
"""

from importlib.util import find_spec

from torchpar.optional import needs_torch

if find_spec("torch"):
    from torchpar.ops.exact_matmul import exact_matmul, exact_matmul_t
    from torchpar.ops.fp32 import fp32_products
    from torchpar.ops.fp32_matmul import fp32_matmul  # noqa: F401  # an internal operator
    from torchpar.ops.linear_sigmoid import linear_sigmoid
    from torchpar.ops.matmul_t import matmul_t
    from torchpar.ops.maximum import maximum
    from torchpar.ops.symmetric_matmul import symmetric_matmul

__all__ = [
    "exact_matmul",
    "exact_matmul_t",
    "fp32_products",
    "linear_sigmoid",
    "matmul_t",
    "maximum",
    "symmetric_matmul",
]

if not find_spec("torch"):
    __getattr__ = needs_torch(__name__, __all__)
