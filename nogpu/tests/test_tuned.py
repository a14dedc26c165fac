# SPDX-License-Identifier: MIT
"""Autotuned kernels: the first configuration that fits, and all of them."""

import re

import pytest
import torch
import triton
import triton.language as tl
from triton.compiler.errors import CompilationError

from nogpu import command, emulate


@triton.autotune([triton.Config({"B": size}) for size in (4096, 512, 256)], key=["n"])
@triton.jit
def twice_kernel(x, out, n, B: tl.constexpr):
    tl.static_assert(B <= 1024)
    i = tl.program_id(0) * B + tl.arange(0, B)
    is_mine = i < n if B != 256 else i < n + 1  # FAULT: of one configuration
    tl.store(out + i, 2 * tl.load(x + i, is_mine), is_mine)


# No thread has copies of another one's elements: those might be read after they are overwritten.
CONFIGURATIONS = [triton.Config({"B": 128}), triton.Config({"B": 256})]
TILES = [triton.Config({"B": 128, "K": 128}, num_stages=4), triton.Config({"B": 16, "K": 32})]


@triton.autotune(TILES, key=["n"], reset_to_zero=["total"])
@triton.jit
def square_kernel(x, out, total, n, B: tl.constexpr, K: tl.constexpr):
    i, k = tl.arange(0, B), tl.arange(0, K)
    row, col = tl.program_id(0) * B + i[:, None], tl.program_id(1) * B + i[None, :]
    acc = tl.zeros((B, B), tl.float32)
    for s in range(0, n, K):
        a, b = tl.load(x + row * n + s + k[None, :]), tl.load(x + (s + k[:, None]) * n + col)
        acc = tl.dot(a, b, acc, input_precision="tf32")
    tl.store(out + row * n + col, acc)
    tl.atomic_add(total, 1.0)


def in_place(**mended):
    """A kernel that doubles x in place, and puts the sum of what was there into total."""

    @triton.autotune(CONFIGURATIONS, key=["n"], **mended)
    @triton.jit
    def double_kernel(x, total, n, B: tl.constexpr):
        i = tl.program_id(0) * B + tl.arange(0, B)
        values = tl.load(x + i, i < n, other=0.0)
        tl.store(x + i, 2 * values, i < n)
        tl.atomic_add(total, tl.sum(values))

    return double_kernel


def launch_twice(n: int = 1000) -> tuple[torch.Tensor, torch.Tensor]:
    x, out = torch.randn(n), torch.zeros(n)
    twice_kernel[lambda m: (triton.cdiv(n, m["B"]),)](x, out, n)
    return x, out


def test_a_configuration_that_does_not_compile_is_left_out_in_one_line():
    with emulate() as gpu:
        for _ in range(2):
            x, out = launch_twice()
            assert torch.equal(out, 2 * x)
    assert [launch.configuration[:6] for launch in gpu.launches] == ["B: 512"] * 2
    (note,) = gpu.faults
    assert (note.kind, note.name) == ("note", "configuration left out")
    assert str(note).startswith("· note: configuration left out in twice_kernel: B: 4096, ")
    assert str(note).endswith("tl.static_assert(B <= 1024) fails")


def test_all_configurations_are_executed_from_the_same_memory():
    """And the fault of the last one, which is not taken, is named with it."""
    with emulate(configurations="all") as gpu:
        x, out = launch_twice()
    assert torch.equal(out, 2 * x)
    assert [one.configuration[:6] for one in gpu.launches] == ["B: 256", "B: 512"]
    errors = gpu.report().errors
    assert {fault.name for fault in errors} == {"out of bounds"}
    assert all("B: 256" in fault.configuration in str(fault) for fault in errors)


def test_all_configurations_that_have_a_fault_are_named():
    """Of 100 elements the mask of 1000 lets each configuration write more."""
    x, out = torch.randn(1000), torch.zeros(100)
    with emulate(configurations="all") as gpu:
        twice_kernel[lambda m: (triton.cdiv(1000, m["B"]),)](x, out, 1000)
    faults = [one for one in gpu.faults if one.other_configurations]
    for fault in faults:
        first, *others = (one[:6] for one in (fault.configuration, *fault.other_configurations))
        assert (fault.name, first, others) == ("out of bounds", "B: 256", ["B: 512"])
        assert str(fault).count("and configuration B: 512, ") == 1
    assert faults


def of_sizes(*sizes):
    """A kernel that copies, with a configuration of each size."""

    @triton.autotune([triton.Config({"B": size}) for size in sizes], key=["n"])
    @triton.jit
    def copy_kernel(x, out, n, B: tl.constexpr):
        i = tl.program_id(0) * B + tl.arange(0, B)
        tl.store(out + i, tl.load(x + i, i < n), i < n)

    def copy(n: int = 600) -> bool:
        x, out = torch.randn(n), torch.zeros(n)
        copy_kernel[lambda given: (triton.cdiv(n, given["B"]),)](x, out, n)
        return torch.equal(out, x)

    return copy


@pytest.mark.parametrize("sizes", [(100, 128, 256), (128, 100, 256), (128, 256, 100)])
def test_a_configuration_that_raises_is_named_where_all_are_asked_for(sizes):
    """On a GPU it ends the program, as Triton's autotuner passes its error on."""
    with emulate(configurations="all") as gpu:
        assert of_sizes(*sizes)()
    assert sorted(one.configuration[:6] for one in gpu.launches) == ["B: 128", "B: 256"]
    (fault,) = gpu.faults
    assert (fault.kind, fault.name) == ("error", "failed configuration")
    assert str(fault).startswith(
        "✗ error: failed configuration in copy_kernel: B: 100, num_warps: "
    )
    assert "i = tl.program_id(0) * B + tl.arange(0, B) fails: arange's range must be" in str(fault)
    assert "\n" not in str(fault)


def test_a_first_configuration_that_raises_ends_the_program():
    for configurations, sizes in (("first", (100, 128)), ("all", (100, 200))):
        with (
            pytest.raises(CompilationError, match="must be a power of 2"),
            emulate(configurations=configurations),
        ):
            of_sizes(*sizes)()


@pytest.mark.slow
@pytest.mark.parametrize("configurations", ["first", "all"])
def test_a_configuration_that_does_not_fit_is_left_out(configurations):
    x = torch.randint(-8, 9, (128, 128)).float()  # whose products and sums are exact
    out, total = torch.empty(128, 128), torch.full((1,), 5.0)
    with emulate(configurations=configurations) as gpu:
        square_kernel[lambda m: (128 // m["B"], 128 // m["B"])](x, out, total, 128)
    assert torch.equal(out, x @ x)
    assert total.item() == 64
    assert ["out of resource: shared memory" in one.message for one in gpu.faults] == [True]


@pytest.mark.slow
def test_the_command_executes_all_configurations(tmp_path, capsys):
    script = tmp_path / "script.py"
    code = "from test_tuned import launch_twice\nlaunch_twice()"
    script.write_text(code, "utf-8")
    assert command.main([str(script)]) == 0
    assert "1 note\n" in capsys.readouterr().out
    assert command.main(["--configurations", "all", str(script)]) == 1
    assert "configuration B: 256" in capsys.readouterr().out


def test_another_word_for_configurations_is_refused():
    with pytest.raises(ValueError, match="expected 'first' or 'all'"), emulate(configurations="x"):
        raise AssertionError("not reached")


def own_hook(arguments, **how):
    """A hook of the program, which may undo anything."""


@pytest.mark.parametrize(
    "kernel, named",
    [
        (in_place(), ["total", "x"]),
        (in_place(reset_to_zero=["total"]), ["x"]),
        (in_place(restore_value=["x"]), ["total"]),
        (in_place(restore_value=["x"], reset_to_zero=["total"]), []),
        (in_place(pre_hook=own_hook), []),
    ],
)
def test_a_kernel_in_place_whose_tensors_are_not_restored(kernel, named):
    """On a GPU the first launch is wrong, as its trials change them, too (triton#6547)."""
    x, total = torch.arange(200.0), torch.zeros(1)
    with emulate(schedules="all") as gpu:
        for count in (1, 2):
            kernel[lambda given: (triton.cdiv(200, given["B"]),)](x, total, 200)
            assert torch.equal(x, 2**count * torch.arange(200.0))
    assert total.item() == 3 * 19_900
    assert len(gpu.launches) == 2
    found = [re.findall(r'restore_value=\["(\w+)"\]', one.message) for one in gpu.faults]
    assert sorted(found) == [[name] for name in named]
    assert all((one.name, one.count) == ("tuned in place", 1) for one in gpu.faults)
