# SPDX-License-Identifier: MIT
"""Samples on a device, and the batches of each rank and epoch."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchpar.data.files import Dataset, read
from torchpar.errors import ConfigError, check_whole

_READ_CHUNK = 256  # samples; as float32 they fit in a core's cache
# Images; each chunk reuses the memory of the chunk before, which saves page faults.
_POOL_CHUNK = 1000
# Set by a profiler: called before a batch is yielded, with the time at which its making began.
watch: Callable[[float], None] | None = None


@dataclass(frozen=True)
class Samples:
    """Features and labels on one device.

    Attributes:
        features: ``(n, …)``; uint8 for pixels of 0 to 255, or floating.
        labels: ``(n)`` int64.
        classes: the name of each label.

    Raises:
        ConfigError: numbers of features and labels that differ, labels of another dtype or of
            several dimensions, or labels that are no number of a class.
    """

    features: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.features) != len(self.labels):
            raise ConfigError(
                f"{len(self.features)} features and {len(self.labels)} labels, expected as many"
            )
        if self.labels.dim() != 1:
            raise ConfigError(
                f"the labels have shape {tuple(self.labels.shape)}, expected one dimension"
            )
        if self.labels.dtype != torch.int64:
            raise ConfigError(
                f"the labels are {self.labels.dtype}, expected torch.int64, numbers of classes"
            )
        if len(self.labels):
            # PyTorch's losses leave out samples of some negative labels, and fail at larger labels
            # with a traceback.
            least, most = (int(label) for label in self.labels.aminmax())
            if least < 0 or most >= len(self.classes):
                wrong = least if least < 0 else most
                known = f"0 to {len(self.classes) - 1}, numbers of classes"
                raise ConfigError(
                    f"a label is {wrong}, expected {known}; mend the labels, or name all classes"
                )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: slice) -> "Samples":
        return Samples(self.features[index], self.labels[index], self.classes)

    def to(self, device: torch.device | str) -> "Samples":
        """Return the samples on ``device``."""
        return Samples(self.features.to(device), self.labels.to(device), self.classes)

    def inputs(self, index: Tensor | slice) -> Tensor:
        """Return the features at ``index`` as a network's input ``(b, features)``.

        uint8 pixels become float32 in [0, 1]; floating features are returned as they are.
        """
        features = self.features.flatten(1)
        # Indexing by a tensor takes longer than index_select.
        chosen = features[index] if isinstance(index, slice) else features.index_select(0, index)
        return chosen / _divisor(255, chosen) if chosen.dtype == torch.uint8 else chosen

    def pooled(
        self,
        crop: int = 0,
        pool: int = 1,
        *,
        shift: tuple[int, int] = (0, 0),
        dtype: torch.dtype = torch.float32,
    ) -> "Samples":
        """Return the images cropped, with each square of ``pool`` × ``pool`` pixels averaged.

        Images ``(n, h, w)`` of uint8 become ``(n, (h − 2·crop) // pool, (w − 2·crop) // pool)`` in
        [0, 1]. Pixels at the bottom and at the right that fill no square are left out.

        Args:
            crop: pixels to leave out on each side.
            shift: pixels, down and to the right, by which the part that is kept moves.
            dtype: the floating dtype of the new images.

        Raises:
            ConfigError: features that are no images; a ``pool`` below 1 or a ``crop`` below 0;
                nothing is left of the images; a ``shift`` of more than ``crop``.
        """
        images, (down, right) = self.features, shift
        if images.dim() != 3:
            raise ConfigError(
                f"the features have shape {tuple(images.shape)}, expected images (n, h, w)"
            )
        if pool < 1 or crop < 0:
            raise ConfigError(f"crop is {crop} and pool {pool}, expected at least 0 and 1")
        height, width = ((side - 2 * crop) // pool for side in images.shape[1:])
        if height < 1 or width < 1:
            raise ConfigError(
                f"crop {crop} and pool {pool} leave nothing of images of "
                f"{images.shape[1]} × {images.shape[2]}; take smaller ones"
            )
        if max(abs(down), abs(right)) > crop:
            raise ConfigError(f"shift is {shift}, expected at most {crop}, as crop is")
        kept = images[:, crop + down :, crop + right :][:, : height * pool, : width * pool]
        pooled = torch.empty(len(self), height, width, dtype=dtype, device=images.device)
        at_once = max(len(self), 1) if images.is_cuda else _POOL_CHUNK
        for chunk, out in zip(kept.split(at_once), pooled.split(at_once), strict=True):
            x = chunk.float()  # adding strided slices takes a third of the time of `avg_pool2d`
            x = sum((x[:, i::pool] for i in range(1, pool)), x[:, ::pool])
            x = sum((x[:, :, i::pool] for i in range(1, pool)), x[:, :, ::pool])
            out.copy_(x.div_(_divisor(255 * pool * pool, x)))
        return Samples(pooled, self.labels, self.classes)


def _divisor(value: int, t: Tensor) -> int | Tensor:
    """``value`` as a divisor of ``t``: a number, or a tensor on a GPU.

    On a GPU, PyTorch divides by a number by multiplying by its reciprocal.
    """
    return t.new_full((), value, dtype=torch.float32) if t.is_cuda else value


class Batch(NamedTuple):
    """One rank's share of a global batch.

    Attributes:
        x: inputs ``(b, features)``, floating.
        labels: ``(b)`` int64.
        global_size: samples of the global batch, over all ranks.
    """

    x: Tensor
    labels: Tensor
    global_size: int


def batches(
    samples: Samples,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    share: Callable[[Tensor], Tensor] | None = None,
    start: int = 0,
) -> Iterator[Batch]:
    """Yield this rank's share of each global batch of one epoch.

    The order of the samples depends on ``(seed, epoch)`` alone. The ranks' shares are disjoint and
    make up the batch that one process would see; their sizes differ by at most 1. The last batch is
    the remainder, and some ranks' share of it may be empty.

    Args:
        batch_size: samples of the global batch, over all ranks.
        share: returns this rank's share of a batch's indices, such as `World.share`; by default
            all. A loop in a `torchpar.training.Run` takes `run.batches`, which gives each rank its
            share.
        start: number of the first batch, to continue within an epoch; with the number of batches
            none remain.

    Raises:
        ConfigError: a ``batch_size`` that is no whole number from 1 on, or a ``start`` that is none
            from 0 to the number of batches.
    """
    batch_size = check_whole("batch_size", batch_size)
    start = check_whole("start", start, least=0)
    count = -(-len(samples) // batch_size)
    if start > count:
        raise ConfigError(
            f"start is {start}, expected at most {count}, the batches of an epoch of "
            f"{len(samples)} samples; give the batch_size of the epoch that is continued"
        )
    return _batches(samples, min(batch_size, max(len(samples), 1)), seed, epoch, share, start)


def _batches(
    samples: Samples,
    batch_size: int,
    seed: int,
    epoch: int,
    share: Callable[[Tensor], Tensor] | None,
    start: int,
) -> Iterator[Batch]:
    began = time.perf_counter()
    # The order is drawn on the CPU, so that it is the same on every device.
    (state,) = np.random.SeedSequence((seed, epoch)).generate_state(1)
    generator = torch.Generator().manual_seed(int(state))
    order = torch.randperm(len(samples), generator=generator, device="cpu")
    order = order.to(samples.labels.device)
    # Several small batches are read together, which takes fewer calls.
    at_once = max(_READ_CHUNK // batch_size, 1) * batch_size
    skipped = start * batch_size
    for first in range(skipped // at_once * at_once, len(order), at_once):
        global_batches = order[first : first + at_once].split(batch_size)
        shares = [share(batch) for batch in global_batches] if share else global_batches
        indices, sizes = torch.cat(shares), [len(one) for one in shares]
        x, labels = samples.inputs(indices), samples.labels.index_select(0, indices)
        rank_batches = map(Batch, x.split(sizes), labels.split(sizes), map(len, global_batches))
        # Keep the batch's offset in memory: alignment can change low bits, and a resumed run must
        # match.
        for batch in islice(rank_batches, max(skipped - first, 0) // batch_size, None):
            if watch is not None:
                watch(began)
            yield batch
            began = time.perf_counter()


def load(
    dataset: Dataset, root: str | PathLike[str], device: torch.device | str = "cpu"
) -> tuple[Samples, Samples]:
    """Return the training and test samples of a data set.

    Args:
        dataset: "mnist", "fashion-mnist" or "kmnist".
        root: the folder that torchvision calls root. The archives lie in ``root/MNIST/raw`` and so
            on, or the files that torchvision has extracted from them. Nothing is written there.
        device: where to put the samples.

    Raises:
        ConfigError: a file is missing or damaged, or ``root`` is no path.
    """
    train, test = (
        Samples(
            torch.from_numpy(images.features), torch.from_numpy(images.labels), images.classes
        ).to(device)
        for images in read(dataset, root)
    )
    return train, test
