# SPDX-License-Identifier: MIT
"""The parts of a run, and the tensors of its modules by their names in a checkpoint."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from torchpar.errors import ConfigError
from torchpar.library.sharding import is_dtensor
from torchpar.parallel.launch.agreement import checksum
from torchpar.parallel.launch.world import World
from torchpar.parallel.split.parts import as_dtensor, part_of, reshard
from torchpar.training.outcome import EpochResult
from torchpar.training.stateful import is_plain_module


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
        random_states, generator_states: the states of the process's generators and of those in
            ``stateful``, in the checkpoint from which the run resumed.
        stateful: other objects that are saved, by name: modules, generators, and objects that have
            a state dict.
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
    stateful: Mapping[str, Any] = field(default_factory=dict)
    generator_states: dict[str, Any] = field(default_factory=dict)

    @property
    def modules(self) -> dict[str, torch.nn.Module]:
        """The model, and modules that are saved as it is, by the first words of their names in a
        checkpoint."""
        others = {f"stateful.{name}": x for name, x in self.stateful.items() if is_plain_module(x)}
        return {"model": self.model, **others}


def module_tensors(state: TrainState) -> dict[str, Tensor]:
    """Parameters and buffers of the model and of the other modules, by names in a checkpoint."""
    tensors: dict[str, Tensor] = {}
    for word, module in state.modules.items():
        original = _original(state.model, module)
        for name, p in named_parameters(module):
            tensors[f"{word}.{name}"] = shard(original.get(name, p), p)
        for name, buffer in module.named_buffers():
            tensors[f"{word}.{uncompiled(name)}"] = buffer
    return tensors


def _original(model: torch.nn.Module, module: torch.nn.Module) -> dict[str, Tensor]:
    """The parameters of the model, by the names that a copy of it has for them; none of others.

    They say how the copy is sharded: a copy may have no marks of shards.
    """
    own, names = dict(named_parameters(model)), dict(named_parameters(module))
    for prefix in ("", "module."):
        if all(f"{prefix}{name}" in names for name in own):
            copies = {f"{prefix}{name}": p for name, p in own.items()}
            if all(names[name].shape == p.shape for name, p in copies.items()):
                return {n: p for n, p in copies.items() if part_of(p).is_slice}
    return {}


def check_copies(state: TrainState, tensors: Mapping[str, Tensor]) -> None:
    """Refuse values beside the model that differ between ranks: those of one rank would be saved.

    Buffers of an average are those of the first rank, as of the model.
    """
    if state.world.world_size == 1 or len(state.modules) == 1:
        return
    sums = {}
    for word, module in state.modules.items():
        named = [name for name, _ in named_parameters(module)]
        if not isinstance(module, AveragedModel):
            named += [uncompiled(name) for name, _ in module.named_buffers()]
        for name in named if word != "model" else ():
            t = tensors[f"{word}.{name}"]
            if not is_dtensor(t):
                sums[f"{word}.{name}"] = checksum(t)
    first: dict[str, int] = {}
    for of_rank in state.world.gather_results(lambda: sums):
        for name, value in of_rank.items():
            if first.setdefault(name, value) != value:
                raise ConfigError(
                    f"{plain(name)} differs between ranks, and one rank's values would be saved; "
                    "update it alike on all ranks, mark shards by torchpar.parallel.mark_shard, or "
                    "give an object whose state_dict has it"
                )


def extra_states(state: TrainState) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The extra states of the modules: tensors, by their names in a checkpoint, and JSON."""
    tensors, others = {}, {}
    for name, module in _extras(state):
        value = module.get_extra_state()
        if isinstance(value, Tensor):
            tensors[f"extra.{name}"] = value.detach().clone()
        elif _is_json(value):
            others[name] = value
        else:
            raise ConfigError(
                f"{plain(f'extra.{name}') if name else 'the extra state of the model'} is a "
                f"{type(value).__name__} that is neither a tensor nor JSON, and would not be "
                "saved; return one of these from get_extra_state"
            )
    return tensors, others


def _extras(state: TrainState) -> Iterator[tuple[str, torch.nn.Module]]:
    """The modules that have an extra state, by name; those of the model without a first word."""
    for word, root in state.modules.items():
        for name, module in root.named_modules():
            if type(module).get_extra_state is not torch.nn.Module.get_extra_state:
                words = [] if word == "model" else [word]
                yield ".".join(filter(None, [*words, uncompiled(name)])), module


def _is_json(value: object) -> bool:
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError from a comparison of tensors
        return False


def set_extra_states(
    state: TrainState, tensors: Mapping[str, Tensor], others: Mapping[str, object]
) -> None:
    others = {uncompiled(name): value for name, value in others.items()}
    for name, module in _extras(state):
        if f"extra.{name}" in tensors:
            module.set_extra_state(tensors[f"extra.{name}"])
        elif name in others:
            module.set_extra_state(others[name])


def reshard_all(state: TrainState) -> None:
    for module in state.modules.values():
        reshard(module)


def named_parameters(module: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters, by the names that they have without `torch.compile`."""
    return ((uncompiled(name), p) for name, p in module.named_parameters())


def uncompiled(name: str) -> str:
    """The name of a parameter or module as it is without `torch.compile`."""
    return ".".join(word for word in name.split(".") if word != "_orig_mod")


def plain(name: str) -> str:
    """A tensor of a checkpoint, or a value in its manifest, as an error names it."""
    kind, _, rest = name.partition(".")
    if kind in ("extra", "json"):
        return f"the extra state of {rest.removeprefix('stateful.')}"
    if kind == "groups":
        return "the settings of the optimizer"
    return f"the optimizer's state of {rest}" if kind == "values" else rest


def shard(p: Tensor, t: Tensor) -> Tensor:
    """Return ``t`` as a DTensor if it is a shard, as parameter ``p`` is; a number as it is."""
    return as_dtensor(t.detach(), part_of(p)) if part_of(p).is_slice and t.dim() else t.detach()
