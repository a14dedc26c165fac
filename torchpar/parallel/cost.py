# SPDX-License-Identifier: MIT
"""What a step's communication costs, predicted: the α–β model and the collectives of an MLP's split.

A message of n bytes takes α + nβ seconds. A ring all-reduce over p ranks passes 2(p − 1) messages of n/p
bytes, an all-gather half as many (Thakur, Rabenseifner and Gropp, "Optimization of Collective
Communication Operations in MPICH", 2005).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from torchpar.parallel.partition import Partition
from torchpar.parallel.reduction import SHARDS, Reduction
from torchpar.parallel.world import World

DDP_BUCKETS = (2**20, 25 * 2**20)  # bytes at which DistributedDataParallel closes its first, and each other


@dataclass(frozen=True)
class Link:
    """What connects ranks.

    Attributes:
        alpha: seconds a message takes however short it is.
        beta: seconds per byte.
    """

    alpha: float
    beta: float

    def seconds(self, operation: str, ranks: int, nbytes: int) -> float:
        """Of an "all_reduce", "all_gather" or "send" of a tensor of ``nbytes``; "recv" is part of a send."""
        if operation == "all_reduce":
            return 2 * (ranks - 1) * self.alpha + 2 * (ranks - 1) / ranks * nbytes * self.beta
        if operation == "all_gather":
            return (ranks - 1) * (self.alpha + nbytes * self.beta)
        if operation == "send":
            return self.alpha + nbytes * self.beta
        if operation == "recv":
            return 0.0
        raise ValueError(f"operation is {operation!r}, expected 'all_reduce', 'all_gather', 'send' or 'recv'")

    @classmethod
    def fit(cls, points: Sequence[tuple[int, int, float]]) -> "Link":
        """The link whose relative errors are least, squared, over measured all-reduces.

        Args:
            points: ranks, bytes and seconds of each.
        """
        rows = torch.tensor(
            [[2 * (p - 1) / s, 2 * (p - 1) / p * n / s] for p, n, s in points], dtype=torch.float64
        )
        alpha, beta = torch.linalg.lstsq(rows, torch.ones(len(points), 1, dtype=torch.float64)).solution
        return cls(max(alpha.item(), 0.0), max(beta.item(), 0.0))


def measure_link(world: World, sizes: Sequence[int] = (2**10, 2**14, 2**18, 2**20, 2**22)) -> Link:
    """The link that fits all-reduces of ``sizes`` bytes over all ranks: the median of 9, slowest rank."""
    points = []
    for size in sizes:
        t = torch.zeros(size // 4, device=world.device)
        times = []
        for _ in range(10):
            start = time.perf_counter()
            world.sum(t)
            if t.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        slowest = torch.tensor(median(times[1:]), dtype=torch.float64, device=world.device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        points.append((world.world_size, size, slowest.item()))
    return Link.fit(points)


@dataclass(frozen=True)
class Expected:
    """Operations of one kind that a rank makes in a step."""

    dimension: str
    operation: str
    ranks: int
    nbytes: int  # of each


def collectives(
    sizes: Sequence[int],
    batch_size: int,
    mesh: DeviceMesh | None,
    world_size: int,
    *,
    reduction: Reduction = "fast",
    micro_batches: int = 4,
    itemsize: int = 4,
) -> list[Expected]:
    """What a rank sends in a step of an MLP that `parallel_mlp` and `stage_mlp` have spread over a mesh.

    Args:
        sizes: of the MLP, whose hidden layers end in sigmoids.
        batch_size: of all ranks.
        mesh: of dimensions "pp", "dp" and "tp"; None for data parallelism over ``world_size`` ranks.
        micro_batches: of each rank's share, if there is a pipeline.
        itemsize: bytes of a number.
    """
    dims = {"pp": 1, "dp": world_size, "tp": 1}
    at = dict.fromkeys(dims, 0)
    if mesh is not None:
        dims = {name: mesh[name].size() for name in dims}
        at = {name: mesh[name].get_local_rank() for name in dims}
    layers = len(sizes) - 1
    stage = torch.arange(layers).tensor_split(dims["pp"])[at["pp"]].tolist()
    passes, rows = _passes(batch_size, dims, at, reduction, micro_batches)

    expected: list[Expected] = []
    exchanges = dims["tp"].bit_length() - 1 if reduction == "invariant" else 1

    def tensor_sum(width: int) -> None:
        if dims["tp"] == 1:
            return
        for n in rows:
            nbytes = n * width * itemsize
            if reduction == "fast":
                expected.append(Expected("tp", "all_reduce", dims["tp"], nbytes))
            else:
                expected.extend(Expected("tp", op, 2, nbytes) for op in ("send", "recv") * exchanges)

    def widths(i: int) -> int:
        """Of what this rank has between layers i − 1 and i."""
        parts = SHARDS if reduction == "invariant" else dims["tp"]
        return sum(Partition(sizes[i], parts, dims["tp"], at["tp"]).shards()) if i % 2 else sizes[i]

    parameters: list[int] = []  # bytes of the gradients, in the order they come to be
    for i in stage:
        column, alone = i % 2 == 0, i % 2 == 0 and i == layers - 1
        if not alone:
            if column and i > 0:
                tensor_sum(sizes[i])  # of the gradient of its input
            if not column:
                tensor_sum(sizes[i + 1])
        inputs = sizes[i] if column else widths(i)
        outputs = sizes[i + 1] if alone or not column else widths(i + 1)
        # Where the sigmoid is fused the weight's gradient comes first, elsewhere the bias's.
        fused = column and not alone if mesh is not None else i < layers - 1
        of_layer = [inputs * outputs * itemsize, outputs * itemsize]
        parameters = (of_layer if fused else of_layer[::-1]) + parameters
    for border, there in ((stage[0], at["pp"] > 0), (stage[-1] + 1, at["pp"] < dims["pp"] - 1)):
        if there:
            # Activations one way, gradients the other.
            for op in ("send", "recv"):
                expected += [Expected("pp", op, 2, rows[0] * widths(border) * itemsize)] * passes
    if dims["dp"] > 1:
        if reduction == "invariant":
            nbytes = sum(parameters) + itemsize  # the loss travels along
            expected += [Expected("dp", op, 2, nbytes) for op in ("send", "recv")] * (
                dims["dp"].bit_length() - 1
            )
        else:
            expected += [Expected("dp", "all_reduce", dims["dp"], n) for n in _buckets(parameters)]
    return expected


def _passes(
    batch_size: int, dims: dict[str, int], at: dict[str, int], reduction: Reduction, micro_batches: int
) -> tuple[int, list[int]]:
    """How many forward passes a rank makes in a step, and the samples of each."""
    if dims["pp"] > 1:
        share = -(-batch_size // dims["dp"])
        return micro_batches, [-(-share // micro_batches)] * micro_batches
    parts = SHARDS if reduction == "invariant" else dims["dp"]
    rows = Partition(batch_size, parts, dims["dp"], at["dp"]).shards()
    return len(rows), rows


def _buckets(gradients: Sequence[int]) -> list[int]:
    """Bytes of DistributedDataParallel's buckets of gradients that come in this order."""
    buckets, limit = [0], DDP_BUCKETS[0]
    for n in gradients:
        if buckets[-1] >= limit:
            buckets.append(0)
            limit = DDP_BUCKETS[1]
        buckets[-1] += n
    return buckets
