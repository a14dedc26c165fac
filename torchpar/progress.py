# SPDX-License-Identifier: MIT
"""What a run has come to, and how it is saved and resumed."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from torchpar.errors import ConfigError
from torchpar.parallel.checkpoint import Checkpoints
from torchpar.parallel.layers import split_parameters
from torchpar.parallel.storage import Slice
from torchpar.parallel.world import World


@dataclass(frozen=True)
class EpochResult:
    """What one epoch came to.

    Attributes:
        epoch: from 1.
        train_loss: mean over the epoch's training samples, each as it was trained on.
        test_loss: mean over all test samples, after the epoch.
        test_accuracy: in [0, 1].
        samples_per_s: training samples a second, over all ranks, evaluation not counted; of a resumed
            epoch, those since it was resumed.
        seconds: training and evaluation; of a resumed epoch, since it was resumed.
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


class Progress:
    """The state of a run on this rank: parameters, optimizer, schedule, random state, place in the data.

    Attributes:
        results: of the epochs that are complete.
        step: how many steps of the present epoch are done.
        loss: this rank's part of the sum of their losses, float64.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: Optimizer,
        rate: LambdaLR,
        run: dict[str, Any],
        world: World,
    ):
        self.model = model
        self.optimizer = optimizer
        self.rate = rate
        self.run = run
        self.world = world
        self.results: list[EpochResult] = []
        self.step = 0
        self.loss = torch.zeros((), dtype=torch.float64, device=world.device)
        self._splits = {
            name: (axis, layer.partition.offset(), layer.partition.size)
            for name, axis, layer in split_parameters(model)
        }

    def end_step(self, loss: Tensor) -> None:
        """Count a step, and what this rank's part of its loss came to."""
        self.step += 1
        if self.world.counts:
            self.loss += loss

    def end_epoch(self, result: EpochResult) -> None:
        self.results.append(result)
        self.step = 0
        self.loss.zero_()

    def save(self, checkpoints: Checkpoints, number: int) -> None:
        losses = torch.zeros(self.world.world_size, dtype=torch.float64, device=self.world.device)
        losses[self.world.rank] = self.loss
        tensors = self._model_tensors()
        for name, p in self.model.named_parameters():
            for key, value in self.optimizer.state[p].items():
                # What has its parameter's shape is split as that is; the rest must be counters.
                if name in self._splits and value.dim() and value.shape != p.shape:
                    raise ConfigError(
                        f"the optimizer's {key} of {name} has shape {tuple(value.shape)}, expected "
                        f"{tuple(p.shape)} or a number, as {name} is split over ranks; take another optimizer"
                    )
                tensors[f"optimizer.{name}.{key}"] = self._slice(name, value)
        if self.world.rank == 0:
            tensors |= dict(_random_states())
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        state = {
            "run": self.run,
            "results": [asdict(result) for result in self.results],
            "step": self.step,
            "losses": self.world.sum(losses).tolist(),
            "rate": self.rate.state_dict(),
            "groups": groups,
        }
        checkpoints.save(number, tensors, state)

    def resume(self, checkpoints: Checkpoints) -> None:
        """Continue from the newest checkpoint, if there is one.

        Raises:
            ConfigError: it is of another run or another program; on every rank.
        """
        saved = checkpoints.load()
        if saved is None:
            return
        folder = checkpoints.folder
        try:
            state = saved.state
            was, now = state["run"], self.run
            differing = sorted(key for key in now.keys() & was.keys() if was[key] != now[key])
            if differing:
                of = [", ".join(f"{key} {run[key]}" for key in differing) for run in (was, now)]
                raise ConfigError(
                    f"{folder} holds a run with {of[0]}, this one has {of[1]}; use another folder"
                )
            tensors = self._model_tensors()
            for name, p in self.model.named_parameters():
                prefix = f"optimizer.{name}."
                for key in (key for key in saved.shapes if key.startswith(prefix)):
                    like = p if saved.shapes[key] == self._whole(name, p) else torch.zeros(saved.shapes[key])
                    value = torch.zeros_like(like, requires_grad=False)
                    self.optimizer.state[p][key.removeprefix(prefix)] = value
                    tensors[key] = self._slice(name, value)
            random = {key: value for key, value in _random_states() if key in saved.shapes}
            saved.read({**tensors, **random})
            for group, values in zip(self.optimizer.param_groups, state["groups"], strict=True):
                group.update(values)
            self.rate.load_state_dict(state["rate"])
            self.results = [EpochResult(**result) for result in state["results"]]
            self.step = state["step"]
            losses = state["losses"]
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            if isinstance(e, ConfigError):
                raise
            reason = f"{type(e).__name__}: {e}".partition("\n")[0]
            raise ConfigError(
                f"{folder} holds no checkpoint of this run ({reason}); use another folder"
            ) from e
        _set_random_states(random)
        if len(losses) == self.world.world_size:
            self.loss += losses[self.world.rank]
        elif self.world.rank == 0:
            self.loss += sum(losses)

    def _model_tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{name}": self._slice(name, p) for name, p in self.model.named_parameters()}
        return tensors | {f"model.{name}": buffer for name, buffer in self.model.named_buffers()}

    def _slice(self, name: str, t: Tensor) -> Tensor:
        """``t``, of the shape of the parameter called ``name``, as a slice if that is one."""
        if name not in self._splits or t.dim() == 0:
            return t.detach()
        axis, offset, size = self._splits[name]
        return Slice.of(t, axis, offset, size)

    def _whole(self, name: str, p: Tensor) -> torch.Size:
        t = self._slice(name, p)
        return torch.Size(t.global_shape) if isinstance(t, Slice) else t.shape


def _random_states() -> Iterator[tuple[str, Tensor]]:
    yield "random.cpu", torch.get_rng_state()
    if torch.cuda.is_available():
        yield "random.cuda", torch.cuda.get_rng_state()


def _set_random_states(states: dict[str, Tensor]) -> None:
    if "random.cpu" in states:
        torch.set_rng_state(states["random.cpu"])
    if "random.cuda" in states:
        torch.cuda.set_rng_state(states["random.cuda"])
