# SPDX-License-Identifier: MIT
"""Training: tasks, optimizers, and the `Run` that evaluates, saves and resumes."""

from importlib.util import find_spec

from torchpar.optional import needs_torch

if find_spec("torch"):
    from torchpar.parallel.save.checkpoint import CheckpointConfig
    from torchpar.training.classification import Classification, evaluate
    from torchpar.training.fused import FusedGradients
    from torchpar.training.graphed import graphed, side_stream
    from torchpar.training.optimizers import muon, sgd
    from torchpar.training.outcome import EpochResult, Evaluation, Stopped
    from torchpar.training.run import Run, Task

__all__ = [
    "CheckpointConfig",
    "Classification",
    "EpochResult",
    "Evaluation",
    "FusedGradients",
    "Run",
    "Stopped",
    "Task",
    "evaluate",
    "graphed",
    "muon",
    "sgd",
    "side_stream",
]

if not find_spec("torch"):
    __getattr__ = needs_torch(__name__, __all__)
