# SPDX-License-Identifier: MIT
"""Data sets: read from archives known by their content, and shared by ranks in batches."""

import gzip
import math
import shutil
import struct
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from fake_data import fashion_mnist

from torchpar import data
from torchpar.data import files as datasets
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
    return data.Samples(images, torch.arange(n), tuple(map(str, range(n))))


def test_labels_that_do_not_fit_are_refused():
    for labels, message in (
        (torch.arange(2), "3 features and 2 labels"),
        (torch.ones(3), "torch.float32"),
        (torch.zeros(3, 1).long(), r"labels have shape \(3, 1\), expected one dimension"),
    ):
        with pytest.raises(ConfigError, match=message):
            data.Samples(torch.zeros(3, 2), labels, ("a",))
    for wrong in (3, -1, -100, 2**62):
        with pytest.raises(
            ConfigError, match=rf"a label is {wrong}, expected 0 to 2, numbers of classes; mend"
        ):
            data.Samples(torch.zeros(3, 2), torch.tensor([0, wrong, 2]), ("a", "b", "c"))
    data.Samples(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), ())


def test_batch_sizes_that_are_refused():
    """Before the first batch is drawn. One larger than all samples takes all."""
    for size in (0, -1, 2.5, float("nan"), "7"):
        with pytest.raises(
            ConfigError, match=rf"batch_size is {size!r}, expected a whole number from 1 on"
        ):
            data.batches(samples_of(5), size, seed=0, epoch=1)
    with pytest.raises(ConfigError, match="start is -1, expected a whole number from 0 on"):
        data.batches(samples_of(5), 2, seed=0, epoch=1, start=-1)
    with pytest.raises(
        ConfigError, match="start is 4, expected at most 3, the batches of an epoch of 5 samples"
    ):
        data.batches(samples_of(5), 2, seed=0, epoch=1, start=4)
    assert not list(data.batches(samples_of(5), 2, seed=0, epoch=1, start=3))
    (batch,) = data.batches(samples_of(5), 2**63, seed=0, epoch=1)
    assert batch.global_size == 5
    assert not list(data.batches(samples_of(0), 3, seed=0, epoch=1))
    for features, crop, pool, message in (
        (torch.zeros(4, 2), 0, 1, r"the features have shape \(4, 2\), expected images \(n, h, w\)"),
        (torch.zeros(4, 2, 2), 0, 0, "crop is 0 and pool 0, expected at least 0 and 1"),
        (torch.zeros(4, 2, 2), -1, 1, "crop is -1 and pool 1, expected at least 0 and 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            data.Samples(features, torch.zeros(4, dtype=torch.int64), ("a",)).pooled(crop, pool)


@pytest.mark.parametrize("batch_size", [1, 7, 256, 257, 1000, 2000])
def test_ranks_share_the_batches_of_one_order(batch_size):
    """From any batch on; the last batch is the remainder, and some ranks' share of it may be
    empty."""
    samples = samples_of(1030)
    (whole,) = data.batches(samples, 1030, seed=5, epoch=2)
    order = whole.labels
    assert order.sort().values.tolist() == list(range(1030))
    count = len(order.split(batch_size))
    for world_size, first in ((1, 0), (1, 3), (2, 0), (4, 0), (4, 1)):
        start = min(first, count)
        expected = order.split(batch_size)[start:]
        for rank in range(world_size):
            share = partial(World.share, SimpleNamespace(dp_size=world_size, dp_rank=rank))
            batches = partial(data.batches, samples, batch_size, seed=5, epoch=2, share=share)
            found, uncut = list(batches(start=start)), list(batches())[start:]
            # Products of a resumed run have the same bits where its batches lie at the same
            # addresses.
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
    """uint8 features become float32 in [0, 1]; others are returned as they are, whatever their
    range."""
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
def test_a_damaged_file_is_named_with_the_repair_and_nothing_is_written(
    tmp_path, name, change, message
):
    raw = fashion_mnist(tmp_path) / "FashionMNIST" / "raw"
    (raw / name).write_bytes(change((raw / LABELS).read_bytes()))
    before = {path: path.stat().st_mtime_ns for path in (raw, *raw.iterdir())}
    repair = "name the folder .* download it: python -c .*download=True"
    # One line.
    with pytest.raises(ConfigError, match=rf"^.*/{name} cannot be read {message}; {repair}.*$"):
        data.load("fashion-mnist", tmp_path)
    assert {path: path.stat().st_mtime_ns for path in (raw, *raw.iterdir())} == before


@pytest.mark.parametrize(
    "package, advice", [(object(), ""), (None, ", after pip install torchvision")]
)
def test_where_there_are_no_files_none_is_called_damaged(tmp_path, package, advice):
    holder = "name the folder that holds MNIST/raw"
    with (
        patch.object(datasets, "find_spec", lambda name: package),
        pytest.raises(ConfigError, match=f"is missing; {holder}, or download it{advice}: python"),
    ):
        data.load("mnist", tmp_path)


def test_the_root_is_a_string_or_a_path(tmp_path) -> None:
    fashion_mnist(tmp_path)
    (train, test), (also_train, _) = (
        data.load("fashion-mnist", r) for r in (str(tmp_path), tmp_path)
    )
    assert torch.equal(train.features, also_train.features)
    assert len(train) > 0 < len(test)
    for root in (None, 3, b"folder"):
        with pytest.raises(ConfigError, match=r"^root is .*, expected a path, that of the folder"):
            data.load("fashion-mnist", root)


IMAGES = "t10k-images-idx3-ubyte"


def idx(*shape: int, content: bytes | None = None) -> bytes:
    sizes = b"".join(struct.pack(">i", size) for size in shape)
    return (
        bytes([0, 0, 8, len(shape)])
        + sizes
        + (bytes(math.prod(shape)) if content is None else content)
    )


@pytest.mark.parametrize(
    "name, content, message",
    [
        (LABELS, idx(10, content=bytes([*range(9), 10])), "has a label 10, expected 0 to 9"),
        (LABELS, b"\0\0\x08", "it does not begin as a file of uint8"),
        (LABELS, b"", "it does not begin as a file of uint8"),
        (LABELS, idx(9), "9 labels, expected as many, and at least one"),
        (LABELS, idx(10, 28, 28), r"holds an array of \(10, 28, 28\), expected labels \(n\)"),
        (LABELS, idx(-1, content=bytes(10)), r"its dimensions are \[-1\], expected at least 0"),
        (LABELS, idx(2**31 - 1, content=b""), "cannot be read"),
        (IMAGES, idx(10), r"holds an array of \(10,\), expected images \(n, 28, 28\)"),
        (
            IMAGES,
            idx(10, 20, 20),
            r"holds an array of \(10, 20, 20\), expected images \(n, 28, 28\)",
        ),
        (IMAGES, idx(10, 28, 28)[:-1], "cannot be read"),
        (IMAGES, idx(0, 28, 28), "holds 0 images and .* 10 labels"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_that_do_not_fit_are_named_in_one_line(tmp_path, name, content, message):
    raw = fashion_mnist(tmp_path) / "FashionMNIST" / "raw"
    (raw / name).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"^[^\n]*{name} .*{message}.* download it: [^\n]*$"):
        data.load("fashion-mnist", tmp_path)


@pytest.mark.parametrize(
    "name, content, message",
    [
        (LABELS, idx(9), "holds 10 images and t10k-labels-idx1-ubyte.gz 9 labels, "),
        (LABELS, idx(10, content=bytes([10] * 10)), "labels-idx1-ubyte.gz has a label 10, "),
        (IMAGES, idx(10), "images-idx3-ubyte.gz holds an array of "),
    ],
)
def test_an_archive_that_does_not_fit_is_named_as_it_is(tmp_path, name, content, message):
    raw = fashion_mnist(tmp_path) / "FashionMNIST" / "raw"
    (raw / f"{name}.gz").write_bytes(gzip.compress(content))
    with pytest.raises(ConfigError, match=f"{message}.* or remove the damaged files and download"):
        data.load("fashion-mnist", tmp_path)


@pytest.mark.parametrize("left", [0, 3])
def test_a_folder_that_lacks_files_is_not_told_to_remove_damaged_ones(tmp_path, left):
    for path in sorted((fashion_mnist(tmp_path) / "FashionMNIST" / "raw").iterdir())[left:]:
        path.unlink()
    with pytest.raises(ConfigError, match=r"ubyte.gz is missing; .*/raw, or download it: "):
        data.load("fashion-mnist", tmp_path)


def test_images_and_labels_that_are_swapped_are_refused(tmp_path):
    raw = fashion_mnist(tmp_path) / "FashionMNIST" / "raw"
    (raw / LABELS).rename(raw / "other")
    (raw / IMAGES).rename(raw / LABELS)
    (raw / "other").rename(raw / IMAGES)
    with pytest.raises(ConfigError, match=r"holds an array of \(10,\), expected images"):
        data.load("fashion-mnist", tmp_path)


# Images of fewer pixels


@pytest.mark.parametrize(
    "n, crop, pool", [(1001, 3, 2), (0, 0, 1), (1, 1, 26), (7, 2, 3), (7, 5, 7)]
)
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
