# SPDX-License-Identifier: MIT
"""Random flags with random values for the examples, and random numbers for the library's calls.

A run ends with status 0, and its figures are finite, or with another status and one line that says
what is wrong. A traceback, a hang, a warning's source line and a success with a loss that is not
finite are failures. Values that only ask for much time or memory, within the documented bounds, are
not drawn. A call of the library takes a number that its documentation names, also of NumPy, and
refuses each other value by one line that names the argument.
"""

import importlib
import json
import math
import random
import sys
import uuid
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from driver import Found, Refused, run
from training import one_line, work

from torchpar.data import Samples
from torchpar.errors import ConfigError
from torchpar.nn import MLP
from torchpar.parallel import (
    ColumnParallelLinear,
    Pipeline,
    RowParallelLinear,
    World,
    clip_grad_norm_,
    join_world,
)
from torchpar.parallel.launch import world as launched
from torchpar.parallel.split import pipeline as pipelines
from torchpar.training import CheckpointConfig, Classification, Run
from torchpar.training.classification import cross_entropy_sum

share_of_calls = 0.5  # of the trials

LESSONS = (
    "train_parallel",
    "train_ddp",
    "train_by_hand",
    "train_fast",
    "train_pipeline",
    "train_tensor_parallel",
)
NUMBERS = [
    "0",
    "1",
    "-1",
    "3",
    "1e37",
    "1e-40",
    "nan",
    "inf",
    "-inf",
    "0.5",
    "",
    "x",
    "1_0",
    "0x10",
    "２",
    "9" * 30,
]
NUMBERS += ["-0.0", "1e38", "1e39", "2000000000", "9223372036854775807", "9223372036854775808"]
FEW = [
    "0",
    "-1",
    "1",
    "2",
    "3",
    "x",
    "",
    "1.5",
]  # numbers of ranks and of steps that a success would not take long over
FLAGS: dict[str, list[str]] = {
    **dict.fromkeys(
        ("--lr", "--momentum", "--weight-decay", "--clip", "--orthogonality", "--seed"), NUMBERS
    ),
    **dict.fromkeys(
        ("--batch-size", "--samples", "--label-smoothing", "--timeout", "--keep", "--save-every"),
        NUMBERS,
    ),
    **dict.fromkeys(("--epochs", "--dp", "--tp", "--pp", "--micro-batches"), FEW),
    **{key: [*FEW, "14", "28", "9" * 30] for key in ("--crop", "--pool")},
    "--hidden": [*FEW, "2000000000", "9" * 30],
    "--optimizer": ["sgd", "muon", "adam", ""],
    "--schedule": ["constant", "linear", "cosine", "none"],
    "--activation": ["sigmoid", "maxout", "relu"],
    "--pipeline": ["gpipe", "1f1b", "x"],
    "--dataset": ["mnist", "kmnist", "cifar", ""],
    "--data": ["/nowhere", "/dev/null", ""],
    "--checkpoint": ["/dev/null", "/proc/x", "{work}/{name}"],
    "--metrics": ["/dev/full", "/dev/null/x", "{work}/{name}.jsonl"],
    "--device": ["cpu", "cuda", "tpu"],
    "--decay-biases": [],
    "--async-save": [],
    "--unknown": [],
}
LIMIT = 240
# Whole numbers from 1 on that a call takes, and what none takes.
WHOLE: list[Any] = [1, np.int64(1), np.uint8(1), torch.tensor(1)]
NONE: list[Any] = [0, -1, 1.0, 2.5, True, np.float32(1), np.bool_(True), "1", "", None, math.nan]
NONE += [math.inf, [1], torch.ones(2), 1j]
# Numbers from 0 on, or above 0, and what is none.
REAL: list[Any] = [0.5, 1, 3.0, np.float32(2), np.int64(3), torch.tensor(0.5)]
NO_NUMBER: list[Any] = [-1, -0.5, math.nan, True, "1", None, [1.0], torch.ones(2), 1j, -math.inf]


def calls(world: World) -> dict[str, Callable[[Any], object]]:
    """Calls that take a whole number from 1 on, by the argument's name."""
    model = MLP([3, 2])
    x, labels = torch.ones(4, 3), torch.zeros(4).long()
    samples = Samples(x, labels, ("a", "b"))
    pipeline = Pipeline(model, world, micro_batches=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def start(epochs: Any = 1, batch_size: Any = 2) -> None:
        task = Classification(samples, samples, batch_size)
        Run(model, optimizer, None, world, task, epochs=epochs)

    return {
        "dp": lambda n: world.with_mesh(dp=n),
        "tp": lambda n: world.with_mesh(tp=n),
        "pp": lambda n: world.with_mesh(pp=n),
        "micro_batches": lambda n: Pipeline(model, world, micro_batches=n),
        "global_size": lambda n: pipeline.step(x, labels, n, cross_entropy_sum),
        "in_features": lambda n: ColumnParallelLinear(n, 2, mesh=world.mesh["tp"]),
        "out_features": lambda n: RowParallelLinear(2, n, mesh=world.mesh["tp"]),
        "every": lambda n: CheckpointConfig(work(), every=n),
        "keep": lambda n: CheckpointConfig(work(), keep=n),
        "epochs": lambda n: start(epochs=n),
        "batch_size": lambda n: start(batch_size=n),
    }


def call(rng: random.Random) -> str:
    with join_world("cpu") as world:
        model = MLP([3, 2])
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        numbers: dict[str, Callable[[Any], object]] = {
            "max_norm": lambda n: clip_grad_norm_(model, n, world),
            "timeout": lambda n: join_world("cpu", n).__enter__(),
        }
        whole = calls(world)
        name = rng.choice([*whole, *numbers])
        right, wrong = (WHOLE, NONE) if name in whole else (REAL, NO_NUMBER)
        is_right = rng.random() < 0.3
        value = rng.choice(right if is_right else wrong)
        # Layers may be empty, and checkpoints are saved after each epoch without a number.
        is_taken = (name.endswith("features") and value == 0) or (name == "every" and value is None)
        what = f"{name}={value!r}"
        try:
            (whole | numbers)[name](value)
        except ConfigError as error:
            if is_right or "\n" in str(error) or f"{name} is " not in str(error):
                raise Found(f"{what}: {error}") from error
            raise Refused(str(error)) from error
        except Exception as error:
            raise Found(f"{what}: {type(error).__name__}: {error}") from error
    if not (is_right or is_taken):
        raise Found(f"{what} is taken")
    return "call"


def trial(rng: random.Random) -> str:
    return call(rng) if rng.random() < share_of_calls else flags_of_lesson(rng)


def flags_of_lesson(rng: random.Random) -> str:
    from commands import lesson  # which `driver` puts on the path

    name, own = rng.choice(LESSONS), uuid.UUID(int=rng.getrandbits(128)).hex
    taken = {field.name for field in fields(importlib.import_module(name).Flags)}
    flags = [
        "--dataset",
        "fashion-mnist",
        "--device",
        "cpu",
        "--epochs",
        "1",
        "--batch-size",
        "51",
        "--data",
    ]
    metrics = work() / f"{own}.jsonl"
    flags += [str(work()), "--metrics", str(metrics)]
    if "timeout" in taken:
        flags += ["--timeout", "20"]
    known = [flag for flag in FLAGS if flag[2:].replace("-", "_") in taken]
    for flag in rng.sample([*known, "--unknown"], rng.choice([1, 1, 1, 2, 3])):
        flags.append(flag)
        if FLAGS[flag]:
            flags.append(rng.choice(FLAGS[flag]).format(work=work(), name=own))
    what = f"{name}.py {' '.join(map(repr, flags))}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            status, _, said = lesson(name, *flags)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise Found(f"{what}: {type(error).__name__}: {error}") from error
    if not status:
        check_figures(metrics, what)
        return "success"
    if isinstance(status, str):
        said += status
    if "Traceback" in said or not said.strip():
        raise Found(f"{what}: status {status}, {said[-300:]!r}")
    if "For full helptext" not in said:  # tyro draws a box around what it refuses
        one_line(said, what)
    raise Refused(said)


def check_figures(metrics: Path, what: str) -> None:
    if not metrics.exists():
        return
    for line in metrics.read_text().splitlines():
        for key, value in json.loads(line).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise Found(f"{what}: status 0 with {key} {value}")


def unchecked() -> None:
    """Let wrong flags raise an error that is no TorchparError."""
    from support import cli

    cli.ConfigError = RuntimeError


def any_number() -> None:
    """Let the library's calls take each number as it is."""
    global share_of_calls
    share_of_calls = 1.0
    for module in (launched, pipelines):
        module.check_whole = lambda name, value, least=1: value  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.exit(run(trial, {"unchecked": unchecked, "any-number": any_number}, limit=LIMIT))
