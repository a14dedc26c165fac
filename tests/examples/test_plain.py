# SPDX-License-Identifier: MIT
"""`train_ddp.py --plain` trains as the textbook's loop does; a smoothed loss is explained."""

import pytest
import torch
from commands import lesson, rows_of
from fake_data import fashion_mnist
from torch.nn.functional import cross_entropy

pytest.importorskip("tyro", reason="tyro reads the flags")

from torchpar.data import batches, load
from torchpar.nn import MLP

TRAIN, BATCH, LR = 96, 32, 0.1


def by_the_textbook(data) -> float:
    """The training loss of an epoch by SGD with Nesterov's momentum on all pixels."""
    train, _ = load("fashion-mnist", data)
    torch.manual_seed(0)
    model = MLP([784, 16, 10])
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, nesterov=True)
    total = 0.0
    for x, labels, _ in batches(train, BATCH, seed=0, epoch=1):
        loss = cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += len(x) * loss.item()
    return total / TRAIN


def test_plain_is_the_textbooks_loop(tmp_path):
    data = fashion_mnist(tmp_path / "data", train=TRAIN, test=20)
    flags = f"--dataset fashion-mnist --data {data} --device cpu --hidden 16 --batch-size {BATCH}"
    flags += f" --epochs 1 --lr {LR} --schedule constant --weight-decay 0"
    losses = {}
    for name, more in (("plain", ["--plain"]), ("default", [])):
        metrics = tmp_path / name
        code, out, err = lesson("train_ddp", *flags.split(), *more, "--metrics", str(metrics))
        assert (code, err) == (0, "")
        assert ("with smoothed labels" in out) == (name == "default")
        losses[name] = rows_of(metrics)[-1]["train_loss"]
    expected = by_the_textbook(data)
    # Sums of 784 products of float32, in another order.
    assert losses["plain"] == pytest.approx(expected, rel=784 * 2**-23)
    assert losses["default"] != pytest.approx(expected, rel=784 * 2**-23)
