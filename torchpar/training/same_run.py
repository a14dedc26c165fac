# SPDX-License-Identifier: MIT
"""Refuse a checkpoint of another run before it is read."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from torchpar.errors import ConfigError
from torchpar.parallel.launch.world import World
from torchpar.parallel.save.checkpoint import Checkpoint
from torchpar.training.optimizer_state import members_of_groups, optimizer_classes
from torchpar.training.train_state import TrainState, plain, uncompiled


def check_config(state: TrainState, folder: Path, was: Mapping[str, object]) -> None:
    """Refuse a checkpoint of a run with other values."""
    now = state.config
    if differing := sorted(key for key in now.keys() & was.keys() if was[key] != now[key]):
        of = [", ".join(f"{key} {config[key]}" for key in differing) for config in (was, now)]
        raise ConfigError(
            f"{folder} holds a run with {of[0]}, this one has {of[1]}; give the values of "
            "that run, or use another folder"
        )


def check_names(
    state: TrainState,
    folder: Path,
    saved: Checkpoint,
    names: set[str],
    tensors: list[str],
    extra: Mapping[str, object],
) -> None:
    """Refuse a checkpoint of other layers, objects or another optimizer, before it is read.

    Each stage of a pipeline has some of the layers, so the names of all ranks together are
    compared.
    """
    # A rank that refuses alone must not leave the other ranks in a collective.
    numbered = members_of_groups(state)
    of_ranks = state.world.gather_results(lambda: [*tensors, *(f"json.{name}" for name in extra)])
    present = {
        "optimizer": optimizer_classes(state.optimizer),
        "schedule": schedule_kinds(state.lr_scheduler),
    }
    for key, kinds in present.items():
        saved_kinds = saved.state.get(key, kinds)  # older checkpoints lack the key
        if saved_kinds != kinds:
            was, now = (" with ".join(names) or f"no {key}" for names in (saved_kinds, kinds))
            raise ConfigError(
                f"{folder} holds the state of {was}, this run has {now}; use another folder"
            )
    _check_objects(folder, saved.state.get("stateful", {}), stateful_classes(state))
    numbers = len(saved.state["groups"]), len(state.optimizer.param_groups)
    if numbers[0] != numbers[1]:
        raise ConfigError(
            f"{folder} holds {numbers[0]} parameter groups, this run has {numbers[1]}; use another "
            "folder"
        )
    members = {uncompiled(n): number for n, number in saved.state.get("members", {}).items()}
    for name, number in numbered.items():
        if members.get(name, number) != number:
            raise ConfigError(
                f"{folder} has {name} in group {members[name]} of the optimizer, this run in group "
                f"{number}; use another folder"
            )
    here = {name for names in of_ranks for name in names}
    modules = (*(f"{word}." for word in state.modules), "extra.")
    there = {name for name in names if name.startswith(modules)}
    there |= {f"json.{uncompiled(name)}" for name in saved.state.get("extra", {})}
    if missing := sorted(here - there):
        where = "" if missing[0].startswith("stateful.") else " of the model"
        raise ConfigError(f"{folder} does not hold {plain(missing[0])}{where}; use another folder")
    if unknown := sorted(there - here):
        raise ConfigError(
            f"{folder} holds {plain(unknown[0])}, which the model lacks; use another folder"
        )


def _check_objects(folder: Path, was: Mapping[str, str], now: Mapping[str, str]) -> None:
    for name in now:
        if name not in was:
            raise ConfigError(
                f"{folder} does not hold the state of {name}, which this run was given; leave "
                f"{name} out of Run(…, stateful=…), or use another folder"
            )
    for name, kind in was.items():
        if name not in now:
            raise ConfigError(
                f"{folder} holds the state of {name}, of type {kind}, which this run would lose; "
                f'give Run(…, stateful={{"{name}": …}}), or use another folder'
            )
        if kind != now[name]:
            raise ConfigError(
                f"{folder} holds the state of a {kind} by the name {name}, this run has a "
                f"{now[name]}; use another folder"
            )


def check_dtypes(
    world: World, folder: Path, tensors: Mapping[str, Tensor], saved: Mapping[str, torch.dtype]
) -> None:
    """Refuse values of another dtype, which PyTorch would round in silence."""

    def check() -> None:
        for name, t in tensors.items():
            if saved[name] != t.dtype:
                raise ConfigError(
                    f"{folder} holds {plain(name)} in {_word(saved[name])}, this run has it in "
                    f"{_word(t.dtype)}; train in {_word(saved[name])}, or use another folder"
                )

    world.gather_results(check)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def stateful_classes(state: TrainState) -> dict[str, str]:
    return {name: type(value).__name__ for name, value in state.stateful.items()}


def schedule_kinds(lr_scheduler: LRScheduler | None) -> list[str]:
    """The class of a scheduler, and the classes of the schedulers of which it consists."""
    if lr_scheduler is None:
        return []
    parts = getattr(lr_scheduler, "_schedulers", ())
    return [
        type(lr_scheduler).__name__,
        *(kind for part in parts for kind in schedule_kinds(part)),
    ]
