# SPDX-License-Identifier: MIT
"""Compare `torchpar.optim.Muon` with other Muons, and with SGD on MNIST:
``python -m benchmarks run muon``.

The first table is the time of a step of one weight, or of many; all optimizers get the same
gradients. After the steps the weights must agree with those of `torch.optim.Muon`, as far as
orthogonalising in bfloat16 lets them; the status is 1 if torchpar's do not. The second table has
the test error and the training loss of a network 784-512-10 with sigmoid layers, in batches of 32,
with SGD and with Muon, each at its best rate.

On a GPU each step is timed twice. First the queue is empty, so that the time contains the host's:
this is what a script sees. Then the GPU sleeps while the host fills the queue, so that the time is
that of the kernels.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR

from torchpar import data
from torchpar.nn import MLP
from torchpar.optim import Muon
from torchpar.parallel.launch.world import join_world
from torchpar.training import Classification, Run, muon, sgd

from ..digits import DATA
from ..flags import Command, run
from ..results import Result, Table, print_results, track
from ..timing import Timed, Times, take_turns, time_calls
from . import others

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
GPU_WEIGHTS: dict[str, Shapes] = {
    "48 of GPT-2 small": [(768, 768), (768, 2304), (768, 3072), (3072, 768)] * 12,
    "2048x2048": [(2048, 2048)],
    "1024x4096": [(1024, 4096)],
    "4096x1024": [(4096, 1024)],
    "8 of 1024x4096": [(1024, 4096)] * 8,
    "2048x8192": [(2048, 8192)],
    "4096x4096": [(4096, 4096)],
    "4096x11008": [(4096, 11008)],
    "50 of 128x128": [(128, 128)] * 50,
    # Of each of 16 layers q and o, k and v, gate and up, and down.
    "112 of Llama 3.2 1B": [
        *[(2048, 2048), (2048, 2048), (512, 2048), (512, 2048)] * 16,
        *[(8192, 2048), (8192, 2048), (2048, 8192)] * 16,
    ],
}
QUICK: dict[str, Shapes] = {"24x64": [(24, 64)], "3 of 64x24": [(64, 24)] * 3}
# Without the last, whose steps take longest.
GPU_QUICK = dict(list(GPU_WEIGHTS.items())[:-1])
# Of the way: bfloat16's roundings of directions, an order less for momenta that are noise.
DISTANCE = 0.03
ROUNDS = 15  # steps of each optimizer and weight that are timed
CYCLES = 2e9  # of a GPU in a second, rather too many
LONGEST_SLEEP = 0.5  # seconds
SIZES = (784, 512, 10)
EPOCHS = 8
BATCH_SIZE = 32
SGD_LR, MUON_LR = 0.1, 0.03  # the best of 0.05, 0.1, 0.2 and 0.3, and of 0.01, 0.02 and 0.03
REFERENCE = "torch.optim.Muon"
OPTIMIZERS: dict[str, others.Maker] = {
    REFERENCE: torch.optim.Muon,
    "torchpar, standard": partial(Muon, ns="standard"),
    "torchpar, gram": partial(Muon, ns="gram"),
    "torchpar": Muon,
    **others.INSTALLED,
}


class Steps:
    """Steps of one optimizer, which start at the weights ``start``.

    Attributes:
        weights: where they have come to.
        queued: times of the steps in a full queue, on a GPU.
    """

    def __init__(self, name: str, start: Sequence[Tensor]):
        self.name = name
        self.weights = [torch.nn.Parameter(w.clone()) for w in start]
        self.queued = Times()
        self._optimizer: torch.optim.Optimizer | None = None

    def turn(self, gradients: Sequence[Tensor], index: int) -> list[float]:
        """Time a step, or two on a GPU; the seconds of the first one."""
        timed = self._step(gradients)
        seconds = timed.seconds()
        if torch.cuda.is_available():
            # The first step may have compiled for minutes.
            filled = self._step(gradients, sleep=2 * timed.host if index else 0).seconds()
            if index:
                self.queued.rounds.append([filled])
        return [seconds]

    def _step(self, gradients: Sequence[Tensor], sleep: float = 0) -> Timed[None]:
        if self._optimizer is None:  # not earlier: a package may fail already here
            self._optimizer = OPTIMIZERS[self.name](self.weights)
        for weight, gradient in zip(self.weights, gradients, strict=True):
            weight.grad = gradient.clone()
        device = self.weights[0].device
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if sleep and device.type == "cuda":  # and not a CPU that stands for one
            torch.cuda._sleep(int(min(sleep, LONGEST_SLEEP) * CYCLES))
        timed = time_calls(self._optimizer.step, device)
        for weight in self.weights:
            weight.grad = None
        return timed


def compare_steps(
    label: str, shapes: Shapes, rounds: int, device: torch.device, names: Sequence[str]
) -> list[Result]:
    """Time a step of each of the optimizers ``names`` on float32 weights of ``shapes``."""
    torch.manual_seed(0)
    if set(names) & set(others.COMPILING):
        torch.compiler.reset()  # which compiles a function for a few shapes, and then no more
    start = [torch.randn(shape, device=device) for shape in shapes]
    steps = {name: Steps(name, start) for name in names}
    gradients = [torch.empty_like(w) for w in start]

    def draw_gradients(_: int) -> None:
        for gradient in gradients:
            gradient.normal_()

    turns = {name: partial(one.turn, gradients) for name, one in steps.items()}
    times = take_turns(turns, rounds, before=draw_gradients, label=label)
    reference = steps[REFERENCE]
    way = distance(reference.weights, start)
    results = []
    for name, one in times.items():
        columns: dict[str, float | None] = {}
        if not one.reason:
            apart = distance(steps[name].weights, reference.weights) / way
            columns["distance"] = apart
            if not apart < DISTANCE:
                one.reason = f"the weights ended {apart:.2g} of the way from {REFERENCE}'s"
        queued = steps[name].queued
        if queued.rounds and not one.reason:
            columns["queued_ms"] = 1e3 * median(queued.all)
            columns["queued_speedup"] = queued.speedup_over(reference.queued)
        results.append(one.result({"weight": label}, name, times[REFERENCE], **columns))
    return results


def distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The norm of the difference of all weights."""
    norms = [(mine - other).norm() for mine, other in zip(ours, theirs, strict=True)]
    return float(torch.stack(norms).detach().norm())


def memory(shapes: Shapes, optimizers: int) -> int:
    """Bytes that `compare_steps` takes: of each optimizer weights and momenta, then the weights at
    the start, gradients, their copies, and the update of one optimizer."""
    return 4 * sum(m * n for m, n in shapes) * (2 * optimizers + 4)


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
            schedule = LambdaLR(optimizer, lambda step: 1 - step / steps)
            task = Classification(train_set, test_set, BATCH_SIZE)
            with Run(model, optimizer, schedule, world, task, epochs=epochs) as run:
                for epoch in track(run.epochs(), f"epochs of {name}", epochs):
                    for x, labels, size in run.batches(epoch):
                        loss = cross_entropy(model(x), labels, reduction="sum")
                        (loss / size).backward()
                        optimizer.step()
                        schedule.step()
                        optimizer.zero_grad()
                        run.end_step(loss_sum=loss)
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
    command = Command("muon")
    every = QUICK | WEIGHTS | GPU_WEIGHTS
    command.parser.add_argument(
        "--weights",
        nargs="+",
        choices=every,
        metavar="WEIGHTS",
        help=f"only steps, of these of {', '.join(every)}",
    )
    options = command.parse(arguments)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    table = Table(command.csv(options), device, threads=torch.get_num_threads())
    of_device = (WEIGHTS, GPU_WEIGHTS)[on_gpu]
    if options.quick:
        of_device = (QUICK, GPU_QUICK)[on_gpu]
    names = list(OPTIMIZERS)
    if options.quick and (slow := [name for name in others.COMPILING if name in names]):
        names = [name for name in names if name not in slow]
        print(f"left out of --quick: {', '.join(slow)}, whose first steps compile")
    for label in options.weights or of_device:
        needed = memory(every[label], len(names))
        if on_gpu and needed > torch.cuda.mem_get_info()[0]:
            print(f"left out: {label}, which needs {needed / 1e9:.0f} GB of the GPU's memory")
            continue
        rounds = 2 if options.quick else ROUNDS
        table.add(compare_steps(label, every[label], rounds, device, names))
    print_results("a step of Muon", table.results)
    if not options.weights:
        curves = train(1, samples=320) if options.quick else train(EPOCHS)
        print_results("an MLP on MNIST", table.add(curves))
    # The limits of other packages are findings.
    return int(any(not one.ok for one in table.results if one.contestant not in others.INSTALLED))


if __name__ == "__main__":
    run(main, "run muon")
