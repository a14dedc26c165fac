# SPDX-License-Identifier: MIT
"""Tests that all baselines compute the same: integers exactly, other numbers within a derived bound.

A sum of k products in any order has an error of at most γ(k)·Σ|a·b|, where γ(k) = ku/(1 − ku) (Higham,
Accuracy and Stability of Numerical Algorithms, 2002, section 3.1). A network's gradient may be twice as
inaccurate as autograd's.
"""

from itertools import pairwise

import numpy as np
import pytest
import test_kernels_interpreted
import torch
import triton
from samples import assert_accurate
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import torchpar

pytest.importorskip("numba", reason="Numba compiles the loops")
from torchpar.baselines import launch_shapes, numba_njit, numpy_mlp, pure_python
from torchpar.baselines.bridge import copy_weights
from torchpar.baselines.numpy_mlp import MLP, SGD

U32 = 2.0**-24  # unit roundoff


def gamma(k: int, u: float) -> float:
    return k * u / (1 - k * u)


def in_lists(function):
    return lambda *arrays: np.asarray(function(*(array.tolist() for array in arrays)))


def in_torch(function):
    return lambda *arrays: function(*map(torch.from_numpy, arrays)).numpy()


def levels(name: str) -> dict:
    """Return all ways to compute an operator on the CPU, arrays in and out."""
    loops = [loop.__name__ for loop in numba_njit.LOOPS if loop.__name__.startswith(name)]
    found = {"pure Python": in_lists(getattr(pure_python, name)), "NumPy": getattr(numpy_mlp, name)}
    found |= {f"{loop}, serial": getattr(numba_njit.SERIAL, loop) for loop in loops}
    found |= {f"{loop}, parallel": getattr(numba_njit.PARALLEL, loop) for loop in loops}
    return found | {"torchpar": in_torch(getattr(torchpar, name))}


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def within(result, expected, bound) -> bool:
    assert np.shape(result) == expected.shape
    return bool((np.abs(result - expected) <= bound).all())


# Operators


@pytest.mark.parametrize("level", levels("maximum"))
def test_maximum_is_exact(level):
    maximum = levels("maximum")[level]
    limits = np.iinfo(np.int32)
    values = np.array([limits.min, -7, -1, 0, 1, 255, limits.max], np.int32)  # few of them: many ties
    for shape in ((0, 3), (1, 1), (67, 70)):
        a, b = values[np.random.default_rng(0).integers(0, len(values), (2, *shape))]
        result = maximum(a, b).reshape(shape)
        np.testing.assert_array_equal(result, np.where(a > b, a, b))
        assert level == "pure Python" or result.dtype == np.int32
    a = np.array([[-1.5, 0.1, np.inf, 3e-45], [-np.inf, -0.25, 2.0, 1.0]], np.float32)
    b = np.array([[-1.0, 0.1, 5e30, 1e-45], [-3e38, -0.5, 2.0, 1.0000001]], np.float32)
    np.testing.assert_array_equal(maximum(a, b).astype(np.float32), np.where(a > b, a, b))


def check_matmul_t(result, x) -> bool:
    exact = x.astype(np.float64)
    return within(result, exact @ exact.T, gamma(x.shape[1], U32) * np.abs(exact) @ np.abs(exact).T)


@pytest.mark.parametrize("level", levels("matmul_t"))
@pytest.mark.parametrize("n, k", [(1, 1), (5, 7), (129, 33)])
def test_matmul_t(level, n, k):
    matmul_t = levels("matmul_t")[level]
    # Each level has numbers of its own: memory that it leaves unwritten may hold another's result.
    x = normal(n, k, seed=list(levels("matmul_t")).index(level))
    result = matmul_t(x)
    assert check_matmul_t(result, x)
    perturbed = x.copy()
    perturbed[-1, -1] += 0.01 + abs(x[-1]).sum()  # a number that the last tile has
    assert not check_matmul_t(matmul_t(perturbed), x)
    assert level == "pure Python" or result.dtype == np.float32
    if "triangular" in level:
        np.testing.assert_array_equal(result, result.T)
    # In any order, as all sums are whole numbers below 2²⁴.
    whole = np.random.default_rng(0).integers(-9, 10, (n, k)).astype(np.float32)
    np.testing.assert_array_equal(matmul_t(whole), (whole.astype(int) @ whole.T.astype(int)))
    np.testing.assert_array_equal(matmul_t(np.zeros((n, 0), np.float32)), np.zeros((n, n)))


def test_pure_python_keeps_whole_numbers_and_computes_the_first_rows():
    expected = [[2**120 + 1, 2**60 + 3], [2**60 + 3, 10]]
    assert pure_python.matmul_t([[2**60, 1], [1, 3]]) == expected
    assert pure_python.matmul_t([[2**60, 1], [1, 3]], rows=1) == expected[:1]


def test_loops_run_in_as_many_threads_as_are_asked_for():
    before = numba_njit.get_num_threads()
    with numba_njit.threads(1):
        assert numba_njit.get_num_threads() == 1
    assert numba_njit.get_num_threads() == before


def check_linear_sigmoid(result, x, weight, bias) -> bool:
    """The slope of the sigmoid is at most 1/4; its own roundings come to less than 8u."""
    x, weight, bias = (t.astype(np.float64) for t in (x, weight, bias))
    magnitude = np.abs(x) @ np.abs(weight).T + np.abs(bias)
    z = torch.from_numpy(x @ weight.T + bias)
    return within(result, z.sigmoid().numpy(), gamma(x.shape[1] + 1, U32) * magnitude / 4 + 8 * U32)


@pytest.mark.parametrize("level", levels("linear_sigmoid"))
def test_linear_sigmoid(level):
    """Of large numbers it is 0 or 1, without a warning: pytest turns it into an error."""
    linear_sigmoid = levels("linear_sigmoid")[level]
    for m, k, n in ((1, 1, 1), (5, 0, 3), (7, 33, 5), (1, 127, 129)):
        x, weight, bias = normal(m, k), normal(n, k, seed=1), normal(n, seed=2)
        assert check_linear_sigmoid(linear_sigmoid(x, weight, bias), x, weight, bias)
        assert not check_linear_sigmoid(linear_sigmoid(x, weight, bias + 1), x, weight, bias)
    x = np.array([[-3e38], [-1e4], [-110], [-30], [0], [30], [1e4], [3e38]], np.float32)
    ones, zero = np.ones((1, 1), np.float32), np.zeros(1, np.float32)
    result = linear_sigmoid(x, ones, zero)
    assert check_linear_sigmoid(result, x, ones, zero)
    assert (result[:3] >= 0).all()
    assert (result[:3] <= 1e-30).all()
    assert result[4] == 0.5
    assert (result[6:] == 1).all()


# Backpropagation by hand


def problem(sizes=(33, 9, 6, 10), batch=7, loss="cross-entropy", init="xavier") -> tuple:
    """A network in float64 with biases too, and a batch; all of them numbers that float32 has."""
    random = np.random.default_rng(1)
    model = MLP(sizes, loss=loss, init=init, dtype=np.float64)
    model.parameters[:] = model.parameters.astype(np.float32)
    for bias in model.biases if init == "xavier" else ():
        bias[:] = random.standard_normal(len(bias), dtype=np.float32)
    x = random.random((batch, sizes[0]), dtype=np.float32).astype(np.float64)
    return model, x, random.integers(0, sizes[-1], batch)


def by_autograd(model: MLP, x: np.ndarray, labels: np.ndarray, dtype: torch.dtype) -> tuple:
    """PyTorch's loss and gradient, summed over samples."""
    layers: list[torch.nn.Module] = []
    for m, n in pairwise(model.sizes):
        layers += [torch.nn.Linear(m, n), torch.nn.Sigmoid()]
    network = torch.nn.Sequential(*layers[:-1]).to(dtype)
    copy_weights(model, network)
    z, targets = network(torch.from_numpy(x).to(dtype)), torch.from_numpy(labels)
    if model.loss == "cross-entropy":
        loss = torch.nn.functional.cross_entropy(z, targets, reduction="sum")
    else:
        one_hot = torch.nn.functional.one_hot(targets, z.shape[1]).to(dtype)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(z, one_hot, reduction="sum")
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    # PyTorch's weights are (out, in).
    return loss.item(), np.concatenate([gradient.numpy().T.ravel() for gradient in gradients])


def assert_as_accurate(found: tuple, model: MLP, x, labels, dtype: torch.dtype = torch.float64) -> None:
    """An error of the loss and the gradient of at most twice that of autograd in ``dtype``.

    Each number ends a chain of sums, over each layer's inputs and over the samples.
    """
    exact = by_autograd(model, x, labels, torch.float64)
    for actual, native, expected in zip(found, by_autograd(model, x, labels, dtype), exact, strict=True):
        roundings = 2 * (sum(model.sizes) + len(x))
        assert_accurate(*(torch.as_tensor(t, dtype=dtype) for t in (actual, native)), expected, roundings)


@pytest.mark.parametrize("init", ["xavier", "zeros"])
@pytest.mark.parametrize("loss", ["cross-entropy", "bce"])
@pytest.mark.parametrize("sizes, batch", [((5, 3), 1), ((20, 8, 6, 10), 7), ((5, 4, 3), 0)], ids=str)
def test_gradients_are_autograds(sizes, batch, loss, init):
    model, x, labels = problem(sizes, batch, loss, init)
    assert_as_accurate(model.gradients(x, labels), model, x, labels)
    if batch:
        other = problem(sizes, batch, loss, init)[0]
        other.parameters += 1e-9 * np.arange(len(other.parameters))
        with pytest.raises(AssertionError):
            assert_as_accurate(other.gradients(x, labels), model, x, labels)


def joined(loss, weights, biases) -> tuple:
    """A loss, and one vector of all parameters."""
    return loss, np.concatenate([np.ravel(t) for layer in zip(weights, biases, strict=True) for t in layer])


def in_numpy(model: MLP, x, labels) -> tuple:
    narrow = MLP(model.sizes)
    narrow.parameters[:] = model.parameters
    return narrow.gradients(x.astype(np.float32), labels)


def in_python(model: MLP, x, labels) -> tuple:
    parts = ([t.tolist() for t in own] for own in (model.weights, model.biases))
    return joined(*pure_python.gradients(*parts, x.tolist(), labels.tolist()))


def by_numba(model: MLP, x, labels) -> tuple:
    """`PARALLEL` takes twice as long to compile; the ladder checks its losses."""
    parts = ([t.astype(np.float32) for t in own] for own in (model.weights, model.biases))
    return joined(*numba_njit.gradients(numba_njit.SERIAL, *parts, x.astype(np.float32), labels))


@pytest.mark.parametrize("level", [in_numpy, in_python, by_numba])
def test_gradients_on_every_level(level):
    model, x, labels = problem()
    dtype = torch.float64 if level is in_python else torch.float32
    found = level(model, x, labels)
    assert_as_accurate(found, model, x, labels, dtype)
    assert level is in_python or found[1].dtype == np.float32
    x[0, 0] += 0.01
    with pytest.raises(AssertionError):
        assert_as_accurate(found, model, x, labels, dtype)


def test_pure_python_descends():
    model, x, labels = problem((5, 4, 3))
    weights, biases = ([t.tolist() for t in own] for own in (model.weights, model.biases))
    loss, *gradient = pure_python.gradients(weights, biases, x.tolist(), labels.tolist())
    pure_python.descend(weights, biases, *gradient, 0.25)
    expected = model.parameters - 0.25 * joined(loss, *gradient)[1]
    np.testing.assert_array_equal(joined(loss, weights, biases)[1], expected)


# The network and how it descends


def test_xavier():
    first, second = MLP([300, 200, 100]).weights
    for weight, variance in ((first, 2 / 500), (second, 2 / 300)):
        count = weight.size
        # Of a normal variable: the mean's deviation is σ/√n, that of the variance σ²·√(2/n); five of each.
        assert abs(weight.mean()) < 5 * (variance / count) ** 0.5
        assert abs(weight.var() / variance - 1) < 5 * (2 / count) ** 0.5
    np.testing.assert_array_equal(MLP([4, 3], seed=1).parameters, MLP([4, 3], seed=1).parameters)
    assert not np.array_equal(MLP([4, 3], seed=1).parameters, MLP([4, 3], seed=2).parameters)
    assert not np.concatenate(MLP([4, 3, 2]).biases).any()


def test_parameters_are_one_vector():
    model = MLP((4, 3, 2), init="zeros")
    for number, view in enumerate((*model.weights, *model.biases), 1):
        view += number
    np.testing.assert_array_equal(model.parameters, np.repeat([1, 3, 2, 4], [12, 3, 6, 2]))


@pytest.mark.parametrize("flag", ["loss", "init"])
def test_unknown_names_are_refused(flag):
    with pytest.raises(ValueError, match=f"{flag} is 'mse', expected"):
        MLP((4, 3), **{flag: "mse"})


@pytest.mark.parametrize("loss, expected", [("cross-entropy", np.log(3)), ("bce", 5 * np.log(2))])
def test_losses_of_large_outputs(loss, expected):
    """Right labels of probability 1 have the loss 0; outputs of 0 have that of equal probabilities."""
    z = np.array([[1e4, -1e4, -1e4], [-1e30, 1e30, -1e30], [0, 0, 0]], np.float32)
    if loss == "bce":
        z[0, 1:] = 0
    found, delta = MLP((2, 3), loss=loss).loss_sum(z, np.array([0, 1, 2]))
    assert abs(found - expected) <= gamma(20, U32) * expected
    assert np.isfinite(delta).all()
    wrong, _ = MLP((2, 3), loss=loss).loss_sum(z, np.array([0, 2, 2]))
    assert wrong >= 1e30


def test_evaluate_counts():
    model, x, labels = problem((5, 4, 3))
    guesses = model.forward(x)[1].argmax(axis=1)
    loss, right = model.evaluate(x, guesses)
    assert (loss, right) == (model.loss_sum(model.forward(x)[1], guesses)[0], 7)
    assert model.evaluate(x, (guesses + 1) % 3)[1] == 0
    assert model.evaluate(x[:0], labels[:0]) == (0.0, 0)


@pytest.mark.parametrize("momentum, decay", [(0.9, 0.0), (0.5, 0.1)])
def test_sgd_is_torchs(momentum, decay):
    model = MLP((4, 3, 2), dtype=np.float64)
    weights, biases = ([torch.from_numpy(t.copy()) for t in own] for own in (model.weights, model.biases))
    groups = [{"params": weights, "weight_decay": decay}, {"params": biases, "weight_decay": 0.0}]
    theirs = torch.optim.SGD(groups, lr=0.1, momentum=momentum)
    ours = SGD(model, 0.1, momentum, decay)
    random = np.random.default_rng(0)
    for _ in range(5):
        gradient = random.standard_normal(model.parameters.size)
        ours.step(gradient)
        for parameters, own in zip((weights, biases), model.views(gradient), strict=True):
            for p, value in zip(parameters, own, strict=True):
                p.grad = torch.from_numpy(value)
        theirs.step()
    expected = torch.from_numpy(joined(0.0, weights, biases)[1])
    # A step has five roundings of numbers no larger than the parameters' largest.
    assert_accurate(torch.from_numpy(model.parameters), expected, expected.numpy(), roundings=5 * 5)


def test_batches_cover_each_sample_once_in_a_new_order():
    generator = np.random.default_rng(0)
    first, second = (list(numpy_mlp.batches(10, 4, generator)) for _ in range(2))
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert sorted(np.concatenate(first)) == list(range(10))
    again = np.concatenate(list(numpy_mlp.batches(10, 4, np.random.default_rng(0))))
    np.testing.assert_array_equal(np.concatenate(first), again)
    assert not np.array_equal(again, np.concatenate(second))
    assert not np.array_equal(again, np.arange(10))


# Kernels launched as in a first course


def launch(name: str, note: str, *shape: int) -> bool:
    """Whether the result is right. Memory that a launch leaves unwritten holds NaN or the largest integer."""
    torch.use_deterministic_algorithms(True)
    try:
        function = launch_shapes.SHAPES[name][note]
        if name == "matmul_t":
            x = normal(*shape)
            return check_matmul_t(function(torch.from_numpy(x)).numpy(), x)
        a, b = torch.from_numpy(np.random.default_rng(0).integers(-9, 9, (2, *shape), dtype=np.int32))
        a[0, 0], b[-1, -1] = -(2**31), 2**31 - 1
        return torch.equal(function(a, b), torch.maximum(a, b))
    finally:
        torch.use_deterministic_algorithms(False)


@test_kernels_interpreted.pytestmark
@pytest.mark.parametrize(
    "name, note", [(name, note) for name, ways in launch_shapes.SHAPES.items() for note in ways]
)
def test_launch_shapes(interpreter, name, note):
    for shape in ((1, 1), (67, 3), (4, 70)):
        assert interpreter(launch, name, note, *shape)


def test_a_single_program_of_1024_threads_compiles(monkeypatch):
    """For sm_90, whose registers the threads share."""
    launches = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **options: launches.append((grid, options))

    kernel = launch_shapes.matmul_t_rows_kernel
    monkeypatch.setattr(launch_shapes, "matmul_t_rows_kernel", Recorder())
    launch_shapes.matmul_t_by_one(torch.empty(1000, 1000, device="meta"))
    ((grid, options),) = launches
    warps = options.pop("num_warps")
    assert (grid, 32 * warps) == ((1,), 1024)
    types = ["*fp32", "*fp32", "i32", "i32", "i32", "constexpr", "constexpr"]
    source = ASTSource(kernel, dict(zip(kernel.arg_names, types, strict=True)), options)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    assert compiled.asm["cubin"]
