# SPDX-License-Identifier: MIT
"""Compare exact arithmetic with PyTorch's, and recorded steps with others:
``python -m benchmarks run exact``.

It has three parts: products of matrices, beside `torch.mm` in float32 and in the operands' own
dtype; a step of the lesson `train_ddp.py`, phase by phase; and steps of two models that
`torchpar.exact.record` records, in exact arithmetic and outside of it. The column ``slowdown`` is a
ratio of lower quartiles: the time of a row over that of the contestant whose row has 1.

All is computed on the CPU, in one process. ``--device cuda`` times the products alone, on a GPU,
whose results must have the CPU's bits. Outside of exact arithmetic the lesson's step has no
`DistributedDataParallel`, whose messages one process does not need.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from torchpar import exact
from torchpar.errors import ConfigError
from torchpar.exact.verify.models import (
    LESSON_BATCH,
    LESSON_MUON,
    LESSON_SIZES,
    LESSON_SMOOTHING,
    LESSON_UNIT,
)
from torchpar.nn import MLP
from torchpar.training import muon

from .compare import compare
from .flags import Command, run
from .operators import ROUNDS, WARM, WARM_CALLS, make_case
from .operators import SECONDS as SECONDS_OF_PRODUCTS
from .records import workloads
from .records.record import Workload
from .results import Result, Table, print_results
from .timing import CPU, Rejected, Times, take_turns

# The parts, their titles, and the columns that are printed of each.
PARTS = {
    "products": (
        "products of matrices",
        "operator shape dtype mode threads contestant p20_ms slowdown slowdown_of_dtype ok",
    ),
    "lesson": (
        "a step of the lesson train_ddp.py",
        "network batch threads phase contestant p20_ms slowdown ok",
    ),
    "record": (
        "steps that torchpar.exact.record records",
        "network batch threads arithmetic contestant p20_ms slowdown ok",
    ),
}
PRODUCTS = ("exact_matmul", "exact_matmul_t")
SIDES = (64, 128, 256, 1024, 2048)  # of square matrices
GPU_SIDES = (1024, 2048, 4096)
QUICK_SIDES = (65,)
MOST_COMPARED = 1024  # the side of the products that the CPU computes, too
# A contestant of the other parts has no further turn after so many seconds and turns.
SECONDS, LEAST = 10.0, 3
FLOAT32, OWN, EXACT = "torch.mm, float32", "torch.mm", "exact"
OUTSIDE, PLAIN, RECORDED = "outside", "not recorded", "recorded"
PHASES = ("forward", "backward", "sum of units", "optimizer")
STEP = "step"
LOSS_ERROR = 1e-5  # relative; rounding moves a loss by less
# Layers and batches of the models whose steps are recorded: the lesson's, and ten layers.
MODELS = [(LESSON_SIZES, LESSON_BATCH), ((512,) * 11, 256)]
QUICK_MODELS = [((12, 8, 10), 8)]
# The steps of a recording, without its first one: `record` takes each optimizer's state in 8 steps.
STEPS = 8


def time_products(side: int, rounds: int, device: torch.device) -> Iterator[Result]:
    """Time both products of square matrices in each dtype, on a CPU with cold caches and, if small,
    warm."""
    for one in map(workloads().get, PRODUCTS):
        assert one is not None
        for dtype in one.dtypes:
            for result in time_product(one, side, dtype, rounds, device):
                own = result.columns.get(f"over {OWN}")
                over = result.columns.get(f"over {FLOAT32}", own)
                slowdowns = {"slowdown": over and 1 / over, "slowdown_of_dtype": own and 1 / own}
                yield result.plus(**slowdowns)


def time_product(
    workload: Workload, side: int, dtype: torch.dtype, rounds: int, device: torch.device
) -> Iterator[Result]:
    sizes, on_cpu = (side,) * len(workload.quick[0]), device.type == "cpu"
    case, wide = (make_case(workload, sizes, one, device) for one in (dtype, torch.float32))
    beside = {FLOAT32: (wide, workload.native)} if dtype != torch.float32 else {}
    has_bits = True
    if not on_cpu and side <= MOST_COMPARED:
        *operands, _ = case.inputs(0)
        found, expected = (
            workload.ours(*(t.to(one) for t in operands)).cpu() for one in (device, CPU)
        )
        has_bits = torch.equal(found, expected)
    for calls in (1, WARM_CALLS) if on_cpu and case.forward.bytes <= WARM else (1,):
        for result in compare(
            case,
            {OWN: workload.native, EXACT: workload.ours},
            reference=OWN,
            beside=beside,
            rivals=[*beside],
            rounds=rounds,
            seconds=SECONDS_OF_PRODUCTS[device.type],
            calls=calls,
        ):
            is_wrong = result.contestant == EXACT and not has_bits
            yield replace(result, ok=False, reason="not a CPU's bits") if is_wrong else result


class Clock:
    """The seconds of each phase of a step."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start


class TimedSums(exact.DataParallel):
    """It tells the clock what it adds, of which a part lies within its ``backward``."""

    def __init__(self, model: torch.nn.Module, clock: Clock):
        super().__init__(model)
        self._clock = clock

    def _add(self, loss: Tensor) -> None:
        with self._clock.phase("sum of units"):
            super()._add(loss)


class Training:
    """Steps of the lesson's kind: an MLP with sigmoid layers, Muon and label smoothing.

    Args:
        sizes: of the MLP's layers.
        is_exact: in `torchpar.exact.mode`, by units of `LESSON_UNIT` samples.
    """

    def __init__(self, sizes: Sequence[int], batch: int, is_exact: bool):
        self.is_exact = is_exact
        generator = torch.Generator().manual_seed(0)
        self.x = torch.rand(batch, sizes[0], generator=generator)
        self.labels = torch.randint(sizes[-1], (batch,), generator=generator)
        self.clock = Clock()
        with self.mode():
            torch.manual_seed(0)
            self.model = MLP(sizes)
            self.optimizer = muon(self.model, *LESSON_MUON, foreach=False if is_exact else None)
            self.parallel = TimedSums(self.model, self.clock) if is_exact else None

    def mode(self) -> AbstractContextManager[None]:
        # Outside of exact.mode() a watch for its tensors would take some µs of each call.
        return exact.mode() if self.is_exact else torch._C.DisableTorchFunction()

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        with self.clock.phase("forward"):
            total = cross_entropy(
                self.model(x), labels, reduction="sum", label_smoothing=LESSON_SMOOTHING
            )
            return total / len(self.x)

    def step(self) -> float:
        """Take a step, and return the loss before it."""
        clock = self.clock
        with self.mode():
            if self.parallel is None:
                loss = self.loss(self.x, self.labels)
                with clock.phase("backward"):
                    loss.backward()
            else:
                units = self.x.split(LESSON_UNIT), self.labels.split(LESSON_UNIT)
                for x, labels in zip(*units, strict=True):
                    loss = self.loss(x, labels)
                    before = clock.seconds["sum of units"]
                    with clock.phase("backward"):
                        self.parallel.backward(loss)
                    clock.seconds["backward"] -= clock.seconds["sum of units"] - before
                with clock.phase("sum of units"):
                    loss = self.parallel.all_reduce()
            with clock.phase("optimizer"):
                self.optimizer.step()
                self.optimizer.zero_grad()
            return loss.item()


def time_lesson(sizes: Sequence[int], batch: int, rounds: int) -> Iterator[Result]:
    """Time the phases of a step in exact arithmetic, beside those outside of it."""
    trainings = {OUTSIDE: Training(sizes, batch, False), EXACT: Training(sizes, batch, True)}
    weights = trainings[EXACT].model.state_dict()
    trainings[OUTSIDE].model.load_state_dict(weights)
    phases = {name: {phase: Times() for phase in PHASES} for name in trainings}
    losses = dict.fromkeys(trainings, 0.0)  # of the first step

    def turn(name: str, index: int) -> list[float]:
        seconds = trainings[name].clock.seconds
        seconds.update(dict.fromkeys(PHASES, 0.0))
        start = time.perf_counter()
        loss = trainings[name].step()
        whole = time.perf_counter() - start
        if index == 0:
            losses[name] = loss
        if abs(losses[name] / losses[OUTSIDE] - 1) > LOSS_ERROR:
            raise Rejected(f"the first losses are {losses}")
        for phase, one in seconds.items():
            if index and one:
                phases[name][phase].rounds.append([one])
        return [whole]

    turns = {name: partial(turn, name) for name in trainings}
    label = "the lesson's step"
    steps = take_turns(turns, rounds, seconds=SECONDS, least=LEAST, label=label)
    for phase in (*PHASES, STEP):
        both = {name: steps[name] if phase == STEP else phases[name][phase] for name in trainings}
        case = {"network": text_of(sizes), "batch": batch, "phase": phase}
        yield from results_of(case, both, OUTSIDE)


def time_records(sizes: Sequence[int], batch: int, rounds: int, steps: int) -> Iterator[Result]:
    """Time steps that are recorded beside others, in exact arithmetic and outside of it."""
    for arithmetic in (OUTSIDE, EXACT):
        training = Training(sizes, batch, arithmetic == EXACT)

        def turn(is_recorded: bool, _: int, training: Training = training) -> list[float]:
            """Seconds of a step, the mean of several: the end of one is written in the next."""
            with TemporaryDirectory() as folder, record(folder, is_recorded):
                training.step()
                start = time.perf_counter()
                for _ in range(steps):
                    training.step()
                return [(time.perf_counter() - start) / steps]

        turns = {PLAIN: partial(turn, False), RECORDED: partial(turn, True)}
        label = f"{text_of(sizes)}, {arithmetic}, recorded and not"
        times = take_turns(turns, rounds, seconds=SECONDS, least=LEAST, label=label)
        case = {"network": text_of(sizes), "batch": batch, "arithmetic": arithmetic}
        yield from results_of(case, times, PLAIN)


def record(folder: str, is_recorded: bool) -> AbstractContextManager[object]:
    return exact.record(folder) if is_recorded else nullcontext()


def results_of(
    case: dict[str, object], times: dict[str, Times], reference: str
) -> Iterator[Result]:
    labels = {**case, "threads": torch.get_num_threads()}
    for name, one in times.items():
        if one.rounds or one.reason:
            over = one.ratio_over(times[reference]) if times[reference].rounds else None
            yield one.result(labels, name, times[reference], slowdown=over and 1 / over)


def text_of(sizes: Sequence[int]) -> str:
    return "-".join(map(str, sizes))


def main(arguments: Sequence[str] | None = None) -> int:
    command = Command("exact")
    command.choose("--parts", PARTS)
    command.parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda: the products on a GPU"
    )
    options = command.parse(arguments)
    device = torch.device(options.device)
    on_cpu = device.type == "cpu"
    if not on_cpu and options.parts != ["products"]:
        raise ConfigError("--device is cuda, which times products alone; add --parts products")
    table = Table(command.csv(options), device)
    every = torch.get_num_threads()
    for threads in sorted({1, every}) if on_cpu and not options.quick else [every]:
        torch.set_num_threads(threads)
        for part in options.parts:
            for results in measure(part, options.quick, device):
                table.add(result.plus(part=part) for result in results)
    torch.set_num_threads(every)
    for part in options.parts:
        title, columns = PARTS[part]
        print_results(
            f"{title}; slowdown by lower quartiles",
            [one for one in table.results if one.columns["part"] == part],
            columns.split(),
        )
    return table.status


def measure(part: str, quick: bool, device: torch.device = CPU) -> Iterator[Iterator[Result]]:
    """The results of a part, with the present number of threads."""
    rounds, models = (2, QUICK_MODELS) if quick else (ROUNDS, MODELS)
    if part == "products":
        for side in QUICK_SIDES if quick else SIDES if device.type == "cpu" else GPU_SIDES:
            yield time_products(side, rounds, device)
    elif part == "lesson":
        yield time_lesson(*models[0], rounds)
    else:
        for sizes, batch in models:
            yield time_records(sizes, batch, rounds, steps=1 if quick else STEPS)


if __name__ == "__main__":
    run(main)
