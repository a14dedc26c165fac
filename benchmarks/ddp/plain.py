# SPDX-License-Identifier: MIT
"""The training of ``examples/train_ddp.py`` as a plain script: `lessons` compares the two.

    torchrun --nproc_per_node=2 -m benchmarks.ddp.plain --hidden 512 --batch-size 1024

The model, the first weights, the optimizer, the schedule and the batches are those of the example
with ``--optimizer sgd``. Everything else is PyTorch's own, without checks, log and checkpoints. It
prints each epoch's seconds and mean loss as JSON.
"""

import argparse
import json
import os
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from torchpar.data import load
from torchpar.nn import MLP


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--hidden", type=int, nargs="+", required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    options = parser.parse_args()

    os.environ.setdefault("MASTER_ADDR", "localhost")
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    os.environ.setdefault("MASTER_PORT", "0")
    dist.init_process_group("gloo", rank=rank, world_size=ranks)

    samples, _ = load("mnist", options.data)
    images, labels = samples.features.flatten(1) / 255, samples.labels

    sizes = [images.shape[1], *options.hidden, 10]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.Sigmoid()]
    model = nn.Sequential(*layers[:-1])
    torch.manual_seed(0)
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), MLP(sizes).parameters(), strict=True):
            mine.copy_(theirs)
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)

    weights = [p for p in model.parameters() if p.dim() == 2]
    biases = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": weights, "weight_decay": 3e-5}, {"params": biases, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.2, momentum=0.9, nesterov=True)
    steps = options.epochs * -(-len(labels) // options.batch_size)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)

    for epoch in range(1, options.epochs + 1):
        total = torch.zeros((), dtype=torch.float64)
        start = time.perf_counter()
        for indices in order(len(labels), epoch).split(options.batch_size):
            mine = indices.tensor_split(ranks)[rank]
            loss = cross_entropy(ddp(images[mine]), labels[mine], label_smoothing=0.05)
            # DDP divides by the number of ranks, whose shares of the batch may differ in size.
            (loss * (len(mine) * ranks / len(indices))).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            total += loss.detach() * len(mine)
        dist.all_reduce(total)
        result = {
            "epoch": epoch,
            "seconds": time.perf_counter() - start,
            "loss": total.item() / len(labels),
        }
        if rank == 0:
            print(json.dumps(result), flush=True)
    dist.destroy_process_group()


def order(count: int, epoch: int) -> Tensor:
    """The order of the samples, as `torchpar.data.batches` draws it from seed 0."""
    (seed,) = np.random.SeedSequence((0, epoch)).generate_state(1)
    return torch.randperm(count, generator=torch.Generator().manual_seed(int(seed)))


if __name__ == "__main__":
    main()
