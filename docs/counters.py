# SPDX-License-Identifier: MIT
"""Write the table of docs/performance.md: ``python docs/counters.py``.

Each operator's kernels are compiled for an H100, executed on this CPU, and counted.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import torchpar
from torchpar.ptx.report import Launch
from torchpar.ptx.roofline import bound

TRITON = "3.8."  # which compiles the kernels; another one may need other registers
PAGE = Path(__file__).with_name("performance.md")
HEAD = (
    "| kernel | operands | instructions of warps | sectors over the least | bank conflicts "
    "| copies in flight | by tensor cores | registers | programs | at least, on an H200 |\n"
    "|---|---|---|---|---|---|---|---|---|---|\n"
)


def normal(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return x.requires_grad_(grad)


def backward(y: Tensor) -> None:
    y.backward(torch.ones_like(y))


def layer(dtype: torch.dtype) -> None:
    x, weight, bias = (
        normal(*shape, dtype=dtype, grad=True) for shape in ((256, 768), (256, 768), (256,))
    )
    backward(torchpar.linear_sigmoid(x, weight, bias))


CALLS: dict[str, Callable[[], object]] = {
    "64 × 4096 and 64 × 4096, float32": lambda: backward(
        torchpar.maximum(normal(64, 4096, grad=True), normal(64, 4096, grad=True))
    ),
    "64 × 4096 and 4096, float32": lambda: backward(
        torchpar.maximum(normal(64, 4096, grad=True), normal(4096, grad=True))
    ),
    "512 × 512, float16": lambda: torchpar.matmul_t(normal(512, 512, dtype=torch.float16)),
    "256 × 256, float32": lambda: torchpar.matmul_t(normal(256, 256)),
    "256 × 768 → 256, float16": lambda: layer(torch.float16),
    "256 × 768 → 256, float32": lambda: layer(torch.float32),
}


def row(launch: Launch, operands: str) -> str:
    """Return a line of the table."""
    counters, total = launch.counters, launch.counters.total
    memory, shared = counters.sums("global"), counters.sums("shared")
    of_tensor, others = sum(total.tensor_flops.values()), sum(total.flops.values())
    cells = [
        f"`{launch.kernel}`",
        operands,
        f"{total.instruction_count:,}",
        f"{memory.ratio:.2f}",
        f"{shared.conflicts:,}",
        f"{total.most_in_flight}" if total.waits else "",
        f"{of_tensor / (of_tensor + others):.0%}" if of_tensor else "",
        f"{launch.resources.registers}" if launch.resources else "",
        f"{launch.programs_of_multiprocessor}",
        f"{(least := bound(counters, launch.programs, 'H200')).least:.3g} µs, by {least.unit}",
    ]
    return f"| {' | '.join(cells)} |"


def rows(operands: str) -> list[str]:
    """Return the lines of the table with these operands."""
    with torchpar.ptx.emulate("sm_90") as gpu:
        CALLS[operands]()
    return [row(launch, operands) for launch in gpu.launches]


def main() -> None:
    before, head, rest = PAGE.read_text("utf-8").partition(HEAD)
    after = rest.partition("\n\n")[2]
    lines = [line for operands in CALLS for line in rows(operands)]
    PAGE.write_text(before + head + "\n".join(lines) + "\n\n" + after, "utf-8")


if __name__ == "__main__":
    main()
