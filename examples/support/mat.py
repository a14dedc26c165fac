# SPDX-License-Identifier: MIT
"""MATLAB's files: images with labels, and the weights of a network with biases as first columns.

SciPy reads them. Files of version 7.3 are HDF5, which it does not read.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from torchpar.baselines.numpy_mlp import Array, NumpyMLP
from torchpar.errors import ConfigError

LABELS = "0 to 9, or 1 to 10 with 10 for 0"


def read(path: Path) -> dict[str, Array]:
    """Return the arrays of a file by name.

    Raises:
        ConfigError: the file is missing, damaged or of version 7.3.
    """
    from scipy.io import loadmat

    try:
        found = loadmat(str(path))
    except NotImplementedError as e:
        raise ConfigError(f"{path} is of version 7.3; save it in MATLAB with '-v7'") from e
    except FileNotFoundError as e:
        raise ConfigError(f"{path} does not exist; name a .mat file") from e
    except Exception as e:  # of a damaged file SciPy raises errors of many kinds
        raise ConfigError(f"{path} is no .mat file, or is damaged ({e}); name another") from e
    return {name: array for name, array in found.items() if not name.startswith("__")}


def check_numbers(path: Path, arrays: Mapping[str, Any]) -> None:
    """Raise a ConfigError if an array holds other numbers than real and finite ones."""
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
            held = f"{type(array).__name__} of {array.dtype}"
            raise ConfigError(f"{path}: {name} is a {held}, expected a matrix of real numbers")
        if len(bad := np.argwhere(~np.isfinite(array))):
            first = bad[0].tolist()
            value = array[tuple(first)]
            raise ConfigError(f"{path}: {name}{first} is {value}, expected finite numbers")


def read_images(path: Path, features: int) -> tuple[Array, Array]:
    """Return the images ``X (n, features)`` as float32, and the labels ``y (n)`` as int64, 0 to 9.

    MATLAB counts from 1, so that in some files the label of the digit 0 is 10.

    Raises:
        ConfigError: as from `read`, or the file has no such X and y of finite numbers, the pixels
            are not scaled to [0, 1], or a label is another.
    """
    arrays = read(path)
    x, y = arrays.get("X"), arrays.get("y")
    if x is None or y is None or x.ndim != 2 or x.shape[1] != features or y.size != len(x):
        is_turned = x is not None and y is not None and x.shape == (features, y.size)
        raise ConfigError(
            f"{path} holds {described(arrays)}, expected X (n, {features}) and y (n, 1)"
            + "; transpose X" * is_turned
        )
    if not len(x):
        raise ConfigError(f"{path}: X {x.shape} has 0 samples, expected one or more")
    check_numbers(path, {"X": x, "y": y})
    if (mean := x.mean()) > 1:  # of pixels of 0 to 1 it is less, though resampling overshoots
        raise ConfigError(
            f"{path}: X has the mean {mean:.3g}, expected pixels of 0 to 1; divide X by 255"
        )
    found = {*y.reshape(-1).tolist()}
    if other := found - {*range(11)}:
        raise ConfigError(f"{path}: y has the label {min(other):g}, expected {LABELS}")
    if found >= {0, 10}:
        raise ConfigError(f"{path}: y has the labels 0 and 10, expected {LABELS}")
    return x.astype(np.float32), y.reshape(-1).astype(np.int64) % 10


def load_weights(path: Path, model: NumpyMLP) -> None:
    """Copy the matrices ``Theta1, Theta2, … (size_i+1, 1 + size_i)`` of a file to ``model``.

    Their first columns are the biases.

    Raises:
        ConfigError: as from `read`, or the file has no such matrices of finite numbers.
    """
    arrays = read(path)
    shapes = [(weight.shape[1], 1 + weight.shape[0]) for weight in model.weights]
    expected = {f"Theta{i}": shape for i, shape in enumerate(shapes, start=1)}
    if any(name not in arrays or arrays[name].shape != expected[name] for name in expected):
        needs = ", ".join(f"{name} {shape}" for name, shape in expected.items())
        are_turned = all(
            name in arrays and arrays[name].T.shape == shape for name, shape in expected.items()
        )
        raise ConfigError(
            f"{path} holds {described(arrays)}, expected {needs}" + "; transpose them" * are_turned
        )
    check_numbers(path, {name: arrays[name] for name in expected})
    for name, weight, bias in zip(expected, model.weights, model.biases, strict=True):
        bias[:], weight[:] = arrays[name][:, 0], arrays[name][:, 1:].T


def described(arrays: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {array.shape}" for name, array in arrays.items()) or "no arrays"
