# SPDX-License-Identifier: MIT
"""A small transformer that learns to write like this project's documentation, by Muon and by AdamW.

    python examples/train_transformer.py --plots pictures
    torchrun --nproc_per_node=2 examples/train_transformer.py

It reads characters and predicts the next one. Both optimizers start from the same weights and see the same
windows of the text. `Muon.for_model` gives the hidden matrices to Muon and the other parameters to AdamW, and
prints a table of them. On several ranks each one takes a share of the windows and of Muon's matrices.
"""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from support import cli, console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from torchpar.errors import ConfigError
from torchpar.optim import Muon
from torchpar.parallel import join_world
from torchpar.parallel.launch.world import World
from torchpar.training import lr_scheduler

DOCS = Path(__file__).parents[1] / "docs"
CONTEXT, WIDTH, HEADS, BLOCKS = 64, 128, 4, 2  # characters of a window, their features; of the model


@dataclass(kw_only=True)
class Flags(cli.LogFlags):
    """Train a character-level transformer by Muon, and by AdamW."""

    steps: int = 300  # Steps of each optimizer.
    batch_size: int = 32  # Windows of a step, of all ranks together.
    lr: float = 0.02  # Learning rate of Muon at the start; it falls to 0.
    adamw_lr: float = 6e-3  # Learning rate of AdamW, likewise.


class Transformer(nn.Module):
    """The logits ``(b, CONTEXT, characters)`` of the next characters, for windows ``(b, CONTEXT)``."""

    def __init__(self, characters: int):
        super().__init__()
        self.tokens = nn.Embedding(characters, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        settings: dict[str, Any] = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        layer = partial(nn.TransformerEncoderLayer, WIDTH, HEADS, 4 * WIDTH, **settings)
        self.blocks = nn.ModuleList(layer() for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, characters)

    def forward(self, text: Tensor) -> Tensor:
        x = self.tokens(text) + self.positions
        future = torch.ones(CONTEXT, CONTEXT, dtype=torch.bool, device=text.device).triu(1)
        for block in self.blocks:
            x = block(x, src_mask=future)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def train(name: str, flags: Flags, text: Tensor, characters: int, world: World) -> list[dict[str, Any]]:
    torch.manual_seed(flags.seed)
    model = Transformer(characters).to(world.device)
    adamw = partial(torch.optim.AdamW, lr=flags.adamw_lr)
    optimizer: torch.optim.Optimizer = adamw(model.parameters())
    if name == "muon":
        optimizer = Muon.for_model(model, flags.lr, others=adamw, process_group=world.mesh["dp"])
        if world.rank == 0:
            print(optimizer)
    schedule = lr_scheduler(optimizer, "linear", flags.steps)
    replica = DistributedDataParallel(model) if world.world_size > 1 else model
    windows = torch.Generator().manual_seed(flags.seed)
    mine = slice(world.rank, None, world.world_size)
    losses, seconds, begin = [], [], time.perf_counter()
    for _ in range(flags.steps):
        starts = torch.randint(len(text) - CONTEXT, (flags.batch_size, 1), generator=windows)[mine]
        window = text[(starts + torch.arange(CONTEXT + 1)).to(world.device)]
        logits = replica(window[:, :-1])
        loss = cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        seconds.append(time.perf_counter() - begin)
    mean = (world.sum(torch.stack(losses)) / world.world_size).tolist()
    pairs = zip(mean, seconds, strict=True)
    return [{"optimizer": name, "step": i, "loss": x, "seconds": s} for i, (x, s) in enumerate(pairs, 1)]


def main(flags: Flags) -> None:
    with join_world(flags.device) as world:
        if flags.batch_size % world.world_size:
            raise ConfigError(f"--batch-size is {flags.batch_size}, expected a multiple of the ranks")
        console.check_outputs(world, folders=[flags.plots, flags.log_dir], files=[flags.metrics])
        written = "".join(path.read_text() for path in sorted(DOCS.glob("*.md")))
        alphabet = sorted(set(written))
        text = torch.tensor([alphabet.index(character) for character in written], device=world.device)
        runs = [train(name, flags, text, len(alphabet), world) for name in ("muon", "adamw")]
        if world.rank > 0:
            return
        rows = [*runs[0], *runs[1]]
        for run in runs:
            print("{optimizer}: loss {loss:.3f} after {step} steps, {seconds:.1f} s".format(**run[-1]))
            console.write_log(flags.log_dir, run[0]["optimizer"], run)
        console.write_metrics(flags.metrics, rows)
        if flags.plots:
            from support import plots

            few = [row for row in rows if row["step"] % max(flags.steps // 30, 1) == 0]
            panels = [plots.Panel(few, x, ["loss"], ["optimizer"]) for x in ("step", "seconds")]
            plots.save_panels(flags.plots / "transformer.png", panels)


if __name__ == "__main__":
    cli.main(main, Flags)
