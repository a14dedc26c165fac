# SPDX-License-Identifier: MIT
"""The training loop that every example uses."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
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
from torchpar.parallel import checkpoint
from torchpar.parallel.world import World
from torchpar.phases import NoPhases, Phases

Loss = Literal["cross-entropy", "bce", "mse"]
Schedule = Literal["linear", "cosine", "constant"]

EVALUATION_BATCH = 10_000  # samples per forward pass; their activations fit anywhere


@dataclass(frozen=True)
class EpochResult:
    """What one epoch came to.

    Attributes:
        epoch: from 1.
        train_loss: mean over the epoch's training samples, each as it was trained on.
        test_loss: mean over all test samples, after the epoch.
        test_accuracy: in [0, 1].
        samples_per_s: training samples a second, over all ranks, evaluation not counted.
        seconds: training and evaluation.
        ranks: how many processes trained.
        device: "cpu" or "cuda".
    """

    epoch: int
    train_loss: float
    test_loss: float
    test_accuracy: float
    samples_per_s: float
    seconds: float
    ranks: int
    device: str


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
    grams = [matmul_t(p) for p in model.parameters() if p.dim() == 2]
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


def fit(
    model: torch.nn.Module,
    optimizer: Optimizer,
    train: Samples,
    test: Samples,
    world: World,
    *,
    epochs: int,
    batch_size: int,
    forward: Callable[[Tensor], Tensor] | None = None,
    loss: Loss = "cross-entropy",
    schedule: Schedule = "linear",
    orthogonality: float = 0.0,
    seed: int = 0,
    checkpoint_folder: Path | None = None,
    run: dict[str, Any] | None = None,
    phases: Phases | None = None,
    on_step: Callable[[int, int], None] = lambda epoch, samples: None,
    on_epoch: Callable[[EpochResult], None] = lambda result: None,
) -> list[EpochResult]:
    """Train ``model``; return each epoch's result.

    The loss of a step is the mean over its global batch, whatever the number of ranks.

    Args:
        optimizer: over ``model``'s parameters.
        batch_size: samples per step over all ranks.
        forward: what is called in ``model``'s place in training, such as its DistributedDataParallel
            wrapper or a compiled one. It must average gradients over the ranks if there are several.
        orthogonality: the factor of `orthogonality_penalty` in the loss.
        seed: of the samples' order.
        checkpoint_folder: saved to after each epoch, and resumed from if it holds a checkpoint.
        run: what makes a run this run; a checkpoint of another is refused.
        phases: where to measure the time of data, forward, backward, collectives and optimizer.
        on_step: called after each step with the epoch and the samples it has trained on.
        on_epoch: called with each epoch's result, those before a resumed one included.

    Raises:
        ConfigError: fewer samples in a batch than ranks, or a checkpoint that is damaged, of another
            run, or, unless the rate is constant, of another number of epochs; on every rank.
    """
    if batch_size < world.world_size:
        raise ConfigError(
            f"batch size {batch_size} is smaller than the number of ranks, {world.world_size}; "
            "it counts the samples of all ranks together"
        )
    forward = forward or model
    measure = phases or NoPhases()
    steps = -(-len(train) // batch_size)
    rate = scheduler(optimizer, schedule, epochs * steps)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": rate}
    run = dict(run or {})
    if schedule != "constant":
        run["epochs"] = epochs  # the rate's course depends on them
    results = _resume(checkpoint_folder, parts, run, world)
    if len(results) > epochs:
        raise ConfigError(
            f"{checkpoint_folder} holds {len(results)} epochs, more than the {epochs} asked for"
        )
    for result in results:
        on_epoch(result)
    for epoch in range(len(results) + 1, epochs + 1):
        start, trained = time.perf_counter(), 0
        total = torch.zeros((), dtype=torch.float64, device=world.device)
        shares = iter(batches(train, batch_size, seed=seed, epoch=epoch, world=world))
        for _ in range(steps):
            with measure("data"):
                x, labels, global_size = next(shares)
            with measure("forward"):
                batch_loss = loss_sum(loss, forward(x), labels)
                # DistributedDataParallel averages over the ranks, whose shares may differ in size.
                objective = batch_loss * (world.world_size / global_size)
                if orthogonality:
                    objective = objective + orthogonality * orthogonality_penalty(model)
            with measure("backward"):
                objective.backward()
            with measure("optimizer"):
                optimizer.step()
                rate.step()
                optimizer.zero_grad()
            total += batch_loss.detach()
            trained += global_size
            on_step(epoch, trained)
        train_loss = world.sum(total).item() / len(train)
        training = time.perf_counter() - start
        test_loss, confusion = evaluate(model, test, world, loss)
        result = EpochResult(
            epoch,
            train_loss,
            test_loss,
            test_accuracy=confusion.trace().item() / len(test),
            samples_per_s=len(train) / training,
            seconds=time.perf_counter() - start,
            ranks=world.world_size,
            device=world.device.type,
        )
        results.append(result)
        if checkpoint_folder is not None and world.rank == 0:
            state: dict[str, Any] = {name: part.state_dict() for name, part in parts.items()}
            state |= {"results": [asdict(r) for r in results], "run": run}
            checkpoint.save(checkpoint_folder, state)
        on_epoch(result)
    return results


def _resume(
    folder: Path | None, parts: dict[str, Any], run: dict[str, Any], world: World
) -> list[EpochResult]:
    """Load each part's state; return the results of the epochs that were trained."""
    if folder is None:
        return []
    # Only rank 0 saves, perhaps to a disk that the others do not see.
    state = world.on_rank_0(lambda: checkpoint.load(folder))
    if state is None:
        return []
    try:
        differing = sorted(key for key in run if state["run"][key] != run[key])
        if differing:
            was = ", ".join(f"{key} {state['run'][key]}" for key in differing)
            now = ", ".join(f"{key} {run[key]}" for key in differing)
            raise ConfigError(f"{folder} holds a run with {was}, this one has {now}; use another folder")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return [EpochResult(**result) for result in state["results"]]
    except (KeyError, TypeError, RuntimeError) as e:
        reason = f"{type(e).__name__}: {e}".partition("\n")[0]
        raise ConfigError(f"{folder} holds no checkpoint of this run ({reason}); use another folder") from e


@torch.no_grad()
def evaluate(model: torch.nn.Module, samples: Samples, world: World, loss: Loss) -> tuple[float, Tensor]:
    """Mean loss and confusion matrix over all samples, each counted once over all ranks.

    Returns:
        The loss, and ``confusion (classes, classes)`` int64: ``confusion[label, prediction]`` samples.
    """
    share = torch.arange(len(samples)).tensor_split(world.world_size)[world.rank]
    classes = len(samples.classes)
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device=world.device)
    for part in share.to(world.device).split(EVALUATION_BATCH):
        labels = samples.labels[part]
        outputs = model(samples.inputs(part))
        total += loss_sum(loss, outputs, labels)
        confusion += torch.bincount(labels * classes + outputs.argmax(-1), minlength=classes * classes)
    world.sum(total)
    world.sum(confusion)
    return total.item() / len(samples), confusion.view(classes, classes)
