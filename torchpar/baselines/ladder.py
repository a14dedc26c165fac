# SPDX-License-Identifier: MIT
"""Run the ladder from any folder: ``python -m torchpar ladder --with my.py``.

The ladder is a benchmark. Benchmarks are no part of the package: they lie in the checkout, or in a
folder of the installed wheel.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# The folders in which the benchmarks may lie: of a checkout, and of a wheel, as setup.py has it.
PLACES = (Path(__file__).parents[2], Path(__file__).parent / "checkout")
# The functions of a student's file that the ladder knows.
FUNCTIONS = (
    "max_cpu",
    "max_numba",
    "max_gpu",
    "matmul_transpose_trivial",
    "matmul_transpose_numba",
    "matmul_transpose_gpu",
    "maximum",
    "matmul_t",
    "matmul",
    "linear_sigmoid",
)


def main(arguments: Sequence[str]) -> int:
    """Replace this process by the ladder's, in the same folder."""
    for place in PLACES:
        # A folder of site-packages called benchmarks may be another project's.
        if (place / "benchmarks" / "ladder" / "student.py").is_file():
            command = [sys.executable, "-m", "benchmarks", "run", "ladder", *arguments]
            os.execve(sys.executable, command, environment(place, os.environ))
    print(
        "python -m torchpar ladder: error: this installation lacks the benchmarks; in a checkout "
        "run pip install -e '.[examples,baselines]'",
        file=sys.stderr,
    )
    return 2


def environment(place: Path, given: Mapping[str, str]) -> dict[str, str]:
    """The environment in which Python finds the benchmarks, and no module of the student's folder.

    What the ladder prints of itself names this command.
    """
    path = os.pathsep.join(filter(None, (str(place), given.get("PYTHONPATH"))))
    own = {"PYTHONSAFEPATH": "1", "TORCHPAR_COMMAND": "python -m torchpar ladder"}
    return {**given, **own, "PYTHONPATH": path}
