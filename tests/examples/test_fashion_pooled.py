# SPDX-License-Identifier: MIT
"""Files of MATLAB, and the phases of each iteration, in the lesson of full-batch descent."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
from commands import lesson, rows_of

pytest.importorskip("tyro", reason="tyro reads the flags")

from support import mat

import fashion_pooled

from torchpar import console
from torchpar.baselines import mpi
from torchpar.baselines.numpy_mlp import NumpyMLP
from torchpar.errors import ConfigError
from torchpar.parallel import join_world


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path, dict[str, np.ndarray]]:
    """Images and weights as a course's exercise has them, and their arrays."""
    scipy = pytest.importorskip("scipy.io", reason="SciPy reads files of MATLAB")
    folder, generator = tmp_path_factory.mktemp("mat"), np.random.default_rng(0)
    y = np.arange(50)[:, None] // 5 + 1  # sorted by class, from 1 to 10
    arrays = {"X": generator.random((50, 400)), "y": y}
    thetas = {"Theta1": generator.normal(size=(25, 401)), "Theta2": generator.normal(size=(10, 26))}
    scipy.savemat(folder / "images.mat", arrays)
    scipy.savemat(folder / "weights.mat", thetas)
    return folder / "images.mat", folder / "weights.mat", arrays | thetas


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


def outputs(arrays: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """The network's outputs before their sigmoids, where a column of ones carries the biases."""
    a, ones = x, np.ones((len(x), 1))
    a = sigmoid(np.hstack([ones, a]) @ arrays["Theta1"].T)
    return np.hstack([ones, a]) @ arrays["Theta2"].T


def test_weights_of_a_file_have_their_biases_first(files):
    images, weights, arrays = files
    model = NumpyMLP((400, 25, 10), dtype=np.float64)
    mat.load_weights(weights, model)
    x, labels, first_label = mat.read_images(images, 400)
    assert first_label == 1
    assert x.dtype == np.float32
    assert labels.tolist() == [n for n in (*range(1, 10), 0) for _ in range(5)]  # 10 is the digit 0
    np.testing.assert_allclose(model.forward(arrays["X"])[1], outputs(arrays, arrays["X"]))


def write_course(folder: Path, first: int, rows_first: int, count: int = 10) -> list[str]:
    """Write images of which class i has pixel i alone, and weights that tell them apart.

    Args:
        first: the label of class 0; its class 9 has the label 10 - 1 + first, as MATLAB counts.
        rows_first: the label of the first row of Theta2.
        count: of the classes that have images.
    """
    savemat = pytest.importorskip("scipy.io", reason="SciPy writes files of MATLAB").savemat
    labels = np.arange(50) // 5 % count + first
    pixels = 20.0 * np.eye(25, 400) * (np.arange(25) < 10)[:, None]
    # Unit i is of pixel i, which the images of one label have.
    rows = 20.0 * np.roll(np.eye(10, 25), first - rows_first, axis=0)
    thetas = {"Theta1": pixels, "Theta2": rows}
    thetas = {name: np.insert(theta, 0, -10.0, axis=1) for name, theta in thetas.items()}
    savemat(folder / "X.mat", {"X": np.eye(400)[labels - first], "y": labels[:, None]})
    savemat(folder / "W.mat", thetas)
    return [f"--images={folder / 'X.mat'}", f"--weights={folder / 'W.mat'}"]


@pytest.mark.parametrize(
    "first, rows_first, flag",
    [(1, 1, []), (0, 0, []), (0, 1, ["--first-label=1"]), (1, 0, ["--first-label=0"])],
)
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_weights_of_a_file_begin_with_its_labels_right(tmp_path, first, rows_first, flag, library):
    """The rows of the weights are counted as the labels are, or as the flag says."""
    flags = [*write_course(tmp_path, first, rows_first), *flag, f"--library={library}"]
    flags += ["--device=cpu", "--iterations=1", "--lr=0", f"--metrics={tmp_path / 'metrics'}"]
    code, out, err = lesson("fashion_pooled", *flags)
    assert (code, err) == (0, "")
    label = ("k", "k + 1")[rows_first]
    assert re.search(rf"^\S+W.mat: row k of Theta2 is label {re.escape(label)}, as ", out, re.M)
    assert "; 100.0% of the training images are right" in out
    *_, last = rows_of(tmp_path / "metrics")
    assert (last["train_accuracy"], last["first_label"]) == (1, rows_first)
    # Each output is 20·σ(±10) - 10 before its sigmoid.
    wrong, right = (20 / (1 + np.exp(-z)) - 10 for z in (-10.0, 10.0))
    cost = 9 * np.logaddexp(0, wrong) + np.logaddexp(0, -right)
    assert last["first_cost"] == pytest.approx(cost, abs=10 * 2**-23)  # of ten terms in float32


def test_rows_that_contradict_the_labels_or_may_be_either_are_refused(tmp_path):
    for first, rows_first, count, message in (
        (
            0,
            1,
            10,
            r"row k of Theta2 would be label k, as \S+ counts its labels, but then 0.0% of the "
            r"training images are right, and by label k \+ 1 100.0%; add --first-label 1",
        ),
        (1, 0, 10, r"would be label k \+ 1, .* by label k 100.0%; add --first-label 0"),
        (1, 1, 9, r"neither 0 nor 10, .* label k 0.0% of .* k \+ 1 100.0%; add --first-label 0 or"),
    ):
        code, _, err = lesson("fashion_pooled", *write_course(tmp_path, first, rows_first, count))
        assert code == 2
        assert re.search(message, err)
    code, _, err = lesson("fashion_pooled", "--first-label=1")
    assert (code, "--first-label is of --weights, which are not given" in err) == (2, True)


def test_other_files_are_refused_by_what_they_hold(files, tmp_path, monkeypatch):
    images, weights, _ = files
    model = NumpyMLP((400, 25, 10))
    (damaged := tmp_path / "damaged.mat").write_bytes(b"MATLAB" * 100)
    (x := np.ones((5, 400)))[3, 2] = np.nan
    savemat = pytest.importorskip("scipy.io", reason="scipy writes .mat files").savemat
    savemat(tmp_path / "nan.mat", {"X": x, "y": np.ones(5)})
    savemat(tmp_path / "complex.mat", {"X": np.ones((5, 400)) * 1j, "y": np.ones(5)})
    savemat(tmp_path / "more.mat", {"X": np.ones((5, 400)), "y": np.ones(5), "other": x})
    assert mat.read_images(tmp_path / "more.mat", 400)[0].all()
    savemat(tmp_path / "turned.mat", {"X": np.ones((400, 5)), "y": np.ones((5, 1))})
    savemat(tmp_path / "thetas.mat", {"Theta1": np.ones((401, 25)), "Theta2": np.ones((26, 10))})
    for call, message in (
        (
            lambda: mat.load_weights(images, model),
            r"X \(50, 400\).*, expected Theta1 \(25, 401\), Theta2 \(10, 26\)",
        ),
        (lambda: mat.load_weights(weights, NumpyMLP((400, 9))), r"expected Theta1 \(9, 401\)"),
        (lambda: mat.read_images(weights, 400), r"expected X \(n, 400\) and y"),
        (lambda: mat.read_images(images, 784), r"expected X \(n, 784\) and y"),
        (lambda: mat.read_images(tmp_path / "nan.mat", 400), r"X\[3, 2\] is nan, expected finite"),
        (lambda: mat.read_images(tmp_path / "complex.mat", 400), "X is a ndarray of complex128, "),
        (
            lambda: mat.read_images(tmp_path / "turned.mat", 400),
            r"holds X \(400, 5\), .* y \(n, 1\); transpose X$",
        ),
        (
            lambda: mat.load_weights(tmp_path / "thetas.mat", model),
            r"holds Theta1 \(401, 25\), .*\(10, 26\); transpose them$",
        ),
        (lambda: mat.read(damaged), "is no .mat file, or is damaged"),
        (lambda: mat.read(tmp_path / "none.mat"), "does not exist"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()


@pytest.mark.parametrize(
    "x, y, message",
    [
        (np.ones((5, 400)), [1, 2, 2.5, 3, 4], "y has the label 2.5, expected 0 to 9, or 1 to 10"),
        (np.ones((5, 400)), [1, 2, -1, 3, 11], "y has the label -1, expected 0 to 9, or 1 to 10"),
        (np.ones((5, 400)), [0, 1, 2, 3, 10], "y has the labels 0 and 10, expected 0 to 9, or 1"),
        (np.full((5, 400), 51, np.uint8), [1] * 5, "X has the mean 51, .* divide X by 255$"),
        (np.eye(5, 400) * 500, [1] * 5, "X has the mean 1.25, .* divide X by 255$"),
        (np.ones((0, 400)), [], r"X \(0, 400\) has 0 samples, expected one or more"),
    ],
)
def test_labels_and_pixels_of_another_scale_are_refused(tmp_path, x, y, message):
    arrays = {"X": x, "y": np.array(y).reshape(-1, 1)}
    pytest.importorskip("scipy.io", reason="scipy writes .mat files").savemat(
        tmp_path / "x.mat", arrays
    )
    with pytest.raises(ConfigError, match=message):
        mat.read_images(tmp_path / "x.mat", 400)


def test_pixels_beyond_0_and_1_are_images_too(tmp_path):
    """Resampling overshoots."""
    (x := np.tile(np.linspace(-0.13, 1.13, 400), (5, 1)))[0] = 1
    pytest.importorskip("scipy.io", reason="scipy writes .mat files").savemat(
        tmp_path / "x.mat", {"X": x, "y": np.arange(5)}
    )
    found, labels, first_label = mat.read_images(tmp_path / "x.mat", 400)
    assert first_label == 0
    assert np.array_equal(found, x.astype(np.float32))
    assert labels.tolist() == [*range(5)]


def test_labels_that_training_would_lack_are_an_error(tmp_path):
    arrays = {"X": np.ones((50, 400)), "y": np.arange(50) % 10}
    pytest.importorskip("scipy.io", reason="scipy writes .mat files").savemat(
        tmp_path / "x.mat", arrays
    )
    code, _, err = lesson("fashion_pooled", "--images", str(tmp_path / "x.mat"))
    assert (code, "training lacks the labels [4, 9]; shuffle the samples" in err) == (2, True)


@pytest.mark.parametrize("flag", ["--images", "--weights"])
def test_a_missing_scipy_is_one_line(monkeypatch, flag):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "scipy" else find(name)
    )
    code, _, err = lesson("fashion_pooled", flag, "x.mat")
    assert (code, err) == (
        2,
        f"fashion_pooled.py: error: {flag} needs scipy; pip install scipy\n",
    )


@pytest.mark.parametrize(
    "library, phases",
    [
        ("numpy", "hidden layer|output layer|cost|backward|exchange|descent"),
        pytest.param("torch", "forward|backward|optimizer", marks=pytest.mark.slow),
    ],
)
def test_every_iteration_has_its_phases(files, tmp_path, library, phases):
    images, weights, arrays = files
    flags = [f"--images={images}", f"--weights={weights}", f"--metrics={tmp_path / 'metrics'}"]
    flags += ["--every-iteration", "--iterations=2", f"--library={library}", "--device=cpu"]
    code, out, err = lesson("fashion_pooled", *flags)
    assert (code, err) == (0, "")
    assert out.startswith(f"{images}: 40 samples, and every fifth one for tests\n")
    names = phases.split("|")
    parts = "".join(rf" \| {name} (\d+\.\d\d)" for name in names)
    lines = re.findall(rf"^iteration \d+/(?:60|2) \| cost (\S+) \| \S+ ms{parts}$", out, re.M)
    assert len(lines) == 62
    rows = rows_of(tmp_path / "metrics")[:62]
    for (cost, *shown), row in zip(lines, rows, strict=True):
        seconds = [row[f"{name}_seconds"] for name in names]
        assert [f"{1000 * s:.2f}" for s in seconds] == shown
        assert f"{row['cost']:.4f}" == cost
        assert 0 < sum(seconds) < row["seconds"]
    # The first cost is that of the file's weights, of the samples that are not for tests.
    train = np.arange(50) % 5 != 4
    z, t = outputs(arrays, arrays["X"][train]), np.eye(10)[arrays["y"][train, 0] - 1]
    cost = (np.logaddexp(0, z) - t * z).sum() / 40
    assert rows[0]["cost"] == pytest.approx(cost, rel=1e-5)  # of 250 products in float32
    assert rows[60]["cost"] == rows[0]["cost"]


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_a_slow_run_says_how_far_it_is(monkeypatch, capsys, library):
    monkeypatch.setattr(console, "SILENCE", 0.0)
    splits = [fashion_pooled.Pixels(np.ones((5, 400), np.float32), np.arange(5))] * 2
    plan = fashion_pooled.Plan(2, 0.1, 0.0, 0)
    if library == "numpy":
        fashion_pooled.train_plans(mpi.OneProcess(), splits, [plan], fashion_pooled.Way())
    else:
        with join_world("cpu", alone=True) as world:
            fashion_pooled.train_torch(world, splits, plan)
    lines = [f"{done} of 2 iterations on 1 process after 0 s\n" for done in range(2)]
    assert capsys.readouterr().err == "".join(lines)


def test_a_pool_of_the_reader_that_makes_another_size_is_named(monkeypatch):
    flags = fashion_pooled.Flags(dataset="mnist")
    wrong = fashion_pooled.Pixels(np.zeros((3, 560), np.float32), np.zeros(3, np.int64))
    monkeypatch.setattr(fashion_pooled, "read", lambda *_: (None, None))
    monkeypatch.setattr(fashion_pooled, "pool", lambda images: wrong)
    with pytest.raises(ConfigError, match=r"pool returns .* \(3, 560\), expected \(3, 400\)"):
        fashion_pooled.load(flags)


def test_a_loop_over_samples_has_the_gradient_of_the_product():
    model, generator = NumpyMLP((6, 5, 4), loss="bce", dtype=np.float64), np.random.default_rng(0)
    inputs, z = model.forward(generator.random((7, 6)))
    _, delta = model.loss_sum(z, np.arange(7) % 4)
    product = model.backward(inputs, delta)
    np.testing.assert_allclose(
        fashion_pooled.backward_by_samples(model, inputs, delta), product, rtol=1e-12, atol=1e-14
    )
    without_last = fashion_pooled.backward_by_samples(model, inputs, delta[:-1])
    assert abs(without_last - product).max() > 1e-3
