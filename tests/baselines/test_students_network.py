# SPDX-License-Identifier: MIT
"""The checks of a student's NumPy network, and a training through its functions."""

import inspect
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
from commands import forget_modules, forked

from torchpar import console
from torchpar.baselines import exercises, grader, students_process
from torchpar.data.files import Images, read
from torchpar.parallel.launch import guard

RIGHT = """
import numpy as np

def sigmoid(z):
    return 1 / (1 + np.exp(-z))

def sigmoid_prime(z):
    return sigmoid(z) * (1 - sigmoid(z))

def random_weights(sizes):
    rng = np.random.default_rng(0)
    return [rng.uniform(-1, 1, (m, n)) / m**0.5 for m, n in zip(sizes, sizes[1:])]

def zeros_weights(sizes):
    return [np.zeros((m, n)) for m, n in zip(sizes, sizes[1:])]

def zeros_biases(sizes):
    return [np.zeros(n) for n in sizes[1:]]

def create_batches(data, labels, batch_size):
    starts = range(0, len(data), batch_size)
    return [(data[i : i + batch_size], labels[i : i + batch_size]) for i in starts]

def add_elementwise(a, b):
    return [x + y for x, y in zip(a, b)]
"""
# A line, what stands there instead, and what is said of it.
MISTAKES = [
    (
        "return 1 / (1 + np.exp(-z))",
        "return 1 / (1 + np.exp(z))",
        "sigmoid is not right: at z = -1000: result[0, 0] is ",
    ),
    ("return 1 / (1 + np.exp(-z))", "pass", "sigmoid is not right: it returns None"),
    ("return sigmoid(z) * (1 - sigmoid(z))", "return z * (1 - z)", "its argument a = σ(z)"),
    ("return sigmoid(z) * (1 - sigmoid(z))", "return sigmoid(z)", "sigmoid_prime is not right: at"),
    (
        "rng.uniform(-1, 1, (m, n)) / m**0.5",
        "rng.normal(size=(m, n))",
        "expected 0.0093 to 0.37, as Xavier's",
    ),
    ("rng.uniform(-1, 1,", "rng.uniform(0, 0.9,", "weights[0] have the mean 0.016"),
    ("rng.uniform(-1, 1,", "rng.uniform(0, 2,", "weights[0] have the mean 0.035"),
    (
        "[np.zeros((m, n)) for",
        "[np.zeros((n, m)) for",
        "[(30, 784), (10, 30)], expected [(784, 30)",
    ),
    (
        "np.zeros(n) for",
        "np.ones(n) for",
        "array 0: result[0] is 1, expected 0; 30 of 30 numbers are wrong",
    ),
    ("np.zeros(n) for", "np.zeros((n, 1)) for", "have shapes [(30, 1), (10, 1)], expected [(30,)"),
    ("range(0, len(data),", "range(0, len(data) - batch_size + 1,", "[20, 21, 22] are in no batch"),
    ("labels[i : i + batch_size])", "labels[: batch_size])", "differ in number"),
    ("data[i : i + batch_size]", "data[::-1][i : i + batch_size]", "not that of its sample"),
    (
        "starts = range(",
        "batch_size = 4; starts = range(",
        "expected 5 each, and the remainder last",
    ),
    (
        "starts = range(0, len(data), batch_size)",
        "starts = range(0, len(data) + 1, batch_size)",
        "the batches of 20 samples have [5, 5, 5, 5, 0], expected 5 each",
    ),
    ("(data, labels, batch_size)", "(data, labels)", "my.py, line 20: TypeError: create_batches()"),
    ("[x + y for x, y in zip(a, b)]", "a + b", "add_elementwise is not right: the arrays have"),
    ("[x + y for x, y in zip(a, b)]", "[x - y for x, y in zip(a, b)]", "is -10, expected 10"),
    ("[x + y for x, y in zip(a, b)]", "[np.add(x, y, x) for x, y in zip(a, b)]", "its argument 1"),
    (
        "return sigmoid(z) * (1 - sigmoid(z))",
        "z[:] = sigmoid(z) * (1 - sigmoid(z)); return z",
        "sigmoid_prime is not right: it changes its argument 1",
    ),
    ("[x + y for x, y in zip(a, b)]", "a[len(a)]", r"my.py, line 25: IndexError: list index"),
]


def exercise(path: Path, *flags: str) -> int:
    """The status of ``exercises --with``; the module of the file is forgotten."""
    try:
        return exercises.main(["--with", str(path), *flags])
    finally:
        forget_modules(path.parent)


def check(folder: Path, text: str) -> None:
    path = folder / "my.py"
    path.write_text(text)
    with patch.object(exercises, "check_training", lambda *_: exercises.Verdict("it", True, "")):
        exercise(path)


def test_right_functions_are_right_and_say_what_they_chose(tmp_path, capsys):
    check(tmp_path, RIGHT)
    assert capsys.readouterr().out.splitlines() == [
        "my.py: sigmoid is right",
        "my.py: sigmoid_prime is right: it takes z",
        "my.py: random_weights is right",
        "my.py: zeros_weights is right",
        "my.py: zeros_biases is right: no vector for the first size",
        "my.py: create_batches is right: the last of 5 batches has 3 of 23 samples",
        "my.py: add_elementwise is right",
        "it is right",
    ]


@pytest.mark.parametrize("line, instead, reason", MISTAKES)
def test_a_mistake_is_told_with_what_was_expected(tmp_path, capsys, line, instead, reason):
    assert line in RIGHT
    check(tmp_path, RIGHT.replace(line, instead))
    wrong = [one for one in capsys.readouterr().out.splitlines() if "is not right" in one]
    assert any(reason in one for one in wrong), wrong
    assert len(wrong) == 1 + (instead == "pass")  # sigmoid_prime calls that, too


def test_functions_above_a_line_that_fails_are_checked(tmp_path, capsys):
    path = tmp_path / "my.py"
    path.write_text("def sigmoid(z): pass\nimport missing_here\ndef add_elementwise(a, b): pass\n")
    assert exercise(path) == 1
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("my.py, line 2: ModuleNotFoundError: No module named 'missing_here'; ")
    assert second == "my.py: sigmoid is not right: it returns None, expected an array"
    assert third.startswith("The training is left out: sigmoid_prime, ")


def test_an_endless_function_is_stopped_and_the_others_are_tried(tmp_path, capsys):
    alarm = "signal.raise_signal(signal.SIGALRM)"  # as the timer does
    text = f"""
    try:
        import signal; {alarm}
    except Exception:
        pass
"""
    check(tmp_path, RIGHT.replace("    return 1 / (1 + np.exp(-z))", text))
    out = capsys.readouterr().out
    assert "my.py: sigmoid is not right: it takes more than 10 s for a few numbers\n" in out
    assert "my.py: add_elementwise is right\n" in out


def test_an_error_in_the_training_is_one_line_and_one_of_ours_is_none_of_the_students(
    tmp_path, capsys
):
    path = tmp_path / "my.py"
    late = "z[2000] if np.shape(z)[:1] == (16,) else 1 / (1 + np.exp(-z))"  # of the last batch
    path.write_text(RIGHT.replace("return 1 / (1 + np.exp(-z))", f"return {late}"))
    with patch.object(exercises, "read", lambda *_: (images(2000), images(100))):
        assert exercise(path) == 1
    *_, last = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"the training is not right: my\.py, line 5: IndexError: index 2000 is .*", last
    )
    path.write_text(RIGHT)
    assert exercise(path, "--data", str(tmp_path)) == 2
    assert "the training" not in capsys.readouterr().out


def test_the_last_batch_may_take_the_remainder(tmp_path, capsys):
    larger = """
def create_batches(data, labels, batch_size):
    ends = [*range(batch_size, len(data) - batch_size + 1, batch_size)]
    return [*zip(np.split(data, ends), np.split(labels, ends))]
"""
    check(tmp_path, RIGHT + larger)
    assert "is right: the last of 4 batches has 8 of 23 samples" in capsys.readouterr().out


def functions(text: str) -> dict[str, exercises.Function]:
    space: dict[str, exercises.Function] = {}
    exec(text, space)
    return {name: space[name] for name in exercises.CHECKS}


def images(count: int) -> Images:
    """A white bar in a row of its own for each class."""
    labels = np.arange(count) % 10
    features = np.zeros((count, 28, 28), np.uint8)
    features[np.arange(count), labels * 2] = 255
    return Images(features, labels.astype(np.int64), ())


def on(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the functions be called as on this platform; without a fork but on Linux."""
    if sys.platform == "linux":
        monkeypatch.setattr(
            students_process, "sys", SimpleNamespace(**vars(sys) | {"platform": platform})
        )


def trained(text: str, training: Images, test: Images) -> exercises.Verdict:
    """The verdict on a training through the functions of a text, in this process."""
    f = functions(text)
    epochs = exercises.train(
        lambda name, take: lambda *arguments: take(f[name](*arguments)),
        training.features,
        training.labels,
    )
    return exercises.check_training(epochs, test)


@pytest.mark.parametrize("biases", ["sizes[1:]", "sizes"])
def test_a_network_is_trained_through_the_functions(biases):
    text = RIGHT.replace("np.zeros(n) for n in sizes[1:]", f"np.zeros(n) for n in {biases}")
    verdict = trained(text, images(2000), images(100))
    assert verdict.is_right
    assert re.match(r"accuracy 1\.0000 after epoch \d; above 0\.95 is asked", verdict.text)


def test_a_spread_is_compared_with_the_bounds_that_are_printed():
    rng = np.random.default_rng(0)

    def drawn(spread: float) -> list[np.ndarray]:
        first, last = (rng.normal(size=shape) for shape in exercises.weight_shapes())
        return [(first - first.mean()) / first.std() * spread, last / last.shape[0] ** 0.5]

    for spread in (0.00931, 1 / (12 * 784) ** 0.5, 0.3699):
        assert exercises.check_random_weights(lambda _, spread=spread: drawn(spread)) == ""
    for spread in (0.00929, 0.3701):
        with pytest.raises(exercises.Wrong, match=r"expected 0\.0093 to 0\.37, as"):
            exercises.check_random_weights(lambda _, spread=spread: drawn(spread))


def cut_normal(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    x = rng.normal(size=2 * m * n)
    return x[np.abs(x) < 2][: m * n].reshape(m, n)


# Draws of weights (m, n), right and wrong ones.
DRAWS = {
    "Xavier, normal": lambda rng, m, n: rng.normal(size=(m, n)) * (2 / (m + n)) ** 0.5,
    "Xavier, uniform": lambda rng, m, n: rng.uniform(-1, 1, (m, n)) * (6 / (m + n)) ** 0.5,
    "He, normal": lambda rng, m, n: rng.normal(size=(m, n)) * (2 / m) ** 0.5,
    "He, uniform": lambda rng, m, n: rng.uniform(-1, 1, (m, n)) * (6 / m) ** 0.5,
    "LeCun, cut": lambda rng, m, n: cut_normal(rng, m, n) / m**0.5,
    "in float32": lambda rng, m, n: (rng.standard_normal((m, n), "f") / m**0.5).astype("f"),
}
WRONG_DRAWS = {
    "two values": (lambda rng, m, n: rng.choice([-1, 1], (m, n)) / m**0.5, "neither normal nor"),
    "near two values": (
        lambda rng, m, n: (rng.choice([-1, 1], (m, n)) + 0.1 * rng.normal(size=(m, n))) / m**0.5,
        "neither normal nor",
    ),
    "two values last": (
        lambda rng, m, n: (
            (rng.normal(size=(m, n)) if m > n * 20 else rng.choice([-1, 1], (m, n))) / m**0.5
        ),
        r"weights\[1\] are neither normal nor",
    ),
    "Laplace's": (lambda rng, m, n: rng.laplace(size=(m, n)) / m**0.5, "neither normal nor"),
    "in order": (lambda rng, m, n: np.linspace(-1, 1, m * n).reshape(m, n) / m**0.5, "rows of"),
    "twice": (lambda rng, m, n: rng.normal(size=(m, n // 2)).repeat(2, 1) / m**0.5, "columns of"),
    "NaN": (lambda rng, m, n: np.full((m, n), np.nan), "are not finite"),
    "zero": (lambda rng, m, n: np.zeros((m, n)), "have the standard deviation 0"),
}


def drawn_by(draw, seed: int):
    rng = np.random.default_rng(seed)
    return lambda _: [draw(rng, m, n) for m, n in exercises.weight_shapes()]


@pytest.mark.parametrize("name", DRAWS)
def test_weights_of_any_rule_are_right(name):
    for seed in range(3):
        assert exercises.check_random_weights(drawn_by(DRAWS[name], seed)) == ""


@pytest.mark.parametrize("name", WRONG_DRAWS)
def test_weights_of_another_distribution_are_not(name):
    draw, message = WRONG_DRAWS[name]
    with pytest.raises(exercises.Wrong, match=message):
        exercises.check_random_weights(drawn_by(draw, 0))


def test_the_distance_is_that_of_the_definition():
    x = np.array([-1.5, -0.2, 0.1, 0.1, 1.9])
    steps = [(np.mean(x <= at), np.mean(x < at), exercises.normal(at)) for at in x]
    own = max(max(abs(upper - f), abs(lower - f)) for upper, lower, f in steps)
    assert exercises.distance(x) <= own
    uniform = np.linspace(-1, 1, 1001) * 3**0.5
    assert exercises.distance(uniform) == pytest.approx(0.5 / 1001, rel=2)
    assert exercises.distance_bound(23520) == pytest.approx(0.0213, abs=1e-4)


@pytest.mark.parametrize("platform", ["linux", "win32"])
def test_a_network_is_trained_through_functions_that_return_lists(
    tmp_path, capsys, monkeypatch, platform
):
    on(platform, monkeypatch)
    changes = {
        "return sigmoid(z) * (1 - sigmoid(z))": "return (sigmoid(z) * (1 - sigmoid(z))).tolist()",
        "return 1 / (1 + np.exp(-z))": "return (1 / (1 + np.exp(-z))).tolist()",
        "sigmoid(z) * (1 -": "np.array(sigmoid(z)) * (1 -",
        "(1 - sigmoid(z))": "(1 - np.array(sigmoid(z)))",
        "return [np.zeros((m, n)) for m, n in zip(sizes, sizes[1:])]": "return ([[0.0] * 30] * 784,"
        " [[0.0] * 10] * 30)",
        "data[i : i + batch_size], labels[i : i + batch_size]": "list(data[i : i + batch_size]), "
        "labels[i : i + batch_size, None].tolist()",
        "[x + y for x, y in zip(a, b)]": "[np.add(x, y).tolist() for x, y in zip(a, b)]",
    }
    text = RIGHT
    for line, instead in changes.items():
        assert line in text
        text = text.replace(line, instead)
    (tmp_path / "my.py").write_text(text)
    with (
        patch.object(exercises, "read", lambda *_: (images(64), images(10))),
        patch.object(exercises, "ASKED", -1.0),
    ):
        assert exercise(tmp_path / "my.py") == 0
    out = capsys.readouterr().out
    assert "not right" not in out
    assert "the training is right: accuracy " in out


def test_a_training_that_learns_nothing_is_not_right():
    text = RIGHT.replace("[x + y for x, y in zip(a, b)]", "a")
    with patch.object(exercises, "EPOCHS", 2):
        verdict = trained(text, images(100), images(100))
    assert not verdict.is_right
    assert "after epoch 2" in verdict.text


WEIGHTS, BIASES = [np.zeros((784, 30)), np.zeros((30, 10))], [np.zeros(30), np.zeros(10)]
# What a process sends that is no network of finite numbers, and what is said of it.
SENT = {
    "None": (None, "weights after epoch 1: it returns NoneType, expected a list of arrays"),
    "one": ([WEIGHTS], "weights after epoch 1: it returns NoneType, expected a list of arrays"),
    "other shapes": (
        (WEIGHTS, WEIGHTS),
        "biases after epoch 1: the arrays have shapes [(784, 30), (30, 10)], expected [(30,), (10,",
    ),
    "texts": (
        (WEIGHTS, [np.full(30, "x"), BIASES[1]]),
        "biases after epoch 1: array 0 has dtype <U1, expected numbers",
    ),
    "NaN": (
        ([WEIGHTS[0], WEIGHTS[1] * np.nan], BIASES),
        "weights after epoch 1: the numbers of array 1 are not finite",
    ),
}


@pytest.mark.parametrize("name", SENT)
def test_a_network_that_does_not_fit_is_not_judged(name):
    sent, reason = SENT[name]
    with patch.object(exercises, "EPOCHS", 1):
        assert not exercises.check_training([(WEIGHTS, BIASES)], images(10)).is_right
    with pytest.raises(exercises.Wrong, match=f"^results do not fit: {re.escape(reason)}"):
        exercises.check_training([sent], images(10))


def test_a_function_of_the_ladder_is_refused_in_one_line(tmp_path, capsys):
    path = tmp_path / "my.py"
    path.write_text("def max_cpu(A, B): pass")
    assert exercise(path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    remedy = f"check max_cpu by python -m torchpar ladder --with {path}"
    assert line.endswith(f"error: --with {path}: it has no function that is known; {remedy}")


def test_digits_that_are_not_there_are_asked_for_by_the_flag(tmp_path, capsys):
    (tmp_path / "my.py").write_text(RIGHT)
    assert exercise(tmp_path / "my.py", "--data", str(tmp_path)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"error: --data {tmp_path}: {tmp_path}/MNIST/raw/" in line


@pytest.mark.slow
def test_mnist_is_learnt_to_95_percent():
    assert trained(RIGHT, *read("mnist", exercises.DATA)).is_right


def test_a_slow_epoch_says_how_far_it_is(capsys):
    clock = iter([0.0, 0.0, 9.0, 11.0, 12.0, 0.0, 10.0])
    with (
        patch.object(console, "SILENCE", 10.0),
        patch.object(console.time, "monotonic", lambda: next(clock)),
    ):
        batch = (np.zeros(1), np.zeros(1))
        assert list(console.say_progress([batch] * 4, "batches")) == [batch] * 4
        assert list(console.say_progress(iter([batch]), "batches")) == [batch]  # has no length
    out, err = capsys.readouterr()
    assert (out, err) == ("", "1 of 4 batches after 9 s\n0 batches after 10 s\n")


def test_the_training_says_how_far_an_epoch_is(tmp_path, capfd):
    closes = "import os, sys; os.close(2); sys.stderr = None"
    (tmp_path / "my.py").write_text(beginning(RIGHT, create_batches=closes))
    with (
        patch.object(exercises, "EPOCHS", 1),
        patch.object(console, "SILENCE", 0.0),
        patch.object(exercises, "read", lambda *_: (images(64), images(10))),
    ):
        exercise(tmp_path / "my.py")
    assert re.search(r"0 of 2 batches after \d+ s\n1 of 2 batches", capfd.readouterr().err)


# Ends of the process, and silence

needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="the command forks on Linux alone")
COMMAND = f"""
import os
import runpy
import sys
from pathlib import Path
import numpy as np
from torchpar.baselines import exercises, grader
from torchpar.data.files import Images, read
from torchpar.parallel.launch import guard

{inspect.getsource(images)}
exercises.read = lambda *_: (images(2000), images(100))
grader.PATIENCE, guard.TICK = 2.0 - grader.LIMIT, 0.05
guard.GRACE = float(os.environ.get("GRACE", guard.GRACE))
sys.argv = ["torchpar", "exercises", "--with", sys.argv[1]]
runpy.run_module("torchpar", run_name="__main__")
"""


def command(folder: Path, text: str, **variables: str) -> tuple[int, list[str], list[str]]:
    """The status and the lines of ``exercises --with my.py``, which trains on ten rows of bars."""
    (folder / "command.py").write_text(COMMAND)
    (folder / "my.py").write_text(f"import ctypes, os, signal{text}")
    status, out, err = forked("command.py", "my.py", cwd=folder, **variables)
    return status, out.splitlines(), err.splitlines()


def beginning(text: str, **lines: str) -> str:
    """A file whose functions of these names begin with a line."""
    for name, line in lines.items():
        text, count = re.subn(rf"(def {name}\(.*\n)", rf"\1    {line}\n", text)
        assert count == 1
    return text


@needs_fork
def test_each_function_that_ends_the_process_or_never_returns_is_named(tmp_path):
    text = beginning(
        RIGHT,
        sigmoid_prime="os.fork()",
        random_weights="exit('bye')",
        zeros_weights="os._exit(0)",
        zeros_biases="ctypes.string_at(0)",
        create_batches="os.kill(os.getpid(), signal.SIGKILL)",
        add_elementwise="ctypes.PyDLL(None).pause()",  # which holds the interpreter's lock
    )
    status, out, err = command(tmp_path, text)
    assert (status, err) == (1, [])
    hows = {
        "zeros_weights": "ends the process with status 0, as os._exit does",
        "zeros_biases": "ends the process by SIGSEGV (my.py, line 21)",
        "create_batches": "ends the process by SIGKILL",
        "add_elementwise": "does not end within 2 s (my.py, line 30)",
    }
    assert [line for line in out if "begins again" in line] == [
        f"my.py: {name} {how}; the check begins again without it" for name, how in hows.items()
    ]
    instead = "; return the result instead"
    verdicts = [line for line in out if "begins again" not in line]
    assert verdicts == [  # each once
        "my.py: sigmoid is right",
        "my.py: sigmoid_prime is right: it takes z",
        f"my.py: random_weights is not right: my.py, line 12: SystemExit: bye{instead}",
        *(
            f"my.py: {name} is not right: it {how}{instead if 'status' in how else ''}"
            for name, how in hows.items()
        ),
        "The training is left out: random_weights, zeros_weights, zeros_biases, create_batches, "
        "add_elementwise not right.",
    ]


@needs_fork
def test_a_training_that_is_ended_names_the_function_and_a_right_one_ends_by_itself(tmp_path):
    right, out, err = command(tmp_path, RIGHT)
    assert (right, err) == (0, [])
    assert len(out) == len(set(out))
    assert out[-1].startswith("the training is right: accuracy 1.0000 after epoch ")
    at = "z.shape == (32, 30) and"  # of the first layer in the training
    status, out, err = command(tmp_path, beginning(RIGHT, sigmoid_prime=f"{at} os._exit(0)"))
    how = "ends the process with status 0, as os._exit does"
    assert (status, err) == (1, [])
    assert not any("begins again" in line for line in out)
    last = f"the training is not right: sigmoid_prime: it {how}; return the result instead"
    assert out[-1] == last


@pytest.mark.parametrize("platform", ["linux", "win32"])
def test_a_training_that_calls_exit_is_not_right(tmp_path, capsys, monkeypatch, platform):
    on(platform, monkeypatch)
    (tmp_path / "my.py").write_text(
        beginning(RIGHT, sigmoid_prime="if z.shape == (32, 30): exit('bye')")
    )
    with patch.object(exercises, "read", lambda *_: (images(2000), images(100))):
        assert exercise(tmp_path / "my.py") == 1
    line = "the training is not right: my.py, line 8: SystemExit: bye; return the result instead\n"
    assert capsys.readouterr().out.endswith(line)


@pytest.mark.parametrize("platform", ["linux", "win32"])
def test_results_that_do_not_fit_are_told_as_such(tmp_path, capsys, monkeypatch, platform):
    on(platform, monkeypatch)
    (tmp_path / "my.py").write_text(
        beginning(RIGHT, sigmoid_prime="if z.shape == (32, 30): return z.T")
    )
    with patch.object(exercises, "read", lambda *_: (images(2000), images(100))):
        assert exercise(tmp_path / "my.py") == 1
    line = "\nthe training is not right: results do not fit: ValueError: operands could not be "
    assert line in capsys.readouterr().out


# The file learns nothing when it is trained, and lets its own process find that right.
PATCHES = """
from torchpar.baselines import exercises
exercises.ASKED = -1.0
np.argmax = lambda *_: np.arange(100) % 10
"""


@needs_fork
@pytest.mark.parametrize("platform, status", [("linux", 1), ("win32", 0)])
def test_what_a_file_patches_makes_no_training_right_where_a_process_is_forked(
    tmp_path, capsys, monkeypatch, platform, status
):
    on(platform, monkeypatch)
    for module, name in ((exercises, "ASKED"), (np, "argmax")):  # let them be as they were
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(exercises, "EPOCHS", 2)
    monkeypatch.setattr(exercises, "read", lambda *_: (images(100), images(100)))
    nothing = beginning(RIGHT, add_elementwise="if len(b[0]) in (784, 30): return a")
    (tmp_path / "my.py").write_text(nothing + PATCHES)
    assert exercise(tmp_path / "my.py") == status
    last = r"the training is not right: accuracy 0\.\d+ after epoch 2; above 0\.95 is asked\n"
    assert bool(re.search(last, capsys.readouterr().out)) == bool(status)


STOP = "raise type('Stop', (BaseException,), {})('mine')"  # a class of the student's own


@needs_fork
def test_an_error_of_any_class_is_the_functions(tmp_path):
    text = beginning(
        RIGHT,
        sigmoid_prime="raise KeyboardInterrupt",
        random_weights=STOP,
        zeros_weights="import asyncio; raise asyncio.CancelledError('x')",
        zeros_biases="raise GeneratorExit",
    )
    status, out, err = command(tmp_path, text)
    assert (status, err) == (1, [])
    assert out == [
        "my.py: sigmoid is right",
        "my.py: sigmoid_prime is not right: my.py, line 8: KeyboardInterrupt",
        "my.py: random_weights is not right: my.py, line 12: Stop: mine",
        "my.py: zeros_weights is not right: my.py, line 17: CancelledError: x",
        "my.py: zeros_biases is not right: my.py, line 21: GeneratorExit",
        "my.py: create_batches is right: the last of 5 batches has 3 of 23 samples",
        "my.py: add_elementwise is right",
        "The training is left out: sigmoid_prime, random_weights, zeros_weights, zeros_biases not "
        "right.",
    ]


@needs_fork
def test_an_error_of_any_class_ends_the_training_or_the_top_level(tmp_path):
    late = beginning(RIGHT, sigmoid_prime=f"if z.shape == (32, 30): {STOP}")
    status, out, err = command(tmp_path, late)
    assert (status, err) == (1, [])
    assert out[-1] == "the training is not right: my.py, line 8: Stop: mine"
    status, (first, *_), err = command(tmp_path, f"{RIGHT}\nraise KeyboardInterrupt\n")
    assert (status, err) == (1, [])
    assert first == "my.py, line 27: KeyboardInterrupt; functions above this line are checked"


@needs_fork
@pytest.mark.parametrize("when", ["", "if z.shape == (32, 30): "])  # or in the training
@pytest.mark.parametrize("who", ["pid", "ppid"])  # Ctrl-C is sent to both
def test_a_signal_is_none_of_the_students_errors(tmp_path, when, who):
    stop = f"os.kill(os.get{who}(), signal.SIGINT); signal.pause()"
    status, out, err = command(tmp_path, beginning(RIGHT, sigmoid_prime=when + stop))
    rights = len(exercises.CHECKS) if when else 1
    assert status == 130
    assert [line.partition(" is right")[1] for line in out] == [" is right"] * rights
    assert err == ["python -m torchpar exercises: interrupted"]


@needs_fork
@pytest.mark.parametrize("at_top", [False, True])
def test_a_thread_that_does_not_end_is_stopped_and_named_and_the_status_stays(tmp_path, at_top):
    thread = "import threading; threading.Thread(target=signal.sigwait, args=[[10]], name='T')"
    start = f"{thread}.start()"
    wrong = beginning(RIGHT, add_elementwise="return a" if at_top else f"{start}; return a")
    status, out, err = command(tmp_path, wrong + (start if at_top else ""), GRACE="0.5")
    stopped = (
        "the check is done, but its process does not end, and is stopped: its thread T has not "
        "ended; join it, or start it"
    )
    assert (status, err) == (1, [f"{stopped} with daemon=True"])
    assert out[-1] == "The training is left out: add_elementwise not right."
    daemon = wrong.replace(start, f"{thread[:-1]}, daemon=True).start()")
    assert command(tmp_path, daemon)[::2] == (1, [])


@needs_fork
def test_a_function_that_closes_what_the_command_needs_is_named(tmp_path):
    text = beginning(
        RIGHT,
        sigmoid_prime="__import__('sys').stdout.close()",
        zeros_biases="os.closerange(3, 64)",
        add_elementwise="os._exit(1)",
    )
    status, out, err = command(tmp_path, text)
    closes = "it ends the process by closing sys.stdout, or a file that it has not opened"
    exits = "it ends the process with status 1, as os._exit does; return the result instead"
    hows = {"sigmoid_prime": closes, "zeros_biases": closes, "add_elementwise": exits}
    assert (status, err) == (1, [])
    for name in exercises.CHECKS:
        wrong = f"my.py: {name} is not right: {hows[name]}" if name in hows else "is right"
        assert any(name in line and wrong in line for line in out), (name, out)


@needs_fork
def test_a_top_level_that_ends_the_process_is_named(tmp_path):
    status, out, (line,) = command(tmp_path, RIGHT + "\nos._exit(0)\n")
    assert (status, out) == (2, [])
    how = "its top level ends the process with status 0, as os._exit does"
    advice = 'put that behind if __name__ == "__main__"'
    assert line == f"python -m torchpar exercises: error: --with my.py: {how}; {advice}"


# Beginnings of a file that reach for the judge, or for what it prints and returns.
HOSTILE = {
    "numpy's functions": "for name in ('allclose', 'array_equal', 'abs', 'isfinite', 'all'):"
    " setattr(np, name, lambda *a, **k: True)",
    "builtins": "import builtins; builtins.all = builtins.any = lambda *a: True; "
    "builtins.abs = lambda *a: 0",
    "the judge's modules": "import sys\n"
    "for module in [m for n, m in sys.modules.items() if n.startswith('torchpar.baselines')]:\n"
    "    for name in ('compare', 'judge', 'check_unchanged', 'near'):\n"
    "        if hasattr(module, name): setattr(module, name, lambda *a, **k: None)",
    "the table of checks": "import gc\n"
    "for one in gc.get_objects():\n"
    "    if type(one) is dict and 'create_batches' in one and 'sigmoid' in one:\n"
    "        for name in one: one[name] = lambda f: ''",
    "frames": "import sys\nframe = sys._getframe()\n"
    "while frame:\n"
    "    frame.f_globals.update(compare=lambda *a: None)\n    frame = frame.f_back",
    "the guard's pipe": "from torchpar.parallel.launch.guard import WATCHED\n"
    "os.write(WATCHED.pipe, b'[0, \"\"]\\n{]\\n[1, 2]\\n5\\n[[\\n')",
    "os._exit at the end": "import atexit; atexit.register(lambda: os._exit(0))",
    "an exit at the end": "import atexit, sys; atexit.register(sys.exit, 0)",
    "a signal at the end": "import atexit; atexit.register(os.kill, os.getpid(), signal.SIGKILL)",
    "no stdout": "import sys; sys.stdout = sys.stderr = None",
    "another stdout": "import sys\nclass Out:\n    def __getattr__(self, name): raise SystemExit\n"
    "sys.stdout = Out()",
    "files closed": "os.close(1); os.close(2)",
    "files redirected": "null = os.open(os.devnull, os.O_WRONLY)\n"
    "for number in (1, 2): os.dup2(null, number)",
    "signals ignored": "for number in (1, 2, 10, 14, 15): signal.signal(number, signal.SIG_IGN)",
    "hooks": "import sys; sys.excepthook = sys.unraisablehook = lambda *a: os._exit(0)",
    "a thread that stays": "import threading, time\n"
    "threading.Thread(target=time.sleep, args=[60], daemon=True).start()",
}


@needs_fork
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_does_not_reach_its_judge(tmp_path, capsys, name):
    wrong = RIGHT.replace("return 1 / (1 + np.exp(-z))", "return 7.0 + 0 * z")
    path = tmp_path / "my.py"
    path.write_text(f"import os, signal\nimport numpy as np\n{HOSTILE[name]}\n{wrong}")
    assert exercise(path) == 1
    out, err = capsys.readouterr()
    verdicts = [line for line in out.splitlines() if line.startswith("my.py: ")]
    assert [line.split()[1] for line in verdicts] == [*exercises.CHECKS]
    assert "my.py: sigmoid is not right: at z = -1000: result[0, 0] is 7, expected 0" in verdicts[0]
    # The table's functions, which it replaces in its own process, are no functions of its.
    rights = [" is right" in line for line in verdicts[2:]]
    assert all(rights) or name in ("numpy's functions", "builtins"), verdicts
    assert "Traceback" not in out + err


# Functions sigmoid, and what is said of each.
ODD: dict[str, tuple[str, str]] = {
    "str of an error": (
        "class E(BaseException):\n    def __str__(self): raise RuntimeError\n"
        "def sigmoid(z): raise E",
        "my.py, line 4: E: (str of it raises RuntimeError)",
    ),
    "str that exits": (
        "class E(Exception):\n    def __str__(self): raise SystemExit(0)\ndef sigmoid(z): raise E",
        "my.py, line 4: E: (str of it raises SystemExit)",
    ),
    "str that stops": (
        "class S(BaseException): pass\nclass E(Exception):\n    def __str__(self): raise S\n"
        "def sigmoid(z): raise E",
        "my.py, line 5: E: (str of it raises S)",
    ),
    "str that never ends": (
        "class E(Exception):\n    def __str__(self):\n        while True: pass\n"
        "def sigmoid(z): raise E",
        "it takes more than 1 s for a few numbers",
    ),
    "a text of 10 MB": (
        "def sigmoid(z): raise ValueError('x' * 10**7)",
        "my.py, line 2: ValueError: xxx",
    ),
    "a class that lies": (
        "class E(Exception):\n    __class__ = property(lambda self: KeyboardInterrupt)\n"
        "    __traceback__ = args = property(lambda self: 1 / 0)\ndef sigmoid(z): raise E",
        "my.py, line 5: E",
    ),
    "a class whose class lies": (
        "class M(type):\n    __name__ = property(lambda self: 1 / 0)\n"
        "class E(Exception, metaclass=M): pass\ndef sigmoid(z): raise E",
        "my.py: an error that raises ZeroDivisionError when it is asked",
    ),
    "a result that lies": (
        "class R(np.ndarray):\n    __eq__ = __le__ = lambda *a: True\n"
        "    shape = property(lambda self: (2, 4))\n"
        "def sigmoid(z): return np.full((2, 4), 9.0).view(R)",
        "at z = -1000: result[0, 0] is 9, expected 0",
    ),
    "a result that raises": (
        "class R:\n    __array__ = lambda self, *a, **k: 1 / 0\ndef sigmoid(z): return R()",
        "my.py, line 3: ZeroDivisionError",
    ),
    "an array that exits": (
        "class R:\n    def __array__(self, *a, **k): os._exit(0)\ndef sigmoid(z): return R()",
        "it ends the process with status 0, as os._exit does; return the result instead",
    ),
    "a generator": (
        "def sigmoid(z): yield z",
        "the result at z has dtype object, expected numbers",
    ),
    "an object": ("def sigmoid(z): return object()", "the result at z has dtype object"),
    "a ragged list": ("def sigmoid(z): return [[1], [1, 2]]", "its result cannot be compared"),
    "a list in itself": ("L = []; L.append(L)\ndef sigmoid(z): return L", "dtype object"),
    "an endless iterator": (
        "import itertools\ndef sigmoid(z): return itertools.count()",
        "my.py, line 3: ValueError: a count has more than 1,048,576 items",
    ),
    "no function": ("sigmoid = 7", "my.py: TypeError: 'int' object is not callable"),
    "another shape": (
        "def sigmoid(z): z.resize(8, refcheck=False); return z",
        "it changes the shape of its argument 1",
    ),
    "a forged answer": (
        "def sigmoid(z):\n    from torchpar.parallel.launch.guard import WATCHED\n"
        "    os.write(WATCHED.pipe, b'{\"size\": 9999999}\\n'); return z",
        "it writes to a file that it has not opened",
    ),
}


@needs_fork
@pytest.mark.parametrize("name", ODD)
def test_an_odd_function_is_not_right_in_one_line(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(grader, "LIMIT", 1.0)
    text, reason = ODD[name]
    path = tmp_path / "my.py"
    right = "def add_elementwise(a, b): return [x + y for x, y in zip(a, b)]\n"
    path.write_text(f"import os; import numpy as np\n{text}\n{right}")
    assert exercise(path) == 1
    out, err = capsys.readouterr()
    *_, verdict, last, left_out = out.splitlines()
    assert verdict.startswith("my.py: sigmoid is not right: ")
    assert reason in verdict
    assert len(verdict) < 5000
    assert last == "my.py: add_elementwise is right"
    assert left_out.startswith("The training is left out: ")
    assert err == ""


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["torchpar", "exercises", "--with", "my.py"])
    monkeypatch.setattr(exercises, "main", lambda _: guard.os.kill(guard.os.getpid(), 2))
    monkeypatch.setattr(guard, "guarded", lambda main, *_: main())
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("torchpar", run_name="__main__")
    assert ended.value.code == 130
    assert capsys.readouterr().err == "python -m torchpar exercises: interrupted\n"
