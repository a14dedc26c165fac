# SPDX-License-Identifier: MIT
"""Files of MNIST and its relatives, read into NumPy arrays.

`torchpar.data` makes tensors of them. The format is IDX: two zero bytes, the code of the dtype (8
is uint8), the number of dimensions, each dimension as a big-endian int32, and the elements.
"""

import gzip
import zlib
from collections.abc import Sequence
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from torchpar.errors import ConfigError

Array = NDArray[Any]
Dataset = Literal["mnist", "fashion-mnist", "kmnist"]

FOLDERS: dict[Dataset, str] = {
    "mnist": "MNIST",
    "fashion-mnist": "FashionMNIST",
    "kmnist": "KMNIST",
}
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

SIDE = 28  # pixels of an image


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


def read(dataset: Dataset, root: str | PathLike[str]) -> tuple[Images, Images]:
    """Return the training and test images of a data set, by the arguments of `torchpar.data.load`.

    Raises:
        ConfigError: a file is missing or damaged, or ``root`` is no path.
    """
    if not isinstance(root, str | PathLike):
        raise ConfigError(
            f"root is {root!r}, expected a path, that of the folder that holds the data sets"
        )
    if dataset not in FOLDERS:
        raise ConfigError(f"dataset is {dataset!r}, expected one of {sorted(FOLDERS)}")
    folder = FOLDERS[dataset]
    try:
        train, test = (
            _read_pair(Path(root) / folder / "raw", prefix, CLASSES[dataset])
            for prefix in ("train", "t10k")
        )
    except ValueError as e:
        fetch = f"from torchvision.datasets import {folder} as D; D({str(root)!r}, download=True)"
        is_missing = isinstance(e.__cause__, FileNotFoundError)
        remove = "" if is_missing else "remove the damaged files and "
        install = "" if find_spec("torchvision") else ", after pip install torchvision"
        raise ConfigError(
            f"{e}; name the folder that holds {folder}/raw, or {remove}download "
            f'it{install}: python -c "{fetch}"'
        ) from e
    return train, test


def _read_pair(raw: Path, prefix: str, classes: tuple[str, ...]) -> Images:
    """Return the images and labels of files that begin with ``prefix``.

    Raises:
        ValueError: a file is missing or damaged, or images and labels do not fit each other.
    """
    of_images, of_labels = (
        _file_or_archive(raw / f"{prefix}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1")
    )
    features, labels = read_idx(of_images), read_idx(of_labels).astype(np.int64)
    if features.ndim != 3 or features.shape[1:] != (SIDE, SIDE):
        raise ValueError(
            f"{of_images} holds an array of {features.shape}, expected images (n, {SIDE}, {SIDE})"
        )
    if labels.ndim != 1:
        raise ValueError(f"{of_labels} holds an array of {labels.shape}, expected labels (n)")
    if not 0 < len(features) == len(labels):
        raise ValueError(
            f"{of_images} holds {len(features)} images and {of_labels.name} {len(labels)} labels, "
            "expected as many, and at least one"
        )
    if labels.max() >= len(classes):
        raise ValueError(
            f"{of_labels} has a label {labels.max()}, expected 0 to {len(classes) - 1}"
        )
    return Images(features, labels, classes)


def checksums(splits: Sequence[tuple[Array, Array]]) -> dict[str, int]:
    """Return the CRC-32 of the inputs and of the labels of training and test samples, by name."""
    return {
        f"the checksum of the {kind} {what}": zlib.crc32(np.ascontiguousarray(array).data)
        for kind, arrays in zip(("training", "test"), splits, strict=True)
        for what, array in zip(("images", "labels"), arrays, strict=True)
    }


def _file_or_archive(file: Path) -> Path:
    """Return ``file``, or its archive ``file.gz`` if there is one, or if both are missing."""
    archive = file.with_name(f"{file.name}.gz")
    return archive if archive.exists() or not file.exists() else file


def read_idx(path: Path) -> Array:
    """Return the array of uint8 in a file, which may be an archive ``.gz``.

    Raises:
        ValueError: the file is missing or damaged.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        if content[:3] != b"\0\0\x08" or len(content) < 4:
            raise ValueError("it does not begin as a file of uint8 in IDX format")
        shape = np.frombuffer(content, ">i4", content[3], 4)
        if (shape < 0).any():
            raise ValueError(f"its dimensions are {shape.tolist()}, expected at least 0")
        pixels = np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape))
        return pixels.reshape(shape).copy()
    except FileNotFoundError as e:
        raise ValueError(f"{path} is missing") from e
    except (OSError, EOFError, zlib.error, ValueError) as e:
        raise ValueError(f"{path} cannot be read ({e})") from e
