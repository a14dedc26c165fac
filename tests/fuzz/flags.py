# SPDX-License-Identifier: MIT
"""Random flags with random values for the examples.

A run ends with status 0, and its figures are finite, or with another status and one line that says
what is wrong. A traceback, a hang, a warning's source line and a success with a loss that is not
finite are failures. Values that only ask for much time or memory, within the documented bounds, are
not drawn.
"""

import importlib
import json
import math
import random
import sys
import uuid
import warnings
from dataclasses import fields
from pathlib import Path

from driver import Found, Refused, run
from training import one_line, work

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


def trial(rng: random.Random) -> str:
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


if __name__ == "__main__":
    sys.exit(run(trial, {"unchecked": unchecked}, limit=LIMIT))
