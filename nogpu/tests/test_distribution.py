# SPDX-License-Identifier: MIT
"""The wheel and the plugin: nogpu runs from an empty folder, and pytest loads it by each way."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
from processes import ROOT

import nogpu
from nogpu import command

SCRIPT = """
import importlib.util
import torch, triton
import triton.language as tl

assert importlib.util.find_spec("torchpar") is None

@triton.jit
def scale(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, 2 * tl.load(x + i), mask=i < n)

x = torch.randn(1000)
scale[(4,)](x, torch.empty_like(x), 1000, BLOCK=256)
"""
# Of the editable installs only the path hooks find this checkout.
HIDING = """
import sys
sys.meta_path = [one for one in sys.meta_path if "Editable" not in getattr(one, "__name__", "")]
sys.path = [one for one in sys.path if "-packages" in one or not one.startswith(CHECKOUT)]
"""


@pytest.mark.slow  # it builds, and starts PyTorch
def test_the_wheel_runs_a_script_from_an_empty_folder(tmp_path):
    pytest.importorskip("build", reason="build makes the wheel")
    dist, site, empty = (tmp_path / name for name in ("dist", "site", "empty"))
    source = tmp_path / "source"  # what is built leaves files beside it
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns("build", "tests", "*.egg-info"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", dist, source]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = dist.glob("*.whl")
    with ZipFile(wheel) as archive:
        held = set(archive.namelist())
        archive.extractall(site)
    package = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src" / "nogpu").rglob("*.*")
        if path.suffix in (".c", ".html", ".py", ".typed")
    }
    assert {name for name in held if ".dist-info/" not in name} == package
    (points,) = (name for name in held if name.endswith("entry_points.txt"))
    assert "nogpu.pytest = nogpu.pytest" in (site / points).read_text()
    empty.mkdir()
    checkout = f"CHECKOUT = {str(ROOT.parent)!r}"
    (site / "sitecustomize.py").write_text(checkout + HIDING)
    (empty / "scale.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "nogpu", "scale.py"],
        cwd=empty,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert "error: out of bounds in scale" in done.stdout
    assert done.stderr == ""


@pytest.mark.slow  # each starts pytest
@pytest.mark.parametrize("way", [(), ("-p", "nogpu.pytest")])
def test_pytest_loads_the_plugin_by_each_way(tmp_path, way):
    (tmp_path / "test_gpu.py").write_text("def test_gpu(gpu):\n    assert gpu.arch == 'sm_90'\n")
    for flags, said in ((["--nogpu"], "1 passed"), ([], "1 skipped")):
        command = [sys.executable, "-m", "pytest", "-q", *way, "test_gpu.py", *flags]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert said in done.stdout


@pytest.mark.slow  # it starts pytest
def test_the_readmes_test_passes_as_it_stands(tmp_path):
    page = (ROOT / "README.md").read_text("utf-8")
    (code,) = re.findall(r"```py\n# test_kernels.py\n(.*?)```", page, re.DOTALL)
    (tmp_path / "test_kernels.py").write_text(code, "utf-8")
    (flags,) = re.findall(r"`python (-m pytest test_kernels.py .*?)`", page)
    command = [sys.executable, *flags.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


def test_the_version_is_that_of_the_changelog(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        command.main(["--version"])
    assert capsys.readouterr().out == f"nogpu {nogpu.__version__}\n"
    newest = re.search(r"^## (.*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert re.fullmatch(rf"{re.escape(nogpu.__version__)}, 20\d\d-\d\d-\d\d", newest.group(1))


@pytest.mark.slow  # it starts pytest
def test_a_flag_without_nogpu_is_refused(tmp_path):
    command = [sys.executable, "-m", "pytest", "-q", "--nogpu-arch=sm_90"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 4
    assert "--nogpu-arch needs --nogpu, which executes the kernels" in done.stderr


def test_no_module_imports_torchpar():
    for path in (ROOT / "src").rglob("*.py"):
        text = Path(path).read_text("utf-8")
        assert "import torchpar" not in text, path
        assert "from torchpar" not in text, path


def modules() -> set[str]:
    """The names of all modules and folders, but for the many files of `instructions`."""
    folder = ROOT / "src" / "nogpu"
    files = [one for one in folder.rglob("*.py") if one.parent.name != "instructions"]
    return {one.stem for one in files} - {"__init__", "__main__"} | {
        one.parent.name for one in folder.rglob("*/__init__.py")
    }


def named(text: str) -> set[str]:
    return set(re.findall(r"(?<!`)`(\w+)`(?!`)", text))


def test_the_map_names_each_module_and_no_other():
    text = nogpu.__doc__ or ""
    assert modules() - {"nogpu"} == named(text)
    assert modules() - {"nogpu"} != named(text.replace("`spins`", "`spinning`"))
