# SPDX-License-Identifier: MIT
"""MNIST and its relatives as tensors on the device, and their batches by rank and epoch.

torchvision's classes say which archives make up a data set, check and read them; they are imported
when one is loaded.
"""

import os
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchpar.errors import ConfigError
from torchpar.parallel.world import World

Dataset = Literal["mnist", "fashion-mnist", "kmnist"]
_CLASSES = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}


@dataclass(frozen=True)
class Samples:
    """Images and their labels on one device.

    Attributes:
        images: ``(n, 28, 28)`` uint8.
        labels: ``(n)`` int64.
        classes: the name of each label.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: slice) -> "Samples":
        return Samples(self.images[index], self.labels[index], self.classes)

    def inputs(self, index: Tensor | slice) -> Tensor:
        """The images at ``index`` as a network takes them: ``(b, 784)`` float32 in [0, 1]."""
        return self.images[index].flatten(1) / 255


class Batch(NamedTuple):
    """One rank's share of a global batch of ``global_size`` samples."""

    x: Tensor
    labels: Tensor
    global_size: int


def batches(
    samples: Samples, batch_size: int, *, seed: int, epoch: int, world: World, start: int = 0
) -> Iterator[Batch]:
    """This rank's share of each global batch of one epoch, in an order set by ``(seed, epoch)`` alone.

    The ranks' shares are disjoint and make up the batch that one process would see; their sizes differ
    by at most 1. The last batch is the remainder, and some ranks' share of it may be empty.

    Args:
        batch_size: samples of the global batch, over all ranks.
        start: the first batch's number, to go on within an epoch.
    """
    # Drawn on the CPU, so that every device sees the same order.
    (state,) = np.random.SeedSequence((seed, epoch)).generate_state(1)
    generator = torch.Generator().manual_seed(int(state))
    order = torch.randperm(len(samples), generator=generator).to(samples.labels.device)
    for chosen in order[start * batch_size :].split(batch_size):
        mine = world.share(len(chosen)).narrow(chosen, 0)
        yield Batch(samples.inputs(mine), samples.labels[mine], len(chosen))


def load(dataset: Dataset, root: Path, world: World) -> tuple[Samples, Samples]:
    """Training and test samples of a data set on the rank's device.

    The first rank of each machine checks the archives in ``root`` and extracts them; the others wait.

    Args:
        dataset: "mnist", "fashion-mnist" or "kmnist".
        root: the folder that torchvision calls root: files lie in ``root/MNIST/raw`` and so on.

    Raises:
        ConfigError: a file is missing or damaged, the folder cannot be written, or torchvision is not
            installed; on every rank.
    """
    if dataset not in _CLASSES:
        raise ConfigError(f"dataset is {dataset!r}, expected one of {sorted(_CLASSES)}")
    world.once_per_machine(lambda: _extract(_torchvision(dataset), root))
    kind = _torchvision(dataset)
    samples = []
    for train in (True, False):
        try:
            read = kind(root, train=train)
            if len(read.data) != len(read.targets) or read.targets.unique().ge(len(read.classes)).any():
                raise ValueError(f"{len(read.data)} images, {len(read.targets)} labels")
            samples.append(
                Samples(read.data.to(world.device), read.targets.to(world.device), tuple(read.classes))
            )
        except Exception as e:
            files = root / kind.__name__ / "raw" / ("train-*" if train else "t10k-*")
            raise ConfigError(f"{files} cannot be read ({e}); {_repair(kind, root)}") from e
    return samples[0], samples[1]


def _repair(kind: Any, root: Path) -> str:
    fetch = f"from torchvision.datasets import {kind.__name__} as D; D({str(root)!r}, download=True)"
    return (
        f"name the folder that holds {kind.__name__}/raw, or remove what is damaged there and fetch it: "
        f'python -c "{fetch}"'
    )


def _torchvision(dataset: Dataset) -> Any:
    try:
        import torchvision.datasets
    except ImportError as e:
        raise ConfigError(f"torchvision is needed to read data sets ({e}); pip install torchvision") from e
    return getattr(torchvision.datasets, _CLASSES[dataset])


def _extract(kind: Any, root: Path) -> None:
    """Check the archives against torchvision's MD5 sums, and the extracted files against the archives."""
    from torchvision.datasets.utils import check_integrity, extract_archive

    raw = root / kind.__name__ / "raw"
    for name, md5 in kind.resources:
        archive = raw / name
        extracted = archive.with_suffix("")
        try:
            if extracted.exists() and not archive.exists():
                continue  # torchvision reads these too; there is nothing to check them against
            if not check_integrity(str(archive), md5):
                state = "damaged" if archive.exists() else "missing"
                repair = _repair(kind, root)
                raise ConfigError(f"{archive} is {state}, expected a file of MD5 {md5}; {repair}")
            if extracted.exists() and zlib.crc32(extracted.read_bytes()) == _gzip_crc32(archive):
                continue
            # A folder of one's own, then one rename: two jobs may extract at once, or one be killed.
            with tempfile.TemporaryDirectory(dir=raw) as folder:
                extract_archive(str(archive), folder)
                os.replace(Path(folder) / extracted.name, extracted)
        except OSError as e:
            raise ConfigError(f"{archive} cannot be read and extracted in its folder: {e}") from e


def _gzip_crc32(archive: Path) -> int:
    """The CRC-32 of an archive's content, from its trailer (RFC 1952, section 2.3.1)."""
    with archive.open("rb") as file:
        file.seek(-8, os.SEEK_END)
        return int.from_bytes(file.read(4), "little")
