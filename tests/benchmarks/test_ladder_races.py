# SPDX-License-Identifier: MIT
"""Races of threads, which Numba's simulator executes one after the other: named, or not there."""

import inspect
import re
from collections.abc import Callable
from unittest.mock import patch

import numpy as np
import pytest

pytest.importorskip("numba", reason="Numba has the simulator")

from numba import cuda, float32, int32
from numba.cuda.simulator import kernel as kernels

from benchmarks.ladder import emulated, races
from benchmarks.ladder.cases import make_case
from benchmarks.ladder.student import Entry


@pytest.fixture(autouse=True)
def by_the_simulator(monkeypatch) -> None:
    """Where numba-cuda is installed, nogpu would execute the kernels."""
    monkeypatch.setenv(emulated.SIMULATOR, "1")


def launch(kernel: Callable[..., None], grid: object, block: object, *arrays: np.ndarray) -> None:
    kernels.FakeCUDAKernel(kernel, device=False)[grid, block](*map(kernels.FakeCUDAArray, arrays))


def matrix(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


# Kernels of arrays x (n, k) and out, with which threads are right


def a_number_each(x, out):
    i, j = cuda.grid(2)
    if i < x.shape[0] and j < x.shape[0]:
        total = 0.0
        row = x[i]
        for p in range(x.shape[1]):
            total += row[p] * x[j, p]
        out[i, j] = total


def one_block(x, out):
    n = x.shape[0]
    for at in range(cuda.threadIdx.x, n * n, cuda.blockDim.x):
        i, j = at // n, at % n
        out[i, j] = 0
        for p in range(x.shape[1]):
            out[i, j] += x[i, p] * x[j, p]


def by_tiles(x, out):
    a = cuda.shared.array((4, 4), float32)
    b = cuda.shared.array(shape=(4, 4), dtype=float32)
    i, j = cuda.grid(2)
    tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
    total = 0.0
    for first in range(0, x.shape[1], 4):
        a[tx, ty] = x[i, first + ty]
        b[tx, ty] = x[4 * cuda.blockIdx.y + tx, first + ty]
        cuda.syncthreads()
        for p in range(4):
            total += a[tx, p] * b[ty, p]
        cuda.syncthreads()
    out[i, j] = total


def sum_by_a_tree(x, out):
    part = cuda.shared.array(16, float32)
    at = cuda.threadIdx.x
    part[at] = x[cuda.blockIdx.x, at]
    half = 8
    while half:
        cuda.syncthreads()
        if at < half:
            part[at] += part[at + half]
        half //= 2
    if at == 0:
        cuda.atomic.add(out, (0, 0), part[0])


def histogram(x, out):
    counts = cuda.shared.array(2, int32)
    at = cuda.threadIdx.x
    if at < 2:
        counts[at] = 0
    cuda.syncthreads()
    cuda.atomic.add(counts, int(x[0, at] > 0), 1)
    cuda.syncthreads()
    if at < 2:
        cuda.atomic.add(out, (0, at), counts[at])


def the_same_number(x, out):
    if x[0, 0] != 0:
        out[0, 0] = 1
    out[1 + cuda.threadIdx.x, cuda.blockIdx.x] = out[0, 0]


def counted_at_a_barrier(x, out):
    at = cuda.threadIdx.x
    out[0, at] = cuda.syncthreads_count(x[0, at] > 0)
    cuda.syncthreads()
    out[1, at] = out[0, at - 1]  # from the other end at thread 0


RIGHT = [
    (a_number_each, (2, 2), (4, 4)),
    (one_block, 1, 32),
    (by_tiles, (2, 2), (4, 4)),
    (sum_by_a_tree, 8, 16),
    (histogram, 2, 16),
    (the_same_number, 2, 4),
    (counted_at_a_barrier, 1, 8),
]

# Kernels that race at the lines marked so


def a_column_each(x, out):
    for p in range(cuda.threadIdx.x, x.shape[1], 1024):
        out[0, 0] += x[0, p]  # race


def by_all_threads(x, out):
    for p in range(cuda.threadIdx.x, x.shape[1], cuda.blockDim.x):
        for i in range(x.shape[0]):
            for j in range(x.shape[0]):
                out[i, j] += x[i, p] * x[j, p]  # race


def without_the_first_barrier(x, out):
    part = cuda.shared.array(16, float32)
    at = cuda.threadIdx.x
    part[at] = x[0, at]  # race
    out[0, at] = part[(at + 1) % 16]  # race
    cuda.syncthreads()


def without_the_second_barrier(x, out):
    part = cuda.shared.array(16, float32)
    at = cuda.threadIdx.x
    total = 0.0
    for i in range(x.shape[0]):
        part[at] = x[i, at]  # race
        cuda.syncthreads()
        total += part[(at + 1) % 16]  # race
    out[0, at] = total


def read_before_all_have_added(x, out):
    cuda.atomic.add(out, (0, 0), x[0, cuda.threadIdx.x])  # race
    if cuda.threadIdx.x == 0:
        out[0, 1] = out[0, 0]  # race


def blocks_that_wait_for_their_own_threads(x, out):
    if cuda.threadIdx.x == 0:
        out[cuda.blockIdx.x, 0] = x[cuda.blockIdx.x, 0]  # race
    cuda.syncthreads()
    out[cuda.blockIdx.x, 1] = out[0, 0]  # race


def two_threads_at_a_number(x, out):
    at = cuda.threadIdx.x
    out[0, at // 2] = x[0, at]  # race


def rows_that_overlap(x, out):
    out[cuda.threadIdx.x // 2] = cuda.threadIdx.x  # race


def moved_in_place(x, out):
    at = cuda.grid(1)
    if at < 7:
        x[0, at] = x[0, at + 1]  # race


RACING = [
    (a_column_each, 1, 16),
    (by_all_threads, 1, 16),
    (without_the_first_barrier, 1, 16),
    (without_the_second_barrier, 1, 16),
    (read_before_all_have_added, 1, 16),
    (blocks_that_wait_for_their_own_threads, 8, 4),
    (two_threads_at_a_number, 1, 16),
    (rows_that_overlap, 1, 4),
    (moved_in_place, 2, 4),
]


def seen_races(kernel: Callable[..., None], grid: object, block: object) -> races.Races:
    with emulated.simulated([], records=True) as found:
        launch(kernel, grid, block, matrix(8, 16), np.zeros((8, 16), np.float32))
    return found


@pytest.mark.parametrize("kernel, grid, block", RIGHT)
def test_threads_that_are_ordered_do_not_race(kernel, grid, block):
    found = seen_races(kernel, grid, block)
    assert (found.first, found.unseen, found.is_whole) == ("", "", True)
    assert found.elements
    assert found.verdict("8×16") == "no race of threads was seen at 8×16"


@pytest.mark.parametrize("kernel, grid, block", RACING)
def test_a_race_is_named_with_both_lines(kernel, grid, block):
    lines, first = inspect.getsourcelines(kernel)
    marked = {str(first + i) for i, line in enumerate(lines) if line.endswith("# race\n")}
    found = re.fullmatch(
        r"test_ladder_races.py, line (\d+): a race: thread \S+ of block \S+ "
        r"(?:reads|writes|changes, atomically,) (part\[\d+\]|(?:out|x|an array)\[\d+(?:, \d+)?\]), "
        r"which thread \S+ of block \S+ (?:reads|writes|changes, atomically,) in line (\d+), and "
        r"on a GPU nothing orders the two; .*(cuda.syncthreads|another kernel).*",
        seen_races(kernel, grid, block).first,
    )
    assert found, kernel
    assert {found[1], found[3]} == marked
    is_between_blocks = kernel in (blocks_that_wait_for_their_own_threads, moved_in_place)
    assert is_between_blocks or found[4] == "cuda.syncthreads"


def test_the_name_and_the_threads_of_a_race_are_those_of_the_kernel():
    assert seen_races(a_column_each, 1, 16).first.startswith(
        f"test_ladder_races.py, line {a_column_each.__code__.co_firstlineno + 2}: a race: thread 1 "
        "of block 0 reads out[0, 0], which thread 0 of block 0 writes in line "
    )


def test_a_launch_comes_after_the_one_before():
    x, out = matrix(8, 16), np.zeros((8, 16), np.float32)
    with emulated.simulated([], records=True) as found:
        launch(one_block, 1, 32, x, out)
        launch(moved_in_place, 1, 1, out, x)  # one thread, at what others have written
    assert found.first == ""


def by_the_last_block(x, out):
    if cuda.threadIdx.x == 0:
        out[0, cuda.blockIdx.x] = x[cuda.blockIdx.x, 0]
        cuda.threadfence()
        if cuda.atomic.add(out, (1, 0), 1) == cuda.gridDim.x - 1:
            for i in range(cuda.gridDim.x):
                out[2, 0] += out[0, i]


def test_races_are_not_looked_for_where_a_kernel_has_fences():
    found = seen_races(by_the_last_block, 8, 1)
    assert found.verdict("8×16") == (
        "races are not looked for, since it orders threads by cuda.threadfence"
    )


def gathered(x, out):
    i = cuda.grid(1)
    if i < 8:
        out[i, 0] = x[ORDER[i], 0]


ORDER = np.arange(8, dtype=np.int32)[::-1].copy()


def test_an_index_of_numpy_is_followed():
    assert seen_races(gathered, 1, 8).first == ""


def by_a_grid_barrier(x, out):
    out[cuda.grid(1), 0] = 1.0
    cuda.cg.this_grid().sync()
    out[cuda.grid(1), 1] = out[7 - cuda.grid(1), 0]


def test_what_is_not_followed_is_said():
    assert seen_races(by_a_grid_barrier, 1, 8).verdict("8×16") == (
        "races are not looked for, since it orders threads by cuda.cg.this_grid().sync"
    )


def test_elements_beyond_the_most_are_not_recorded_and_the_verdict_says_so():
    with patch.object(races, "MOST", 10):
        found = seen_races(a_number_each, (2, 2), (4, 4))
        assert len(found.elements) == 10
        assert found.verdict("8×16") == "no race of threads was seen at 8×16, among 10 elements"


@pytest.mark.parametrize("kernel, is_right", [(by_all_threads, False), (one_block, True)])
def test_a_function_whose_values_are_right_by_luck_is_not_right(kernel, is_right):
    def matmul_transpose_gpu(x: np.ndarray) -> np.ndarray:
        out = np.zeros((len(x), len(x)), x.dtype)
        launch(kernel, 1, 64, x, out)
        return out

    case = make_case("matmul_t", (7, 5))
    entry = Entry("my.py", "matmul_transpose_gpu", matmul_transpose_gpu, case, case)
    if is_right:
        assert str(emulated.execute(entry)) == (
            "right in Numba's simulator at 7×5, which tells no time; no race of threads was seen "
            "at 7×5"
        )
        return
    with pytest.raises(emulated.Raced, match=r"^test_ladder_races.py, line \d+: a race: thread 1 "):
        emulated.execute(entry)
