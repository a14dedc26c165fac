# SPDX-License-Identifier: MIT
"""Files of MNIST and its relatives, read into NumPy arrays.

`torchpar.data` makes tensors of them. The format is IDX: two zero bytes, the code of the dtype (8 is uint8),
the number of dimensions, each dimension as a big-endian int32, and the elements.
"""

import gzip
import zlib
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from torchpar.errors import ConfigError

Array = NDArray[Any]
Dataset = Literal["mnist", "fashion-mnist", "kmnist"]

FOLDERS: dict[Dataset, str] = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}
CLASSES: dict[Dataset, tuple[str, ...]] = {  # torchvision's names
    "mnist": (
        *("0 - zero", "1 - one", "2 - two", "3 - three", "4 - four"),
        *("5 - five", "6 - six", "7 - seven", "8 - eight", "9 - nine"),
    ),
    "fashion-mnist": (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    "kmnist": ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
}


class Images(NamedTuple):
    """Images and their labels.

    Attributes:
        features: ``(n, 28, 28)`` uint8, pixels of 0 to 255.
        labels: ``(n)`` int64.
        classes: the name of each label.
    """

    features: Array
    labels: Array
    classes: tuple[str, ...]

    def inputs(self) -> Array:
        """Return the images as a network's input ``(n, 784)``, float32 in [0, 1]."""
        x: Array = self.features.reshape(len(self.labels), -1) / np.float32(255)
        return x


def read(dataset: Dataset, root: Path) -> tuple[Images, Images]:
    """Return the training and test images of a data set. Arguments are those of `torchpar.data.load`.

    Raises:
        ConfigError: a file is missing or damaged.
    """
    if dataset not in FOLDERS:
        raise ConfigError(f"dataset is {dataset!r}, expected one of {sorted(FOLDERS)}")
    folder = FOLDERS[dataset]
    try:
        train, test = (
            Images(
                read_idx(root / folder / "raw" / f"{prefix}-images-idx3-ubyte"),
                read_idx(root / folder / "raw" / f"{prefix}-labels-idx1-ubyte").astype(np.int64),
                CLASSES[dataset],
            )
            for prefix in ("train", "t10k")
        )
    except ValueError as e:
        fetch = f"from torchvision.datasets import {folder} as D; D({str(root)!r}, download=True)"
        raise ConfigError(
            f"{e}; name the folder that holds {folder}/raw, or remove what is damaged there and "
            f'download it: python -c "{fetch}"'
        ) from e
    return train, test


def read_idx(file: Path) -> Array:
    """Return the array of uint8 in ``file``, from its archive ``file.gz`` if there is one.

    Raises:
        ValueError: it is missing or damaged.
    """
    archive = file.with_name(f"{file.name}.gz")
    path = archive if archive.exists() or not file.exists() else file
    try:
        content = path.read_bytes()
        if path == archive:
            content = gzip.decompress(content)
        if content[:3] != b"\0\0\x08":
            raise ValueError("it does not begin as a file of uint8 in IDX format")
        shape = np.frombuffer(content, ">i4", content[3], 4)
        pixels = np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape))
        return pixels.reshape(shape).copy()
    except FileNotFoundError as e:
        raise ValueError(f"{path} is missing") from e
    except (OSError, EOFError, zlib.error, ValueError) as e:
        raise ValueError(f"{path} cannot be read ({e})") from e
