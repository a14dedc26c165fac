# SPDX-License-Identifier: MIT
"""Data sets: read from archives known by their content, and shared by ranks in batches."""

import gzip
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_data import fashion_mnist

from torchpar import data, datasets
from torchpar.errors import ConfigError
from torchpar.parallel import World

DATA = Path(__file__).parent.parent / "examples" / "data"
LABELS = "t10k-labels-idx1-ubyte"


@pytest.fixture(scope="module")
def mnist() -> tuple[data.Samples, data.Samples]:
    return data.load("mnist", DATA)


# Batches


def samples_of(n: int) -> data.Samples:
    """Random images, whose labels are their indices."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (n, 2, 3), generator=generator, dtype=torch.uint8)
    return data.Samples(images, torch.arange(n), ("a",))


def test_labels_that_do_not_fit_are_refused():
    for labels, message in ((torch.arange(2), "3 features and 2 labels"), (torch.ones(3), "torch.float32")):
        with pytest.raises(ConfigError, match=message):
            data.Samples(torch.zeros(3, 2), labels, ("a",))


@pytest.mark.parametrize("batch_size", [1, 7, 256, 257, 1000, 2000])
def test_ranks_share_the_batches_of_one_order(batch_size):
    """From any batch on; the last batch is the remainder, and some ranks' share of it may be empty."""
    samples = samples_of(1030)
    (whole,) = data.batches(samples, 1030, seed=5, epoch=2)
    order = whole.labels
    assert order.sort().values.tolist() == list(range(1030))
    for world_size, start in ((1, 0), (1, 3), (2, 0), (4, 0), (4, 1)):
        expected = order.split(batch_size)[start:]
        for rank in range(world_size):
            share = partial(World.share, SimpleNamespace(dp_size=world_size, dp_rank=rank))
            batches = partial(data.batches, samples, batch_size, seed=5, epoch=2, share=share)
            found, uncut = list(batches(start=start)), list(batches())[start:]
            # Products of a resumed run have the same bits where its batches lie at the same addresses.
            assert [b.x.storage_offset() for b in found] == [b.x.storage_offset() for b in uncut]
            for batch, indices in zip(found, expected, strict=True):
                mine = indices.tensor_split(world_size)[rank]
                assert torch.equal(batch.labels, mine)
                assert torch.equal(batch.x, samples.features[mine].flatten(1) / 255)
                assert batch.global_size == len(indices)


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        torch.rand(epoch)  # other draws leave the order as it is
        (batch,) = data.batches(samples_of(50), 50, seed=seed, epoch=epoch)
        return tuple(batch.labels.tolist())

    keys = [(0, 1), (0, 2), (1, 1), (1, 2), (2, 1)]
    orders = [order(*key) for key in keys]
    assert orders == [order(*key) for key in keys]
    assert len({*orders, tuple(range(50))}) == 6


def test_only_pixels_are_divided():
    """uint8 features become float32 in [0, 1]; others are returned as they are, whatever their range."""
    features = torch.tensor([[[0, 1], [255, 7]]])
    for dtype, expected in ((torch.uint8, features / 255), (torch.int64, features)):
        samples = data.Samples(features.to(dtype), torch.zeros(1, dtype=torch.int64), ("a",))
        x = samples.inputs(slice(None))
        assert x.dtype == expected.dtype
        assert torch.equal(x, expected.flatten(1))


# Files


def test_mnist_equals_torchvisions_own(mnist, tmp_path):
    pytest.importorskip("torchvision", reason="its own reader of the files is compared with")
    from torchvision.datasets import MNIST

    shutil.copytree(DATA, tmp_path / "data", ignore=shutil.ignore_patterns("*-ubyte"))
    for samples, train in zip(mnist, (True, False), strict=True):
        theirs = MNIST(tmp_path / "data", train=train, download=True)  # extracts; no network
        assert torch.equal(samples.features, theirs.data)
        assert torch.equal(samples.labels, theirs.targets)
        assert (samples.features.dtype, samples.classes) == (torch.uint8, tuple(theirs.classes))


def test_classes_are_torchvisions():
    torchvision = pytest.importorskip(
        "torchvision.datasets", reason="its names of the classes are compared with"
    )
    for name, folder in datasets.FOLDERS.items():
        assert datasets.CLASSES[name] == tuple(getattr(torchvision, folder).classes)


@pytest.mark.parametrize(
    "name, change, message",
    [
        # The archive is read, and not the file beside it.
        (f"{LABELS}.gz", lambda old: gzip.compress(old)[:-8] + bytes(8), r"\(CRC check failed.*\)"),
        (LABELS, lambda old: b"\0\0\x08\x01", r"\(buffer is smaller .*\)"),
        (LABELS, lambda old: b"P5 28 28", r"\(it does not begin .* IDX format\)"),
    ],
)
def test_a_damaged_file_is_named_with_the_repair_and_nothing_is_written(tmp_path, name, change, message):
    raw = fashion_mnist(tmp_path) / "FashionMNIST" / "raw"
    (raw / name).write_bytes(change((raw / LABELS).read_bytes()))
    before = {path: path.stat().st_mtime_ns for path in (raw, *raw.iterdir())}
    repair = "name the folder .* download it: python -c .*download=True"
    with pytest.raises(ConfigError, match=rf"^.*/{name} cannot be read {message}; {repair}.*$"):  # one line
        data.load("fashion-mnist", tmp_path)
    assert {path: path.stat().st_mtime_ns for path in (raw, *raw.iterdir())} == before


# Images of fewer pixels


@pytest.mark.parametrize("n, crop, pool", [(1001, 3, 2), (0, 0, 1), (1, 1, 26), (7, 2, 3), (7, 5, 7)])
def test_pooled_images_are_pytorchs_average_pool(mnist, n, crop, pool):
    samples = mnist[0][:n]
    pooled = samples.pooled(crop, pool)
    kept = samples.features[:, crop : 28 - crop, crop : 28 - crop].float()
    side = (28 - 2 * crop) // pool
    expected = torch.nn.functional.avg_pool2d(kept, pool) / 255 if n else torch.empty(0, side, side)
    torch.testing.assert_close(pooled.features, expected, rtol=1e-6, atol=0)
    assert pooled.labels is samples.labels
    assert pooled.inputs(slice(None)).shape == (n, side**2)


def test_pooled_images_move(mnist):
    samples = mnist[1][:50]
    for down, right in ((0, 0), (3, 0), (0, -3), (-2, 3)):
        kept = samples.features[:, 3 + down : 25 + down, 3 + right : 25 + right]
        moved = samples.pooled(3, 1, shift=(down, right), dtype=torch.bfloat16)
        assert torch.equal(moved.features, (kept.float() / 255).bfloat16())
    with pytest.raises(ConfigError, match=r"shift is \(0, -3\), expected at most 2, as crop is"):
        samples.pooled(2, shift=(0, -3))
    assert torch.equal(samples.pooled().features, samples.features.float() / 255)
    assert samples.features.dtype == torch.uint8  # still
