# SPDX-License-Identifier: MIT
"""Training state: save it to checkpoints and resume from them.

The state is the parameters, the optimizer, the learning rate, the random states, the position in
the data, and the states of the objects that the program gives to `Run`.

`torch.distributed.checkpoint.state_dict` was tried in place of this file. Where an optimizer has no
state yet, `get_optimizer_state_dict` makes it by a step with a learning rate of 0: Adam then counts
a step that never was, and hooks of the step run. A run that resumes from such a checkpoint has
other bits. Besides, it takes the tensors of split layers, which are no DTensors, for whole ones.
"""

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchpar.errors import ConfigError, first_line
from torchpar.parallel.launch.world import World
from torchpar.parallel.save.checkpoint import Checkpoints
from torchpar.training.optimizer_state import (
    check_optimizer,
    has_modes,
    judged_and_trained,
    like,
    load_groups,
    members_of_groups,
    optimizer_classes,
    optimizer_state,
    optimizer_tensors,
    packed_groups,
    readable_groups,
    trained_tensors,
)
from torchpar.training.outcome import EpochResult
from torchpar.training.same_run import (
    check_config,
    check_dtypes,
    check_names,
    schedule_kinds,
    stateful_classes,
)
from torchpar.training.stateful import (
    Access,
    generators,
    is_generator,
    objects_of,
    pack,
    unpack,
)
from torchpar.training.train_state import (
    TrainState,
    check_copies,
    extra_states,
    module_tensors,
    named_parameters,
    plain,
    reshard_all,
    set_extra_states,
    uncompiled,
)


def check_saveable(state: TrainState) -> None:
    """Refuse a state of which checkpoints would lose something; the error names it.

    Raises:
        ConfigError: an optimizer that divides its state over the ranks; a setting of a group, or a
            module's extra state, that is neither a tensor nor JSON; a sparse tensor; an object
            whose state `torch.load` would refuse.
    """
    reshard_all(state)
    check_optimizer(state)
    for name, t in (module_tensors(state) | extra_states(state)[0]).items():
        if t.layout != torch.strided:
            raise ConfigError(f"{plain(name)} is {t.layout}, and would not be saved; make it dense")
    state.world.gather_results(lambda: [*_packed_objects(state)])


def save(state: TrainState, checkpoints: Checkpoints, number: int) -> None:
    """Save as the checkpoint of step ``number`` of the run. Every rank must call this."""
    reshard_all(state)
    losses = torch.zeros(state.world.world_size, dtype=torch.float64, device=state.world.device)
    losses[state.world.rank] = float(state.loss_sum)
    extra_tensors, extra = extra_states(state)
    tensors = module_tensors(state) | extra_tensors
    check_copies(state, tensors)
    of_optimizer, values = optimizer_state(state)
    device = state.world.device.type
    on_host = [name for name, t in of_optimizer.items() if t.device.type == "cpu" != device]
    tensors |= of_optimizer | judged_and_trained(state)
    packed = _packed_objects(state) | values | packed_groups(state)
    tensors |= _by_rank(state.world, packed)
    tensors |= {name: one.get() for name, one in _generators(state.world.rank).items()}
    facts = {
        "run": state.config,
        "optimizer": optimizer_classes(state.optimizer),
        "schedule": schedule_kinds(state.lr_scheduler),
        "stateful": stateful_classes(state),
        "members": members_of_groups(state),
        "device": device,
        "host": [*chain.from_iterable(state.world.gather_results(lambda: on_host))],
        "extra": extra,
        "results": [asdict(result) for result in state.results],
        "step": state.step,
        "losses": state.world.sum(losses).tolist(),
        "rate": state.lr_scheduler.state_dict() if state.lr_scheduler else {},
        "groups": readable_groups(state.optimizer),
    }
    checkpoints.save(number, tensors, facts)


def resume(state: TrainState, checkpoints: Checkpoints) -> bool:
    """Continue from the newest undamaged checkpoint. Return False if there is none.

    Each rank restores its own random states. A rank that the saved run did not have keeps its
    current random states.

    Raises:
        ConfigError: on every rank: the checkpoint was saved by another run or another program, or
            holds other layers, dtypes or objects, or the state of another optimizer.
    """
    saved = checkpoints.load()
    if saved is None:
        return False
    reshard_all(state)
    folder, world = checkpoints.folder, state.world
    facts = saved.state
    check_config(state, folder, facts.get("run", {}))
    try:
        names = {uncompiled(name): name for name in saved.shapes}
        shapes = {name: saved.shapes[before] for name, before in names.items()}
        dtypes = world.gather_results(saved.dtypes)[0]
        dtypes = {name: dtypes[before] for name, before in names.items()}
        tensors = module_tensors(state)
        extra_tensors, extra = extra_states(state)
        check_names(state, folder, saved, {*shapes}, [*tensors, *extra_tensors], extra)
        check_dtypes(world, folder, tensors, dtypes)
        tensors |= trained_tensors(state, tensors, shapes)
        host = facts["host"] if facts.get("device", "cpu") != "cpu" else None
        tensors |= optimizer_tensors(state, folder, shapes, dtypes, host)
        found = _packed_names(state, folder, shapes, len(facts["losses"]))
        random_names = [name for name in _generators(world.rank) if name in shapes]
        packed = {
            name: torch.zeros(shapes[name], dtype=torch.uint8, device="cpu")
            for name in (*found.values(), *random_names)
        }
        if has_modes(state.optimizer):  # the weights that are loaded are those of this mode
            modes: Any = state.optimizer
            (modes.train if any(n.startswith("trained.") for n in shapes) else modes.eval)()
        read = {**tensors, **extra_tensors, **packed}
        saved.read({names[name]: t for name, t in read.items()})
        set_extra_states(state, extra_tensors, facts.get("extra", {}))
        values = {name: unpack(packed[n], world.device) for name, n in found.items()}
        load_groups(state, values.pop("groups", facts["groups"]), "groups" not in found)
        _set_values(state, values)
        if state.lr_scheduler:
            rate = like(state.lr_scheduler.state_dict(), facts["rate"])
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
    state.random_states = {name: packed[name] for name in random_names}
    restore_random_states(state)
    if world.rank == 0 and "random.python" not in shapes:
        said = f"checkpoint: {folder} is of an earlier version, which saved no random numbers of"
        print(f"{said} Python and NumPy; these begin anew", file=sys.stderr, flush=True)
    if len(losses) == world.world_size:
        state.loss_sum = losses[world.rank]
    elif world.rank == 0:
        state.loss_sum = sum(losses)
    return True


def _packed_names(
    state: TrainState, folder: Path, shapes: Mapping[str, torch.Size], ranks: int
) -> dict[str, str]:
    """The names in the checkpoint of the packed states that this rank reads, by their own names.

    Args:
        ranks: of the run that was saved.

    Raises:
        ConfigError: on every rank: the saved ranks had different states, and are not as many.
    """
    names = ["groups", *(f"stateful.{name}" for name in objects_of(state.stateful))]
    names += [f"values.{name}" for name, _ in named_parameters(state.model)]
    differing = {name.rpartition(".rank")[0] for name in shapes}
    of_each = [name for name in names if name in differing and name not in shapes]

    def check() -> None:
        if of_each and ranks != state.world.world_size:
            raise ConfigError(
                f"{folder} holds {plain(of_each[0])} of each of its {ranks} ranks, and this run "
                f"has {state.world.world_size}; start {ranks} ranks, or use another folder"
            )

    state.world.gather_results(check)
    found = {n: n if n in shapes else f"{n}.rank{state.world.rank}" for n in names}
    return {name: saved for name, saved in found.items() if saved in shapes}


def _set_values(state: TrainState, values: Mapping[str, Any]) -> None:
    """Set the states of objects, and those of the optimizer that are no tensors."""
    parameters, objects = dict(named_parameters(state.model)), objects_of(state.stateful)
    for name, value in values.items():
        kind, _, rest = name.partition(".")
        if kind == "values":
            state.optimizer.state[parameters[rest]].update(value)
            continue
        objects[rest].set(value)
        if is_generator(state.stateful[rest]):
            state.generator_states[rest] = value


def restore_random_states(state: TrainState) -> None:
    """Set all generators to the states of the checkpoint that was resumed."""
    for name, one in _generators(state.world.rank).items():
        if name in state.random_states:
            one.set(state.random_states[name])
    objects = objects_of(state.stateful)
    for name, value in state.generator_states.items():
        objects[name].set(value)


def _packed_objects(state: TrainState) -> dict[str, Tensor]:
    objects = objects_of(state.stateful)
    return {f"stateful.{name}": pack(name, one.get()) for name, one in objects.items()}


def _by_rank(world: World, packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name the states that differ between ranks by their rank."""
    digests = {name: hashlib.sha256(t.numpy().data).digest() for name, t in packed.items()}
    of_ranks = world.gather_results(lambda: digests)
    differing = {name for name in packed if len({ds[name] for ds in of_ranks if name in ds}) > 1}
    return {
        f"{name}.rank{world.rank}" if name in differing else name: t for name, t in packed.items()
    }


def _generators(rank: int) -> dict[str, Access]:
    """The process's random generators, by names in a checkpoint that contain the rank."""
    suffix = f".{rank}" if rank else ""
    return {f"random.{name}{suffix}": one for name, one in generators().items()}
