# SPDX-License-Identifier: MIT
"""Tests of what is shipped: the wheel, the sdist, and the files' first lines and imports.

`import-linter` checks the imports within torchpar.
"""

import ast
import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import pytest
from commands import ROOT

import torchpar

# Folders that the package has by links.
LINKED = ("kernels", "benchmarks")
TABLE = "benchmarks/results/nvidia-h200/ladder.csv"


def run(*command: str, cwd: Path, **environment: str) -> str:
    return subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | environment,
        check=True,
        text=True,
        stdout=subprocess.PIPE,
    ).stdout


# What `python -m build` does, in one process.
BUILD = """
import os, sys, tarfile
from setuptools import build_meta
sys.modules["torch"] = None  # as in an environment of its own
dist = os.path.abspath("dist")
sdist = build_meta.build_sdist(dist)
with tarfile.open(os.path.join(dist, sdist)) as archive:
    archive.extractall("unpacked", filter="data")
os.chdir(os.path.join("unpacked", sdist.removesuffix(".tar.gz")))
build_meta.build_wheel(dist)
"""


def copy_of_source(source: Path) -> Path:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, which lists the files of the package's source")
    names = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, names.split("\0")):
        if (ROOT / name).exists():  # git still lists a deleted file before the commit
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    return source


def path_without_kernels() -> str:
    """PYTHONPATH without a checkout: its `kernels` is not the library that extends setuptools."""
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(one for one in path if one and not Path(one, "kernels").exists())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it."""
    pytest.importorskip("setuptools", "77", reason="setuptools builds the package")
    source = copy_of_source(tmp_path_factory.mktemp("package") / "source")
    run(sys.executable, "-P", "-c", BUILD, cwd=source, PYTHONPATH=path_without_kernels())
    version = torchpar.__version__
    return (
        source / f"dist/torchpar-{version}.tar.gz",
        source / f"dist/torchpar-{version}-py3-none-any.whl",
    )


def test_the_wheel_and_the_sdist_hold_the_package_and_nothing_else(
    built: tuple[Path, Path],
) -> None:
    sdist, wheel = built
    info = f"torchpar-{torchpar.__version__}.dist-info"
    with ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    metadata = files[f"{info}/METADATA"].decode()
    assert f"\nVersion: {torchpar.__version__}\n" in metadata
    assert "\nLicense-Expression: MIT\n" in metadata
    assert f"{info}/licenses/LICENSE" in files
    # rglob follows none of the links.
    folders = {"torchpar": ROOT / "torchpar"}
    folders |= {f"torchpar/{name}": ROOT / name for name in LINKED}
    package = {
        f"{name}/{path.relative_to(folder).as_posix()}": path.read_bytes()
        for name, folder in folders.items()
        for path in folder.rglob("*.*")
        if path.suffix in (".c", ".cpp", ".csv", ".py", ".typed", ".json", ".html")
        # Of the benchmarks the modules, and the table that `python -m torchpar ladder` reads.
        if path.suffix == ".py" or folder.name != "benchmarks" or path.match(TABLE)
    }
    assert {name: text for name, text in files.items() if not name.startswith(info)} == package
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {*package, "pyproject.toml", "README.md", "LICENSE"} <= names
    # No top-level kernels and benchmarks, no examples, no tests.
    assert {name.partition("/")[0] for name in names if "/" in name} == {
        "torchpar",
        "torchpar.egg-info",
    }


@pytest.mark.slow  # the command imports PyTorch
def test_the_ladder_runs_from_the_wheel(built: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("rich", reason="the ladder prints by it")
    with ZipFile(built[1]) as archive:
        archive.extractall(tmp_path / "installed")
    command = [sys.executable, "-m", "torchpar", "ladder"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run(
        [*command, "--with", "missing.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("python -m torchpar ladder: error: --with ")
    assert "missing.py is no file; name a Python file that defines any of max_cpu" in done.stderr


# Stands for a C++ compiler: it writes what it is told to, or fails.
COMPILER = """
import sys
if "-o" in sys.argv:
    open(sys.argv[sys.argv.index("-o") + 1], "w").write("compiled")
    sys.exit({status})
"""


@pytest.mark.slow  # each wheel imports PyTorch twice
def test_a_wheel_that_is_built_beside_pytorch_has_the_library_for_it(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", "77", reason="setuptools builds the package")
    pytest.importorskip("pip", reason="pip calls setuptools")
    torch = pytest.importorskip("torch", reason="the library is for a PyTorch")
    if torch.version.cuda is None:
        pytest.skip("the library is for a PyTorch of NVIDIA's GPUs")
    from torchpar.library import build

    source = copy_of_source(tmp_path / "source")
    command = (sys.executable, "-P", "-m", "pip", "wheel", "--no-build-isolation", "--no-deps")
    for status in (0, 1, 0):  # what one build leaves in the source does not go into the next
        compiler = tmp_path / "compiler.py"
        compiler.write_text(COMPILER.format(status=status))
        words = [sys.executable, str(compiler)]
        environment = {"PYTHONPATH": path_without_kernels(), "CXX": " ".join(words)}
        shutil.rmtree(tmp_path / "dist", ignore_errors=True)
        run(*command, "--wheel-dir", str(tmp_path / "dist"), ".", cwd=source, **environment)
        (wheel,) = (tmp_path / "dist").iterdir()
        with ZipFile(wheel) as archive:
            libraries = {name for name in archive.namelist() if name.endswith(build.SUFFIX)}
            info = f"torchpar-{torchpar.__version__}.dist-info"
            tags = archive.read(f"{info}/WHEEL").decode()
        start = f"torchpar-{torchpar.__version__}-"
        if status:
            assert wheel.name == f"{start}py3-none-any.whl"
            assert (libraries, "Root-Is-Purelib: true" in tags) == (set(), True)
        else:
            python = "cp{}{}".format(*sys.version_info)
            version = torch.__version__.replace("+", ".")
            assert wheel.name.startswith(f"{start}1torch{version}-{python}-{python}")
            assert "-any" not in wheel.name
            assert libraries == {f"torchpar/library/{build.library_name(words)}"}
            assert "Root-Is-Purelib: false" in tags


def test_what_names_the_version_agrees() -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML reads CITATION.cff")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == torchpar.__version__
    assert (
        f"## {torchpar.__version__}, {citation['date-released']}\n"
        in (ROOT / "CHANGELOG.md").read_text()
    )


def test_the_command_prints_the_version(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["torchpar", "--version"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_module("torchpar", run_name="__main__")
    assert capsys.readouterr().out == f"torchpar {torchpar.__version__}\n"


# Rules of CONTRIBUTING that a reader would otherwise have to check

FILES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for folder in ("torchpar", "kernels", "examples", "benchmarks", "tests", "docs", "nogpu")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not any(path.is_relative_to(ROOT / "torchpar" / name) for name in LINKED)
}
FIRST_LINES = (
    r'# SPDX-License-Identifier: MIT\n("""(?!(What|Who|That|Where|Whether|How)\b)|(?!"""))'
)
FORBIDDEN = {  # folder: what its files do not import
    "kernels": "torchpar|benchmarks|support",
    "torchpar": "benchmarks|support|kernels",
    "examples": "benchmarks",
    "benchmarks": "benchmarks|support",  # they are `torchpar.benchmarks`, too
    "nogpu": "torchpar|benchmarks|support",
}


def test_first_lines_have_the_licence_and_name_their_subject():
    assert not [name for name, text in FILES.items() if not re.match(FIRST_LINES, text)]


def test_arrows_go_one_way():
    for name, text in FILES.items():
        if modules := FORBIDDEN.get(name.partition("/")[0]):
            assert not re.search(rf"^\s*(from|import) ({modules})\b", text, re.MULTILINE), name


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """The statements in a node. Expressions, which are most of a file's nodes, hold none."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr):
            yield child
            yield from statements(child)


def private_names(text: str, own: list[str]) -> list[str]:
    """Private names of torchpar's other packages than ``own`` that a file imports, or takes from a
    module."""
    found = {}
    for node in statements(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            found |= {
                alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names
            }
        elif isinstance(node, ast.Import):
            found |= {
                first: first for first in (alias.name.partition(".")[0] for alias in node.names)
            }
    taken = re.findall(r"(?<![.\w])(\w+)((?:\.\w+)+)", text)
    names = [*found.values(), *(found[first] + rest for first, rest in taken if first in found)]
    foreign = [
        name for name in names if re.match(r"torchpar\.", name) and name.split(".")[:2] != own
    ]
    return [name for name in foreign if re.search(r"\._[a-z]", name)]


def test_no_package_takes_a_private_name_of_another():
    for name, text in FILES.items():
        if name.startswith(("torchpar", "examples", "benchmarks")):
            own = name.removesuffix(".py").split("/")[:2]
            assert not private_names(text, own), name
    wrong = (
        "import torchpar.a\nfrom torchpar import b\nfrom torchpar.c import _d\nfrom torchpar.e "
        "import f\n"
    )
    wrong += "b._g, f.h._i, torchpar.a._j"
    expected = ["torchpar.c._d", "torchpar.b._g", "torchpar.e.f.h._i", "torchpar.a._j"]
    assert private_names(wrong, ["torchpar", "b"]) == [expected[0], *expected[2:]]
    assert private_names(wrong, []) == expected


def test_only_tests_change_the_import_path():
    """But for commands that run a reader's file: its folder is there, as under ``python my.py``."""
    changing = {name for name, text in FILES.items() if "sys.path" in text}
    assert {name for name in changing if "tests/" not in name} == {
        "torchpar/baselines/grader.py",
        "torchpar/baselines/mpi_watch.py",
        "nogpu/src/nogpu/command.py",
        "nogpu/src/nogpu/judge/problem.py",
    }


# Names that a module of this repository's folder shares with a distribution.
SHARED = {
    "torchpar",  # an installed one is this one
    "kernels",  # the Hub's library, which tests/test_hub.py imports without this repository's path
}


def modules(folder: Path) -> set[str]:
    """The modules in a folder. A folder without ``__init__.py`` is none here: Python prefers a
    module anywhere on the path."""
    packages = {path.parent.name for path in folder.glob("*/__init__.py")}
    return packages | {path.stem for path in folder.glob("*.py")}


def test_no_module_on_the_tests_path_shadows_another(tmp_path):
    """Neither one of the standard library, nor one of an installed distribution."""
    others = sys.stdlib_module_names | importlib.metadata.packages_distributions().keys()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]
    folders = {ROOT / folder for folder in settings["ini_options"]["pythonpath"]}
    for path in (ROOT / "tests").rglob("test_*.py"):
        # The path has the folder of the outermost package, as pytest says.
        folders.add(next(one for one in path.parents if not (one / "__init__.py").exists()))
    assert ROOT / "tests" / "library" in folders
    for folder in folders:
        assert modules(folder) & others <= (SHARED if folder == ROOT else set()), folder
    for name in ("grp.py", "pytest.py", "torch/__init__.py", "json/cases.py", "grp_cases.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert modules(tmp_path) & others == {"grp", "pytest", "torch"}


def packages(top: str) -> list[Path]:
    """The packages with several modules in a folder of this checkout, links left out."""
    found = [path.parent for path in sorted((ROOT / top).rglob("__init__.py"))]
    return [folder for folder in found if len([*folder.glob("*.py")]) > 3 and folder.name != top]


def unnamed(package: Path) -> list[str]:
    """The modules of a package that its docstring does not name."""
    text = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    names = {path.stem for path in package.glob("*.py") if not path.stem.startswith("_")}
    return sorted(name for name in names if not re.search(rf"`{name}[.`]", text))


@pytest.mark.parametrize(
    "package",
    [folder for top in ("torchpar", "kernels", "examples/support") for folder in packages(top)],
)
def test_a_package_names_its_modules(package):
    """A reader finds a file by the docstring of its package."""
    found = unnamed(package)
    assert found == []


def test_a_module_that_no_docstring_names_is_found(tmp_path):
    (tmp_path / "__init__.py").write_text('"""Holds `one`."""')
    for name in ("one", "two", "_inner"):
        (tmp_path / f"{name}.py").touch()
    assert unnamed(tmp_path) == ["two"]


def test_the_picture_of_the_rooms_is_true():
    """And it shows an import that is new."""
    house = runpy.run_path(str(ROOT / "docs" / "house.py"))
    page = house["page"]()
    assert page == (ROOT / "CONTRIBUTING.md").read_text()
    assert "\n    testing --> optim\n" in page
    found = house["imports"](ROOT / "torchpar" / "optim" / "muon.py", "torchpar.optim.muon")
    assert "torchpar.parallel.split.parts" in found
    assert not any(name.startswith("torchpar.training") for name in found)


@pytest.mark.slow  # by default a benchmark's output shows it: tests/benchmarks/test_benchmarks.py
@pytest.mark.parametrize("command", [("torchpar", "doctor"), ("benchmarks", "list")])
def test_a_reader_may_close_the_pipe(command):
    """As head does."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, stdout=pipe, stderr=subprocess.PIPE
        )
    assert (done.returncode, done.stderr) == (141, b"")


def test_the_output_may_be_closed(monkeypatch, capsys):
    """As by >&-."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "argv", ["torchpar", "verify", "--tp", "0"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("torchpar", run_name="__main__")
    sys.stdout.close()  # which goes nowhere
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_no_test_imports_the_module_of_the_commands():
    """`runpy` warns of it where another test of the same process runs ``python -m torchpar``."""
    imported = re.compile(
        r"^\s*(from torchpar import .*\b__main__|import torchpar\.__main__)", re.M
    )
    assert imported.search("from torchpar import __main__, errors")
    found = [
        path.name for path in (ROOT / "tests").rglob("*.py") if imported.search(path.read_text())
    ]
    assert found == []


def test_the_command_of_the_benchmarks_leaves_torch_to_them():
    """Its import takes seconds, and each benchmark imports it in its own process."""
    code = "import sys, benchmarks.__main__; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
