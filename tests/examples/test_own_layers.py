# SPDX-License-Identifier: MIT
"""The lesson of layers by one's own kernels: what it refuses, counts and learns."""

import math
import re

import pytest
import torch
from commands import LAST_LINE, lesson, rows_of

pytest.importorskip("tyro", reason="tyro reads the flags")
pytest.importorskip("triton", reason="the kernels are Triton's")

import own_layers
import triton
import triton.language as tl
from train_by_hand import draw

from nogpu import emulate
from torchpar.errors import ConfigError

CASES = own_layers.cases


@triton.jit
def bias_by_stores_kernel(g, db, n, outputs, TILE: tl.constexpr):
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)[:, None]
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = (row < n) & (column < outputs)[None, :]
    total = tl.sum(tl.load(g + row * outputs + column[None, :], inside, 0.0), 0)
    tl.store(db + column, tl.load(db + column, column < outputs) + total, column < outputs)


@triton.jit
def bias_without_mask_kernel(g, db, n, outputs, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(n):
        total += tl.load(g + k * outputs + column)
    tl.store(db + column, total, column < outputs)


def only(monkeypatch: pytest.MonkeyPatch, name: str, kernel: object = None) -> None:
    """Let the lesson have one kernel, which ``kernel`` replaces."""

    def cases(*sizes: int) -> list[own_layers.Case]:
        (case,) = (one for one in CASES(*sizes) if one.kernel is getattr(own_layers, name))
        return [case._replace(kernel=kernel or case.kernel)]

    monkeypatch.setattr(own_layers, "cases", cases)


def test_a_bias_gradient_by_atomics_is_right_and_by_stores_is_not(monkeypatch, capsys):
    torch.manual_seed(0)
    only(monkeypatch, "bias_by_atomics_kernel")
    own_layers.check_kernels()
    assert capsys.readouterr().out == "2 launches of 1 kernels are right, and break no rule\n"
    only(monkeypatch, "bias_by_atomics_kernel", bias_by_stores_kernel)
    with pytest.raises(ConfigError, match=r"^bias_by_stores_kernel: .*; mend the kernel$"):
        own_layers.check_kernels()


def test_a_missing_mask_is_named(monkeypatch):
    only(monkeypatch, "bias_by_one_program_kernel", bias_without_mask_kernel)
    with pytest.raises(ConfigError, match=r"^bias_without_mask_kernel: bounds: .*outside of g"):
        own_layers.check_kernels()


@triton.jit
def relu_with_a_typo_kernel(x, y, size, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.relu(tl.load(x + i, i < size)), i < size)


@triton.jit
def relu_with_a_slope_kernel(x, y, size, slope, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x_i = tl.load(x + i, i < size)
    tl.store(y + i, tl.where(x_i > 0, x_i, slope * x_i), i < size)


@triton.jit
def positive(x):
    return tl.where(x > nothing, x, 0.0)  # noqa: F821


@triton.jit
def relu_of_a_function_kernel(x, y, size, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, positive(tl.load(x + i, i < size)), i < size)


@triton.jit
def relu_of_another_length_kernel(x, y, size, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, i < size) + tl.zeros((BLOCK + 1,), tl.float32), i < size)


@pytest.mark.parametrize(
    "kernel, within, line, reason",
    [
        (relu_with_a_typo_kernel, relu_with_a_typo_kernel, 3, "no attribute 'relu'"),
        (relu_of_a_function_kernel, positive, 2, "nothing is not defined"),
        (relu_of_another_length_kernel, relu_of_another_length_kernel, 3, "power of 2"),
    ],
)
def test_a_kernel_that_triton_cannot_compile_is_named_with_the_line_of_the_file(
    monkeypatch, kernel, within, line, reason
):
    only(monkeypatch, "relu_kernel", kernel)
    place = rf"test_own_layers.py:{within.fn.__code__.co_firstlineno + line}"  # from @triton.jit on
    with pytest.raises(ConfigError, match=rf"cannot compile it at {place}: .*{reason}.*; mend the"):
        own_layers.check_kernels()
    with pytest.raises(ConfigError, match=rf"^{kernel.__name__}: Triton cannot compile it.*$"):
        own_layers.check_kernels()


def test_an_argument_that_no_launch_gives_is_named(monkeypatch):
    only(monkeypatch, "relu_kernel", relu_with_a_slope_kernel)
    with pytest.raises(ConfigError, match=r"^relu_with_a_slope_kernel\(.*: .*'slope'; mend its"):
        own_layers.check_kernels()


@triton.jit
def weight_by_atomics_kernel(g, x, dw, n, inputs, outputs, TILE: tl.constexpr):
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)[:, None]
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)[None, :]
    inside = (row < outputs) & (column < inputs)
    for k in range(n):
        term = tl.load(g + k * outputs + row, row < outputs, 0.0) * tl.load(
            x + k * inputs + column, column < inputs, 0.0
        )
        tl.atomic_add(dw + row * inputs + column, term, inside)


def test_a_kernel_that_adds_to_a_result_that_nothing_set_is_wrong(monkeypatch):
    only(monkeypatch, "linear_weight_kernel", weight_by_atomics_kernel)
    # Memory that was never written is often 0, with which the sums would be right
    monkeypatch.setattr(torch, "empty_like", torch.zeros_like)
    with pytest.raises(ConfigError, match=r"^weight_by_atomics_kernel: values: dw: NaN.*must be 0"):
        own_layers.check_kernels()


def test_a_launch_of_too_few_blocks_is_named_before_its_values(monkeypatch):
    monkeypatch.setattr(own_layers, "blocks", lambda size: (1,))
    network, loss = (
        own_layers.build_network(20, torch.device("cpu")),
        own_layers.BinaryCrossEntropy(),
    )
    with (
        emulate() as gpu,
        pytest.raises(
            ConfigError,
            match=r"^own_layers.py:\d+, \w+_kernel: uninitialised memory: .*; launched at "
            r"own_layers.py:\d+; mend the kernel or its launch$",
        ),
    ):
        own_layers.check_network(network, loss, draw(50, 0), gpu)


@pytest.mark.parametrize(
    "layer, method, wrong, found",
    [
        ("ReLU", "forward", lambda *_: None, r"returns None, .* a tensor of torch\.float32; mend"),
        ("ReLU", "backward", lambda *_: None, r"returns None, .* a tensor of shape \(5, 3\) and"),
        ("ReLU", "backward", lambda self, g: g.mul_(2), r"changes its input: \[.* of shape \(5, 3"),
        ("Linear", "gradients", lambda _: {}, r"returns those of \[\], .*\['weight', 'bias'\]"),
    ],
)
def test_the_layer_of_a_wrong_result_is_named(monkeypatch, layer, method, wrong, found):
    def mine(*arguments):
        return wrong(*arguments)

    mine.__name__ = method
    monkeypatch.setattr(getattr(own_layers, layer), method, mine)
    network, loss = (
        own_layers.build_network(3, torch.device("cpu")),
        own_layers.BinaryCrossEntropy(),
    )
    with (
        emulate() as gpu,
        pytest.raises(ConfigError, match=rf"^{layer}\.{method} in own_layers\.py {found}"),
    ):
        own_layers.check_network(network, loss, draw(5, 0), gpu)


@pytest.mark.parametrize(
    "source, says",
    [
        ("total = tl.dot(a, b, total)", "TF32"),
        ('total = tl.dot(a, b, total, input_precision="ieee")', ""),
        ("tl.atomic_add(dw + i, total)", "must be 0"),
        ("tl.store(dw + i, total)", ""),
    ],
)
def test_wrong_values_come_with_a_hint_where_the_source_suggests_one(source, says):
    found = own_layers.hint(source)
    assert says in found
    assert bool(found) == bool(says)


@pytest.mark.slow
def test_the_programs_and_atomics_of_a_bias_are_counted(monkeypatch):
    n, hidden = 100, 30
    only(monkeypatch, "bias_by_atomics_kernel")
    (atomics,) = own_layers.count(n, hidden)
    only(monkeypatch, "bias_by_one_program_kernel")
    (one,) = own_layers.count(n, hidden)
    assert (one["blocks"], one["atomics"]) == (1, 0)
    # 7 × 2 tiles of 16 × 16, each of which adds its 16 sums by one warp
    assert (atomics["blocks"], atomics["atomics"]) == (14, 14)
    assert one["per_warp"] > 10 * n > 10 * atomics["per_warp"]
    # One program loads its rows one after the other: each takes a latency, which a bound leaves out
    assert float(one["about"]) > 5 * float(atomics["about"])
    assert float(one["least"]) < float(one["about"]) / 100


@pytest.mark.slow
def test_the_kernels_learn_the_quadrants(tmp_path):
    flags = "--device", "cpu", "--epochs", "4", "--metrics", str(tmp_path / "metrics")
    code, out, err = lesson("own_layers", *flags)
    assert (code, err) == (0, "")
    assert "22 launches of 11 kernels are right" in out
    assert re.fullmatch(LAST_LINE, out.splitlines()[-1])
    *kernels, last = rows_of(tmp_path / "metrics")
    assert len(kernels) == 11
    assert last["test_accuracy"] > 0.98
    assert last["test_loss"] < math.log(2) / 3  # that of a guess is ln 2
