# SPDX-License-Identifier: MIT
"""Check a student's NumPy network: ``python -m torchpar exercises --with utils.py``.

The functions are those of a course's first assignment. Each is compared with a plain formula, at
the sizes of a network [784, 30, 10]. Then the network is trained through them on MNIST, in the
student's process, and the weights of each epoch are judged here. A program of mpi4py is checked by
`torchpar.baselines.students_mpi`.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from torchpar.baselines import numpy_mlp, students_mpi
from torchpar.baselines.grader import (
    OPERATORS,
    Function,
    Wrong,
    as_array,
    check_unchanged,
    compare,
)
from torchpar.baselines.students_process import StudentsFile, Take
from torchpar.console import say_progress
from torchpar.data.files import Images, read
from torchpar.errors import ConfigError, TorchparError, first_line
from torchpar.parallel.launch.guard import TooSlow

Array = numpy_mlp.Array

SIZES = (784, 30, 10)
IN_CHECKOUT = Path(__file__).parents[2] / "examples" / "data"
DATA = IN_CHECKOUT if IN_CHECKOUT.is_dir() else Path("data")  # no wheel has the digits
EPOCHS, BATCH_SIZE, LR = 20, 32, 1.0
ASKED = 0.95  # of the test images
# σ has a relative error of a few roundings in whatever form; float32 has 2⁻²⁴.
TOLERANCE = 16 * 2.0**-24
# Some libraries cut the normal distribution at twice its deviation, which becomes so much smaller.
CUT, OF_CUT = 2.0, 0.8796256610342398


class Verdict(NamedTuple):
    """What was found of a function; a remark says what a right one chose."""

    name: str
    is_right: bool
    text: str

    def __str__(self) -> str:
        verdict = "right" if self.is_right else "not right"
        return f"{self.name} is {verdict}{': ' * bool(self.text)}{self.text}"


# The checks: each returns a remark, or raises Wrong.


def check_sigmoid(sigmoid: Function) -> str:
    z = np.array([[-1000.0, -30.0, -1.5, 0.0], [0.25, 2.0, 30.0, 1000.0]])
    expected, number = numpy_mlp.sigmoid(z), numpy_mlp.sigmoid(np.array(0.5))
    compare(as_array(unchanged(sigmoid, z)), expected, near(expected), "at z", z)
    compare(as_array(sigmoid(0.5)), number, near(number), "of a number")
    return ""


def check_sigmoid_prime(sigmoid_prime: Function) -> str:
    """The assignment's takes z. One that takes a = σ(z), as `numpy_mlp`'s, is told apart."""
    z = np.array([[-30.0, -1.5, 0.0], [0.25, 2.0, 30.0]])
    found = as_array(unchanged(sigmoid_prime, z))
    if found.shape == z.shape and np.allclose(found, z * (1 - z), rtol=1e-6):
        raise Wrong(
            "it computes a·(1 − a) of its argument a = σ(z), as torchpar's does; the assignment's "
            "takes z"
        )
    expected = numpy_mlp.sigmoid_prime(numpy_mlp.sigmoid(z))
    compare(found, expected, near(expected), "at z", z)
    return "it takes z"


def check_random_weights(random_weights: Function) -> str:
    """Xavier's rules draw normal or uniform numbers with variances of 1/(3m) to 2/(m + n), or with
    n in m's place."""
    weights = check_shapes(random_weights(list(SIZES)), weight_shapes())
    for i, weight in enumerate(weights):
        what = f"the numbers of weights[{i}]"
        if not np.isfinite(weight).all():
            raise Wrong(f"{what} are not finite")
        spread, (m, n) = float(weight.std()), weight.shape
        if abs(float(weight.mean())) > 6 * spread / weight.size**0.5:
            raise Wrong(f"weights[{i}] have the mean {weight.mean():.3g}, expected 0")
        # Half and twice the rules', with 10 %, since the 300 numbers of the last layer have a
        # spread of 3 %. They are compared as printed.
        bounds = 0.45 * (1 / (3 * max(m, n))) ** 0.5, 2 * (1 / min(m, n)) ** 0.5
        least, most = (float(f"{one:.2g}") for one in bounds)
        if not least <= spread <= most:
            raise Wrong(
                f"{what} have the standard deviation {spread:.3g}, expected {least} to {most}, as "
                "Xavier's rule draws them"
            )
        off, bound = distance(weight / spread), distance_bound(weight.size)
        if off > bound:
            raise Wrong(
                f"{what} are neither normal nor uniform, as Xavier's rules draw them: their "
                f"distribution function is off by {off:.2g}, expected at most {bound:.2g}"
            )
        for pairs, of in (
            ((weight[1:], weight[:-1]), "rows"),
            ((weight.T[1:], weight.T[:-1]), "columns"),
        ):
            correlation = float((pairs[0] * pairs[1]).mean()) / spread**2
            if abs(correlation) > 6 / pairs[0].size ** 0.5:
                raise Wrong(
                    f"neighbouring {of} of weights[{i}] have the correlation {correlation:.2g}, "
                    "expected 0; draw each number by itself"
                )
    return ""


def distance(x: Array) -> float:
    """Kolmogorov's distance sup |Fₙ − F| of numbers of variance 1 from the nearest of the normal
    distribution, the uniform one, and the normal one that is cut at twice its deviation."""
    ordered = np.sort(x.ravel().astype(np.float64))
    uniform = np.clip(0.5 + ordered / 12**0.5, 0, 1)
    outside = normal(np.array(-CUT))
    cut = np.clip((normal(ordered * OF_CUT) - outside) / (1 - 2 * outside), 0, 1)
    steps = np.arange(len(ordered) + 1) / len(ordered)
    return min(
        float(np.maximum(steps[1:] - f, f - steps[:-1]).max())
        for f in (normal(ordered), uniform, cut)
    )


def normal(x: Array) -> Array:
    """The distribution function Φ(x) of the standard normal distribution."""
    erf: Array = np.vectorize(math.erf, otypes=[float])(x / 2**0.5)
    return 0.5 * (1 + erf)


def distance_bound(count: int) -> float:
    """The distance that so many right numbers exceed with a probability of 10⁻⁹ at most.

    P(sup |Fₙ − F| > ε) ≤ 2·exp(−2nε²) (Dvoretzky, Kiefer and Wolfowitz; the constant is Massart's,
    1990). That the variance is the numbers' own makes the distance smaller.
    """
    return math.sqrt(math.log(2e9) / (2 * count))


def check_zeros_weights(zeros_weights: Function) -> str:
    check_zeros(check_shapes(zeros_weights(list(SIZES)), weight_shapes()))
    return ""


def check_zeros_biases(zeros_biases: Function) -> str:
    """The function takes the sizes of the biases, or those of the network, whose first has none."""
    found = zeros_biases(list(SIZES))
    is_whole = isinstance(found, list | tuple) and len(found) == len(SIZES)
    sizes = SIZES if is_whole else SIZES[1:]
    check_zeros(check_shapes(found, [(size,) for size in sizes]))
    return "a vector for each size" if is_whole else "no vector for the first size"


def check_create_batches(create_batches: Function) -> str:
    """23 samples in batches of 5: the rest of 3 is a batch, or the last batch takes it. 20 samples
    have no rest."""
    counts = check_batches(create_batches, 23, 5)
    check_batches(create_batches, 20, 5)
    return f"the last of {len(counts)} batches has {counts[-1]} of 23 samples"


def check_batches(create_batches: Function, samples: int, size: int) -> list[int]:
    """Return how many samples each batch has."""
    data = np.arange(samples * 4.0).reshape(samples, 4)
    labels = np.arange(samples) * 10
    found = unchanged(create_batches, data, labels, size)
    try:
        batches = [(as_array(x), as_array(y)) for x, y in found]
    except (TypeError, ValueError) as e:
        raise Wrong(f"expected a list of pairs (data, labels): {e}") from None
    counts = [len(x) for x, _ in batches]
    if [len(y) for _, y in batches] != counts:
        raise Wrong("the data and the labels of a batch differ in number")
    seen = sorted(int(label) // 10 for _, y in batches for label in y.ravel())
    if seen != list(range(samples)):
        missing = sorted(set(range(samples)) - set(seen))
        what = f"samples {missing} are in no batch" if missing else "a sample is in two batches"
        raise Wrong(f"{what}; the batches have {counts} of {samples} samples")
    whole, rest = divmod(samples, size)
    if counts not in ([size] * whole + [rest] * bool(rest), [size] * (whole - 1) + [size + rest]):
        last = ", and the remainder last" if rest else ""
        raise Wrong(f"the batches of {samples} samples have {counts}, expected {size} each{last}")
    for x, y in batches:
        if not np.array_equal(x, data[y.ravel() // 10]):
            raise Wrong("a label is not that of its sample")
    return counts


def check_add_elementwise(add_elementwise: Function) -> str:
    first = [np.arange(6.0).reshape(2, 3), np.array([0.5])]
    second = [np.full((2, 3), 10.0), np.array([-2.0])]
    found = unchanged(add_elementwise, first, second)
    arrays = check_shapes(found, [(2, 3), (1,)])
    for i, (mine, a, b) in enumerate(zip(arrays, first, second, strict=True)):
        compare(mine, a + b, 0 * a, f"of list element {i}")
    return ""


CHECKS: dict[str, Callable[[Function], str]] = {
    "sigmoid": check_sigmoid,
    "sigmoid_prime": check_sigmoid_prime,
    "random_weights": check_random_weights,
    "zeros_weights": check_zeros_weights,
    "zeros_biases": check_zeros_biases,
    "create_batches": check_create_batches,
    "add_elementwise": check_add_elementwise,
}


def unchanged(function: Function, *arguments: Any) -> Any:
    """Call a function with copies, and raise Wrong if it changes one of them."""
    given = deepcopy(arguments)
    found = function(*given)
    check_unchanged(arguments, given)
    return found


def weight_shapes() -> list[tuple[int, ...]]:
    return list(pairwise(SIZES))


def near(expected: Array) -> Array:
    """The bound of a few roundings. Below 1e-12 a form such as a·(1 − a) has no right digits."""
    return TOLERANCE * np.abs(expected) + 1e-12


def check_shapes(found: object, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
    """The arrays of a list of these shapes."""
    if not isinstance(found, list | tuple):
        raise Wrong(f"it returns {type(found).__name__}, expected a list of arrays")
    arrays = [as_array(one) for one in found]
    if (have := [one.shape for one in arrays]) != list(shapes):
        raise Wrong(f"the arrays have shapes {have}, expected {list(shapes)}")
    return arrays


def check_zeros(arrays: Sequence[Array]) -> None:
    for i, one in enumerate(arrays):
        compare(one, zeros := np.zeros(one.shape), zeros, f"array {i}")


# Training


def layers(found: Sequence[Any]) -> list[Array]:
    """The arrays of a list; what the checks take as an array may be a list, here too."""
    return [as_array(one) for one in found]


def layers_of_biases(found: Sequence[Any]) -> list[Array]:
    """The biases of the layers; the input, of which some functions make one, has none."""
    return layers(found)[-(len(SIZES) - 1) :]


def batches(found: Iterable[tuple[Any, Any]]) -> list[tuple[Array, Array]]:
    """The inputs and the labels of each batch."""
    return [(as_array(inputs), as_array(labels).ravel()) for inputs, labels in found]


# Arrays of what each function returns.
TAKES: dict[str, Take] = {
    "sigmoid": as_array,
    "sigmoid_prime": as_array,
    "random_weights": layers,
    "zeros_weights": layers,
    "zeros_biases": layers_of_biases,
    "create_batches": batches,
    "add_elementwise": layers,
}


def train(
    student: Callable[[str, Take], Function], features: Array, labels: Array
) -> Iterator[tuple[list[Array], list[Array]]]:
    """Train a network by the student's functions; yield weights and biases after each epoch.

    Descent of the binary cross-entropy, whose gradient by the last z is a − t. Gradients of a
    batch's samples are means; `add_elementwise` adds them to zeros, and takes the step.

    Args:
        student: returns the function of a name, whose results are taken.
        features, labels: those of `Images`.
    """
    f = {name: student(name, take) for name, take in TAKES.items()}
    x = Images(features, labels, ()).inputs()
    drawn, zeros = f["random_weights"](list(SIZES)), f["zeros_biases"](list(SIZES))
    weights, biases = ([np.array(one, np.float32) for one in two] for two in (drawn, zeros))
    while True:
        for inputs, classes in say_progress(f["create_batches"](x, labels, BATCH_SIZE), "batches"):
            zs, activations = forward(f["sigmoid"], weights, biases, inputs)
            delta = activations[-1] - np.eye(SIZES[-1], dtype=np.float32)[classes]
            d_weights, d_biases = f["zeros_weights"](list(SIZES)), f["zeros_biases"](list(SIZES))
            for i in reversed(range(len(weights))):
                d_weights[i] = activations[i].T @ delta * np.float32(-LR / len(inputs))
                d_biases[i] = delta.sum(0) * np.float32(-LR / len(inputs))
                if i > 0:
                    delta = delta @ weights[i].T * f["sigmoid_prime"](zs[i - 1])
            weights = f["add_elementwise"](weights, d_weights)
            biases = f["add_elementwise"](biases, d_biases)
        yield weights, biases


def forward(
    sigmoid: Function, weights: Sequence[Array], biases: Sequence[Array], x: Array
) -> tuple[list[Array], list[Array]]:
    """The z of each layer, and the inputs of each layer with the output."""
    zs, activations = list[Array](), [x]
    for weight, bias in zip(weights, biases, strict=True):
        zs.append(activations[-1] @ weight + bias)
        activations.append(sigmoid(zs[-1]))
    return zs, activations


def check_training(epochs: Iterable[object], test: Images) -> Verdict:
    """Judge the network after each epoch until `ASKED` is reached, for at most `EPOCHS`.

    Args:
        epochs: what the student's process sends as weights and biases.

    Raises:
        Wrong: it is something else.
    """
    x, accuracies = test.inputs(), list[float]()
    for epoch, found in zip(range(1, EPOCHS + 1), epochs, strict=False):
        output = forward(numpy_mlp.sigmoid, *parameters(found, epoch), x)[1][-1]
        accuracies.append(float((np.argmax(output, 1) == test.labels).mean()))
        print(f"epoch {epoch}: accuracy {accuracies[-1]:.4f}", flush=True)
        if accuracies[-1] > ASKED:
            break
    text = f"accuracy {accuracies[-1]:.4f} after epoch {len(accuracies)}"
    return Verdict("the training", accuracies[-1] > ASKED, f"{text}; above {ASKED:.2f} is asked")


def parameters(found: Any, epoch: int) -> tuple[list[Array], list[Array]]:
    """Finite weights and biases of the network, in float32."""
    weights, biases = found if isinstance(found, list | tuple) and len(found) == 2 else (None, None)
    return (
        finite(f"weights after epoch {epoch}", weights, weight_shapes()),
        finite(f"biases after epoch {epoch}", biases, [(size,) for size in SIZES[1:]]),
    )


def finite(what: str, found: object, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
    """Arrays of these shapes, which hold finite numbers, in float32."""
    try:
        arrays = check_shapes(found, shapes)
        for i, one in enumerate(arrays):
            if one.dtype.kind not in "biuf":
                raise Wrong(f"array {i} has dtype {one.dtype}, expected numbers")
            arrays[i] = one.astype(np.float32)
            if not np.isfinite(arrays[i]).all():
                raise Wrong(f"the numbers of array {i} are not finite")
    except Wrong as e:
        raise Wrong(f"results do not fit: {what}: {e}") from None
    return arrays


# The command


def judge(name: str, function: Function) -> Verdict:
    """The verdict on a function; an error of it is one, too."""
    try:
        with np.errstate(all="ignore"):
            return Verdict(name, True, CHECKS[name](function))
    except Wrong as e:
        return Verdict(name, False, str(e))
    except TooSlow as e:
        return Verdict(name, False, f"{e} for a few numbers")
    except (ArithmeticError, LookupError, TypeError, ValueError) as e:  # of a result of any kind
        return Verdict(name, False, f"its result cannot be compared: {first_line(e)}")


def judge_training(file: StudentsFile, data: Path) -> Verdict:
    """The verdict on a training through the functions of a file."""
    try:
        training, test = read("mnist", data)
    except ConfigError as e:
        raise ConfigError(f"--data {data}: {e}") from e
    try:
        with np.errstate(all="ignore"):
            return check_training(file.epochs(training.features, training.labels), test)
    except Wrong as e:
        return Verdict("the training", False, str(e))


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m torchpar exercises",
        description="Check the functions of a NumPy network of yours, and train through them; or "
        "run a program of mpi4py on one process and on two.",
    )
    parser.add_argument(
        "--with",
        dest="path",
        type=Path,
        required=True,
        metavar="FILE.py",
        help=f"a file with any of {', '.join(CHECKS)}, or a program of mpi4py that prints costs",
    )
    parser.add_argument(
        "--data", type=Path, default=DATA, help="the folder that holds MNIST/raw, as torchvision's"
    )
    options = parser.parse_args(arguments)
    try:
        return check_file(options.path, options.data)
    except TorchparError as e:
        print(f"{parser.prog}: error: {e}", file=sys.stderr)
        return 2


def check_file(path: Path, data: Path) -> int:
    """Check the functions of a file, print a line for each, and train; 1 if one is not right."""
    if students_mpi.is_program(path, list(CHECKS)):
        return students_mpi.check(path)
    with StudentsFile(path, CHECKS, {"ladder": OPERATORS}, train) as file:
        if file.error:
            print(f"{file.error}; functions above this line are checked", flush=True)
        verdicts = []
        for name in file.names:
            verdicts.append(judge(name, file.function(name)))
            print(f"{path.name}: {verdicts[-1]}", flush=True)
        missing = [name for name in CHECKS if name not in file.names]
        wrong = [one.name for one in verdicts if not one.is_right]
        if missing or wrong:
            why = f"{', '.join(missing)} missing" if missing else f"{', '.join(wrong)} not right"
            print(f"The training is left out: {why}.")
            return int(bool(wrong or file.error))
        trained = judge_training(file, data)
        print(trained)
        return int(bool(file.error) or not trained.is_right)
