# SPDX-License-Identifier: MIT
"""The server that all processes of the tests are forked from: it has imported the examples' modules, too."""

import os
from importlib.util import find_spec
from multiprocessing.context import ForkServerContext
from unittest.mock import patch

from commands import ROOT, import_path

from torchpar.parallel.launch import local

PRELOAD = ["torchpar.parallel.split.pipeline", "torchpar.training", "torchvision.datasets"]
if find_spec("rich") and find_spec("tyro"):  # without its own packages, ``support`` would end the server
    PRELOAD += ["rich.progress", "tyro", "support.session"]


def fork_context() -> ForkServerContext:
    """Return the context whose processes are forked from the server; the first call starts it."""
    # Until Python 3.14 the server ignores the parent's sys.path.
    paths = import_path(*(ROOT / folder for folder in (".", "examples", "tests")))
    with patch.dict(os.environ, PYTHONPATH=paths):
        return local.fork_context([*local.PRELOAD, *PRELOAD])
