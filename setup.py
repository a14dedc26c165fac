# SPDX-License-Identifier: MIT
"""Put the benchmarks into the wheel, where ``python -m torchpar ladder`` finds them.

They lie in a folder of their own, which is no package: ``import benchmarks`` does not find them.
All other settings are in pyproject.toml.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FOLDER = "torchpar/baselines/checkout"  # as in torchpar/baselines/ladder.py
FILES = ["benchmarks/**/*.py", "benchmarks/results/nvidia-h200/ladder.csv"]


class BuildWithBenchmarks(build_py):
    def run(self):
        super().run()
        if self.editable_mode:  # the checkout has them
            return
        for path in (one for pattern in FILES for one in Path().glob(pattern)):
            target = Path(self.build_lib, FOLDER, path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


setup(cmdclass={"build_py": BuildWithBenchmarks})
