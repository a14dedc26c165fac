# SPDX-License-Identifier: MIT
"""Compare `torchpar.optim.Muon` with torch's Muon, and with SGD on MNIST:
``python -m benchmarks run muon``.

The first table is the time of a step of one weight, or of many small ones; all optimizers get the
same gradients. After the steps the weights must agree, as far as orthogonalising in bfloat16 lets
them; the status is 1 if some do not. The second table has the test error and the training loss of a
network 784-512-10 with sigmoid layers, in batches of 32, with SGD and with Muon, each at its best
rate.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec

import torch
from torch.nn.functional import cross_entropy

from benchmarks.command import Command, run
from benchmarks.digits import DATA
from benchmarks.results import Result, Table, print_results, track
from benchmarks.timing import take_turns, time_calls
from torchpar import data
from torchpar.nn import MLP
from torchpar.optim import Muon
from torchpar.optim.newton_schulz import COEFFICIENTS
from torchpar.parallel.launch.world import join_world
from torchpar.training import Classification, Run, lr_scheduler, muon, sgd

Shapes = list[tuple[int, int]]
WEIGHTS: dict[str, Shapes] = {
    "2048x2048": [(2048, 2048)],
    "1024x4096": [(1024, 4096)],
    "4096x1024": [(4096, 1024)],
    "512x784": [(512, 784)],
    "50 of 128x128": [(128, 128)] * 50,
    # No two have the same shape.
    "126 unequal": [(16 + 5 * i % 113, 16 + i) for i in range(126)],
}
QUICK: dict[str, Shapes] = {"24x64": [(24, 64)], "3 of 64x24": [(64, 24)] * 3}
# Of the way: bfloat16's roundings of directions, an order less for momenta that are noise.
DISTANCE = 0.03
ROUNDS = 15  # steps of each optimizer and weight that are timed
SIZES = (784, 512, 10)
EPOCHS = 8
BATCH_SIZE = 32
SGD_LR, MUON_LR = 0.1, 0.03  # the best of 0.05, 0.1, 0.2 and 0.3, and of 0.01, 0.02 and 0.03
REFERENCE = "torch.optim.Muon"
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    REFERENCE: torch.optim.Muon,
    "torchpar, standard": partial(Muon, ns="standard"),
    "torchpar, gram": partial(Muon, ns="gram"),
    "torchpar": Muon,
}


def gram_newton_schulz(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The package's Muon, with the coefficients and the rates of the others."""
    package = importlib.import_module("gram_newton_schulz")

    def adjust(lr: float, shape: tuple[int, ...]) -> float:
        return lr * math.sqrt(max(1.0, shape[-2] / shape[-1]))

    by_kernels = params[0].is_cuda
    coefficients = [list(COEFFICIENTS)] * 5
    return package.Muon(  # type: ignore[no-any-return]
        params, adjust_lr=adjust, ns_coefficients=coefficients, ns_use_kernels=by_kernels
    )


if find_spec("gram_newton_schulz"):
    OPTIMIZERS["gram-newton-schulz"] = gram_newton_schulz


def compare_steps(label: str, shapes: Shapes, rounds: int, device: torch.device) -> list[Result]:
    """Time a step of each optimizer on float32 weights of ``shapes``."""
    torch.manual_seed(0)
    start = [torch.randn(shape, device=device) for shape in shapes]
    weights = {name: [torch.nn.Parameter(w.clone()) for w in start] for name in OPTIMIZERS}
    optimizers = {name: make(weights[name]) for name, make in OPTIMIZERS.items()}
    gradients = [torch.empty_like(w) for w in start]

    def draw_gradients(_: int) -> None:
        for gradient in gradients:
            gradient.normal_()

    def turn(name: str, index: int) -> list[float]:
        for weight, gradient in zip(weights[name], gradients, strict=True):
            weight.grad = gradient.clone()
        if device.type == "cuda":
            # The queue fills meanwhile, so that no launch is in the time.
            torch.cuda._sleep(10_000_000)
        return [time_calls(optimizers[name].step, device).seconds()]

    turns = {name: partial(turn, name) for name in OPTIMIZERS}
    times = take_turns(turns, rounds, before=draw_gradients, label=label)
    ended = {name: torch.cat([w.detach().flatten() for w in weights[name]]) for name in OPTIMIZERS}
    way = (ended[REFERENCE] - torch.cat([w.flatten() for w in start])).norm()
    results = []
    for name, one in times.items():
        distance = float((ended[name] - ended[REFERENCE]).norm() / way)
        if not (one.reason or distance < DISTANCE):
            one.reason = f"the weights ended {distance:.2g} of the way from {REFERENCE}'s"
        results.append(one.result({"weight": label}, name, times[REFERENCE], distance=distance))
    return results


def train(epochs: int, samples: int | None = None) -> list[Result]:
    """Train a network on MNIST with SGD and with Muon: a result for each epoch."""
    results = []
    makers: dict[str, Callable[[MLP], torch.optim.Optimizer]] = {
        "sgd": partial(sgd, lr=SGD_LR, momentum=0.9, weight_decay=3e-5),
        "muon": partial(muon, lr=MUON_LR, momentum=0.95, weight_decay=0.01),
    }
    with join_world(alone=True) as world:
        train_set, test_set = data.load("mnist", DATA, world.device)
        train_set = train_set[:samples]
        steps = epochs * math.ceil(len(train_set) / BATCH_SIZE)
        for name, make in makers.items():
            torch.manual_seed(0)
            model = MLP(SIZES).to(world.device)
            optimizer = make(model)
            schedule = lr_scheduler(optimizer, "linear", steps)
            task = Classification(train_set, test_set, BATCH_SIZE)
            with Run(model, optimizer, schedule, world, task, epochs=epochs) as run:
                for epoch in track(run.epochs(), f"{name}, epochs", epochs):
                    for x, labels, size in run.batches(epoch):
                        loss = cross_entropy(model(x), labels, reduction="sum")
                        (loss / size).backward()
                        optimizer.step()
                        schedule.step()
                        optimizer.zero_grad()
                        run.end_step(loss)
                    run.end_epoch()
            case = {"weight": "-".join(map(str, SIZES))}
            for score in run.results:
                assert score.test_accuracy is not None
                error = 100 * (1 - score.test_accuracy)
                columns = {
                    "epoch": score.epoch,
                    "train_loss": score.train_loss,
                    "error_percent": error,
                }
                results.append(Result(case=case, contestant=name, columns=columns))
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    command = Command("muon", "Compare Muon with torch.optim.Muon and with SGD.")
    command.parser.add_argument(
        "--weights",
        nargs="+",
        choices=WEIGHTS,
        metavar="WEIGHTS",
        help=f"only steps, of these of {', '.join(WEIGHTS)}",
    )
    options = command.parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = Table(command.csv(options), device, threads=torch.get_num_threads())
    chosen = {label: WEIGHTS[label] for label in options.weights or WEIGHTS}
    for label, shapes in (QUICK if options.quick else chosen).items():
        table.add(compare_steps(label, shapes, 2 if options.quick else ROUNDS, device))
    print_results("a step of Muon", table.results)
    if options.weights:
        return table.status
    curves = train(1, samples=320) if options.quick else train(EPOCHS)
    print_results("an MLP on MNIST", table.add(curves))
    return table.status


if __name__ == "__main__":
    run(main)
