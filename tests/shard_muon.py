# SPDX-License-Identifier: MIT
"""The script of docs/conformance.md: a Muon that orthogonalizes each shard on its own, and one
that gathers its matrices first."""

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from torchpar.reference import orthogonalize
from torchpar.testing import check_optimizer


def local(t):
    return t.to_local() if isinstance(t, DTensor) else t


class ShardMuon(torch.optim.Optimizer):
    def __init__(self, params, lr=0.02, momentum=0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                local(p).sub_(group["lr"] * self.direction(average))

    def direction(self, average):
        return orthogonalize(local(average))  # of a shard: wrong


class WholeMuon(ShardMuon):
    def direction(self, average):
        if not isinstance(average, DTensor):
            return orthogonalize(average)
        update = orthogonalize(average.full_tensor())  # on every rank, which then takes its shard
        mesh, placements = average.device_mesh, average.placements
        return local(distribute_tensor(update, mesh, placements, src_data_rank=None))


def shard_muon(model):
    return ShardMuon(model.parameters())


def whole_muon(model):
    return WholeMuon(model.parameters())


if __name__ == "__main__":
    for make in shard_muon, whole_muon:
        for row in check_optimizer(make, ["whole", "parallelize_module"]):
            print(f"{make.__name__:12}{row.situation:20}{row.verdict:11}{row.detail}")
