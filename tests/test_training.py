# SPDX-License-Identifier: MIT
"""Training: two ranks learn what one learns; a run evaluates, saves, resumes and stops."""

import dataclasses
import math
import os
import re
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import plain_loop
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from torchpar import data, training
from torchpar.data import Samples
from torchpar.errors import ConfigError
from torchpar.nn import MLP
from torchpar.optim import newton_schulz
from torchpar.parallel.launch.world import World, join_world
from torchpar.parallel.split.exact_gradients import ExactGradients
from torchpar.parallel.split.mlp import parallel_mlp
from torchpar.profile.collectives import Collectives
from torchpar.profile.phases import Phases
from torchpar.training import CheckpointConfig, loss_sum
from torchpar.training.evaluation import EVALUATION_BATCH
from torchpar.training.fused import FusedGradients
from torchpar.training.state import EpochResult
from torchpar.training.stop import StopSignal

SIZES = [784, 20, 10]


@pytest.fixture
def alone() -> Iterator[World]:
    with join_world("cpu") as world:
        yield world


def samples(n: int, seed: int) -> Samples:
    """Noise around one pattern per class."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randint(0, 200, (10, 28, 28), generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 10, (n,), generator=generator)
    images = patterns[labels] + torch.randint(0, 56, (n, 28, 28), generator=generator)
    return Samples(images.to(torch.uint8), labels, tuple("0123456789"))


class InDouble(torch.nn.Module):
    """A model in double precision that takes single-precision inputs."""

    def __init__(self, model: MLP):
        super().__init__()
        self.model = model.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x.double())


def train(
    n: int = 203, batch_size: int = 50, double: bool = False, measured: bool = False, fused: bool = False
) -> Any:
    """Losses, weights, confusion matrix and seconds by phase of a short run on the ranks there are."""
    torch.manual_seed(0)
    model: torch.nn.Module = InDouble(MLP(SIZES)) if double else MLP(SIZES)
    phases = Phases(torch.device("cpu"))
    with join_world("cpu") as world, ExitStack() as stack:
        gradients = FusedGradients(model, world) if fused else None
        replica = DistributedDataParallel(model) if world.world_size > 1 and not fused else model
        if measured:
            stack.enter_context(phases)
            stack.enter_context(Collectives(world))
        optimizer = training.sgd(model, lr=0.3, momentum=0.9, weight_decay=1e-4)
        test = samples(101, seed=2)
        run = plain_loop.train(
            *(model, optimizer, world, samples(n, seed=1), test),
            replica=replica,
            fused=gradients,
            epochs=2,
            batch_size=batch_size,
        )
        _, outputs = run.evaluate()
        confusion = torch.zeros(10, 10, dtype=torch.int64)
        confusion.index_put_((test.labels, outputs.argmax(1)), torch.ones(1, dtype=torch.int64), True)
    losses = [(r.train_loss, r.test_loss) for r in run.results]
    weights = [p.detach().double().numpy() for p in model.parameters()]
    return losses, weights, confusion.tolist(), phases.seconds


def assert_as_accurate(run: Any, one: Any, exact: Any) -> None:
    """At most twice the error of ``one``, in losses and weights, beside ``exact``, the run in float64."""

    def error(run: Any) -> tuple[float, float]:
        loss = max(
            abs(a - b) for r, e in zip(run[0], exact[0], strict=True) for a, b in zip(r, e, strict=True)
        )
        return loss, max(abs(a - b).max() for a, b in zip(run[1], exact[1], strict=True))

    # The error of a run is that of its worst weight, whose own rounding is at least half an ulp.
    largest = max(max(exact[0])), max(abs(w).max() for w in exact[1])
    for mine, ones, largest_value in zip(error(run), error(one), largest, strict=True):
        assert mine <= 2 * ones + torch.finfo(torch.float32).eps * largest_value


# A batch remainder of 3 leaves a rank of four without samples; batches of 50 split unevenly over four.
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_learn_what_one_process_learns(ranks, world_size):
    """Within rounding: a rank sums its own samples' gradients first, so that sums associate differently.

    Both are judged by the same run in double precision.
    """
    (exact,) = ranks(1, train, 203, 50, True)
    (one,) = ranks(1, train)
    several = ranks(world_size, train)
    for losses, weights, confusion, _ in several:
        assert losses == several[0][0]
        assert all((a == b).all() for a, b in zip(weights, several[0][1], strict=True))
        assert confusion == one[2]
    assert_as_accurate(several[0], one, exact)


def test_the_comparison_rejects_a_mean_of_means(ranks):
    """Averaging each rank's own mean, as DistributedDataParallel alone would, is not the global mean."""
    (one,) = ranks(1, train)
    wrong = ranks(2, train_on_means)[0]
    assert abs(wrong[0][-1][0] - one[0][-1][0]) > 1e-4


def train_on_means() -> Any:
    whole = data.batches

    def with_local_size(*args: Any, share: Any, **kwargs: Any) -> Any:
        for batch in whole(*args, share=share, **kwargs):
            yield batch._replace(global_size=share(0).ranks * len(batch.labels))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "batches", with_local_size)
        return train(n=203, batch_size=51)


def evaluate(n: int) -> Any:
    torch.manual_seed(0)
    with join_world("cpu") as world:
        loss, outputs = training.evaluate(MLP(SIZES), samples(n, seed=2), world, "cross-entropy")
    return loss, outputs.detach().numpy()


# 3 chunks: a rank of four has none; the last one is small.
@pytest.mark.parametrize("n", [101, 2 * EVALUATION_BATCH + 1])
def test_evaluation_counts_every_sample_once_and_the_same_on_all_ranks(ranks, n):
    loss, outputs = ranks(1, evaluate, n)[0]
    torch.manual_seed(0)
    test = samples(n, seed=2)
    expected = MLP(SIZES)(test.inputs(slice(None)))
    torch.testing.assert_close(torch.from_numpy(outputs), expected.detach())
    mean = torch.nn.functional.cross_entropy(torch.from_numpy(outputs).double(), test.labels)
    assert loss == pytest.approx(mean.item(), rel=1e-14)
    for world_size in (2, 4):
        for other_loss, others in ranks(world_size, evaluate, n):
            assert other_loss == loss
            assert (others == outputs).all()


def test_phases_change_no_bit(ranks):
    plain, measured = ranks(2, train)[0], ranks(2, train, 203, 50, False, True)[0]
    assert plain[0] == measured[0]
    assert all((a == b).all() for a, b in zip(plain[1], measured[1], strict=True))
    spent = {phase for phase, seconds in measured[3].items() if seconds > 0}
    assert spent == {"data", "forward", "backward", "collectives", "optimizer"}


def refuse_a_batch_of_one() -> str:
    model = MLP(SIZES)
    optimizer = torch.optim.SGD(model.parameters())
    with join_world("cpu") as world, pytest.raises(ConfigError) as caught:
        plain_loop.train(model, optimizer, world, samples(9, 0), samples(9, 0), epochs=1, batch_size=1)
    return str(caught.value)


def test_fewer_samples_in_a_batch_than_ranks(ranks):
    for message in ranks(2, refuse_a_batch_of_one):
        assert message.startswith("batch size 1 is smaller than the number of ranks that share it, 2;")


OPTIMIZERS = {
    "sgd": partial(training.sgd, lr=0.3, momentum=0.9, weight_decay=1e-4),
    "muon": partial(training.muon, lr=0.1, momentum=0.9, weight_decay=0.01),
}


def run_alone(
    epochs: int,
    folder: Path | None = None,
    optimizer: Any = OPTIMIZERS["sgd"],
    **config: Any,
) -> tuple[MLP, list[EpochResult]]:
    torch.manual_seed(0)
    model = MLP(SIZES)
    with join_world("cpu") as world:
        run = plain_loop.train(
            *(model, optimizer(model), world, samples(200, 1), samples(50, 2)),
            epochs=epochs,
            batch_size=32,
            schedule="constant",
            checkpoint=training.CheckpointConfig(folder) if folder else None,
            config=config,
        )
    return model, run.results


def same_run(a: list[EpochResult], b: list[EpochResult]) -> bool:
    clocks = {"seconds": 0.0, "samples_per_s": 0.0}
    return [dataclasses.replace(r, **clocks) for r in a] == [dataclasses.replace(r, **clocks) for r in b]


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_learns_and_resumes_bit_for_bit(tmp_path, optimizer):
    run = partial(run_alone, optimizer=optimizer)
    model, results = run(4)
    assert results[-1].test_accuracy == 1.0
    assert results[-1].train_loss < results[0].train_loss / 2
    run(1, tmp_path)
    run(3, tmp_path)
    resumed, all_results = run(4, tmp_path)
    assert same_run(all_results, results)
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    again, same = run(4, tmp_path)  # nothing left to train
    assert same == all_results
    assert torch.equal(again.layers[0].weight, model.layers[0].weight)


def train_by_muon() -> tuple[float, list[Any]]:
    """The last training loss, and the weights."""
    torch.manual_seed(0)
    model = MLP(SIZES)
    with join_world("cpu") as world:
        run = plain_loop.train(
            *(model, OPTIMIZERS["muon"](model), world, samples(203, seed=1), samples(101, seed=2)),
            replica=DistributedDataParallel(model) if world.world_size > 1 else model,
            epochs=4,
            batch_size=50,
        )
    return run.results[-1].train_loss, [p.detach().numpy() for p in model.parameters()]


def test_muon_on_two_ranks(ranks):
    """The ranks keep the same weights, and learn what one process does up to Muon's bfloat16."""
    (one,), several = ranks(1, train_by_muon), ranks(2, train_by_muon)
    for a, b in zip(*(weights for _, weights in several), strict=True):
        assert (a == b).all()
    assert several[0][0] == several[1][0] == pytest.approx(one[0], rel=2**-8)


def test_muon_moves_the_weights_and_sgd_the_biases(monkeypatch):
    """As the two would alone, and after their joint state was loaded."""
    monkeypatch.setattr(newton_schulz, "has_bfloat16", lambda: True)  # as torch's
    torch.manual_seed(0)
    model, apart = MLP(SIZES), MLP(SIZES)
    apart.load_state_dict(model.state_dict())
    weights = [p for p in apart.parameters() if p.dim() == 2]
    biases = [p for p in apart.parameters() if p.dim() == 1]
    both = [
        torch.optim.Muon(weights, lr=0.02, momentum=0.9, weight_decay=0.01),
        torch.optim.SGD(biases, lr=0.02, momentum=0.9, nesterov=True),
    ]
    chained = training.muon(model, lr=0.02, momentum=0.9, weight_decay=0.01)
    for _ in range(2):
        state = chained.state_dict()
        chained = training.muon(model, lr=7.0, momentum=0.1, weight_decay=0.0)
        chained.load_state_dict(state)
        for p, q in zip(model.parameters(), apart.parameters(), strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        for optimizer in (chained, *both):
            optimizer.step()
    for p, q in zip(model.parameters(), apart.parameters(), strict=True):
        # Muon's directions are of bfloat16, each rate times 2^-8 of an element of at most 1.
        torch.testing.assert_close(p, q, rtol=0, atol=2 * 0.02 * 2**-8 if p.dim() == 2 else 0)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(model.layers[0].weight, MLP(SIZES).layers[0].weight)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    run_alone(1, tmp_path, lr=0.3, hidden=(20,))
    with pytest.raises(ConfigError, match=r"holds a run with hidden \[20\], this one has hidden \[30\]"):
        run_alone(1, tmp_path, lr=0.3, hidden=(30,))


def test_a_checkpoint_of_more_epochs_is_refused(tmp_path):
    run_alone(2, tmp_path)
    with pytest.raises(ConfigError, match="holds 2 epochs, more than the 1 asked for"):
        run_alone(1, tmp_path)


def test_flags_of_another_script_do_not_matter(tmp_path):
    run_alone(1, tmp_path, lr=0.3)
    _, results = run_alone(2, tmp_path, lr=0.3, pipeline="gpipe")
    assert len(results) == 2


def run_with(world: World, folder: Path, arithmetic: Any) -> None:
    model = parallel_mlp(MLP(SIZES), world.mesh["tp"], arithmetic)
    gradients = ExactGradients(model, world) if arithmetic == "exact" else lambda: None
    optimizer = OPTIMIZERS["sgd"](model, arithmetic=arithmetic)
    with training.Run(
        *(model, optimizer, training.lr_scheduler(optimizer, "constant", 5), world),
        *(samples(64, 1), samples(50, 2)),
        epochs=1,
        batch_size=32,
        checkpoint=training.CheckpointConfig(folder),
        config={"arithmetic": arithmetic},
    ) as run:
        for epoch in run.epochs():
            for x, labels, _ in run.batches(epoch):
                loss = loss_sum("cross-entropy", model(x), labels)
                loss.backward()
                gradients()
                run.log(loss.detach())


@pytest.mark.parametrize("first, then", [("fast", "exact"), ("exact", "fast")])
def test_a_checkpoint_of_the_other_arithmetic_is_refused(alone, tmp_path, first, then):
    world = alone.with_mesh()
    run_with(world, tmp_path, first)
    run_with(world, tmp_path, first)
    with pytest.raises(
        ConfigError, match=f"holds a run with arithmetic {first}, this one has arithmetic {then}"
    ):
        run_with(world, tmp_path, then)


def test_a_checkpoint_of_another_arithmetic_is_refused(tmp_path):
    run_alone(1, tmp_path, lr=0.3)
    run_alone(1, tmp_path, lr=0.3)
    with (
        patch("torchpar.training.run.arithmetic_of", lambda model: "exact"),
        pytest.raises(ConfigError, match="with arithmetic fast, this one has arithmetic exact"),
    ):
        run_alone(1, tmp_path, lr=0.3)


def test_losses_are_torchs(device):
    torch.manual_seed(0)
    logits = torch.randn(6, 4, device=device, dtype=torch.float64)
    labels = torch.tensor([0, 3, 1, 1, 2, 0], device=device)
    targets = torch.nn.functional.one_hot(labels, 4).double()
    p = logits.sigmoid()
    expected = {
        "cross-entropy": -(logits.log_softmax(1) * targets).sum(),
        "bce": -(targets * p.log() + (1 - targets) * (1 - p).log()).sum(),
        "mse": (p - targets).square().sum(),
    }
    for loss, value in expected.items():
        outputs = logits if loss == "cross-entropy" else p
        torch.testing.assert_close(training.loss_sum(loss, outputs, labels), value)
    with pytest.raises(ConfigError, match="loss is 'hinge', expected"):
        training.loss_sum("hinge", logits, labels)  # type: ignore[arg-type]


def test_orthogonality_penalty(device):
    model = MLP([6, 5, 3], device=device, dtype=torch.float64)
    eye = [torch.eye(n, device=device, dtype=torch.float64) for n in (5, 3)]
    weights = [layer.weight for layer in model.layers]
    expected = sum((w @ w.T - i).norm() ** 2 for w, i in zip(weights, eye, strict=True))
    penalty = training.orthogonality_penalty(model)
    torch.testing.assert_close(penalty, expected)
    gradients = torch.autograd.grad(penalty, weights)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, weights))
    torch.nn.init.orthogonal_(weights[0])
    torch.nn.init.orthogonal_(weights[1])
    assert training.orthogonality_penalty(model) < 1e-24


@pytest.mark.parametrize("decay_biases", [False, True])
def test_weight_decay_is_an_l2_penalty(decay_biases):
    torch.manual_seed(0)
    model = MLP([4, 3])
    torch.nn.init.normal_(model.layers[0].bias)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = training.sgd(model, lr=0.5, momentum=0.0, weight_decay=0.1, decay_biases=decay_biases)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, was in zip(model.parameters(), before, strict=True):
        decays = p.dim() == 2 or decay_biases
        torch.testing.assert_close(p.detach(), was - 0.5 * 0.1 * was * decays)


def test_schedules():
    def course(schedule: training.LRSchedule) -> list[float]:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
        scheduler = training.lr_scheduler(optimizer, schedule, 4)
        rates = []
        for _ in range(4):
            rates.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        return [*rates, scheduler.get_last_lr()[0]]

    assert course("linear") == [2.0, 1.5, 1.0, 0.5, 0.0]
    assert course("constant") == [2.0] * 5
    assert course("cosine") == pytest.approx([1 + math.cos(math.pi * i / 4) for i in range(5)])
    with pytest.raises(ConfigError, match="schedule is 'steps', expected one of"):
        course("steps")  # type: ignore[arg-type]


def test_a_second_signal_does_not_kill_a_process_that_is_leaving(alone):
    before = signal.getsignal(signal.SIGTERM)
    try:
        with StopSignal(alone) as stop:
            stop.ask()
            assert not stop.answer()
            os.kill(os.getpid(), signal.SIGTERM)
            stop.ask()
            assert stop.answer() == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)
        with StopSignal(alone):
            pass
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


class WithScale(torch.nn.Module):
    """A model with a parameter of dimension 0 and a frozen one, each of which is a rank's own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.register_parameter("frozen", torch.nn.Parameter(torch.ones(1), requires_grad=False))
        self.mlp = MLP(SIZES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.mlp(x) * self.frozen


def train_and_catch(wrapped: bool, change: str = "") -> str:
    """The error of a run on two ranks, if any; rank 1 changes one bit of the parameter ``change``."""
    torch.manual_seed(0)
    model = WithScale()
    optimizer = training.sgd(model, lr=0.3, momentum=0.9, weight_decay=1e-4)
    with join_world("cpu") as world:
        replica = DistributedDataParallel(model) if wrapped else model
        if change and world.rank == 1:
            bits = model.get_parameter(change).data.view(-1).view(torch.int32)
            bits[-1] ^= 1
        try:
            plain_loop.train(
                *(model, optimizer, world, samples(101, seed=1), samples(50, seed=2)),
                replica=replica,
                epochs=1,
                batch_size=50,
            )
        except ConfigError as e:
            return str(e)
    return ""


@pytest.mark.parametrize("change, named", [("", "scale"), ("frozen", "frozen")])
def test_replicas_that_differ_are_refused_on_every_rank(ranks, change, named):
    """Gradients that nobody averages, and one bit of one parameter."""
    messages = ranks(2, train_and_catch, bool(change), change)
    assert messages[0] == messages[1]
    assert re.match(
        rf"{named} differs between the ranks that share a batch; .* average .* by Distributed", messages[0]
    )
    assert "\n" not in messages[0]


def test_equal_replicas_are_not_refused(ranks):
    assert ranks(2, train_and_catch, True) == ["", ""]


class WithModes(torch.nn.Module):
    """Layers that compute otherwise in training; the last of them is always in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.BatchNorm1d(784),
            torch.nn.Dropout(0.5),
            torch.nn.Linear(784, 10),
            torch.nn.BatchNorm1d(10, affine=False),
        )
        self.layers[-1].eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def test_evaluation_is_in_evaluation_mode_and_restores_each_modules(alone):
    torch.manual_seed(0)
    model, test = WithModes(), samples(50, seed=2)
    optimizer = training.sgd(model, lr=0.01, momentum=0.9, weight_decay=0.0)
    run = plain_loop.train(model, optimizer, alone, samples(200, seed=1), test, epochs=1, batch_size=40)
    learned = {name: t.clone() for name, t in model.named_buffers()}
    assert learned["layers.0.num_batches_tracked"] == 5  # the evaluation after the epoch was none
    assert learned["layers.3.num_batches_tracked"] == 0
    loss, outputs = run.evaluate()
    assert [module.training for module in model.layers] == [True, True, True, False]
    assert all(torch.equal(t, learned[name]) for name, t in model.named_buffers())
    expected = model.eval()(test.inputs(slice(None)))
    assert torch.equal(outputs, expected)
    assert run.results[-1].test_loss == loss
    assert not torch.equal(model.train()(test.inputs(slice(None))), expected)


def run_with_dropout(epochs: int, folder: Path | None, seed: int) -> list[Any]:
    """The weights after ``epochs`` on ranks that draw different masks; saved after every second step."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Dropout(0.3), torch.nn.Linear(784, 10))
    with join_world("cpu") as world:
        torch.manual_seed(seed + world.rank)
        plain_loop.train(
            *(model, OPTIMIZERS["sgd"](model), world, samples(203, 1), samples(50, 2)),
            replica=DistributedDataParallel(model),
            epochs=epochs,
            batch_size=50,
            schedule="constant",
            checkpoint=training.CheckpointConfig(folder, every=2) if folder else None,
        )
    return [p.detach().numpy() for p in model.parameters()]


def test_a_resumed_run_draws_each_ranks_random_numbers_as_the_whole_one(ranks, tmp_path):
    whole = ranks(2, run_with_dropout, 2, None, 10)
    ranks(2, run_with_dropout, 1, tmp_path, 10)
    resumed = ranks(2, run_with_dropout, 2, tmp_path, 20)
    other = ranks(2, run_with_dropout, 2, None, 20)
    for rank in range(2):
        assert all((a == b).all() for a, b in zip(resumed[rank], whole[rank], strict=True))
        assert not all((a == b).all() for a, b in zip(other[rank], whole[rank], strict=True))


@pytest.mark.parametrize("taken, logged", [(2, 2), (3, 2), (3, 4), (0, 0)])
def test_a_run_refuses_batches_left_out_and_losses_not_logged(alone, taken, logged):
    """Of three batches of an epoch."""
    model = MLP(SIZES)
    optimizer = OPTIMIZERS["sgd"](model)
    scheduler = training.lr_scheduler(optimizer, "constant", 3)
    sets = samples(150, 1), samples(50, 2)
    with training.Run(model, optimizer, scheduler, alone, *sets, epochs=1, batch_size=50) as run:
        epochs = run.epochs()
        batches = run.batches(next(epochs))
        for _ in range(taken + 1):  # a loop asks for the next batch after each step
            next(batches, None)
        for _ in range(logged):
            run.log(torch.zeros(()))
        with pytest.raises(RuntimeError, match=f"{taken} of 3 batches were taken and {logged} losses logged"):
            next(epochs)
    assert run.results == []


def test_a_run_without_a_schedule_resumes(alone, tmp_path):
    """Its weights are those of a constant rate."""
    weights = []
    for stops, schedule in (([3], "constant"), ([1, 3], None)):
        for epochs in stops:
            torch.manual_seed(0)
            model = MLP(SIZES)
            plain_loop.train(
                *(model, OPTIMIZERS["sgd"](model), alone, samples(150, 1), samples(50, 2)),
                epochs=epochs,
                batch_size=50,
                schedule=schedule,
                checkpoint=CheckpointConfig(tmp_path / str(schedule)),
            )
        weights.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def normalised_on_two_ranks() -> tuple[float, float]:
    """The test loss of a run, and that of this rank's model after it."""
    with join_world("cpu") as world:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.BatchNorm1d(SIZES[0]), torch.nn.Linear(SIZES[0], SIZES[-1]))
        replica = DistributedDataParallel(model)
        optimizer, test = torch.optim.SGD(model.parameters(), lr=0.1), samples(2 * EVALUATION_BATCH, seed=2)
        run = plain_loop.train(
            model, optimizer, world, samples(64, seed=1), test, epochs=1, batch_size=16, replica=replica
        )
        with torch.no_grad():
            outputs = model.eval()(test.inputs(slice(None)))
        total = loss_sum("cross-entropy", outputs.double(), test.labels)
        return run.results[0].test_loss, total.item() / len(test)


def test_ranks_evaluate_one_model_with_one_batch_norm(ranks):
    """DistributedDataParallel leaves each rank the statistics of its own last batch."""
    for of_run, of_rank in ranks(2, normalised_on_two_ranks):
        assert of_rank == pytest.approx(of_run, rel=1e-6)


def warm_up_without_average(world: World) -> None:
    """Train replicas whose gradients nobody averages, with a learning rate of 0 in the first step."""
    torch.manual_seed(0)
    model = MLP(SIZES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 4)
    train, test = samples(64, seed=1), samples(9, seed=2)
    with training.Run(model, optimizer, scheduler, world, train, test, epochs=1, batch_size=16) as run:
        for epoch in run.epochs():
            for x, labels, size in run.batches(epoch):
                loss = loss_sum("cross-entropy", model(x), labels)
                (loss / size).backward()
                optimizer.step()
                scheduler.step()
                run.log(loss)


def error_of_warm_up() -> str:
    with join_world("cpu") as world, pytest.raises(ConfigError) as caught:
        warm_up_without_average(world)
    return str(caught.value)


def test_replicas_that_differ_later_are_refused_at_the_end_of_the_epoch(ranks):
    for message in ranks(2, error_of_warm_up):
        assert "differs between the ranks that share a batch" in message


@pytest.mark.parametrize("other", [{"batch_size": 8}, {"seed": 5}])
def test_another_batch_size_or_order_is_not_resumed(tmp_path, other):
    def train(**options: Any) -> None:
        torch.manual_seed(0)
        model = MLP(SIZES)
        options = {"epochs": 1, "batch_size": 16, "schedule": "constant", **options}
        config = training.CheckpointConfig(tmp_path)
        with join_world("cpu") as world:
            sets = samples(64, seed=1), samples(9, seed=2)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            plain_loop.train(model, optimizer, world, *sets, checkpoint=config, **options)

    train()
    with pytest.raises(ConfigError, match=f"holds a run with {next(iter(other))} "):
        train(epochs=2, **other)


def test_a_run_with_checkpoints_must_be_a_context(tmp_path):
    model = MLP(SIZES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with join_world("cpu") as world:
        run = training.Run(
            *(model, optimizer, training.lr_scheduler(optimizer, "constant", 1), world),
            *(samples(9, 1), samples(9, 2)),
            epochs=1,
            batch_size=9,
            checkpoint=training.CheckpointConfig(tmp_path),
        )
        with pytest.raises(RuntimeError, match="with Run"):
            next(run.epochs())
        with pytest.raises(RuntimeError, match="epoch is 2, expected 1"):
            next(run.batches(2))
