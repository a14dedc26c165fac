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


def test_muon_loads_nothing_of_parallel(tmp_path: Path) -> None:
    loaded = run(sys.executable, "-c", IMPORTS, cwd=tmp_path, PYTHONPATH=str(ROOT)).split()
    modules = ("assign", "chained", "exchange", "matrices", "muon", "newton_schulz", "parts", "sgd")
    optim = {"torchpar.optim", *(f"torchpar.optim.{name}" for name in modules)}
    exact = {"torchpar.errors", "torchpar.ieee"}  # of the exact products
    assert set(loaded) == {"torchpar.nn", "torchpar.wire"} | optim | exact


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


# Releases


def test_what_names_the_version_agrees() -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML reads CITATION.cff")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == torchpar.__version__
    assert f"## {torchpar.__version__}, {citation['date-released']}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_issue_forms_have_what_github_needs() -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML reads the forms")
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert len(forms) == 3
    for form in forms:
        content = yaml.safe_load(form.read_text())
        assert content["name"]
        assert content["description"]
        for field in content["body"]:
            assert field["type"] == "textarea"
            assert field["id"]
            assert field["attributes"]["label"]


@pytest.mark.parametrize(
    "flags, replaced, status, message",
    [
        ("--dry", {}, 2, "usage: .ci/release [--dry-run]"),
        ("--dry-run extra", {}, 2, "usage: .ci/release [--dry-run]"),
        ("--dry-run", {"CHANGELOG.md": "## 0.1.0"}, 1, "CHANGELOG.md has no section '## 7.8.9, DATE'"),
        ("--dry-run", {"CITATION.cff": "version: 7.8.90"}, 1, "CITATION.cff does not have version 7.8.9"),
        ("", {"notes.txt": ""}, 1, "there are changes that are not committed; commit or stash them"),
    ],
)  # fmt: skip
def test_a_release_that_is_not_ready_is_refused(
    tmp_path: Path, flags: str, replaced: dict[str, str], status: int, message: str
) -> None:
    files = {
        ".ci/release": (ROOT / ".ci" / "release").read_text(),
        "torchpar/__init__.py": '__version__ = "7.8.9"\n',
        "CHANGELOG.md": "## 7.8.9, 2026-11-22\n",
        "CITATION.cff": "version: 7.8.9\n",
        ".venv/bin/python": "",
    }
    for name, text in (files | replaced).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / ".venv/bin/python").chmod(0o755)
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    command = ["bash", ".ci/release", *flags.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (status, "")
    assert message in done.stderr
