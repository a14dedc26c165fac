# SPDX-License-Identifier: MIT
"""Write the tables of docs/performance.md: ``python docs/counters.py``.

The operators' kernels are compiled for an H100, executed on this CPU, and counted.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import nogpu
import torchpar
from nogpu import DATA_SHEETS, Launch
from nogpu.machine.instruction_counts import SECTOR
from nogpu.record.roofline import bound
from torchpar.kernels import linear_sigmoid, matmul_t
from torchpar.kernels.rule import KINDS, Tiles, count_tiles

TRITON = "3.8."  # which compiles the kernels; another one may need other registers
PAGE = Path(__file__).with_name("performance.md")
MULTIPROCESSORS = DATA_SHEETS["H200"].multiprocessors
OF_PRODUCTS = ("symmetric_matmul", "linear_sigmoid")  # kernels of the other table
ELEMENTWISE = (
    "| kernel | operands | sectors over the least | wavefronts over the least | registers "
    "| spilled bytes | programs at once | on an H200 | on a B200 |\n"
    "|---|---|---|---|---|---|---|---|---|\n"
)
MATRIX = (
    "| kernel | operands | tiles | bytes over the tiles' | sectors over the least "
    "| wavefronts over the least | FLOPs over 2·m·n·k | copies in flight | registers "
    "| spilled bytes | waves at 4096 | on an H200 | on a B200 |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|\n"
)


def normal(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return x.requires_grad_(grad)


# The kernels that memory bounds


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
    "256 × 256, float16": lambda: layer(torch.float16),
    "256 × 256, float32": lambda: layer(torch.float32),
}


# The matrix kernels


class Product(NamedTuple):
    """A product ``(m, k) · (n, k)ᵀ`` by the tiles that the rule takes for large ones."""

    kernel: str
    kind: str
    m: int
    n: int
    k: int
    tiles: Tiles

    @property
    def operands(self) -> str:
        if self.kernel == "symmetric_matmul":
            return f"{self.n} × {self.k}, {self.kind}"
        return f"{self.m} × {self.k} → {self.n}, {self.kind}"

    @property
    def is_symmetric(self) -> bool:
        return self.kernel == "symmetric_matmul"

    def launch(self) -> None:
        kind = KINDS[self.kind]
        x, weight = (normal(rows, self.k, dtype=kind.dtype) for rows in (self.m, self.n))
        if self.is_symmetric:
            matmul_t.symmetric_matmul(x, x, kind.precision, None, tiles=self.tiles)
        else:
            bias = normal(self.n, dtype=kind.dtype)
            linear_sigmoid.linear_sigmoid(x, weight, bias, kind.precision, None, tiles=self.tiles)

    def bytes_of_tiles(self) -> int:
        """Bytes of the result, and of the operands of all tiles."""
        rows, columns = self.tiles[:2]
        units = count_tiles(self.tiles, self.m, self.n, self.is_symmetric)
        loaded = units * (rows + columns)
        if self.is_symmetric and self.tiles.variant == "tma" and columns == 2 * rows:
            # A pair of rows has two wide tiles for each pair before it. Of its own three squares,
            # one wide tile has two, and the third has the same rows as both operands.
            pairs = self.n // columns
            loaded = pairs * pairs * (rows + columns) + pairs * rows
        return (loaded * self.k + self.m * self.n) * KINDS[self.kind].dtype.itemsize

    def waves(self, programs: int) -> float:
        """Waves of the tiles of 4096 × 4096, with so many programs on a multiprocessor at once."""
        units = count_tiles(self.tiles, 4096, 4096, self.is_symmetric)
        return units / (MULTIPROCESSORS * programs)


WIDE = Tiles(128, 256, 64, 8, 4, "tma")
NARROW = Tiles(64, 128, 64, 4, 4, "tma")
WIDE_TF32 = Tiles(128, 256, 32, 8, 3, "tma")
TILES = {  # for 4096 rows; before them others, for 2048 and 8192 rows
    ("symmetric_matmul", "bfloat16"): (NARROW, Tiles(128, 256, 64, 8, 3, "flat"), WIDE),
    ("symmetric_matmul", "float16"): (WIDE,),
    ("symmetric_matmul", "tf32"): (WIDE_TF32,),
    ("symmetric_matmul", "tf32x3"): (Tiles(128, 128, 32, 8, 3, "tma"),),
    ("symmetric_matmul", "float32"): (Tiles(128, 128, 16, 8, 3),),
    ("linear_sigmoid", "bfloat16"): (NARROW, WIDE),
    ("linear_sigmoid", "float16"): (WIDE,),
    ("linear_sigmoid", "tf32"): (WIDE_TF32,),
    ("linear_sigmoid", "float32"): (Tiles(128, 128, 16, 8, 3),),
}
PRODUCTS = {
    f"{one.kernel}, {one.operands}, {' '.join(map(str, tiles))}": one
    for (kernel, kind), choices in TILES.items()
    for tiles in choices
    # Three products take the executor many times as long as one.
    if (one := Product(kernel, kind, *[512 if kind == "tf32x3" else 1024] * 3, tiles))
}


def cells_of(launch: Launch) -> list[str]:
    """Return the cells that both tables end with."""
    used = launch.resources
    counters = launch.counters
    bounds = [
        bound(counters, launch.programs, "H200"),
        bound(counters, launch.programs, "B200", has_same_code=False),
    ]
    return [
        *([f"{used.registers}", f"{used.spilled_bytes}"] if used else ["", ""]),
        f"{launch.programs_of_multiprocessor}",
        *(f"{one.least:.3g} µs, by {one.unit}" for one in bounds),
    ]


def ratio_of_flops(launch: Launch, product: Product) -> float:
    total = launch.counters.total
    made = sum(total.tensor_flops.values()) or sum(total.flops.values())
    return made / (2 * product.m * product.n * product.k)


def elementwise_row(launch: Launch, operands: str) -> str:
    counters = launch.counters
    memory, shared = counters.sums("global"), counters.sums("shared")
    cells = [f"{memory.ratio:.2f}", f"{shared.ratio:.2f}" if shared.least else ""]
    return _line(f"`{launch.kernel}`", operands, *cells, *cells_of(launch))


def matrix_row(launch: Launch, product: Product) -> str:
    counters, total = launch.counters, launch.counters.total
    memory, shared = counters.sums("global"), counters.sums("shared")
    registers, spilled, programs, *bounds = cells_of(launch)
    return _line(
        f"`{launch.kernel}`",
        product.operands,
        " ".join(map(str, product.tiles)),
        f"{memory.transactions * SECTOR / product.bytes_of_tiles():.2f}",
        f"{memory.ratio:.2f}",
        f"{shared.ratio:.2f}",
        f"{ratio_of_flops(launch, product):.3f}",
        f"{total.most_in_flight}",
        registers,
        spilled,
        f"{product.waves(int(programs)):.2f}",
        *bounds,
    )


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def elementwise_launches(operands: str) -> list[Launch]:
    """Return the launches of a call, without those of products, which the other table has."""
    with nogpu.emulate("sm_90", multiprocessors=MULTIPROCESSORS) as gpu:
        CALLS[operands]()
    return [
        one for one in gpu.launches if "matmul" not in one.kernel and "linear" not in one.kernel
    ]


def product_launch(name: str) -> Launch:
    with nogpu.emulate("sm_90", multiprocessors=MULTIPROCESSORS) as gpu:
        PRODUCTS[name].launch()
    (launch,) = gpu.launches
    return launch


def main() -> None:
    text = PAGE.read_text("utf-8")
    elementwise = [
        elementwise_row(launch, name) for name in CALLS for launch in elementwise_launches(name)
    ]
    matrix = [matrix_row(product_launch(name), one) for name, one in PRODUCTS.items()]
    for head, lines in ((ELEMENTWISE, elementwise), (MATRIX, matrix)):
        before, _, rest = text.partition(head)
        after = rest.partition("\n\n")[2]
        text = before + head + "\n".join(lines) + "\n\n" + after
    PAGE.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
