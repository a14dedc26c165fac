# SPDX-License-Identifier: MIT
"""Training: losses, optimizers, and the `Run` that evaluates, saves and resumes."""

from torchpar.outcome import EpochResult, Stopped
from torchpar.parallel.save.checkpoint import CheckpointConfig
from torchpar.training.fused import FusedGradients
from torchpar.training.losses import add_orthogonality_gradient, evaluate, orthogonality_penalty
from torchpar.training.optimizers import LRSchedule, lr_scheduler, muon, sgd
from torchpar.training.run import Run, RunLog

__all__ = [
    "CheckpointConfig",
    "EpochResult",
    "FusedGradients",
    "LRSchedule",
    "Run",
    "RunLog",
    "Stopped",
    "add_orthogonality_gradient",
    "evaluate",
    "lr_scheduler",
    "muon",
    "orthogonality_penalty",
    "sgd",
]
