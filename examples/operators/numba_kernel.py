# SPDX-License-Identifier: MIT
"""A linear recurrence compiled by Numba: y_t = a_t·y_{t−1} + x_t along the last dimension.

With G = dL/dy, the gradient of x is the recurrence from the end, s_t = a_{t+1}·s_{t+1} + G_t:

    dL/dx_t = s_t        dL/da_t = s_t·y_{t−1}
"""

from types import ModuleType
from typing import Any

try:
    import numba
except ModuleNotFoundError as e:
    raise SystemExit(f"this example needs Numba ({e}); pip install numba") from e
import numpy as np
import torch
from numpy.typing import NDArray
from shared import each_sample, shard_rows
from torch import Tensor
from torch.nn.functional import pad

import torchpar
from torchpar.library.rules import Context

Array = NDArray[np.float64]


@numba.guvectorize(["(f8[:], f8[:], f8[:])"], "(t),(t)->(t)", nopython=True)  # type: ignore[untyped-decorator]
def scan(a: Array, x: Array, y: Array) -> None:
    state = 0.0
    for t in range(len(x)):
        state = a[t] * state + x[t]
        y[t] = state


def recurrence(a: Tensor, x: Tensor) -> Tensor:
    if a.shape != x.shape or x.dim() == 0:
        raise ValueError(
            f"shapes {tuple(a.shape)} and {tuple(x.shape)}, expected the same (*, steps)"
        )
    y = torch.empty(x.shape, dtype=torch.float64)
    scan(*(t.double().numpy(force=True) for t in (a, x)), y.numpy())
    return y.to(x.device, torch.promote_types(a.dtype, x.dtype))


def register(library: ModuleType, name: str) -> Any:
    op = library.custom_op(name, recurrence, mutates_args=())

    def setup_context(ctx: Context, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)

    def backward(ctx: Context, g: Tensor) -> tuple[Tensor, Tensor]:
        a, y = ctx.saved_tensors
        s = op(pad(a, (-1, 1)).flip(-1), g.flip(-1)).flip(-1)
        return s * pad(y, (1, -1)), s

    op.register_fake(lambda a, x: x.new_empty(x.shape, dtype=torch.promote_types(a.dtype, x.dtype)))
    op.register_autograd(backward, setup_context=setup_context)
    op.register_vmap(each_sample(op))
    return op


before = register(torch.library, "gallery_before::recurrence")
after = register(torchpar.library, "gallery::recurrence")
after.register_sharding(lambda a, x: [(y, [*y, *y]) for y, _ in shard_rows(x)])


def samples() -> list[tuple[Tensor, ...]]:
    return [tuple(torch.randn(2, 4, dtype=torch.float64) for _ in range(2))]


def reference(a: Tensor, x: Tensor) -> Tensor:
    y = [x.new_zeros(x.shape[:-1])]
    for t in range(x.shape[-1]):
        y.append(a[..., t] * y[-1] + x[..., t])
    return torch.stack(y, -1)[..., 1:]
