# SPDX-License-Identifier: MIT
"""Data parallelism: every rank holds the whole model and takes a share of each batch.

    torchrun --nproc_per_node=2 examples/train_ddp.py
    torchrun --nproc_per_node=2 examples/train_ddp.py --plain

The second command is the textbook's loop: SGD on all pixels, with the labels as they are. The first
reaches a higher accuracy in three epochs, by four things that are not data parallelism:

    --optimizer muon         turns the gradient of each weight matrix into one with equal singular
                             values, so that few epochs suffice
    --crop 3 --pool 2        leave out the empty margin, and average 2 × 2 pixels: 121 inputs
                             in place of 784, and less to learn by heart
    --label-smoothing 0.05   keeps the outputs from growing without end; the train loss counts it,
                             and the test loss does not
    a hook                   sends DistributedDataParallel's messages through shared memory

All ranks draw the same weights, because they start from the same seed. In every step a rank
computes the gradient of its own samples. DistributedDataParallel averages the gradients over the
ranks during the backward pass, so all ranks take the same step:

    rank 0   x⁽⁰⁾ ─ forward ─ loss ─ backward ─ dL/dW₁, dL/dW₀ ─┐                ┌─ optimizer.step()
                                                                ├─ all-reduce: ──┤
    rank 1   x⁽¹⁾ ─ forward ─ loss ─ backward ─ dL/dW₁, dL/dW₀ ─┘  their mean    └─ optimizer.step()

The gradients are averaged in buckets. A bucket's all-reduce starts when the backward pass has made
the bucket's last gradient, and runs while the pass goes on to earlier layers. The first bucket
takes 1 MiB, and so all 270 kB of this model. `torchpar.reference.average_gradients` shows the
average in a few lines. Two ranks compute the same as one, up to rounding. In large batches of
784-512-10 they take six tenths of the time that one rank takes with one thread, and nine tenths of
the time that it takes with two (docs/measurements.md). `train_fast.py` makes the same steps faster.

The model is an MLP. Its inputs are averages of 2 × 2 pixels. Its hidden layer calls
`torchpar.linear_sigmoid`. With ``--activation maxout`` it calls `torchpar.maximum`, for the larger
of two linear functions.

Without torchrun, ``python examples/train_ddp.py`` is one process with all threads.

With ``--arithmetic exact`` the weights have the same bits on any processor and any number of ranks,
and the last line is their SHA-256 (docs/exact.md). DistributedDataParallel adds floats, in an order
that depends on the ranks, so `torchpar.exact.DataParallel` takes its place: 512 samples are a unit,
whose gradient is computed by itself, and the gradients of units are added as integers.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self

from support import cli, learning_rate, lesson
from support.cli import Bounds, Count, Free, Share, Size, Switch

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from torchpar import exact
from torchpar.data import Batch, batches
from torchpar.errors import ConfigError
from torchpar.nn import MLP, Hidden
from torchpar.parallel import join_world, register_shared_memory_hook
from torchpar.parallel.launch.world import World
from torchpar.training import Classification, Run, graphed, side_stream

UNIT = 512  # samples whose gradient is rounded once in exact arithmetic, whatever ranks there are


# docs/training.md compares the defaults with others, on training images that were left out.
@dataclass(kw_only=True)
class Flags(lesson.TrainFlags):
    """Train a digit classifier by data parallelism."""

    SGD: ClassVar = {"lr": 0.2, "momentum": 0.9, "weight_decay": 3e-5}
    MUON: ClassVar = {"lr": 0.5, "momentum": 0.8, "weight_decay": 0.0}

    epochs: Annotated[Count, Free()] = 3  # Passes over the training samples.
    batch_size: Count = 1024  # Samples per step, over all ranks.
    # Optimizer; muon updates the weight matrices, and SGD updates the biases.
    optimizer: Literal["muon", "sgd"] = "muon"
    hidden: tuple[Size, ...] = (512,)  # Widths of the hidden layers.
    # Pixels to leave out on each side of an image.
    crop: Annotated[int, Bounds(0, 2**31)] = 3
    pool: Size = 2  # Side of the squares of pixels that are averaged to one.
    # Hidden layers: sigmoid calls torchpar.linear_sigmoid, and maxout calls torchpar.maximum.
    activation: Hidden = "sigmoid"
    # Part of a target that is spread evenly over all classes; the test loss is without it.
    label_smoothing: Share = 0.05
    # The textbook's loop: SGD, all pixels, no label smoothing, and DistributedDataParallel alone.
    plain: Switch = False
    # Capture a step in a CUDA graph, and launch it as one; on a CPU, steps are as without it.
    graph: Switch = False
    # Exact: the same bits everywhere, several times slower.
    arithmetic: Literal["fast", "exact"] = "fast"

    # By --plain.
    PLAIN: ClassVar[dict[str, Any]] = {
        "optimizer": "sgd",
        "crop": 0,
        "pool": 1,
        "label_smoothing": 0.0,
    }

    def completed(self) -> Self:
        flags = super().completed()
        if flags.plain:
            for name, value in self.PLAIN.items():
                if getattr(flags, name) not in (value, getattr(Flags, name)):
                    flag = f"--{name.replace('_', '-')}"
                    raise ConfigError(f"--plain sets {flag} to {value}; drop one of the two")
            flags = replace(flags, **self.PLAIN)
        if flags.optimizer == "muon" and flags.lr is None and flags.activation != "sigmoid":
            flags = replace(flags, lr=0.2)  # their slopes are up to 1, the sigmoid's up to 1/4
        return flags

    def check(self) -> None:
        super().check()
        if self.graph and self.recorded:
            raise ConfigError(
                f"{self.recorded} looks into a step, and --graph launches it as one; drop one"
            )
        if self.arithmetic == "exact":
            set_flags = ("compile", "clip", "orthogonality")
            unknown = [f"--{name}" for name in set_flags if getattr(self, name)]
            unknown += ["--schedule cosine"] * (self.schedule == "cosine")
            if unknown:
                raise ConfigError(
                    f"--arithmetic exact has no version of {unknown[0]}; drop one of the two"
                )

    @property
    def recorded(self) -> str:
        """The first flag that records what happens within a step, or ""."""
        names = ("phases", "collectives", "memory", "report", "replay")
        return next((f"--{name}" for name in names if getattr(self, name)), "")


Step = Callable[[Tensor, Tensor, int], Tensor]


def main(flags: Flags) -> None:
    is_exact = flags.arithmetic == "exact"
    with join_world(flags.device, flags.timeout, gloo_yields=True) as world:
        if flags.graph and is_exact and world.device.type == "cuda":
            raise ConfigError(
                "--arithmetic exact reads numbers back from the GPU within a step, which --graph "
                "cannot capture; drop one of the two"
            )
        train, test = flags.load(world)
        torch.manual_seed(flags.seed)  # the same weights on every rank
        with exact.mode() if is_exact else nullcontext():
            model = MLP(flags.layer_sizes(train), flags.activation).to(world.device)
        # Muon for the weight matrices and SGD for the biases, at a rate that falls to 0 linearly,
        # unless --optimizer, --lr and --schedule say otherwise.
        optimizer = flags.make_optimizer(model, exact=is_exact)
        lr_scheduler = learning_rate.lr_scheduler(
            optimizer, flags.schedule, flags.total_steps(train)
        )
        make_step = exact_step if is_exact else averaged_step
        step = make_step(flags, model, optimizer, world)
        take_step = graphed(step, optimizer) if flags.graph else step
        task = (WholeBatches if is_exact else Classification)(
            train,
            test,
            flags.batch_size,
            predict=partial(predict_exactly, model) if is_exact else None,
            seed=flags.seed,
        )
        run = Run(
            model=model,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            world=world,
            task=task,  # which samples, in which batches, and how the model is judged
            epochs=flags.epochs,
            checkpoint=flags.saving(),
            config=flags.config(),
        )
        with run, lesson.Log(flags, run) as log:
            run.resume()
            log.resumed()
            for epoch in run.epochs():
                for x, labels, global_size in run.batches(epoch):  # this rank's share
                    loss = take_step(x, labels, global_size)
                    lr_scheduler.step()
                    run.end_step(loss_sum=loss)
                    log.step()
                log.epoch(run.end_epoch())


def averaged_step(flags: Flags, model: MLP, optimizer: Optimizer, world: World) -> Step:
    """Return a step on this rank's share of a batch, by DistributedDataParallel."""
    # Its forward pass is the model's. Its backward pass averages the gradients over the ranks.
    with side_stream() if flags.graph else nullcontext():
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    if not flags.plain:
        register_shared_memory_hook(ddp, world)  # faster than gloo between the CPUs of one machine
    if flags.compile:
        ddp.compile()

    def step(x: Tensor, labels: Tensor, global_size: int) -> Tensor:
        outputs = ddp(x)
        loss = cross_entropy(
            outputs, labels, reduction="sum", label_smoothing=flags.label_smoothing
        )
        # The mean over the global batch: DDP divides by the number of ranks, whose shares of the
        # batch may differ in size.
        (loss * (world.dp_size / global_size)).backward()
        flags.adjust_gradients(model, world)  # --clip and --orthogonality
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def exact_step(flags: Flags, model: MLP, optimizer: Optimizer, world: World) -> Step:
    """Return a step on a whole batch in exact arithmetic, of which this rank takes some units."""
    parallel = exact.DataParallel(model, world.mesh["dp"].get_group())

    def step(x: Tensor, labels: Tensor, global_size: int) -> Tensor:
        units = [*zip(x.split(UNIT), labels.split(UNIT), strict=True)]
        for inputs, targets in units[world.dp_rank :: world.dp_size]:
            loss = cross_entropy(
                model(inputs), targets, reduction="sum", label_smoothing=flags.label_smoothing
            )
            parallel.backward(loss / global_size)
        loss = parallel.all_reduce()  # sets the gradients; the mean over the global batch
        optimizer.step()
        optimizer.zero_grad()
        return loss * (global_size / world.dp_size)  # the ranks' parts add up

    return exact.mode()(step)


class WholeBatches(Classification):
    """The task of `exact_step`: each rank gets whole batches."""

    def batches(self, epoch: int, start: int, world: World) -> Iterator[Batch]:  # noqa: ARG002  # a task's signature
        return batches(self.train, self.batch_size, seed=self.seed, epoch=epoch, start=start)


def predict_exactly(model: MLP, x: Tensor) -> Tensor:
    """The model's outputs, as tensors that the mode does not watch."""
    with exact.mode():
        outputs: Tensor = model(x)
    return outputs.clone()


if __name__ == "__main__":
    cli.main(main, Flags)
