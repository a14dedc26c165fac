# SPDX-License-Identifier: MIT
"""Training state: save it to checkpoints and resume from them.

The state is the parameters, the optimizer, the learning rate, the random state, and the position in
the data.

`torch.distributed.checkpoint.state_dict` was tried in place of this file. Where an optimizer has no
state yet, `get_optimizer_state_dict` makes it by a step with a learning rate of 0: Adam then counts
a step that never was, and hooks of the step run. A run that resumes from such a checkpoint has
other bits. Besides, it takes the tensors of split layers, which are no DTensors, for whole ones.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from torchpar.errors import ConfigError, first_line
from torchpar.parallel.launch.world import World
from torchpar.parallel.save.checkpoint import Checkpoint, Checkpoints
from torchpar.parallel.split.parts import as_dtensor, part_of, reshard
from torchpar.training.outcome import EpochResult

IMPLEMENTATION = ("capturable", "foreach", "fused")  # how a group's update is computed


@dataclass
class TrainState:
    """The model, its optimizer and the progress of a run, on this rank.

    Attributes:
        config: values that identify the run, as JSON.
        results: the results of the complete epochs, also of epochs before the run was resumed.
        step: complete steps of the current epoch.
        loss_sum: this rank's losses of the current epoch, added in the order of the steps: in
            another order the sum of a resumed run could differ from the sum of an uninterrupted
            run.
        random_states: the random states of the checkpoint from which the run resumed.
    """

    model: torch.nn.Module
    optimizer: Optimizer
    lr_scheduler: LRScheduler | None
    world: World
    config: Mapping[str, object]
    results: list[EpochResult] = field(default_factory=list)
    step: int = 0
    loss_sum: float | Tensor = 0.0
    random_states: dict[str, Tensor] = field(default_factory=dict)


def check_saveable(state: TrainState) -> None:
    """Refuse a state of which checkpoints would lose something; the error names it.

    Raises:
        ConfigError: an optimizer that divides its state over the ranks; a setting of a group, or a
            module's extra state, that is neither a tensor nor JSON; a sparse tensor.
    """
    reshard(state.model)
    for optimizer in optimizers_of(state.optimizer):
        if any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__):
            raise ConfigError(
                "ZeroRedundancyOptimizer shards its state over the ranks, and checkpoints do not "
                "hold these shards; take another optimizer, or fully_shard"
            )
    _check_groups(state)
    for name, t in (_model_tensors(state.model) | _extra_states(state.model)[0]).items():
        if t.layout != torch.strided:
            raise ConfigError(
                f"{_plain(name)} is {t.layout}, and would not be saved; make it dense"
            )


def _check_groups(state: TrainState) -> None:
    for number, settings in enumerate(_settings(state.optimizer)):
        for key, value in settings.items():
            try:
                json.dumps(value, default=Tensor.tolist)
            except TypeError as e:
                raise ConfigError(
                    f"the optimizer's group {number} has {key} = {value!r}, which would not be "
                    "saved; expected numbers, strings or tensors"
                ) from e


def save(state: TrainState, checkpoints: Checkpoints, number: int) -> None:
    """Save as the checkpoint of step ``number`` of the run. Every rank must call this."""
    reshard(state.model)
    losses = torch.zeros(state.world.world_size, dtype=torch.float64, device=state.world.device)
    losses[state.world.rank] = float(state.loss_sum)
    extra_tensors, extra = _extra_states(state.model)
    tensors = _model_tensors(state.model) | extra_tensors
    for name, p in state.model.named_parameters():
        for key, value in state.optimizer.state.get(p, {}).items():
            # A value of its parameter's shape is sharded as the parameter is. Other values must be
            # scalars.
            if not isinstance(value, Tensor):
                found = f"is a {type(value).__name__}, expected a tensor"
            elif part_of(p).is_slice and value.dim() and value.shape != p.shape:
                found = f"has shape {tuple(value.shape)}, expected {tuple(p.shape)}, as it is split"
            else:
                tensors[f"optimizer.{name}.{key}"] = _shard(p, value)
                continue
            raise ConfigError(f"the optimizer's {key} of {name} {found}; take another optimizer")
    known = set(state.model.parameters())
    for key, values in state.optimizer.state.items():
        if isinstance(key, Tensor) and key not in known and values:
            raise ConfigError(
                f"the optimizer has state of a parameter of shape {tuple(key.shape)} that the "
                "model no longer has, and that would not be saved; make a new optimizer of the "
                "model's parameters"
            )
    if foreign := [key for key in state.optimizer.state if not isinstance(key, Tensor)]:
        raise ConfigError(
            f"the optimizer's state has {foreign[0]!r}, which is no parameter and would not be "
            "saved; take another optimizer"
        )
    tensors |= _random_states(state.world.rank)
    facts = {
        "run": state.config,
        "optimizer": _optimizer_classes(state.optimizer),
        "schedule": _schedule_kinds(state.lr_scheduler),
        "members": _members(state),
        "extra": extra,
        "results": [asdict(result) for result in state.results],
        "step": state.step,
        "losses": state.world.sum(losses).tolist(),
        "rate": state.lr_scheduler.state_dict() if state.lr_scheduler else {},
        "groups": _settings(state.optimizer),
    }
    checkpoints.save(number, tensors, facts)


def resume(state: TrainState, checkpoints: Checkpoints) -> bool:
    """Continue from the newest undamaged checkpoint. Return False if there is none.

    Each rank restores its own random state. A rank that the saved run did not have keeps its
    current random state.

    Raises:
        ConfigError: on every rank: the checkpoint was saved by another run or another program, or
            holds other layers or the state of another optimizer.
    """
    saved = checkpoints.load()
    if saved is None:
        return False
    reshard(state.model)
    folder, rank = checkpoints.folder, state.world.rank
    facts = saved.state
    _check_config(state, folder, facts.get("run", {}))
    try:
        tensors = _model_tensors(state.model)
        extra_tensors, extra = _extra_states(state.model)
        _check_names(state, folder, saved, [*tensors, *extra_tensors], extra)
        tensors |= _optimizer_tensors(state, folder, saved)
        random = {key: value for key, value in _random_states(rank).items() if key in saved.shapes}
        saved.read({**tensors, **extra_tensors, **random})
        _set_extra_states(state.model, extra_tensors, facts.get("extra", {}))
        for group, values in zip(state.optimizer.param_groups, facts["groups"], strict=True):
            kept = {key: value for key, value in values.items() if key not in IMPLEMENTATION}
            group.update(_like(group, kept))
        if state.lr_scheduler:
            rate = _like(state.lr_scheduler.state_dict(), facts["rate"])
            state.lr_scheduler.load_state_dict(rate)
        state.results = [EpochResult(**result) for result in facts["results"]]
        state.step, losses = facts["step"], facts["losses"]
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        if isinstance(e, ConfigError):
            raise
        reason = first_line(e)
        raise ConfigError(
            f"{folder} holds no checkpoint of this run ({reason}); use another folder"
        ) from e
    state.random_states = random
    restore_random_states(random)
    if len(losses) == state.world.world_size:
        state.loss_sum = losses[rank]
    elif rank == 0:
        state.loss_sum = sum(losses)
    return True


def _check_config(state: TrainState, folder: Path, was: Mapping[str, object]) -> None:
    """Refuse a checkpoint of a run with other values."""
    now = state.config
    if differing := sorted(key for key in now.keys() & was.keys() if was[key] != now[key]):
        of = [", ".join(f"{key} {config[key]}" for key in differing) for config in (was, now)]
        raise ConfigError(
            f"{folder} holds a run with {of[0]}, this one has {of[1]}; give the values of "
            "that run, or use another folder"
        )


def _optimizer_tensors(state: TrainState, folder: Path, saved: Checkpoint) -> dict[str, Tensor]:
    """Fill the optimizer's state with zeros; return its tensors, by names in the checkpoint."""
    tensors = {}
    optimized = {p for group in state.optimizer.param_groups for p in group["params"]}
    for name, p in state.model.named_parameters():
        prefix = f"optimizer.{name}."
        for key in (key for key in saved.shapes if key.startswith(prefix)):
            if p not in optimized:
                raise ConfigError(
                    f"{folder} holds {key.removeprefix(prefix)} of {name}, which the optimizer "
                    "does not have now; give it that parameter, or use another folder"
                )
            shape = saved.shapes[key]
            like = p if shape == part_of(p).whole else torch.zeros(shape)
            value = torch.zeros_like(like, requires_grad=False)
            state.optimizer.state[p][key.removeprefix(prefix)] = value
            tensors[key] = _shard(p, value)
    return tensors


def restore_random_states(states: dict[str, Tensor]) -> None:
    for key, value in states.items():
        (torch.cuda.set_rng_state if "cuda" in key else torch.set_rng_state)(value)


def _check_names(
    state: TrainState,
    folder: Path,
    saved: Checkpoint,
    tensors: list[str],
    extra: Mapping[str, object],
) -> None:
    """Refuse a checkpoint of other layers or of another kind of optimizer, before it is read.

    Each stage of a pipeline has some of the layers, so the names of all ranks together are
    compared.
    """
    # A rank that refuses alone must not leave the other ranks in a collective.
    numbered = _members(state)
    of_ranks = state.world.gather_results(lambda: [*tensors, *(f"json.{name}" for name in extra)])
    present = {
        "optimizer": _optimizer_classes(state.optimizer),
        "schedule": _schedule_kinds(state.lr_scheduler),
    }
    for key, kinds in present.items():
        saved_kinds = saved.state.get(key, kinds)  # older checkpoints lack the key
        if saved_kinds != kinds:
            was, now = (" with ".join(names) or f"no {key}" for names in (saved_kinds, kinds))
            raise ConfigError(
                f"{folder} holds the state of {was}, this run has {now}; use another folder"
            )
    numbers = len(saved.state["groups"]), len(state.optimizer.param_groups)
    if numbers[0] != numbers[1]:
        raise ConfigError(
            f"{folder} holds {numbers[0]} parameter groups, this run has {numbers[1]}; use another "
            "folder"
        )
    members = saved.state.get("members", {})
    for name, number in numbered.items():
        if members.get(name, number) != number:
            raise ConfigError(
                f"{folder} has {name} in group {members[name]} of the optimizer, this run in group "
                f"{number}; use another folder"
            )
    here = {name for names in of_ranks for name in names}
    there = {name for name in saved.shapes if name.startswith(("model.", "extra."))}
    there |= {f"json.{name}" for name in saved.state.get("extra", {})}
    if missing := sorted(here - there):
        raise ConfigError(
            f"{folder} does not hold {_plain(missing[0])} of the model; use another folder"
        )
    if unknown := sorted(there - here):
        raise ConfigError(
            f"{folder} holds {_plain(unknown[0])}, which the model lacks; use another folder"
        )


def _plain(name: str) -> str:
    kind, _, rest = name.partition(".")
    return rest if kind == "model" else f"the extra state of {rest}"


def optimizers_of(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizer, or the optimizers of a chain."""
    parts = getattr(optimizer, "optimizers", None)
    return [optimizer] if parts is None else [one for part in parts for one in optimizers_of(part)]


def _optimizer_classes(optimizer: Optimizer) -> list[str]:
    return [type(one).__name__ for one in optimizers_of(optimizer)]


def _schedule_kinds(lr_scheduler: LRScheduler | None) -> list[str]:
    """The class of a scheduler, and the classes of the schedulers of which it consists."""
    if lr_scheduler is None:
        return []
    parts = getattr(lr_scheduler, "_schedulers", ())
    return [
        type(lr_scheduler).__name__,
        *(kind for part in parts for kind in _schedule_kinds(part)),
    ]


def _settings(optimizer: Optimizer) -> list[dict[str, object]]:
    """The settings of each group, without its parameters, which differ between ranks, and without
    what another device, or a CUDA graph, sets otherwise."""
    excluded = ("params", "param_names", *IMPLEMENTATION)
    return [
        {key: x for key, x in group.items() if key not in excluded}
        for group in optimizer.param_groups
    ]


def _members(state: TrainState) -> dict[str, int]:
    """The number of each parameter's group, by the parameter's name, for all ranks' parameters.

    Every rank must call this.
    """
    names = {p: name for name, p in state.model.named_parameters()}
    groups = [group["params"] for group in state.optimizer.param_groups]
    mine = {names[p]: number for number, params in enumerate(groups) for p in params if p in names}
    of_ranks = state.world.gather_results(lambda: mine)
    return {name: number for of_rank in of_ranks for name, number in of_rank.items()}


def _extra_states(model: torch.nn.Module) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The extra states of the modules: tensors, by their names in a checkpoint, and JSON."""
    tensors, others = {}, {}
    for name, module in model.named_modules():
        if type(module).get_extra_state is torch.nn.Module.get_extra_state:
            continue
        value = module.get_extra_state()
        if isinstance(value, Tensor):
            tensors[f"extra.{name}"] = value.detach().clone()
        elif _is_json(value):
            others[name] = value
        else:
            raise ConfigError(
                f"the extra state of {name or 'the model'} is a {type(value).__name__} that is "
                "neither a tensor nor JSON, and would not be saved; return one of these from "
                "get_extra_state"
            )
    return tensors, others


def _is_json(value: object) -> bool:
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError from a comparison of tensors
        return False


def _set_extra_states(
    model: torch.nn.Module, tensors: Mapping[str, Tensor], others: Mapping[str, object]
) -> None:
    for name, module in model.named_modules():
        if f"extra.{name}" in tensors:
            module.set_extra_state(tensors[f"extra.{name}"])
        elif name in others:
            module.set_extra_state(others[name])


def _model_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    tensors = {f"model.{name}": _shard(p, p) for name, p in model.named_parameters()}
    return tensors | {f"model.{name}": buffer for name, buffer in model.named_buffers()}


def _like(now: object, saved: Any) -> Any:
    """Return ``saved``, from JSON, with keys of the types in ``now``; fill tensors of ``now``."""
    if isinstance(now, Tensor):
        return now.copy_(torch.as_tensor(saved, dtype=now.dtype))
    if isinstance(now, dict):
        restore = int if now and all(isinstance(key, int) for key in now) else str
        pairs = ((restore(key), value) for key, value in saved.items())
        filled = now.copy()  # of the same class, such as Counter
        filled.clear()
        filled.update({key: _like(now.get(key), value) for key, value in pairs})
        return filled
    if isinstance(now, list | tuple) and len(now) == len(saved):
        return type(now)(_like(*pair) for pair in zip(now, saved, strict=True))
    return saved


def _random_states(rank: int) -> dict[str, Tensor]:
    """Return this rank's random states, by names that contain the rank."""
    suffix = f".{rank}" if rank else ""
    states = {f"random.cpu{suffix}": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"random.cuda{suffix}"] = torch.cuda.get_rng_state()
    return states


def _shard(p: Tensor, t: Tensor) -> Tensor:
    """Return ``t`` as a DTensor if it is a shard, as parameter ``p`` is; a number as it is."""
    return as_dtensor(t.detach(), part_of(p)) if part_of(p).is_slice and t.dim() else t.detach()
