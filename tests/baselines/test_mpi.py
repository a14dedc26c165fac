# SPDX-License-Identifier: MIT
"""Training by MPI and the pooled exercise, without torch: the same losses as on one process."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from commands import LAST_LINE, MPIRUN, ROOT, import_path, lesson, needs_mpirun, rows_of, run
from fake_data import fashion_mnist

import torchpar
from torchpar.baselines import mpi, numpy_mlp
from torchpar.baselines.numpy_mlp import NumpyMLP
from torchpar.data import files as datasets
from torchpar.errors import ConfigError, DivergedError
from torchpar.parallel.launch.rank_info import first_difference
from torchpar.parallel.launch.world import join_world

pytest.importorskip("tyro", reason="tyro reads the flags")

from support import cli, one_process

import fashion_pooled
import train_mpi
from fashion_pooled import SIZES, Plan, Result, Way

ROUNDING = 1e-5  # of a loss: some hundred steps of some roundings of 6e-8 each
# Python imports this module at its start, also in processes that a process starts. They find
# neither package, as where it is not installed.
WITHOUT_TORCH = """
import sys
from importlib.machinery import PathFinder

class Others:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] not in ("torch", "torchvision"):
            return PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Others
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A small data set; a batch of ten leaves a remainder of one."""
    return fashion_mnist(tmp_path_factory.mktemp("data"), train=61, test=11)


def run_without_torch(*command: str) -> tuple[int, str, str]:
    """Run a command whose processes of Python find no torch, in an environment without
    OMP_NUM_THREADS; return its exit status and its streams."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "sitecustomize.py").write_text(WITHOUT_TORCH)
        with patch.dict(os.environ, PYTHONPATH=import_path(Path(folder), ROOT / "examples")):
            os.environ.pop("OMP_NUM_THREADS", None)
            return run(*command)


def without_torch(ranks: int, *arguments: str) -> str:
    """Run Python with these arguments on processes of MPI, and return what it prints."""
    code, out, err = run_without_torch(MPIRUN, "-n", str(ranks), sys.executable, *arguments)
    assert code == 0, err
    return out


def by_command(ranks: int, name: str, *flags: str) -> str:
    """Run an exercise by its command line on processes that find no torch, and return what it
    prints."""
    return without_torch(ranks, str(ROOT / "examples" / f"{name}.py"), *flags)


def test_the_package_without_torch_has_the_baselines_alone():
    program = "import torchpar\nfrom torchpar.baselines import mpi, numpy_mlp, pure_python\n"
    program += "print(numpy_mlp.NumpyMLP((3, 2)).parameters.size)\n"
    names = sorted(torchpar.__all__)
    assert {"maximum", "nn", "optim", "exact", "parallel", "testing"} <= set(names)
    program += "from torchpar.data import files\n"
    # Of a package that is imported, its names need PyTorch.
    for package in (torchpar.data, torchpar.parallel):
        prefix = package.__name__.partition(".")[2]
        names += [f"{prefix}.{name}" for name in package.__all__]
    names = [name for name in names if name not in ("parallel",)]
    program += f"for name in {names}:\n"
    program += (
        "    try:\n        attrgetter(name)(torchpar)\n    except ImportError as e:\n        "
        "print(e)\n"
    )
    code, out, err = run_without_torch(
        sys.executable, "-c", f"from operator import attrgetter\n{program}"
    )
    assert code == 0, err
    assert out.splitlines() == [
        "8",
        *(f"torchpar.{name} needs PyTorch; pip install torch" for name in names),
    ]


@pytest.mark.slow
def test_the_page_of_a_run_needs_no_torch(data, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib draws")
    pytest.importorskip("jinja2", reason="jinja2 fills the page")
    flags = ["--dataset=fashion-mnist", f"--data={data}", "--epochs=1", f"--report={tmp_path}"]
    script = str(ROOT / "examples" / "train_mpi.py")
    code, _, err = run_without_torch(sys.executable, script, *flags)
    assert code == 0, err
    assert [path.name for path in tmp_path.iterdir()] == ["run.html"]
    code, _, err = run_without_torch(sys.executable, script, *flags, f"--log-dir={tmp_path}")
    assert code == 2
    assert "--log-dir needs torch; pip install torch" in err


# Both splits

CASES = {  # hidden width, activation, seed; 2 and 3 do not divide 7, and of 2 one has no unit of 1
    "odd": (7, "sigmoid", 0),
    "few": (1, "tanh", 1),
}


def trained(world, folder: Path, case: str, split: str) -> train_mpi.Training:
    width, activation, seed = CASES[case]
    sizes = {"epochs": 2, "batch_size": 10, "hidden": (width,)}
    flags = train_mpi.Flags(**sizes, lr=0.1, momentum=0.5, activation=activation, seed=seed)
    return train_mpi.train(flags, split, world, datasets.read("fashion-mnist", folder))


def pooled_runs(world, folder: Path, way: Way) -> list[Result]:
    flags = fashion_pooled.Flags(data=folder, dataset="fashion-mnist", samples=50)
    splits = fashion_pooled.load(flags)[0] if world.rank == 0 else None
    plans = Plan(60, 0.1, 0.0, 0), Plan(30, 0.1, 0.9, 0)
    return [fashion_pooled.train_numpy(world, splits, plan, way) for plan in plans]


def numbers(run) -> dict[str, np.ndarray]:
    """Losses and weights of a training."""
    if isinstance(run, Result):
        return {
            "losses": np.array([*run.costs, *run.ends[0], *run.ends[1]]),
            "weights": run.weights,
        }
    losses = [(result.train_loss, result.test_loss, result.test_accuracy) for result in run.results]
    return {"losses": np.array(losses), "weights": run.model.parameters}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=ROUNDING)
    np.testing.assert_allclose(found["weights"], expected["weights"], rtol=0, atol=ROUNDING)


# The functions above run in the processes, too, which cannot import this module: it imports torch.
SHARED = ("trained", "pooled_runs", "numbers")
WAYS = "allreduce once batch", "gather once batch", "gather each samples"
ON_PROCESSES = """
import sys
import numpy as np, fashion_pooled, train_mpi
from fashion_pooled import Plan, Result, Way
from pathlib import Path
from torchpar.data import files as datasets
from torchpar.baselines import mpi
CASES, WAYS = {cases}, {ways}
{functions}
folder, out = map(Path, sys.argv[1:])
with mpi.join() as world:
    runs = {{}}
    for case in CASES:
        for split in ("data", "model"):
            run = trained(world, folder, case, split)
            runs[f"{{case}} {{split}}"] = numbers(run) | {{"sent": np.array([len(run.sent),
            run.bytes])}}
    for way in WAYS:
        for i, run in enumerate(pooled_runs(world, folder, Way(*way.split()))):
            runs[f"{{way}} {{i}}"] = numbers(run)
            # After Gather process 0 alone has the sums.
            assert bool(run.costs) == ("allreduce" in way or world.rank == 0)
    if world.rank == 0:
        np.savez(out, **{{f"{{run}}/{{key}}": t for run, of in runs.items() for key,
        t in of.items()}})
"""


@needs_mpirun
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_train_as_one(data, tmp_path, ranks):
    """By both splits and by all ways of the pooled images. The last batch is of one sample, which
    leaves a process none."""
    from inspect import getsource

    functions = "\n".join(getsource(globals()[name]) for name in SHARED)
    program = ON_PROCESSES.format(cases=CASES, ways=WAYS, functions=functions)
    without_torch(ranks, "-c", program, str(data), str(tmp_path / "runs.npz"))
    with np.load(tmp_path / "runs.npz") as file:
        found = {name: file[name] for name in file.files}
    alone = {case: numbers(trained(mpi.OneProcess(), data, case, "data")) for case in CASES}
    for case, (width, *_) in CASES.items():
        parameters = 784 * width + width + width * 10 + 10
        for split, sent in (("data", 4 * (parameters + 1)), ("model", 4 * 10 * 10)):
            run = {key: found[f"{case} {split}/{key}"] for key in ("losses", "weights", "sent")}
            assert_same(run, alone[case])
            assert run["sent"].tolist() == [1, sent]
    for way in WAYS:
        for i, expected in enumerate(pooled_runs(mpi.OneProcess(), data, Way())):
            run = {key: found[f"{way} {i}/{key}"] for key in ("losses", "weights")}
            assert_same(run, numbers(expected))
    with pytest.raises(AssertionError):
        assert_same({**run, "losses": run["losses"] * (1 + 3 * ROUNDING)}, numbers(expected))


def test_one_process_trains_by_both_splits(data):
    one, other = (
        numbers(trained(mpi.OneProcess(), data, "odd", split)) for split in ("data", "model")
    )
    assert_same(other, one)
    losses = one["losses"][:, 0]
    assert losses[1] < losses[0] - 0.05


def test_a_split_takes_one_hidden_layer():
    with pytest.raises(
        ConfigError, match=r"sizes are \[4, 3, 3, 2\], expected one hidden layer, whose units"
    ):
        mpi.HiddenSplitMLP(NumpyMLP((4, 3, 3, 2)), mpi.OneProcess())


def test_from_zero_all_hidden_units_stay_alike(data):
    flags = train_mpi.Flags(epochs=2, batch_size=10, lr=0.1, momentum=0.5, hidden=(5,), init="zero")
    run = train_mpi.train(flags, "data", mpi.OneProcess(), datasets.read("fashion-mnist", data))
    units = run.model.weights[0].T
    assert np.abs(units[0]).max() > 1e-3  # they have learned
    np.testing.assert_allclose(units, np.tile(units[0], (5, 1)), rtol=0, atol=1e-6)
    drawn = train_mpi.NumpyMLP((784, 5, 10)).weights[0].T
    assert np.abs(drawn - drawn[0]).max() > 0.01
    code, out, _ = lesson(
        *(
            "train_mpi",
            "--dataset=fashion-mnist",
            f"--data={data}",
            "--init=zero",
            "--epochs=1",
            "--hidden=5",
        )
    )
    assert code == 0
    line = r"weights of the hidden units: at most (\S+) in magnitude, and (\S+) from unit to unit\n"
    found = re.search(line, out)
    assert found
    assert all(number == f"{float(number):.1g}" for number in found.groups())  # one format


@pytest.mark.parametrize("count, size", [(7, 3), (2, 3), (0, 2), (6, 1)])
def test_shares_are_those_of_array_split(count, size):
    rows = np.arange(count)
    for own, expected in zip(mpi.shares(count, size), np.array_split(rows, size), strict=True):
        assert rows[own].tolist() == expected.tolist()


@needs_mpirun
@pytest.mark.slow
def test_a_comparison_sets_one_process_beside_both_splits(data, tmp_path):
    flags = [
        "--dataset=fashion-mnist",
        f"--data={data}",
        "--epochs=2",
        "--hidden=12",
        "--batch-size=20",
    ]
    out = by_command(2, "train_mpi", *flags, "--compare", f"--metrics={tmp_path / 'metrics'}")
    alone = names_of_one_process()
    runs = [*alone, "--split data", "--split model"]
    assert out.count("test accuracy") == 2 * len(runs) + 1  # process 0 alone prints
    for row in ("data", "forward", "backward", "collectives", "optimizer", "a step"):
        assert len(re.findall(rf"│ {row}, ms +(│ +\d+\.\d{{3}} +){{{len(runs)}}}│", out)) == 1
    size = 4 * (784 * 12 + 12 + 12 * 10 + 10 + 1)
    none = r"│ 0 +" * len(alone)
    assert re.search(rf"│ bytes a step +{none}│ {size:,} +│ {4 * 20 * 10} +│", out)
    assert re.search(rf"│ messages a step +{none}│ 1 +│ 1 +│", out)
    cells = rf"((?:│ +(?:\d+\.\d\d|\?) +){{{len(runs)}}})│"
    gains = re.search(rf"│ speed-up over [^│]+{cells}", out).group(1).split("│")[1:]
    assert float(gains[len(alone) - 1]) == 1  # over one process with all threads
    (apart,) = re.findall(r"the losses agree with those of 1 process to (\S+)\n", out)
    assert float(apart) < ROUNDING
    assert re.fullmatch(LAST_LINE, out.splitlines()[-1]).groups() == ("2", "cpu")
    names = [row["run"] for row in rows_of(tmp_path / "metrics")]
    assert names == [name for name in runs for _ in range(2)]
    out = by_command(2, "train_mpi", *flags, "--compare", "--init=zero")
    assert "the losses are not compared: from zero roundings tell the hidden units apart\n" in out


def names_of_one_process() -> list[str]:
    """The names of one process with one thread, and of one with a thread for each core."""
    cores = len(one_process.own_cores())
    return ["1 process, 1 thread"] + [f"1 process, {cores} threads"] * (cores > 1)


def environment_of_numpy(world) -> tuple[int, int, dict[str, str]]:
    return world.size, one_process.own_threads(), dict(os.environ)


@pytest.mark.slow
def test_one_process_trains_with_all_threads_outside_mpi(monkeypatch):
    """The cores of two processes, of which each has one."""
    cores = one_process.own_cores()
    for name, value in {"OMP_NUM_THREADS": "1", "PMI_SIZE": "2", "PMI_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(mpi, "wait", lambda world: None)
    before = dict(os.environ)
    parts = [{core} for core in cores]
    two = SimpleNamespace(rank=0, size=2, allgather=lambda own: parts)
    runs = one_process.train_on_one(two, environment_of_numpy)
    assert list(runs) == names_of_one_process()
    first, *others = runs.values()
    assert first == (1, 1, before)
    for world_size, threads, environment in others:
        assert (world_size, threads) == (1, len(cores))
        assert not {"OMP_NUM_THREADS", "PMI_SIZE", "PMI_RANK"} & environment.keys()
    assert (one_process.own_cores(), dict(os.environ)) == (cores, before)
    assert (
        one_process.train_on_one(SimpleNamespace(rank=1, allgather=lambda own: parts), None) == {}
    )
    assert list(one_process.train_on_one(mpi.OneProcess(), environment_of_numpy)) == [
        "1 process, 1 thread"
    ]


def test_losses_of_a_wrong_split_are_refused(data, monkeypatch):
    expected = [
        float(loss)
        for loss in numbers(trained(mpi.OneProcess(), data, "odd", "data"))["losses"][:, 0]
    ]
    right = [loss * (1 + ROUNDING) for loss in expected]
    assert (
        one_process.compare_losses(expected, {"a": expected})
        == "the losses are exactly those of 1 process"
    )
    agreement = one_process.compare_losses(expected, {"a": expected, "b": right})
    assert agreement == "the losses agree with those of 1 process to 1e-05"
    # No bias.
    monkeypatch.setattr(mpi.HiddenSplitMLP, "output_layer", lambda model, a: a @ model.weights[1])
    run = trained(mpi.OneProcess(), data, "odd", "model")
    wrong = {"--split data": right, "--split model": [epoch.train_loss for epoch in run.results]}
    message = (
        r"--split model: losses are off by \S+, expected those of 1 process; mend its gradients"
    )
    with pytest.raises(ConfigError, match=message):
        one_process.compare_losses(expected, wrong)
    with pytest.raises(ConfigError, match="a: losses are off by nan"):
        one_process.compare_losses(expected, {"a": [float("nan")] * len(expected)})
    with pytest.raises(DivergedError, match="a loss on 1 process is not finite"):
        one_process.compare_losses([1.0, float("nan")], {"a": expected})


@pytest.mark.parametrize(
    "script", ["train_mpi", pytest.param("fashion_pooled", marks=pytest.mark.slow)]
)
@needs_mpirun
def test_several_processes_have_a_thread_each_and_one_has_all(script):
    """A table of the pooled exercise names its threads, too, in another test."""
    # A line in one write: lines of two processes would mix.
    program = f"import {script}\nfrom support import one_process\n"
    program += "print(f'{one_process.own_threads()}\\n', end='')"
    assert without_torch(1, "-c", program).split() == [str(len(one_process.own_cores()))]
    assert without_torch(2, "-c", program).split() == ["1", "1"]


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_ends_all_processes_and_process_0_says_it_first(monkeypatch, rank):
    ended: list[int] = []
    waited: list[float] = []
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    two = SimpleNamespace(COMM_WORLD=SimpleNamespace(rank=rank, size=2))
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=two))
    monkeypatch.setitem(sys.modules, "mpi4py.run", SimpleNamespace(set_abort_status=ended.append))
    monkeypatch.setattr(mpi.time, "sleep", waited.append)
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), mpi.join():
            raise error
    assert ended == [2, 2]
    assert waited == [mpi.GRACE] * rank


PROGRAMS = {
    "epochs": ("train_mpi --epochs=2", "--epochs is 1 on rank 0 and 2 on rank 1"),
    "hidden": ("train_mpi --epochs=1 --hidden=64", r"--hidden is (256,) on rank 0 and (64,) on"),
    "help": (
        "train_mpi --help",
        "the command line is complete on rank 0 and a question for help on rank 1",
    ),
    "wrong": ("train_mpi --epochs=0", "complete on rank 0 and wrong (--epochs is 0, expected at"),
    "program": ("fashion_pooled", "the program is train_mpi.py on rank 0 and fashion_pooled.py on"),
    "data": ("train_mpi --epochs=1", "the checksum of the test images is "),
}


@needs_mpirun
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.slow) for case in PROGRAMS],
)
def test_processes_with_other_settings_end_with_one_line(data, tmp_path, case):
    """By MPI they would wait for each other, or print the stack of Allreduce."""
    other = fashion_mnist(tmp_path, train=61, test=12) if case == "data" else data
    commands: list[str] = []
    for folder, program in ((data, "train_mpi --epochs=1"), (other, PROGRAMS[case][0])):
        name, *flags = program.split()
        script = str(ROOT / "examples" / f"{name}.py")
        commands += [":"] * bool(commands) + ["-n", "1", sys.executable, script, *flags]
        commands += ["--dataset=fashion-mnist", f"--data={folder}"]
    code, out, err = run_without_torch(MPIRUN, *commands)
    assert (code, out) == (2, "")
    assert err.startswith("train_mpi.py: error: ")
    assert PROGRAMS[case][1] in err
    assert err.count("\n") == 1
    assert ", expected the same on all; " in err


@contextmanager
def process(rank: int, other: dict[str, object] | None) -> Iterator[None]:
    """A process of two by MPI, whose ``other`` has these settings; None for this process's own."""

    def allgather(own: dict[str, object]) -> list[object]:
        theirs = own if other is None else {**own, **other}
        return [own, theirs] if rank == 0 else [theirs, own]

    of_mpi = SimpleNamespace(COMM_WORLD=SimpleNamespace(rank=rank, size=2, allgather=allgather))
    with (
        patch.dict(os.environ, RANK=str(rank), WORLD_SIZE="2"),
        patch.dict(sys.modules, {"mpi4py": SimpleNamespace(MPI=of_mpi)}),
    ):
        yield


def test_settings_are_compared_before_the_training_begins():
    """Flags of files may differ. Rank 0 alone prints; what all refuse or ask for is said once."""

    def end(rank: int, other: dict[str, object] | None, *flags: str) -> tuple[object, str, str]:
        out, err, began = StringIO(), StringIO(), []
        arguments = ["train_mpi.py", *flags]
        with (
            process(rank, other),
            patch.object(sys, "argv", arguments),
            redirect_stdout(out),
            redirect_stderr(err),
        ):
            try:
                cli.main(began.append, train_mpi.Flags, mpi.agreeing)
            except SystemExit as e:
                return e.code, out.getvalue(), err.getvalue()
        return len(began), out.getvalue(), err.getvalue()

    remedy = "expected the same on all; start all by one command: mpirun -n N python …, with the "
    for name, value, clause in (
        ("--lr", 0.1, "--lr is 0.5 on rank 0 and 0.1 on rank 1"),
        ("the version of NumPy", "1.0", f"is {np.__version__} on rank 0 and 1.0 on rank 1"),
        ("the version of torchpar", "0", f"is {torchpar.__version__} on rank 0 and 0 on rank 1"),
        ("the command line", "wrong", "the command line is complete on rank 0 and wrong on rank 1"),
    ):
        code, out, err = end(0, {name: value})
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert f"{clause}, {remedy}" in err
        assert end(1, {name: value}) == (2, "", "")
    assert end(0, None) == end(1, None) == (1, "", "")  # it trains
    files = {"--data", "--log-dir", "--metrics", "--report"}
    assert not files & train_mpi.Flags(data=Path("a"), metrics=Path(os.devnull)).shared().keys()
    line = "train_mpi.py: error: --epochs is 0, expected at least 1\n"
    assert end(0, None, "--epochs=0") == (2, "", line)
    assert end(1, None, "--epochs=0") == (2, "", "")
    code, _, err = end(0, {"the command line": "complete"}, "--epochs=0")
    assert code == 2
    assert (
        f"wrong ({line.split(': ')[2].strip()}) on rank 0 and complete on rank 1, {remedy}" in err
    )
    code, out, _ = end(0, None, "--help")
    assert code == 0
    assert "--epochs" in out
    assert end(1, None, "--help")[:2] == (0, "")
    assert end(1, None, "--nonsense") == (2, "", "")
    assert "nonsense" in end(0, None, "--nonsense")[2]


def test_a_difference_names_all_ranks():
    values = [{"a": 1, "b": [2]}, {"a": 1, "b": [3]}, {"a": 1, "b": [2]}, {"a": 1}]
    clause = "b is [2] on ranks 0, 2 and [3] on rank 1 and None on rank 3"
    assert first_difference(values) == ("b", clause)
    assert first_difference(values[::2]) is None


def test_a_missing_mpi_is_one_line(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    code, _, err = lesson("train_mpi")
    assert code == 2
    expected = r"the processes need mpi4py and an MPI \(.*None in sys.modules.*\); "
    expected += "pip install mpi4py mpich"
    assert re.fullmatch(rf"train_mpi\.py: error: {expected}\n", err)


def test_an_mpi_that_does_not_connect_the_processes_is_refused(monkeypatch):
    """As under torchrun, or under the mpirun of another MPI."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    one = SimpleNamespace(COMM_WORLD=SimpleNamespace(size=1))
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=one))
    for script in ("train_mpi", "fashion_pooled"):
        code, out, err = lesson(script)
        assert (code, out) == (2, "")
        expected = (
            "MPI connects 1 process, the launcher started 2; start by the mpirun of mpi4py's MPI: "
        )
        assert err == f"{script}.py: error: {expected}mpirun -n 2 python …\n"


def test_torchrun_is_refused_and_a_list_of_missing_libraries_is_one_line(monkeypatch):
    """The processes of torchrun would each train alone, and write the same files."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")

    class Missing:
        def __getattr__(self, name: str) -> object:
            raise RuntimeError(
                "cannot load MPI library\nlibmpi.so: no such file\nlibmpi.so.12: no such file"
            )

    monkeypatch.setitem(sys.modules, "mpi4py", Missing())
    for script in ("train_mpi", "fashion_pooled"):
        code, out, err = lesson(script)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "the processes need mpi4py and an MPI (cannot load MPI library); pip install" in err
    monkeypatch.setenv("MASTER_PORT", "29400")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for script in ("train_mpi", "fashion_pooled"):
        code, out, err = lesson(script)
        assert (code, out) == (2, "")
        expected = (
            "torchrun started 2 of these processes, which exchange arrays by MPI; start them by "
            "mpirun -n 2"
        )
        assert err == f"{script}.py: error: {expected} python …, or one process by python …\n"


# The pooled exercise


def in_torch(splits, plan) -> Result:
    with join_world("cpu") as world:
        return fashion_pooled.train_torch(world, splits, plan)


def test_pooled_pixels_are_pytorchs(data):
    images, _ = datasets.read("fashion-mnist", data)
    found = fashion_pooled.pool(images)
    expected = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(images.features) / 255, 20)
    np.testing.assert_allclose(found.x, expected.flatten(1).numpy(), rtol=1e-6, atol=1e-7)
    assert (found.x.shape, found.x.dtype) == ((61, 400), np.float32)


@pytest.mark.slow
def test_both_libraries_have_the_same_costs(data, ranks):
    """The first is −1/n · Σ_samples Σ_classes t·log p + (1 − t)·log(1 − p), at the first
    weights."""
    splits, _ = fashion_pooled.load(
        fashion_pooled.Flags(data=data, dataset="fashion-mnist", samples=50)
    )
    in_numpy = partial(fashion_pooled.train_numpy, mpi.OneProcess(), splits)
    x, labels = splits[0]
    p = numpy_mlp.sigmoid(NumpyMLP(SIZES, loss="bce").forward(x)[1].astype(np.float64))
    t = np.eye(10)[labels]
    cost = -(t * np.log(p) + (1 - t) * np.log(1 - p)).sum() / len(labels)
    for plan in (Plan(60, 0.1, 0.0, 0), Plan(30, 0.1, 0.9, 0)):
        expected = in_numpy(plan)
        assert len(expected.costs) == len(expected.times) == plan.iterations
        assert expected.costs[0] == pytest.approx(cost, rel=ROUNDING)
        assert expected.costs[-1] < 0.7 * expected.costs[0]
        for way in ranks(2, in_torch, splits, plan):
            assert_same(numbers(way), numbers(expected))
        with pytest.raises(AssertionError):
            assert_same(numbers(in_numpy(plan._replace(lr=1.001 * plan.lr))), numbers(expected))


@needs_mpirun
@pytest.mark.parametrize(
    "exchange, scatter",
    [
        ("allreduce", "once"),
        pytest.param("gather", "once", marks=pytest.mark.slow),
        pytest.param("gather", "each", marks=pytest.mark.slow),
    ],
)
def test_one_command_sets_one_process_beside_several(data, tmp_path, exchange, scatter):
    flags = [f"--data={data}", "--samples=50", "--iterations=30", f"--exchange={exchange}"]
    flags += [f"--scatter={scatter}"]
    out = by_command(2, "fashion_pooled", *flags, f"--metrics={tmp_path / 'metrics'}")
    once = ["scatter, once"] * (scatter == "once")
    once += ["broadcast, once"] * (exchange == "allreduce")
    each = ["scatter"] * (scatter == "each") + ["broadcast"] * (exchange == "gather")
    each += [
        "hidden layer",
        "output layer",
        "cost",
        "forward: these three",
        "backward",
        exchange,
        "descent",
    ]
    alone = names_of_one_process()
    for phase in (*once, *each, "iteration"):
        columns = rf"(│ \d+\.\d{{3}} +){{{len(alone) + 1}}}"
        assert len(re.findall(rf"│ {phase} +{columns}│", out)) == 1
    shown = re.findall(r"iteration (\d+)/60 \| cost \d\.\d{4} \| \d+\.\d\d ms", out)
    assert [*map(int, shown)] == [1, 2, 5, 10, 20, 30, 60]
    (apart,) = re.findall(r"the losses agree with those of 1 process to (\S+)\n", out)
    assert float(apart) < ROUNDING
    rows = rows_of(tmp_path / "metrics")
    iterations, runs = rows[:-2], rows[-2:]
    kinds = [
        (row.get("run"), row["ranks"], row["iterations"], row["iteration"]) for row in iterations
    ]
    ways = [*((name, 1) for name in alone), (None, 2)]
    assert kinds == [
        (*way, plan, i) for way in ways for plan in (60, 30) for i in range(1, plan + 1)
    ]
    assert min(row["seconds"] for row in iterations) > 0
    assert [row["last_cost"] for row in runs] == [iterations[-31]["cost"], iterations[-1]["cost"]]


def test_mnist_stands_in_for_fashion_mnist(data, tmp_path):
    flags = fashion_pooled.Flags(data=data)
    assert fashion_pooled.find_dataset(flags) == ("fashion-mnist", "")
    flags.data = tmp_path
    assert fashion_pooled.find_dataset(flags) == ("fashion-mnist", "")  # whose files it asks for
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    (tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte.gz").touch()
    name, line = fashion_pooled.find_dataset(flags)
    assert name == "mnist"
    assert (
        line
        == f"MNIST stands in for Fashion-MNIST, of which {tmp_path}/FashionMNIST/raw holds no files"
    )
    flags.dataset = "kmnist"
    assert fashion_pooled.find_dataset(flags) == ("kmnist", "")
