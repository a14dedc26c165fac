# SPDX-License-Identifier: MIT
"""The training loop that every example uses."""

import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from torchpar.data import Samples, batches
from torchpar.errors import ConfigError
from torchpar.ops import matmul_t
from torchpar.optim import ChainedOptimizer, Muon
from torchpar.parallel.checkpoint import Checkpoints
from torchpar.parallel.clip import clip_grad_norm_
from torchpar.parallel.layers import split_parameters
from torchpar.parallel.step import ReplicaStep, Step
from torchpar.parallel.stop import StopSignal
from torchpar.parallel.world import World
from torchpar.phases import NoPhases, Phases
from torchpar.progress import EpochResult, Progress

Loss = Literal["cross-entropy", "bce", "mse"]
Schedule = Literal["linear", "cosine", "constant"]

EVALUATION_BATCH = (
    1250  # samples per forward pass; a test set of 10 000 is shared evenly by 1, 2, 4 and 8 ranks
)


def loss_sum(loss: Loss, outputs: Tensor, labels: Tensor) -> Tensor:
    """The loss summed over samples; summed over classes too for "bce" and "mse".

    Args:
        loss: "cross-entropy" takes logits, −log softmax(outputs)[label]; "bce" takes probabilities and
            "mse" any outputs, both against the one-hot label.
        outputs: ``(b, classes)``.
        labels: ``(b)`` int64.
    """
    if loss == "cross-entropy":
        return F.cross_entropy(outputs, labels, reduction="sum")
    targets = F.one_hot(labels, outputs.shape[-1]).to(outputs)
    if loss == "bce":
        return F.binary_cross_entropy(outputs, targets, reduction="sum")
    if loss == "mse":
        return F.mse_loss(outputs, targets, reduction="sum")
    raise ConfigError(f"loss is {loss!r}, expected 'cross-entropy', 'bce' or 'mse'")


def orthogonality_penalty(model: torch.nn.Module) -> Tensor:
    """``Σ ‖W·Wᵀ − I‖²`` over the model's weight matrices (Frobenius norm), by `torchpar.matmul_t`."""
    split = {layer.weight: layer.whole_weight for _, _, layer in split_parameters(model)}
    weights = [split[p]() if p in split else p for p in model.parameters() if p.dim() == 2]
    grams = [matmul_t(weight) for weight in weights]
    return torch.stack([(gram - torch.eye(len(gram)).to(gram)).square().sum() for gram in grams]).sum()


def sgd(
    model: torch.nn.Module, lr: float, momentum: float, weight_decay: float, decay_biases: bool = False
) -> torch.optim.SGD:
    """SGD with Nesterov momentum and an L2 penalty ``λ/2·‖p‖²`` on the weights.

    Args:
        weight_decay: λ.
        decay_biases: penalise the biases as well.
    """
    weights = [p for p in model.parameters() if p.dim() > 1 or decay_biases]
    others = [p for p in model.parameters() if not (p.dim() > 1 or decay_biases)]
    groups = [{"params": weights, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0)


def muon(model: torch.nn.Module, lr: float, momentum: float, weight_decay: float) -> ChainedOptimizer:
    """`torchpar.optim.Muon` for the weight matrices, SGD for the biases.

    Args:
        weight_decay: decoupled, ``W ← (1 − lr·λ)·W``, of the weights.

    Raises:
        ConfigError: layers that are split over ranks, whose matrices are whole on none.
    """
    if any(layer.partition.ranks > 1 for _, _, layer in split_parameters(model)):
        raise ConfigError("Muon needs whole matrices, and the model's are split over ranks; take SGD or tp 1")
    weights = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    return ChainedOptimizer(
        Muon(weights, lr=lr, momentum=momentum, weight_decay=weight_decay),
        torch.optim.SGD(others, lr=lr, momentum=momentum, nesterov=momentum > 0),
    )


def scheduler(optimizer: Optimizer, schedule: Schedule, steps: int) -> LambdaLR:
    """The rate's course over ``steps``: falling to 0 linearly or along a half cosine, or constant."""
    factors: dict[Schedule, Callable[[int], float]] = {
        "linear": lambda step: 1 - step / steps,
        "cosine": lambda step: (1 + math.cos(math.pi * step / steps)) / 2,
        "constant": lambda step: 1.0,
    }
    if schedule not in factors:
        raise ConfigError(f"schedule is {schedule!r}, expected one of {sorted(factors)}")
    return LambdaLR(optimizer, factors[schedule])


@dataclass(frozen=True)
class Saving:
    """When and where `fit` saves its state.

    Attributes:
        folder: resumed from if it holds a checkpoint.
        every: steps between two saves; None saves after each epoch. A run is saved at its end, and when
            SIGTERM reaches any rank.
        keep: how many checkpoints are kept.
        asynchronous: write while training goes on.
    """

    folder: Path
    every: int | None = None
    keep: int = 2
    asynchronous: bool = False


class Stopped(Exception):
    """SIGTERM reached a rank; all ranks have saved the same step."""


def fit(
    model: torch.nn.Module,
    optimizer: Optimizer,
    train: Samples,
    test: Samples,
    world: World,
    *,
    epochs: int,
    batch_size: int,
    step: Step | None = None,
    loss: Loss = "cross-entropy",
    schedule: Schedule = "linear",
    orthogonality: float = 0.0,
    clip: float | None = None,
    seed: int = 0,
    saving: Saving | None = None,
    run: dict[str, Any] | None = None,
    phases: Phases | None = None,
    on_step: Callable[[int, int], None] = lambda epoch, samples: None,
    on_epoch: Callable[[EpochResult], None] = lambda result: None,
) -> list[EpochResult]:
    """Train ``model``; return each epoch's result.

    The loss of a step is the mean over its global batch, whatever the number of ranks.

    Args:
        model: this rank's part of it.
        optimizer: over ``model``'s parameters.
        batch_size: samples per step over all ranks.
        step: how gradients come about; by default a plain pass over ``model``, for one rank.
        orthogonality: the factor of `orthogonality_penalty` in the loss.
        clip: the norm of the whole gradient above which it is scaled down to it.
        seed: of the samples' order.
        saving: where and when to save; a run that was stopped anywhere goes on from there, bit for bit.
        run: what makes a run this run; a checkpoint of another is refused.
        phases: where to measure the time of data, forward, backward, collectives and optimizer.
        on_step: called after each step with the epoch and the samples it has trained on.
        on_epoch: called with each epoch's result, those before a resumed one included.

    Raises:
        ConfigError: a training loss that is not finite, fewer samples in a batch than ranks, ranks with
            different models or flags, or a checkpoint that is damaged, of another run, or, unless the rate
            is constant, of another number of epochs; on every rank.
        Stopped: after SIGTERM, if there is somewhere to save to; on every rank.
    """
    if batch_size < world.data_ranks:
        raise ConfigError(
            f"batch size {batch_size} is smaller than the number of ranks that share it, {world.data_ranks}; "
            "it counts the samples of all ranks together"
        )
    step = step or ReplicaStep(model)
    measure = phases or NoPhases()
    steps = -(-len(train) // batch_size)
    rate = scheduler(optimizer, schedule, epochs * steps)
    run = dict(run or {})
    if schedule != "constant":
        run["epochs"] = epochs  # the rate's course depends on them
    run = json.loads(json.dumps(run))  # as a checkpoint gives it back
    sizes = {"batch_size": batch_size, "train": len(train), "test": len(test), "saving": str(saving)}
    world.check_alike("the ranks' flags", {**run, **sizes})
    progress = Progress(model, optimizer, rate, run, world)
    checkpoints = None
    if saving is not None:
        checkpoints = Checkpoints(saving.folder, world, saving.keep, saving.asynchronous)
        progress.resume(checkpoints)
    if len(progress.results) > epochs:
        raise ConfigError(
            f"{saving and saving.folder} holds {len(progress.results)} epochs, "
            f"more than the {epochs} asked for"
        )
    for result in progress.results:
        on_epoch(result)
    per_sample = partial(loss_sum, loss)
    with StopSignal(world) if checkpoints else nullcontext() as stop:
        for epoch in range(len(progress.results) + 1, epochs + 1):
            start, first = time.perf_counter(), progress.step
            shares = iter(batches(train, batch_size, seed=seed, epoch=epoch, world=world, start=first))
            for number in range(first + 1, steps + 1):
                if stop:
                    stop.ask()
                with measure("data"):
                    x, labels, global_size = next(shares)
                part = step.gradients(x, labels, global_size, per_sample, measure)
                with measure("optimizer"):
                    if orthogonality:
                        _add_orthogonality(model, orthogonality)
                    if clip is not None:
                        clip_grad_norm_(model, clip, world)
                    optimizer.step()
                    rate.step()
                    optimizer.zero_grad()
                progress.end_step(part)
                on_step(epoch, min(number * batch_size, len(train)))
                if number == steps:
                    train_loss = world.sum(progress.loss).item() / len(train)
                    if not math.isfinite(train_loss):
                        raise ConfigError(
                            f"the training loss of epoch {epoch} is {train_loss}; take a smaller rate"
                        )
                    training = time.perf_counter() - start
                    test_loss, outputs = evaluate(step, test, world, loss)
                    result = EpochResult(
                        epoch,
                        train_loss,
                        test_loss,
                        test_accuracy=(outputs.argmax(1) == test.labels).sum().item() / len(test),
                        samples_per_s=(len(train) - first * batch_size) / training,
                        seconds=time.perf_counter() - start,
                        ranks=world.world_size,
                        device=world.device.type,
                    )
                    progress.end_epoch(result)
                    on_epoch(result)
                if checkpoints and saving:
                    at = (epoch - 1) * steps + number
                    stopping = stop is not None and stop.answer()
                    due = number == steps if saving.every is None else at % saving.every == 0
                    if stopping or due or at == epochs * steps:
                        progress.save(checkpoints, at)
                    if stopping and at < epochs * steps:
                        checkpoints.wait()
                        raise Stopped
    if checkpoints:
        checkpoints.wait()
    return progress.results


def _add_orthogonality(model: torch.nn.Module, factor: float) -> None:
    # Whole on every rank, so its gradient is not averaged over them, as the loss's is.
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(factor * orthogonality_penalty(model), parameters, allow_unused=True)
    for p, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None and p.grad is not None:
            p.grad += gradient


@torch.no_grad()
def evaluate(step: Step, samples: Samples, world: World, loss: Loss) -> tuple[float, Tensor]:
    """Mean loss and outputs ``(n, classes)`` of all samples, on every rank.

    The samples are cut in chunks of `EVALUATION_BATCH` whatever the number of ranks, which take some
    chunks each; so the loss does not depend on who computed what.
    """
    chunks = list(torch.arange(len(samples), device=world.device).split(EVALUATION_BATCH))
    share = torch.arange(len(chunks)).tensor_split(world.data_ranks)[world.data_rank].tolist()
    outputs = torch.zeros(len(samples), len(samples.classes), device=world.device)
    for chunk in (chunks[i] for i in share):
        mine = step.outputs(samples.inputs(chunk))
        if mine is not None and world.counts:
            outputs[chunk] = mine.float()
    world.sum(outputs)  # one rank's are not 0
    return loss_sum(loss, outputs.double(), samples.labels).item() / len(samples), outputs
