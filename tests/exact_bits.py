# SPDX-License-Identifier: MIT
"""Recorded hashes of exact products and of `torchpar.exact.ieee`. As a script: those by 1 and 2 threads."""

import hashlib
import json

import torch
from torch import Tensor

import torchpar
from torchpar.exact import ieee
from torchpar.exact.loss import cross_entropy_sum

PRODUCTS = {
    "exact_matmul": "283031e2a5cd363d",
    "exact_matmul_t": "18aedb8e5fec8f5e",
    "batch": "a4fb80472d5f5f08",
    "gradient": "d17dfb93ddf54808",
}
FUNCTIONS = {
    "exp": "2160ee5055ee8773",
    "sigmoid": "6f409e9c988753dd",
    "strided": "989e1748033ecb63",
    "log": "bb1a064d41aa5fd5",
    "loss": "b7cd1f8c6f8e0cc7",
    "gradient of the loss": "0028ee16a124b438",
}


def made_of_integers(*shape: int, seed: int) -> Tensor:
    """Floats of 24 random bits and of magnitudes that differ by up to 2⁴⁰, the same everywhere."""
    i = torch.arange(seed, seed + torch.Size(shape).numel())
    return torch.ldexp((i * 2654435761 % 2**24 - 2**23).float(), -(i * 40503 % 65521 % 40)).view(shape)


def floats(least: float, largest: float, step: int) -> Tensor:
    """Every ``step``-th float32 by its bit pattern, from ``least`` < 0 to ``largest`` > 0."""
    ends = torch.tensor([-least, largest], dtype=torch.float32).view(torch.int32).tolist()
    below, above = (torch.arange(0, end + 1, step, dtype=torch.int32).view(torch.float32) for end in ends)
    return torch.cat([-below.flip(0), above])


def products(device: str = "cpu") -> dict[str, str]:
    a, b, x, batch = (
        made_of_integers(*shape, seed=seed).to(device)
        for seed, shape in enumerate([(130, 257), (65, 257), (600, 40), (3, 33, 17)])
    )
    product = torchpar.exact_matmul(a.requires_grad_(), b)
    return hashes(
        {
            "exact_matmul": product,
            "exact_matmul_t": torchpar.exact_matmul_t(x),
            "batch": torchpar.exact_matmul(batch, batch.flip(0)),
            "gradient": torch.autograd.grad(product, a, product.detach() + 1)[0],
        }
    )


def functions(device: str = "cpu") -> dict[str, str]:
    x = floats(-104, 89, 10007).to(device)
    size = len(x) // 10 * 10
    logits = (torch.arange(size) * 7919 % 65521 / 2048 - 16).float().view(-1, 10).to(device).requires_grad_()
    labels = torch.arange(len(logits), device=device) * 31 % 10
    loss = cross_entropy_sum(logits, labels)
    positive = (torch.arange(2**16) * 140000000000001 + 2**52).view(torch.float64).to(device)
    return hashes(
        {
            "exp": ieee.exp(x),
            "sigmoid": ieee.sigmoid(x),
            "strided": torch.cat([ieee.exp(x[1::3]), ieee.sigmoid(x[2::7])]),
            "log": ieee.log(positive),
            "loss": loss,
            "gradient of the loss": torch.autograd.grad(0.001 * loss, logits)[0],
        }
    )


def hashes(outputs: dict[str, Tensor]) -> dict[str, str]:
    bits = {name: y.detach().cpu().view(-1).view(torch.uint8) for name, y in outputs.items()}
    return {name: hashlib.sha256(b.numpy().tobytes()).hexdigest()[:16] for name, b in bits.items()}


if __name__ == "__main__":
    for threads in (1, 2):
        torch.set_num_threads(threads)
        print(json.dumps(products() | functions()))
