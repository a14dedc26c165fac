# SPDX-License-Identifier: MIT
"""Points in the plane, labelled by their quadrants."""

import torch

from torchpar.data import Samples

MARGIN = 0.02  # of a square of side 2


def draw(n: int, seed: int, wrong: float = 0.0, device: torch.device | str = "cpu") -> Samples:
    """Return points of [−1, 1]² with the label x·y < 0, which is inverted for a share ``wrong`` of
    them.

    All points keep the distance `MARGIN` from the axes: labels of nearer points cannot be learned
    from a finite set.
    """
    generator = torch.Generator().manual_seed(seed % 2**64)
    signs = torch.randint(0, 2, (n, 2), generator=generator) * 2 - 1
    points = signs * (MARGIN + (1 - MARGIN) * torch.rand(n, 2, generator=generator))
    labels = (points.prod(1) < 0) ^ (torch.rand(n, generator=generator) < wrong)
    return Samples(points.to(device), labels.long().to(device), ("I, III", "II, IV"))
