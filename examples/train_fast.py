# SPDX-License-Identifier: MIT
"""The training of ``train_ddp.py``, faster: what each way to compute the same step gains.

    torchrun --nproc_per_node=2 examples/train_fast.py

Most of a small network's step is not arithmetic. The script times these ways side by side, from the
same first weights and on the same batches, checks that their gradients agree, and trains by the
last one:

- "DistributedDataParallel", as in ``train_ddp.py``, but with gloo's messages.
- "shared memory": ranks on the CPUs of one machine add their gradients there, instead of sending
  each other messages (`torchpar.parallel.split.shared_memory`).
- "gradients by hand": the gradients of an MLP follow from its activations by a few products.
  Without autograd nothing is recorded, and all gradients are added over the ranks at once
  (`torchpar.training.fused`).
- "CUDA graph of …": on a GPU, a whole step of DistributedDataParallel or of gradients by hand is
  one launch (`torchpar.training.graphed`).
"""

import sys
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from statistics import median
from typing import Annotated, Literal

from support import cli, console, learning_rate, lesson
from support.measure import now

import torch
import torch.distributed as dist
import train_ddp
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from torchpar import data
from torchpar.data import Batch, Samples
from torchpar.errors import TorchparError
from torchpar.nn import MLP
from torchpar.parallel import join_world, register_shared_memory_hook
from torchpar.parallel.launch.world import World
from torchpar.parallel.split.shared_memory import can_share_memory
from torchpar.training import Classification, Run, graphed, side_stream
from torchpar.training.fused import FusedGradients, why_not_fused

ROUNDS, STEPS = 5, 4  # how often each way is timed, and its steps each time
WARMUP = 13  # steps of each way before it is timed; a graph is replayed in the last ones
GRAPH_OF = "CUDA graph of "


@dataclass(kw_only=True)
class Flags(train_ddp.Flags):
    """Train a digit classifier by data parallelism, in the last way that is possible."""

    # Gradients by hand where the model allows it, or always by autograd.
    fused: Annotated[Literal["auto", "off"], cli.Free()] = "auto"


def find_ways(flags: Flags, world: World, train: Samples) -> list[str]:
    """Return the ways that are possible here. Rank 0 prints why some are not."""
    ways = ["DistributedDataParallel"]
    if world.device.type == "cpu" and can_share_memory(world.dp_size):
        ways.append("shared memory")
    model = MLP(flags.layer_sizes(train), flags.activation, device=world.device)
    reason = "--fused is off" if flags.fused == "off" else why_not_fused(model)
    if flags.compile:
        reason = "--compile compiles the model"
    if not reason:
        ways.append("gradients by hand")
    elif world.rank == 0:
        print(f"no gradients by hand: {reason}")
    no_graph = f"{flags.recorded} looks into a step" if flags.recorded else ""
    if world.world_size > 1 and dist.get_backend() != "nccl":
        no_graph = "gloo's messages cannot be captured"
    if not next(model.parameters()).is_cuda:
        no_graph = "the device is a CPU"
    if not no_graph:
        ways += [f"{GRAPH_OF}{way}" for way in ways if way != "shared memory"]
    elif world.rank == 0:
        print(f"no CUDA graph: {no_graph}")
    return ways


class Trainer:
    """A model, its optimizer, and one of the ways to compute a step."""

    def __init__(self, flags: Flags, world: World, train: Samples, way: str, captures: bool = True):
        self.flags, self.world = flags, world
        torch.manual_seed(flags.seed)  # the same weights on every rank, and in every way
        self.model = MLP(flags.layer_sizes(train), flags.activation).to(world.device)
        # Muon for weights, SGD for biases.
        self.optimizer = flags.make_optimizer(self.model)
        self.fused = None
        self.step = self._step
        if way.startswith(GRAPH_OF):
            # What is not captured is the same step, launched kernel by kernel.
            warmup = None if captures else sys.maxsize
            self.step = graphed(self._step, self.optimizer, warmup=warmup)
        if way.endswith("gradients by hand"):
            self.fused = FusedGradients(self.model, world, flags.label_smoothing)
            return
        with side_stream() if way.startswith(GRAPH_OF) else nullcontext():
            self.replica = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        if way == "shared memory":
            register_shared_memory_hook(self.replica, world)
        if flags.compile:
            self.replica.compile()

    def gradients(self, x: Tensor, labels: Tensor, global_size: int) -> Tensor:
        """Leave the gradients of a batch in ``p.grad``, and return the sum of this rank's
        losses."""
        if self.fused is not None:
            return self.fused(x, labels, global_size)
        smoothing = self.flags.label_smoothing
        loss = cross_entropy(self.replica(x), labels, reduction="sum", label_smoothing=smoothing)
        (loss * (self.world.dp_size / global_size)).backward()
        return loss.detach()

    def _step(self, x: Tensor, labels: Tensor, global_size: int) -> Tensor:
        loss = self.gradients(x, labels, global_size)
        self.flags.adjust_gradients(self.model, self.world)  # --clip and --orthogonality
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


def compare(flags: Flags, world: World, train: Samples, ways: list[str]) -> list[console.Row]:
    """Time some steps of each way in turn.

    Returns:
        For each way, the median of a step's milliseconds, and its speed-up over the first way.

    Raises:
        TorchparError: the gradients of two ways, or the weights by a graph and without it, differ
            by more than rounding.
    """
    batches = partial(
        data.batches, train, flags.batch_size, seed=flags.seed, epoch=1, share=world.share
    )
    trainers = {way: Trainer(flags, world, train, way) for way in ways}
    check_gradients(trainers, next(batches()))
    shares = {way: cycle(batches()) for way in ways}
    # Kernels are compiled, the wrapper sets itself up, and graphs are captured.
    for way, trainer in trainers.items():
        batch = next(batches())
        for _ in range(WARMUP):
            trainer.step(*batch)
        if way.startswith(GRAPH_OF):
            eager = Trainer(flags, world, train, way, captures=False)
            for _ in range(WARMUP):
                eager.step(*batch)
            check_graph(way, trainer, eager)
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(ROUNDS):
        for way, trainer in trainers.items():
            start = now(world.device)
            for batch in islice(shares[way], STEPS):
                trainer.step(*batch)
            times[way].append(1e3 * (now(world.device) - start) / STEPS)
    ms = {way: median(times[way]) for way in ways}
    return [{"way": way, "ms": ms[way], "speed_up": ms[ways[0]] / ms[way]} for way in ways]


def check_gradients(trainers: dict[str, Trainer], batch: Batch) -> None:
    """Compare the gradients of each way with those of the first.

    The limit is the rounding of sums over the batch and over a layer's inputs.
    """
    first: Tensor | None = None
    for way, trainer in trainers.items():
        trainer.gradients(*batch)
        mine = torch.cat(
            [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
        )
        trainer.optimizer.zero_grad()
        first = mine if first is None else first
        off = ((mine - first).norm() / first.norm()).item()
        if not off <= (batch.global_size + max(trainer.model.sizes)) * torch.finfo(mine.dtype).eps:
            raise TorchparError(
                f"the gradient with {way} is off by {off:.1e} of its norm; report this"
            )


def check_graph(way: str, captured: Trainer, eager: Trainer) -> None:
    """Compare the weights after as many steps by a graph and without it.

    The limit is the rounding of as many steps.
    """
    mine, theirs = (
        torch.cat([p.detach().flatten() for p in one.model.parameters()])
        for one in (captured, eager)
    )
    off = ((mine - theirs).norm() / theirs.norm()).item()
    if not off <= WARMUP * max(eager.model.sizes) * torch.finfo(mine.dtype).eps:
        raise TorchparError(f"the weights by the {way} are off by {off:.1e}; report this")


def main(flags: Flags) -> None:
    with join_world(flags.device, flags.timeout, gloo_yields=True) as world:
        train, test = flags.load(world)
        ways = find_ways(flags, world, train)
        rows = compare(flags, world, train, ways)
        if world.rank == 0:
            console.print_rows(rows)
            print(f"training with {ways[-1]}")
        trainer = Trainer(flags, world, train, ways[-1])
        lr_scheduler = learning_rate.lr_scheduler(
            trainer.optimizer, flags.schedule, flags.total_steps(train)
        )

        task = Classification(train, test, flags.batch_size, seed=flags.seed)
        run = Run(
            model=trainer.model,
            optimizer=trainer.optimizer,
            lr_scheduler=lr_scheduler,
            world=world,
            task=task,
            epochs=flags.epochs,
            checkpoint=flags.saving(),
            config=flags.config(),
        )
        with run, lesson.Log(flags, run) as log:
            run.resume()
            log.resumed()
            for epoch in run.epochs():
                for batch in run.batches(epoch):
                    loss = trainer.step(*batch)
                    lr_scheduler.step()
                    run.end_step(loss_sum=loss)
                    log.step()
                log.epoch(run.end_epoch())


if __name__ == "__main__":
    cli.main(main, Flags)
