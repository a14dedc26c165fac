# SPDX-License-Identifier: MIT
"""Hashes of exact products, as recorded, and under 1 and 2 threads when run as a script."""

import hashlib
import json

import torch
from torch import Tensor

import torchpar

BITS = {
    "exact_matmul": "283031e2a5cd363d",
    "exact_matmul_t": "18aedb8e5fec8f5e",
    "batch": "a4fb80472d5f5f08",
    "gradient": "d17dfb93ddf54808",
}
CONTROL = "torch.sigmoid"  # its bits differ between processors


def made_of_integers(*shape: int, seed: int) -> Tensor:
    """Floats of 24 random bits and of widely different magnitudes, the same everywhere."""
    i = torch.arange(seed, seed + torch.Size(shape).numel())
    return torch.ldexp((i * 2654435761 % 2**24 - 2**23).float(), -(i * 40503 % 65521 % 40)).view(shape)


def digests(device: str = "cpu") -> dict[str, str]:
    """Hashes of the products' bits on inputs that are made of integers."""
    a, b, x, batch = (
        made_of_integers(*shape, seed=seed).to(device)
        for seed, shape in enumerate([(130, 257), (65, 257), (600, 40), (3, 33, 17)])
    )
    a.requires_grad_()
    product = torchpar.exact_matmul(a, b)
    outputs = {
        "exact_matmul": product,
        "exact_matmul_t": torchpar.exact_matmul_t(x),
        "batch": torchpar.exact_matmul(batch, batch.flip(0)),
        "gradient": torch.autograd.grad(product, a, product.detach() + 1)[0],
        CONTROL: a.sigmoid(),
    }
    bits = {name: y.detach().cpu().view(-1).view(torch.uint8) for name, y in outputs.items()}
    return {name: hashlib.sha256(b.numpy().tobytes()).hexdigest()[:16] for name, b in bits.items()}


if __name__ == "__main__":
    for threads in (1, 2):
        torch.set_num_threads(threads)
        print(json.dumps(digests()))
