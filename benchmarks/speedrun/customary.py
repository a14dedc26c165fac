# SPDX-License-Identifier: MIT
"""The script that most tutorials teach: a DataLoader with transforms, layers of torch.nn, and Adam."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from benchmarks.digits import Digits
from torchpar.data import Samples
from torchpar.errors import ConfigError
from torchpar.parallel.launch.world import World


@dataclass
class CustomaryScript:
    """An `benchmarks.speedrun.recipe.Entry` that is its own trainer, on the CPU."""

    epochs: int
    name: str = "customary"
    change: str = "DataLoader, ToTensor, torch.nn, Adam"

    def prepare(self, samples: Samples, world: World) -> "CustomaryScript":
        if world.world_size > 1:
            raise ConfigError("the customary script is one process; take --ranks 1")
        self.digits = Digits(samples.to("cpu"))
        return self

    def train(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(784, 512), torch.nn.ReLU(), torch.nn.Linear(512, 10)
        )
        optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        loader = DataLoader(self.digits, batch_size=128, shuffle=True)
        for _ in range(self.epochs):
            for images, labels in loader:
                optimizer.zero_grad()
                cross_entropy(self.model(images), labels).backward()
                optimizer.step()

    def outputs(self, samples: Samples) -> Tensor:
        return self.model(samples.features.cpu() / 255)  # type: ignore[no-any-return]
