# SPDX-License-Identifier: MIT
"""A small data set to learn from, in Fashion-MNIST's files."""

from pathlib import Path

import numpy as np


def fashion_mnist(root: Path, train: int = 20, test: int = 10) -> Path:
    """Write files as torchvision extracts them in ``root``: noise around one pattern per class;
    return it."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    patterns = generator.integers(0, 200, (10, 28, 28))
    for prefix, n in (("train", train), ("t10k", test)):
        labels = generator.integers(0, 10, n, dtype=np.uint8)
        images = (patterns[labels] + generator.integers(0, 56, (n, 28, 28))).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            (raw / f"{prefix}-{kind}-ubyte").write_bytes(header + array.tobytes())
    return root
