# SPDX-License-Identifier: MIT
"""Tests of `python -m torchpar tune`, with times that are made up."""

import json
import math
import runpy
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton compiles the configurations")

from torchpar.errors import ConfigError
from torchpar.kernels import folders, tiles
from torchpar.ops.matrix import mirrored
from torchpar.tune import command, measure
from torchpar.tune.measure import Problem

DEVICE = tiles.Device("NVIDIA Test", 90, 132)
FAST, SLOW, BROKEN = tiles.configurations("symmetric_product", torch.bfloat16, "ieee", 90)[:3]
LARGE = Problem("symmetric_product", "bfloat16", 1024, 1024, 1024)
SMALL = Problem("symmetric_product", "bfloat16", 256, 256, 256)
CONTINUES = "left to measure: 3; the same command continues"  # two of linear_sigmoid among them


def made_up(problem: Problem, configurations, device):
    """FAST wins on LARGE, the library on all others."""
    return {FAST: 1.0, SLOW: 2.0, measure.LIBRARY: 1.5 if problem == LARGE else 0.5}


# The check of a result, and the times


@pytest.mark.parametrize(
    "problem",
    [
        Problem("symmetric_product", "bfloat16", 129, 129, 65, 3),
        Problem("linear_sigmoid", "float64", 33, 129, 65),
    ],
    ids=str,
)
def test_a_right_result_passes_and_a_wrong_one_fails(problem, monkeypatch):
    # The library's products are mirrored by a kernel, which runs on a GPU alone.
    monkeypatch.setattr("torchpar.kernels.matmul_t.mirror", lambda c, wrap: mirrored(c))
    prepared = measure.prepare(problem, torch.device("cpu"))
    out, reference = prepared.out, prepared.reference
    symmetric = problem.kernel == "symmetric_product"
    right = reference.maximum(reference.mT) if symmetric else reference  # BLAS may round them differently
    measure.check_result(prepared, lambda: out.copy_(right), problem)
    error = (prepared.library() - reference).abs().max()
    reference_error = reference.abs().max() * math.sqrt(problem.k) * torch.finfo(torch.float64).eps / 2

    def inaccurate() -> None:
        out.copy_(right)
        out[..., 7, 7] = reference[..., 7, 7] + 4 * (error + reference_error)

    def one_element_unwritten() -> None:
        out.flatten()[:-1] = reference.flatten()[:-1].to(out.dtype)

    def asymmetric() -> None:
        out.copy_(right)
        out[..., 0, 1] = out[..., 0, 1].nextafter(torch.tensor(math.inf, dtype=out.dtype))

    for wrong in (inaccurate, one_element_unwritten):
        with pytest.raises(ValueError, match="an error of"):
            measure.check_result(prepared, wrong, problem)
    if symmetric:
        with pytest.raises(ValueError, match="not symmetric"):
            measure.check_result(prepared, asymmetric, problem)


def test_configurations_and_the_library_are_timed_in_turn_and_checked_first(monkeypatch, capsys):
    problem = Problem("linear_sigmoid", "tf32", 33, 33, 20)
    prepared = measure.prepare(problem, torch.device("cpu"))
    precisions = []

    def do_bench(call, *args, **options) -> float:
        call()
        precisions.append(torch.backends.cuda.matmul.fp32_precision)
        return float(len(precisions))

    def launch(wrap, tiles) -> None:
        prepared.out.copy_(prepared.library())
        prepared.out[..., 1, 1] += tiles == BROKEN

    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    monkeypatch.setattr(measure, "prepare", lambda *_: prepared._replace(launch=launch))
    before = torch.backends.cuda.matmul.fp32_precision
    times = measure.measure(problem, [FAST, BROKEN], torch.device("cpu"))
    assert torch.backends.cuda.matmul.fp32_precision == before
    assert set(precisions) == {"tf32"}
    middle = 2 * (measure.ROUNDS // 2)
    assert times == {measure.LIBRARY: middle + 1.0, FAST: middle + 2.0}
    assert len(precisions) == 2 * measure.ROUNDS
    printed = capsys.readouterr().out
    assert printed.startswith(f"{problem}, {measure.describe(BROKEN)}: ValueError: an error of 1.0e+00")


# The command


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """The tables of a GPU that is present in name only; `made_up` has its times."""
    monkeypatch.setenv("TORCHPAR_CACHE", str(tmp_path))
    monkeypatch.setattr(folders, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(tiles, "device", lambda t: DEVICE)
    monkeypatch.setattr(command, "measure", made_up)
    tiles.forget_tables()
    yield tmp_path / "nvidia-test.json"
    tiles.forget_tables()


def tune(*arguments: str, sizes: tuple[int, ...] = (1024, 256)) -> int:
    return command.tune(command.parse(["--dtypes=bfloat16", "--sizes", *map(str, sizes), *arguments]))


def measured(path) -> dict[int, list]:
    table = json.loads(path.read_text())
    return {m: tiles for m, *_, tiles in table["tiles"]["symmetric_product"]["bfloat16"]}


def test_tune_writes_a_table_that_the_launchers_read(gpu, capsys):
    assert tune() == 0
    assert measured(gpu) == {1024: list(FAST), 256: None}
    x = torch.empty(64, 64, dtype=torch.bfloat16, device="meta")
    assert tiles.choose_tiles("symmetric_product", "ieee", (1000, 1000, 1000, 1), x) == FAST
    assert tiles.choose_tiles("symmetric_product", "ieee", (64, 64, 64, 1), x) is None
    table = json.loads(gpu.read_text())
    assert (table["device"], table["torch"]) == ("NVIDIA Test", torch.__version__)
    assert {"triton", "kernels", "date"} < table.keys()
    out = capsys.readouterr().out.splitlines()
    fast = measure.describe(FAST)
    slow = measure.describe(SLOW)
    assert f"{LARGE}: {fast} 1 ms, library 1.5 ms, {slow} 2 ms" in out
    assert f"{SMALL}: library 0.5 ms, {fast} 1 ms, {slow} 2 ms" in out
    assert out[-2:] == ["complete", str(gpu)]


def test_a_problem_is_measured_once_and_by_the_variants_asked_for(gpu, monkeypatch):
    tried = []

    def others(problem, configurations, device):
        tried.append((problem.kernel, problem.n, {tiles.variant for tiles in configurations}))
        return {SLOW: 2.0, measure.LIBRARY: 1.0}

    tune(sizes=(1024,))
    monkeypatch.setattr(command, "measure", others)
    tune()
    tune("--variants", "pointers", sizes=(512,))
    assert measured(gpu) == {1024: list(FAST), 256: None, 512: None}
    of_symmetric = [one[1:] for one in tried if one[0] == "symmetric_product"]
    assert of_symmetric == [(256, {"pointers", "tma"}), (512, {"pointers"})]


def test_a_table_of_other_versions_is_not_continued(gpu):
    for key in ("torch", "triton", "kernels"):
        tune()
        gpu.write_text(json.dumps(json.loads(gpu.read_text()) | {key: "other"}))
        tune(sizes=(512,))
        assert measured(gpu) == {512: None}


def test_time_ends_between_problems(gpu, capsys, monkeypatch):
    seconds = iter((0.0, 1.0, 61.0))
    monkeypatch.setattr(command.time, "monotonic", lambda: next(seconds))
    assert tune("--minutes", "1") == 0
    assert measured(gpu) == {1024: list(FAST)}
    assert CONTINUES in capsys.readouterr().out


def test_an_interrupted_run_keeps_what_it_has_measured(gpu, capsys, monkeypatch):
    def interrupted(problem, *rest):
        if problem != LARGE:
            raise KeyboardInterrupt
        return made_up(problem, *rest)

    monkeypatch.setattr(command, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune()
    assert measured(gpu) == {1024: list(FAST)}
    assert CONTINUES in capsys.readouterr().out


def test_a_problem_that_cannot_be_measured_is_left_out_unless_the_gpu_fails(gpu, capsys, monkeypatch):
    def fails(problem, *rest):
        """On the smallest problem without memory, and on the middle one for all configurations."""
        if problem == SMALL:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB.")
        times = made_up(problem, *rest)
        return {name: ms for name, ms in times.items() if problem == LARGE or isinstance(name, str)}

    def illegal_access() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(command, "measure", fails)
    assert tune(sizes=(1024, 512, 256)) == 1
    assert measured(gpu) == {1024: list(FAST)}
    printed = capsys.readouterr().out
    assert f"{SMALL}: left out, OutOfMemoryError: CUDA out of memory.\n" in printed
    assert "512x512x512: left out, no configuration could be used" in printed
    monkeypatch.setattr(torch.cuda, "synchronize", illegal_access)
    assert command.main(["--dtypes=bfloat16", "--sizes", "256"]) == 2
    assert capsys.readouterr().err.startswith(f"python -m torchpar tune: error: the GPU fails after {SMALL}")


def test_the_most_important_problems_come_first():
    problems = command.list_problems(command.parse([]))
    assert problems[0] == Problem("symmetric_product", "bfloat16", 4096, 4096, 4096)
    assert list(dict.fromkeys(p.kind for p in problems)) == list(tiles.KINDS)


@pytest.mark.parametrize("flag, value", [("minutes", "0"), ("minutes", "nan"), ("sizes", "512 0")])
def test_flags_out_of_bounds_are_refused(flag, value):
    with pytest.raises(ConfigError, match=f"--{flag} is .*, expected"):
        command.tune(command.parse([f"--{flag}", *value.split()]))


@pytest.mark.parametrize(
    "arguments, status, text",
    [
        pytest.param(
            ["tune", "--device=cuda"],
            2,
            "python -m torchpar tune: error: PyTorch finds no GPU, expected one to tune the kernels on",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (["tuna"], 2, "error: no command 'tuna', expected tune"),
        ([], 2, "error: no command given"),
        (["--help"], 0, "usage: python -m torchpar COMMAND"),
    ],
)
def test_the_command_line(monkeypatch, capsys, arguments, status, text):
    monkeypatch.setattr(sys, "argv", ["torchpar", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("torchpar", run_name="__main__")
    printed = capsys.readouterr()
    assert ended.value.code == status
    assert text in (printed.err if status else printed.out)
