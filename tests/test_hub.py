# SPDX-License-Identifier: MIT
"""Tests of the package for the Hugging Face Hub's library `kernels`, as written and as loaded from a path."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, run
from test_kernels_interpreted import pytestmark as needs_interpreter

import torchpar

CHECKS = Path(__file__).parent / "hub_checks.py"
VARIANT = "build/torch-universal"
# By its metadata: on pytest's path `import kernels` finds this repository's folder.
HAS_KERNELS = any(importlib.metadata.distributions(name="kernels"))


def write_package(folder: Path, source: Path = ROOT) -> tuple[int, str, str]:
    return run(sys.executable, str(source / ".ci" / "hub.py"), str(folder))


def check(loader: str, names: str, *folders: str, cwd: Path, **environment: str) -> None:
    """Run checks of hub_checks.py in a process whose path does not have this repository."""
    path = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part != str(ROOT)]
    environment |= {"PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-B", str(CHECKS), loader, names, *folders]
    result = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "package"
    status, _, err = write_package(folder)
    assert status == 0, err
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what the package is made from, to be changed."""
    for name in (".ci", "torchpar", "kernels"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / "source" / name, symlinks=True, ignore=ignored)
    shutil.copy(ROOT / "LICENSE", tmp_path / "source")
    return tmp_path / "source"


def identifier(package: Path) -> str:
    return str(json.loads((package / VARIANT / "metadata.json").read_text())["id"])


def cached(package: Path, folder: Path) -> Path:
    """The package as the Hub's cache holds it: each file is a link to one with another name and folder."""
    for number, file in enumerate(path for path in package.rglob("*") if path.is_file()):
        blob, link = folder / "blobs" / str(number), folder / "snapshot" / file.relative_to(package)
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        link.symlink_to(blob)
    return folder / "snapshot"


def test_the_package_holds_the_operators_and_what_they_import(package: Path) -> None:
    files = {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()}
    operators = {f"ops/{path.name}" for path in (ROOT / "torchpar" / "ops").glob("*.py")}
    kernels = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "kernels").rglob("*.*")
        if path.suffix in (".py", ".json")
    }
    modules = operators | kernels | {"__init__.py", "_ops.py", "errors.py", "ieee.py"}
    build = {f"{VARIANT}/torchpar/{name}" for name in modules}
    assert files == build | {f"{VARIANT}/metadata.json", "README.md", "LICENSE"}
    metadata = json.loads((package / VARIANT / "metadata.json").read_text())
    assert {f"{VARIANT}/{name}" for name in metadata["digest"]["files"]} == build


def test_the_same_sources_give_the_same_package(package: Path, source: Path, tmp_path: Path) -> None:
    assert write_package(tmp_path / "again", source)[0] == 0
    metadata = f"{VARIANT}/metadata.json"
    assert (tmp_path / "again" / metadata).read_bytes() == (package / metadata).read_bytes()


def test_a_package_in_the_hubs_cache(package: Path, tmp_path: Path) -> None:
    checks = "values" if HAS_KERNELS else "values,derivatives"
    check("importlib", checks, ".", cwd=cached(package, tmp_path))


@pytest.mark.skipif(not HAS_KERNELS, reason="Hugging Face's library `kernels` is not installed")
def test_a_package_loaded_by_the_library(package: Path) -> None:
    check("kernels", "values,derivatives,example,digest", ".", cwd=package)


@needs_interpreter
def test_a_launcher_of_the_package(package: Path) -> None:
    check("importlib", "launcher", ".", cwd=package, TRITON_INTERPRET="1")


def test_versions_beside_an_installed_torchpar(package: Path, source: Path, tmp_path: Path) -> None:
    path = source / "torchpar" / "__init__.py"
    path.write_text(path.read_text().replace(f'"{torchpar.__version__}"', '"99.0"'))
    assert write_package(tmp_path / "other", source)[0] == 0
    shutil.copytree(package, tmp_path / "copy")
    shutil.copytree(tmp_path / "other", tmp_path / "clash")
    library = tmp_path / "clash" / VARIANT / "torchpar" / "ops" / "_library.py"
    library.write_text(library.read_text().replace(identifier(tmp_path / "other"), identifier(package)))
    metadata = tmp_path / "clash" / VARIANT / "metadata.json"
    metadata.write_text(metadata.read_text().replace(identifier(tmp_path / "other"), "clash"))
    check("importlib", "versions", str(package), "copy", "other", "clash", cwd=tmp_path)


@pytest.mark.parametrize(
    "file, line, message",
    [
        ("torchpar/ops/maximum.py", "from torchpar import nn", "uses torchpar,"),
        ("torchpar/ops/maximum.py", "def f():\n    import torchpar.nn", "uses torchpar.nn,"),
        ("torchpar/ops/maximum.py", "f(torch.ops.torchpar.maximum)", "uses torchpar,"),
        ("torchpar/ops/_library.py", 'import_module(f"torchpar.{name}")', "uses torchpar.,"),
        ("torchpar/ieee.py", "import numpy", "uses numpy,"),
        ("kernels/tables.py", "def f():\n    from torchpar import nn", "uses torchpar,"),
        ("torchpar/ops/_library.py", 'NAMESPACE = "torchpar"', "expected one line NAMESPACE"),
    ],
)
def test_what_cannot_be_part_of_the_package_is_refused(
    source: Path, tmp_path: Path, file: str, line: str, message: str
) -> None:
    with (source / file).open("a") as stream:
        stream.write(f"{line}\n")
    status, out, err = write_package(tmp_path / "package", source)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert file.removeprefix("torchpar/") in err
    assert message in err
    assert not (tmp_path / "package").exists()


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path, tmp_path / "file"):
        status, _, err = write_package(folder)
        assert (status, err.count("\n")) == (2, 1)
        assert "is not an empty folder" in err
    (tmp_path / "empty").mkdir()
    assert write_package(tmp_path / "empty")[0] == 0
