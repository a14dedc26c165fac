# SPDX-License-Identifier: MIT
"""What a step would take on H100s: the products at an assumed share of the peak, and the α–β model.

| | | source |
|---|---|---|
| products | 989 Tflop/s, bfloat16 | [1], dense (1979 with sparsity) |
| "tp", within a node of 8 | 450 GB/s a direction | [2]: NVLink 4, 18 links × 25 GB/s |
| | 3.4 µs a message | [3]: NVLINK |
| "dp" and "pp", between nodes | 50 GB/s a direction | [4], [5]: 400 Gb/s NDR InfiniBand, a port per GPU |
| | 14.0 µs a message | [3]: NET |

[1] NVIDIA, H100 Tensor Core GPU data sheet, SXM. [2] NVIDIA, H100 Tensor Core GPU Architecture (2022).
[3] NVIDIA, NCCL, src/graph/tuning.cc, the table hwLat at Ring and Simple, which NCCL adds up by 2(p − 1)
steps of a ring too. [4] NVIDIA, DGX H100 User Guide: a ConnectX-7 port for each of the 8 GPUs. [5] Llama
Team, The Llama 3 Herd of Models (arXiv:2407.21783), section 3.3.1: 400 Gb/s between GPUs.

α and β are those of a ring, and bandwidths are peaks: NCCL would take a tree where a ring's 2(p − 1)α
weighs, and reaches about 80 to 90% of the bandwidth. Memory traffic, the optimizer and stragglers are
left out. The 38 to 43% of the peak that Llama 3 405B reached on 8192 to 16384 H100 [5] include communication
and are of another model: they say which order is possible, and confirm nothing.

A step of m micro-batches in p stages takes (m + p − 1) slots of the slowest stage, whose slot is its
products, its tensor-parallel all-reduces and its messages to neighbours, one after the other. Then comes
the all-reduce among replicas: all of it (overlap "none"), or what the last micro-batch's backward pass
does not cover ("full").
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal, NamedTuple

from benchmarks.scale_model.counted import DTYPE, Counted, Mesh, StageWork
from torchpar.parallel.cost import Link

NVLINK = Link(alpha=3.4e-6, beta=1 / 450e9)
INFINIBAND = Link(alpha=14.0e-6, beta=1 / 50e9)
PEAK = 989e12  # bfloat16 products of an H100 SXM, flop/s
MEMORY = 80e9  # bytes of it
Overlap = Literal["none", "full"]


class Machine(NamedTuple):
    """GPUs, and what joins them. ``flops`` is what a GPU's products reach."""

    flops: float
    links: dict[str, Link]


class Prediction(NamedTuple):
    """Seconds of a step, and of its parts on the slowest stage."""

    step: float
    compute: float
    tensor: float
    pipeline: float  # messages and idle slots
    data: float  # what the backward pass does not cover
    efficiency: float  # of as many GPUs that neither wait nor communicate


def predict(
    stages: Sequence[StageWork], width: int, batch: int, mesh: Mesh, machine: Machine, overlap: Overlap
) -> Prediction:
    """A step of ``batch`` samples; 6·width² operations a sample and layer (2 forward, 4 backward).

    The first layer's input needs no gradient, which is 2 less.
    """
    samples = batch / mesh.dp

    def seconds(stage: StageWork, dimension: str) -> float:
        link = machine.links[dimension]
        found = (e for e in stage.expected if e.dimension == dimension)
        return sum(link.seconds(e.operation, e.ranks, e.nbytes) for e in found)

    def slot(index: int) -> tuple[float, float, float]:
        """Products, all-reduces of a layer's parts and messages of a micro-batch."""
        stage, m = stages[index], mesh.micro_batches
        operations = (6 * stage.layers - 2 * (index == 0)) * width**2 * samples / mesh.tp
        return operations / machine.flops / m, seconds(stage, "tp") / m, seconds(stage, "pp") / m

    compute, tensor, messages = max((slot(index) for index in range(len(stages))), key=sum)
    slots = mesh.micro_batches + mesh.pp - 1
    exposed = max(seconds(stage, "dp") for stage in stages)
    if overlap == "full":
        exposed = max(exposed - 2 / 3 * compute, 0.0)  # two of three products are backward
    step = slots * (compute + tensor + messages) + exposed
    layers = sum(stage.layers for stage in stages)
    ideal = (6 * layers - 2) * width**2 * batch / (mesh.ranks * machine.flops)
    return Prediction(
        step,
        compute * mesh.micro_batches,
        tensor * mesh.micro_batches,
        slots * messages + (mesh.pp - 1) * (compute + tensor),
        exposed,
        ideal / step,
    )


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the CSV. Everything in milliseconds, and the efficiency, is PREDICTED, not measured."""

    scaling: str  # "weak" or "strong"
    ranks: int
    mesh: str
    micro_batches: int
    width: int
    layers: int
    global_batch: int
    overlap: str
    calls: int  # a rank's in a step, counted in the fake process group
    call_bytes: int
    counted_equals_predicted: bool
    PREDICTED_step_ms: float
    PREDICTED_compute_ms: float
    PREDICTED_tp_ms: float
    PREDICTED_pp_ms: float
    PREDICTED_dp_exposed_ms: float
    PREDICTED_efficiency: float
    rank_gb: float  # weights and gradients


def rows(scaling: str, counted: Counted, width: int, batch: int, mesh: Mesh, utilisation: float) -> list[Row]:
    """With the all-reduce among replicas after the step, and as far as may be within it."""
    machine = Machine(PEAK * utilisation, {"tp": NVLINK, "dp": INFINIBAND, "pp": INFINIBAND})
    layers = sum(stage.layers for stage in counted.stages)
    found = []
    overlaps: tuple[Overlap, ...] = ("none", "full")
    for overlap in overlaps:
        p = predict(counted.stages, width, batch, mesh, machine, overlap)
        found.append(
            Row(
                scaling=scaling,
                ranks=mesh.ranks,
                mesh=str(mesh),
                micro_batches=mesh.micro_batches,
                width=width,
                layers=layers,
                global_batch=batch,
                overlap=overlap,
                calls=len(counted.calls),
                call_bytes=sum(call.bytes for call in counted.calls),
                counted_equals_predicted=not counted.difference,
                PREDICTED_step_ms=1e3 * p.step,
                PREDICTED_compute_ms=1e3 * p.compute,
                PREDICTED_tp_ms=1e3 * p.tensor,
                PREDICTED_pp_ms=1e3 * p.pipeline,
                PREDICTED_dp_exposed_ms=1e3 * p.data,
                PREDICTED_efficiency=p.efficiency,
                rank_gb=2 * DTYPE.itemsize * ceil(layers / mesh.pp) * width**2 / mesh.tp / 1e9,
            )
        )
    return found
