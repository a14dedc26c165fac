# SPDX-License-Identifier: MIT
"""Time the lessons' steps beside a plain script with DDP: ``python -m benchmarks run ddp``.

The plain script is `benchmarks.ddp.plain`. It and the lessons train the same model from the same
first weights, by the same optimizer and on the same batches, so that their mean losses are equal up
to rounding. Each run is a process, or two by torchrun of one thread each. Runs take turns. The
first epoch of a run warms up.

Alone, the plain script takes a thread for each core, and a lesson takes the threads that its
products need. With OMP_NUM_THREADS=1 both take one.
"""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from ..digits import DATA
from ..flags import Command, run
from ..results import CORES, Table, print_bounds, print_results
from ..timing import CPU, Rejected, take_turns

EXAMPLES = DATA.parent
PLAIN = "plain script"
SCRIPTS = {
    PLAIN: "",
    "train_ddp.py": EXAMPLES / "train_ddp.py",
    "train_fast.py": EXAMPLES / "train_fast.py",
}
SAMPLES = 60_000
ROUNDS, EPOCHS = 3, 4
# Of the plain script's time over the lesson's, with one rank and with two.
BOUNDS = {("train_ddp.py", 1): 0.97, ("train_ddp.py", 2): 1.0}
# The relative error that is allowed of an epoch's mean loss. Rounding moves it by up to 2e-6; a
# learning rate that is 1% off, or another order of the samples, moves it by 1e-4 and more.
LOSS_ERROR = 2e-5

Losses = dict[str, list[float]]  # of each epoch, by contestant


class Network(NamedTuple):
    hidden: tuple[int, ...]
    batch_size: int

    def __str__(self) -> str:
        return "-".join(map(str, self.hidden))


NETWORKS = [
    Network((30,), 64),
    Network((128, 64), 128),
    Network((512, 512), 128),
    Network((512,), 1024),
    Network((512,), 8192),
]
QUICK = [Network((512,), 8192)]


def train(contestant: str, network: Network, ranks: int, epochs: int) -> list[tuple[float, float]]:
    """Train in processes of their own; the seconds and the mean loss of each epoch."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += [
            "-m",
            "torch.distributed.run",
            f"--nproc_per_node={ranks}",
            "--log-dir=/dev/null",
        ]
    flags = ["--hidden", *map(str, network.hidden), "--batch-size", str(network.batch_size)]
    flags += ["--epochs", str(epochs), "--data", str(DATA)]
    with TemporaryDirectory() as folder:
        metrics = Path(folder, "metrics.jsonl")
        if contestant == PLAIN:
            command = [*launcher, "-m", "benchmarks.ddp.plain", *flags]
        else:
            sizes = ["--crop", "0", "--pool", "1", "--optimizer", "sgd", "--metrics", str(metrics)]
            command = [*launcher, str(SCRIPTS[contestant]), *flags, *sizes]
        # A single process takes the threads of OMP_NUM_THREADS, or as many as it chooses itself.
        threads = {"OMP_NUM_THREADS": str(max(CORES // ranks, 1))} if ranks > 1 else {}
        done = subprocess.run(
            command,
            env={**os.environ, **threads},
            cwd=EXAMPLES.parent,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise Rejected(f"status {done.returncode}: {(done.stderr.splitlines() or [''])[-1]}")
        text = done.stdout if contestant == PLAIN else metrics.read_text()
    lines = [json.loads(line) for line in text.splitlines() if line.startswith('{"epoch"')]
    if contestant == PLAIN:
        return [(line["seconds"], line["loss"]) for line in lines]
    return [(SAMPLES / line["samples_per_s"], line["train_loss"]) for line in lines]


def turn(
    contestant: str, network: Network, ranks: int, epochs: int, losses: Losses, index: int
) -> list[float]:
    """Seconds of a step in each epoch but the first, of a run whose losses are the plain
    script's."""
    if index == 0:  # each run warms up by itself
        return []
    trained = train(contestant, network, ranks, epochs)
    losses[contestant] = [loss for _, loss in trained]
    pairs = zip(losses[contestant], losses[PLAIN], strict=True)
    if any(abs(loss / expected - 1) > LOSS_ERROR for loss, expected in pairs):
        raise Rejected(f"losses {losses[contestant]}, the plain script's are {losses[PLAIN]}")
    steps = -(-SAMPLES // network.batch_size)
    return [seconds / steps for seconds, _ in trained[1:]]


def main(arguments: Sequence[str] | None = None) -> int:
    command = Command("ddp", needs=("tyro",))
    options = command.parse(arguments)
    rounds, epochs = (1, 2) if options.quick else (ROUNDS, EPOCHS)
    table = Table(command.csv(options), CPU, cores=CORES)
    cases = itertools.product(QUICK, (2,)) if options.quick else itertools.product(NETWORKS, (1, 2))
    for network, ranks in cases:
        losses: Losses = {}
        turns = {name: partial(turn, name, network, ranks, epochs, losses) for name in SCRIPTS}
        times = take_turns(
            turns, rounds, label=f"{network}, batches of {network.batch_size}, {ranks} ranks"
        )
        case = {"network": str(network), "batch": network.batch_size, "ranks": ranks}
        for name, one in times.items():
            columns = {"ratio": one.ratio_over(times[PLAIN]), "bound": BOUNDS.get((name, ranks))}
            table.add([one.result(case, name, times[PLAIN], **columns)])
    print_results(
        "a step; ratio: the plain script's time over this one's, by lower quartiles", table.results
    )
    return max(table.status, 0 if options.quick else print_bounds(table))


if __name__ == "__main__":
    run(main, "run ddp")
