# SPDX-License-Identifier: MIT
"""Training: a run evaluates, saves, resumes and stops; ranks that do not learn together are refused."""

import dataclasses
import itertools
import math
import os
import re
import signal
from functools import partial
from pathlib import Path
from typing import Any

import plain_loop
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from torchpar import training
from torchpar.data import Samples
from torchpar.errors import ConfigError, DivergedError
from torchpar.nn import MLP
from torchpar.outcome import EpochResult
from torchpar.parallel.launch.world import join_world
from torchpar.parallel.split import shared_memory
from torchpar.training import CheckpointConfig
from torchpar.training.losses import EVALUATION_BATCH
from torchpar.training.stop import StopSignal

SIZES = [784, 20, 10]


def samples(n: int, seed: int) -> Samples:
    """Noise around one pattern per class."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randint(0, 200, (10, 28, 28), generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 10, (n,), generator=generator)
    images = patterns[labels] + torch.randint(0, 56, (n, 28, 28), generator=generator)
    return Samples(images.to(torch.uint8), labels, tuple("0123456789"))


OPTIMIZERS = {
    "sgd": partial(training.sgd, lr=0.3, momentum=0.9, weight_decay=1e-4),
    "muon": partial(training.muon, lr=0.1, momentum=0.9, weight_decay=0.01),
}


def run_alone(
    epochs: int,
    folder: Path | None = None,
    optimizer: str = "sgd",
    lr: float = 0.3,
    n: int = 200,
    **options: Any,
) -> tuple[MLP, list[EpochResult]]:
    torch.manual_seed(0)
    model = MLP(SIZES)
    with join_world("cpu") as world:
        run = plain_loop.train(
            model,
            OPTIMIZERS[optimizer](model, lr=lr),
            world,
            samples(n, 1),
            samples(50, 2),
            epochs=epochs,
            checkpoint=CheckpointConfig(folder) if folder else None,
            **{"batch_size": 32, "schedule": "constant"} | options,
        )
    return model, run.results


@pytest.mark.parametrize(
    "optimizer, lr, schedule",
    [("sgd", torch.tensor(0.3), "constant"), ("muon", 0.1, "constant"), ("sgd", 0.3, None)],
)
def test_learns_and_resumes_bit_for_bit(world, tmp_path, optimizer, lr, schedule):
    run = partial(run_alone, optimizer=optimizer, lr=lr, schedule=schedule)
    handler = signal.getsignal(signal.SIGTERM)
    model, results = run(4)
    assert results[-1].test_accuracy == 1.0
    assert results[-1].train_loss < results[0].train_loss / 2
    assert all(result.samples_per_s * result.seconds > 200 for result in results)  # evaluation takes time too
    run(1, tmp_path)
    run(3, tmp_path)
    resumed, all_results = run(4, tmp_path)
    for a, b in zip(all_results, results, strict=True):
        assert a == dataclasses.replace(b, seconds=a.seconds, samples_per_s=a.samples_per_s)
    again, same = run(4, tmp_path)  # nothing left to train
    assert same == all_results
    for parameters in zip(*(m.parameters() for m in (model, resumed, again)), strict=True):
        assert all(torch.equal(p, parameters[0]) for p in parameters)
    assert signal.getsignal(signal.SIGTERM) == handler


def test_runs_that_are_refused(world, tmp_path):
    run_alone(2, tmp_path, config={"hidden": (20,), "clip": 1})
    others = [
        ({"config": {"hidden": (30,)}}, f"{tmp_path} holds a run with hidden [20], this one has hidden [30]"),
        ({"epochs": 1}, "2 epochs, more than the 1 asked for"),
        ({"batch_size": 8}, "a run with batch_size 32, this one has batch_size 8"),
        ({"seed": 5}, "a run with seed 0, this one has seed 5"),
        ({"n": 199}, "a run with train 200, this one has train 199"),
        ({"n": 0}, "0 training and 50 test samples, expected at least one of each"),
    ]
    for changed, message in others:
        with pytest.raises(ConfigError, match=re.escape(message)):
            run_alone(**{"epochs": 3, "folder": tmp_path} | changed)
    with pytest.raises(DivergedError, match="loss of epoch 1 is nan; take a smaller learning rate"):
        run_alone(1, lr=math.inf)
    # What only one of two scripts names does not matter.
    _, results = run_alone(3, tmp_path, config={"hidden": (20,), "pipeline": "gpipe"})
    assert [result.epoch for result in results] == [1, 2, 3]


def test_optimizers_get_their_parameters():
    model = MLP(SIZES)
    weights, biases = ([getattr(layer, name) for layer in model.layers] for name in ("weight", "bias"))

    def check(optimizer: torch.optim.Optimizer, *groups: tuple[list[Any], float]) -> None:
        for group, (parameters, decay) in zip(optimizer.param_groups, groups, strict=True):
            assert [id(p) for p in group["params"]] == [id(p) for p in parameters]
            assert group | {"lr": 0.02, "momentum": 0.8, "nesterov": True, "weight_decay": decay} == group

    check(training.sgd(model, 0.02, 0.8, 0.1), (weights, 0.1), (biases, 0.0))
    check(training.sgd(model, 0.02, 0.8, 0.0), (list(model.parameters()), 0.0))
    check(training.sgd(model, 0.02, 0.8, 0.1, decay_biases=True), (list(model.parameters()), 0.1))
    muon, others = training.muon(model, 0.02, 0.8, 0.01, ns_steps=4).optimizers
    check(muon, (weights, 0.01))
    check(others, (biases, 0.0))
    assert muon.param_groups[0]["ns_steps"] == 4
    assert not training.sgd(model, 0.02, 0.0, 0.0).param_groups[0]["nesterov"]


def test_orthogonality_penalty(device):
    model = MLP([6, 5, 3], device=device, dtype=torch.float64)
    eye = [torch.eye(n, device=device, dtype=torch.float64) for n in (5, 3)]
    weights = [layer.weight for layer in model.layers]
    expected = sum((w @ w.T - i).norm() ** 2 for w, i in zip(weights, eye, strict=True))
    torch.testing.assert_close(training.orthogonality_penalty(model), expected)
    of_weights = torch.autograd.grad(expected, weights)
    weights[0].grad = torch.ones_like(weights[0])
    training.add_orthogonality_gradient(model, 0.5)
    torch.testing.assert_close(weights[0].grad, 1 + of_weights[0] / 2)
    assert weights[1].grad is None
    for weight in weights:
        torch.nn.init.orthogonal_(weight)
    assert training.orthogonality_penalty(model) < 1e-24


def test_schedules():
    def course(schedule: training.LRSchedule) -> list[float]:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
        (factor,) = training.lr_scheduler(optimizer, schedule, 4).lr_lambdas
        return [factor(step) for step in range(6)]

    assert course("linear") == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert course("constant") == [1.0] * 6
    assert course("cosine") == pytest.approx([(1 + math.cos(math.pi * i / 4)) / 2 for i in (*range(5), 4)])
    with pytest.raises(ConfigError, match="schedule is 'cosin', expected one of"):
        course("cosin")


def test_signals_are_noted_until_the_process_leaves(world):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with StopSignal(world) as stop:
            stop.start_all_reduce()
            assert stop.wait() == 0
            os.kill(os.getpid(), signal.SIGTERM)
            stop.start_all_reduce()
            assert stop.wait() == signal.SIGTERM
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # a process that is leaving ignores another one
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        with StopSignal(world) as stop:
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):  # a second one ends at once
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN  # as it was
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def error_of_training(averaged: bool, changed_in: int, optimizer: str = "sgd") -> str:
    """The error of a run of three steps on two ranks, if any.

    In one of the steps rank 1 exchanges two elements of a parameter, which leaves their sum as it was. With
    ``changed_in=-1`` it has other samples.
    """
    torch.manual_seed(0)
    passes = itertools.count(1)
    with join_world("cpu") as world:
        model = MLP(SIZES)
        model.frozen = torch.nn.Parameter(torch.arange(2.0), requires_grad=False)

        def change(*_: Any) -> None:
            if next(passes) == changed_in and world.rank == 1:
                model.frozen.copy_(model.frozen.flip(0))

        model.register_forward_hook(change)
        replica = DistributedDataParallel(model) if averaged else model
        mesh = {"mesh": world.mesh["dp"]} if optimizer == "muon" else {}
        made = OPTIMIZERS[optimizer](model, **mesh)
        train = samples(101, seed=1 + (changed_in < 0) * world.rank)
        args = model, made, world, train, samples(50, seed=2)
        try:
            plain_loop.train(*args, batch_size=50, replica=replica, epochs=1)
        except ConfigError as e:
            return str(e)
    return ""


DIFFERS = r"{} differs between the ranks that share a batch; .*average .* by Distributed"


@pytest.mark.parametrize(
    "run, error",
    [
        ((True, 0), "$"),
        ((True, 0, "muon"), "$"),
        ((False, 0), DIFFERS.format("the gradient of layers.0.weight")),
        # All ranks apply the same updates, each made from the gradient of one rank.
        ((False, 0, "muon"), DIFFERS.format("the gradient of layers.0.weight")),
        ((True, -1), "train.features differs between the ranks that share a batch; make the same samples"),
        ((True, 1), DIFFERS.format("frozen")),
        ((True, 3), DIFFERS.format("frozen")),  # at the end of the epoch
    ],
)
def test_ranks_that_do_not_learn_together_are_refused_on_every_rank(ranks, run, error):
    first, second = ranks(2, error_of_training, *run)
    assert first == second
    assert re.match(error, first)
    assert "\n" not in first


def run_with_norms_and_dropout(folder: Path | None, seed: int, stop_in: int = 0) -> str | list[Any]:
    """Train on ranks that draw different masks, have different statistics and add gradients in their order.

    Args:
        stop_in: the step in which rank 0 receives SIGTERM.

    Returns:
        The weights and the running statistics, or the error of the run that was stopped.
    """
    torch.manual_seed(0)
    norm, last = torch.nn.BatchNorm1d(784), torch.nn.BatchNorm1d(10, affine=False)
    model = torch.nn.Sequential(norm, torch.nn.Dropout(0.3), torch.nn.Linear(784, 10), last.eval())
    test = samples(EVALUATION_BATCH + 1, 2)  # in two chunks: a rank of three has none, and one is small
    passes = itertools.count(1)
    with join_world("cpu") as world:
        torch.manual_seed(seed + world.rank)

        def stop(*_: Any) -> None:
            if next(passes) == stop_in and world.rank == 0:
                os.kill(os.getpid(), signal.SIGTERM)

        model.register_forward_hook(stop)
        replica = DistributedDataParallel(model)
        shared_memory.register_shared_memory_hook(replica, world)
        try:
            run = plain_loop.train(
                *(model, OPTIMIZERS["sgd"](model), world, samples(206, 1), test),
                replica=replica,
                epochs=2,
                batch_size=50,
                checkpoint=CheckpointConfig(folder, every=2) if folder else None,
            )
        except training.Stopped as e:
            return str(e)
        loss, outputs = run.evaluate()
    assert [module.training for module in model] == [True, True, True, False]
    assert (norm.num_batches_tracked, last.num_batches_tracked) == (5 * 2, 0)  # none of the evaluation
    chunks = test.inputs(slice(None)).split(EVALUATION_BATCH)
    assert torch.equal(outputs, torch.cat([*map(model.eval(), chunks)]))  # with the bits of one process
    assert run.results[-1].test_loss == loss
    assert loss == torch.nn.functional.cross_entropy(outputs.double(), test.labels)
    return [t.detach().numpy() for t in model.state_dict().values()]


def test_a_run_of_three_ranks_that_was_stopped_ends_with_every_bit_of_the_whole_one(ranks, tmp_path):
    """Each rank draws its own masks, and has the statistics of its own last batch; the model has rank 0's."""

    def same(a: list[Any], b: list[Any]) -> bool:
        return all((x == y).all() for x, y in zip(a, b, strict=True))

    run = run_with_norms_and_dropout
    whole, other = ranks(3, run, None, 10)[0], ranks(3, run, None, 20)[0]
    assert ranks(3, run, tmp_path, 10, 3) == ["stopped by SIGTERM"] * 3
    assert all(same(resumed, whole) for resumed in ranks(3, run, tmp_path, 20))
    assert not same(other, whole)


def test_runs_that_are_used_wrongly(world, tmp_path):
    model = MLP(SIZES)
    parts = (model, OPTIMIZERS["sgd"](model), None, world, samples(150, 1), samples(50, 2))
    for taken, logged in ((2, 2), (3, 2), (3, 4)):
        with training.Run(*parts, epochs=1, batch_size=50) as run:
            epochs = run.epochs()
            batches = run.batches(next(epochs))
            for _ in range(taken + 1):  # a loop asks for the next batch after each step
                next(batches, None)
            for _ in range(logged):
                run.log(torch.zeros(()))
            with pytest.raises(RuntimeError, match=f"{taken} of 3 batches .* and {logged} losses logged"):
                next(epochs)
        assert run.results == []
    run = training.Run(*parts, epochs=1, batch_size=50, checkpoint=CheckpointConfig(tmp_path))
    with pytest.raises(RuntimeError, match="with Run"):
        next(run.epochs())
    with pytest.raises(ConfigError, match=r"outputs have shape \(50, 1\), expected \(50, 10\), one for each"):
        training.evaluate(lambda x: x[:, :1], samples(50, 2), world)
