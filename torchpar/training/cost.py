# SPDX-License-Identifier: MIT
"""Cost of a step's communication: the collectives of a split MLP, and the α–β model of their time.

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

from torchpar.ops._onednn import prefers_onednn_layer
from torchpar.optim.exchange import CHECKSUM_BYTES, assign_owners, messages
from torchpar.optim.matrices import multiplications
from torchpar.parallel.launch.world import World
from torchpar.partition import Partition
from torchpar.parts import slice_of

DDP_BUCKETS = (2**20, 25 * 2**20)  # bytes at which DistributedDataParallel closes its first bucket, others


@dataclass(frozen=True)
class Link:
    """A connection between ranks.

    Attributes:
        alpha: seconds per message.
        beta: seconds per byte.
    """

    alpha: float
    beta: float

    def seconds(self, operation: str, ranks: int, nbytes: int) -> float:
        """Return the time of an operation on a tensor of ``nbytes``. A "recv" is counted with its "send"."""
        if operation == "all_reduce":
            return 2 * (ranks - 1) * self.alpha + 2 * (ranks - 1) / ranks * nbytes * self.beta
        if operation == "all_to_all":
            return (ranks - 1) * self.alpha + nbytes * self.beta
        if operation == "all_gather":
            return (ranks - 1) * (self.alpha + nbytes * self.beta)
        if operation == "send":
            return self.alpha + nbytes * self.beta
        if operation == "recv":
            return 0.0
        raise ValueError(
            f"operation is {operation!r}, expected 'all_reduce', 'all_gather', 'all_to_all', 'send' or 'recv'"
        )

    @classmethod
    def fit(cls, points: Sequence[tuple[int, int, float]]) -> "Link":
        """Return the least-squares fit of the relative errors of measured all-reduces.

        Args:
            points: ranks, bytes and seconds of each all-reduce.
        """
        rows = torch.tensor(
            [[2 * (p - 1) / s, 2 * (p - 1) / p * n / s] for p, n, s in points], dtype=torch.float64
        )
        alpha, beta = torch.linalg.lstsq(rows, torch.ones(len(points), 1, dtype=torch.float64)).solution
        return cls(max(alpha.item(), 0.0), max(beta.item(), 0.0))


def measure_link(world: World, sizes: Sequence[int] = (2**10, 2**14, 2**18, 2**20, 2**22)) -> Link:
    """Fit a link to all-reduces of ``sizes`` bytes over all ranks, each the slowest rank's median of 9."""
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
    """A collective that a rank takes part in once per step, of ``nbytes``."""

    dimension: str
    operation: str
    ranks: int
    nbytes: int


def collectives(
    sizes: Sequence[int],
    batch_size: int,
    mesh: DeviceMesh,
    *,
    tensor_split: bool = True,
    micro_batches: int | Sequence[int] = 4,
    itemsize: int = 4,
    exponent_bytes: int = 0,
    sum_bytes: int | None = None,
    fused: bool = False,
    muon: DeviceMesh | None = None,
) -> list[Expected]:
    """Return this rank's collectives in a step of an MLP that `parallel_mlp` and `stage_mlp` have split.

    Args:
        sizes: of the MLP.
        batch_size: of all ranks.
        mesh: of dimensions "pp", "dp" and "tp".
        tensor_split: the layers are those of `parallel_mlp`, also on one rank of "tp".
        micro_batches: of each rank's share, if there is a pipeline: their number, if they are padded to one
            size, or the samples of each.
        itemsize: bytes of a number.
        exponent_bytes: bytes of an exponent, if the ranks agree on exponents before they add.
        sum_bytes: bytes of a number of a sum; by default ``itemsize``.
        fused: the gradients are those of `torchpar.training.fused.FusedGradients`.
        muon: the mesh whose ranks share the work of `torchpar.optim.Muon` within a stage, or None.
    """
    dims = {name: mesh[name].size() for name in ("pp", "dp", "tp")}
    at = {name: mesh[name].get_local_rank() for name in dims}
    layers = len(sizes) - 1
    stage = torch.arange(layers).tensor_split(dims["pp"])[at["pp"]].tolist()
    rows = _rows(batch_size, dims, at, micro_batches)

    expected: list[Expected] = []
    sum_bytes = sum_bytes or itemsize

    def tensor_sum(width: int) -> None:
        if dims["tp"] == 1:
            return
        for n in rows:
            # The exponents are those of the samples and of the weight's rows.
            for nbytes in filter(None, [exponent_bytes * (n + width), sum_bytes * n * width]):
                expected.append(Expected("tp", "all_reduce", dims["tp"], nbytes))

    def widths(i: int) -> int:
        """Width of this rank's share of the activations between layers i − 1 and i."""
        return Partition(sizes[i], dims["tp"], at["tp"]).widths()[at["tp"]] if i % 2 else sizes[i]

    parameters: list[int] = []  # bytes of the gradients, in the order of the backward pass
    exponents = 0  # of the rows of weights' and biases' gradients
    for i in stage:
        column, alone = i % 2 == 0, i % 2 == 0 and i == layers - 1
        if not alone:
            if column and i > 0:
                tensor_sum(sizes[i])  # of the gradient of its input
            if not column:
                tensor_sum(sizes[i + 1])
        inputs = sizes[i] if column else widths(i)
        outputs = sizes[i + 1] if alone or not column else widths(i + 1)
        exponents += 2 * outputs
        # The weight's gradient comes first where the layer's autograd is ours, the bias's elsewhere.
        if tensor_split and not alone:
            weight_first = column
        elif mesh.device_type == "cpu":
            weight_first = itemsize == 4 and prefers_onednn_layer(rows[0] * inputs * outputs)
        else:
            weight_first = i < layers - 1
        of_layer = [inputs * outputs * itemsize, outputs * itemsize]
        parameters = (of_layer if weight_first else of_layer[::-1]) + parameters
    for border, there in ((stage[0], at["pp"] > 0), (stage[-1] + 1, at["pp"] < dims["pp"] - 1)):
        if there:
            # Activations one way, gradients the other.
            for op in ("send", "recv"):
                expected += [Expected("pp", op, 2, n * widths(border) * itemsize) for n in rows]
    if dims["dp"] > 1:
        buckets = [sum(parameters)] if fused or dims["pp"] > 1 else _buckets(parameters)
        if exponent_bytes:
            buckets = [exponent_bytes * exponents, sum_bytes * sum(parameters) // itemsize]
        expected += [Expected("dp", "all_reduce", dims["dp"], n) for n in buckets]
    if muon is not None and muon.size() > 1:
        expected += _muon_collectives(sizes, stage, dims["tp"], muon)
    return expected


def _muon_collectives(
    sizes: Sequence[int], stage: Sequence[int], tp: int, mesh: DeviceMesh
) -> list[Expected]:
    """The all-to-alls of a step of Muon on ``mesh``, "dp" × "tp", in bfloat16."""
    parts = []  # of each weight, on each rank
    for i in stage:
        axis, whole = i % 2, (sizes[i + 1], sizes[i])
        # A last column layer is not split.
        shares = 1 if axis == 0 and i == len(sizes) - 2 else tp
        partitions = [Partition(whole[axis], shares, rank) for rank in range(shares)]
        of_ranks = []
        for rank, partition in enumerate(partitions):
            shape = [*whole]
            shape[axis] = partition.widths()[rank]
            of_ranks.append(slice_of(torch.Size(shape), axis, partition))
        parts.append(of_ranks * (mesh.size() // len(of_ranks)))
    dims = [name for name in mesh.mesh_dim_names or () if mesh[name].size() > 1]
    dimension = dims[0] if len(dims) == 1 else ""
    owners = assign_owners(
        [multiplications(torch.Size(of_ranks[0].whole)) for of_ranks in parts], mesh.size()
    )
    me = mesh.mesh.flatten().tolist().index(dist.get_rank())
    flags = (len(parts) + CHECKSUM_BYTES) * (mesh.size() - 1)  # in the first message
    expected = []
    for route in filter(None, messages([""] * len(parts), parts, owners)):
        received = flags + sum(m.part.numel for m in route if m.target == me)
        expected.append(Expected(dimension, "all_to_all", mesh.size(), 2 * received))
        flags = 0
    return expected


def _rows(
    batch_size: int, dims: dict[str, int], at: dict[str, int], micro_batches: int | Sequence[int]
) -> list[int]:
    """Return the samples of each of a rank's forward passes in a step."""
    if dims["pp"] == 1:
        return [Partition(batch_size, dims["dp"], at["dp"]).widths()[at["dp"]]]
    if not isinstance(micro_batches, int):
        return [*micro_batches]
    share = -(-batch_size // dims["dp"])
    return [-(-share // micro_batches)] * micro_batches


def _buckets(gradients: Sequence[int]) -> list[int]:
    """Return the bytes of DistributedDataParallel's buckets for gradients in this order."""
    buckets, limit = [0], DDP_BUCKETS[0]
    for n in gradients:
        if buckets[-1] >= limit:
            buckets.append(0)
            limit = DDP_BUCKETS[1]
        buckets[-1] += n
    return buckets
