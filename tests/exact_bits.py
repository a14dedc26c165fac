# SPDX-License-Identifier: MIT
"""Recorded hashes of exact products, the mode, and a training. As a script: those by as
many threads as its argument says."""

import hashlib
import json
import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchpar
from torchpar import exact
from torchpar.exact.functions import erf64, exp64, log64, sin64, tanh64
from torchpar.exact.products import wide_product

RECORDED = {
    "exact_matmul": "283031e2a5cd363d",
    "exact_matmul_t": "18aedb8e5fec8f5e",
    "batch": "a4fb80472d5f5f08",
    "gradient": "d17dfb93ddf54808",
    "bfloat16": "7ff416fd3ed810be",
    "bfloat16 in float32": "9982de7bcc3092ed",
    "float16": "c386642a30f9029e",
    "float16 in float32": "711fd3f6ef8ba36d",
    "rows in bfloat16": "4766b501bb461545",
    "gradients in bfloat16": "468dcbb241dff024",
    "wide": "59289fbf2ea11ddb",  # the functions before they are rounded to float32
    "functions": "6e02f041ce44698a",
    "rows": "172c91a66e348114",
    "gradients": "7d2027305601b5c8",
    "random": "e9018cda185fd7f2",
    "weights": "9aac8e082d606832",  # of the training
}


def made_of_integers(*shape: int, seed: int) -> Tensor:
    """Floats of 24 random bits and of magnitudes that differ by up to 2⁴⁰, the same everywhere."""
    i = torch.arange(seed, seed + torch.Size(shape).numel())
    return torch.ldexp((i * 2654435761 % 2**24 - 2**23).float(), -(i * 40503 % 65521 % 40)).view(
        shape
    )


def products(device: str = "cpu") -> dict[str, str]:
    a, b, x, batch = (
        made_of_integers(*shape, seed=seed).to(device)
        for seed, shape in enumerate([(130, 257), (65, 257), (600, 40), (3, 33, 17)])
    )
    product = torchpar.exact_matmul(a.requires_grad_(), b)
    narrow = {}
    for dtype in (torch.bfloat16, torch.float16):
        p, q = ((t.detach() * 2.0**-9).to(dtype) for t in (a, b))
        narrow[str(dtype).removeprefix("torch.")] = torchpar.exact_matmul(p, q)
        narrow[str(dtype).removeprefix("torch.") + " in float32"] = wide_product(p, q)
    return hashes(
        narrow
        | {
            "exact_matmul": product,
            "exact_matmul_t": torchpar.exact_matmul_t(x),
            "batch": torchpar.exact_matmul(batch, batch.flip(0)),
            "gradient": torch.autograd.grad(product, a, product.detach() + 1)[0],
        }
    )


def rules(device: str = "cpu") -> dict[str, str]:
    """Of what the mode computes by its own functions and sums."""
    x = (made_of_integers(40, 1009, seed=3) * 2.0**-20).to(device).requires_grad_()
    functions = (
        torch.exp,
        torch.log1p,
        torch.sigmoid,
        torch.tanh,
        torch.sin,
        torch.erf,
        F.gelu,
        F.softplus,
    )
    with exact.mode():
        torch.manual_seed(0)
        drawn = (
            torch.randn(10**4),
            F.dropout(torch.ones(10**4), 0.3),
            torch.empty(10**4).uniform_(-0.3, 0.7),
        )
        of_elements = torch.stack([function(x.abs() - 0.5) for function in functions])
        rows = [
            x.softmax(1),
            x.log_softmax(1),
            F.layer_norm(x, (1009,)),
            x.logsumexp(1, True),
            x.norm(dim=1),
        ]
        rows += [F.scaled_dot_product_attention(x[:, :8], x[:, 8:16], x[:, 16:24], is_causal=True)]
        loss = F.cross_entropy(x, torch.arange(40, device=device)) + of_elements[2:].sum()
        for y in rows[:3]:
            loss = loss + y.square().mean()
        loss.backward()
        narrow = x.detach().bfloat16().requires_grad_()
        parts = [narrow[:, i : i + 8] for i in (0, 8, 16)]
        of_narrow = [
            F.scaled_dot_product_attention(*parts, is_causal=True),
            F.layer_norm(narrow, (1009,)),
            narrow.softmax(1) / 3,
            F.gelu(narrow).addcmul(narrow, narrow, value=0.3).sum(1),
        ]
        torch.autograd.backward([y.float().square().sum() for y in of_narrow])
    of_rows = torch.cat([y.flatten() for y in rows])
    positive = x.detach().abs().double() + 2.0**-20
    wide = torch.stack([function(positive) for function in (exp64, log64, tanh64, erf64, sin64)])
    return hashes(
        {
            "functions": of_elements,
            "rows": of_rows,
            "gradients": x.grad,
            "rows in bfloat16": torch.cat([y.flatten() for y in of_narrow]),
            "gradients in bfloat16": narrow.grad,
            "random": torch.stack(drawn),
            "wide": wide,
        }
    )


class Layers(nn.Module):
    """Layers whose operators have rules."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 12, padding_idx=0)
        self.conv = nn.Conv2d(
            3, 4, (2, 3), stride=(2, 1), padding=(0, 1), dilation=(1, 2), groups=1
        )
        self.groups = nn.GroupNorm(2, 4)
        self.grouped = nn.Conv1d(4, 6, 3, padding=1, groups=2)
        self.norm = nn.LayerNorm(12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.head = nn.Linear(12, 5)

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        pooled = F.max_pool2d(self.groups(self.conv(image)), (3, 2), stride=1, padding=1)
        pictures = self.grouped(pooled.flatten(2)).mean((1, 2))
        x = self.norm(self.embedding(text))
        x = x + self.attention(x, x, x, need_weights=False)[0] * pictures[:, None, None]
        x = x * x.var(-1, keepdim=True) + x.square().mean(-1, keepdim=True).rsqrt() + torch.tanh(x)
        return F.log_softmax(self.head(x), -1)


def training() -> dict[str, str]:
    """Of the weights of a model that is made and trained in the mode."""
    with exact.mode():
        torch.manual_seed(0)
        model = Layers()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
        for _ in range(5):
            output = model(torch.randint(7, (4, 6)), torch.randn(4, 3, 8, 5))
            F.nll_loss(output.flatten(0, 1), torch.arange(24) % 5).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
            optimizer.step()
            optimizer.zero_grad()
    return hashes({"weights": torch.cat([p.flatten() for p in model.parameters()])})


def hashes(outputs: dict[str, Tensor]) -> dict[str, str]:
    bits = {name: y.detach().cpu().view(-1).view(torch.uint8) for name, y in outputs.items()}
    return {name: hashlib.sha256(b.numpy().tobytes()).hexdigest()[:16] for name, b in bits.items()}


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    print(json.dumps(products() | rules() | training()))
