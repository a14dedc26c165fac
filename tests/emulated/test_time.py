# SPDX-License-Identifier: MIT
"""Estimates of times are held to those that GPUs measured, and to what launches count."""

import csv
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest

pytest.importorskip("triton", reason="the estimate reads kernels that Triton compiles")

import torch
import triton
import triton.language as tl
from products import MEASURED, timed_on_h100

from nogpu import DATA_SHEETS, emulate
from nogpu.record.time import ESTIMATE_ACCURACY, FITTED, Fitted, Work, estimate, shown, work_of
from torchpar.kernels.device import GPUS
from torchpar.kernels.linear_sigmoid import LINEAR_SIGMOID, linear_sigmoid
from torchpar.kernels.matmul_t import SYMMETRIC_MATMUL, matmul_t
from torchpar.kernels.rule import Tiles
from torchpar.testing.estimate import estimate_tiles, work_of_tiles

RESULTS = MEASURED / "nvidia-h200"
PATTERN = re.compile(r"(\d+)x(\d+)x(\d+) w(\d+) s(\d+) (\w+)")


class Group(NamedTuple):
    """The measured µs of an operator's configurations for one shape."""

    operator: str
    kind: str
    sizes: Sequence[int]
    times: dict[Tiles, float]
    gpu: str = "H200"

    def estimates(self, fitted: Fitted = FITTED) -> list[float]:
        is_layer = self.operator == "linear_sigmoid"
        return [
            estimate_tiles(
                LINEAR_SIGMOID if is_layer else SYMMETRIC_MATMUL,
                self.kind,
                tiles,
                self.sizes,
                self.gpu,
                with_c=self.operator == "symmetric_matmul",
                fitted=fitted,
            ).microseconds
            for tiles in self.times
        ]


def groups() -> list[Group]:
    """The groups of at least three configurations, in the order of their files."""
    found: dict[tuple[str, ...], Group] = {}
    for name in ("operators.csv", "operators-queued.csv"):
        with (RESULTS / name).open() as file:
            for row in csv.DictReader(file):
                match = PATTERN.fullmatch(row["contestant"])
                if match is None or row["ok"] != "True" or not row["mode"].startswith("forward"):
                    continue
                key = name, row["operator"], row["mode"], row["shape"], row["dtype"]
                sizes = [int(row[size] or 1) for size in ("m", "n", "k", "batch")]
                group = found.setdefault(key, Group(row["operator"], row["dtype"], sizes, {}))
                tiles = Tiles(*map(int, match.groups()[:5]), match[6])
                group.times[tiles] = 1e3 * float(row["p20_ms"])
    return [group for group in found.values() if len(group.times) >= 3]


def groups_of_h100() -> list[Group]:
    found: dict[object, Group] = {}
    for name, dtype, sizes, row in timed_on_h100():
        if match := PATTERN.fullmatch(row["contestant"]):
            group = found.setdefault(
                (name, dtype, sizes), Group(row["operator"], dtype, sizes, {}, "H100")
            )
            tiles = Tiles(*map(int, match.groups()[:5]), match[6])
            group.times[tiles] = 1e3 * float(row["p20_ms"])
    return list(found.values())


def ranks(values: Sequence[float]) -> np.ndarray:
    """The ranks of numbers; equal ones share the mean of theirs."""
    numbers = np.asarray(values)
    below = (numbers[:, None] > numbers).sum(1)
    return below + ((numbers[:, None] == numbers).sum(1) - 1) / 2


def errors(chosen: Sequence[Group], fitted: Fitted = FITTED) -> tuple[float, float, float]:
    """The median and the 90th percentile of relative errors, and the median correlation of ranks.

    The correlation is that of groups with at least eight configurations.
    """
    relative, correlations = [], []
    for group in chosen:
        guessed, times = np.array(group.estimates(fitted)), np.array([*group.times.values()])
        relative += np.abs(guessed / times - 1).tolist()
        if len(times) >= 8:
            correlations.append(np.corrcoef(ranks(guessed), ranks(times))[0, 1])
    median, most = np.quantile(relative, (0.5, 0.9))
    return float(median), float(most), float(np.median(correlations))


# Every third group was left out when `Fitted` was fitted.
LEFT_OUT = groups()[2::3]


def test_estimates_of_groups_left_out_of_the_fit_are_near_an_h200s_times():
    assert len(groups()) == 60
    assert len(LEFT_OUT) == 20
    median, most, correlation = errors(LEFT_OUT)
    assert median <= 0.075, median
    assert most <= 0.185, most
    assert correlation >= 0.89, correlation


def test_estimates_for_another_gpu_are_near_its_times():
    """No time of an H100 was known to the fit."""
    found = groups_of_h100()
    assert sum(len(group.times) for group in found) == 204
    median, most, correlation = errors(found)
    assert median <= 0.075, median
    assert most <= 0.20, most
    assert correlation >= 0.92, correlation
    median, most, _ = errors([group._replace(gpu="A100") for group in found])
    assert median > 0.5
    assert most > 1


@pytest.mark.parametrize(
    "name, factor", [("load", 2), ("stored", 2), ("l2", 0.5), ("copy", 4), ("launch", 2)]
)
def test_another_number_makes_the_errors_larger(name, factor):
    """Each of these numbers matters: the check above would reject another one."""
    median, most, correlation = errors(
        LEFT_OUT, FITTED._replace(**{name: factor * getattr(FITTED, name)})
    )
    assert median > 0.075 or most > 0.185 or correlation < 0.89


def test_each_term_can_bind():
    """A launch that does much of one thing is bound by that, and takes its data sheet's time."""
    nothing = Work(132, 1, 132, 1, 1, {}, False, {}, 0, 0, 0, 0, 0, 0, 0)
    assert estimate(nothing, "H200").binds == "launch"
    sheet = DATA_SHEETS["H200"]
    cases = {
        "memory": (nothing._replace(memory=4.8e9), 1e3),
        "tensor cores": (nothing._replace(tensor={"f16": 989.4e9}, has_wgmma=True), 1e3),
        "floating point": (nothing._replace(flops={"f32": 66.9e9}), 1e3),
        "special functions": (nothing._replace(special=16 * 132 * sheet.ghz * 1e6), 1e3),
        "L2 cache": (nothing._replace(loaded=64 * 132 * sheet.ghz * 1e6), 1e3),
        "shared memory": (nothing._replace(shared=128 * 132 * sheet.ghz * 1e6), 1e3),
        "instructions": (nothing._replace(instructions=4 * 132 * sheet.ghz * 1e6), 1e3),
    }
    for name, (work, at_least) in cases.items():
        found = estimate(work, "H200")
        assert found.binds == name, found
        assert at_least <= found.terms[name] < 1.6 * at_least
        assert found.microseconds > found.terms[name]
    waits = nothing._replace(steps=1000)
    assert estimate(waits, "H200").binds == "latency"
    # 133 tiles take two rounds of 132 multiprocessors.
    assert estimate(waits._replace(tiles=133), "H200").terms["latency"] == pytest.approx(
        2 * estimate(waits._replace(tiles=132), "H200").terms["latency"]
    )


@triton.jit
def scale(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, 2 * tl.load(x_ptr + i, mask=i < n), mask=i < n)


def test_a_launch_has_its_estimate_on_each_gpu():
    x = torch.randn(4096)
    with emulate("sm_90") as gpu:
        scale[(4,)](x, torch.empty_like(x), 4096, BLOCK=1024)
    (launch,) = gpu.launches
    assert list(launch.time) == ["H100", "H200", "A100", "B200"]
    work = work_of(launch)
    assert work.tiles == 4
    assert work.loaded == work.stored == 4096 * 4
    assert work.memory == 2 * 4096 * 4
    assert launch.time["H200"].binds == "launch"
    memory = launch.time["A100"].terms["memory"] / launch.time["H200"].terms["memory"]
    assert memory == pytest.approx(4.8 / 2.039)

    text = gpu.report().timed()
    assert text.startswith("scale[4×1×1]: BLOCK=1024, 4 warps\n")
    assert ESTIMATE_ACCURACY in text
    row = next(line for line in text.splitlines() if line.startswith("H200"))
    assert shown(launch.time["H200"].microseconds) in row


def test_a_launch_of_clusters_has_no_estimate_on_a_gpu_without_them():
    x = torch.randn(4096)
    with emulate("sm_90") as gpu:
        scale[(2,)](x, torch.empty_like(x), 4096, BLOCK=2048, num_ctas=2)
    assert list(gpu.launches[0].time) == ["H100", "H200", "B200"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "tiles", ["64x64x64 w4 s4 pointers", "64x64x64 w4 s4 tma", "128x128x64 w8 s4 tma"]
)
@pytest.mark.parametrize("is_layer", [False, True])
def test_counts_of_a_configuration_are_those_of_its_launch(tiles, is_layer):
    match = PATTERN.fullmatch(tiles)
    one = Tiles(*map(int, match.groups()[:5]), match[6])
    m, n, k = 256, 256, 512
    x, weight = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
    with emulate("sm_90") as gpu:
        if is_layer:
            linear_sigmoid(x, weight, None, "ieee", None, tiles=one)
        else:
            matmul_t(x, "ieee", None, tiles=one)
    executed = work_of(gpu.launches[0])
    product = LINEAR_SIGMOID if is_layer else SYMMETRIC_MATMUL
    derived = work_of_tiles(product, "bfloat16", one, (m, n, k, 1), GPUS["H200"])
    assert executed.tensor == derived.tensor
    assert executed.has_wgmma == derived.has_wgmma
    assert executed.loaded == derived.loaded
    assert executed.copies == derived.copies
    assert executed.special == derived.special or not is_layer  # of a tile's place
    assert executed.tiles * executed.steps == derived.tiles * derived.steps
    assert executed.buffers == derived.buffers
    assert executed.resident == derived.resident or one.by_tma
    # A tile on the diagonal is stored once.
    rows = m // one.block_m
    once = 0 if is_layer else rows * one.block_m**2 * 2
    assert executed.stored == derived.stored - once
