# SPDX-License-Identifier: MIT
"""Recorded hashes of exact products and of a training. As a script: those of products by 1 and 2 threads."""

import hashlib
import json

import torch
from torch import Tensor

import torchpar
from torchpar.ieee import cross_entropy_sum
from torchpar.nn import MLP
from torchpar.optim import ExactSGD
from torchpar.parallel import ExactGradients, clip_grad_norm_, join_world, parallel_mlp

BITS = {
    "exact_matmul": "283031e2a5cd363d",
    "exact_matmul_t": "18aedb8e5fec8f5e",
    "batch": "a4fb80472d5f5f08",
    "gradient": "d17dfb93ddf54808",
}
TRAINED = "629d8a87b4ea7a38"
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


def trained() -> str:
    """The hash of a small network's weights after three steps in exact arithmetic."""
    with join_world("cpu") as world:
        torch.manual_seed(0)
        model = parallel_mlp(MLP([20, 13, 7, 5]), world.mesh["tp"], "exact")
        exact_gradients = ExactGradients(model, world)
        optimizer = ExactSGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=1e-2, nesterov=True)
        for step in range(3):
            x = made_of_integers(33, 20, seed=step)
            loss = cross_entropy_sum(model(x), torch.arange(33) % 5)
            (loss / 33).backward()
            exact_gradients()
            clip_grad_norm_(model, 0.1, world, "exact")
            optimizer.step()
            optimizer.zero_grad()
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return hashlib.sha256(weights.numpy().tobytes()).hexdigest()[:16]


if __name__ == "__main__":
    for threads in (1, 2):
        torch.set_num_threads(threads)
        print(json.dumps(digests()))
