# SPDX-License-Identifier: MIT
"""A run whose parts belong to different trainings is refused, or has one place for each fact."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import lr_scheduler as rates
from torch.optim.swa_utils import AveragedModel

from torchpar import data
from torchpar.data import Samples
from torchpar.errors import ConfigError
from torchpar.optim import ChainedOptimizer, Muon
from torchpar.parallel import GradScaler, join_world
from torchpar.training import CheckpointConfig, Classification, Run

EPOCHS, STEPS = 2, 6  # of 96 samples in batches of 16
CLASSES = ("a", "b", "c")


def samples(n: int = 96, seed: int = 0, classes: tuple[str, ...] = CLASSES) -> Samples:
    x = torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))
    return Samples(x, x[:, :2].argmax(1), classes)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def task(**given: Any) -> Classification:
    options = {"train": samples(), "test": samples(48, 9), "batch_size": 16} | given
    return Classification(**options)


def make_run(
    world: Any,
    model: nn.Module,
    optimizer: optim.Optimizer | None = None,
    scheduler: Any = None,
    **given: Any,
) -> Run:
    optimizer = optimizer or optim.SGD(model.parameters(), lr=0.1)
    return Run(model, optimizer, scheduler, world, task(**given), epochs=EPOCHS)


@contextmanager
def refused(message: str) -> Iterator[None]:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        yield
    assert "\n" not in str(caught.value)


def train(
    run: Run, trained: nn.Module | None = None, step: Callable[[], Any] | None = None
) -> None:
    """Train the run's model, or another one."""
    with run:
        train_epochs(run, trained or run.state.model, step)


def train_epochs(run: Run, model: nn.Module, step: Callable[[], Any] | None = None) -> None:
    for epoch in run.epochs():
        for x, labels, size in run.batches(epoch):
            loss = cross_entropy(model(x), labels, reduction="sum")
            (loss / size).backward()
            (step or run.state.optimizer.step)()
            run.state.optimizer.zero_grad()
            if run.state.lr_scheduler:
                run.state.lr_scheduler.step()
            run.end_step(loss_sum=loss)
        run.end_epoch()


# Where a fact has one place


@pytest.mark.parametrize(
    "given", [{}, {"seed": 3}, {"batch_size": 17}, {"train": samples(100, 5)}, {"batch_size": 32}]
)
def test_batches_are_those_of_the_task(world, given):
    """Data set, batch size and seed are the task's, and the epoch is the run's."""
    model = network()
    one = make_run(world, model, **given)
    seen = []
    with one:
        for epoch in one.epochs():
            for x, labels, size in one.batches(epoch):
                seen.append((epoch, x, labels, size))
                one.end_step(loss_sum=model(x).sum() * 0)
            one.end_epoch()
    options = {"train": samples(), "batch_size": 16, "seed": 0} | given
    expected = [
        (epoch, *batch)
        for epoch in (1, 2)
        for batch in data.batches(
            options["train"], options["batch_size"], seed=options["seed"], epoch=epoch
        )
    ]
    for (a, x, y, n), (b, x_expected, y_expected, n_expected) in zip(seen, expected, strict=True):
        assert (a, n) == (b, n_expected)
        assert torch.equal(x, x_expected)
        assert torch.equal(y, y_expected)


def test_an_epoch_is_begun_by_its_batches_alone(world):
    assert not hasattr(Run, "begin_epoch")
    model = network()
    with make_run(world, model) as run:
        message = r"step 1 ends in an epoch of 6 batches; take the batches of run\.batches\(epoch\)"
        with pytest.raises(RuntimeError, match=message):
            run.end_step(loss_sum=torch.zeros(()))
        with pytest.raises(RuntimeError, match="0 epochs have ended, and the batches are of ep"):
            run.batches(2)  # when it is called, before a batch is taken
        batches = run.batches(1)
        run.end_step(loss_sum=torch.zeros(()))
        for _ in [*batches][1:]:
            run.end_step(loss_sum=torch.zeros(()))
        run.end_epoch()


def test_a_loss_is_given_as_the_sum_that_it_is(world):
    with make_run(world, network()) as run:
        batches = run.batches(1)
        with pytest.raises(TypeError, match="positional"):
            run.end_step(torch.ones(()))  # type: ignore[misc]  # which could be a mean
        for _, labels, _ in batches:
            run.end_step(loss_sum=2.0 * torch.tensor(float(len(labels))))
        assert run.end_epoch().train_loss == 2.0


def shares() -> list[list[int]]:
    """The samples that this rank takes in each step, on two ranks."""
    with join_world("cpu") as world:
        torch.manual_seed(0)  # the ranks may have run other tests
        model = network()
        numbered = Samples(torch.arange(96.0)[:, None].expand(96, 8), samples().labels, CLASSES)
        with make_run(world, model, train=numbered) as run:
            found = []
            for x, _, size in run.batches(1):
                assert size == 16
                found.append(x[:, 0].int().tolist())
                run.end_step(loss_sum=torch.zeros(()))
            run.end_epoch()
    return found


def test_each_rank_takes_its_share_of_the_batches(ranks):
    for mine, others in zip(*ranks(2, shares), strict=True):
        assert len({*mine, *others}) == 16


# Optimizers


class Frozen(nn.Module):
    """A network whose first layer is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16).requires_grad_(False), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())  # type: ignore[no-any-return]


def test_optimizers_of_other_parameters_are_refused(world):
    model, other = network(), network()
    with refused(
        "the optimizer's group 0 has a parameter of shape (16, 8) that is not the model's"
    ):
        make_run(world, model, optim.SGD(other.parameters(), lr=0.1))
    temperature = nn.Parameter(torch.ones(7))
    groups = [{"params": model.parameters()}, {"params": [temperature]}]
    with refused("the optimizer's group 1 has a parameter of shape (7,) that is not the model's"):
        make_run(world, model, optim.SGD(groups, lr=0.1))
    with refused("the optimizer lacks 2.weight and 1 more of the model; give it all parameters"):
        make_run(world, model, optim.SGD(model[0].parameters(), lr=0.1))
    with refused("the optimizer lacks 2.bias of the model; give it all parameters"):
        make_run(world, model, optim.SGD([*model.parameters()][:-1], lr=0.1))
    chain = ChainedOptimizer(
        optim.SGD(model[0].parameters(), lr=0.1), optim.AdamW(other[2].parameters())
    )
    with refused("the optimizer's group 1 has a parameter of shape (3, 16)"):
        make_run(world, model, chain)


def test_optimizers_of_the_models_parameters_are_taken(world):
    model, frozen = network(), Frozen()
    train(make_run(world, model, optim.SGD(model.parameters(), lr=0.1)))
    with_temperature = network()
    with_temperature.temperature = nn.Parameter(torch.ones(7))
    make_run(world, with_temperature)
    train(make_run(world, frozen))  # which holds frozen parameters, too
    train(make_run(world, frozen, optim.SGD(frozen.last.parameters(), lr=0.1)))
    chain = ChainedOptimizer(
        ChainedOptimizer(optim.SGD([model[0].weight], lr=0.1), optim.SGD([model[0].bias], lr=0.1)),
        optim.AdamW(model[2].parameters()),
    )
    train(make_run(world, model, chain))
    others = partial(optim.AdamW, lr=1e-3)
    train(make_run(world, model, Muon.for_model(model, 0.02, others=others)))
    tied = network()
    tied[2] = nn.Linear(16, 3)
    tied.again = tied[0]
    tied.forward = lambda x: tied[2](tied[1](tied[0](x)))
    train(make_run(world, tied))
    small = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 3)))
    train(make_run(world, small))


def errors_on_two_ranks(kind: str) -> str:
    """The error of a run of which rank 1 has another optimizer, or whose parameters are divided."""
    with join_world("cpu") as world:
        torch.manual_seed(0)
        model: Any = network()
        if kind == "one rank":
            other = network() if world.rank else model
            optimizer: Any = optim.SGD(other.parameters(), lr=0.1)
        else:
            for layer in (model[0], model[2], model):
                torch.distributed.fsdp.fully_shard(layer, mesh=world.mesh["dp"])
            # The root's own parameters stay gathered after a forward pass.
            optimizer = optim.SGD(model.parameters(), lr=0.1)
            with torch.no_grad():
                model(samples().features)
            if kind == "another model":
                optimizer = optim.SGD(network().parameters(), lr=0.1)
        try:
            run = make_run(world, model, optimizer)
            with run:
                for epoch in run.epochs():
                    for x, labels, size in run.batches(epoch):
                        loss = cross_entropy(model(x), labels, reduction="sum")
                        (loss * (world.dp_size / size)).backward()
                        optimizer.step()
                        optimizer.zero_grad()
                        run.end_step(loss_sum=loss)
                    run.end_epoch()
        except ConfigError as e:
            return str(e)
    return ""


@pytest.mark.parametrize(
    "kind, error",
    [
        ("one rank", "the optimizer's group 0 has a parameter of shape (16, 8)"),
        ("fully_shard", ""),
        ("another model", "the optimizer's group 0 has a parameter of shape (16, 8)"),
    ],
)
def test_every_rank_refuses_an_optimizer_that_one_rank_refuses(ranks, kind, error):
    found = ranks(2, errors_on_two_ranks, kind)
    assert [*map(str.__len__, found)] == [len(found[0])] * 2
    assert found[0].startswith(error)
    assert bool(found[0]) == bool(error)


# Schedules


def sgd(model: nn.Module) -> optim.SGD:
    return optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def test_schedules_of_another_optimizer_are_refused(world):
    model, other = network(), network()
    message = "changes the rate of another optimizer than the run's; make it of the optimizer that"
    mine, theirs = sgd(model), sgd(other)
    again = sgd(model)  # of the same parameters, and still another optimizer
    for optimizer in (theirs, again):
        for make in (
            partial(rates.StepLR, step_size=1),
            partial(rates.LambdaLR, lr_lambda=lambda _: 1.0),
            lambda one: rates.SequentialLR(one, [rates.ConstantLR(one), rates.StepLR(one, 1)], [2]),
            lambda one: rates.ChainedScheduler([rates.StepLR(one, 1)], one),
            rates.ReduceLROnPlateau,
        ):
            with refused(message):
                make_run(world, model, mine, make(optimizer))
            make_run(world, model, mine, make(mine))
    first, last = sgd(model[0]), sgd(model[2])
    early = rates.StepLR(first, 1)
    chain = ChainedOptimizer(ChainedOptimizer(first), last)
    make_run(world, model, chain, rates.StepLR(chain, 1))
    make_run(world, model, chain, rates.StepLR(last, 1))  # the rate of some parameters
    make_run(world, model, chain, early)
    with refused(message):
        make_run(world, model, chain, rates.StepLR(sgd(model[0]), 1))


WHOLE = EPOCHS * STEPS
Schedule = Callable[[optim.Optimizer], Any]


def in_turn(first: Schedule, second: Schedule, milestone: int) -> Schedule:
    return lambda one: rates.SequentialLR(one, [first(one), second(one)], [milestone])


def together(*made: Schedule) -> Schedule:
    return lambda one: rates.ChainedScheduler([make(one) for make in made], one)


def cosine(steps: int) -> Schedule:
    return partial(rates.CosineAnnealingLR, T_max=steps)


def linear(steps: int) -> Schedule:
    return partial(rates.LinearLR, start_factor=1.0, end_factor=0.0, total_iters=steps)


def polynomial(steps: int) -> Schedule:
    return partial(rates.PolynomialLR, total_iters=steps)


def one_cycle(steps: int) -> Schedule:
    return partial(rates.OneCycleLR, max_lr=0.2, total_steps=steps)


@pytest.mark.parametrize(
    "make, message",
    [
        (linear(24), "LinearLR has total_iters 24, and would not reach its end: the run has 12 st"),
        (linear(13), "the run has 12 steps (2 epochs of 6); take total_iters=12, or more epochs"),
        (polynomial(13), "PolynomialLR has total_iters 13, and would not reach its end"),
        (one_cycle(13), "OneCycleLR has total_steps 13, and would not reach its end"),
        (
            one_cycle(5),
            "OneCycleLR has total_steps 5, and would end before the run: the run has 12",
        ),
        (
            one_cycle(11),
            "steps (2 epochs of 6); take total_steps=12, or 2 where it is stepped once",
        ),
        (
            in_turn(cosine(3), linear(10), 3),
            "LinearLR has total_iters 10 after the 3 steps before it, and would not reach its",
        ),
        (together(cosine(3), linear(13)), "LinearLR has total_iters 13, and would not reach"),
    ],
)
def test_schedules_that_do_not_fit_the_run_are_refused(world, make, message):
    model = network()
    optimizer = sgd(model)
    with refused(message):
        make_run(world, model, optimizer, make(optimizer))


@pytest.mark.parametrize(
    "make",
    [
        linear(WHOLE),
        linear(2),  # warms up
        cosine(WHOLE),
        cosine(5),  # falls and rises again
        cosine(14),  # does not fall to 0
        in_turn(partial(rates.LinearLR, total_iters=100), cosine(5), 100),  # a short trial
        partial(rates.LinearLR, start_factor=1.0, end_factor=1.0, total_iters=1000),
        cosine(EPOCHS),
        polynomial(WHOLE),
        one_cycle(WHOLE),
        in_turn(linear(3), cosine(9), 3),
        in_turn(one_cycle(5), cosine(7), 5),
        together(linear(3), cosine(12)),
        rates.ConstantLR,
        partial(rates.ConstantLR, total_iters=100),  # the rate of the whole run
        partial(rates.CosineAnnealingWarmRestarts, T_0=3),
        partial(rates.MultiStepLR, milestones=[5, 50]),
    ],
)
def test_schedules_that_fit_the_run_are_taken(world, make):
    model = network()
    optimizer = sgd(model)
    train(make_run(world, model, optimizer, make(optimizer)))


@pytest.mark.parametrize("every", [1, 2, 4, 5, STEPS])
def test_a_cycle_of_accumulated_steps_or_of_epochs_is_taken(world, every):
    """The optimizer steps after every so many batches, and at an epoch's end with the others."""
    model = network()
    optimizer = sgd(model)
    scheduler = rates.OneCycleLR(optimizer, 0.2, total_steps=EPOCHS * -(-STEPS // every))
    with make_run(world, model, optimizer, scheduler) as run:
        for epoch in run.epochs():
            for number, (x, labels, size) in enumerate(run.batches(epoch), 1):
                loss = cross_entropy(model(x), labels, reduction="sum")
                (loss / size).backward()
                if number % every == 0 or number == STEPS:
                    optimizer.step()
                    optimizer.zero_grad()
                    scheduler.step()
                run.end_step(loss_sum=loss)
            run.end_epoch()
    assert scheduler.last_epoch == scheduler.total_steps


# The model that is trained, and that is judged


def test_a_loop_that_trains_another_model_is_refused(world):
    message = "no parameter of the run's model has a gradient in the optimizer's first step: the lo"
    for optimizer in (sgd, lambda model: Muon.for_model(model, 0.02, others=optim.SGD)):
        model = network()
        with refused(message):
            train(make_run(world, model, optimizer(model)), trained=network())
        train(make_run(world, model, optimizer(model)))
    model = network()
    optimizer, scaler = sgd(model), GradScaler(world)

    def step() -> None:
        scaler.step(optimizer)
        scaler.update()

    train(make_run(world, model, optimizer), step=step)


@pytest.mark.parametrize("is_keyword", [True, False])
def test_a_closure_may_compute_the_gradients(world, is_keyword):
    torch.manual_seed(0)
    model = network()
    before = model[0].weight.detach().clone()
    optimizer = optim.LBFGS(model.parameters(), lr=0.01)
    with make_run(world, model, optimizer) as run:
        for epoch in run.epochs():
            for x, labels, size in run.batches(epoch):

                def closure(x: Tensor = x, labels: Tensor = labels, size: int = size) -> Tensor:
                    optimizer.zero_grad()
                    loss = cross_entropy(model(x), labels, reduction="sum") / size
                    loss.backward()
                    return loss

                optimizer.zero_grad()
                loss = (
                    optimizer.step(**{"closure": closure})
                    if is_keyword
                    else optimizer.step(closure)
                )
                run.end_step(loss_sum=loss * size)
            run.end_epoch()
    assert not torch.equal(model[0].weight, before)


class Unlike(nn.Module):
    """A part of a model beside a layer of another one."""

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        self.shared, self.own = model[0], nn.Linear(16, 3)

    def predict(self, x: Tensor) -> Tensor:
        return self.own(self.shared(x))  # type: ignore[no-any-return]


def test_a_task_that_judges_another_model_is_refused(world):
    model = network()
    unlike = Unlike(model)
    for predict, message in (
        (nn.Linear(8, 3), "predict=…) is a Linear whose weight is not the run's model's"),
        (unlike, "predict=…) is a Unlike whose own.weight is not the run's model's"),
        (unlike.predict, "predict=…) is a Unlike whose own.weight is not the run's model's"),
        (nn.Linear(8, 3).requires_grad_(False), "is a Linear whose weight is not the run's"),
        (DistributedDataParallel(network()), "is a DistributedDataParallel whose module.0.weight"),
    ):
        with refused(message):
            make_run(world, model, predict=predict)
    for right in (
        model,
        model.forward,
        DistributedDataParallel(model),
        torch.compile(model),
        nn.Sequential(*model, nn.Softmax(1)),
        nn.Sequential(nn.Linear(8, 8).requires_grad_(False), model),  # frozen features
        AveragedModel(model),
        None,
        lambda x: unlike.predict(x),  # the program's own function
    ):
        make_run(world, model, predict=right)


def test_a_schedule_of_another_length_is_not_resumed(world, tmp_path):
    def run(epochs: int, make: Schedule) -> None:
        model = network()
        optimizer = sgd(model)
        parts = model, optimizer, make(optimizer), world, task()
        with Run(*parts, epochs=epochs, checkpoint=CheckpointConfig(tmp_path)) as resumed:
            resumed.resume()
            train_epochs(resumed, model)

    run(2, cosine(12))
    with refused("was saved with CosineAnnealingLR.T_max 12, and this run's is 24; take 12, or an"):
        run(4, cosine(24))
    run(4, cosine(12))


def test_a_test_set_of_other_classes_is_refused(world):
    for classes in (("a", "b"), ("b", "a", "c"), ("a", "b", "c", "d")):
        with refused(
            f"the test samples have the classes {classes}, expected those of the training"
        ):
            make_run(world, network(), test=samples(48, 9, classes))
    make_run(world, network(), test=samples(48, 9))
