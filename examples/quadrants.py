# SPDX-License-Identifier: MIT
"""Quadrants: a small network, over-fitting and its cures, and the gain of training in parallel.

    python examples/quadrants.py            learn the quadrants; then a report by Amdahl's law
    python examples/quadrants.py --noise    over-fitting and its cures

Points in quadrants I and III have label 0, points in II and IV label 1. No line separates them.
Four ReLUs do: |x + y| − |x − y| has the sign of x·y. With --plots a picture shows the points and
the network's probability of label 1; its decision boundary is where that is 1/2.

With --noise the networks learn few points, and a tenth of the labels is wrong. A narrow network or
a large penalty λ leaves both losses high. A wide network learns the noise, so its validation loss
is far above its training loss. A larger λ cures that.

The report trains a larger network of layers by hand (train_by_hand.py), in large and in small
batches. First it times each layer's forward and backward pass in a serial epoch. The layers' share
p of the time is divided among N processes, or N threads, and 1 − p is not. By Amdahl's law

    T(N) = T(1)·((1 − p) + p/N)        S(N) = T(1)/T(N) = 1/((1 − p) + p/N)        S(∞) = 1/(1 − p)

(G. M. Amdahl, "Validity of the single processor approach to achieving large scale computing
capabilities", AFIPS 1967.) The predicted S(N) stands beside the measured one, and beside p is the p
that fits the measured times. The law has no term for communication, so the fitted p counts it as
work that is not divided.
"""

import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import pairwise, product
from statistics import median
from typing import Annotated, Any, NamedTuple

from support import cli, console, plots
from support.measure import now

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from train_by_hand import BinaryCrossEntropy, build_network, draw

from torchpar.data import Samples, batches
from torchpar.errors import ConfigError, check_finite
from torchpar.nn import MLP
from torchpar.parallel.launch.local import Ranks
from torchpar.parallel.launch.world import join_world
from torchpar.training import sgd

WIDTHS, PENALTIES = (1, 4, 8, 32), (0.0, 1e-3, 1e-2, 1e-1)  # with --noise
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
COURSE_P, COURSE_THREADS = 0.9801, 768  # of the report that this exercise is from
ROUNDS = 8  # of the report, after one that is not counted
LOSS_ERROR = 1e-4  # of a loss in float64; another share of a batch, or fewer samples, is 1e-2
PASSES = ("forward", "backward")

Processes = Annotated[int, cli.Bounds(1, 65)]  # each takes a quarter of a gigabyte


def process_counts(cores: int) -> tuple[int, ...]:
    """Return the powers of two up to the number of cores; at least 1 and 2, and at most 8, as in
    courses."""
    return tuple(n for n in (1, 2, 4, 8) if n <= max(cores, 2))


class Way(NamedTuple):
    """How an epoch is trained."""

    size: int  # of a batch, over all processes
    processes: int = 1
    threads: int = 1  # of each process
    profiled: bool = False  # time each layer


@dataclass
class Epoch:
    """Seconds of an epoch, the mean loss over all points after it, and seconds by layer and
    pass."""

    seconds: float
    loss: float
    parts: dict[tuple[str, str], float] = field(default_factory=dict)


Rounds = dict[Way, list[Epoch]]


@dataclass(kw_only=True)
class Flags(cli.ExampleFlags):
    """Learn the quadrants that points lie in, and report the gain of parallel training."""

    noise: bool = False  # Learn few noisy points by networks of several widths and λ; no report.
    # Passes over the points; three times as many with --noise, where the points are few.
    epochs: cli.Count = 60
    # Processes in the report, and threads of one process: 1, then multiples of the last.
    processes: tuple[Processes, ...] = process_counts(CORES)
    sizes: tuple[cli.Count, ...] = (
        512,
        4096,
        32768,
    )  # Batch sizes of the report, over all processes.
    plots: cli.Plots = None  # Folder for pictures.

    def check(self) -> None:
        super().check()
        n, sizes = self.processes, self.sizes
        if len(n) < 2 or n[0] != 1 or any(b <= a or b % a for a, b in pairwise(n)):
            raise ConfigError(
                f"--processes is {n}, expected 1 and then multiples of the last, as 1 2 4"
            )
        if min(sizes, default=0) < n[-1]:
            raise ConfigError(
                f"--sizes is {sizes}, expected at least {n[-1]}, one sample a process"
            )


@dataclass
class Trained:
    """A network, the points that it learned, and its figures."""

    model: MLP
    points: Samples
    row: dict[str, float]

    def probability(self, x: Tensor) -> Tensor:
        """Return the probability of label 1 at ``x (n, 2)``, on the CPU."""
        with torch.no_grad():
            return self.model(x.to(self.points.features)).squeeze(1).cpu()  # type: ignore[no-any-return]


def build(
    sizes: list[int], penalty: float, seed: int, device: torch.device | str = "cpu"
) -> tuple[MLP, Optimizer]:
    """Return a network whose one output is the probability of label 1, and its optimizer."""
    torch.manual_seed(seed)
    model = MLP(sizes, hidden="relu", output="sigmoid").to(device)
    return model, sgd(model, lr=0.2, momentum=0.9, weight_decay=penalty)


def loss_sum(p: Tensor, labels: Tensor) -> Tensor:
    """Return the binary cross-entropy of the probabilities ``p (b, 1)``, summed over samples."""
    return binary_cross_entropy(p.squeeze(1), labels.to(p), reduction="sum")


def train(
    model: MLP,
    optimizer: Optimizer,
    points: Samples,
    epochs: int,
    batch_size: int,
    seed: int,
    speaks: bool = False,
) -> None:
    steps = epochs * -(-len(points) // batch_size)
    scheduler = LambdaLR(optimizer, lambda step: 1 - step / steps)
    for epoch in console.progress(range(1, epochs + 1), "epochs", speaks):
        for x, labels, _ in batches(points, batch_size, seed=seed, epoch=epoch):
            loss = loss_sum(model(x), labels) / len(x)
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


@torch.no_grad()
def evaluate(model: MLP, points: Samples) -> tuple[float, float]:
    """Return the mean loss and the accuracy."""
    p = model(points.features).double()
    right = (p.squeeze(1) > 0.5) == points.labels
    return loss_sum(p, points.labels).item() / len(points), right.double().mean().item()


def compare(flags: Flags, device: torch.device) -> list[Trained]:
    """Train networks, one without --noise, and return them, the best by validation loss last."""
    n, wrong, epochs, batch_size = (50, 0.1, 3, 10) if flags.noise else (4000, 0.0, 1, 100)
    points, validation = (
        draw(k, 3 * flags.seed + i, wrong, device) for i, k in enumerate((n, 1000))
    )
    test = draw(2500, 3 * flags.seed + 2, device=device)  # without wrong labels
    choices = list(product(WIDTHS, PENALTIES) if flags.noise else [(30, 0.0)])
    networks = []
    for width, penalty in console.progress(choices, "networks", speaks=flags.noise):
        model, optimizer = build([2, width, 1], penalty, flags.seed, device)
        passes = epochs * flags.epochs
        # One bar at a time: of networks, or of the epochs of the only one.
        train(model, optimizer, points, passes, batch_size, flags.seed, speaks=not flags.noise)
        row = {"width": width, "penalty": penalty, "train_loss": evaluate(model, points)[0]}
        row["validation_loss"], _ = evaluate(model, validation)
        row["test_loss"], row["test_accuracy"] = evaluate(model, test)
        check_finite("a loss", row["train_loss"], row["validation_loss"], row["test_loss"])
        networks.append(Trained(model, points, row))
        print(" | ".join(f"{name.replace('_', ' ')} {value:<6.4g}" for name, value in row.items()))
    return sorted(networks, key=lambda network: -network.row["validation_loss"])


# The report


def time_epoch(
    first_seed: int, way: Way, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Epoch:
    """Train one epoch with layers by hand, and return the figures of this rank."""
    torch.set_num_threads(way.threads)
    torch.manual_seed(first_seed)
    network = build_network([2, 128, 128, 1], "relu", "sigmoid", device=device, dtype=dtype)
    loss = BinaryCrossEntropy()
    samples = draw(2**15, first_seed, device=device)
    samples = replace(samples, features=samples.features.to(dtype))
    parts: dict[tuple[str, str], float] = defaultdict(float)
    if way.profiled:
        for part, name in product((*network.layers, loss), PASSES):
            setattr(part, name, timed(getattr(part, name), parts, (type(part).__name__, name)))
    with join_world(device, gloo_yields=True) as world:
        start = now(world.device)
        for x, labels, global_size in batches(
            samples, way.size, seed=seed, epoch=1, share=world.share
        ):
            loss.forward(network.forward(x), labels)
            # The loss is a mean over this rank's share of the batch.
            network.backward(loss.backward() * (len(x) / global_size))
            if world.world_size > 1:
                gradients = list(network.gradients().values())
                vector_to_parameters(world.sum(parameters_to_vector(gradients)), gradients)
            network.step(lr=0.2)
        seconds, parts = now(world.device) - start, {**parts}  # without those of the evaluation
    return Epoch(
        seconds, loss.forward(network.forward(samples.features), samples.labels).item(), parts
    )


def timed(
    function: Callable[..., Tensor], seconds: dict[tuple[str, str], float], part: tuple[str, str]
) -> Callable[..., Tensor]:
    """Return ``function``, which then adds its seconds to those of ``part``."""

    def call(*args: Tensor) -> Tensor:
        start = time.perf_counter()
        result = function(*args)
        seconds[part] += time.perf_counter() - start
        return result

    return call


def measure(flags: Flags) -> Rounds:
    """Time epochs of data-parallel training on the CPU, and return those of rank 0.

    Each round times all ways in turn, so that whatever disturbs the machine disturbs all alike. The
    first round computes in float64, as rounding can turn a ReLU of float32 on.
    """
    rounds: Rounds = {}
    for size, n in product(flags.sizes, flags.processes):
        rounds |= {
            Way(size, processes=n): [],
            Way(size, threads=n): [],
            Way(size, profiled=True): [],
        }
    with ExitStack() as stack:
        # A process that has had a second thread keeps it.
        kinds = {(way.processes, way.threads) for way in rounds}
        groups = {kind: stack.enter_context(Ranks()) for kind in kinds}
        turns = [*product(range(1 + ROUNDS), rounds)]
        for seed, way in console.progress(turns, "epochs timed"):
            dtype = torch.float32 if seed else torch.float64
            run = groups[way.processes, way.threads]
            rounds[way].append(run(way.processes, time_epoch, flags.seed, way, seed, dtype)[0])
    return rounds


def profile(epochs: Sequence[Epoch]) -> dict[tuple[str, str], float]:
    """Return the median share of each layer's passes in serial epochs."""
    return {part: median(e.parts[part] / e.seconds for e in epochs) for part in epochs[0].parts}


def amdahl(p: float, n: int) -> float:
    """Return the speed-up on ``n`` processes if a share ``p`` of the time is divided among them."""
    return 1 / ((1 - p) + p / n)


def limit(p: float) -> float | None:
    """Return the speed-up on as many processes as you like; None, as JSON has no infinity, if p is
    1."""
    return 1 / (1 - p) if p < 1 else None


def fit(speedups: Mapping[int, float]) -> float:
    """Return the p in [0, 1] that fits measured speed-ups best, by least squares.

    In ``1/S = 1 − p·(1 − 1/N)`` the law is linear, and the sum of squared residuals of 1/S =
    T(N)/T(1) is least at ``p = Σ (1 − 1/N)·(1 − 1/S) / Σ (1 − 1/N)²``; where that lies outside
    [0, 1], at the nearer end.

    Args:
        speedups: S for each N. N = 1 does not affect the fit. With a single N > 1 it is exact if 1
            ≤ S ≤ N.
    """
    p = sum((1 - 1 / n) * (1 - 1 / s) for n, s in speedups.items())
    return min(max(p / sum((1 - 1 / n) ** 2 for n in speedups), 0.0), 1.0)


def report(flags: Flags) -> list[console.Row]:
    """Print the profile, what Amdahl's law predicts from it, and what was measured; return these
    rows.

    The times are medians of all rounds but the first, which gives the losses.
    """
    console.print_load()
    rounds = measure(flags)
    off = max(
        abs(first.loss / rounds[Way(way.size)][0].loss - 1) for way, (first, *_) in rounds.items()
    )
    if not off <= LOSS_ERROR:
        raise ConfigError(
            f"the loss on several processes is off by {off:.0e} of that on one; report this"
        )
    ms = {way: 1000 * median(e.seconds for e in epochs[1:]) for way, epochs in rounds.items()}
    shares = {size: profile(rounds[Way(size, profiled=True)][1:]) for size in flags.sizes}
    print_profile(shares[flags.sizes[-1]], flags.sizes[-1])
    measured_p, threads = sum(shares[flags.sizes[-1]].values()), COURSE_THREADS
    print(
        f"by Amdahl's law {threads} threads would gain {amdahl(measured_p, threads):.2f} times "
        f"with p = {measured_p:.4f}, and {amdahl(COURSE_P, threads):.2f} times with p = {COURSE_P}"
    )
    speedups: list[console.Row] = []
    fits: list[console.Row] = []
    no_law: set[int] = set()  # rows of `fits`
    for size in flags.sizes:
        of_processes = {n: ms[Way(size)] / ms[Way(size, processes=n)] for n in flags.processes}
        of_threads = {n: ms[Way(size)] / ms[Way(size, threads=n)] for n in flags.processes}
        p = sum(shares[size].values())
        for n in flags.processes[1:]:
            row = {"batch_size": size, "ms_on_1": ms[Way(size)], "N": n, "predicted": amdahl(p, n)}
            speedups.append(row | {"N_processes": of_processes[n], "N_threads": of_threads[n]})
        for by, share, gains in (
            ("profile", p, {}),
            ("processes", fit(of_processes), of_processes),
            ("threads", fit(of_threads), of_threads),
        ):
            if gains and (share == 0 or any(s > n for n, s in gains.items())):
                no_law.add(len(fits))
            fits.append({"batch_size": size, "by": by, "p": share, "limit": limit(share)})
    believable = [believed(row, row["N"]) for row in speedups]
    console.print_rows(believable, "speed-up, predicted by the profile and measured")
    shown = [{**row, "limit": "∞"} if row["limit"] is None else row for row in fits]
    shown = [{**row, "p": "?", "limit": "?"} if i in no_law else row for i, row in enumerate(shown)]
    console.print_rows(shown, "p, and the limit 1/(1 − p)")
    if no_law:
        print(
            "?: no p fits, as N took longer than one, or less than an N-th of its time, which is "
            "no speed-up; messages, or other programs, took the rest"
        )
    print(
        f"all numbers of processes and threads reach the same loss (largest difference {off:.0e})"
    )
    most = flags.processes[-1]
    if len(flags.processes) == 2:
        print(
            f"p is fitted to N = {most} alone: whether the law holds, only more processes would "
            "tell"
        )
    if most > CORES:
        print(
            f"{most} processes on {CORES} cores are oversubscribed: the machine limits them, not "
            "the law"
        )
    return [*speedups, *fits, *compare_devices(flags, ms)]


def believed(row: console.Row, most: Any) -> console.Row:
    """The row with "?" for a measured speed-up above ``most``, which as many cannot have."""
    gains: dict[str, Any] = {name: row[name] for name in ("N_processes", "N_threads")}
    return {**row, **{name: "?" for name, gain in gains.items() if gain > most}}


def print_profile(shares: Mapping[tuple[str, str], float], size: int) -> None:
    """Print the share of each layer in a serial epoch."""
    kinds = list(dict.fromkeys(kind for kind, _ in shares))
    table = {kind: [shares[kind, name] for name in PASSES] for kind in kinds}
    kinds.sort(key=lambda kind: -sum(table[kind]))
    table["all: p"] = [sum(column) for column in zip(*table.values(), strict=True)]
    rows = [
        {"layer": kind}
        | {name: f"{x:.2%}" for name, x in zip((*PASSES, "both"), (*row, sum(row)), strict=True)}
        for kind, row in ((kind, table[kind]) for kind in (*kinds, "all: p"))
    ]
    console.print_rows(rows, f"share of a serial epoch, batches of {size}")


def compare_devices(flags: Flags, ms: Mapping[Way, float]) -> list[console.Row]:
    """Print the speed-up of a GPU over one thread of the CPU, or why there is none; return a row
    per size."""
    if flags.device == "cpu" or not torch.cuda.is_available():
        reason = "--device is cpu" if flags.device == "cpu" else "PyTorch finds no GPU"
        print(f"left out: the speed-up from CPU to GPU, as {reason}")
        return []
    rows: list[console.Row] = []
    for size in flags.sizes:
        epochs = [
            time_epoch(flags.seed, Way(size), seed, device="cuda") for seed in range(1 + ROUNDS)
        ]
        row = {"batch_size": size, "ms_on_1": ms[Way(size)]}
        row["ms_on_GPU"] = 1000 * median(epoch.seconds for epoch in epochs[1:])
        rows.append(row | {"speedup": row["ms_on_1"] / row["ms_on_GPU"]})
    console.print_rows(rows, "from one thread of the CPU to the GPU")
    return rows


def main(flags: Flags) -> None:
    start = time.perf_counter()
    with join_world(flags.device, alone=True) as world:
        networks = compare(flags, world.device)
    best = networks[-1]
    rows: list[console.Row] = [network.row for network in networks]
    shown = {"the quadrants": best}
    if flags.noise:
        worst = max(
            networks, key=lambda network: network.row["validation_loss"] - network.row["train_loss"]
        )
        shown = {"furthest above its training loss": worst, "lowest validation loss": best}
        for what, network in reversed(shown.items()):
            row = network.row
            losses = (
                f"{row['train_loss']:.3f} in training, {row['validation_loss']:.3f} in validation"
            )
            print(f"{what}: width {row['width']}, λ {row['penalty']:g} ({losses})")
    else:
        rows = [*report(flags), best.row]
    if flags.plots:
        panels = {
            f"{what}:\nwidth {one.row['width']}, λ {one.row['penalty']:g}": (
                one.points,
                one.probability,
            )
            for what, one in shown.items()
        }
        name = "quadrants-noise.png" if flags.noise else "quadrants-boundary.png"
        plots.save_boundaries(flags.plots / name, panels)
    figures = (best.row["test_accuracy"], best.row["test_loss"], time.perf_counter() - start)
    print(console.last_line(*figures, ranks=1, device=world.device.type))
    console.write_metrics(flags.metrics, rows)


if __name__ == "__main__":
    cli.main(main, Flags)
