# SPDX-License-Identifier: MIT
"""A small transformer that learns to write like Lewis Carroll, by Muon and by AdamW.

    python examples/train_transformer.py --report page
    torchrun --nproc_per_node=2 examples/train_transformer.py
    torchrun --nproc_per_node=2 examples/train_transformer.py --arithmetic exact --steps 20

It reads characters of "Alice's Adventures in Wonderland" and predicts the next one. The last tenth
of the book is the validation text, which it is not trained on. Both optimizers start from the same
weights and see the same windows of the training text. `Muon.for_model` gives the hidden matrices to
Muon and the other parameters to AdamW, and prints a table of them. On several ranks each one takes
a share of the windows and of Muon's matrices. With ``--arithmetic exact`` both end with the same
bits on any processor and any number of ranks: four windows are a unit, which is computed by itself,
and the gradients of units are added as integers.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Literal

from support import cli, console, report

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from torchpar import exact
from torchpar.errors import ConfigError
from torchpar.optim import Muon
from torchpar.parallel import join_world
from torchpar.parallel.launch.world import World
from torchpar.training import Evaluation, Run
from torchpar.training.profile.recorder import Recorder

BOOK = Path(__file__).parent / "data" / "alice.txt"
# Characters of a window, their features; of the model.
CONTEXT, WIDTH, HEADS, BLOCKS = 64, 128, 4, 2
EPOCHS = 10  # after each, the model is evaluated
UNIT = 4  # windows whose gradient is rounded once in exact arithmetic, whatever ranks there are


@dataclass(kw_only=True)
class Flags(cli.ExampleFlags):
    """Train a character-level transformer by Muon, and by AdamW."""

    steps: cli.Count = 300  # Steps of each optimizer, rounded up to a multiple of its tenth.
    batch_size: cli.Count = 32  # Windows of a step, of all ranks together.
    lr: cli.Number = 0.02  # Learning rate of Muon at the start; it falls to 0.
    adamw_lr: cli.Number = 6e-3  # Learning rate of AdamW, likewise.
    log_dir: cli.LogDir = None  # Folder for TensorBoard: losses.
    report: cli.Report = None  # Folder for a page of the runs, run.html.
    # Exact: the same bits everywhere, many times slower.
    arithmetic: Literal["fast", "exact"] = "fast"


def read_text(path: Path) -> tuple[Tensor, int]:
    """The characters of a text as numbers, and how many different ones there are.

    Raises:
        ConfigError: the file is missing or damaged, or its text is too short.
    """
    if not path.exists():
        raise ConfigError(f"{path} does not exist, expected the book in the examples' data")
    try:
        written = path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path} cannot be read as ASCII ({e}); copy the book there again") from e
    least = 10 * (CONTEXT + 1)  # a window in the last tenth, too
    if len(written) < least:
        raise ConfigError(
            f"{path} has {len(written)} characters, expected at least {least}; copy the book there "
            "again"
        )
    alphabet = {character: i for i, character in enumerate(sorted(set(written)))}
    return torch.tensor([alphabet[character] for character in written]), len(alphabet)


def load_book(device: torch.device) -> tuple[Sequence[Tensor], int]:
    """Return the training text and the validation text, and how many different characters they
    have."""
    text, characters = read_text(BOOK)
    return text.to(device).tensor_split([len(text) * 9 // 10]), characters


class Transformer(nn.Module):
    """The logits ``(b, CONTEXT, characters)`` of the next characters, for windows
    ``(b, CONTEXT)``."""

    def __init__(self, characters: int):
        super().__init__()
        self.tokens = nn.Embedding(characters, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        layer = partial(
            nn.TransformerEncoderLayer,
            WIDTH,
            HEADS,
            4 * WIDTH,
            dropout=0.0,
            batch_first=True,
            norm_first=True,
        )
        self.blocks = nn.ModuleList(layer() for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, characters)

    def forward(self, text: Tensor) -> Tensor:
        x = self.tokens(text) + self.positions
        future = torch.ones(CONTEXT, CONTEXT, dtype=torch.bool, device=text.device).triu(1)
        for block in self.blocks:
            x = block(x, src_mask=future)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def loss_of(model: nn.Module, text: Tensor, starts: Tensor, reduction: str = "mean") -> Tensor:
    """Return the cross-entropy of each next character in the windows of ``text`` that begin at
    ``starts``."""
    window = text[(starts[:, None] + torch.arange(CONTEXT + 1)).to(text.device)]
    logits = model(window[:, :-1])
    return cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction=reduction)


class Windows:
    """A task for `torchpar.training.Run`: windows of a book, drawn at random.

    A batch holds where its windows begin, on all ranks. An epoch is a tenth of the run.
    """

    def __init__(self, flags: Flags, text: Tensor, validation: Tensor):
        self.text, self.validation = text, validation
        self.steps = max(flags.steps // EPOCHS, 1)  # of an epoch
        self.batch_size = flags.batch_size
        self.samples = self.steps * flags.batch_size
        self.config = {"seed": flags.seed}
        self.arithmetic = exact.mode if flags.arithmetic == "exact" else nullcontext

    def check(self, world: World) -> None: ...

    def batches(self, epoch: int, start: int, world: World) -> Iterator[Tensor]:  # noqa: ARG002  # a task's signature
        drawn = torch.Generator().manual_seed(self.config["seed"])
        for step in range(epoch * self.steps):
            starts = torch.randint(len(self.text) - CONTEXT, (self.batch_size,), generator=drawn)
            if step >= (epoch - 1) * self.steps + start:
                yield starts

    @torch.no_grad()
    def evaluate(self, model: nn.Module, world: World) -> Evaluation:
        """The mean loss of a character of the validation text, over windows that do not overlap."""
        starts = torch.arange(0, len(self.validation) - CONTEXT, CONTEXT)
        mine = starts[world.rank :: world.world_size]
        with self.arithmetic():
            loss = loss_of(model, self.validation, mine, "sum")
        total = world.sum(loss.double())
        return Evaluation(float(total) / (len(starts) * CONTEXT))


def train(name: str, flags: Flags, world: World) -> report.Run:
    """Train by Muon or by AdamW.

    Returns:
        The figures of each epoch: "train_loss" is the mean over its steps; "seconds" are those
            since the beginning, without evaluation.
    """
    (text, validation), characters = load_book(world.device)
    is_exact = flags.arithmetic == "exact"
    task = Windows(flags, text, validation)
    torch.manual_seed(flags.seed)
    with task.arithmetic():
        model = Transformer(characters).to(world.device)
    # On a GPU AdamW would take operators of several tensors, which have no exact version.
    adamw = partial(torch.optim.AdamW, lr=flags.adamw_lr, foreach=False if is_exact else None)
    optimizer: torch.optim.Optimizer = adamw(model.parameters())
    if name == "muon":
        optimizer = Muon.for_model(model, flags.lr, others=adamw, process_group=world.mesh["dp"])
        if world.rank == 0:
            print(optimizer)
    epochs = math.ceil(flags.steps / task.steps)
    schedule = LambdaLR(optimizer, lambda step: 1 - step / (epochs * task.steps))
    replica = DistributedDataParallel(model) if world.world_size > 1 and not is_exact else model
    parallel = exact.DataParallel(model, world.mesh["dp"].get_group()) if is_exact else None
    mine = slice(world.rank, None, world.world_size)
    run = Run(model, optimizer, schedule, world, task, epochs=epochs)
    recorder = Recorder(model, optimizer, world) if flags.report else None
    with run, recorder or nullcontext():
        for epoch in run.epochs():
            batches = run.batches(epoch)
            for starts in recorder.steps(batches) if recorder else batches:
                with task.arithmetic():
                    if parallel:
                        for unit in starts.split(UNIT)[mine]:
                            loss = loss_of(model, text, unit)
                            parallel.backward(loss * len(unit) / flags.batch_size)
                        loss = parallel.all_reduce()  # sets the gradients; the loss of all ranks
                    else:
                        loss = loss_of(replica, text, starts[mine])
                        loss.backward()
                    optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                # Each rank's mean is over as many windows.
                run.end_step(loss_sum=loss * flags.batch_size / world.world_size)
            run.end_epoch()
    seconds = accumulate(task.samples / result.samples_per_s for result in run.results)
    rows = [
        {
            "optimizer": name,
            "step": result.epoch * task.steps,
            "train_loss": result.train_loss,
            "validation_loss": result.test_loss,
            "seconds": second,
        }
        for result, second in zip(run.results, seconds, strict=True)
    ]
    summary = (
        "training loss {train_loss:.3f}, validation loss {validation_loss:.3f} after {step} steps, "
        "{seconds:.1f} s"
    )
    return report.Run(rows, summary.format(**rows[-1]), recorder.gather() if recorder else [])


def main(flags: Flags) -> None:
    with join_world(flags.device, gloo_yields=True) as world:
        if flags.arithmetic == "fast" and flags.batch_size % world.world_size:
            raise ConfigError(
                f"--batch-size is {flags.batch_size}, expected a multiple of the ranks"
            )
        if world.world_size == 1:  # of a layer of a block
            cli.take_threads(world.device.type, flags.batch_size * CONTEXT * WIDTH * 4 * WIDTH)
        runs = {name: train(name, flags, world) for name in ("muon", "adamw")}
        if world.rank > 0:
            return
        for name, run in runs.items():
            print(f"{name}: {run.summary}")
            console.write_log(flags.log_dir and flags.log_dir / name, run.figures, "step")
        rows = [row for run in runs.values() for row in run.figures]
        console.write_metrics(flags.metrics, rows)
        if flags.report:
            report.write(flags.report, runs)


if __name__ == "__main__":
    cli.main(main, Flags)
