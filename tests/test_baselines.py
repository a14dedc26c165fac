# SPDX-License-Identifier: MIT
"""Tests that all baselines compute the same: integers exactly, other numbers within a derived bound.

A sum of k products in any order has an error of at most γ(k)·Σ|a·b|, where γ(k) = ku/(1 − ku) (Higham,
Accuracy and Stability of Numerical Algorithms, 2002, section 3.1). The bound for a network's gradient carries
this error from layer to layer.
"""

from itertools import pairwise

import numpy as np
import pytest
import test_kernels_interpreted
import torch
import triton
from test_kernels_compiled import Driver, meta

import torchpar

pytest.importorskip("numba", reason="Numba compiles the loops")
from torchpar.baselines import launch_shapes, numba_njit, numpy_mlp, pure_python
from torchpar.baselines.bridge import copy_weights
from torchpar.baselines.numpy_mlp import MLP, SGD

U32, U64 = 2.0**-24, 2.0**-53  # unit roundoffs
SIZES = [(1, 1), (4, 4), (5, 7), (67, 70), (129, 33)]


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


# Elementwise maximum


@pytest.mark.parametrize("level", levels("maximum"))
@pytest.mark.parametrize("shape", [(0, 3), *SIZES])
def test_maximum_of_whole_numbers_is_exact(level, shape):
    limits = np.iinfo(np.int32)
    values = np.array([limits.min, -7, -1, 0, 1, 255, limits.max], np.int32)  # few of them: many ties
    a, b = values[np.random.default_rng(0).integers(0, len(values), (2, *shape))]
    result = levels("maximum")[level](a, b).reshape(shape)
    np.testing.assert_array_equal(result, np.where(a > b, a, b))
    if level != "pure Python":
        assert result.dtype == np.int32
    if a.size > 2:
        assert not np.array_equal(result, a)
        assert not np.array_equal(result, b)


@pytest.mark.parametrize("level", levels("maximum"))
def test_maximum_of_floats_is_exact(level):
    a = np.array([[-1.5, 0.1, np.inf, 3e-45], [-np.inf, -0.25, 2.0, 1.0]], np.float32)
    b = np.array([[-1.0, 0.1, 5e30, 1e-45], [-3e38, -0.5, 2.0, 1.0000001]], np.float32)
    expected = np.array([[-1.0, 0.1, np.inf, 3e-45], [-3e38, -0.25, 2.0, 1.0000001]], np.float32)
    result = levels("maximum")[level](a, b)
    np.testing.assert_array_equal(result.astype(np.float32), expected)


# X·Xᵀ


def check_matmul_t(result, x) -> bool:
    exact = x.astype(np.float64)
    return within(result, exact @ exact.T, gamma(x.shape[1], U32) * np.abs(exact) @ np.abs(exact).T)


@pytest.mark.parametrize("level", levels("matmul_t"))
@pytest.mark.parametrize("n, k", SIZES)
def test_matmul_t(level, n, k):
    # Each level has numbers of its own: memory that it leaves unwritten may hold another's result.
    x = normal(n, k, seed=list(levels("matmul_t")).index(level))
    result = levels("matmul_t")[level](x)
    assert check_matmul_t(result, x)
    perturbed = x.copy()
    perturbed[-1, -1] += 0.01 + abs(x[-1]).sum()  # a number that the last tile has
    assert not check_matmul_t(levels("matmul_t")[level](perturbed), x)
    if level == "pure Python":
        np.testing.assert_array_equal(pure_python.matmul_t(x.tolist(), 2), result[:2])
    else:
        assert result.dtype == np.float32
    if "triangular" in level:
        np.testing.assert_array_equal(result, result.T)


@pytest.mark.parametrize("level", levels("matmul_t"))
def test_matmul_t_of_small_whole_numbers_is_exact(level):
    """In any order, as all sums are whole numbers below 2²⁴."""
    x = np.random.default_rng(0).integers(-9, 10, (70, 129)).astype(np.float32)
    np.testing.assert_array_equal(levels("matmul_t")[level](x), (x.astype(int) @ x.T.astype(int)))
    empty = levels("matmul_t")[level](np.zeros((3, 0), np.float32))
    np.testing.assert_array_equal(empty, np.zeros((3, 3)))
    assert pure_python.matmul_t([[2**60, 1], [1, 3]]) == [[2**120 + 1, 2**60 + 3], [2**60 + 3, 10]]


def test_loops_run_in_as_many_threads_as_are_asked_for():
    before = numba_njit.get_num_threads()
    x = normal(129, 33)
    with numba_njit.threads(1):
        assert numba_njit.get_num_threads() == 1
        assert check_matmul_t(numba_njit.PARALLEL.matmul_t_triangular(x), x)
    assert numba_njit.get_num_threads() == before


# sigmoid(X·Wᵀ + b)


def check_linear_sigmoid(result, x, weight, bias) -> bool:
    """The slope of the sigmoid is at most 1/4; its own roundings come to less than 8u."""
    x, weight, bias = (t.astype(np.float64) for t in (x, weight, bias))
    magnitude = np.abs(x) @ np.abs(weight).T + np.abs(bias)
    z = torch.from_numpy(x @ weight.T + bias)
    return within(result, z.sigmoid().numpy(), gamma(x.shape[1] + 1, U32) * magnitude / 4 + 8 * U32)


@pytest.mark.parametrize("level", levels("linear_sigmoid"))
@pytest.mark.parametrize("m, k, n", [(1, 1, 1), (5, 0, 3), (7, 33, 5), (1, 127, 129)])
def test_linear_sigmoid(level, m, k, n):
    x, weight, bias = normal(m, k), normal(n, k, seed=1), normal(n, seed=2)
    function = levels("linear_sigmoid")[level]
    assert check_linear_sigmoid(function(x, weight, bias), x, weight, bias)
    perturbed = bias.copy()
    perturbed[-1] += 0.01 + 0.02 * abs(bias[-1])
    saturated = k > 50  # a slope of 0 may hide a difference in one number, not in a column
    assert saturated or not check_linear_sigmoid(function(x, weight, perturbed), x, weight, bias)
    assert not check_linear_sigmoid(function(x, weight, bias + 1), x, weight, bias)


@pytest.mark.parametrize("level", levels("linear_sigmoid"))
def test_sigmoid_of_large_numbers_is_0_or_1(level):
    """And no warning: pytest turns it into an error."""
    x = np.array([[-3e38], [-1e4], [-110], [-30], [0], [30], [1e4], [3e38]], np.float32)
    ones, zero = np.ones((1, 1), np.float32), np.zeros(1, np.float32)
    result = levels("linear_sigmoid")[level](x, ones, zero)
    assert check_linear_sigmoid(result, x, ones, zero)
    assert (result[:3] >= 0).all()
    assert (result[:3] <= 1e-30).all()
    assert result[4] == 0.5
    assert (result[6:] == 1).all()


# Backpropagation by hand


def error_bounds(model: MLP, x: np.ndarray, labels: np.ndarray, u: float) -> tuple[float, np.ndarray]:
    """Return bounds of the rounding errors of the loss and the gradient, for unit roundoff u.

    Each line is the derivative of a line of backpropagation plus its own roundings; e_y bounds the error of
    y. Products of errors are left out, and a hundredth is added for them.

    Args:
        model: in float64.
    """
    inputs, z = model.forward(x)
    errors = [np.zeros_like(x)]
    for i, (weight, bias) in enumerate(zip(model.weights, model.biases, strict=True)):
        size, a, e_a = abs(weight), inputs[i], errors[i]
        e_z = gamma(len(weight) + 1, u) * (abs(a) @ size + abs(bias)) + e_a @ size
        errors.append(e_z / 4 + 8 * u)  # of its sigmoid
    delta = model.loss_sum(z, labels)[1]
    targets = np.eye(z.shape[1])[labels]
    n, classes = z.shape
    if model.loss == "cross-entropy":
        shifted = z - z.max(axis=1, keepdims=True)
        e_shifted = 2 * e_z.max(axis=1, keepdims=True) + u * abs(shifted).max(axis=1, keepdims=True)
        terms = np.log(np.exp(shifted).sum(axis=1)) - (shifted * targets).sum(axis=1)
        e_loss = (e_shifted[:, 0] + (classes + 8) * u).sum() + gamma(2 * n + 8, u) * terms.sum()
        e_delta = (2 * e_shifted + (classes + 8) * u) * (delta + targets) + u
    else:
        terms = np.logaddexp(0, z) + abs(targets * z)
        e_loss = e_z.sum() + gamma(n * classes + 8, u) * terms.sum()
        e_delta = errors[-1] + u
    e_gradient = np.empty_like(model.parameters)
    e_weights, e_biases = model.views(e_gradient)
    for i in reversed(range(len(model.weights))):
        a, e_a = inputs[i], errors[i]
        e_weights[i][:] = gamma(n, u) * abs(a).T @ abs(delta) + e_a.T @ abs(delta) + abs(a).T @ e_delta
        e_biases[i][:] = gamma(n, u) * abs(delta).sum(axis=0) + e_delta.sum(axis=0)
        if i > 0:
            back, size, slope = delta @ model.weights[i].T, abs(model.weights[i]).T, a * (1 - a)
            roundings = gamma(size.shape[0] + 3, u) * abs(delta) @ size
            e_delta = (roundings + e_delta @ size) * slope + abs(back) * (e_a + 2 * u)
            delta = back * slope
    return 1.01 * e_loss, 1.01 * e_gradient


def by_autograd(model: MLP, x: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """PyTorch's loss and gradient, summed over samples, in float64."""
    layers: list[torch.nn.Module] = []
    for m, n in pairwise(model.sizes):
        layers += [torch.nn.Linear(m, n), torch.nn.Sigmoid()]
    network = torch.nn.Sequential(*layers[:-1]).double()
    copy_weights(model, network)
    z, targets = network(torch.from_numpy(x)), torch.from_numpy(labels)
    if model.loss == "cross-entropy":
        loss = torch.nn.functional.cross_entropy(z, targets, reduction="sum")
    else:
        one_hot = torch.nn.functional.one_hot(targets, z.shape[1]).double()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(z, one_hot, reduction="sum")
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    # PyTorch's weights are (out, in).
    return loss.item(), np.concatenate([gradient.numpy().T.ravel() for gradient in gradients])


def problem(sizes, batch, loss="cross-entropy", init="xavier", dtype=np.float64) -> tuple:
    """A network with biases too, and a batch; all of them numbers that float32 has."""
    random = np.random.default_rng(1)
    model = MLP(sizes, loss=loss, init=init, dtype=dtype)
    model.parameters[:] = model.parameters.astype(np.float32)
    if init == "xavier":
        for bias in model.biases:
            bias[:] = random.standard_normal(len(bias), dtype=np.float32)
    x = random.random((batch, sizes[0]), dtype=np.float32).astype(dtype)
    return model, x, random.integers(0, sizes[-1], batch)


@pytest.mark.parametrize("init", ["xavier", "zeros"])
@pytest.mark.parametrize("loss", ["cross-entropy", "bce"])
@pytest.mark.parametrize("batch", [0, 1, 7])
@pytest.mark.parametrize("sizes", [(5, 3), (20, 8, 6, 10)], ids=str)
def test_gradients_are_autograds(sizes, batch, loss, init):
    model, x, labels = problem(sizes, batch, loss, init)
    expected_loss, expected = by_autograd(model, x, labels)
    e_loss, e_gradient = error_bounds(model, x, labels, U64)
    found_loss, gradient = model.gradients(x, labels)
    assert abs(found_loss - expected_loss) <= 2 * e_loss  # both of them round
    assert within(gradient, expected, 2 * e_gradient)
    if batch:
        model.parameters += 1e-9 * np.arange(len(gradient))
        assert not within(model.gradients(x, labels)[1], expected, 2 * e_gradient)


@pytest.mark.parametrize("level", ["NumPy", "pure Python", "njit"])
@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("sizes", [(5, 3), (33, 9, 6, 10)], ids=str)
def test_gradients_on_every_level(level, batch, sizes):
    exact, x, labels = problem(sizes, batch)
    model = MLP(sizes)
    model.parameters[:] = exact.parameters

    def compute(x):
        x32 = x.astype(np.float32)
        if level == "NumPy":
            return model.gradients(x32, labels)
        if level == "pure Python":
            parts = ([t.tolist() for t in own] for own in (model.weights, model.biases))
            loss, *found = pure_python.gradients(*parts, x32.tolist(), labels.tolist())
        else:
            # `PARALLEL` takes twice as long to compile; the ladder checks its losses.
            loss, *found = numba_njit.gradients(numba_njit.SERIAL, model.weights, model.biases, x32, labels)
            assert {t.dtype for t in (*found[0], *found[1])} == {np.dtype(np.float32)}
        return loss, np.concatenate([np.ravel(t) for layer in zip(*found, strict=True) for t in layer])

    e_loss, e_gradient = error_bounds(exact, x, labels, U64 if level == "pure Python" else U32)
    if level == "pure Python":
        e_loss, e_gradient = 2 * e_loss, 2 * e_gradient  # what it is compared with rounds as it does
    expected_loss, expected = exact.gradients(x, labels)
    loss, gradient = compute(x)
    assert abs(loss - expected_loss) <= e_loss
    assert within(gradient, expected, e_gradient)
    x[0, 0] += 0.01
    assert not within(compute(x)[1], expected, e_gradient)


def test_pure_python_descends():
    model, x, labels = problem((5, 4, 3), 7)
    weights, biases = ([t.tolist() for t in own] for own in (model.weights, model.biases))
    loss, *found = pure_python.gradients(weights, biases, x.tolist(), labels.tolist())
    pure_python.descend(weights, biases, *found, 0.25)
    expected = model.parameters - 0.25 * model.gradients(x, labels)[1]
    parts = (np.ravel(t) for layer in zip(weights, biases, strict=True) for t in layer)
    bound = 2 * (0.25 * error_bounds(model, x, labels, U64)[1] + 2 * U64 * (1 + abs(expected)))
    assert within(np.concatenate(list(parts)), expected, bound)
    assert not within(model.parameters, expected, bound)
    assert loss > pure_python.gradients(weights, biases, x.tolist(), labels.tolist())[0]


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
    assert model.parameters.size == 4 * 3 + 3 + 3 * 2 + 2
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
    model, x, labels = problem((5, 4, 3), 7)
    guesses = model.forward(x)[1].argmax(axis=1)
    loss, right = model.evaluate(x, guesses)
    assert (loss, right) == (model.loss_sum(model.forward(x)[1], guesses)[0], 7)
    assert model.evaluate(x, (guesses + 1) % 3)[1] == 0
    assert model.evaluate(x[:0], labels[:0]) == (0.0, 0)


@pytest.mark.parametrize("momentum, decay", [(0.0, 0.0), (0.9, 0.0), (0.5, 0.1)])
def test_sgd_is_torchs(momentum, decay):
    """Five steps of a few roundings each, of sums whose terms' sizes follow the same recursion."""
    model, magnitudes = MLP((4, 3, 2), dtype=np.float64), MLP((4, 3, 2), dtype=np.float64)
    magnitudes.parameters[:] = abs(model.parameters)
    weights, biases = ([torch.from_numpy(t.copy()) for t in own] for own in (model.weights, model.biases))
    groups = [{"params": weights, "weight_decay": decay}, {"params": biases, "weight_decay": 0.0}]
    theirs = torch.optim.SGD(groups, lr=0.1, momentum=momentum)
    ours, sizes = SGD(model, 0.1, momentum, decay), SGD(magnitudes, -0.1, momentum, decay)
    random = np.random.default_rng(0)
    for _ in range(5):
        gradient = random.standard_normal(model.parameters.size)
        ours.step(gradient)
        sizes.step(abs(gradient))
        for parameters, own in zip((weights, biases), model.views(gradient), strict=True):
            for p, value in zip(parameters, own, strict=True):
                p.grad = torch.from_numpy(value)
        theirs.step()
    expected = np.concatenate(
        [t.numpy().ravel() for layer in zip(weights, biases, strict=True) for t in layer]
    )
    bound = 2 * gamma(5 * 5, U64) * magnitudes.parameters
    assert within(model.parameters, expected, bound)
    ours.step(1e-9 * gradient)
    assert not within(model.parameters, expected, bound)


@pytest.mark.parametrize("samples, batch_size, sizes", [(10, 4, [4, 4, 2]), (8, 4, [4, 4]), (3, 5, [3])])
def test_batches_cover_each_sample_once_in_a_new_order(samples, batch_size, sizes):
    generator = np.random.default_rng(0)
    first, second = (list(numpy_mlp.batches(samples, batch_size, generator)) for _ in range(2))
    assert [len(batch) for batch in first] == sizes
    assert sorted(np.concatenate(first)) == list(range(samples))
    again = np.concatenate(list(numpy_mlp.batches(samples, batch_size, np.random.default_rng(0))))
    np.testing.assert_array_equal(np.concatenate(first), again)
    if samples > 5:
        assert not np.array_equal(again, np.concatenate(second))
        assert not np.array_equal(again, np.arange(samples))


# Kernels launched as in a first course


class WithoutLastProgram:
    """A broken launcher: its grid is one program short."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.kernel[(grid[0] - 1,)]


def poisoned(function, *args):
    """Return the result; memory that the function leaves unwritten holds NaN or the largest integer."""
    torch.use_deterministic_algorithms(True)
    try:
        return function(*args)
    finally:
        torch.use_deterministic_algorithms(False)


def launch_maximum(shape) -> bool:
    a, b = torch.from_numpy(np.random.default_rng(0).integers(-9, 9, (2, *shape), dtype=np.int32))
    a[0, 0], b[-1, -1] = -(2**31), 2**31 - 1
    (function,) = launch_shapes.SHAPES["maximum"].values()
    result = poisoned(function, a, b)
    assert result.dtype == torch.int32
    return torch.equal(result, torch.maximum(a, b))


def launch_matmul_t(note: str, n: int, k: int) -> bool:
    x = normal(n, k)
    result = poisoned(launch_shapes.SHAPES["matmul_t"][note], torch.from_numpy(x))
    assert result.dtype == torch.float32
    return check_matmul_t(result.numpy(), x)


def launch_broken() -> list[bool]:
    names = ("maximum_row_kernel", "matmul_t_rows_kernel")
    kernels = {name: getattr(launch_shapes, name) for name in names}
    try:
        for name, kernel in kernels.items():
            setattr(launch_shapes, name, WithoutLastProgram(kernel))
        return [launch_maximum((3, 5)), launch_matmul_t("a program per row", 3, 5)]
    finally:
        for name, kernel in kernels.items():
            setattr(launch_shapes, name, kernel)


interpreted = test_kernels_interpreted.pytestmark


@interpreted
@pytest.mark.parametrize("shape", [(1, 1), (5, 127), (129, 33)])
def test_maximum_by_rows(interpreter, shape):
    assert interpreter(launch_maximum, shape)


@interpreted
@pytest.mark.parametrize("note", launch_shapes.SHAPES["matmul_t"])
@pytest.mark.parametrize("n, k", [(1, 1), (4, 64), (65, 3), (67, 70)])
def test_matmul_t_by_programs(interpreter, note, n, k):
    assert interpreter(launch_matmul_t, note, n, k)


@interpreted
def test_a_program_too_few_is_noticed(interpreter):
    assert interpreter(launch_broken) == [False, False]


@pytest.mark.parametrize("name", ["maximum_row_kernel", "matmul_t_rows_kernel"])
def test_launch_shapes_compile(monkeypatch, name):
    """Compile for sm_90, at the ladder's sizes."""
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver(90))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    compiled = []

    class Compile:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **options: compiled.append(self.kernel.warmup(*args, grid=grid, **options))

    monkeypatch.setattr(launch_shapes, name, Compile(getattr(launch_shapes, name)))
    if name == "maximum_row_kernel":
        launch_shapes.maximum_by_rows(*(meta(1000, 1000, dtype=torch.int32) for _ in range(2)))
    else:
        launch_shapes.matmul_t_by_rows(meta(1000, 1000, dtype=torch.float32))
        launch_shapes.matmul_t_by_one(meta(1000, 1000, dtype=torch.float32))
        assert [kernel.metadata.num_warps * 32 for kernel in compiled] == [1024, 1024]
    assert all(kernel.asm["cubin"] for kernel in compiled)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(
    "name, note", [(name, note) for name, ways in launch_shapes.SHAPES.items() for note in ways]
)
def test_launch_shapes_on_a_gpu(name, note):
    function = launch_shapes.SHAPES[name][note]
    if name == "maximum":
        a, b = torch.randint(-9, 9, (2, 129, 1000), dtype=torch.int32, device="cuda")
        assert torch.equal(function(a, b), torch.maximum(a, b))
    else:
        x = normal(129, 1000)
        assert check_matmul_t(function(torch.from_numpy(x).cuda()).cpu().numpy(), x)
