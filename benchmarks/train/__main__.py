# SPDX-License-Identifier: MIT
"""Train MLPs on MNIST in many ways, side by side: ``python -m benchmarks run train``.

Every row trains by plain SGD from the same first weights, and all but MPI's on the same batches. The loss of
each batch is checked with float64; of MPI and Lightning, which train whole epochs, the mean loss. The other
rows take turns, of a tenth of an epoch each. A time is the median over the turns, and a speed-up the median
of the ratios. One thread, unless ``--threads`` says otherwise; two ranks have one each.

The seconds to an accuracy are the epochs that training takes at the rate of `RATES`, counted once, times the
steps of an epoch and the time of a step.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.idle_threads import shorten_spins

if __name__ == "__main__":  # libraries read the environment when they are imported
    shorten_spins()
    early = argparse.ArgumentParser(add_help=False)
    early.add_argument("--threads", default="1")
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[name] = early.parse_known_args()[0].threads

import torch

from benchmarks.command import Command, run
from benchmarks.ladder.rungs import Rung, plural
from benchmarks.results import Result, Table, markdown, number, picture, print_results, provenance
from benchmarks.scaling.steps import CORES
from benchmarks.timing import CPU, take_turns
from benchmarks.train import on_ranks, programs
from benchmarks.train.inputs import Training, TrainingInputs
from benchmarks.train.rungs import FUSED, PLAIN, ROUNDS, rungs
from torchpar import data
from torchpar.errors import ConfigError
from torchpar.nn import MLP
from torchpar.optim import SGD
from torchpar.parallel.launch.local import start_ranks
from torchpar.parallel.launch.world import join_world_of_one
from torchpar.training.fused import FusedGradients

FULL = [
    Training((784, 30, 10), 10),
    Training((784, 128, 10), 64),
    Training((784, 128, 64, 10), 128),
    Training((784, 512, 512, 10), 128),
]
WIDE = Training((784, 4096, 4096, 10), 8192, dtype=torch.bfloat16)  # on a GPU
QUICK = [Training((784, 30, 10), 10, samples=105)]
# Of plain SGD; the best of 0.1, 0.5 and 1.
RATES = {"784-30-10": 0.1, "784-128-10": 1.0, "784-128-64-10": 1.0, "784-512-512-10": 1.0}
ACCURACIES = (0.97, 0.98)
EPOCHS = 25  # after which an accuracy counts as not reached
SECONDS = 20.0  # of a row's turns
COLUMNS = ("contestant", "note", "p50_ms", "samples_per_s", "speedup", "to_97_s", "to_98_s")
GPU_COLUMNS = ("launches", "peak_mb")


def epochs_to(inputs: TrainingInputs, most: int) -> dict[float, int]:
    """The epochs after which a network with sigmoid layers first classifies so many test digits right."""
    torch.manual_seed(0)
    model = MLP(inputs.training.sizes)
    gradients, optimizer = FusedGradients(model), SGD(model.parameters(), RATES[inputs.name])
    x = inputs.test.inputs(slice(None))
    reached: dict[float, int] = {}
    for epoch in range(1, most + 1):
        for batch in data.batches(inputs.train, inputs.training.batch_size, seed=0, epoch=epoch):
            gradients(*batch)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            accuracy = (model(x).argmax(1) == inputs.test.labels).double().mean().item()
        for aim in ACCURACIES:
            if accuracy >= aim:
                reached.setdefault(aim, epoch)
        if len(reached) == len(ACCURACIES):
            break
    return reached


def measure(inputs: TrainingInputs, turns: Mapping[tuple[str, str], Rung], rounds: int) -> list[Result]:
    """A row for each way to train; speed-ups are over plain eager on the same kind of device."""
    work = {"network": inputs.name, "batch": inputs.training.batch_size}
    label = f"{inputs.name}, batch {work['batch']}"
    times = take_turns({key: rung.turn for key, rung in turns.items()}, rounds, seconds=SECONDS, label=label)
    plains = (PLAIN, "nn.Sequential, SGD"), (f"{PLAIN}, GPU", "")
    plain = {turns[key].device.type: times[key] for key in plains if key in times}
    rows = []
    for (name, note), rung in turns.items():
        found = {
            "note": note,
            "first_s": times[name, note].first if rung.compiles else None,
            **rung.figures(),
        }
        rows.append(times[name, note].row(work, name, plain[rung.device.type], **found))
    return rows


def with_accuracy(rows: Sequence[Result], inputs: TrainingInputs, most: int) -> list[Result]:
    """The rows with samples per second, and the seconds to each accuracy that is reached."""
    reached = epochs_to(inputs, most) if inputs.name in RATES else {}
    size = inputs.training.batch_size
    done = []
    for row in rows:
        found = dict(row.found)
        if row.p50_ms:
            step = row.p50_ms / 1e3
            found["samples_per_s"] = size / step
            for aim in ACCURACIES:
                epochs = reached.get(aim)
                name = f"to_{100 * aim:.0f}_s"
                found[name] = epochs * len(inputs.x) / size * step if epochs else None
        done.append(replace(row, found=found))
    return done


def label(row: Result) -> str:
    """The name of a row, without how much was extrapolated."""
    return ", ".join(filter(None, (row.contestant, row.found["note"].partition("from ")[0])))


def as_markdown(tables: Sequence[Sequence[Result]], threads: int) -> str:
    """Milliseconds a step in Markdown, a column for each network, and the speed-up over plain eager."""
    heads = [f"{rows[0].case['network']}, batch {rows[0].case['batch']}" for rows in tables]
    lines = [[f"ms a step, {plural(threads, 'thread')}", *heads]]
    for name in dict.fromkeys(label(row) for rows in tables for row in rows):
        cells = []
        for rows in tables:
            row = next((row for row in rows if label(row) == name), None)
            gain = f" ({number(row.speedup)}×)" if row and row.speedup and row.contestant != PLAIN else ""
            cells.append(f"{number(row.p50_ms)}{gain}" if row and row.p50_ms else "")
        lines.append([name, *cells])
    return markdown(lines)


def draw(path: Path, tables: Sequence[Sequence[Result]], title: str) -> None:
    """Speed-ups over plain eager, a panel for each network."""
    with picture(path, 11, 4 * -(-len(tables) // 2)) as figure:
        figure.suptitle(title, fontsize=10)
        panels = figure.subplots(-(-len(tables) // 2), 2, squeeze=False).flatten()
        for axes, rows in zip(panels, tables, strict=False):
            known = [row for row in rows if row.speedup]
            names = [label(row) for row in known]
            colors = ["tab:blue" if row.contestant.startswith(FUSED) else "tab:gray" for row in known]
            axes.barh(range(len(known)), [row.speedup for row in known], color=colors)
            for at, row in enumerate(known):
                axes.text(row.speedup, at, f" {number(row.speedup)}×", va="center", fontsize=7)
            axes.set_yticks(range(len(known)), names, fontsize=7)
            axes.invert_yaxis()
            axes.axvline(1, color="black", lw=1)
            axes.set(xscale="log", xlabel="× plain eager")
            axes.set_title(f"{rows[0].case['network']}, batch {rows[0].case['batch']}", fontsize=9)
            axes.margins(x=0.25)
            axes.minorticks_off()


def main(arguments: Sequence[str] | None = None) -> int:
    needs = ["numba", "torchvision"]
    command = Command("train", "Train MLPs on MNIST in many ways, side by side.", needs)
    command.parser.add_argument("--threads", type=int, default=1, help="of each process but the two ranks")
    options = command.parse(arguments)
    if options.output:
        command.require("matplotlib")
    if options.threads < 1:
        raise ConfigError(f"--threads is {options.threads}, expected at least 1")
    gpu = torch.cuda.is_available()
    plan = QUICK if options.quick else [*FULL, *[WIDE] * gpu]
    before = torch.get_num_threads()
    name = "train" if options.threads == 1 else f"train-{options.threads}-threads"
    table = Table(command.csv(options, name), CPU, cores=CORES, threads=options.threads)
    tables = []
    with start_ranks(2) as ranks, join_world_of_one("cpu") as world:
        for training in plan:
            torch.set_num_threads(options.threads)
            inputs = TrainingInputs(training)
            turns = {(r.name, r.note): r for r in rungs(inputs, world, ranks, compiled=not options.quick)}
            rows = with_accuracy(measure(inputs, turns, ROUNDS), inputs, 1 if options.quick else EPOCHS)
            tables.append(table.add(rows))
            columns = (*COLUMNS, *GPU_COLUMNS * gpu, "ok")
            print_results(f"{inputs.name}, batch {training.batch_size}", rows, columns)
        ranks.run(on_ranks.forget)
    torch.set_num_threads(before)
    for what in ("MPI", programs.LIGHTNING):
        if missing := programs.missing(what):
            print(f"not measured: {what}, without {', '.join(missing)}")
    if not gpu:
        print("not measured: a GPU, there is none")
    if options.output:
        (options.output / f"{name}.md").write_text(as_markdown(tables, options.threads))
        origin = provenance(CPU)
        machine = f"{origin['device']}, {plural(options.threads, 'thread')}"
        title = f"{machine}; torch {origin['torch']}, {origin['date'][:10]}"
        draw(options.output / f"{name}.png", tables, title)
    return table.status


if __name__ == "__main__":
    run(main)
