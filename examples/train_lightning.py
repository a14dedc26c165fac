# SPDX-License-Identifier: MIT
"""An MLP trained by Lightning: the model and its step are ours, the loop is the Trainer's.

    python examples/train_lightning.py fit
    python examples/train_lightning.py fit --trainer.accelerator cpu --trainer.devices 2
    python examples/train_lightning.py fit --config examples/lightning.yaml
    python examples/train_lightning.py test --ckpt_path /tmp/torchpar/lightning_logs/…/last.ckpt

The other lessons write the loop out. Here a LightningModule holds the model, the step and the optimizer, and
a LightningDataModule the batches. The Trainer calls them: on one process or several, in a precision, with
loggers, checkpoints and early stopping. LightningCLI makes a flag of each argument, and reads them from a
YAML file; see ``fit --help`` and ``fit --print_config``.

A framework must not change the result: the weights are those of a plain loop, to the bit. Its hooks cost some
tenths of a millisecond per step, which is much for a model of this size and nothing for a large one.

``fit`` ends with a test, of the best weights where checkpoints are kept. By default nothing is written;
lightning.yaml turns on a logger, checkpoints and early stopping.
"""

from collections.abc import Sequence
from typing import Literal

from support import lightning_cli  # isort: skip  (first: it reports a Lightning that is not installed)
from jsonargparse.typing import NonNegativeFloat
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from torchpar.data import Batch
from torchpar.lightning import LitClassifier, MNISTDataModule
from torchpar.nn import MLP
from torchpar.training import LRSchedule, lr_scheduler, sgd
from torchpar.training.losses import Loss


class LitMLP(LitClassifier):
    """`torchpar.nn.MLP` with its step and its optimizer; `LitClassifier` evaluates and logs.

    Args:
        sizes: of the layers, input first.
        hidden: activation between layers.
        loss: "cross-entropy" on logits; "bce" or "mse" on sigmoid outputs.
        lr: learning rate at the start.
        momentum: Nesterov momentum.
        weight_decay: L2 penalty λ of the weights: λ/2·‖W‖² in the loss.
        schedule: course of the learning rate over the run, in steps; linear and cosine end at 0.
        compile: compile the MLP by torch.compile.
    """

    def __init__(
        self,
        sizes: Sequence[int] = (784, 128, 64, 10),
        hidden: Literal["sigmoid", "relu"] = "sigmoid",
        loss: Loss = "cross-entropy",
        lr: NonNegativeFloat = 0.5,
        momentum: NonNegativeFloat = 0.9,
        weight_decay: NonNegativeFloat = 3e-5,
        schedule: LRSchedule = "linear",
        compile: bool = False,
    ):
        super().__init__(sizes[-1], loss)
        self.save_hyperparameters()  # as self.hparams, which a checkpoint holds
        self.mlp = MLP(sizes, hidden, "logits" if loss == "cross-entropy" else "sigmoid")
        if compile:
            self.mlp.compile()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)  # type: ignore[no-any-return]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x, labels, global_size = batch
        loss = self.loss_sum(self(x), labels)
        self.train_loss.update(loss.detach(), len(labels))
        # The loss is the mean over the global batch. DistributedDataParallel averages over the ranks, whose
        # shares of the batch may differ in size. The Trainer calls backward() and optimizer.step().
        return loss * (self.trainer.world_size / global_size)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        hp = self.hparams
        optimizer = sgd(self, hp["lr"], hp["momentum"], hp["weight_decay"])
        steps = self.trainer.estimated_stepping_batches  # infinite in a run without end, whose rate stays
        scheduler = lr_scheduler(optimizer, hp["schedule"], steps)  # type: ignore[arg-type]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


if __name__ == "__main__":
    lightning_cli.main(LitMLP, MNISTDataModule)
