# SPDX-License-Identifier: MIT
"""Tests that all baselines compute the same: integers exactly, other numbers as accurately as
PyTorch."""

import numpy as np
import pytest
import torch
from samples import assert_accurate, oracle
from torch.nn import functional as F

import torchpar.nn
from benchmarks.records import OPERATORS

pytest.importorskip("numba", reason="Numba compiles the loops")
from torchpar.baselines import numba_njit, numpy_mlp, pure_python
from torchpar.baselines.numpy_mlp import SGD, NumpyMLP

# Operators


def levels(name: str) -> dict:
    """Return all ways to compute an operator on the CPU, arrays in and out."""
    by_python = getattr(pure_python, name)
    found = {
        "pure Python": lambda *arrays: np.asarray(by_python(*(array.tolist() for array in arrays)))
    }
    found["NumPy"] = getattr(numpy_mlp, name)
    for kind, loops in (("serial", numba_njit.SERIAL), ("parallel", numba_njit.PARALLEL)):
        found[f"njit, {kind}"] = getattr(loops, name)
        if name == "matmul":
            found[f"blocked, {kind}"] = loops.matmul_blocked
            found[f"in registers, {kind}"] = loops.matmul_in_registers
        if name == "matmul_t":
            found[f"triangular, {kind}"] = loops.matmul_t_triangular
    return found


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def inputs(name: str, seed: int) -> list[tuple[np.ndarray, ...]]:
    """Arguments of an operator. With numbers of its own no level finds another's result in fresh
    memory."""
    if name == "matmul_t":
        return [(normal(n, k, seed=seed),) for n, k in ((1, 1), (5, 7), (129, 33), (3, 0))]
    if name == "matmul":
        shapes = ((1, 1, 1), (5, 7, 3), (129, 33, 66), (2, 0, 3))
        return [(normal(m, k, seed=seed), normal(n, k, seed=seed + 1)) for m, k, n in shapes]
    if name == "linear_sigmoid":
        shapes = ((1, 1, 1), (5, 0, 3), (7, 33, 5))
        return [
            (normal(m, k, seed=seed), normal(n, k, seed=1), normal(n, seed=2)) for m, k, n in shapes
        ]
    limits = np.iinfo(np.int32)
    # Few of them: many ties.
    values = np.array([limits.min, -7, -1, 0, 1, 255, limits.max], np.int32)
    pairs = [
        values[np.random.default_rng(seed).integers(0, 7, (2, *shape))]
        for shape in ((0, 3), (67, 70))
    ]
    return [tuple(pair) for pair in pairs]


def assert_right(name: str, result: np.ndarray, *arrays: np.ndarray) -> None:
    """Judge a result of sums of k products, each a multiplication and an addition; a maximum is
    exact."""
    args = tuple(map(torch.from_numpy, arrays))
    native = args[0] @ args[1].mT if name == "matmul" else OPERATORS[name].native(*args)
    actual = torch.from_numpy(result).to(native.dtype).view(native.shape)
    if name == "maximum":
        assert torch.equal(actual, native)
    else:
        record = "exact_matmul" if name == "matmul" else name
        assert_accurate(actual, native, oracle(record, args), 2 * arrays[0].shape[-1] + 8)


NAMES = ("maximum", "matmul_t", "matmul", "linear_sigmoid")
# The parallel loops are the serial ones with prange. Numba takes a second to compile each, so most
# of them are marked slow. By default the one is tested whose iterations write into each other's
# rows.
BY_DEFAULT = ("matmul_t", "triangular, parallel")


def is_slow(name: str, level: str) -> bool:
    """Whether the test by default is of a loop like this one."""
    is_alike = "parallel" in level or (name, level) == ("matmul_t", "triangular, serial")
    return is_alike and (name, level) != BY_DEFAULT


WAYS = [
    pytest.param(*way, marks=[pytest.mark.slow] * is_slow(*way))
    for way in ((name, level) for name in NAMES for level in levels(name))
]


@pytest.mark.parametrize("name, level", WAYS)
def test_all_levels_compute_the_same(name, level):
    for args in inputs(name, seed=list(levels(name)).index(level)):
        result = levels(name)[level](*args)
        assert_right(name, result, *args)
        assert level == "pure Python" or result.dtype == args[0].dtype
        if "triangular" in level:
            np.testing.assert_array_equal(result, result.T)
        if result.size:
            wrong = np.array(result)
            wrong.flat[-1] = 3  # which is no result
            with pytest.raises(AssertionError):
                assert_right(name, wrong, *args)


@pytest.mark.parametrize(
    "level",
    [
        pytest.param(level, marks=[pytest.mark.slow] * ("parallel" in level))
        for level in levels("linear_sigmoid")
    ],
)
def test_sigmoid_of_large_numbers_is_0_or_1(level):
    x = np.array([[-3e38], [-1e4], [-110], [0], [1e4], [3e38]], np.float32)
    args = (x, np.ones((1, 1), np.float32), np.zeros(1, np.float32))
    result = levels("linear_sigmoid")[level](*args).ravel()
    assert (result[:3] >= 0).all()
    assert (result[:3] <= 1e-30).all()
    assert result[3:].tolist() == [0.5, 1, 1]


# Backpropagation by hand


def problem(sizes=(33, 9, 6, 10), batch=7, loss="cross-entropy", hidden="sigmoid") -> tuple:
    """A network in float64 with biases too, and a batch; all of them numbers that float32 has."""
    random = np.random.default_rng(1)
    model = NumpyMLP(sizes, loss=loss, hidden=hidden, dtype=np.float64)
    model.parameters[:] = model.parameters.astype(np.float32)
    for bias in model.biases:
        bias[:] = random.standard_normal(len(bias), dtype=np.float32)
    x = random.random((batch, sizes[0]), dtype=np.float32).astype(np.float64)
    return model, x, random.integers(0, sizes[-1], batch)


def by_autograd(model: NumpyMLP, x: np.ndarray, labels: np.ndarray, dtype: torch.dtype) -> tuple:
    """Loss and gradient of `torchpar.nn.MLP`, summed over samples."""
    output = "logits" if model.loss == "cross-entropy" else "sigmoid"
    network = torchpar.nn.MLP(model.sizes, output=output, dtype=dtype)
    model.copy_to(network)
    outputs, targets = torch.from_numpy(x).to(dtype), torch.from_numpy(labels)
    *hidden, last = network.layers
    for layer in hidden:
        z = F.linear(outputs, layer.weight, layer.bias)
        outputs = torch.sigmoid(z) if model.hidden == "sigmoid" else torch.tanh(z)
    outputs = last(outputs)
    if model.loss == "cross-entropy":
        loss = F.cross_entropy(outputs, targets, reduction="sum")
    else:
        one_hot = F.one_hot(targets, outputs.shape[1]).to(dtype)
        loss = F.binary_cross_entropy(outputs, one_hot, reduction="sum")
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    # PyTorch's weights are (out, in).
    return loss.item(), np.concatenate([gradient.numpy().T.ravel() for gradient in gradients])


def assert_as_accurate(found: tuple, model: NumpyMLP, x, labels, dtype: torch.dtype) -> None:
    """An error of the loss and the gradient of at most twice that of autograd in ``dtype``.

    Each number ends a chain of sums, over each layer's inputs and over the samples.
    """
    exact = by_autograd(model, x, labels, torch.float64)
    for actual, native, expected in zip(
        found, by_autograd(model, x, labels, dtype), exact, strict=True
    ):
        roundings = 2 * (sum(model.sizes) + len(x))
        assert_accurate(
            *(torch.as_tensor(t, dtype=dtype) for t in (actual, native)), expected, roundings
        )


def joined(loss, weights, biases) -> tuple:
    return loss, np.concatenate(
        [np.ravel(t) for layer in zip(weights, biases, strict=True) for t in layer]
    )


def in_numpy(model: NumpyMLP, x, labels) -> tuple:
    narrow = NumpyMLP(model.sizes, hidden=model.hidden)
    narrow.parameters[:] = model.parameters
    return narrow.gradients(x.astype(np.float32), labels)


def in_python(model: NumpyMLP, x, labels) -> tuple:
    parts = ([t.tolist() for t in own] for own in (model.weights, model.biases))
    return joined(*pure_python.gradients(*parts, x.tolist(), labels.tolist()))


def by_numba(model: NumpyMLP, x, labels) -> tuple:
    """`PARALLEL` takes twice as long to compile; the ladder checks its losses."""
    parts = ([t.astype(np.float32) for t in own] for own in (model.weights, model.biases))
    return joined(*numba_njit.gradients(numba_njit.SERIAL, *parts, x.astype(np.float32), labels))


@pytest.mark.parametrize(
    "level, sizes, batch, loss, hidden",
    [
        *[
            (f, (33, 9, 6, 10), 7, "cross-entropy", "sigmoid")
            for f in (in_numpy, in_python, by_numba)
        ],
        (in_numpy, (33, 9, 6, 10), 7, "cross-entropy", "tanh"),
        (NumpyMLP.gradients, (20, 8, 6, 10), 7, "bce", "sigmoid"),
        (NumpyMLP.gradients, (20, 8, 6, 10), 7, "bce", "tanh"),
        (NumpyMLP.gradients, (5, 3), 1, "bce", "sigmoid"),
        (NumpyMLP.gradients, (5, 4, 3), 0, "cross-entropy", "sigmoid"),
    ],
)
def test_gradients_are_autograds(level, sizes, batch, loss, hidden):
    model, x, labels = problem(sizes, batch, loss, hidden)
    found = level(model, x, labels)
    dtype = torch.float32 if level in (in_numpy, by_numba) else torch.float64
    assert level is in_python or torch.from_numpy(found[1]).dtype == dtype
    assert_as_accurate(found, model, x, labels, dtype)
    if batch:
        with pytest.raises(AssertionError):
            assert_as_accurate((found[0], 1.0001 * found[1]), model, x, labels, dtype)


def test_derivatives_are_known_from_the_activations():
    z = np.linspace(-5, 5, 11)
    for function, prime in numpy_mlp.ACTIVATIONS.values():
        slope = (function(z + 1e-5) - function(z - 1e-5)) / 2e-5
        np.testing.assert_allclose(prime(function(z)), slope, rtol=0, atol=1e-9)
    assert [pure_python.sigmoid_prime(pure_python.sigmoid(t)) for t in z] == pytest.approx(
        numpy_mlp.sigmoid_prime(numpy_mlp.sigmoid(z)).tolist(), abs=1e-15
    )


def test_lists_are_added_element_by_element():
    assert pure_python.add_elementwise([1, 2.5], [3, 4]) == [4, 6.5]
    whole = NumpyMLP((4, 3, 2), dtype=np.float64)
    # Lists of arrays, which broadcast.
    found = pure_python.add_elementwise(whole.weights, whole.biases)
    assert [t.shape for t in found] == [(4, 3), (3, 2)]
    np.testing.assert_array_equal(found[0], whole.weights[0])
    with pytest.raises(ValueError, match="argument 2 is longer"):
        pure_python.add_elementwise([1], [1, 2])


def test_gradients_of_shares_add_up():
    model, x, labels = problem()
    parts = [in_python(model, x[own], labels[own])[1] for own in (slice(3), slice(3, None))]
    whole = in_python(model, x, labels)[1]
    np.testing.assert_allclose(
        pure_python.add_elementwise(*map(list, parts)), whole, rtol=0, atol=1e-12
    )


# The network and how it descends


@pytest.mark.parametrize("loss, expected", [("cross-entropy", np.log(3)), ("bce", 5 * np.log(2))])
def test_losses_of_large_outputs(loss, expected):
    """Right labels of probability 1 have the loss 0; outputs of 0 have that of equal
    probabilities."""
    z = np.array([[1e4, -1e4, -1e4], [-1e30, 1e30, -1e30], [0, 0, 0]], np.float32)
    if loss == "bce":
        z[0, 1:] = 0
    found, delta = NumpyMLP((2, 3), loss=loss).loss_sum(z, np.array([0, 1, 2]))
    assert found == pytest.approx(expected, rel=20 * 2**-24)
    assert np.isfinite(delta).all()
    wrong, _ = NumpyMLP((2, 3), loss=loss).loss_sum(z, np.array([0, 2, 2]))
    assert wrong >= 1e30


def test_sgd_decays_the_weights_alone():
    """The pooled exercise compares the momentum with that of `torch.optim.SGD`."""
    model = NumpyMLP((4, 3), dtype=np.float64)
    model.biases[0][:] = 1
    expected = [0.9 * model.weights[0] - 0.5, model.biases[0] - 0.5]
    SGD(model, lr=0.5, weight_decay=0.2).step(np.ones_like(model.parameters))
    np.testing.assert_allclose(model.weights[0], expected[0], rtol=0, atol=1e-15)  # some roundings
    np.testing.assert_array_equal(model.biases[0], expected[1])


def test_sgd_decays_the_biases_too_if_asked():
    model = NumpyMLP((4, 3), dtype=np.float64)
    model.biases[0][:] = 1
    expected = 0.9 * model.parameters - 0.5
    SGD(model, lr=0.5, weight_decay=0.2, decay_biases=True).step(np.ones_like(model.parameters))
    np.testing.assert_allclose(model.parameters, expected, rtol=0, atol=1e-15)  # some roundings


def test_weights_are_xaviers_or_zero():
    spread = NumpyMLP((300, 200)).weights[0].std()
    assert spread == pytest.approx((2 / 500) ** 0.5, rel=0.02)  # of 60 000 draws: within 4 σ, 1.2%
    assert not NumpyMLP((300, 200), init="zero").parameters.any()


def test_batches_cover_each_sample_once_in_a_new_order():
    generator = np.random.default_rng(0)
    first, second = (list(numpy_mlp.batches(10, 4, generator)) for _ in range(2))
    assert [len(batch) for batch in first] == [4, 4, 2]
    orders = [tuple(np.concatenate(epoch)) for epoch in (first, second)]
    assert sorted(orders[0]) == list(range(10))
    assert len({*orders, tuple(range(10))}) == 3
