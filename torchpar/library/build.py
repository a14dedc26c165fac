# SPDX-License-Identifier: MIT
"""Build the C++ that plays operators' calls: ``python -m torchpar build``.

The library is kept in the user's cache, by the source, the versions of PyTorch and Python, and the
compiler. A wheel that was built beside PyTorch has it (setup.py). ``import torchpar`` loads it
where it is, and never builds it.
"""

import argparse
import fcntl
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from torchpar.errors import ConfigError, writing

SOURCE = Path(__file__).with_name("player.cpp")
NAME = "_player"  # as in PYBIND11_MODULE
UNFINISHED = f"{NAME}-unfinished-"  # begins the name of a folder that a build is in
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX") or ".so"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m torchpar build",
        description=(
            "Compile the C++ that plays operators' calls, so that on a GPU a call costs the host "
            "what a call of PyTorch's own operators does. It takes a minute, and 1.5 GB of memory."
        ),
    )
    parser.add_argument("--into", type=Path, help="folder of the library; by default the cache")
    folder = parser.parse_args(arguments).into
    compiler = find_compiler()
    path = (folder or cache_folder()) / library_name(compiler)
    flag = "XDG_CACHE_HOME, or by --into" if folder is None else "--into"
    with writing(path, flag):
        return _build_unless_there(path, compiler)


def _build_unless_there(path: Path, compiler: Sequence[str]) -> int:
    if path.exists():
        try:
            _imported(path)
        except ImportError:
            path.unlink(missing_ok=True)
        else:
            print(f"{path} is there already")
            return 0
    begun = time.monotonic()
    print(f"compiling {SOURCE.name} by {shlex.join(compiler)}, which takes a minute", flush=True)
    build(path, compiler)
    print(f"{path}, in {time.monotonic() - begun:.0f} s")
    return 0


def load() -> Any:
    """The compiled module, installed beside this file or from the cache; None without either."""
    for path in _libraries(library_name(None)):
        with suppress(ImportError):  # of a PyTorch that was built from source again
            return _imported(path)
    return None


def _imported(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def other_torches() -> list[str]:
    """Other versions of PyTorch than this one that libraries here were built for."""
    named = (re.match(rf"{NAME}-torch([^-]+)-", path.name) for path in _libraries("*" + SUFFIX))
    return sorted({match[1] for match in named if match} - {torch.__version__})


def _libraries(pattern: str) -> list[Path]:
    folders = Path(__file__).parent, cache_folder()
    return [path for folder in folders for path in sorted(folder.glob(pattern))]


def cache_folder() -> Path:
    """The folder of torchpar in the user's cache, by the XDG specification."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(given) if os.path.isabs(given) else Path(os.path.expanduser("~/.cache"))
    return root / "torchpar"


def library_name(compiler: Sequence[str] | None) -> str:
    """The file's name for this PyTorch and Python; without a compiler, a pattern of the names.

    A library is loaded by this name alone, so never into another PyTorch.
    """
    facts = SOURCE.read_bytes() + f"{torch.__version__} {torch.version.git_version}".encode()
    facts += f"{sys.implementation.cache_tag} {platform.machine()}".encode()
    version = "*" if compiler is None else _digest(_version(compiler).encode())
    return f"{NAME}-torch{torch.__version__}-{_digest(facts)}-{version}{SUFFIX}"


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:16]


def find_compiler() -> list[str]:
    """The C++ compiler, as words of a command: that of the variable CXX, or the first found.

    Raises:
        ConfigError: there is none, or CXX is no command.
    """
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        try:
            words = shlex.split(name)
        except ValueError as e:
            raise ConfigError(f"CXX is {name}, expected a command: {e}") from e
        if words and shutil.which(words[0]):
            return words
    raise ConfigError(
        f"there is no C++ compiler ({', '.join(names)}); install one such as g++, or name it by CXX"
    )


def _version(compiler: Sequence[str]) -> str:
    try:
        found = subprocess.run([*compiler, "--version"], capture_output=True, text=True)
    except OSError as e:  # such as a script whose interpreter is missing
        name = shlex.join(compiler)
        raise ConfigError(
            f"CXX is {name}, which cannot be executed ({e.strerror}); name another compiler by CXX"
        ) from e
    return found.stdout.partition("\n")[0]


def build(path: Path, compiler: Sequence[str]) -> None:
    """Compile the library to ``path``. Of several processes that build it, the first one does.

    Raises:
        ConfigError: the compiler fails; its first error is named.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / "build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return
        for left in path.parent.glob(f"{UNFINISHED}*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=path.parent) as folder:
            target = Path(folder, path.name)
            done = subprocess.run(command(target, compiler), capture_output=True, text=True)
            if done.returncode:
                lines = [line for line in done.stderr.splitlines() if "error" in line]
                reason = (lines or done.stderr.splitlines() or ["no message"])[0]
                raise ConfigError(
                    f"{shlex.join(compiler)} cannot compile {SOURCE.name} for torch "
                    f"{torch.__version__}: {reason}; take another compiler by CXX"
                )
            os.replace(target, path)


def command(target: Path, compiler: Sequence[str]) -> list[str]:
    """The command that compiles the library to ``target``."""
    package = Path(torch.__file__).parent
    includes = package / "include", package / "include/torch/csrc/api/include"
    libraries = package / "lib"
    return [
        *(*compiler, "-O2", "-std=c++20", "-shared", "-fPIC", "-w", str(SOURCE)),
        *(f"-I{folder}" for folder in (*includes, sysconfig.get_paths()["include"])),
        # Without a path of where they are: in a process that loads the library, torch is imported.
        *(f"-L{libraries}", "-ltorch_python", "-ltorch_cpu", "-ltorch", "-lc10"),
        *("-DTORCH_API_INCLUDE_EXTENSION_H", "-o", str(target)),
    ]
