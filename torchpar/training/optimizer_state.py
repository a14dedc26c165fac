# SPDX-License-Identifier: MIT
"""The state of a run's optimizer: what a checkpoint holds of it, and how it is filled again."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchpar.errors import ConfigError
from torchpar.library.sharding import local
from torchpar.parallel.split.parts import part_of
from torchpar.training.stateful import pack
from torchpar.training.train_state import TrainState, named_parameters, shard

IMPLEMENTATION = ("capturable", "foreach", "fused")  # how a group's update is computed


def optimizer_state(
    state: TrainState,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The optimizer's state: tensors, and other values, packed.

    Raises:
        ConfigError: state of a parameter that is not the model's, or that cannot be split as its
            parameter is.
    """
    tensors: dict[str, Tensor] = {}
    packed: dict[str, Tensor] = {}
    for name, p in named_parameters(state.model):
        others = {}
        for key, value in state.optimizer.state.get(p, {}).items():
            _check_split(name, p, key, value)
            if isinstance(value, Tensor) and isinstance(key, str):
                tensors[f"optimizer.{name}.{key}"] = shard(p, value)
            else:
                others[key] = value
        if others:
            packed[f"values.{name}"] = pack(f"the optimizer's state of {name}", others)
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
    return tensors, packed


def _check_split(name: str, p: Tensor, key: str, value: object) -> None:
    """Refuse a value of a shard that is neither a number nor sharded as its parameter is."""
    if not part_of(p).is_slice or isinstance(value, int | float | str | None):
        return
    if not isinstance(value, Tensor):
        found = f"is a {type(value).__name__}, expected a tensor"
    elif value.dim() and value.shape != p.shape:
        found = f"has shape {tuple(value.shape)}, expected {tuple(p.shape)}, as it is split"
    else:
        return
    raise ConfigError(f"the optimizer's {key} of {name} {found}; take another optimizer")


def optimizer_tensors(
    state: TrainState,
    folder: Path,
    shapes: Mapping[str, torch.Size],
    dtypes: Mapping[str, torch.dtype],
    on_host: Sequence[str] | None,
) -> dict[str, Tensor]:
    """Fill the optimizer's state with zeros; return its tensors, by names in the checkpoint.

    Args:
        on_host: the tensors that a run on a GPU had on the host; None if the run was on CPUs.
    """
    tensors = {}
    groups = {p: group for group in state.optimizer.param_groups for p in group["params"]}
    for name, p in named_parameters(state.model):
        prefix = f"optimizer.{name}."
        for key in (key for key in shapes if key.startswith(prefix)):
            if p not in groups:
                raise ConfigError(
                    f"{folder} holds {key.removeprefix(prefix)} of {name}, which the optimizer "
                    "does not have now; give it that parameter, or use another folder"
                )
            # PyTorch's optimizers have single numbers on the host, unless they are capturable.
            stays = not shapes[key] if on_host is None else key in on_host
            stays &= not (groups[p].get("capturable") or groups[p].get("fused"))
            device = torch.device("cpu") if stays else p.device
            if shapes[key] == part_of(p).whole and device == p.device:
                value = torch.zeros_like(p, dtype=dtypes[key], requires_grad=False)
            else:
                value = torch.zeros(shapes[key], dtype=dtypes[key], device=device)
            state.optimizer.state[p][key.removeprefix(prefix)] = value
            tensors[key] = shard(p, value)
    return tensors


def has_modes(optimizer: Optimizer) -> bool:
    """Whether an optimizer has ``train()`` and ``eval()``, as schedule-free ones have."""
    return all(callable(getattr(optimizer, name, None)) for name in ("eval", "train"))


@contextmanager
def evaluation_weights(optimizer: Optimizer) -> Iterator[dict[Tensor, Tensor]]:
    """Show, within the block, the weights by which a model is judged.

    They are other weights than those of the next step where the optimizer `has_modes`. After the
    block it is in its training mode, and the weights have their former bits: ``train()`` alone
    would round them. An optimizer that the loop has put into its evaluation mode stays there.

    Yields:
        the weights of the training mode, by parameter; none if the weights are the same.
    """
    flags = [group.get("train_mode") for group in optimizer.param_groups]
    is_judged = False in flags or getattr(optimizer, "train_mode", None) is False
    if is_judged or not has_modes(optimizer):
        yield {}
        return
    modes: Any = optimizer
    trained = {p: p.detach().clone() for group in optimizer.param_groups for p in group["params"]}
    changed = trained
    try:
        modes.eval()
        if all(torch.equal(local(p), local(t)) for p, t in trained.items()):
            changed = {}
        yield changed
    finally:
        modes.train()
        with torch.no_grad():
            for p, weight in changed.items():
                p.copy_(weight)


def judged_and_trained(state: TrainState) -> dict[str, Tensor]:
    """The weights of an optimizer with two modes, by names in a checkpoint; none with one mode.

    The weights by which the model is judged have the names of the model's. A resumed run goes on
    with those that the optimizer trains.
    """
    tensors = {}
    with evaluation_weights(state.optimizer) as trained:
        for name, p in named_parameters(state.model) if trained else ():
            tensors[f"model.{name}"] = shard(p, p.detach().clone())
            if p in trained:
                tensors[f"trained.{name}"] = shard(p, trained[p])
    return tensors


def trained_tensors(
    state: TrainState, tensors: dict[str, Tensor], shapes: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    """Take from ``tensors`` the parameters of which the checkpoint has those that were trained."""
    names = [name for name, _ in named_parameters(state.model) if f"trained.{name}" in shapes]
    return {f"trained.{name}": tensors.pop(f"model.{name}") for name in names}


def optimizers_of(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizer, or the optimizers of a chain."""
    parts = getattr(optimizer, "optimizers", None)
    return [optimizer] if parts is None else [one for part in parts for one in optimizers_of(part)]


def optimizer_classes(optimizer: Optimizer) -> list[str]:
    return [type(one).__name__ for one in optimizers_of(optimizer)]


def settings_of(optimizer: Optimizer) -> list[dict[str, object]]:
    """The settings of each group, without its parameters, which differ between ranks, and without
    what another device, or a CUDA graph, sets otherwise."""
    excluded = ("params", "param_names", *IMPLEMENTATION)
    return [
        {key: x for key, x in group.items() if key not in excluded}
        for group in optimizer.param_groups
    ]


def packed_groups(state: TrainState) -> dict[str, Tensor]:
    """The settings of the groups, packed. Tensors are on the host, so that ranks have the same."""
    settings = [
        {key: x.cpu() if isinstance(x, Tensor) else x for key, x in group.items()}
        for group in settings_of(state.optimizer)
    ]
    return {"groups": pack("the optimizer", settings)}


def readable_groups(optimizer: Optimizer) -> list[dict[str, object]]:
    """The settings of the groups as JSON, for people, and for the number of groups."""
    return [
        {key: x if isinstance(x, int | float | str | None) else repr(x) for key, x in group.items()}
        for group in settings_of(optimizer)
    ]


def check_optimizer(state: TrainState) -> None:
    """Refuse an optimizer of which checkpoints would lose something.

    Raises:
        ConfigError: it divides its state over the ranks; its state dict has more than state and
            groups; or a setting of a group could not be loaded.
    """
    more: list[str] = []
    for optimizer in optimizers_of(state.optimizer):
        if any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__):
            raise ConfigError(
                "ZeroRedundancyOptimizer shards its state over the ranks, and checkpoints do not "
                "hold these shards; take another optimizer, or fully_shard"
            )
        with suppress(KeyError):  # state of a parameter that it does not have: `save` names it
            more = sorted(optimizer.state_dict().keys() - {"state", "param_groups"})
        if more:
            raise ConfigError(
                f"the state dict of {type(optimizer).__name__} has {more[0]}, which would not be "
                "saved; take another optimizer"
            )
    try:
        packed_groups(state)
    except ConfigError:
        for number, settings in enumerate(settings_of(state.optimizer)):
            for key, value in settings.items():
                _check_setting(number, key, value)


def _check_setting(number: int, key: str, value: object) -> None:
    try:
        pack(key, value)
    except ConfigError as e:
        raise ConfigError(
            f"the optimizer's group {number} has {key} = {value!r}, which would not be saved; "
            "expected numbers, strings or tensors"
        ) from e


def load_groups(state: TrainState, saved: Sequence[Mapping[str, Any]], is_json: bool) -> None:
    """Set the settings of the groups. A tensor, such as a rate, stays the same tensor.

    Args:
        is_json: they are of a version that saved JSON.
    """
    for group, values in zip(state.optimizer.param_groups, saved, strict=True):
        for key, value in values.items():
            now = group.get(key)
            if key in IMPLEMENTATION:
                continue
            if is_json:
                group[key] = like(now, value)
            elif isinstance(now, Tensor) and isinstance(value, Tensor):
                now.copy_(value)
            else:
                group[key] = value


def members_of_groups(state: TrainState) -> dict[str, int]:
    """The number of each parameter's group, by the parameter's name, for all ranks' parameters.

    Every rank must call this.
    """
    names = {p: name for name, p in named_parameters(state.model)}
    groups = [group["params"] for group in state.optimizer.param_groups]
    mine = {names[p]: number for number, params in enumerate(groups) for p in params if p in names}
    of_ranks = state.world.gather_results(lambda: mine)
    return {name: number for of_rank in of_ranks for name, number in of_rank.items()}


def like(now: object, saved: Any) -> Any:
    """Return ``saved``, from JSON, with keys of the types in ``now``; fill tensors of ``now``."""
    if isinstance(now, Tensor):
        return now.copy_(torch.as_tensor(saved, dtype=now.dtype, device="cpu"))
    if isinstance(now, dict):
        restore = int if now and all(isinstance(key, int) for key in now) else str
        pairs = ((restore(key), value) for key, value in saved.items())
        filled = now.copy()  # of the same class, such as Counter
        filled.clear()
        filled.update({key: like(now.get(key), value) for key, value in pairs})
        return filled
    if isinstance(now, list | tuple) and len(now) == len(saved):
        return type(now)(like(*pair) for pair in zip(now, saved, strict=True))
    return saved
