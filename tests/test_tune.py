# SPDX-License-Identifier: MIT
"""Tests of `python -m torchpar tune`, with times that are made up."""

import json
import math
import runpy
import signal
import sys
from functools import partial
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("triton", reason="Triton compiles the configurations")

from torchpar.errors import ConfigError
from torchpar.kernels import candidates, tables, tuning
from torchpar.kernels.candidates import Tiles
from torchpar.ops._matrix import mirrored
from torchpar.tune import command, measure
from torchpar.tune.measure import Problem

DEVICE = candidates.Device("NVIDIA Test", 90, 132)
FAST, SLOW, BROKEN = candidates.configurations("symmetric_product", torch.bfloat16, "ieee", 90)[:3]
LARGE = Problem("symmetric_product", "bfloat16", 1024, 1024, 1024)
SMALL = Problem("symmetric_product", "bfloat16", 256, 256, 256)


def made_up(problem: Problem, configurations, device):
    """FAST wins on LARGE, the library on all others; BROKEN fails. One round of three is disturbed."""
    ms = {FAST: 1.0, SLOW: 2.0, measure.LIBRARY: 1.5 if problem == LARGE else 0.5, measure.PRODUCT: 0.1}
    return {tiles: [[x, x], [x], [9.0, 9.0]] for tiles, x in ms.items()}, {BROKEN: "RuntimeError: too large"}


# The check of a result, and the times


PROBLEMS = pytest.mark.parametrize(
    "problem",
    [
        Problem("symmetric_product", "bfloat16", 129, 129, 65, 3),
        Problem("symmetric_product", "float64", 129, 129, 65),
        Problem("linear_sigmoid", "bfloat16", 33, 129, 65),
        Problem("linear_sigmoid", "float64", 33, 129, 65),
    ],
    ids=str,
)


def write_reference(problem: Problem, prepared: measure.PreparedProblem) -> None:
    out, reference = prepared.out, prepared.reference
    symmetric = problem.kernel == "symmetric_product"  # BLAS may round c[i, j] and c[j, i] differently
    out.copy_(reference.maximum(reference.mT) if symmetric else reference)


@pytest.fixture
def without_a_gpu(monkeypatch):
    """The library's products are mirrored by a kernel, which runs on a GPU alone."""
    monkeypatch.setattr("torchpar.kernels.matmul_t.mirror", lambda c, wrap: mirrored(c))


@PROBLEMS
@pytest.mark.usefixtures("without_a_gpu")
def test_a_right_result_passes_and_a_wrong_one_fails(problem):
    prepared = measure.prepare(problem, torch.device("cpu"))
    out, reference = prepared.out, prepared.reference
    measure.check_result(prepared, partial(write_reference, problem, prepared), problem)
    error = (prepared.library() - reference).abs().max()
    assert error < 0.01 * reference.abs().max()
    reference_error = reference.abs().max() * math.sqrt(problem.k) * torch.finfo(torch.float64).eps / 2

    def inaccurate() -> None:
        write_reference(problem, prepared)
        out[..., 7, 7] = reference[..., 7, 7] + 4 * (error + reference_error)

    def one_element_unwritten() -> None:
        out[..., :-1] = reference[..., :-1]
        out[..., :-1, -1] = reference[..., :-1, -1]

    for wrong in (inaccurate, one_element_unwritten, lambda: None):
        with pytest.raises(ValueError, match="an error of"):
            measure.check_result(prepared, wrong, problem)


@pytest.mark.usefixtures("without_a_gpu")
def test_an_asymmetric_result_fails():
    problem = LARGE._replace(kind="float32", m=129, n=129)
    prepared = measure.prepare(problem, torch.device("cpu"))

    def asymmetric() -> None:
        write_reference(problem, prepared)
        prepared.out[..., 0, 1] = prepared.out[..., 0, 1].nextafter(torch.tensor(math.inf))

    with pytest.raises(ValueError, match="not symmetric"):
        measure.check_result(prepared, asymmetric, problem)


def interpreted(problem: Problem, good: Tiles, bad: Tiles):
    """The result of `measure` in the interpreter, and the fp32 precisions during and after."""
    import triton.testing

    from torchpar.tune import measure

    precisions = []

    def do_bench(call, *args, **options) -> list[float]:
        call()
        precisions.append(torch.backends.cuda.matmul.fp32_precision)
        return [float(len(precisions))]

    prepared = measure.prepare(problem, torch.device("cpu"))

    def launch(wrap, tiles) -> None:
        prepared.launch(wrap, tiles=tiles)
        prepared.out[..., 1, 1] += tiles == bad

    with (
        patch.object(triton.testing, "do_bench", do_bench),
        patch.object(measure, "prepare", lambda *_: prepared._replace(launch=launch)),
    ):
        times, errors = measure.measure(problem, [good, bad], torch.device("cpu"))
    return times, errors, precisions, torch.backends.cuda.matmul.fp32_precision


@pytest.mark.parametrize(
    "problem",
    [
        Problem("symmetric_product", "tf32", 33, 33, 20, 3),
        Problem("linear_sigmoid", "float64", 33, 17, 20),
    ],
    ids=str,
)
def test_configurations_and_the_library_are_timed_in_turn_and_checked_first(interpreter, problem):
    good, bad = Tiles(32, 32, 32, 4, 2), Tiles(32, 32, 16, 4, 2)
    times, errors, during, after = interpreter(interpreted, problem, good, bad)
    rounds = range(measure.ROUNDS)
    names = good, measure.LIBRARY, measure.PRODUCT
    assert times == {name: [[3.0 * i + j] for i in rounds] for j, name in enumerate(names, 1)}
    assert list(errors) == [bad]
    assert errors[bad].startswith("ValueError: an error of 1.0e+00")
    assert set(during) == {candidates.KINDS[problem.kind].precision}
    assert after == torch.backends.cuda.matmul.fp32_precision


# The command


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """The tables of a GPU that is present in name only; `made_up` has its times."""
    monkeypatch.setenv("TORCHPAR_CACHE", str(tmp_path))
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for module in (candidates, tuning):
        monkeypatch.setattr(module, "device", lambda t: DEVICE)
    monkeypatch.setattr(command, "measure", made_up)
    tables.forget_tables()
    yield tmp_path / "nvidia-test.json"
    tables.forget_tables()


def tune(*arguments: str, sizes: tuple[int, ...] = (1024, 256)) -> int:
    kernel = ("--kernels", "symmetric_product", "--dtypes", "bfloat16")
    return command.tune(
        command.parse([*kernel, *(("--sizes", *map(str, sizes)) if sizes else ()), *arguments])
    )


def measured(path) -> dict[int, list]:
    return {
        m: tiles for m, *_, tiles in json.loads(path.read_text())["tiles"]["symmetric_product"]["bfloat16"]
    }


def test_tune_writes_a_table_that_the_launchers_read(gpu, capsys):
    tune()
    assert measured(gpu) == {1024: list(FAST), 256: None}
    x = torch.empty(64, 64, dtype=torch.bfloat16, device="meta")
    assert tuning.chosen("symmetric_product", "ieee", (1000, 1000, 1000, 1), x) == FAST
    assert tuning.chosen("symmetric_product", "ieee", (64, 64, 64, 1), x) is None
    table = json.loads(gpu.read_text())
    assert (table["device"], table["torch"]) == ("NVIDIA Test", torch.__version__)
    assert {"triton", "kernels", "date"} < table.keys()
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "NVIDIA Test: 2 problems, 0 of them in the table"
    assert f"{LARGE}, {measure.describe(BROKEN)}: RuntimeError: too large" in out
    fast, slow = measure.describe(FAST), measure.describe(SLOW)
    assert f"{LARGE}: {fast} 1 ms, library 1.5 ms, product alone 0.1 ms" in out
    assert f"{SMALL}: library 0.5 ms, {fast} 1 ms, product alone 0.1 ms" in out
    assert slow not in "".join(out)
    assert out[-2:] == ["complete", str(gpu)]


def test_without_a_configuration_the_library_is_not_called_faster(gpu, capsys, monkeypatch):
    times = {measure.LIBRARY: [[1.0]], measure.PRODUCT: [[0.5]]}
    monkeypatch.setattr(command, "measure", lambda *_: (times, {FAST: "RuntimeError: ptxas is missing"}))
    assert tune(sizes=(1024,)) == 1
    assert not gpu.exists()
    out = capsys.readouterr().out
    assert f"{LARGE}: left out, no configuration could be used" in out
    assert "left out: 1" in out


def test_a_variant_that_was_not_asked_for_is_not_launched(gpu, monkeypatch):
    seen = []
    monkeypatch.setattr(
        command,
        "measure",
        lambda problem, tried, device: seen.append(tried) or made_up(problem, tried, device),
    )
    tune(sizes=(1024,))
    tune("--again", "--variants", "specialized", sizes=(1024,))
    assert [{tiles.variant for tiles in tried} for tried in seen] == [{"pointers", "tma"}, {"specialized"}]


def test_a_problem_is_measured_once_unless_again(gpu, capsys, monkeypatch):
    tune(sizes=(1024,))
    monkeypatch.setattr(
        command,
        "measure",
        lambda problem, *_: ({SLOW: [[2.0]], measure.LIBRARY: [[1.0]], measure.PRODUCT: [[0.5]]}, {}),
    )
    tune()
    assert measured(gpu) == {1024: list(FAST), 256: None}
    assert "2 problems, 1 of them in the table" in capsys.readouterr().out
    tune("--again", sizes=(1024,))
    assert measured(gpu) == {256: None, 1024: None}


@pytest.mark.parametrize("key", ["torch", "triton", "kernels"])
def test_a_table_of_other_versions_is_not_continued(gpu, capsys, key):
    tune()
    gpu.write_text(json.dumps(json.loads(gpu.read_text()) | {key: "other"}))
    tune(sizes=(512,))
    assert measured(gpu) == {512: None}
    assert "a new one is begun" in capsys.readouterr().out


def test_time_ends_between_problems(gpu, capsys, monkeypatch):
    seconds = iter((0.0, 1.0, 61.0))
    monkeypatch.setattr(command.time, "monotonic", lambda: next(seconds))
    tune("--minutes", "1")
    assert measured(gpu) == {1024: list(FAST)}
    assert "left to measure: 1; the same command continues" in capsys.readouterr().out


def interrupt():  # SIGINT is ignored where a shell runs the tests in the background
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "end, raised",
    [(interrupt, KeyboardInterrupt), (partial(signal.raise_signal, signal.SIGTERM), SystemExit)],
)
def test_an_interrupted_run_keeps_what_it_has_measured(gpu, capsys, monkeypatch, end, raised):
    before = signal.getsignal(signal.SIGTERM)

    def interrupted(problem, *rest):
        if problem == SMALL:
            end()
        return made_up(problem, *rest)

    monkeypatch.setattr(command, "measure", interrupted)
    with pytest.raises(raised):
        tune()
    assert signal.getsignal(signal.SIGTERM) == before
    assert measured(gpu) == {1024: list(FAST)}
    assert "left to measure: 1; the same command continues" in capsys.readouterr().out


def test_a_problem_that_cannot_be_measured_is_left_out(gpu, capsys, monkeypatch):
    def out_of_memory(problem, *rest):
        if problem == LARGE:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB.")
        return made_up(problem, *rest)

    monkeypatch.setattr(command, "measure", out_of_memory)
    tune()
    assert measured(gpu) == {256: None}
    assert f"{LARGE}: left out, OutOfMemoryError: CUDA out of memory.\n" in capsys.readouterr().out


def test_a_gpu_that_fails_ends_the_run_in_a_line(gpu, capsys, monkeypatch):
    def failing(problem, configurations, device):
        if problem == LARGE:
            return made_up(problem, configurations, device)
        prepared = measure.PreparedProblem(*[interrupted_gpu] * 3, torch.ones(1), torch.ones(1))
        with patch.object(measure, "prepare", lambda *_: prepared):
            return measure.measure(problem, configurations, device)

    def interrupted_gpu(*_, **__) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(command, "measure", failing)
    monkeypatch.setattr(torch.cuda, "synchronize", interrupted_gpu)
    assert command.main(["--kernels=symmetric_product", "--dtypes=bfloat16", "--sizes", "1024", "256"]) == 2
    assert measured(gpu) == {1024: list(FAST)}
    error = capsys.readouterr().err
    assert error.startswith(
        f"python -m torchpar tune: error: the GPU fails after {SMALL}, {measure.describe(FAST)}"
    )
    assert error.count("\n") == 1


def test_the_most_important_problems_come_first():
    problems = command.list_problems(command.parse([]))
    assert len(set(problems)) == len(problems)
    first = problems[:5]
    assert [(p.kernel, p.kind, p.n) for p in first[:2]] == [
        ("symmetric_product", "bfloat16", n) for n in (4096, 8192)
    ]
    assert [p.kind for p in problems] == sorted((p.kind for p in problems), key=command.DTYPES.index)
    assert {p.kind for p in problems} == candidates.KINDS.keys()
    assert {p.kernel for p in problems} == set(candidates.KERNELS) == set(command.KERNELS)


@pytest.mark.parametrize(
    "flag, values",
    [*(("minutes", m) for m in ("0", "-1", "nan", "inf")), *(("sizes", n) for n in ("512 0", "-16", "1000"))],
)
def test_flags_out_of_bounds_are_refused(flag, values):
    with pytest.raises(ConfigError, match=f"--{flag} is .*, expected"):
        command.tune(command.parse([f"--{flag}", *values.split()]))


@pytest.fixture
def run_torchpar(monkeypatch, capsys):
    """``run_torchpar(*arguments)``: status, stdout and stderr of ``python -m torchpar``."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["torchpar", *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("torchpar", run_name="__main__")
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tune_without_a_gpu_says_so_in_a_line(run_torchpar):
    error = "python -m torchpar tune: error: PyTorch finds no GPU, expected one to tune the kernels on\n"
    assert run_torchpar("tune") == (2, "", error)


@pytest.mark.parametrize(
    "arguments, error", [([], "no command given"), (["tuna"], "no command 'tuna', expected tune")]
)
def test_an_unknown_command_prints_the_usage(run_torchpar, arguments, error):
    status, out, err = run_torchpar(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("usage: python -m torchpar COMMAND")
    assert f"python -m torchpar: error: {error}" in err


def test_help_lists_the_commands(run_torchpar):
    status, out, err = run_torchpar("--help")
    assert (status, err) == (0, "")
    assert "  tune " in out
