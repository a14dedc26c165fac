# SPDX-License-Identifier: MIT
"""Training state: save it to checkpoints and resume from them."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from torchpar.errors import ConfigError
from torchpar.parallel.launch.world import World
from torchpar.parallel.save.checkpoint import Checkpoints
from torchpar.parts import as_dtensor, is_marked, part_of

# Options of an optimizer that choose how a step is computed. A resumed run keeps its own.
IMPLEMENTATION_OPTIONS = ("fused", "foreach", "capturable", "differentiable")


@dataclass(frozen=True)
class EpochResult:
    """Figures of one epoch.

    Attributes:
        epoch: from 1.
        train_loss: mean over the epoch's training samples, each at the step that trained on it.
        test_loss: mean over all test samples, after the epoch.
        test_accuracy: in [0, 1].
        samples_per_s: training samples per second over all ranks, without evaluation. In a resumed epoch,
            those since it was resumed.
        seconds: of training and evaluation. In a resumed epoch, those since it was resumed.
        ranks: number of processes.
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


class TrainState:
    """State of a run on this rank: parameters, optimizer, learning rate, random state, position in the data.

    Attributes:
        results: of the complete epochs.
        step: complete steps of the current epoch.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: Optimizer,
        lr_scheduler: LRScheduler | None,
        config: dict[str, Any],
        world: World,
    ):
        self.model = model
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.config = config
        self.world = world
        self.results: list[EpochResult] = []
        self.step = 0
        self._loss: float | Tensor = 0.0

    def add_loss(self, loss: Tensor) -> None:
        """Add this rank's part of the sum of a step's losses."""
        if loss.is_cpu:
            self._loss += loss.item()
            return
        if not isinstance(self._loss, Tensor):  # on a GPU the host does not wait for it
            self._loss = torch.tensor(self._loss, dtype=torch.float64, device=loss.device)
        self._loss += loss.detach().reshape(())

    def loss(self) -> float:
        """This rank's part of the sum of the losses of the current epoch, added in the order of the steps.

        In another order the sum of a resumed run could differ from that of a whole one.
        """
        return float(self._loss)

    def end_epoch(self, result: EpochResult) -> None:
        """Append the result of the current epoch and begin the next one."""
        self.results.append(result)
        self.step = 0
        self._loss = 0.0

    def save(self, checkpoints: Checkpoints, total_steps: int) -> None:
        """Save as checkpoint number ``total_steps``. Every rank calls it."""
        losses = torch.zeros(self.world.world_size, dtype=torch.float64, device=self.world.device)
        losses[self.world.rank] = self.loss()
        tensors = self._model_tensors()
        for name, p in self.model.named_parameters():
            for key, value in self.optimizer.state[p].items():
                # A value of its parameter's shape is split as the parameter is. Others must be scalars.
                if is_marked(p) and value.dim() and value.shape != p.shape:
                    raise ConfigError(
                        f"the optimizer's {key} of {name} has shape {tuple(value.shape)}, expected "
                        f"{tuple(p.shape)} or a number, as {name} is split over ranks; take another optimizer"
                    )
                tensors[f"optimizer.{name}.{key}"] = _shard(p, value)
        tensors |= self._random_states()
        own = ("params", "param_names")  # of this rank
        groups = [{k: v for k, v in g.items() if k not in own} for g in self.optimizer.param_groups]
        state = {
            "run": self.config,
            "results": [asdict(result) for result in self.results],
            "step": self.step,
            "losses": self.world.sum(losses).tolist(),
            "rate": self.lr_scheduler.state_dict() if self.lr_scheduler else {},
            "groups": groups,
        }
        checkpoints.save(total_steps, tensors, state)

    def resume(self, checkpoints: Checkpoints) -> bool:
        """Continue from the newest whole checkpoint. Return False if there is none.

        Each rank restores its own random state. A rank that the saved run did not have keeps its current one.

        Raises:
            ConfigError: the checkpoint was saved by another run or another program; on every rank.
        """
        saved = checkpoints.load()
        if saved is None:
            return False
        folder = checkpoints.folder
        state = saved.state
        was, now = state.get("run", {}), self.config
        if differing := sorted(key for key in now.keys() & was.keys() if was[key] != now[key]):
            of = [", ".join(f"{key} {config[key]}" for key in differing) for config in (was, now)]
            raise ConfigError(f"{folder} holds a run with {of[0]}, this one has {of[1]}; use another folder")
        try:
            tensors = self._model_tensors()
            for name, p in self.model.named_parameters():
                prefix = f"optimizer.{name}."
                for key in (key for key in saved.shapes if key.startswith(prefix)):
                    shape = saved.shapes[key]
                    like = p if shape == part_of(p).whole else torch.zeros(shape)
                    value = torch.zeros_like(like, requires_grad=False)
                    self.optimizer.state[p][key.removeprefix(prefix)] = value
                    tensors[key] = _shard(p, value)
            random = {key: value for key, value in self._random_states().items() if key in saved.shapes}
            saved.read({**tensors, **random})
            for group, values in zip(self.optimizer.param_groups, state["groups"], strict=True):
                group.update({k: v for k, v in values.items() if k not in IMPLEMENTATION_OPTIONS})
            if self.lr_scheduler:
                self.lr_scheduler.load_state_dict(state["rate"])
            self.results = [EpochResult(**result) for result in state["results"]]
            self.step, losses = state["step"], state["losses"]
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            if isinstance(e, ConfigError):
                raise
            reason = f"{type(e).__name__}: {e}".partition("\n")[0]
            raise ConfigError(
                f"{folder} holds no checkpoint of this run ({reason}); use another folder"
            ) from e
        for key, value in random.items():
            (torch.cuda.set_rng_state if "cuda" in key else torch.set_rng_state)(value)
        if len(losses) == self.world.world_size:
            self._loss = losses[self.world.rank]
        elif self.world.rank == 0:
            self._loss = sum(losses)
        return True

    def _model_tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{name}": _shard(p, p) for name, p in self.model.named_parameters()}
        return tensors | {f"model.{name}": buffer for name, buffer in self.model.named_buffers()}

    def _random_states(self) -> dict[str, Tensor]:
        """Return this rank's random states under names of its own."""
        suffix = f".{self.world.rank}" if self.world.rank else ""
        states = {f"random.cpu{suffix}": torch.get_rng_state()}
        if torch.cuda.is_available():
            states[f"random.cuda{suffix}"] = torch.cuda.get_rng_state()
        return states


def _shard(p: Tensor, t: Tensor) -> Tensor:
    """Return ``t``, of the shape of parameter ``p`` or a number, as a DTensor if ``p`` is a slice."""
    return as_dtensor(t.detach(), part_of(p)) if is_marked(p) and t.dim() else t.detach()
