# SPDX-License-Identifier: MIT
"""The corpus of CUDA C++: how each program of the folder cuda_programs is launched.

The first comment of a file says "right", or "wrong" or "warning" with the fault's name. A comment
``// NAMED`` stands at each line that a report may name.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import nogpu.cuda

FOLDER = Path(__file__).with_name("cuda_programs")
Pairs = Sequence[tuple[Any, Any]]  # what a launch computed, and what is right
rng = np.random.default_rng(0)


def floats(*shape: int) -> Any:
    """Return small whole numbers, whose sums are exact."""
    return rng.integers(-8, 9, shape).astype(np.float32)


def vector_add(k: Any) -> Pairs:
    x, y, out = floats(1000), floats(1000), np.zeros(1000, np.float32)
    k["vector_add"][4, 256](x, y, out, 1000)
    return [(out, x + y)]


def product_naive(k: Any) -> Pairs:
    a, b, c = floats(37, 37), floats(37, 37), np.zeros((37, 37), np.float32)
    k["product"][(3, 3), (16, 16)](a, b, c, 37)
    return [(c, a @ b)]


def product_tiled(k: Any) -> Pairs:
    a, b, c = floats(37, 37), floats(37, 37), np.zeros((37, 37), np.float32)
    k["product<float, 16>"][(3, 3), (16, 16)](a, b, c, 37)
    d = np.zeros((37, 37))
    wide = [a.astype(np.float64), b.astype(np.float64)]
    k["product<double, 8>"][(5, 5), (8, 8)](*wide, d, 37)
    return [(c, a @ b), (d, a @ b)]


def block_sum(k: Any) -> Pairs:
    x, out = torch.arange(1000.0), torch.zeros(1)
    k["block_sum"][3, 128, 4 * 128](x, out, 1000)
    return [(out, [499500.0])]


def warp_scan(k: Any) -> Pairs:
    x, out, again = np.arange(32, dtype=np.int32), *np.zeros((2, 32), np.int32)
    k["warp_scan"][1, 32](x, out, again)
    return [(out, x.cumsum()), (again, x.cumsum())]


def three_dimensions(k: Any) -> Pairs:
    x = floats(5, 6, 7)
    out = np.zeros_like(x)
    k["average"][(2, 3, 3), (4, 2, 2)](x, out, 7, 6, 5)
    want = np.stack([x[max(0, n - 1) : n + 2].mean(0) for n in range(5)])
    return [(out.round(3), want.round(3))]


def collatz(k: Any) -> Pairs:
    steps, values = np.zeros((2, 100), np.int32)
    k["collatz"][2, 64](steps, values, 100)
    want_steps, want_values = [], []
    for i in range(100):
        x, count, bins = i + 1, 0, [0] * 8
        while x != 1:
            bins[x % 8] += 1
            x = 3 * x + 1 if x % 2 else x // 2
            count += 1
        chosen = [bins[0], bins[1] * 3, bins[2] - 7, bins[i % 8] << 2, 11, -bins[5], bins[6] ^ 5]
        chosen += [100 // (bins[7] + 1), 8, bins[1] + bins[2], -1, -1]
        want_steps.append(count)
        want_values.append(chosen[i % 12])
    return [(steps, want_steps), (values, want_values)]


def structures(k: Any) -> Pairs:
    line = np.zeros(1, [("first", "i4"), ("slope", "f4"), ("offset", "f8")])
    line[0] = 3, 2.5, 10.0
    out, number = np.zeros(40), np.zeros(1, np.uint32)
    i = np.arange(40)
    want = (2.5 * (3 + i) + 20) * np.array([1, 2, -3.5, 0.25])[i % 4]
    k["structures"][1, 64](out, number, line[0], 40)
    first = int(number[0])
    k["structures"][1, 64](out, number, line[0], 40)  # the variable keeps its value
    return [(out, want), ([first, int(number[0])], [45, 85])]


def halves(k: Any) -> Pairs:
    x, y = torch.arange(64.0).half() / 4, torch.zeros(64).half()
    pairs, z = torch.arange(64.0).half(), torch.zeros(64).bfloat16()
    k["halves"][2, 32](x, y, pairs, z, 64)
    return [
        (y, 2 * x + 0.5),
        (z.float(), (3 * x.float()).bfloat16().float()),
        (pairs, torch.arange(64.0) + 1),
    ]


def votes(k: Any) -> Pairs:
    out = np.zeros(448, np.int32)
    k["votes"][1, 48](out)
    t = np.arange(48)

    def mask(of: Any) -> Any:
        masks = [sum(1 << int(i % 32) for i in t if i // 32 == w and of(i)) for w in (0, 1)]
        return np.array(masks, np.uint32).view(np.int32)[t // 32]

    same = [sum(1 << int(i % 32) for i in t if i // 32 == j // 32 and i % 5 == j % 5) for j in t]
    return [
        (out[:48], mask(lambda i: i % 3 == 0)),
        (out[64:112], np.array([sum(range(32)), sum(range(32, 48))])[t // 32]),
        (out[128:176], np.array(same, np.uint32).view(np.int32)),
        (out[192:240], np.full(48, 7)),
        (out[256:304], np.where(t < 32, 2, 1)),
        (out[320:368], mask(lambda _: True)),
        (out[384:432], np.full(48, 3)),
    ]


def histogram(k: Any) -> Pairs:
    x, counts = rng.integers(0, 16, 1000).astype(np.int32), np.zeros(16, np.int32)
    k["histogram"][3, 96](x, counts, 1000)
    return [(counts, np.bincount(x, minlength=16))]


def lock(k: Any) -> Pairs:
    taken, total = np.zeros(1, np.int32), np.zeros(1, np.int32)
    k["lock"][2, 32](taken, total)
    return [(total, [2 * sum(range(32))]), (taken, [0])]


def greeting(k: Any) -> Pairs:
    x, y = floats(8, 4), np.zeros((8, 4), np.float32)
    k["greeting"][2, 4](x, y)
    return [(y, x[:, ::-1])]


def missing_barrier(k: Any) -> Pairs:
    k["reversed"][1, 128](floats(128), np.zeros(128, np.float32))
    return []


def barrier_in_branch(k: Any) -> Pairs:
    k["halved"][1, 64](floats(64))
    return []


def barriers_apart(k: Any) -> Pairs:
    k["apart"][1, 64](floats(64))
    return []


def early_return(k: Any) -> Pairs:
    k["early"][1, 64](floats(64), 40)
    return []


def index_outside(k: Any) -> Pairs:
    k["differences"][2, 64](floats(100), np.zeros(100, np.float32), 100)
    return []


def shared_index_outside(k: Any) -> Pairs:
    k["columns"][1, 8](floats(8))
    return []


def unwritten_shared(k: Any) -> Pairs:
    k["total"][1, 32](np.arange(32, dtype=np.int32), np.zeros(1, np.int32))
    return []


def blocks_add(k: Any) -> Pairs:
    k["bias"][4, 32](floats(4), np.zeros(1, np.float32))
    return []


def threads_add(k: Any) -> Pairs:
    k["bias"][1, 32](np.arange(32, dtype=np.float32), np.zeros(1, np.float32))
    return []


def lock_step(k: Any) -> Pairs:
    k["warp_sum"][1, 32](floats(32), np.zeros(1, np.float32))
    return []


def shuffle_in_branch(k: Any) -> Pairs:
    k["shuffled"][1, 32](np.zeros(32, np.int32))
    return []


def masks_apart(k: Any) -> Pairs:
    k["apart"][1, 32](np.zeros(32, np.int32))
    return []


def shuffle_of_nobody(k: Any) -> Pairs:
    k["sum"][1, 20](floats(20), np.zeros(1, np.float32))
    return []


def local_index_outside(k: Any) -> Pairs:
    x = np.arange(32, dtype=np.int32) % 3
    k["digits"][1, 32](x, np.zeros(32, np.int32), 4)
    return []


def failed_assertion(k: Any) -> Pairs:
    k["checked"][1, 32](np.arange(32, dtype=np.int32), np.zeros(32, np.int32), 20)
    return []


def misaligned(k: Any) -> Pairs:
    k["vectors"][1, 4](floats(32), floats(16))
    return []


def unwritten_global(k: Any) -> Pairs:
    k["added"][1, 32](torch.ones(32), torch.empty(32))
    return []


def appended_by_lanes(k: Any) -> Pairs:
    expert = rng.integers(0, 4, 100).astype(np.int32)
    k["places"][1, 32](expert, 100, 2, np.zeros(100, np.int32))
    return []


def reused_in_a_loop(k: Any) -> Pairs:
    k["states"][1, 128](floats(3, 32), np.zeros((3, 128), np.float32), 3)
    return []


PROGRAMS: dict[str, Callable[[Any], Pairs]] = {
    path.stem: globals()[path.stem] for path in sorted(FOLDER.glob("*.cu"))
}


def said_of(name: str) -> tuple[str, str, list[int]]:
    """Return whether a program is "right", "wrong" or a "warning", its fault, and its lines."""
    lines = (FOLDER / f"{name}.cu").read_text("utf-8").splitlines()
    kind, fault, *_ = [part.strip() for part in lines[0].removeprefix("//").split(":")]
    return kind, fault, [n for n, line in enumerate(lines, 1) if "// NAMED" in line]


def loaded(name: str) -> Any:
    """Return the kernels of a program, which is given the same numbers each time."""
    global rng
    rng = np.random.default_rng(0)
    return nogpu.cuda.load(FOLDER / f"{name}.cu")


def launched(name: str) -> tuple[Any, Pairs]:
    """Launch a program; return the emulator's faults, and what it computed."""
    with nogpu.emulate() as gpu:
        pairs = PROGRAMS[name](loaded(name))
    return gpu, pairs
