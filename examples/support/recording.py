# SPDX-License-Identifier: MIT
"""Callback of Lightning's Trainer that records the steps of a training, for the page of a run."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer

from torchpar.training.profile.record import RankRecord
from torchpar.training.profile.recorder import Recorder

B = TypeVar("B")


class Recording(Callback):
    """Records of a training's steps, and its figures after each epoch.

    Attributes:
        figures: what the model has logged, by name, of each epoch.
        records: of all ranks, after the training.
    """

    def __init__(self) -> None:
        self.figures: list[dict[str, float]] = []
        self.records: list[RankRecord] = []
        self._recorder: Recorder | None = None
        self._active = ExitStack()

    def steps(self, batches: Iterable[B]) -> Iterator[B]:
        """Yield the training batches, and record the steps that take them."""
        return self._recorder.steps(batches) if self._recorder else iter(batches)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._recorder = Recorder(pl_module, trainer.optimizers[0])
        self._active.enter_context(self._recorder)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002  # the hook's signature
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.figures.append({"epoch": trainer.current_epoch + 1, **logged})

    def on_train_end(self, *_: object) -> None:
        self._active.close()
        assert self._recorder is not None
        self.records = self._recorder.gather()

    def on_exception(self, *_: object) -> None:
        self._active.close()
