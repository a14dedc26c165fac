# SPDX-License-Identifier: MIT
"""Check that a run's model, optimizer, learning-rate schedule and task are of one training.

Each is given to `Run` by itself. If one of them belongs to another model, the training goes on
without an error, and without effect.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    PolynomialLR,
    SequentialLR,
)
from torch.optim.swa_utils import AveragedModel

from torchpar.errors import ConfigError
from torchpar.parallel.split.parts import reshard
from torchpar.training.classification import Classification

# Schedules that reach their end after so many steps. Others are constant, repeat, or are functions
# of the program.
LENGTHS: dict[type[LRScheduler], str] = {
    CosineAnnealingLR: "T_max",
    LinearLR: "total_iters",
    OneCycleLR: "total_steps",
    PolynomialLR: "total_iters",
}


def check_consistency(
    model: nn.Module,
    optimizer: Optimizer,
    lr_scheduler: LRScheduler | None,
    task: object,
    stateful: Mapping[str, object],
    epochs: int,
    steps_per_epoch: int,
) -> None:
    """Refuse parts of a run that do not belong together.

    Raises:
        ConfigError: an optimizer with parameters that are not the model's, or without one of those
            that require a gradient; a schedule of another optimizer, or of a length that does not
            fit the run; a `Classification` that judges another model.
    """
    reshard(model)  # between passes `fully_shard` may show other parameters
    _check_parameters(model, optimizer)
    if isinstance(lr_scheduler, LRScheduler):  # not one by another library
        _check_optimizer(lr_scheduler, optimizer)
        _check_length(lr_scheduler, epochs, steps_per_epoch)
    if isinstance(task, Classification) and not any(x is task.predict for x in stateful.values()):
        _check_predict(task.predict, [model, *stateful.values()])


def _check_parameters(model: nn.Module, optimizer: Optimizer) -> None:
    known = {id(p) for p in model.parameters()}
    held = set[int]()
    for number, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            held.add(id(p))
            if id(p) not in known:
                raise ConfigError(
                    f"the optimizer's group {number} has a parameter of shape {tuple(p.shape)} "
                    "that is not the model's; make it a parameter of the model, or make the "
                    "optimizer of this model, and after fully_shard"
                )
    lacking = [
        name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held
    ]
    if lacking:
        others = f" and {len(lacking) - 1} more" * (len(lacking) > 1)
        raise ConfigError(
            f"the optimizer lacks {lacking[0]}{others} of the model; give it all parameters that "
            "require a gradient, chain several optimizers by torchpar.optim.ChainedOptimizer, or "
            "freeze the others by requires_grad_(False)"
        )


def _check_optimizer(lr_scheduler: LRScheduler, optimizer: Optimizer) -> None:
    # A schedule of one optimizer of a chain changes some of the chain's groups.
    own = {id(group) for group in optimizer.param_groups}
    if any(id(group) not in own for group in lr_scheduler.optimizer.param_groups):
        raise ConfigError(
            f"the lr_scheduler, of type {type(lr_scheduler).__name__}, changes the rate of another "
            "optimizer than the run's; make it of the optimizer that Run gets"
        )


def _check_length(lr_scheduler: LRScheduler, epochs: int, steps_per_epoch: int) -> None:
    steps = epochs * steps_per_epoch
    run = f"the run has {steps} steps ({epochs} epochs of {steps_per_epoch})"
    for schedule, begin, is_whole in _schedules(lr_scheduler):
        for kind, name in LENGTHS.items():
            if not isinstance(schedule, kind):
                continue
            length = getattr(schedule, name)
            after = f" after the {begin} steps before it" * (begin > 0)
            given = f"{type(schedule).__name__} has {name} {length}{after}"
            if begin + length > steps and _falls_to_zero(schedule):
                raise ConfigError(
                    f"{given}, and would not reach its end: {run}; take {name}="
                    f"{max(steps - begin, 1)}, or more epochs"
                )
            ends = kind is OneCycleLR and is_whole  # a step after its last one is an error
            if ends and not _is_count(length, epochs, steps_per_epoch):
                raise ConfigError(
                    f"{given}, and would end before the run: {run}; take {name}={steps}, or "
                    f"{epochs} where it is stepped once an epoch"
                )


def _falls_to_zero(schedule: LRScheduler) -> bool:
    """Whether a run that stops before the schedule's end is surely a mistake: the rate falls to 0.

    A warm-up or a cosine may be planned for more steps than a run takes.
    """
    return isinstance(schedule, OneCycleLR | PolynomialLR) or (
        isinstance(schedule, LinearLR) and schedule.end_factor == 0
    )


def lengths(lr_scheduler: object) -> list[tuple[str, int]]:
    """The name and the length of each part of a schedule that has a length."""
    if not isinstance(lr_scheduler, LRScheduler):
        return []
    found = []
    for schedule, _, _ in _schedules(lr_scheduler):
        name = next((LENGTHS[kind] for kind in LENGTHS if isinstance(schedule, kind)), None)
        if name is not None:
            found.append((f"{type(schedule).__name__}.{name}", getattr(schedule, name)))
    return found


def _schedules(
    lr_scheduler: LRScheduler, begin: int = 0, is_whole: bool = True
) -> Iterator[tuple[LRScheduler, int, bool]]:
    """The parts of a schedule. With each: the step at which it begins, and whether it lasts the
    whole run."""
    if isinstance(lr_scheduler, SequentialLR):
        begins = [0, *lr_scheduler._milestones]
        for part, after in zip(lr_scheduler._schedulers, begins, strict=True):
            yield from _schedules(part, begin + after, is_whole=False)
    elif isinstance(lr_scheduler, ChainedScheduler):
        for part in lr_scheduler._schedulers:
            yield from _schedules(part, begin, is_whole)
    else:
        yield lr_scheduler, begin, is_whole


def _is_count(length: int, epochs: int, steps_per_epoch: int) -> bool:
    """Whether the optimizer takes ``length`` steps, if it steps after every so many batches.

    The batches that remain at the end of an epoch make another step, none, or a step with those of
    the next epoch. A schedule that is stepped once an epoch is the last of these cases.
    """
    steps = epochs * steps_per_epoch
    for batches in range(1, steps_per_epoch + 1):
        whole, rest = divmod(steps_per_epoch, batches)
        counts = (
            epochs * whole,
            epochs * (whole + (rest > 0)),
            steps // batches,
            -(-steps // batches),
        )
        if length in counts:
            return True
    return False


def _check_predict(predict: Any, judged_on_purpose: Iterable[object]) -> None:
    judged = predict.__self__ if inspect.ismethod(predict) else predict
    # An average of the model's weights is judged on purpose, and a frozen part may stand before
    # the model.
    if not isinstance(judged, nn.Module) or isinstance(judged, AveragedModel):
        return
    averages = [one for one in judged.modules() if isinstance(one, AveragedModel)]
    modules = [one for one in (*judged_on_purpose, *averages) if isinstance(one, nn.Module)]
    known = {id(p) for one in modules for p in one.parameters()}
    foreign = {name: p for name, p in judged.named_parameters() if id(p) not in known}
    wrong = [name for name, p in foreign.items() if p.requires_grad]
    if len(foreign) == len([*judged.parameters()]):  # frozen or not
        wrong = [*foreign]
    if wrong:
        raise ConfigError(
            f"Classification(predict=…) is a {type(judged).__name__} whose {wrong[0]} is not the "
            "run's model's, and would judge another model; leave predict out, or give the module "
            "to Run(…, stateful=…), too"
        )


def has_gradients(parameters: list[Tensor]) -> bool:
    """Whether a parameter has a gradient, or none requires one."""
    needed = [p for p in parameters if p.requires_grad]
    return not needed or any(p.grad is not None for p in needed)
