# SPDX-License-Identifier: MIT
"""Training: tasks, optimizers, and the `Run` that evaluates, saves and resumes.

`run` holds the position of a loop. `classification` is a task, `consistency` checks that the parts
of a run fit, and `replicas` compares ranks. `state` saves and resumes, with `train_state` and
`optimizer_state` for their tensors, `stateful` for other objects and generators, `same_run` for
checkpoints of other runs, and `unsaved` for what nobody gave. `outcome` holds the figures of an
epoch. `stop` and `answers` end a run by signals. `optimizers` makes SGD and Muon, and `fused`
computes gradients by hand. `graphed` captures a step in a CUDA graph, with `leaf_gradients` and
`step_effects`, and applies functions to the tensors in nested arguments. `profile` measures steps.
"""

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
