# SPDX-License-Identifier: MIT
"""Run the ladder from any folder: ``python -m torchpar ladder --with my.py``.

The ladder is a benchmark, which lies in the checkout and not in the wheel. An installation by
``pip install -e`` finds it there.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]


def main(arguments: Sequence[str]) -> int:
    """Replace this process by the ladder's, in the same folder."""
    if (CHECKOUT / "benchmarks" / "ladder").is_dir():
        command = [sys.executable, "-m", "benchmarks", "run", "ladder", *arguments]
        os.execve(sys.executable, command, environment(os.environ))
    print(
        "python -m torchpar ladder: error: the ladder is in the repository, and not in the "
        "wheel; install a clone of it by pip install -e '.[examples,baselines]'",
        file=sys.stderr,
    )
    return 2


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """The environment in which Python finds the benchmarks, and no module of the student's folder.

    What the ladder prints of itself names this command.
    """
    path = os.pathsep.join(filter(None, (str(CHECKOUT), given.get("PYTHONPATH"))))
    own = {"PYTHONSAFEPATH": "1", "TORCHPAR_COMMAND": "python -m torchpar ladder"}
    return {**given, **own, "PYTHONPATH": path}
