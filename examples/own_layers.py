# SPDX-License-Identifier: MIT
"""Layers by kernels of one's own, in Triton or CUDA C++, checked and trained without a GPU.

    python examples/own_layers.py                   compiled for an H100, executed on this CPU
    python examples/own_layers.py --device cuda     the same, and trained on a GPU
    python examples/own_layers.py --with layers.cu  by kernels of a file of CUDA C++
    python examples/own_layers.py --matrix          by memory of host and device, with copies

The layers are those of train_by_hand.py, which has their formulas. Here each forward and each
backward pass is a kernel of this file. The kernels are plain: replace one by your own. Products
have blocks of 16 × 16 threads, and each thread sums one number of the result. The other kernels
have blocks of 64 threads, and each thread computes one number.

The gradient of a bias sums G over the samples. `bias_by_one_program_kernel` does so by one program,
while the other multiprocessors are idle. `bias_by_atomics_kernel` divides the samples among
programs, which add their sums by atomics.

Kernels of the file that --with names take the place of those with their names here. --help has
their parameters. examples/layers.cu is such a file. x of a grid and of a block counts columns, and
y rows. `bias_by_one_thread` has a thread for each column, which sums it. Of the results only `db`
of `bias_by_atomics` and `loss` are 0 before the launch.

With --matrix the first weights and each batch are written into the host memory of a `Matrix`, and
copied to the device. The probabilities of the test points are copied back (support/matrix.py).

Before it trains, the script executes each kernel as compiled for an H100, and compares its results
with PyTorch's in float64. It names races, accesses out of bounds and uninitialised memory. Then it
counts what each kernel takes. "least" is a bound by the GPU's data sheet, as if nothing waited.
"about" is the emulator's estimate, which counts how long a program waits for memory.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, NamedTuple

from support import checks, cli, console

import torch
import tyro
from torch import Tensor
from torch.nn.functional import binary_cross_entropy
from train_by_hand import Layer, Network, draw, gradients_of
from train_by_hand import Linear as PlainLinear

from torchpar.data import Samples, batches
from torchpar.errors import ConfigError, check_finite
from torchpar.parallel.launch.world import join_world
from torchpar.testing.operators.compare import farthest

try:
    import triton
    import triton.language as tl
except ImportError as error:
    sys.exit(f"own_layers.py needs Triton ({error}); pip install triton")
try:
    from nogpu import Emulator, check_kernel, emulate
except ImportError as error:
    sys.exit(f"own_layers.py executes kernels by nogpu ({error}); pip install ./nogpu")

from support import cuda_layers
from support.cuda_layers import BLOCK, TILE, CudaKernel
from support.kernels import by_unit, check_faults, compiling
from support.matrix import Matrix

OF_TILES = {"TILE": TILE, "num_warps": 8}  # 256 threads
OF_BLOCKS = {"BLOCK": BLOCK, "num_warps": 2}  # 64 threads

# The kernels. Matrices are contiguous: x (n, inputs), w (outputs, inputs), y and g (n, outputs).


@triton.jit
def linear_kernel(x, w, b, y, n, inputs, outputs, TILE: tl.constexpr):
    """Y = X·Wᵀ + b."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)[:, None]
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)[None, :]
    total = tl.zeros((TILE, TILE), tl.float32)
    for k in range(inputs):
        total += tl.load(x + row * inputs + k, row < n, 0.0) * tl.load(
            w + column * inputs + k, column < outputs, 0.0
        )
    total += tl.load(b + column, column < outputs, 0.0)
    tl.store(y + row * outputs + column, total, (row < n) & (column < outputs))


@triton.jit
def linear_input_kernel(g, w, dx, n, inputs, outputs, TILE: tl.constexpr):
    """∂L/∂X = G·W."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)[:, None]
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)[None, :]
    total = tl.zeros((TILE, TILE), tl.float32)
    for k in range(outputs):
        total += tl.load(g + row * outputs + k, row < n, 0.0) * tl.load(
            w + k * inputs + column, column < inputs, 0.0
        )
    tl.store(dx + row * inputs + column, total, (row < n) & (column < inputs))


@triton.jit
def linear_weight_kernel(g, x, dw, n, inputs, outputs, TILE: tl.constexpr):
    """∂L/∂W = Gᵀ·X."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)[:, None]
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)[None, :]
    total = tl.zeros((TILE, TILE), tl.float32)
    for k in range(n):
        total += tl.load(g + k * outputs + row, row < outputs, 0.0) * tl.load(
            x + k * inputs + column, column < inputs, 0.0
        )
    tl.store(dw + row * inputs + column, total, (row < outputs) & (column < inputs))


@triton.jit
def bias_by_one_program_kernel(g, db, n, outputs, BLOCK: tl.constexpr):
    """∂L/∂b = Σ G over rows: one program, of which each thread sums a column."""
    for start in range(0, outputs, BLOCK):
        column = start + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for k in range(n):
            total += tl.load(g + k * outputs + column, column < outputs, 0.0)
        tl.store(db + column, total, column < outputs)


@triton.jit
def bias_by_atomics_kernel(g, db, n, outputs, TILE: tl.constexpr):
    """∂L/∂b = Σ G over rows: each program adds the sums of its rows to ``db``, which was 0."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)[:, None]
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = (row < n) & (column < outputs)[None, :]
    total = tl.sum(tl.load(g + row * outputs + column[None, :], inside, 0.0), 0)
    tl.atomic_add(db + column, total, column < outputs)


@triton.jit
def relu_kernel(x, y, size, BLOCK: tl.constexpr):
    """Y = max(X, 0)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.maximum(tl.load(x + i, i < size), 0.0), i < size)


@triton.jit
def relu_backward_kernel(g, y, dx, size, BLOCK: tl.constexpr):
    """∂L/∂X = G where Y > 0, else 0."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    g_i, y_i = tl.load(g + i, i < size), tl.load(y + i, i < size)
    tl.store(dx + i, tl.where(y_i > 0, g_i, 0.0), i < size)


@triton.jit
def sigmoid_kernel(x, y, size, BLOCK: tl.constexpr):
    """Y = σ(X)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.sigmoid(tl.load(x + i, i < size, 0.0)), i < size)


@triton.jit
def sigmoid_backward_kernel(g, y, dx, size, BLOCK: tl.constexpr):
    """∂L/∂X = G ⊙ Y ⊙ (1 − Y)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    g_i, y_i = tl.load(g + i, i < size, 0.0), tl.load(y + i, i < size, 0.0)
    tl.store(dx + i, g_i * y_i * (1 - y_i), i < size)


@triton.jit
def bce_kernel(p, t, loss, size, BLOCK: tl.constexpr):
    """L = −1/n · Σ (t·ln p + (1 − t)·ln(1 − p)): each program adds its samples' part to L."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p_i, t_i = tl.load(p + i, i < size, 0.5), tl.load(t + i, i < size, 0.0)
    # ln 0 is −∞. As in PyTorch, a logarithm is at least −100.
    log_p, log_q = tl.maximum(tl.log(p_i), -100.0), tl.maximum(tl.log(1 - p_i), -100.0)
    each = tl.where(i < size, t_i * log_p + (1 - t_i) * log_q, 0.0)
    tl.atomic_add(loss, -tl.sum(each, 0) / size)


@triton.jit
def bce_backward_kernel(p, t, dp, size, BLOCK: tl.constexpr):
    """∂L/∂p = (p − t)/(p·(1 − p))/n."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p_i, t_i = tl.load(p + i, i < size, 0.5), tl.load(t + i, i < size, 0.0)
    # In float32 p can be 0 or 1. Divide by no less than PyTorch does.
    tl.store(dp + i, (p_i - t_i) / tl.maximum(p_i * (1 - p_i), 1e-12) / size, i < size)


# The layers, which launch them


def tiles(rows: int, columns: int) -> tuple[int, int]:
    return triton.cdiv(rows, TILE), triton.cdiv(columns, TILE)


def blocks(size: int) -> tuple[int]:
    return (triton.cdiv(size, BLOCK),)


class Kernels(NamedTuple):
    """The kernels of this file, and those of a reader's file that take their places.

    Attributes:
        own: the reader's, by name.
    """

    own: Mapping[str, CudaKernel] = MappingProxyType({})

    def find(self, kernel: object) -> CudaKernel | None:
        """Return the reader's kernel that takes the place of a kernel of this file."""
        name = kernel.__name__.removesuffix("_kernel")  # type: ignore[attr-defined]
        # A reader's thread is what a program's thread is here.
        return self.own.get(name.replace("one_program", "one_thread"))

    def launch(
        self, kernel: object, grid: tuple[int, ...], *arguments: Tensor | int, **options: int
    ) -> None:
        """Launch a kernel of this file, or the one in its place.

        Args:
            grid, options: of the kernel of this file.
        """
        if (own := self.find(kernel)) is not None:
            own(*arguments)
        else:
            kernel[grid](*arguments, **options)  # type: ignore[index]


class Linear(PlainLinear):
    """Y = X·Wᵀ + b, by blocks of 16 × 16 threads."""

    kernels = Kernels()

    def forward(self, x: Tensor) -> Tensor:
        self.x = x
        n, (outputs, inputs) = len(x), self.weight.shape
        y = x.new_empty(n, outputs)
        arguments = (x, self.weight, self.bias, y, n, inputs, outputs)
        self.kernels.launch(linear_kernel, tiles(n, outputs), *arguments, **OF_TILES)
        return y

    def backward(self, g: Tensor) -> Tensor:
        n, (outputs, inputs) = len(g), self.weight.shape
        self.weight_gradient, dx = torch.empty_like(self.weight), torch.empty_like(self.x)
        self.bias_gradient = bias_gradient(g, self.kernels)
        arguments = (g, self.x, self.weight_gradient, n, inputs, outputs)
        self.kernels.launch(linear_weight_kernel, tiles(outputs, inputs), *arguments, **OF_TILES)
        arguments = (g, self.weight, dx, n, inputs, outputs)
        self.kernels.launch(linear_input_kernel, tiles(n, inputs), *arguments, **OF_TILES)
        return dx


def bias_gradient(g: Tensor, kernels: Kernels) -> Tensor:
    """Return the sum ``(outputs)`` over the rows of ``g (n, outputs)``."""
    db = g.new_zeros(g.shape[1])
    if "bias_by_one_thread" in kernels.own and "bias_by_atomics" not in kernels.own:
        kernels.launch(bias_by_one_program_kernel, (1,), g, db, *g.shape)
    else:
        kernels.launch(bias_by_atomics_kernel, tiles(*g.shape), g, db, *g.shape, **OF_TILES)
    return db


class ReLU(Layer):
    """Y = max(X, 0), by blocks of 64 threads."""

    kernels = Kernels()

    def forward(self, x: Tensor) -> Tensor:
        self.y, size = torch.empty_like(x), x.numel()
        self.kernels.launch(relu_kernel, blocks(size), x, self.y, size, **OF_BLOCKS)
        return self.y

    def backward(self, g: Tensor) -> Tensor:
        dx, size = torch.empty_like(g), g.numel()
        self.kernels.launch(relu_backward_kernel, blocks(size), g, self.y, dx, size, **OF_BLOCKS)
        return dx


class Sigmoid(Layer):
    """Y = σ(X), by blocks of 64 threads."""

    kernels = Kernels()

    def forward(self, x: Tensor) -> Tensor:
        self.y, size = torch.empty_like(x), x.numel()
        self.kernels.launch(sigmoid_kernel, blocks(size), x, self.y, size, **OF_BLOCKS)
        return self.y

    def backward(self, g: Tensor) -> Tensor:
        dx, size = torch.empty_like(g), g.numel()
        self.kernels.launch(sigmoid_backward_kernel, blocks(size), g, self.y, dx, size, **OF_BLOCKS)
        return dx


class BinaryCrossEntropy:
    """The loss of probabilities ``p (n, 1)`` and labels 0 and 1, ``(n)``."""

    def __init__(self, kernels: Kernels = Kernels()):  # noqa: B008
        self.kernels = kernels

    def forward(self, p: Tensor, labels: Tensor) -> Tensor:
        self.p, self.t, loss, n = p, labels.to(p), p.new_zeros(()), len(p)
        self.kernels.launch(bce_kernel, blocks(n), p, self.t, loss, n, **OF_BLOCKS)
        return loss

    def backward(self) -> Tensor:
        dp, n = torch.empty_like(self.p), len(self.p)
        self.kernels.launch(bce_backward_kernel, blocks(n), self.p, self.t, dp, n, **OF_BLOCKS)
        return dp


# What each kernel must write

AT_ENDS = (
    ", also where p is 0 or 1; as in PyTorch a logarithm is at least -100, and a divisor at least "
    "1e-12"
)
ADDS = "; only db of bias_by_atomics and loss are 0, so that threads can add to them"


class Case(NamedTuple):
    """A launch of a kernel, and what it writes.

    Attributes:
        right: a function of the arguments, by PyTorch's operators, as `check_kernel` takes it.
    """

    kernel: object
    grid: tuple[int, ...]
    arguments: Sequence[Tensor | int]
    right: Callable[..., Mapping[str, Tensor]]
    options: Mapping[str, int]


UNSET = 0x7FC0BEEF  # the bits of a NaN that no arithmetic on numbers makes


def unset(like: Tensor) -> Tensor:
    """Return a result for a kernel to write: NaN, which no kernel may read or leave."""
    return torch.full_like(like, UNSET, dtype=torch.int32).view(torch.float32)


def cases(n: int, inputs: int, outputs: int) -> list[Case]:
    """Return a launch of each kernel for ``n`` samples."""
    x, w, b = torch.randn(n, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    g, t = torch.randn(n, outputs), torch.randint(0, 2, (n,)).float()
    y, p, size = unset(g), torch.rand(n), n * outputs
    if n > 2:  # a sigmoid is exactly 0 or 1 in float32 for numbers below -104 or above 17
        p[:2] = t[:2] = torch.tensor([0.0, 1.0])
    sizes = (n, inputs, outputs)
    one, two = g.relu(), g.sigmoid()
    return [
        Case(
            linear_kernel,
            tiles(n, outputs),
            (x, w, b, y, *sizes),
            lambda x, w, b, y, *_: {"y": torch.nn.functional.linear(x, w, b)},
            OF_TILES,
        ),
        Case(
            linear_input_kernel,
            tiles(n, inputs),
            (g, w, unset(x), *sizes),
            lambda g, w, *_: {"dx": g @ w},
            OF_TILES,
        ),
        Case(
            linear_weight_kernel,
            tiles(outputs, inputs),
            (g, x, unset(w), *sizes),
            lambda g, x, *_: {"dw": g.T @ x},
            OF_TILES,
        ),
        Case(
            bias_by_one_program_kernel,
            (1,),
            (g, unset(b), n, outputs),
            lambda g, *_: {"db": g.sum(0)},
            OF_BLOCKS,
        ),
        Case(
            bias_by_atomics_kernel,
            tiles(n, outputs),
            (g, torch.zeros_like(b), n, outputs),
            lambda g, *_: {"db": g.sum(0)},
            OF_TILES,
        ),
        Case(relu_kernel, blocks(size), (g, y, size), lambda x, *_: {"y": x.relu()}, OF_BLOCKS),
        Case(
            relu_backward_kernel,
            blocks(size),
            (g, one, unset(g), size),
            lambda g, y, *_: {"dx": g * (y > 0)},
            OF_BLOCKS,
        ),
        Case(
            sigmoid_kernel, blocks(size), (g, y, size), lambda x, *_: {"y": x.sigmoid()}, OF_BLOCKS
        ),
        Case(
            sigmoid_backward_kernel,
            blocks(size),
            (g, two, unset(g), size),
            lambda g, y, *_: {"dx": g * y * (1 - y)},
            OF_BLOCKS,
        ),
        Case(
            bce_kernel,
            blocks(n),
            (p, t, torch.zeros(()), n),
            lambda p, t, *_: {"loss": binary_cross_entropy(p, t)},
            OF_BLOCKS,
        ),
        Case(
            bce_backward_kernel,
            blocks(n),
            (p, t, unset(p), n),
            lambda p, t, *_: {"dp": (p - t) / (p * (1 - p)).clamp(min=1e-12) / len(p)},
            OF_BLOCKS,
        ),
    ]


def check_arguments(case: Case) -> None:
    """Check that a case gives a kernel the arguments that it takes.

    Raises:
        ConfigError: arguments that are missing, or too many.
    """
    kernel = case.kernel.fn  # type: ignore[attr-defined]
    takes = signature(kernel)
    constants = {name: v for name, v in case.options.items() if name in takes.parameters}
    try:
        takes.bind(*case.arguments, **constants)
    except TypeError as error:
        raise ConfigError(
            f"{kernel.__name__}{takes}: {error}; mend its launch in `cases` and in its layer"
        ) from None


def hint(source: str) -> str:
    """Return what a kernel's source suggests, where its values are not those of float32."""
    if "tl.dot(" in source and "input_precision" not in source:
        return ' (by default tl.dot rounds float32 to TF32; input_precision="ieee" does not)'
    if "tl.atomic_add(" in source:
        return " (a result to which programs add must be 0 before the launch)"
    return ""


def check_own(own: CudaKernel, case: Case) -> None:
    """Execute a reader's kernel, and compare what it writes with PyTorch's in float64.

    Raises:
        ConfigError: a fault, or an error above rounding.
    """
    tensors = [one.clone() for one in case.arguments if isinstance(one, Tensor)]
    sizes = [one for one in case.arguments if isinstance(one, int)]
    inputs = [one.clone() for one in tensors]
    with emulate("sm_90", schedules="all") as gpu:  # warps in several orders
        own(*tensors, *sizes)
    check_faults(gpu)
    names = list(signature(case.kernel.fn).parameters)  # type: ignore[attr-defined]
    for name in case.right(*tensors, *sizes):

        def reference(*tensors: Tensor, name: str = name) -> Tensor:
            return case.right(*tensors, *sizes)[name]

        result, place = tensors[names.index(name)], f"{own.place}, {own.__name__}"
        was_unset = bool((inputs[names.index(name)].view(torch.int32) == UNSET).all())
        # A sum with a NaN may have other bits than this.
        is_left = was_unset and bool(result.isnan().all())
        missing = result.isnan() if is_left else result.view(torch.int32) == UNSET
        if missing.any():
            raise ConfigError(
                f"{place}: {int(missing.sum())} of {result.numel()} numbers of {name} are NaN, as "
                f"all are before the launch; write each of them{ADDS}"
            )
        if result.isnan().any():
            raise ConfigError(
                f"{place}: {name} is NaN, expected a number{AT_ENDS * ('bce' in own.__name__)}; "
                "mend the kernel"
            )
        found = checks.error_of(result, reference, *inputs, terms=max(sizes))
        if not found.error <= found.most:
            raise ConfigError(
                f"{place}: {name} is off by {found.error:.1e}, expected {found.most:.1e} at most: "
                f"{farthest(result, found.exact)}; mend the kernel"
            )


def check_kernels(kernels: Kernels = Kernels()) -> None:  # noqa: B008
    """Execute each kernel as compiled for an H100, at two sizes that fill no block.

    Raises:
        ConfigError: a kernel that Triton cannot compile, that writes wrong values or breaks a rule.
    """
    checked = [case for sizes in ((37, 5, 20), (1, 17, 1)) for case in cases(*sizes)]
    for case in console.progress(checked, "kernels"):
        if (own := kernels.find(case.kernel)) is not None:
            check_own(own, case)
            continue
        check_arguments(case)
        kernel, grid, arguments, right, options = case
        name = kernel.__name__  # type: ignore[attr-defined]
        with compiling(name):
            table = check_kernel(kernel, grid, arguments, right, **options)  # type: ignore[arg-type]
        wrong = [row for row in table.rows if row.outcome in ("wrong", "crashes")]
        if wrong:
            found = "; ".join(f"{row.name}: {row.detail}" for row in wrong)
            raise ConfigError(f"{name}: {found}; mend the kernel{hint(kernel.src)}")  # type: ignore[attr-defined]
    print(f"{len(checked)} launches of {len(checked) // 2} kernels are right, and break no rule")


def count(n: int, hidden: int, kernels: Kernels = Kernels()) -> list[console.Row]:  # noqa: B008
    """Print what each kernel takes for the hidden layer of a batch, and return the rows."""
    rows: list[console.Row] = []
    with emulate("sm_90") as gpu:
        for case in cases(n, 2, hidden):
            kernels.launch(case.kernel, case.grid, *case.arguments, **case.options)
    for launch in gpu.launches:
        counters, bound = launch.counters, launch.bounds[0]
        warps = launch.programs * launch.warps
        rows.append(
            {
                "kernel": launch.kernel.removesuffix("_kernel"),
                "blocks": launch.programs,
                "per_warp": round(counters.total.instruction_count / warps),
                "sectors": counters.sums("global").transactions,
                "atomics": sum(one.requests for one in counters.accesses if one.what == "atomic"),
                "least": f"{bound.least:.3f}",
                "unit": bound.unit,
                "about": f"{launch.time[bound.gpu].microseconds:.4g}",
            }
        )
    shown = [{name: cell for name, cell in row.items() if name != "unit"} for row in rows]
    console.print_rows(shown, f"{n} samples, {hidden} units, an {bound.gpu}")
    print("per warp: instructions; atomics: requests; no time was measured:")
    print("least: µs, a bound by the data sheet; about: µs, the emulator's estimate")
    print(f"least, {by_unit((row['kernel'], row['unit']) for row in rows)}")
    return rows


# Training


def build_network(
    hidden: int,
    device: torch.device,
    kernels: Kernels = Kernels(),  # noqa: B008
) -> Network:
    network = Network()
    for layer in (Linear(2, hidden, device), ReLU(), Linear(hidden, 1, device), Sigmoid()):
        layer.kernels = kernels
        network.add(layer)
    return network


def same(t: Tensor) -> Tensor:
    """Return a tensor that lies where kernels read it."""
    return t


def copy_to_device(t: Tensor, device: torch.device, copies: Counter[str]) -> Tensor:
    """Return the device's memory of a matrix into whose host memory ``t`` is written."""
    rows, columns = t.shape
    matrix = Matrix(rows, columns, device, copies)
    matrix.allocate_memory()
    matrix.host.copy_(t)
    matrix.copy_host_to_device()
    return matrix.device


def copy_to_host(t: Tensor, copies: Counter[str]) -> Tensor:
    """Return the host's memory of a matrix into whose device memory ``t`` is written."""
    rows, columns = t.shape
    matrix = Matrix(rows, columns, t.device, copies)
    matrix.allocate_memory()
    matrix.device.copy_(t)
    matrix.copy_device_to_host()
    return matrix.host


def use_matrices(network: Network, place: Callable[[Tensor], Tensor]) -> None:
    """Copy the first weights, which the host draws, to the device."""
    for layer in network.layers:
        if isinstance(layer, Linear):
            layer.weight, layer.bias = place(layer.weight), place(layer.bias[None])[0]


def run_passes(
    network: Network, loss: BinaryCrossEntropy, x: Tensor, labels: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and the gradients of the parameters, by the passes of one layer after the
    other.

    Raises:
        ConfigError: a pass returns no tensor, or changes its input.
    """
    inputs = [x]
    for layer in network.layers:
        inputs.append(checks.result_of(layer.forward, inputs[-1]))
    value = checks.result_of(loss.forward, inputs[-1], labels, shape=())
    g = checks.result_of(loss.backward, shape=inputs.pop().shape)
    for layer in reversed(network.layers):
        g = checks.result_of(layer.backward, g, shape=inputs.pop().shape)
        gradients_of(layer)
    return value, network.gradients()


def check_network(
    network: Network,
    loss: BinaryCrossEntropy,
    samples: Samples,
    gpu: Emulator | None,
    place: Callable[[Tensor], Tensor] = same,
) -> None:
    """Compare the loss and the gradients of all layers together with those of autograd in float64.

    Args:
        gpu: that executes the launches, if no GPU does.
        place: returns points in the memory that the kernels read.

    Raises:
        ConfigError: a fault of a launch; an error above rounding.
    """
    x, labels = place(samples.features), samples.labels
    # A wrong launch can write into the parameters.
    parameters = {name: parameter.clone() for name, parameter in network.parameters().items()}
    try:
        value, gradients = run_passes(network, loss, x, labels)
    finally:  # a fault explains what follows from it
        if gpu is not None:
            check_faults(gpu)

    def reference(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        y = torch.nn.functional.linear(x, w1, b1).relu()
        p = torch.nn.functional.linear(y, w2, b2).sigmoid()
        return binary_cross_entropy(p[:, 0], labels.to(p))

    # A gradient sums p − t over samples, times numbers of about 1 at most. The terms may cancel.
    size = (loss.p[:, 0] - loss.t).abs().mean().item()
    checks.compare("loss", value, reference, x, *parameters.values(), terms=len(x))
    for i, (name, gradient) in enumerate(gradients.items()):

        def gradient_of(*tensors: Tensor, i: int = i) -> Tensor:
            leaves = [t.detach().requires_grad_() for t in tensors]
            return torch.autograd.grad(reference(*leaves), leaves[1 + i])[0]

        part = f"gradient of {name}"
        checks.compare(
            part, gradient, gradient_of, x, *parameters.values(), terms=len(x), size=size
        )


@dataclass(kw_only=True)
class Flags(cli.ExampleFlags):
    """Learn the quadrants by kernels of one's own."""

    with_: Annotated[Path | None, tyro.conf.arg(name="with", help=cuda_layers.HELP)] = None
    # Keep numbers in the memory of the host and of the device, and copy between them.
    matrix: bool = False
    samples: cli.Count = 1000  # Points to learn.
    hidden: cli.Size = 30  # Units of the hidden layer.
    epochs: cli.Count = 20  # Passes over the points.
    batch_size: cli.Count = 100  # Points per step.
    lr: cli.Number = 2.0  # Learning rate at the start; it falls linearly.

    def check(self) -> None:
        if self.with_ and self.device == "cuda":
            raise ConfigError("--with executes CUDA C++ on the CPU; drop --device cuda")
        super().check()


def train(
    network: Network,
    loss: BinaryCrossEntropy,
    samples: Samples,
    flags: Flags,
    place: Callable[[Tensor], Tensor],
) -> None:
    """Train by gradient descent.

    Args:
        place: returns a batch's points in the memory that the kernels read.
    """
    for epoch in console.progress(range(1, flags.epochs + 1), "epochs"):
        lr = flags.lr * (1 - (epoch - 1) / flags.epochs)
        for x, labels, _ in batches(samples, flags.batch_size, seed=flags.seed, epoch=epoch):
            loss.forward(network.forward(place(x)), labels)
            network.backward(loss.backward())
            network.step(lr)


def read_kernels(path: Path | None) -> Kernels:
    """Return the kernels that take part, and say which of them are a reader's."""
    if path is None:
        return Kernels()
    kernels = Kernels(cuda_layers.read(path))
    print(f"{path.name}: {', '.join(kernels.own)}; the other kernels are this lesson's")
    return kernels


def main(flags: Flags) -> None:
    torch.manual_seed(flags.seed)
    kernels, copies = read_kernels(flags.with_), Counter[str]()
    check_kernels(kernels)
    rows = count(1000 if kernels.own else 4000, flags.hidden, kernels)
    with join_world("cpu" if kernels.own else flags.device, alone=True) as world:
        device = world.device
        drawn_on = torch.device("cpu") if flags.matrix else device
        samples, test = (
            draw(n, 2 * flags.seed + i, device=drawn_on)
            for i, n in enumerate((flags.samples, 2500))
        )
        place = partial(copy_to_device, device=device, copies=copies) if flags.matrix else same
        torch.manual_seed(flags.seed)  # whatever the counted kernels have drawn
        network = build_network(flags.hidden, drawn_on, kernels)
        loss = BinaryCrossEntropy(kernels)
        start = time.perf_counter()
        # Without a GPU, the launches of a block `with emulate` are executed on the CPU.
        with nullcontext() if device.type == "cuda" else emulate("sm_90") as gpu:
            if flags.matrix:
                use_matrices(network, place)
            check_network(network, loss, samples, gpu, place)
            train(network, loss, samples, flags, place)
            p = network.forward(place(test.features))
            test_loss = loss.forward(p, test.labels).item()
            if flags.matrix:
                p = copy_to_host(p, copies)
        check_finite("the test loss", test_loss)
        seconds = time.perf_counter() - start
        accuracy = ((p[:, 0] > 0.5) == test.labels).double().mean().item()
    if gpu is not None:
        check_faults(gpu)
        print(f"{len(gpu.launches):,} launches were executed on the CPU, without a fault")
    for direction, size in copies.items():
        print(f"matrices: {size:,} bytes from {direction}")
    figures: console.Row = {"test_accuracy": accuracy, "test_loss": test_loss}
    console.write_metrics(flags.metrics, [*rows, figures])
    print(console.last_line(accuracy, test_loss, seconds, 1, device.type))


if __name__ == "__main__":
    cli.main(main, Flags)
