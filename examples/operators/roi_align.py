# SPDX-License-Identifier: MIT
"""RoIAlign of torchvision, which has neither forward mode nor second derivatives.

It is linear in the image. So is its backward in the gradient, and the derivative of the backward is
RoIAlign.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, Protocol

import torch
import torchvision  # noqa: F401, makes torch.ops.torchvision
from shared import each_sample
from torch import Tensor
from torch.nn.functional import pad

import torchpar
from torchpar.library.rules import Context


class Saved(Context, Protocol):
    """A context that has the shape of the first argument, and the bins along a box's side."""

    shape: Sequence[int]
    size: int


def roi_align(image: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Average the bins of boxes (x1, y1, x2, y2), int64, of an image (C, H, W): (boxes, C, size,
    size)."""
    # Where torchvision reads memory that is not the image's.
    if image.dim() != 3 or image.numel() == 0:
        raise ValueError(f"the image has shape {tuple(image.shape)}, expected (C, H, W), not empty")
    # Torchvision has no bfloat16 on CPUs.
    x = image.to(torch.promote_types(image.dtype, torch.float32))
    rois = pad(boxes.to(x), (1, 0))
    return torch.ops.torchvision.roi_align(x[None], rois, 1.0, size, size, 2, True).to(image)  # type: ignore[no-any-return]


def roi_align_backward(g: Tensor, boxes: Tensor, shape: Sequence[int]) -> Tensor:
    x = g.to(torch.promote_types(g.dtype, torch.float32))
    rois, size = pad(boxes.to(x), (1, 0)), g.shape[-1]
    dx = torch.ops.torchvision._roi_align_backward(x, rois, 1.0, size, size, 1, *shape, 2, True)
    return dx[0].to(g, copy=True)  # type: ignore[no-any-return]


def setup_context(ctx: Saved, inputs: tuple[Tensor, Tensor, object], output: Tensor) -> None:
    first, boxes, _ = inputs
    ctx.shape, ctx.size = first.shape, first.shape[-1]
    ctx.save_for_backward(boxes)


def register(library: ModuleType, name: str) -> Any:
    op = library.custom_op(name, roi_align, mutates_args=())
    op_backward = library.custom_op(f"{name}_backward", roi_align_backward, mutates_args=())

    def backward(ctx: Saved, g: Tensor) -> tuple[Tensor, None, None]:
        return op_backward(g, *ctx.saved_tensors, ctx.shape), None, None

    def backward_of_backward(ctx: Saved, h: Tensor) -> tuple[Tensor, None, None]:
        return op(h, *ctx.saved_tensors, ctx.size), None, None

    op.register_fake(lambda x, boxes, size: x.new_empty(boxes.shape[0], x.shape[0], size, size))
    op_backward.register_fake(lambda g, boxes, shape: g.new_empty(shape))
    op.register_autograd(backward, setup_context=setup_context)
    op_backward.register_autograd(backward_of_backward, setup_context=setup_context)
    op.register_vmap(each_sample(op))
    op_backward.register_vmap(each_sample(op_backward))
    return op


before = register(torch.library, "gallery_before::roi_align")
after = register(torchpar.library, "gallery::roi_align")


def samples() -> list[tuple[Tensor, Tensor, int]]:
    boxes = torch.tensor([[0, 0, 3, 3], [1, 0, 3, 2], [0, 1, 2, 3]])
    return [(torch.randn(2, 4, 5, dtype=torch.float64), boxes, 2)]


def reference(image: Tensor, boxes: Tensor, size: int) -> Tensor:
    """The sum over pixels of RoIAlign of an image of that pixel alone, times its value."""
    pixels = torch.eye(image[0].numel(), dtype=image.dtype).view(-1, *image.shape[1:])
    weights = roi_align(pixels, boxes, size).movedim(1, -1)  # (boxes, size, size, pixels)
    parts = weights[:, None] * image.flatten(1)[:, None, None]
    # A pixel that is NaN counts in its bins alone.
    return parts.where(weights[:, None] != 0, 0).sum(-1)
