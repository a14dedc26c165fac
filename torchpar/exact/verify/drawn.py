# SPDX-License-Identifier: MIT
"""Pictures and a text that are drawn, so that every machine has them without files.

Only integers are drawn: PyTorch's generator on a CPU gives the same integers on every processor.
"""

import torch
from torch import Tensor

from torchpar.data import Samples

CLASSES, SIDE = 10, 28  # classes of the pictures; pixels of a side
CHARACTERS, FOLLOWERS = 40, 4  # characters of the text; characters that may follow a character


def draw_pictures(n: int, seed: int = 0) -> Samples:
    """Draw ``n`` pictures of ten classes. A pixel is the class's pixel or noise, at even odds."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (n,), generator=generator, device="cpu")
    of_classes = torch.randint(256, (CLASSES, SIDE, SIDE), generator=generator, device="cpu")
    noise = torch.randint(256, (n, SIDE, SIDE), generator=generator, device="cpu")
    is_noise = torch.randint(2, (n, SIDE, SIDE), generator=generator, device="cpu") == 1
    pixels = torch.where(is_noise, noise, of_classes[labels]).to(torch.uint8)
    return Samples(pixels, labels, tuple(map(str, range(CLASSES))))


def draw_text(n: int, seed: int = 0) -> Tensor:
    """Draw ``n`` characters, as their numbers: each is one of four that may follow the last."""
    generator = torch.Generator().manual_seed(seed)
    followers = torch.randint(
        CHARACTERS, (CHARACTERS, FOLLOWERS), generator=generator, device="cpu"
    ).tolist()
    text, character = [], 0
    for choice in torch.randint(FOLLOWERS, (n,), generator=generator, device="cpu").tolist():
        character = followers[character][choice]
        text.append(character)
    return torch.tensor(text, device="cpu")
