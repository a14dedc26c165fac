# SPDX-License-Identifier: MIT
"""MATLAB's files: images with labels, and the weights of a network with biases as first columns.

SciPy reads them. Files of version 7.3 are HDF5, which it does not read.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from torchpar.baselines.numpy_mlp import Array, NumpyMLP
from torchpar.errors import ConfigError

LABELS = "0 to 9, or 1 to 10 with 10 for 0"
ROWS = ("k", "k + 1")  # the label of row k of the last matrix, by the label of its first row


class LabelledImages(NamedTuple):
    """Images of a file, and how their labels are counted.

    Attributes:
        x: ``(n, features)`` float32.
        labels: ``(n)`` int64, 0 to 9.
        first_label: 1 if the file's labels are 1 to 10; 0 if they are 0 to 9; None if they have
            neither 0 nor 10, which tells the two apart.
    """

    x: Array
    labels: Array
    first_label: int | None


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


def read_images(path: Path, features: int) -> LabelledImages:
    """Return the images ``X (n, features)`` and the labels ``y (n)`` of a file.

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
    first = 1 if 10 in found else 0 if 0 in found else None
    return LabelledImages(x.astype(np.float32), y.reshape(-1).astype(np.int64) % 10, first)


def load_weights(path: Path, model: NumpyMLP, first_label: int = 0) -> None:
    """Copy the matrices ``Theta1, Theta2, … (size_i+1, 1 + size_i)`` of a file to ``model``.

    Their first columns are the biases. Row k of the last matrix goes to the class of the label
    ``k + first_label``, where the label 10 is the class 0.

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
    model.biases[-1][:] = np.roll(model.biases[-1], first_label)
    model.weights[-1][:] = np.roll(model.weights[-1], first_label, axis=1)


def settle_first_label(
    path: Path, model: NumpyMLP, images: LabelledImages, source: str, asked: int | None = None
) -> tuple[int, str]:
    """Return the label of the first row of the last matrix of a file, and a line that says so.

    The shapes of the matrices do not tell it. It is ``asked``, or else that of the images' labels,
    unless the weights contradict: trained ones are right for most images in one order alone.

    Args:
        model: has the sizes of the matrices. Its weights are overwritten.
        source: names the images.

    Raises:
        ConfigError: as from `load_weights`; or nothing is asked, and the labels tell neither, or
            most images are right in the other order.
    """
    shares: list[str] = []
    are_most: list[bool] = []
    for first in range(len(ROWS)):
        load_weights(path, model, first)
        is_right = model.forward(images.x)[1].argmax(1) == images.labels
        shares.append(f"{100 * is_right.mean():.1f}%")
        are_most.append(bool(is_right.mean() > 0.5))
    row = f"row k of Theta{len(model.weights)}"
    first_label = images.first_label if asked is None else asked
    if first_label is None:
        raise ConfigError(
            f"{path}: {row} is label k or k + 1, and the labels of {source} have neither 0 nor 10, "
            f"which would tell; by label k {shares[0]} of the training images are right, by label "
            f"k + 1 {shares[1]}; add --first-label 0 or 1"
        )
    other = 1 - first_label
    if asked is None and are_most[other] and not are_most[first_label]:
        raise ConfigError(
            f"{path}: {row} would be label {ROWS[first_label]}, as {source} counts its labels, but "
            f"then {shares[first_label]} of the training images are right, and by label "
            f"{ROWS[other]} {shares[other]}; add --first-label {other}"
        )
    why = f"as {source} counts its labels" if asked is None else "as --first-label says"
    return first_label, (
        f"{path}: {row} is label {ROWS[first_label]}, {why}; {shares[first_label]} of the training "
        f"images are right, and by label {ROWS[other]} {shares[other]} would be"
    )


def described(arrays: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {array.shape}" for name, array in arrays.items()) or "no arrays"
