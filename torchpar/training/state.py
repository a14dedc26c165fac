# SPDX-License-Identifier: MIT
"""Training state: save it to checkpoints and resume from them.

It is the parameters, the optimizer, the learning rate, the random state, and the position in the data.
"""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchpar.errors import ConfigError, first_line
from torchpar.outcome import EpochResult
from torchpar.parallel.save.checkpoint import Checkpoints
from torchpar.parts import as_dtensor, is_marked, part_of

if TYPE_CHECKING:
    from torchpar.training.run import Run


def save(run: "Run", checkpoints: Checkpoints) -> None:
    """Save as the checkpoint of the run's step. Every rank calls it."""
    losses = torch.zeros(run.world.world_size, dtype=torch.float64, device=run.world.device)
    losses[run.world.rank] = float(run.loss_sum)
    tensors = _model_tensors(run.model)
    for name, p in run.model.named_parameters():
        for key, value in run.optimizer.state[p].items():
            # A value of its parameter's shape is split as the parameter is. Others must be scalars.
            if not isinstance(value, Tensor):
                found = f"is a {type(value).__name__}, expected a tensor"
            elif is_marked(p) and value.dim() and value.shape != p.shape:
                found = f"has shape {tuple(value.shape)}, expected {tuple(p.shape)}, as it is split"
            else:
                tensors[f"optimizer.{name}.{key}"] = _shard(p, value)
                continue
            raise ConfigError(f"the optimizer's {key} of {name} {found}; take another optimizer")
    tensors |= _random_states(run.world.rank)
    own = ("params", "param_names")  # of this rank
    state = {
        "run": run.config,
        "results": [asdict(result) for result in run.results],
        "step": run.step,
        "losses": run.world.sum(losses).tolist(),
        "rate": run.lr_scheduler.state_dict() if run.lr_scheduler else {},
        "groups": [{k: v for k, v in g.items() if k not in own} for g in run.optimizer.param_groups],
    }
    checkpoints.save(run.total_steps, tensors, state)


def resume(run: "Run", checkpoints: Checkpoints) -> bool:
    """Continue from the newest whole checkpoint. Return False if there is none.

    Each rank restores its own random state. A rank that the saved run did not have keeps its current one.

    Raises:
        ConfigError: the checkpoint was saved by another run or another program; on every rank.
    """
    saved = checkpoints.load()
    if saved is None:
        return False
    folder, rank = checkpoints.folder, run.world.rank
    state = saved.state
    was, now = state.get("run", {}), run.config
    if differing := sorted(key for key in now.keys() & was.keys() if was[key] != now[key]):
        of = [", ".join(f"{key} {config[key]}" for key in differing) for config in (was, now)]
        raise ConfigError(f"{folder} holds a run with {of[0]}, this one has {of[1]}; use another folder")
    try:
        tensors = _model_tensors(run.model)
        for name, p in run.model.named_parameters():
            prefix = f"optimizer.{name}."
            for key in (key for key in saved.shapes if key.startswith(prefix)):
                shape = saved.shapes[key]
                like = p if shape == part_of(p).whole else torch.zeros(shape)
                value = torch.zeros_like(like, requires_grad=False)
                run.optimizer.state[p][key.removeprefix(prefix)] = value
                tensors[key] = _shard(p, value)
        random = {key: value for key, value in _random_states(rank).items() if key in saved.shapes}
        saved.read({**tensors, **random})
        for group, values in zip(run.optimizer.param_groups, state["groups"], strict=True):
            group.update(_like(group, values))
        if run.lr_scheduler:
            run.lr_scheduler.load_state_dict(_like(run.lr_scheduler.state_dict(), state["rate"]))
        run.results = [EpochResult(**result) for result in state["results"]]
        run.step, losses = state["step"], state["losses"]
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        if isinstance(e, ConfigError):
            raise
        reason = first_line(e)
        raise ConfigError(f"{folder} holds no checkpoint of this run ({reason}); use another folder") from e
    for key, value in random.items():
        (torch.cuda.set_rng_state if "cuda" in key else torch.set_rng_state)(value)
    if len(losses) == run.world.world_size:
        run.loss_sum = losses[rank]
    elif rank == 0:
        run.loss_sum = sum(losses)
    return True


def _model_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    tensors = {f"model.{name}": _shard(p, p) for name, p in model.named_parameters()}
    return tensors | {f"model.{name}": buffer for name, buffer in model.named_buffers()}


def _like(now: Any, saved: Any) -> Any:
    """Return ``saved``, which was JSON, with the keys of ``now``, and with its tensors, which are filled."""
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
    """Return this rank's random states under names of its own."""
    suffix = f".{rank}" if rank else ""
    states = {f"random.cpu{suffix}": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"random.cuda{suffix}"] = torch.cuda.get_rng_state()
    return states


def _shard(p: Tensor, t: Tensor) -> Tensor:
    """Return ``t``, of the shape of parameter ``p`` or a number, as a DTensor if ``p`` is a slice."""
    return as_dtensor(t.detach(), part_of(p)) if is_marked(p) and t.dim() else t.detach()
