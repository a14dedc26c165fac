# SPDX-License-Identifier: MIT
"""Hashes of what `torchpar.ieee` computes, as recorded, and under 1 and 2 threads when run as a script."""

import hashlib
import json

import torch
from torch import Tensor

from torchpar import ieee

BITS = {
    "exp": "2160ee5055ee8773",
    "sigmoid": "6f409e9c988753dd",
    "tails": "1b50d9d6e2445f20",
    "strided": "989e1748033ecb63",
    "log": "bb1a064d41aa5fd5",
    "loss": "b7cd1f8c6f8e0cc7",
    "gradient": "0028ee16a124b438",
}
CONTROLS = ("torch.sigmoid", "fused")  # their bits differ between processors


def floats(least: float, largest: float, step: int) -> Tensor:
    """Every ``step``-th float32 by its bit pattern, from ``least`` < 0 to ``largest`` > 0."""
    ends = torch.tensor([-least, largest], dtype=torch.float32).view(torch.int32).tolist()
    below, above = (torch.arange(0, end + 1, step, dtype=torch.int32).view(torch.float32) for end in ends)
    return torch.cat([-below.flip(0), above])


def fused(x: Tensor) -> Tensor:
    """A sum of products, whose products are fused with their sums or not."""
    y = torch.ones_like(x)
    for j in range(6, 0, -1):
        y = torch.add(1 + 0.1 / j * x, y, alpha=0.3)
    return y


def digests(device: str = "cpu") -> dict[str, str]:
    """Hashes of the functions' bits on inputs that are made of integers, and so are the same everywhere."""
    x = floats(-104, 89, 10007).to(device)
    size = len(x) // 10 * 10
    logits = (torch.arange(size) * 7919 % 65521 / 2048 - 16).float().view(-1, 10).to(device).requires_grad_()
    labels = torch.arange(len(logits), device=device) * 31 % 10
    loss = ieee.cross_entropy_sum(logits, labels)
    positive = (torch.arange(2**16) * 140000000000001 + 2**52).view(torch.float64).to(device)
    outputs = {
        "exp": ieee.exp(x),
        "sigmoid": ieee.sigmoid(x),
        "tails": torch.cat([f(x[i : 3 * i]) for f in (ieee.exp, ieee.sigmoid) for i in range(40)]),
        "strided": torch.cat([ieee.exp(x[1::3]), ieee.sigmoid(x[2::7])]),
        "log": ieee.log(positive),
        "loss": loss,
        "gradient": torch.autograd.grad(0.001 * loss, logits)[0],
        "torch.sigmoid": x.sigmoid(),
        "fused": fused(x),
    }
    bits = {name: y.detach().cpu().view(-1).view(torch.uint8) for name, y in outputs.items()}
    return {name: hashlib.sha256(b.numpy().tobytes()).hexdigest()[:16] for name, b in bits.items()}


if __name__ == "__main__":
    for threads in (1, 2):
        torch.set_num_threads(threads)
        print(json.dumps(digests()))
