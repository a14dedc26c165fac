# SPDX-License-Identifier: MIT
import gzip
import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_data import fashion_mnist

pytest.importorskip("torchvision", reason="torchvision reads the data sets")

from torchpar import data
from torchpar.errors import ConfigError
from torchpar.parallel.world import World, join_world

DATA = Path(__file__).parent.parent / "examples" / "data"
ALONE = World(0, 0, 1, torch.device("cpu"))


def worlds(world_size: int) -> list[World]:
    return [World(rank, rank, world_size, torch.device("cpu")) for rank in range(world_size)]


def numbered(n: int) -> data.Samples:
    """Samples whose labels are their indices."""
    return data.Samples(torch.zeros(n, 28, 28, dtype=torch.uint8), torch.arange(n), ("a",))


@pytest.fixture(scope="module")
def mnist() -> tuple[data.Samples, data.Samples]:
    return data.load("mnist", DATA, ALONE)


def test_mnist_equals_torchvisions_own(mnist, tmp_path):
    from torchvision.datasets import MNIST

    shutil.copytree(DATA, tmp_path / "data", ignore=shutil.ignore_patterns("*-ubyte"))
    for samples, train in zip(mnist, (True, False), strict=True):
        theirs = MNIST(tmp_path / "data", train=train, download=True)  # extracts; no network
        assert torch.equal(samples.images, theirs.data)
        assert torch.equal(samples.labels, theirs.targets)
        assert samples.images.dtype == torch.uint8
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
        list(data.batches(samples, batch_size, seed=5, epoch=2, world=world)) for world in worlds(world_size)
    ]
    whole = list(data.batches(samples, batch_size, seed=5, epoch=2, world=ALONE))
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


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed: int, epoch: int) -> list[int]:
        torch.rand(epoch)  # other draws leave the order as it is
        batch = next(data.batches(numbered(50), 50, seed=seed, epoch=epoch, world=ALONE))
        return batch.labels.tolist()

    orders = [order(0, 1), order(0, 2), order(1, 1), order(1, 2), order(2, 1)]
    assert orders == [order(0, 1), order(0, 2), order(1, 1), order(1, 2), order(2, 1)]
    assert len({tuple(o) for o in orders}) == 5


def test_fashion_mnist_reads_torchvisions_extracted_files(tmp_path):
    fashion_mnist(tmp_path / "FashionMNIST" / "raw")
    train, test = data.load("fashion-mnist", tmp_path, ALONE)
    assert (len(train), len(test)) == (20, 10)
    assert train.classes[9] == "Ankle boot"


@pytest.fixture
def archives(tmp_path) -> Path:
    """A copy of MNIST's archives that a test may damage."""
    shutil.copytree(DATA, tmp_path / "data", ignore=shutil.ignore_patterns("*-ubyte"))
    return tmp_path / "data"


def test_damaged_archive_is_named_with_its_md5_and_the_repair(archives):
    archive = archives / "MNIST" / "raw" / "t10k-labels-idx1-ubyte.gz"
    content = bytearray(archive.read_bytes())
    content[100] ^= 1
    archive.write_bytes(content)
    with pytest.raises(ConfigError, match=r"t10k-labels-idx1-ubyte\.gz is damaged") as caught:
        data.load("mnist", archives, ALONE)
    assert "ec29112dd5afa0611ce80d1b7f02629c" in str(caught.value)
    assert "remove what is damaged there and fetch it: python -c" in str(caught.value)
    assert "download=True" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_archive_and_missing_folder(archives):
    (archives / "MNIST" / "raw" / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(ConfigError, match=r"train-images-idx3-ubyte\.gz is missing.*f68b3c2dcbeaaa9fbdd"):
        data.load("mnist", archives, ALONE)
    with pytest.raises(ConfigError, match=r"nowhere/KMNIST/raw/.* is missing"):
        data.load("kmnist", archives / "nowhere", ALONE)
    with pytest.raises(ConfigError, match="dataset is 'cifar', expected one of"):
        data.load("cifar", archives, ALONE)  # type: ignore[arg-type]


@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_damaged_extracted_file_is_extracted_again(archives, damage, mnist):
    extracted = archives / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    content = bytearray(gzip.decompress(extracted.with_suffix(".gz").read_bytes()))
    digest = hashlib.md5(content).hexdigest()
    content[5000] ^= 1
    extracted.write_bytes(content[:5001] if damage == "truncate" else content)
    _, test = data.load("mnist", archives, ALONE)
    assert torch.equal(test.images, mnist[1].images)
    assert hashlib.md5(extracted.read_bytes()).hexdigest() == digest
    assert {p.name for p in extracted.parent.iterdir() if p.suffix != ".gz"} == {
        f"{prefix}-{kind}-ubyte" for prefix in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
    }


def test_unreadable_file_without_its_archive(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    fashion_mnist(raw)
    (raw / "t10k-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01")
    with pytest.raises(ConfigError, match=r"FashionMNIST/raw/t10k-\* cannot be read .*; name the folder"):
        data.load("fashion-mnist", tmp_path, ALONE)


def test_images_without_their_labels_are_refused(tmp_path):
    fashion_mnist(tmp_path / "a" / "FashionMNIST" / "raw", train=20)
    fashion_mnist(tmp_path / "b" / "FashionMNIST" / "raw", train=30)
    labels = Path("FashionMNIST", "raw", "train-labels-idx1-ubyte")
    shutil.copy(tmp_path / "b" / labels, tmp_path / "a" / labels)
    with pytest.raises(ConfigError, match=r"train-\* cannot be read \(20 images, 30 labels\)"):
        data.load("fashion-mnist", tmp_path / "a", ALONE)


def load_and_count_extractions(root: str) -> tuple[int, str]:
    import torchvision.datasets.utils as utils

    extract, calls = utils.extract_archive, 0

    def counting(*args, **kwargs):
        nonlocal calls
        calls += 1
        return extract(*args, **kwargs)

    utils.extract_archive = counting
    try:
        with join_world("cpu") as world:
            train, _ = data.load("mnist", Path(root), world)
            return calls, hashlib.md5(train.images.numpy().tobytes()).hexdigest()
    finally:
        utils.extract_archive = extract


def test_only_the_first_rank_of_a_machine_extracts(ranks, archives):
    calls, digests = zip(*ranks(4, load_and_count_extractions, str(archives)), strict=True)
    assert calls == (4, 0, 0, 0)
    assert len(set(digests)) == 1


def load_error(root: str) -> str:
    with join_world("cpu") as world, pytest.raises(ConfigError) as caught:
        data.load("mnist", Path(root), world)
    return str(caught.value)


def test_every_rank_sees_the_error_of_the_one_that_extracts(ranks, archives):
    (archives / "MNIST" / "raw" / "train-labels-idx1-ubyte.gz").unlink()
    messages = ranks(2, load_error, str(archives))
    assert "train-labels-idx1-ubyte.gz is missing" in messages[0]
    assert messages[0] == messages[1]
