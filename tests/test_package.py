# SPDX-License-Identifier: MIT
"""Tests of the modules that an import loads, of the wheel, and of the sdist."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

import pytest

import torchpar

ROOT = Path(__file__).parents[1]


def run(*command: str, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def build(source: Path, out: Path, *kinds: str) -> None:
    run(sys.executable, "-m", "build", "--no-isolation", *kinds, "--outdir", str(out), cwd=source)


class Built(NamedTuple):
    wheel: Path
    sdist: Path
    wheel_from_sdist: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    pytest.importorskip("build", reason="the package `build` is not installed")
    if int(importlib.metadata.version("setuptools").partition(".")[0]) < 77:
        pytest.skip("building the package needs setuptools 77 or newer")
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, which lists the files of the package's source")
    folder = tmp_path_factory.mktemp("package")
    names = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, names.split("\0")):
        if (ROOT / name).exists():  # git still lists a deleted file before the commit
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / "source" / name, follow_symlinks=False)
    build(folder / "source", folder / "dist", "--wheel", "--sdist")
    (wheel,), (sdist,) = ((folder / "dist").glob(pattern) for pattern in ("*.whl", "*.tar.gz"))
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    build(unpacked, folder / "again", "--wheel")
    (again,) = (folder / "again").iterdir()
    return Built(wheel, sdist, again)


def contents(wheel: Path) -> dict[str, int]:
    """The checksum of each file."""
    with ZipFile(wheel) as archive:
        return {info.filename: info.CRC for info in archive.infolist()}


def package_files() -> set[str]:
    kernels = {
        f"torchpar/kernels/{file.relative_to(ROOT / 'kernels')}" for file in (ROOT / "kernels").rglob("*.py")
    }
    package = {str(file.relative_to(ROOT)) for file in (ROOT / "torchpar").rglob("*.py")}
    return kernels | package | {"torchpar/py.typed"}


IMPORTS = """
import sys
sys.modules.update(rich=None, triton=None, torchvision=None)  # importing one of them fails
import torchpar
torchpar.optim.Muon
print(*(name for name in sys.modules if name.startswith("torchpar.") and not name.startswith("torchpar.ops")))
import torchpar.tune.command, torchpar.tune.measure  # the benchmarks import it
"""


def test_muon_loads_nothing_of_parallel_but_the_device_to_send_from(tmp_path: Path) -> None:
    loaded = run(sys.executable, "-c", IMPORTS, cwd=tmp_path, PYTHONPATH=str(ROOT)).split()
    modules = ("assign", "chained", "exchange", "matrices", "muon", "newton_schulz", "parts", "sgd")
    optim = {"torchpar.optim", *(f"torchpar.optim.{name}" for name in modules)}
    exact = {"torchpar.errors", "torchpar.ieee"}  # of the exact products
    assert set(loaded) == {"torchpar.nn", "torchpar.parallel", "torchpar.parallel.wire"} | optim | exact


def test_the_wheel_holds_the_package_and_nothing_else(built: Built) -> None:
    files = set(contents(built.wheel))
    info = f"torchpar-{torchpar.__version__}.dist-info/"
    assert {"torchpar/kernels/maximum.py", "torchpar/ops/maximum.py"} < package_files() <= files
    assert f"{info}licenses/LICENSE" in files
    assert {name.partition("/")[0] + "/" for name in files} == {"torchpar/", info}


def test_the_sdist_holds_what_the_wheel_is_built_from_and_nothing_else(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    assert package_files() | {"pyproject.toml", "README.md", "LICENSE"} <= files
    folders = {name.partition("/")[0] for name in files if "/" in name}
    assert folders == {"torchpar", "torchpar.egg-info"}  # no top-level kernels, no examples, no tests


def test_the_sdist_builds_the_same_wheel(built: Built) -> None:
    assert contents(built.wheel_from_sdist) == contents(built.wheel)


def test_the_version_is_in_one_place(built: Built) -> None:
    version = torchpar.__version__
    assert built.wheel.name == f"torchpar-{version}-py3-none-any.whl"
    assert built.sdist.name == f"torchpar-{version}.tar.gz"
    with ZipFile(built.wheel) as archive:
        metadata = archive.read(f"torchpar-{version}.dist-info/METADATA").decode()
    assert f"\nVersion: {version}\n" in metadata
    assert "\nLicense-Expression: MIT\n" in metadata


USE = """
import importlib.metadata, torch, torchpar
from torchpar import kernels
x = torch.ones(3, 2)
print(torchpar.__file__, kernels.__file__, importlib.metadata.version("torchpar"), sep="\\n")
print(torch.ops.torchpar.matmul_t(x).sum().item())
"""


def test_the_installed_wheel_works_from_anywhere(built: Built, tmp_path: Path) -> None:
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--no-compile", "--quiet"]
    run(*pip, "--target", str(target), str(built.wheel), cwd=tmp_path)
    assert not (target / "kernels").exists()
    package, kernels, version, total = run(
        sys.executable, "-c", USE, cwd=tmp_path, PYTHONPATH=str(target)
    ).splitlines()
    assert Path(package) == target / "torchpar" / "__init__.py"
    assert Path(kernels) == target / "torchpar" / "kernels" / "__init__.py"
    assert version == torchpar.__version__
    assert float(total) == 18
