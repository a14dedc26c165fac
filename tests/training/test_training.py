# SPDX-License-Identifier: MIT
"""Training: a run evaluates, saves, resumes and stops; ranks that do not learn together are
refused."""

import contextlib
import dataclasses
import faulthandler
import gc
import itertools
import math
import os
import re
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import plain_loop
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from torchpar import data, training
from torchpar.data import Samples
from torchpar.errors import ConfigError, DivergedError
from torchpar.nn import MLP
from torchpar.parallel import full_state_dict
from torchpar.parallel.launch.world import join_world
from torchpar.parallel.split import shared_memory
from torchpar.training import CheckpointConfig, Classification
from torchpar.training.classification import EVALUATION_BATCH
from torchpar.training.outcome import EpochResult, Stopped
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
    [
        pytest.param("sgd", torch.tensor(0.3), "constant", marks=pytest.mark.slow),
        ("muon", 0.1, "constant"),
        pytest.param("sgd", 0.3, None, marks=pytest.mark.slow),
    ],
)
def test_learns_and_resumes_bit_for_bit(world, tmp_path, optimizer, lr, schedule):
    run = partial(run_alone, optimizer=optimizer, lr=lr, schedule=schedule)
    handler = signal.getsignal(signal.SIGTERM)
    model, results = run(4)
    assert results[-1].test_accuracy == 1.0
    assert results[-1].train_loss < results[0].train_loss / 2
    # Evaluation takes time too.
    assert all(result.samples_per_s * result.seconds > 200 for result in results)
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
        (
            {"config": {"hidden": (30,)}},
            f"{tmp_path} holds a run with hidden [20], this one has hidden [30]",
        ),
        ({"epochs": 1}, "2 epochs, more than the 1 asked for"),
        ({"batch_size": 8}, "a run with batch_size 32, this one has batch_size 8"),
        ({"seed": 5}, "a run with seed 0, this one has seed 5"),
        ({"n": 199}, "a run with train 200, this one has train 199"),
        ({"n": 0}, "0 training and 50 test samples, expected at least one of each"),
    ]
    for changed, message in others:
        with pytest.raises(ConfigError, match=re.escape(message)):
            run_alone(**{"epochs": 3, "folder": tmp_path} | changed)
    for changed, message in (
        ({"epochs": 0}, "epochs is 0, expected a whole number from 1 on"),
        ({"epochs": 2.0}, "epochs is 2.0, expected a whole number"),
        ({"epochs": True}, "epochs is True, expected a whole number"),
        ({"epochs": "3"}, "epochs is '3', expected a whole number"),
        (
            {"checkpoint": str(tmp_path)},
            "Run: checkpoint is of type str, expected CheckpointConfig",
        ),
        ({"batch_size": 0}, "batch_size is 0, expected a whole number from 1 on"),
        ({"batch_size": -3}, "batch_size is -3, expected a whole number from 1 on"),
        # What JSON does not hold.
        ({"batch_size": 1j}, "batch_size is 1j, expected a whole number from 1 on"),
    ):
        given = {"epochs": 3, "batch_size": 50} | changed
        *parts, task = parts_of(MLP(SIZES), world)
        task = training.Classification(task.train, task.test, given.pop("batch_size"))
        with pytest.raises(ConfigError, match=re.escape(message)):
            training.Run(*parts, task, **given)
    for arguments, message in (
        ((tmp_path, 0), "every is 0, expected a whole number from 1 on"),
        ((tmp_path, 1.0), "every is 1.0, expected a whole number from 1 on"),
        ((tmp_path, True), "every is True, expected a whole number from 1 on"),
        ((3,), "the checkpoints' folder is 3, expected a path"),
        ((Path(__file__),), "test_training.py is a file; give another path"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            CheckpointConfig(*arguments)
    assert CheckpointConfig("saved").folder == Path("saved")
    assert CheckpointConfig("saved", np.int64(3), np.uint8(1)).every == 3
    for number, (argument, message) in enumerate(
        (
            (
                MLP(SIZES).parameters(),
                "Run: model is of type generator, expected the model, and no",
            ),
            ("sgd", "Run: optimizer is of type str, expected one of torch.optim or torchpar.optim"),
            (None, ""),
            (
                torch.distributed.group.WORLD,
                "Run: world is of type ProcessGroup, expected the World",
            ),
        )
    ):
        parts = [*parts_of(MLP(SIZES), world)]
        parts[number] = argument
        with pytest.raises(ConfigError, match=message) if message else contextlib.nullcontext():
            training.Run(*parts, epochs=1)
    _, results = run_alone(np.int64(1), batch_size=np.int32(32))
    assert len(results) == 1
    with pytest.raises(ConfigError, match=r"config is .*object.*, expected what JSON can hold"):
        run_alone(1, config={"a": object()})
    with pytest.raises(DivergedError, match="loss of epoch 1 is nan; take a smaller learning rate"):
        run_alone(1, lr=math.inf)
    # What only one of two scripts names does not matter.
    _, results = run_alone(3, tmp_path, config={"hidden": (20,), "pipeline": "gpipe"})
    assert [result.epoch for result in results] == [1, 2, 3]


def test_optimizers_get_their_parameters():
    model = MLP(SIZES)
    weights, biases = (
        [getattr(layer, name) for layer in model.layers] for name in ("weight", "bias")
    )

    def check(optimizer: torch.optim.Optimizer, *groups: tuple[list[Any], float]) -> None:
        for group, (parameters, decay) in zip(optimizer.param_groups, groups, strict=True):
            assert [id(p) for p in group["params"]] == [id(p) for p in parameters]
            assert (
                group | {"lr": 0.02, "momentum": 0.8, "nesterov": True, "weight_decay": decay}
                == group
            )

    check(training.sgd(model, 0.02, 0.8, 0.1), (weights, 0.1), (biases, 0.0))
    check(training.sgd(model, 0.02, 0.8, 0.0), (list(model.parameters()), 0.0))
    check(training.sgd(model, 0.02, 0.8, 0.1, decay_biases=True), (list(model.parameters()), 0.1))
    muon, others = training.muon(model, 0.02, 0.8, 0.01, ns_steps=4).optimizers
    check(muon, (weights, 0.01))
    check(others, (biases, 0.0))
    assert muon.param_groups[0]["ns_steps"] == 4
    assert not training.sgd(model, 0.02, 0.0, 0.0).param_groups[0]["nesterov"]


def test_signals_are_ignored_only_while_the_process_leaves(world):
    received = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        with contextlib.suppress(Stopped):
            try:
                with StopSignal(world) as stop:
                    stop.start_all_reduce()
                    assert stop.wait() == 0
                    os.kill(os.getpid(), signal.SIGTERM)
                    stop.start_all_reduce()
                    assert stop.wait() == signal.SIGTERM
                    os.kill(os.getpid(), signal.SIGTERM)
                    raise Stopped(signal.SIGTERM)
            finally:  # as `join_world` ends
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGINT)
        assert received == []
        with pytest.raises(KeyboardInterrupt):  # the program has caught Stopped, and goes on
            os.kill(os.getpid(), signal.SIGINT)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM] * 2
        with StopSignal(world) as stop:
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):  # a second one ends at once
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(
    "lost, local_rank, sent", [(False, 0, [signal.SIGHUP]), (True, 0, []), (False, 1, [])]
)
def test_the_first_rank_of_a_machine_stops_torchrun_unless_it_has_ended(
    world, monkeypatch, lost, local_rank, sent
):
    stopped: list[int] = []
    monkeypatch.setattr("torchpar.training.stop.stop_torchrun", stopped.append)
    monkeypatch.setattr("torchpar.training.stop.has_lost_torchrun", lambda: lost)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        of_rank = dataclasses.replace(world, local_rank=local_rank)
        with contextlib.suppress(Stopped), StopSignal(of_rank) as received:
            os.kill(os.getpid(), signal.SIGHUP)
            received.start_all_reduce()
            raise Stopped(received.wait())
        with StopSignal(world) as received:  # of a run that goes on to its end
            os.kill(os.getpid(), signal.SIGHUP)
            received.start_all_reduce()
            assert received.wait() == signal.SIGHUP
    finally:
        signal.signal(signal.SIGHUP, before)
    assert stopped == sent


HANDLED = {  # by what happens at SIGHUP before the run; whether the run takes it
    "the process ends": (signal.SIG_DFL, True),
    "nohup ignores it": (signal.SIG_IGN, False),
    "the program handles it": (print, False),
    "faulthandler writes a traceback": (faulthandler, False),
}


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGQUIT])
@pytest.mark.parametrize("handler, is_taken", HANDLED.values(), ids=HANDLED)
def test_sighup_and_sigquit_stop_a_run_where_they_would_end_it(world, number, handler, is_taken):
    before = signal.signal(number, signal.SIG_DFL if handler is faulthandler else handler)
    try:
        if handler is faulthandler:
            faulthandler.register(number)
        of_program = signal.getsignal(number)
        with StopSignal(world) as stop:
            assert (signal.getsignal(number) != of_program) == (number in stop.signals) == is_taken
            if is_taken:
                os.kill(os.getpid(), number)
            stop.start_all_reduce()
            assert stop.wait() == (number if is_taken else 0)
            stop._largest = 0  # as if the run had not stopped
        assert signal.getsignal(number) == of_program
    finally:
        faulthandler.unregister(number)
        signal.signal(number, before)


def error_of_training(averaged: bool, changed_in: int, optimizer: str = "sgd") -> str:
    """The error of a run of three steps on two ranks, if any.

    In one of the steps rank 1 exchanges two elements of a parameter, which leaves their sum as it
    was. With ``changed_in=-1`` it has other samples.
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


DIFFERS = r"{} differs between ranks; .*average .* by Distributed"


@pytest.mark.parametrize(
    "run, error",
    [
        ((True, 0), "$"),
        ((True, 0, "muon"), "$"),
        ((False, 0), DIFFERS.format("the gradient of layers.0.weight")),
        # All ranks apply the same updates, each made from the gradient of one rank.
        ((False, 0, "muon"), DIFFERS.format("the gradient of layers.0.weight")),
        (
            (True, -1),
            "train.features differs between ranks; make the same samples",
        ),
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
    """Train on ranks that draw different masks, have different statistics and add gradients in
    their order.

    Args:
        stop_in: the step in which rank 0 receives SIGTERM.

    Returns:
        The weights and the running statistics, or the error of the run that was stopped.
    """
    torch.manual_seed(0)
    norm, last = torch.nn.BatchNorm1d(784), torch.nn.BatchNorm1d(10, affine=False)
    model = torch.nn.Sequential(norm, torch.nn.Dropout(0.3), torch.nn.Linear(784, 10), last.eval())
    # In two chunks: a rank of three has none, and one is small.
    test = samples(EVALUATION_BATCH + 1, 2)
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
        loss, _, outputs = run.evaluate()
    assert [module.training for module in model] == [True, True, True, False]
    # None of the evaluation.
    assert (norm.num_batches_tracked, last.num_batches_tracked) == (5 * 2, 0)
    chunks = test.inputs(slice(None)).split(EVALUATION_BATCH)
    # With the bits of one process.
    assert torch.equal(outputs, torch.cat([*map(model.eval(), chunks)]))
    assert run.results[-1].test_loss == loss
    assert loss == torch.nn.functional.cross_entropy(outputs.double(), test.labels)
    return [t.detach().numpy() for t in model.state_dict().values()]


def test_a_run_of_three_ranks_that_was_stopped_ends_with_every_bit_of_the_whole_one(
    ranks, tmp_path
):
    """Each rank draws its own masks, and has the statistics of its own last batch; the model has
    rank 0's."""

    def same(a: list[Any], b: list[Any]) -> bool:
        return all((x == y).all() for x, y in zip(a, b, strict=True))

    run = run_with_norms_and_dropout
    whole, other = ranks(3, run, None, 10)[0], ranks(3, run, None, 20)[0]
    assert ranks(3, run, tmp_path, 10, 3) == ["stopped by SIGTERM"] * 3
    assert all(same(resumed, whole) for resumed in ranks(3, run, tmp_path, 20))
    assert not same(other, whole)


def test_runs_that_are_used_wrongly(world, tmp_path):
    model = MLP(SIZES)
    parts = (
        model,
        OPTIMIZERS["sgd"](model),
        None,
        world,
        Classification(samples(150, 1), samples(50, 2), 50),
    )

    def loop(run: training.Run, taken: int = 3, ended: int = 1, ends: bool = True) -> None:
        for epoch in run.epochs():
            for _ in itertools.islice(run.batches(epoch), taken):
                for _ in range(ended):
                    run.end_step(loss_sum=torch.zeros(()))
            if ends:
                run.end_epoch()

    wrong: list[tuple[Any, str]] = [
        ({"ended": 0}, "epoch 1 ends after 0 of 3 batches"),
        ({"ended": 2}, "step 4 ends in an epoch of 3 batches; take the batches of run.batches"),
        ({"taken": 2}, "epoch 1 ends after 2 of 3 batches"),
        (
            {"ends": False},
            "0 epochs have ended, and the batches are of epoch 2; call run.end_epoch",
        ),
    ]
    for mistake, message in wrong:
        expected = pytest.raises(RuntimeError, match=re.escape(message))
        with expected, training.Run(*parts, epochs=2) as run:
            loop(run, **mistake)
        assert run.results == []
    with training.Run(*parts, epochs=1) as run:
        with pytest.raises(RuntimeError, match=r"take the batches of run\.batches\(epoch\), and"):
            run.end_step(loss_sum=torch.zeros(()))
        loop(run)
    run = training.Run(*parts, epochs=1, checkpoint=CheckpointConfig(tmp_path))
    with pytest.raises(RuntimeError, match="with Run"):
        run.resume()
    with run, pytest.raises(RuntimeError, match=r"call run\.resume"):
        run.epochs()


class Short:
    """A task that yields fewer batches than it promises."""

    samples, batch_size, config = 20, 4, {}

    def check(self, world: Any) -> None: ...

    def batches(self, epoch: int, start: int, world: Any) -> Any:
        return iter(range(start, 3))

    def evaluate(self, model: Any, world: Any) -> training.Evaluation:
        return training.Evaluation(0.5)


def test_any_task_is_trained_and_resumed(world, tmp_path):
    """Here batches are numbers, and the evaluation has no accuracy."""
    model = torch.nn.Linear(1, 1)

    def run(task: Any, epochs: int) -> list[int]:
        optimizer, seen = torch.optim.SGD(model.parameters(), lr=0.1), []
        checkpoint = CheckpointConfig(tmp_path, every=1)
        options: Any = {"epochs": epochs, "checkpoint": checkpoint}
        with training.Run(model, optimizer, None, world, task, **options) as one:
            one.resume()
            for epoch in one.epochs():
                for number in one.batches(epoch):
                    seen.append(number)
                    one.end_step(loss_sum=torch.tensor(2.0 * number))
                one.end_epoch()
        assert one.results[-1].train_loss == pytest.approx(2 * sum(range(3)) / 11)
        assert (one.results[-1].test_loss, one.results[-1].test_accuracy) == (0.5, None)
        return seen

    whole = Short()
    whole.samples = 11  # of batches of 4, 4 and 3
    assert run(whole, 2) == [0, 1, 2, 0, 1, 2]
    assert run(whole, 3) == [0, 1, 2]
    with pytest.raises(
        RuntimeError,
        match=r"after 3 of 5 batches, which the task has by its samples \(20\) and bat",
    ):
        run(Short(), 4)
    with pytest.raises(
        ConfigError, match=r"outputs have shape \(50, 1\), expected \(50, 10\), one for each"
    ):
        training.evaluate(lambda x: x[:, :1], samples(50, 2), world)


def parts_of(model: torch.nn.Module, world: Any, lr: float = 0.3, n: int = 150) -> tuple[Any, ...]:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return model, optimizer, None, world, Classification(samples(n, 1), samples(50, 2), 50)


def take_steps(run: training.Run, accumulated: int = 1, stop_after: int = 0) -> None:
    """A loop that steps after every ``accumulated`` batches, and receives SIGTERM in batch
    ``stop_after``."""
    taken = itertools.count(1)
    run.resume()
    for epoch in run.epochs():
        for x, labels, global_size in run.batches(epoch):
            number = next(taken)
            loss = torch.nn.functional.cross_entropy(run.state.model(x), labels, reduction="sum")
            (loss / global_size).backward()
            if number == stop_after:
                os.kill(os.getpid(), signal.SIGTERM)
            if number % accumulated == 0:
                run.state.optimizer.step()
                run.state.optimizer.zero_grad()
            run.end_step(loss_sum=loss)
        run.end_epoch()


def test_a_run_stops_and_saves_after_a_step_of_accumulated_gradients(world, tmp_path):
    def run(folder: Path | None = None, stop_after: int = 0) -> MLP:
        torch.manual_seed(0)
        model = MLP(SIZES)
        checkpoint = CheckpointConfig(folder, every=1) if folder else None
        with training.Run(*parts_of(model, world), epochs=4, checkpoint=checkpoint) as one:
            take_steps(one, accumulated=2, stop_after=stop_after)
        return model

    whole = run()
    with pytest.raises(Stopped):
        run(tmp_path, stop_after=5)  # within an epoch of 3 batches, after the first batch of two
    assert (tmp_path / "latest").read_text() == "step-6\n"
    resumed = run(tmp_path)
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))


class Reads(TorchDispatchMode):
    """Counts what would let the host wait for a GPU: numbers that Python asks for."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        asks = {torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero}
        self.count += func.overloadpacket in asks
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_read_no_number_back(world, optimizer):
    """The losses of an epoch are added up where they are, and read at its end."""
    model = MLP(SIZES)
    task = Classification(samples(150, 1), samples(50, 2), 30)
    parts = (model, OPTIMIZERS[optimizer](model), None, world, task)
    with training.Run(*parts, epochs=1) as run, Reads() as reads:
        for epoch in run.epochs():
            for x, labels, _ in run.batches(epoch):
                loss = torch.nn.functional.cross_entropy(model(x), labels, reduction="sum")
                loss.backward()
                run.state.optimizer.step()
                run.state.optimizer.zero_grad()
                run.end_step(loss_sum=loss)
            assert reads.count == 0
            run.end_epoch()
    assert reads.count > 0  # the mode sees them


def test_an_optimizer_that_has_no_frozen_parameter_is_saved(world, tmp_path):
    model = MLP(SIZES)
    model.layers[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9
    )
    parts = model, optimizer, None, world, Classification(samples(150, 1), samples(50, 2), 50)
    with training.Run(*parts, epochs=1, checkpoint=CheckpointConfig(tmp_path)) as run:
        take_steps(run)
    assert len(optimizer.state_dict()["state"]) == 3
    assert model.layers[0].weight not in optimizer.state


class WithExtraState(torch.nn.Linear):
    extra: Any = None

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def test_extra_states_are_saved_or_refused(world, tmp_path):
    def run(extra: Any, folder: str, epochs: int = 1) -> Any:
        model = torch.nn.Sequential(WithExtraState(784, 10))
        model[0].extra = extra
        checkpoint = CheckpointConfig(tmp_path / folder)
        with training.Run(*parts_of(model, world), epochs=epochs, checkpoint=checkpoint) as one:
            one.resume()
            found = model[0].extra
            take_steps(one)
        return found

    run(torch.arange(3.0), "tensor")
    assert run(torch.zeros(3), "tensor", 2).tolist() == [0.0, 1.0, 2.0]
    run({"calls": [1, 2]}, "json")
    assert run({"calls": [0]}, "json", 2) == {"calls": [1, 2]}
    with pytest.raises(ConfigError, match=r"does not hold the extra state of 0 of the model"):
        run({"calls": [0]}, "tensor", 3)
    with pytest.raises(
        ConfigError, match="the extra state of 0 is a tuple that is neither a tensor nor JSON"
    ):
        run((1, 2), "tuple")


def test_checkpoints_that_would_lose_something_are_refused(world, tmp_path):
    def run(
        model: torch.nn.Module, optimizer: Any, epochs: int = 1, folder: Path = tmp_path
    ) -> None:
        parts = model, optimizer, None, world, Classification(samples(150, 1), samples(50, 2), 50)
        checkpoint = CheckpointConfig(folder)
        with training.Run(*parts, epochs=epochs, checkpoint=checkpoint) as one:
            take_steps(one)

    model = MLP(SIZES)
    from torch.distributed.optim import ZeroRedundancyOptimizer

    zero = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(
        ConfigError, match="ZeroRedundancyOptimizer shards its state over the ranks"
    ):
        run(model, zero)
    run(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    with pytest.raises(
        ConfigError, match=r"holds the state of AdamW, this run has SGD; use another folder"
    ):
        run(model, torch.optim.SGD(model.parameters(), lr=0.1), 2)
    model.layers[0].weight.requires_grad_(False)
    with pytest.raises(
        ConfigError, match=r"holds step of layers.0.weight, which the optimizer does not"
    ):
        run(model, torch.optim.AdamW([*model.parameters()][1:], lr=1e-3), 2)
    model.layers[0].weight.requires_grad_(True)
    wider = MLP(SIZES)
    wider.more = torch.nn.Linear(2, 2)
    with pytest.raises(
        ConfigError, match=r"does not hold more.bias of the model; use another folder"
    ):
        run(wider, torch.optim.AdamW(wider.parameters(), lr=1e-3), 2)
    narrower = torch.nn.Sequential(torch.nn.Linear(784, 10))
    with pytest.raises(ConfigError, match=r"does not hold 0.bias of the model"):
        run(narrower, torch.optim.AdamW(narrower.parameters(), lr=1e-3), 2)
    wide = tmp_path / "wide"
    run(wider, torch.optim.AdamW(wider.parameters(), lr=1e-3), 1, wide)
    with pytest.raises(
        ConfigError, match=r"holds more.bias, which the model lacks; use another folder"
    ):
        run(model, torch.optim.AdamW(model.parameters(), lr=1e-3), 2, wide)


class CountsSteps(torch.optim.SGD):
    """Keeps a state that belongs to no parameter."""

    def step(self, closure: Any = None) -> Any:
        self.state["all"]["steps"] = self.state["all"].get("steps", 0) + 1
        return super().step(closure)


def test_states_of_other_groups_and_schedules_are_refused(world, tmp_path):
    model, rates = MLP(SIZES), torch.optim.lr_scheduler
    warmup = partial(rates.LinearLR, total_iters=2)

    def run(groups: Any, schedule: Any, epochs: int, folder: str = "") -> None:
        optimizer = torch.optim.SGD(groups, lr=0.1)
        parts = (
            model,
            optimizer,
            schedule and schedule(optimizer),
            world,
            Classification(samples(150, 1), samples(50, 2), 50),
        )
        checkpoint = CheckpointConfig(tmp_path / folder)
        with training.Run(*parts, epochs=epochs, checkpoint=checkpoint) as one:
            take_steps(one)

    first, *others = model.parameters()
    groups = [{"params": [first]}, {"params": others, "lr": 0.01}]
    run(groups, warmup, 1)
    with pytest.raises(
        ConfigError, match=r"has layers.0.bias in group 1 of the optimizer, this run in group"
    ):
        run(groups[::-1], warmup, 2)
    with pytest.raises(
        ConfigError, match="holds 2 parameter groups, this run has 1; use another folder"
    ):
        run([first, *others], warmup, 2)
    for schedule, now in ((None, "no schedule"), (rates.ConstantLR, "ConstantLR")):
        with pytest.raises(
            ConfigError, match=f"holds the state of LinearLR, this run has {now}; use another"
        ):
            run(groups, schedule, 2)
    run(groups, warmup, 2)
    in_turn = partial(chained_schedules, kinds=(warmup, rates.ConstantLR))
    run(groups, in_turn, 1, "in turn")
    with pytest.raises(
        ConfigError, match="of SequentialLR with LinearLR with ConstantLR, this run has Sequ"
    ):
        run(groups, partial(in_turn, kinds=(rates.ConstantLR, warmup)), 2, "in turn")


def chained_schedules(optimizer: Any, kinds: Any) -> Any:
    return torch.optim.lr_scheduler.SequentialLR(
        optimizer, [kind(optimizer) for kind in kinds], [2]
    )


def test_values_that_would_not_be_saved_are_refused_by_name(world, tmp_path):
    model = MLP(SIZES)
    model.register_buffer("links", torch.eye(2).to_sparse())
    checkpoint = CheckpointConfig(tmp_path)

    def run(optimizer: Any) -> None:
        parts = model, optimizer, None, world, Classification(samples(150, 1), samples(50, 2), 50)
        with training.Run(*parts, epochs=1, checkpoint=checkpoint) as one:
            take_steps(one)

    with pytest.raises(
        ConfigError, match=r"^links is torch.sparse_coo, and would not be saved; make it den"
    ):
        run(torch.optim.SGD(model.parameters(), lr=0.1))
    del model.links
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["mine"] = Path("a")
    with pytest.raises(
        ConfigError, match=r"group 0 has mine = PosixPath\('a'\), which would not be saved; exp"
    ):
        run(optimizer)
    with pytest.raises(
        ConfigError, match="state has 'all', which is no parameter and would not be saved"
    ):
        run(CountsSteps(model.parameters(), lr=0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.state[torch.nn.Parameter(torch.ones(3))]["momentum_buffer"] = torch.ones(3)
    with pytest.raises(
        ConfigError, match=r"state of a parameter of shape \(3,\) that the model no longer has"
    ):
        run(optimizer)
    assert not [*tmp_path.glob("[!.]*")]


def error_on_one_rank(changed: dict[str, Any]) -> str:
    """The error of a run with settings that only rank 1 has."""
    with join_world("cpu") as world:
        own = changed if world.rank else {}
        n, epochs, batch_size = ({"n": 50, "epochs": 1, "batch_size": 50} | own).values()
        model = MLP(SIZES)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        task = Classification(samples(150, 1), samples(n, 2), batch_size)
        try:
            training.Run(model, optimizer, None, world, task, epochs=epochs)
        except ConfigError as e:
            return str(e)
    return ""


@pytest.mark.parametrize(
    "changed, name",
    [
        ({"epochs": 0}, "runs: epochs"),
        ({"n": 0}, "samples: test"),
        ({"batch_size": -1}, "runs: batch_size"),
    ],
)
def test_what_is_wrong_on_one_rank_is_refused_on_all(ranks, changed, name):
    errors = ranks(2, error_on_one_rank, changed)
    assert all(error.startswith(f"the ranks' {name} is ") for error in errors), errors


@pytest.mark.parametrize("what", ["train", "test", "weight"])
def test_what_is_not_finite_is_not_saved(world, tmp_path, what):
    """The newest checkpoint stays whole, and no result counts as one."""
    torch.manual_seed(0)
    model = MLP(SIZES)
    spoiled = torch.nn.Parameter(torch.ones(()))
    model.register_parameter("spoiled", spoiled)
    data = parts_of(model, world)
    runs: list[training.Run] = []

    def loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        is_late = what == "test" and len(runs[0].results) == 1
        return (outputs.sum() * math.inf if is_late else outputs.sum() * 0) + len(labels)

    data[-1].loss = loss
    options = {"epochs": 3, "checkpoint": CheckpointConfig(tmp_path, every=2)}
    messages = {
        "train": "weight or a loss is not finite after step 4",
        "test": "test loss after epoch 2 is",
    }
    message = messages | {
        "weight": "a weight or a loss is not finite after step 4, which is not saved"
    }

    def train() -> None:
        with training.Run(*data, **options) as run:
            runs.append(run)
            run.resume()
            for epoch in run.epochs():
                for _ in run.batches(epoch):
                    value = math.nan if epoch == 2 and what == "train" else 1.0
                    if epoch == 2 and what == "weight":
                        spoiled.data.fill_(math.inf)
                    run.end_step(loss_sum=torch.tensor(value))
                run.end_epoch()

    with pytest.raises(DivergedError, match=message[what]):
        train()
    assert [result.epoch for result in runs[0].results] == [1]
    assert (tmp_path / "latest").read_text() == ("step-4\n" if what == "test" else "step-2\n")


def test_loops_that_are_left(world, tmp_path):
    """Before an epoch's first batch that ends the run early; afterwards it is an error."""
    torch.manual_seed(0)
    for leave, message in (
        (0, ""),
        (1, "in epoch 2, after 1 of 3 batches"),
        (3, "in epoch 2, after 3 of 3"),
    ):
        expected = (
            pytest.raises(RuntimeError, match=message) if message else contextlib.nullcontext()
        )
        parts = parts_of(MLP(SIZES), world)
        run = training.Run(*parts, epochs=3)
        with expected, run:
            run.resume()
            for epoch in run.epochs():
                if epoch == 2 and not leave:
                    break
                for number, (x, _, _) in enumerate(run.batches(epoch), 1):
                    run.end_step(loss_sum=run.state.model(x).sum() * 0)
                    if epoch == 2 and number == leave:
                        break
                if epoch == 2:
                    break
                run.end_epoch()
        assert [result.epoch for result in run.results] == [1]


def test_the_body_of_a_resumed_epoch_does_not_change_what_is_drawn(world, tmp_path):
    def run(folder: Path | None = None, stop_after: int = 0) -> list[float]:
        torch.manual_seed(0)
        drawn, model = [], MLP(SIZES)
        checkpoint = CheckpointConfig(folder) if folder else None
        with training.Run(*parts_of(model, world), epochs=3, checkpoint=checkpoint) as one:
            one.resume()
            for epoch in one.epochs():
                torch.rand(5)  # which a resumed epoch does again
                for x, _, _ in one.batches(epoch):
                    drawn.append(torch.rand(()).item())
                    if len(drawn) == stop_after:
                        os.kill(os.getpid(), signal.SIGTERM)
                    one.end_step(loss_sum=model(x).sum() * 0)
                one.end_epoch()
        return drawn

    whole = run()
    with pytest.raises(Stopped):
        run(tmp_path, stop_after=4)  # which the ranks learn in the step after
    assert run(tmp_path) == whole[5:]


def test_a_task_with_batches_of_its_own_resumes_within_an_epoch(world, tmp_path):
    """The weights have the bits of the run that was not stopped."""

    class Backwards(Classification):
        """Takes the batches of an epoch in another order."""

        starts: list[int]

        def batches(self, epoch: int, start: int, world: Any) -> Any:
            self.starts.append(start)
            drawn = [*data.batches(self.train, self.batch_size, seed=self.seed, epoch=epoch)]
            return drawn[::-1][start:]

    def run(folder: Path | None = None, stop_after: int = 0) -> tuple[MLP, list[int]]:
        torch.manual_seed(0)
        model, taken = MLP(SIZES), itertools.count(1)
        checkpoint = CheckpointConfig(folder) if folder else None
        *parts, _ = parts_of(model, world)
        task = Backwards(samples(150, 1), samples(50, 2), 50)
        task.starts = starts = []
        with training.Run(*parts, task, epochs=3, checkpoint=checkpoint) as one:
            one.resume()
            for epoch in one.epochs():
                for x, labels, size in one.batches(epoch):
                    loss = torch.nn.functional.cross_entropy(model(x), labels, reduction="sum")
                    (loss / size).backward()
                    one.state.optimizer.step()
                    one.state.optimizer.zero_grad()
                    if next(taken) == stop_after:
                        os.kill(os.getpid(), signal.SIGTERM)
                    one.end_step(loss_sum=loss)
                result = one.end_epoch()
        assert one.results[-1] is result
        return model, starts

    whole, starts = run()
    with pytest.raises(Stopped):
        run(tmp_path, stop_after=4)  # the ranks agree on the stop in the step after
    resumed, resumed_starts = run(tmp_path)
    assert (starts, resumed_starts) == ([0, 0, 0], [2, 0])
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))


def losses_of(kind: str, sizes: list[int]) -> list[float]:
    """Test losses of a model on two ranks that meet in every forward pass."""
    torch.manual_seed(0)
    with join_world("cpu") as world:
        layers = torch.nn.Linear(784, 12), torch.nn.BatchNorm1d(12), torch.nn.Linear(12, 10)
        model: Any = torch.nn.Sequential(*layers)
        if kind == "fully_shard":
            for module in (*model, model):
                torch.distributed.fsdp.fully_shard(module, mesh=world.mesh["dp"])
        elif kind == "DistributedDataParallel":
            model = DistributedDataParallel(model)
        model.eval()
        return [training.evaluate(model, samples(n, 1), world)[0] for n in sizes]


def sharded_weights(
    folder: str, epochs: int, nested: bool
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The weights of a model under `fully_shard`, trained or resumed, and its optimizer's keys."""
    torch.manual_seed(0)
    with join_world("cpu") as world:
        model: Any = MLP(SIZES)
        for module in (*model.layers, model) if nested else (model,):
            torch.distributed.fsdp.fully_shard(module, mesh=world.mesh["dp"])
        run = plain_loop.train(
            model,
            torch.optim.AdamW(model.parameters(), lr=0.01),
            world,
            samples(200, 1),
            samples(50, 2),
            epochs=epochs,
            batch_size=32,
            schedule="constant",
            checkpoint=CheckpointConfig(Path(folder)),
        )
        shards = [type(p).__name__ for p in model.parameters()]
        assert all(p in run.state.optimizer.state for p in model.parameters())
        weights = {name: t.clone() for name, t in full_state_dict(model).items()}
        del run, model
        gc.collect()  # before the process group ends
    return weights, shards


@pytest.mark.parametrize("nested", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_resumed_run_under_fully_shard_has_the_same_bits(ranks, tmp_path, nested):
    whole, shards = ranks(2, sharded_weights, str(tmp_path / "whole"), 2, nested)[0]
    assert set(shards) == {"DTensor"}
    assert {type(t) for t in whole.values()} == {torch.Tensor}
    ranks(2, sharded_weights, str(tmp_path / "parts"), 1, nested)
    for resumed, _ in ranks(2, sharded_weights, str(tmp_path / "parts"), 2, nested):
        assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_ranks_make_as_many_forward_passes_in_an_evaluation(ranks):
    sizes = [40, 3000, 2 * EVALUATION_BATCH]
    expected = ranks(1, losses_of, "whole", sizes)[0]
    for kind in ("fully_shard", "DistributedDataParallel"):
        first, second = ranks(2, losses_of, kind, sizes)
        assert first == second
        assert first == pytest.approx(expected, rel=1e-6)
