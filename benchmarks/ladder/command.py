# SPDX-License-Identifier: MIT
"""Run the ladder from any folder: ``python -m torchpar ladder --with my.py``.

The benchmarks are installed as `torchpar.benchmarks`, to which a link leads in a checkout.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from ..__main__ import run

INSTALLED = Path(__file__).parents[3]  # the folder of torchpar


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark as ``python -m benchmarks run ladder`` does, in the same folder.

    No module of the student's folder stands in for a library's, and what the ladder prints of
    itself names this command.
    """
    if Path.cwd() == INSTALLED:  # where Python found torchpar by the current folder alone
        path = filter(None, (str(INSTALLED), os.environ.get("PYTHONPATH")))
        os.environ["PYTHONPATH"] = os.pathsep.join(path)
    os.environ.update(PYTHONSAFEPATH="1", TORCHPAR_COMMAND="python -m torchpar ladder")
    return run(["ladder"], arguments)
