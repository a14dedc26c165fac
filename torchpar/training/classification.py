# SPDX-License-Identifier: MIT
"""Classification of samples in memory: the batches of a `Run`, and its evaluation."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from torchpar.data import Batch, Samples, batches
from torchpar.errors import ConfigError, whole_or_text
from torchpar.parallel.launch.agreement import check_same_bits, check_same_on_all_ranks
from torchpar.parallel.launch.world import World
from torchpar.training.outcome import Evaluation

Loss = Callable[[Tensor, Tensor], Tensor]
# Samples per forward pass; 1, 2, 4 and 8 ranks share a test set of 10 000 evenly.
EVALUATION_BATCH = 1250
cross_entropy_sum: Loss = partial(F.cross_entropy, reduction="sum")


class Classification:
    """A `torchpar.training.Task`: classify samples, which every rank holds in memory.

    Args:
        train, test: the same samples on every rank.
        batch_size: samples per step, over all ranks.
        predict: inputs → outputs, or None on ranks without outputs; by default the run's model.
            `Run` refuses a module with other parameters than its model's.
        loss: for evaluation, outputs and labels → the sum of the losses; by default the
            cross-entropy.
        seed: the seed of the samples' order.
    """

    def __init__(
        self,
        train: Samples,
        test: Samples,
        batch_size: int,
        *,
        predict: Callable[[Tensor], Tensor | None] | None = None,
        loss: Loss = cross_entropy_sum,
        seed: int = 0,
    ):
        self.train, self.test = train, test
        self.samples = len(train)
        # NumPy's integers, which JSON does not take, become Python's. `Run` refuses any other batch
        # size. The configuration holds it as text.
        number = whole_or_text(batch_size)
        self.batch_size = number if isinstance(number, int) else batch_size
        self.predict = predict
        self.loss = loss
        self.seed = seed
        self.config: dict[str, object] = {
            "batch_size": number,
            "seed": seed,
            "train": len(train),
        }

    def check(self, world: World) -> None:
        """Refuse samples that differ between ranks, no samples, and a test set of other classes.

        Raises:
            ConfigError: on every rank.
        """
        if world.world_size > 1:
            sizes = {
                "test": len(self.test),
                "classes of train": self.train.classes,
                "classes of test": self.test.classes,
            }
            check_same_on_all_ranks(None, "the ranks' samples", sizes)
        # Samples that are wrong on one rank alone have been found to differ.
        if not len(self.train) or not len(self.test):
            raise ConfigError(
                f"{len(self.train)} training and {len(self.test)} test samples, expected at least "
                "one of each"
            )
        if tuple(self.train.classes) != tuple(self.test.classes):
            raise ConfigError(
                f"the test samples have the classes {self.test.classes}, expected those of the "
                f"training samples, {self.train.classes}, in their order; give both sets all names"
            )
        if world.world_size > 1:
            drawn = {"train.features": self.train.features, "train.labels": self.train.labels}
            drawn |= {"test.features": self.test.features, "test.labels": self.test.labels}
            check_same_bits(None, drawn, "make the same samples on all, such as by one seed")

    def batches(self, epoch: int, start: int, world: World) -> Iterator[Batch]:
        """Yield this rank's share of each batch of an epoch, from the batch number ``start``."""
        return batches(
            self.train,
            self.batch_size,
            seed=self.seed,
            epoch=epoch,
            share=world.share if world.dp_size > 1 else None,
            start=start,
        )

    def evaluate(self, model: torch.nn.Module, world: World) -> Evaluation:
        """The mean loss, the accuracy and the outputs of the test samples, on every rank."""
        loss, outputs = evaluate(self.predict or model, self.test, world, self.loss)
        right = (outputs.argmax(1) == self.test.labels).sum().item()
        return Evaluation(loss, right / len(self.test), outputs)


@torch.no_grad()
def evaluate(
    predict: Callable[[Tensor], Tensor | None],
    samples: Samples,
    world: World,
    loss: Loss = cross_entropy_sum,
) -> tuple[float, Tensor]:
    """Return the mean loss and the outputs ``(n, classes)`` of all samples, on every rank.

    The samples are cut into chunks of 1250 for every number of ranks, and each rank takes some of
    the chunks. So the loss does not depend on the number of ranks. Every rank makes the same number
    of forward passes, as `fully_shard` and buffers of DistributedDataParallel need: a rank without
    a chunk left repeats the first chunk.

    Args:
        predict: inputs → outputs ``(b, classes)``, or None on ranks without outputs.
        loss: outputs ``(n, classes)`` in float64 and labels ``(n)`` → the sum of the losses.

    Raises:
        ConfigError: outputs of another shape, on the ranks that have them.
    """
    chunks = list(torch.arange(len(samples), device=world.device).split(EVALUATION_BATCH))
    outputs = torch.zeros(len(samples), len(samples.classes), device=world.device)
    numbers = world.share(torch.arange(len(chunks), device="cpu")).tolist()
    passes = -(-len(chunks) // world.dp_size)
    for i in numbers + [None] * (passes - len(numbers)):
        chunk = chunks[i or 0]
        mine = predict(samples.inputs(chunk))
        if mine is not None and world.owns_outputs and i is not None:
            expected = len(chunk), len(samples.classes)
            if mine.shape != expected:
                raise ConfigError(
                    f"the model's outputs have shape {tuple(mine.shape)}, expected {expected}, one "
                    "for each sample and class; change its last layer, or the classes of the "
                    "samples"
                )
            outputs[chunk] = mine.float()
    world.sum(outputs)  # an output is zero except on the rank that computed it
    return loss(outputs.double(), samples.labels).item() / len(samples), outputs
