# SPDX-License-Identifier: MIT
"""Build the wheel: for any PyTorch, or with the C++ of operators' calls for the one that is here.

pip builds in an environment of its own, which has no PyTorch. By ``pip install
--no-build-isolation`` it builds beside the installed PyTorch, for which the C++ is then compiled.
All else is in pyproject.toml.
"""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

LIBRARY = "torchpar/library"


class Wheel(bdist_wheel):
    """The wheel with the compiled library, whose build tag names its PyTorch, or the pure one."""

    def run(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            if library := compiled(folder):
                # Its name has PyTorch's version, as in _player-torch2.14.1+cu130-….so.
                self.build_number = "1" + library.name.split("-")[1].replace("+", ".")
                self.distribution.has_ext_modules = lambda: True
                self.root_is_pure = False
                build = self.reinitialize_command("build")
                build.ensure_finalized()
                target = Path(build.build_lib, LIBRARY)
                shutil.rmtree(target, ignore_errors=True)  # of an earlier build
                target.mkdir(parents=True)
                shutil.copy2(library, target)
            super().run()


def compiled(folder: str) -> Path | None:
    """The library in ``folder``; None without PyTorch for NVIDIA's GPUs, or a compiler for it."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    if torch.version.cuda is None:  # no call would be played
        return None
    command = [sys.executable, "-m", "torchpar", "build", "--into", folder]
    done = subprocess.run(command, cwd=Path(__file__).parent, stdout=sys.stderr)
    if done.returncode:
        print("torchpar is installed without the C++ of operators' calls", file=sys.stderr)
        return None
    (library,) = Path(folder).glob("*-torch*")
    return library


setup(cmdclass={"bdist_wheel": Wheel})
