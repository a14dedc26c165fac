# SPDX-License-Identifier: MIT
"""`python -m torchpar tune`: everything but the GPU's times."""

import json
import math
import runpy
import signal
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("rich", reason="rich prints the tables")
pytest.importorskip("triton", reason="Triton compiles the candidates")
pytest.importorskip("tyro", reason="tyro reads the flags")

import torchpar
from torchpar import measure as measuring
from torchpar import tune
from torchpar.errors import ConfigError
from torchpar.kernels import tuning
from torchpar.kernels.tuning import Tiles
from torchpar.search import Journal, Problem, Trial, search, tabulate, tiles_of

HERE = {"device": "interpreter", "torch": "2"}
SLOW, FAST, BROKEN = Tiles(64, 64, 32, 4, 2), Tiles(64, 64, 32, 8, 2), Tiles(64, 64, 16, 4, 2)
SMALL, LARGE = Problem("symmetric_product", "bfloat16", 256), Problem("symmetric_product", "bfloat16", 1024)
PROBLEMS = {LARGE: [SLOW, FAST, BROKEN], SMALL: [SLOW, FAST, BROKEN]}


def measure(problem: Problem, tiles: Tiles) -> tuple[float, float]:
    """FAST wins on LARGE, the library on SMALL."""
    if tiles == BROKEN:
        raise RuntimeError("out of resources\nand more")
    return (1.0 if tiles == FAST else 2.0), (1.5 if problem == LARGE else 0.5)


def everything(journal: Journal, problems=PROBLEMS, measure=measure) -> list[Trial]:
    return list(search(problems, measure, journal, math.inf))


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "journal.jsonl"


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """The user's folder of tables, read by launchers of which none has read it before."""
    monkeypatch.setenv("TORCHPAR_CACHE", str(tmp_path))
    tuning._table.cache_clear()
    yield tmp_path
    tuning._table.cache_clear()


def winners(journal: Journal, problems=PROBLEMS) -> dict[Problem, Tiles | None]:
    best = {problem: journal.best(problem, candidates) for problem, candidates in problems.items()}
    return {problem: trial and trial.tiles for problem, trial in best.items()}


# The search


def test_each_candidate_is_tried_on_every_problem_before_the_next(path):
    trials = everything(Journal(path, HERE))
    assert [(t.problem, t.tiles) for t in trials] == [(p, t) for t in PROBLEMS[LARGE] for p in PROBLEMS]
    assert [t.ms for t in trials if not t.error] == [2.0, 2.0, 1.0, 1.0]
    assert {t.error for t in trials if t.tiles == BROKEN} == {"RuntimeError: out of resources"}
    assert winners(Journal(path, HERE)) == {LARGE: FAST, SMALL: FAST}


def test_a_journal_gives_back_what_it_was_given(path):
    journal = Journal(path, HERE)
    everything(journal)
    again = Journal(path, HERE)
    assert again.trials == journal.trials
    assert again.unreadable == 0
    assert everything(again) == []


def test_the_budget_ends_a_search_that_the_next_one_goes_on_with(path, monkeypatch):
    now = 0.0
    measured: Counter[tuple[Problem, Tiles]] = Counter()

    def take_ten_seconds(problem, tiles):
        nonlocal now
        now += 10
        measured[problem, tiles] += 1
        return measure(problem, tiles)

    monkeypatch.setattr("torchpar.search.time.monotonic", lambda: now)
    assert list(search(PROBLEMS, take_ten_seconds, Journal(path, HERE), 0)) == []
    assert len(list(search(PROBLEMS, take_ten_seconds, Journal(path, HERE), 35))) == 4
    assert len(Journal(path, HERE).missing(PROBLEMS)) == 2
    assert len(list(search(PROBLEMS, take_ten_seconds, Journal(path, HERE), 35))) == 2
    assert measured == Counter((p, t) for p, tiles in PROBLEMS.items() for t in tiles)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_what_was_measured_before_an_interrupt_is_kept(path, interrupt):
    def interrupted(problem, tiles):
        if (problem, tiles) == (SMALL, FAST):
            raise interrupt
        return measure(problem, tiles)

    for _ in range(3):  # often enough to take it for a candidate that ends the process
        with pytest.raises(interrupt):
            everything(Journal(path, HERE), measure=interrupted)
        journal = Journal(path, HERE)
        assert journal.missing(PROBLEMS) == [(LARGE, BROKEN), (SMALL, FAST), (SMALL, BROKEN)]
    everything(journal)
    assert winners(journal) == {LARGE: FAST, SMALL: FAST}


def test_what_ends_the_process_twice_is_not_tried_again(path):
    Journal(path, HERE).begin(LARGE, SLOW)  # and then a segmentation fault
    assert (LARGE, SLOW) in Journal(path, HERE).missing(PROBLEMS)
    Journal(path, HERE).begin(LARGE, SLOW)
    journal = Journal(path, HERE)
    assert (LARGE, SLOW) not in journal.missing(PROBLEMS)
    assert journal.trials[LARGE, SLOW].error == "it ended the process twice"
    everything(journal)
    assert winners(journal)[LARGE] == FAST


def test_a_lack_of_memory_is_not_held_against_the_candidate(path):
    def filled(problem, tiles):
        if tiles == SLOW:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB.")
        return measure(problem, tiles)

    for _ in range(3):
        skipped = everything(Journal(path, HERE), measure=filled)[:2]
        assert {t.error for t in skipped} == {"skipped for now, OutOfMemoryError: CUDA out of memory."}
        assert Journal(path, HERE).missing(PROBLEMS) == [(LARGE, SLOW), (SMALL, SLOW)]
    assert [t.error for t in everything(Journal(path, HERE))] == ["", ""]


@pytest.mark.parametrize(
    "damage",
    [
        "{}",
        "[1, 2]",
        "3",
        "\x00\xff",
        '{"where": {"device": "interpreter", "torch": "2"}}',
        "",
        "zero",
        "text",
    ],
)
def test_a_line_that_is_no_trial_is_left_out(path, damage):
    everything(Journal(path, HERE))
    *lines, last = path.read_text().splitlines()
    trial = json.loads(lines[1])
    if damage in ("zero", "text"):
        damage = json.dumps(trial | {"ms": 0 if damage == "zero" else "fast"})
    lines[1] = damage
    path.write_text("\n".join([*lines, last[: len(last) // 2]]))  # and the last one was being written
    journal = Journal(path, HERE)
    assert journal.unreadable == 2
    again = [(trial.problem, trial.tiles) for trial in everything(journal)]
    assert again == [(LARGE, SLOW), (SMALL, BROKEN)]
    journal = Journal(path, HERE)
    assert journal.missing(PROBLEMS) == []
    assert journal.begun[LARGE, SLOW] == 2  # what was written next is not the end of the broken line


def test_trials_from_elsewhere_and_of_other_candidates_do_not_count(path):
    everything(Journal(path, HERE))
    other = Journal(path, HERE | {"torch": "3"})
    assert len(other.missing(PROBLEMS)) == 6
    everything(other)
    new = Tiles(128, 128, 32, 8, 2)
    journal = Journal(path, HERE)
    assert journal.missing({LARGE: [SLOW, new]}) == [(LARGE, new)]
    assert journal.best(LARGE, [SLOW, new]).tiles == SLOW


# The table


@pytest.mark.parametrize(
    "n, expected",
    [
        *((64, SLOW), (180, SLOW), (184, None), (360, None), (364, SLOW)),
        *((724, SLOW), (728, FAST), (1448, FAST), (1452, SLOW), (10**5, SLOW)),
    ],
)
def test_launchers_read_what_the_search_found(path, tables, n, expected):
    """LARGE's winner is FAST and SMALL's the library, up to the middle between sizes; others keep SLOW."""
    journal = Journal(path, HERE)
    everything(journal)
    found = tabulate(PROBLEMS, journal, lambda problem: SLOW)
    operand = torch.empty(64, 64)
    kind = ("symmetric_product", torch.bfloat16, "ieee")
    assert tuning.chosen(*kind, n, n, n, 1, operand) == tuning.default_tiles(
        torch.bfloat16, "ieee", n, n, operand
    )
    tuning.save("interpreter", {"device": "interpreter", "tiles": found}, tables)
    assert tuning.chosen(*kind, n, n, n, 1, operand) == expected
    assert tuning.chosen(*kind, n, n, n, 64, operand) not in (SLOW, FAST, None)  # a batch is another kind


def test_what_was_not_tried_is_not_in_the_table(path):
    journal = Journal(path, HERE)
    assert tabulate(PROBLEMS, journal, lambda problem: SLOW) == {}
    journal.add(Trial(LARGE, BROKEN, error="out of resources"))
    assert tabulate(PROBLEMS, journal, lambda problem: SLOW) == {}


# The check of a candidate


KERNELS = ("symmetric_product", "symmetrized_product", "linear_sigmoid")


def case_of(kernel: str, dtype: str) -> tuple[Problem, measuring.Case]:
    problem = Problem(kernel, dtype, 129, 3 if kernel != "linear_sigmoid" else 1)
    return problem, measuring.prepare(problem, torch.device("cpu"))


def write_oracle(problem: Problem, case: measuring.Case) -> None:
    symmetric = problem.kernel == "symmetric_product"  # BLAS may round c[i, j] and c[j, i] differently
    case.out.copy_(case.oracle.maximum(case.oracle.mT) if symmetric else case.oracle)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_right_candidate_is_believed(kernel, dtype):
    problem, case = case_of(kernel, dtype)
    measuring.check(case, partial(write_oracle, problem, case), problem)
    assert (case.library() - case.oracle).abs().max() < 0.01 * case.oracle.abs().max()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_wrong_candidate_is_not(kernel, dtype):
    problem, case = case_of(kernel, dtype)
    error = (case.library() - case.oracle).abs().max()
    oracle_error = case.oracle.abs().max() * math.sqrt(129) * torch.finfo(torch.float64).eps / 2

    def inaccurate() -> None:
        write_oracle(problem, case)
        case.out[..., 7, 7] = case.oracle[..., 7, 7] + 4 * (error + oracle_error)

    def unwritten_in_one_element() -> None:
        case.out[..., :-1] = case.oracle[..., :-1]
        case.out[..., :-1, -1] = case.oracle[..., :-1, -1]

    for wrong in (inaccurate, unwritten_in_one_element, lambda: None):
        with pytest.raises(ValueError, match="an error of"):
            measuring.check(case, wrong, problem)


def test_a_result_that_is_not_symmetric_is_wrong():
    problem, case = case_of("symmetric_product", "float32")

    def lopsided() -> None:
        write_oracle(problem, case)
        case.out[..., 0, 1] = case.out[..., 0, 1].nextafter(torch.tensor(math.inf))

    with pytest.raises(ValueError, match="not symmetric"):
        measuring.check(case, lopsided, problem)


def interpreted(problem: Problem, tiles: Tiles, spoil: bool) -> tuple[tuple[float, float], str, str]:
    """`measure` where kernels are interpreted and times made up; the precision within, and after."""
    import triton.testing

    from torchpar import measure as measuring

    within = []

    def do_bench(call, *args, **options) -> float:
        call()
        within.append(torch.backends.cuda.matmul.fp32_precision)
        return float(len(within))

    case = measuring.prepare(problem, torch.device("cpu"))
    if spoil:
        case = case._replace(launch=lambda wrap, tiles: None)
    with (
        patch.object(triton.testing, "do_bench", do_bench),
        patch.object(measuring, "prepare", lambda *_: case),
    ):
        times = measuring.measure(problem, tiles, torch.device("cpu"))
    return times, within[-1], torch.backends.cuda.matmul.fp32_precision


@pytest.mark.parametrize(
    "problem",
    [
        Problem("symmetric_product", "float32", 33, 3),
        Problem("symmetrized_product", "tf32", 33, 3),
        Problem("linear_sigmoid", "float64", 33),
    ],
    ids=str,
)
def test_measure_launches_the_candidate_and_takes_medians(interpreter, problem):
    tiles = Tiles(32, 32, 32, 4, 2)
    times, within, after = interpreter(interpreted, problem, tiles, False)
    assert times == (measuring.ROUNDS, measuring.ROUNDS + 1)  # 1, 3, 5, … and 2, 4, 6, …
    assert within == problem.precision
    assert after == torch.backends.cuda.matmul.fp32_precision
    with pytest.raises(ValueError, match="an error of"):
        interpreter(interpreted, problem, tiles, True)


# The command


@pytest.fixture
def gpu(tables, monkeypatch):
    """A GPU that does nothing but being there, and times that `measure` makes up."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(tuning, "device", lambda t: tuning.Device("NVIDIA Test", 90, 132))
    monkeypatch.setattr(tuning, "candidates", lambda *kind: [SLOW, FAST, BROKEN])
    monkeypatch.setattr(tune, "measure", lambda problem, tiles, device: measure(problem, tiles))
    return tables


FLAGS = tune.TuneFlags(kernels=("symmetric_product",), dtypes=("bfloat16",), sizes=(1024, 256))
DEFAULTS = 2  # candidates beside those three: what is in use on sm_90, and the default


def choice(n: int) -> Tiles | None:
    x = torch.empty(64, 64, device="meta")
    return tuning.chosen("symmetric_product", torch.bfloat16, "ieee", n, n, n, 1, x)


def test_tune_writes_a_table_and_goes_on_from_its_journal(gpu, capsys, monkeypatch):
    tune.run(FLAGS)
    assert choice(1024) == FAST
    assert choice(256) is None
    assert choice(4096) == tuning.default_tiles(
        torch.bfloat16, "ieee", 4096, 4096, torch.empty(0, device="meta")
    )
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == str(gpu / "nvidia-test.json")
    assert "nothing is missing" in out
    assert "symmetric_product bfloat16 1024: 64x64x32 w8 s2, 1 ms, 1.50x" in out
    assert "symmetric_product bfloat16 256, 64x64x16 w4 s2: RuntimeError: out of resources" in out
    table = json.loads((gpu / "nvidia-test.json").read_text())
    assert {table[key] for key in ("device", "torch")} == {"NVIDIA Test", torch.__version__}

    monkeypatch.setattr(tune, "measure", lambda *_, **__: pytest.fail("nothing is left to measure"))
    tune.run(FLAGS)
    assert choice(1024) == FAST


def interrupt():  # SIGINT is ignored where a shell runs the tests in the background
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "end, raised",
    [(interrupt, KeyboardInterrupt), (partial(signal.raise_signal, signal.SIGTERM), SystemExit)],
)
def test_tune_keeps_the_best_so_far_when_it_is_interrupted(gpu, capsys, monkeypatch, end, raised):
    before = signal.getsignal(signal.SIGTERM)
    old = [{"up_to": None, "tiles": SLOW}]
    tiles = {"linear_sigmoid": {"float64": old}, "symmetric_product": {"bfloat16": old, "float16": old}}
    tuning.save("NVIDIA Test", {"device": "NVIDIA Test", "tiles": tiles}, gpu)

    def interrupted(problem, tiles, device):
        if problem == SMALL:
            end()
        return measure(problem, tiles)

    monkeypatch.setattr(tune, "measure", interrupted)
    with pytest.raises(raised):
        tune.run(FLAGS)
    assert signal.getsignal(signal.SIGTERM) == before
    assert (choice(1024), choice(256), choice(4096)) == (None, SLOW, SLOW)  # SLOW is its first candidate
    kept = tuning.load("NVIDIA Test", 90)["tiles"]
    assert [*kept["linear_sigmoid"], *kept["symmetric_product"]] == ["float64", "bfloat16", "float16"]
    assert "candidates are missing; the same command goes on" in capsys.readouterr().out


def test_tune_adds_to_the_table_of_its_output_alone(gpu):
    in_use = {"linear_sigmoid": {"float64": [{"up_to": None, "tiles": SLOW}]}}
    tuning.save("NVIDIA Test", {"device": "NVIDIA Test", "tiles": in_use}, gpu)
    output = gpu / "elsewhere"
    for n in (1024, 4096):
        tune.run(replace(FLAGS, sizes=(n,), output=output))
        table = tuning.load("NVIDIA Test", 90, output)
        assert list(table["tiles"]) == ["symmetric_product"]
        assert isinstance(tiles_of(table, LARGE), Tiles)
        assert tiles_of(table, LARGE) == FAST
    assert tiles_of(table, LARGE._replace(n=4096)) is None
    assert tuning.load("NVIDIA Test", 90)["tiles"].keys() == {"linear_sigmoid"}


@pytest.mark.parametrize("n", [16, 512, 1448, 1456, 4096])
def test_a_table_is_read_as_the_launchers_read_it(gpu, n):
    tiles = {"symmetric_product": {"bfloat16": [{"up_to": 512, "tiles": None}]}}
    tiles["symmetric_product"]["bfloat16"] += [{"up_to": 1448, "tiles": FAST}, {"up_to": None, "tiles": SLOW}]
    tuning.save("NVIDIA Test", {"device": "NVIDIA Test", "tiles": tiles}, gpu)
    assert tiles_of(tuning.load("NVIDIA Test", 90), LARGE._replace(n=n)) == choice(n)
    tuning.save("NVIDIA Test", {"device": "NVIDIA Test", "tiles": {}}, gpu)
    assert tiles_of(None, LARGE._replace(n=n)) == choice(n)


def test_tune_ends_when_the_gpu_does(gpu, capsys, monkeypatch):
    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(ConfigError, match="run the same command again"):
        tune.run(FLAGS)
    assert choice(1024) == FAST
    journal = capsys.readouterr().out.splitlines()[0].split(" in ")[1]
    assert json.loads(Path(journal).read_text().splitlines()[-1])["error"] == "RuntimeError: out of resources"


@pytest.mark.parametrize(
    "flag, value",
    [
        *(("minutes", minutes) for minutes in (0, -1, math.nan, math.inf)),
        *(("sizes", sizes) for sizes in ((512, 0), (-16,), (1000,), ())),
        *(("kernels", ()), ("dtypes", ())),
    ],
)
def test_flags_that_mean_nothing_are_refused(flag, value):
    with pytest.raises(ConfigError, match=f"--{flag}"):
        tune.TuneFlags(**{flag: value})


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


@pytest.mark.parametrize("name", ["rich.console", "tyro"])
def test_tune_without_its_extra_says_so_in_a_line(run_torchpar, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    for module in ("tune", "cli"):
        monkeypatch.delitem(sys.modules, f"torchpar.{module}", raising=False)
        monkeypatch.setattr(torchpar, module, None, raising=False)  # to be put back
        monkeypatch.delattr(torchpar, module)
    status, out, err = run_torchpar("tune")
    line = status if isinstance(status, str) else err.strip()  # Python prints a status that is a text
    assert (out, line.count("\n")) == ("", 0)
    assert name in line
    assert line.endswith("pip install 'torchpar[examples]'")


@pytest.mark.parametrize(
    "arguments, error", [([], "no command given"), (["tuna"], "no command 'tuna', expected tune")]
)
def test_an_unknown_command_is_told_the_usage(run_torchpar, arguments, error):
    status, out, err = run_torchpar(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("usage: python -m torchpar COMMAND")
    assert f"python -m torchpar: error: {error}" in err


def test_help_lists_the_commands(run_torchpar):
    status, out, err = run_torchpar("--help")
    assert (status, err) == (0, "")
    assert "  tune " in out
