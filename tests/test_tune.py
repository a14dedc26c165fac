# SPDX-License-Identifier: MIT
"""The choice of tiles, their tables, and `python -m torchpar tune`, with times that are made up."""

import json
import math
import re
import runpy
import sys
import warnings
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton compiles the configurations")

from torchpar import tune
from torchpar.kernels import folders, tiles
from torchpar.kernels.tiles import Tiles
from torchpar.ops.matrix import mirrored
from torchpar.tune import Problem

DEVICE = tiles.Device("NVIDIA Test/9 GPU", 90, 132)
WIDE, LARGE = Tiles(128, 256, 64, 8, 4, "tma"), Tiles(128, 128, 64, 8, 4, "tma")
NARROW = Tiles(64, 128, 64, 4, 4, "tma")
SQUARE, SMALL = Tiles(128, 128, 64, 8, 3), Tiles(64, 64, 64, 4, 3)
UNALIGNED, SPLIT = Tiles(64, 64, 32, 8, 3), Tiles(64, 64, 64, 4, 4, "split_k")
ENTRIES = [[512, 512, 512, 1, None], [2048, 2048, 2048, 1, SMALL], [4096, 4096, 4096, 1, WIDE]]
KINDS = [pytest.param(*kind[:2], id=name) for name, kind in tiles.KINDS.items()]
FAST, BROKEN = tiles.configurations("symmetric_product", torch.bfloat16, "ieee", 90)[:2]
BEST = {Problem("bfloat16", "symmetric_product", 1024, 1024, 1024): FAST}
SMALL_PROBLEM = Problem("bfloat16", "symmetric_product", 256, 256, 256)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The user's folder, of a user with the device of the test and no shipped tiles."""
    monkeypatch.setenv("TORCHPAR_CACHE", str(tmp_path / "user"))
    monkeypatch.setattr(folders, "SHIPPED", tmp_path / "shipped" / "tuned")
    monkeypatch.setattr(tiles, "device", lambda t: DEVICE)
    tiles.forget_tables()
    yield tmp_path
    tiles.forget_tables()


def table(entries=ENTRIES, kernel: str = "symmetric_product") -> dict:
    return {"device": DEVICE.name, "tiles": {kernel: {"bfloat16": entries}}}


def operand(n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(n, k, dtype=dtype, device="meta")


def chosen(n: int, k: int, batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> Tiles | None:
    return tiles.choose_tiles("symmetric_product", "ieee", (n, n, k, batch), operand(n, k, dtype))


def default(n: int) -> Tiles:
    return tiles.default_tiles("symmetric_product", "ieee", (n, n, n, 1), operand(n, n))


@pytest.mark.parametrize("capability", [0, 80, 90, 100, 120])
@pytest.mark.parametrize("dtype, precision", KINDS)
@pytest.mark.parametrize("kernel", tiles.KERNELS)
def test_configurations_are_those_that_a_device_can_run(kernel, dtype, precision, capability):
    found = tiles.configurations(kernel, dtype, precision, capability)
    assert 2 <= len(set(found)) == len(found) <= 8
    for one in found:
        assert all(size.bit_count() == 1 for size in one[:4]), "a power of 2, as Triton takes them"
        elements = (one.num_stages - (capability == 0)) * (one.block_m + one.block_n) * one.block_k
        if one.variant == "tma":  # which stores from shared memory
            elements += one.block_m**2 if kernel == "symmetric_product" else one.block_m * one.block_n // 2
        shared = tiles.resident_programs(one) * elements if one.variant == "tma" else elements
        limit = {0: 65536, 80: 166912, 120: 101376}.get(capability, 232448)  # by the makers' documents
        assert shared * dtype.itemsize <= limit
        assert kernel == "linear_sigmoid" or one.block_n == one.block_m or one.variant == "tma"
    similar = {80: 87, 100: 103}.get(capability, capability)
    assert tiles.configurations(kernel, dtype, precision, similar) == found
    variants = {"pointers"} if kernel == "symmetric_product" else {"pointers", "split_k"}
    if capability in (90, 100) and (dtype.itemsize == 2 or precision == "tf32"):
        variants.add("tma")
    assert {one.variant for one in found} == variants


@pytest.mark.parametrize(
    "kernel, sizes, expected",
    [  # waves · cost of a tile, on 132 multiprocessors
        ("symmetric_product", (4096, 4096, 4096, 1), WIDE),  # 264 units: 2 · 57344, squares 4 · 32768
        ("symmetric_product", (4224, 4224, 4224, 1), LARGE),  # 561 units: 5 · 32768 beside 3 · 57344
        ("symmetric_product", (2048, 2048, 2048, 1), NARROW),  # 264 units: 2 · 20480
        ("symmetric_product", (512, 512, 512, 1), SMALL),  # 36 units: 12288
        ("symmetric_product", (512, 512, 512, 64), LARGE),  # 640 units: 5 · 32768 beside 3 · 57344
        ("linear_sigmoid", (8192, 4096, 4096, 1), WIDE),  # 8 · 57344 beside 16 · 32768
        ("linear_sigmoid", (512, 4096, 4096, 1), LARGE),  # 32768 beside 57344, 2 · 20480, 4 · 12288
        # Neither few rows nor a result whose rows begin at no 16 bytes take the tiles for unaligned operands.
        ("linear_sigmoid", (64, 1001, 784, 1), SMALL),  # a second launch would delay few columns of x
        ("linear_sigmoid", (64, 1024, 8192, 1), SPLIT),
        ("linear_sigmoid", (8192, 1001, 784, 1), NARROW),  # wider ones would spill
        ("linear_sigmoid", (64, 1024, 1000, 1), Tiles(64, 64, 128, 4, 3, "tma")),  # single loads by pointers
    ],
)
def test_default_has_the_least_estimate(monkeypatch, kernel, sizes, expected):
    m, n, k, batch = sizes
    choice = kernel, "ieee", sizes, operand(m, k), operand(n, k)
    assert tiles.default_tiles(*choice) == expected
    tiles.save_table(DEVICE, table([[m, 1024, k, batch, WIDE]], kernel=kernel))
    assert tiles.choose_tiles(*choice) == (expected if n % 8 else WIDE)
    monkeypatch.setattr(tiles, "device", lambda t: DEVICE._replace(capability=80))
    assert tiles.default_tiles(*choice).variant != "tma"


@pytest.mark.parametrize(
    "n, stride, expected, by_pointers",
    [
        (4096, (1024, 1), WIDE, SQUARE),
        (4096, (1, 4096), WIDE, SQUARE),
        (4096, (1032, 1), WIDE, UNALIGNED),  # Triton asks for multiples of 16 elements
        (4096, (1028, 1), UNALIGNED, UNALIGNED),  # rows begin on 8 bytes
        (4095, (1024, 1), UNALIGNED, UNALIGNED),  # the result's rows begin 14 bytes off
        (4096, (8 * 1024, 8), UNALIGNED, UNALIGNED),  # neither rows nor columns are contiguous
        (4096, (0, 1), SQUARE, SQUARE),  # one row, expanded
    ],
)
def test_tiles_are_those_that_the_operands_allow(n, stride, expected, by_pointers):
    x = torch.empty(2**25, dtype=torch.bfloat16, device="meta").as_strided((n, 1024), stride)
    sizes = (n, n, 1024, 1)
    assert tiles.default_tiles("symmetric_product", "ieee", sizes, x) == expected
    tiles.save_table(DEVICE, table([[*sizes, WIDE]]))
    assert tiles.choose_tiles("symmetric_product", "ieee", sizes, x) == expected
    assert tiles.choose_tiles("symmetric_product", "ieee", sizes, x, tma=False) == by_pointers


def test_sizes_that_no_descriptor_has_go_by_pointers():
    for m, n, k in ((0, 64, 64), (1, 12288, 4096), (8, 2**31, 16)):
        tiles.save_table(DEVICE, table([[max(m, 1), n, k, 1, WIDE]], kernel="linear_sigmoid"))
        for choose in (tiles.default_tiles, tiles.choose_tiles):
            found = choose("linear_sigmoid", "ieee", (m, n, k, 1), operand(m, k), operand(n, k))
            assert found.variant == "pointers"


def test_saved_table_is_what_is_chosen(folder):
    path = tiles.save_table(DEVICE, table())
    assert path == folder / "user" / "nvidia-test-9-gpu.json"
    assert tiles.load_table(DEVICE) == json.loads(json.dumps(table()))
    found = [chosen(n, n) for n in (128, 512, 1024, 1040, 2048, 4096, 16384)]
    assert found == [None] * 3 + [SMALL] * 2 + [WIDE] * 2
    assert chosen(1024, 2048) == SMALL, "1 octave of k nearer to 2048"
    assert chosen(64, 64) == default(64), "too far from what was measured"
    assert list(path.parent.iterdir()) == [path], "something else was left behind"
    tiles.save_table(DEVICE, table([ENTRIES[0], [512, 512, 512, 64, SQUARE]]))
    assert [chosen(512, 512, batch) for batch in (1, 8, 9, 64)] == [None, None, SQUARE, SQUARE]
    assert chosen(512, 512, dtype=torch.float16) == SMALL


def test_choice_by_a_symbolic_size_adds_no_guard():
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    tiles.save_table(DEVICE, table())
    env = ShapeEnv()
    symbol = env.create_unspecified_symbol(1040, source=torch._dynamo.source.ConstantSource("n"))
    n = env.create_symintnode(symbol, hint=1040)
    x = operand(1024, 1024)
    assert tiles.choose_tiles("symmetric_product", "ieee", (n, n, n, 1), x) == SMALL
    assert tiles.split_k(SPLIT, DEVICE, 64, 64, n) == (1, n), "the number of programs would be a guard"
    assert tiles._hint(env.create_unbacked_symint()) == 1024
    assert all("Mod" in str(guard.expr) for guard in env.guards), "not of alignment"
    assert n > 1000
    assert not all("Mod" in str(guard.expr) for guard in env.guards), "a guard would have been seen"


def test_folders_of_tables(folder, monkeypatch):
    """A checkout keeps its tables beside the kernels; the user's come first."""
    monkeypatch.delenv("TORCHPAR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    (folder / "shipped").mkdir()
    name = tiles.file_name(DEVICE.name)
    own, shipped = (folder / path / "tuned" / name for path in ("cache/torchpar", "shipped"))
    assert tiles.save_table(DEVICE, table()) == own
    (folder / "pyproject.toml").touch()
    assert tiles.save_table(DEVICE, table()) == own, "the user's, which comes first, would hide it"
    own.unlink()
    assert tiles.save_table(DEVICE, table([ENTRIES[1]])) == shipped
    assert chosen(4096, 4096) == SMALL
    own.write_text(json.dumps(table()))
    tiles.forget_tables()
    assert chosen(4096, 4096) == WIDE


@pytest.mark.parametrize(
    "text, wrong",
    [
        ("{", "Expecting"),
        (json.dumps(table() | {"device": "Other"}), "the table is of 'Other', expected 'NVIDIA Test/9 GPU'"),
        (json.dumps(table(kernel="sort")), "sort of bfloat16 is not among symmetric_product"),
        (json.dumps(table([8])), "not the layout of a table"),
        (json.dumps(table([[8, 8, 0, 1, SMALL]])), "'pointers']], expected four sizes above 0"),
        (json.dumps(table([[8, 8, 8, 1, SPLIT]])), "a configuration of this device"),
    ],
)
def test_wrong_file_is_named_and_not_used(folder, text, wrong):
    path = folder / "user" / tiles.file_name(DEVICE.name)
    path.parent.mkdir()
    path.write_text(text)
    with pytest.warns(UserWarning, match=re.escape(wrong)) as caught:
        assert chosen(4096, 4096) == default(4096)
    assert str(path) in str(caught[0].message)
    assert "python -m torchpar tune" in str(caught[0].message)
    with warnings.catch_warnings(action="error"):
        assert chosen(2048, 2048) == default(2048)  # once said is enough


# The check of a result, and the times


@pytest.mark.parametrize(
    "problem",
    [
        Problem("bfloat16", "symmetric_product", 129, 129, 65, 3),
        Problem("float64", "linear_sigmoid", 33, 129, 65),
    ],
    ids=str,
)
def test_a_right_result_passes_and_a_wrong_one_fails(problem, monkeypatch):
    # The library's products are mirrored by a kernel, which runs on a GPU alone.
    monkeypatch.setattr("torchpar.kernels.matmul_t.mirror", lambda c, wrap: mirrored(c))
    _, library, _, exact = tune.prepare(problem, torch.device("cpu"))
    expected = tune.reference(exact, library(), problem.k)
    symmetric = problem.kernel == "symmetric_product"
    right = library()
    tune.check(right, expected, problem, symmetric)
    inaccurate, unwritten, asymmetric = right.clone(), right.clone(), right.clone()
    error = (library() - exact).abs().max()
    own = exact.abs().max() * math.sqrt(problem.k) * torch.finfo(torch.float64).eps / 2
    inaccurate[..., 7, 7] = exact[..., 7, 7] + 4 * (error + own)
    unwritten.flatten()[-1] = math.nan
    asymmetric[..., 0, 1] = right[..., 0, 1].nextafter(torch.tensor(math.inf, dtype=right.dtype))
    for wrong, message in (
        (inaccurate, "an error of"),
        (unwritten, "an error of nan"),
        *([(asymmetric, "not symmetric")] if symmetric else []),
    ):
        with pytest.raises(ValueError, match=message):
            tune.check(wrong, expected, problem, symmetric)


def test_configurations_and_the_library_are_timed_in_turn_and_checked_first(monkeypatch, capsys):
    problem = Problem("tf32", "linear_sigmoid", 33, 33, 20)
    _, library, out, exact = tune.prepare(problem, torch.device("cpu"))
    precisions = []

    def do_bench(call, *args, **options) -> float:
        call()
        precisions.append(torch.backends.cuda.matmul.fp32_precision)
        return float(len(precisions))

    def launch(wrap, tiles) -> None:
        out.copy_(library())
        out[..., 1, 1] += tiles == BROKEN

    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    monkeypatch.setattr(tune, "prepare", lambda *_: (launch, library, out, exact))
    monkeypatch.setattr(tiles, "configurations", lambda *_: [FAST, BROKEN])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert tune.tune_problem(problem, DEVICE, "cpu") == [33, 33, 20, 1, None]
    assert precisions == ["tf32"] * 2 * tune.ROUNDS
    wrong, row = capsys.readouterr().out.splitlines()
    name = f"{problem}, {tune.describe(BROKEN)}"
    assert wrong.startswith(f"{name}: ValueError: {tune.describe(BROKEN)} has an error of 1.0e+00")
    assert row == f"{problem}: library 3 ms, {tune.describe(FAST)} 4 ms"  # the second of five rounds


# The command


@pytest.fixture
def table_of_gpu(folder, monkeypatch):
    """The table of a GPU that is present in name only. The library wins on problems that BEST lacks."""
    tune_problem = Mock(side_effect=lambda problem, *_: [*problem[2:], BEST.get(problem)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "tune_problem", tune_problem)
    monkeypatch.setattr(tiles, "KINDS", {"bfloat16": tiles.KINDS["bfloat16"]})
    path = folder / "user" / tiles.file_name(DEVICE.name)
    return SimpleNamespace(path=path, tune_problem=tune_problem)


def run_tune(*sizes: int, minutes: float = 10.0) -> int:
    return tune.tune(sizes or (1024, 256), minutes)


def measured(table) -> dict[int, list]:
    found = json.loads(table.path.read_text())
    return {m: tiles for m, *_, tiles in found["tiles"]["symmetric_product"]["bfloat16"]}


def test_tune_measures_what_its_table_lacks_and_the_launchers_read_it(table_of_gpu, capsys):
    assert (run_tune(1024), run_tune()) == (0, 0)
    assert [call.args[0].n for call in table_of_gpu.tune_problem.mock_calls] == [1024, 1024, 256, 256]
    assert measured(table_of_gpu) == {1024: list(FAST), 256: None}
    assert chosen(1000, 1000) == FAST
    assert chosen(64, 64) is None
    found = json.loads(table_of_gpu.path.read_text())
    assert (found["device"], found["torch"]) == (DEVICE.name, torch.__version__)
    assert {"triton", "kernels", "date"} < found.keys()
    assert capsys.readouterr().out.splitlines()[-2:] == [str(table_of_gpu.path), "complete"]


def test_a_table_of_other_versions_is_not_continued(table_of_gpu):
    for key in ("torch", "triton", "kernels"):
        run_tune()
        table_of_gpu.path.write_text(json.dumps(json.loads(table_of_gpu.path.read_text()) | {key: "other"}))
        run_tune(512)
        assert measured(table_of_gpu) == {512: None}


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_run_that_ends_early_keeps_what_it_has_measured(table_of_gpu, capsys, monkeypatch, interrupted):
    table_of_gpu.tune_problem.side_effect = [[1024, 1024, 1024, 1, FAST], KeyboardInterrupt]
    seconds = iter((0.0, 1.0, 2.0 if interrupted else 61.0))
    monkeypatch.setattr(tune.time, "monotonic", lambda: next(seconds))
    with pytest.raises(KeyboardInterrupt) if interrupted else nullcontext():
        assert run_tune(minutes=1) == 0
    assert measured(table_of_gpu) == {1024: list(FAST)}
    # two of linear_sigmoid among them
    assert "left to measure: 3; the same command continues" in capsys.readouterr().out


def test_a_problem_that_cannot_be_measured_is_left_out_unless_the_gpu_fails(folder, capsys, monkeypatch):
    too_large = torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB.")
    x, fails = torch.ones(1, 1), Mock(side_effect=RuntimeError("PassManager::run failed"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(tune, "prepare", Mock(side_effect=too_large))
    assert run_tune() == 1
    assert f"{SMALL_PROBLEM}: left out, OutOfMemoryError: CUDA out of memory.\n" in capsys.readouterr().out
    monkeypatch.setattr(tune, "prepare", lambda *_: (fails, lambda: x, x, x.double()))
    assert run_tune() == 1
    printed = capsys.readouterr().out
    assert f"{tune.describe(BROKEN)}: RuntimeError: PassManager::run failed" in printed
    assert f"{SMALL_PROBLEM}: left out, no configuration could be used" in printed
    monkeypatch.setattr(torch.cuda, "synchronize", Mock(side_effect=RuntimeError("an illegal memory access")))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run_tune()


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "PyTorch finds no GPU, expected one to tune the kernels on"),
        (["--sizes", "512", "0"], "--sizes is [512, 0], expected positive multiples of 16"),
    ],
)
def test_the_command_line(monkeypatch, capsys, options, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["torchpar", "tune", *options])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("torchpar", run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"python -m torchpar tune: error: {message}\n"
