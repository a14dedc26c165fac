# SPDX-License-Identifier: MIT
"""MNIST: its folder, and its digits as most scripts read them."""

from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from torchpar.data import Samples

DATA = Path(__file__).parents[1] / "examples" / "data"


class Digits(Dataset[tuple[Tensor, int]]):
    """Each digit as `torchvision.datasets.MNIST` returns it, through an image and ``ToTensor``."""

    def __init__(self, samples: Samples):
        from torchvision.transforms import ToTensor

        self.transform = ToTensor()
        self.images, self.labels = samples.features, samples.labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.images[index].numpy())), int(self.labels[index])
