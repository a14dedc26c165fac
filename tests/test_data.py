# SPDX-License-Identifier: MIT
"""Data sets: read from archives known by their content, and shared by ranks in batches."""

import gzip
import shutil
import stat
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_data import fashion_mnist

pytest.importorskip("torchvision", reason="torchvision reads the data sets")

from torchpar import data
from torchpar.errors import ConfigError
from torchpar.partition import Partition

DATA = Path(__file__).parent.parent / "examples" / "data"


def numbered(n: int) -> data.Samples:
    """Samples whose labels are their indices."""
    return data.Samples(torch.zeros(n, 28, 28, dtype=torch.uint8), torch.arange(n), ("a",))


@pytest.fixture(scope="module")
def mnist() -> tuple[data.Samples, data.Samples]:
    return data.load("mnist", DATA)


def test_mnist_equals_torchvisions_own(mnist, tmp_path):
    from torchvision.datasets import MNIST

    shutil.copytree(DATA, tmp_path / "data", ignore=shutil.ignore_patterns("*-ubyte"))
    for samples, train in zip(mnist, (True, False), strict=True):
        theirs = MNIST(tmp_path / "data", train=train, download=True)  # extracts; no network
        assert torch.equal(samples.features, theirs.data)
        assert torch.equal(samples.labels, theirs.targets)
        assert samples.features.dtype == torch.uint8
        image, label = theirs[7]
        x = samples.inputs(slice(7, 8))
        assert x.dtype == torch.float32
        assert torch.equal(x.view(28, 28), torch.from_numpy(np.array(image)) / 255)
        assert samples.labels[7] == label


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("n, batch_size", [(10, 4), (12, 4), (9, 8), (3, 100), (129, 64)])
def test_ranks_share_the_batches_one_process_sees(world_size, n, batch_size):
    samples = numbered(n)
    shares = [
        list(data.batches(samples, batch_size, seed=5, epoch=2, share=share))
        for share in (partial(Partition, ranks=world_size, rank=rank) for rank in range(world_size))
    ]
    whole = list(data.batches(samples, batch_size, seed=5, epoch=2))
    joined = [torch.cat([batch.labels for batch in step]) for step in zip(*shares, strict=True)]
    for mine, batch in zip(joined, whole, strict=True):
        assert torch.equal(mine, batch.labels)
        assert batch.global_size == len(batch.labels)
    for step in zip(*shares, strict=True):
        sizes = [len(batch.labels) for batch in step]
        assert max(sizes) - min(sizes) <= 1
    assert torch.cat(joined).sort().values.tolist() == list(range(n))
    assert [len(b.labels) for b in whole] == [batch_size] * (n // batch_size) + [n % batch_size] * (
        n % batch_size > 0
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("world_size, rank", [(1, 0), (2, 1), (3, 0), (4, 3)])
@pytest.mark.parametrize("batch_size", [1, 7, 255, 256, 257, 1000])
def test_batches_read_at_once_are_those_read_one_by_one(batch_size, world_size, rank, dtype, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    features = torch.randint(256, (1030, 2, 3), generator=generator).to(dtype)
    samples = data.Samples(features, torch.arange(1030), ("a",))
    share = partial(Partition, ranks=world_size, rank=rank)

    def read(start: int) -> list[data.Batch]:
        return list(data.batches(samples, batch_size, seed=5, epoch=2, share=share, start=start))

    for start in (0, 1, 3, -(-1030 // batch_size)):
        at_once = read(start)
        with monkeypatch.context() as patch:
            patch.setattr(data, "_READ_AT_ONCE", 1)
            one_by_one = read(start)
        assert len(at_once) == max(-(-1030 // batch_size) - start, 0)
        for found, expected in zip(at_once, one_by_one, strict=True):
            assert found.global_size == expected.global_size
            for a, b in zip(found[:2], expected[:2], strict=True):
                assert (a.dtype, a.shape) == (b.dtype, b.shape)
                assert torch.equal(a, b)
            assert torch.equal(found.x, samples.inputs(found.labels))  # a sample keeps its label


@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_batches_start_within_an_epoch(start):
    whole, rest = (
        [batch.labels for batch in data.batches(numbered(129), 64, seed=0, epoch=1, start=first)]
        for first in (0, start)
    )
    assert len(rest) == 3 - start
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[start:], strict=True))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_only_pixels_are_divided(dtype):
    """uint8 features become float32 in [0, 1]; others are returned as they are, whatever their range."""
    features = torch.tensor([[[0, 1], [255, 7]]]).to(dtype)
    x = data.Samples(features, torch.zeros(1, dtype=torch.int64), ("a",)).inputs(slice(None))
    pixels = dtype == torch.uint8
    assert x.dtype == (torch.float32 if pixels else dtype)
    expected = torch.tensor([[0.0, 1.0, 255.0, 7.0]]) / (255 if pixels else 1)
    assert torch.equal(x.float(), expected)


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed: int, epoch: int) -> list[int]:
        torch.rand(epoch)  # other draws leave the order as it is
        batch = next(data.batches(numbered(50), 50, seed=seed, epoch=epoch))
        return batch.labels.tolist()

    orders = [order(0, 1), order(0, 2), order(1, 1), order(1, 2), order(2, 1)]
    assert orders == [order(0, 1), order(0, 2), order(1, 1), order(1, 2), order(2, 1)]
    assert len({tuple(o) for o in orders}) == 5


def test_fashion_mnist_reads_torchvisions_extracted_files(tmp_path):
    fashion_mnist(tmp_path / "FashionMNIST" / "raw")
    train, test = data.load("fashion-mnist", tmp_path)
    assert (len(train), len(test)) == (20, 10)
    assert train.classes[9] == "Ankle boot"


@pytest.fixture
def archives(tmp_path) -> Path:
    """A copy of MNIST's archives that a test may change."""
    shutil.copytree(DATA, tmp_path / "data", ignore=shutil.ignore_patterns("*-ubyte"))
    return tmp_path / "data"


def listing(root: Path) -> dict[str, tuple[int, int]]:
    """The size and the time of every file and folder below ``root``."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in (root, *root.rglob("*"))}


def same(a: tuple[data.Samples, ...], b: tuple[data.Samples, ...]) -> bool:
    return all(
        torch.equal(x.features, y.features) and torch.equal(x.labels, y.labels)
        for x, y in zip(a, b, strict=True)
    )


def test_a_damaged_archive_is_named_with_the_repair(archives):
    archive = archives / "MNIST" / "raw" / "t10k-labels-idx1-ubyte.gz"
    content = bytearray(archive.read_bytes())
    content[100] ^= 1
    archive.write_bytes(content)
    with pytest.raises(ConfigError, match=r"t10k-labels-idx1-ubyte\.gz is damaged \(") as caught:
        data.load("mnist", archives)
    assert "remove what is damaged there and fetch it: python -c" in str(caught.value)
    assert "download=True" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_of_packed_content_is_refused_by_name(archives):
    """The archive itself is whole; its CRC is that of the changed content."""
    archive = archives / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz"
    content = bytearray(gzip.decompress(archive.read_bytes()))
    content[5000] ^= 1
    archive.write_bytes(gzip.compress(content, 1))
    with pytest.raises(
        ConfigError, match=r"t10k-images-idx3-ubyte\.gz is damaged: its content has MD5"
    ) as caught:
        data.load("mnist", archives)
    assert "expected 2646ac647ad5339dbf082846283269ea" in str(caught.value)


def test_archives_packed_anew_are_accepted(archives, mnist):
    """With another level, name and time in the header, as Debian packs them."""
    for archive in (archives / "MNIST" / "raw").glob("*.gz"):
        packed, content = archive.read_bytes(), gzip.decompress(archive.read_bytes())
        with archive.open("wb") as file, gzip.GzipFile("other", "wb", 1, file, mtime=1) as anew:
            anew.write(content)
        assert archive.read_bytes() != packed
    assert same(data.load("mnist", archives), mnist)


def test_missing_archive_and_missing_folder(archives):
    (archives / "MNIST" / "raw" / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(ConfigError, match=r"train-images-idx3-ubyte\.gz is missing; name the folder"):
        data.load("mnist", archives)
    with pytest.raises(ConfigError, match=r"nowhere/KMNIST/raw/.* is missing"):
        data.load("kmnist", archives / "nowhere")
    with pytest.raises(ConfigError, match="dataset is 'cifar', expected one of"):
        data.load("cifar", archives)  # type: ignore[arg-type]


@pytest.mark.parametrize("damage", ["truncate", "flip", "absent"])
def test_the_archive_counts_and_nothing_is_written(archives, damage, mnist, tmp_path):
    """A file extracted beside it may be damaged or absent, and the folder read-only."""
    extracted = archives / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    if damage != "absent":
        content = bytearray(gzip.decompress(extracted.with_suffix(".gz").read_bytes()))
        content[5000] ^= 1
        extracted.write_bytes(content[:5001] if damage == "truncate" else content)
    folders = [archives, archives / "MNIST", archives / "MNIST" / "raw"]
    for folder in folders:
        folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    before = listing(archives)
    try:
        assert same(data.load("mnist", archives), mnist)
    finally:
        for folder in folders:
            folder.chmod(stat.S_IRWXU)
    after = listing(archives)  # root may write in a read-only folder
    assert after == before


def test_extracted_files_alone_are_read(archives, mnist):
    for archive in (archives / "MNIST" / "raw").glob("*.gz"):
        archive.with_suffix("").write_bytes(gzip.decompress(archive.read_bytes()))
        archive.unlink()
    before = listing(archives)
    assert same(data.load("mnist", archives), mnist)
    assert listing(archives) == before


def test_unreadable_file_without_its_archive(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    fashion_mnist(raw)
    (raw / "t10k-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01")
    message = r"FashionMNIST/raw/t10k-labels-idx1-ubyte cannot be read .*; name the folder"
    with pytest.raises(ConfigError, match=message) as caught:
        data.load("fashion-mnist", tmp_path)
    assert "\n" not in str(caught.value)


def test_images_without_their_labels_are_refused(tmp_path):
    fashion_mnist(tmp_path / "a" / "FashionMNIST" / "raw", train=20)
    fashion_mnist(tmp_path / "b" / "FashionMNIST" / "raw", train=30)
    labels = Path("FashionMNIST", "raw", "train-labels-idx1-ubyte")
    shutil.copy(tmp_path / "b" / labels, tmp_path / "a" / labels)
    with pytest.raises(ConfigError, match=r"raw/train-\* holds 20 images and 30 labels"):
        data.load("fashion-mnist", tmp_path / "a")


def test_a_label_without_a_class_is_refused(tmp_path):
    fashion_mnist(tmp_path / "FashionMNIST" / "raw")
    labels = tmp_path / "FashionMNIST" / "raw" / "train-labels-idx1-ubyte"
    content = bytearray(labels.read_bytes())
    content[-1] = 10
    labels.write_bytes(content)
    with pytest.raises(ConfigError, match=r"raw/train-\* holds label 10 of 10 classes"):
        data.load("fashion-mnist", tmp_path)


@pytest.mark.parametrize("crop, pool", [(0, 1), (0, 2), (3, 2), (2, 3), (13, 2), (1, 26), (5, 7)])
@pytest.mark.parametrize("n", [0, 1, 1001])
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
    for down, right in ((0, 0), (1, 0), (0, -3), (-2, 3)):
        kept = samples.features[:, 3 + down : 25 + down, 3 + right : 25 + right]
        moved = samples.pooled(3, 1, shift=(down, right), dtype=torch.bfloat16)
        assert torch.equal(moved.features, (kept.float() / 255).bfloat16())
    assert torch.equal(samples.pooled().features, samples.features.float() / 255)
    assert samples.features.dtype == torch.uint8  # still


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"crop": 14}, "crop 14 and pool 1 leave nothing of images of 28 × 28; take smaller"),
        ({"crop": -1}, "crop -1 and pool 1 leave nothing"),
        ({"pool": 0}, "crop 0 and pool 0 leave nothing"),
        ({"crop": 1, "pool": 27}, "crop 1 and pool 27 leave nothing"),
        ({"crop": 2, "shift": (0, -3)}, r"shift is \(0, -3\), expected at most 2, as crop is"),
    ],
)
def test_pooling_that_leaves_nothing_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        numbered(2).pooled(**arguments)


def test_pooling_takes_images_to_floating_numbers():
    with pytest.raises(ConfigError, match=r"dtype is torch\.int8, expected a floating one"):
        numbered(2).pooled(dtype=torch.int8)
    points = data.Samples(torch.rand(3, 2), torch.zeros(3, dtype=torch.int64), ("a",))
    with pytest.raises(
        ConfigError, match=r"features are \(3, 2\) torch.float32, expected images \(n, h, w\)"
    ):
        points.pooled()
