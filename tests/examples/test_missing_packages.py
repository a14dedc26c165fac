# SPDX-License-Identifier: MIT
"""Each package of an extra that is missing is one line, which ends with the pip command."""

import os
import sys
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from commands import MPIRUN, ROOT, run

from nogpu import command
from torchpar.baselines import mpi
from torchpar.errors import AllRanksError, ConfigError

# What no finder finds, as where the package is not installed.
HIDING = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec

def find_spec(name, *more):
    return None if name.partition(".")[0] == "HIDDEN" else find(name, *more)

PathFinder.find_spec = find_spec
"""
NUMBA = "from numba import njit\n\n@njit\ndef max_numba(A, B):\n    return A\n"
PYTHON = [sys.executable]
TORCHPAR = [*PYTHON, "-m", "torchpar"]
EXAMPLES = f"{ROOT}/examples"
# The package, the command, and what its line says.
COMMANDS = [
    ("tyro", [*PYTHON, f"{EXAMPLES}/matmul_regression.py"], "pip install rich tyro"),
    ("tyro", [MPIRUN, "-n", "2", *PYTHON, f"{EXAMPLES}/train_mpi.py"], "pip install rich tyro"),
    ("rich", [*TORCHPAR, "ladder"], "this benchmark needs rich; pip install rich"),
    ("matplotlib", [*PYTHON, f"{EXAMPLES}/playground.py", "--plots", "p"], "install matplotlib"),
    ("scipy", [*PYTHON, f"{EXAMPLES}/fashion_pooled.py", "--images", "x.mat"], "install scipy"),
    ("numba", [*TORCHPAR, "ladder", "--with", "my.py"], "named 'numba'; pip install numba"),
    ("lightning", [*PYTHON, f"{EXAMPLES}/train_lightning.py", "fit"], "torchpar[examples,light"),
    ("nogpu", [*PYTHON, f"{EXAMPLES}/own_layers.py"], "pip install ./nogpu"),
    ("nogpu", [*PYTHON, f"{EXAMPLES}/course_kernels.py"], "pip install ./nogpu"),
    (
        "nogpu",
        [*TORCHPAR, "explain", "matmul_t", "64x64", "--all"],
        "--all needs nogpu; in a checkout, pip install ./nogpu",
    ),
    (
        "nogpu",
        [*PYTHON, "-m", "benchmarks", "run", "autotune"],
        "needs nogpu; in a checkout, pip install ./nogpu",
    ),
    ("mpi4py", [MPIRUN, "-n", "2", *PYTHON, f"{EXAMPLES}/train_mpi.py"], "install mpi4py mpich"),
]


@pytest.mark.slow  # each imports PyTorch
@pytest.mark.parametrize("package, words, said", COMMANDS)
def test_a_missing_package_is_one_line_with_the_pip_command(tmp_path, package, words, said):
    if words[0] is None:
        pytest.skip("no mpirun; pip install mpich")
    (tmp_path / "hiding").mkdir()
    (tmp_path / "hiding" / "sitecustomize.py").write_text(HIDING.replace("HIDDEN", package))
    (tmp_path / "my.py").write_text(NUMBA)
    (tmp_path / "x.mat").touch()
    path = f"PYTHONPATH={tmp_path / 'hiding'}{os.pathsep}{ROOT}"
    code, out, err = run("env", path, *words, cwd=tmp_path)
    assert code in (1, 2)
    assert "Traceback" not in out + err
    assert err.count("\n") == 1, err
    assert said in err


@pytest.mark.parametrize("is_there", [True, False])
def test_a_page_without_pictures_says_what_they_need(tmp_path, monkeypatch, capsys, is_there):
    script = ROOT / "examples" / "scale.py"
    monkeypatch.setattr(sys, "path", [*sys.path])
    with patch.object(command, "find_spec", lambda _: SimpleNamespace() if is_there else None):
        command.main(["--report", str(tmp_path / "page.html"), str(script)])
    assert (tmp_path / "page.html").is_file()
    line = "page.html has no pictures: matplotlib is not installed; pip install matplotlib\n"
    assert capsys.readouterr().err.endswith(line) != is_there


@pytest.mark.parametrize("local, kind", [("2", AllRanksError), ("1", ConfigError)])
def test_a_missing_mpi_is_said_once_on_one_machine(monkeypatch, local, kind):
    """On several machines each rank says so, because another one may have mpi4py."""
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": local,
        "MASTER_ADDR": "here",
        "MASTER_PORT": "29500",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="pip install mpi4py mpich") as raised, mpi.join():
        pass
    assert raised.type is kind
