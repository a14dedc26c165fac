# SPDX-License-Identifier: MIT
"""Recorded hashes of exact products, and of the mode. As a script: those by 1 and 2 threads."""

import hashlib
import json

import torch
from torch import Tensor
from torch.nn import functional as F

import torchpar
from torchpar import exact

PRODUCTS = {
    "exact_matmul": "283031e2a5cd363d",
    "exact_matmul_t": "18aedb8e5fec8f5e",
    "batch": "a4fb80472d5f5f08",
    "gradient": "d17dfb93ddf54808",
}
RULES = {
    "functions": "6e02f041ce44698a",
    "rows": "172c91a66e348114",
    "gradients": "7d2027305601b5c8",
    "random": "e9018cda185fd7f2",
}


def made_of_integers(*shape: int, seed: int) -> Tensor:
    """Floats of 24 random bits and of magnitudes that differ by up to 2⁴⁰, the same everywhere."""
    i = torch.arange(seed, seed + torch.Size(shape).numel())
    return torch.ldexp((i * 2654435761 % 2**24 - 2**23).float(), -(i * 40503 % 65521 % 40)).view(shape)


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


def rules(device: str = "cpu") -> dict[str, str]:
    """Of what the mode computes by its own functions and sums."""
    x = (made_of_integers(40, 1009, seed=3) * 2.0**-20).to(device).requires_grad_()
    functions = (torch.exp, torch.log1p, torch.sigmoid, torch.tanh, torch.sin, torch.erf, F.gelu, F.softplus)
    with exact.mode():
        torch.manual_seed(0)
        drawn = torch.randn(10**4), F.dropout(torch.ones(10**4), 0.3), torch.empty(10**4).uniform_(-0.3, 0.7)
        of_elements = torch.stack([function(x.abs() - 0.5) for function in functions])
        rows = [x.softmax(1), x.log_softmax(1), F.layer_norm(x, (1009,)), x.logsumexp(1, True), x.norm(dim=1)]
        rows += [F.scaled_dot_product_attention(x[:, :8], x[:, 8:16], x[:, 16:24], is_causal=True)]
        loss = F.cross_entropy(x, torch.arange(40, device=device)) + of_elements[2:].sum()
        for y in rows[:3]:
            loss = loss + y.square().mean()
        loss.backward()
    of_rows = torch.cat([y.flatten() for y in rows])
    return hashes(
        {"functions": of_elements, "rows": of_rows, "gradients": x.grad, "random": torch.stack(drawn)}
    )


def hashes(outputs: dict[str, Tensor]) -> dict[str, str]:
    bits = {name: y.detach().cpu().view(-1).view(torch.uint8) for name, y in outputs.items()}
    return {name: hashlib.sha256(b.numpy().tobytes()).hexdigest()[:16] for name, b in bits.items()}


if __name__ == "__main__":
    for threads in (1, 2):
        torch.set_num_threads(threads)
        print(json.dumps(products() | rules()))
