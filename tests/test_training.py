# SPDX-License-Identifier: MIT
import copy
import dataclasses
import math
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from torchpar import training
from torchpar.collectives import WatchedStep
from torchpar.data import Samples
from torchpar.errors import ConfigError
from torchpar.nn import MLP
from torchpar.optim import ChainedOptimizer
from torchpar.parallel.mlp import parallel_mlp
from torchpar.parallel.step import ReplicaStep, Step
from torchpar.parallel.stop import StopSignal
from torchpar.parallel.world import World, join_world
from torchpar.phases import Phases
from torchpar.progress import EpochResult

SIZES = [784, 20, 10]


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
    n: int = 203, batch_size: int = 50, double: bool = False, phases: bool = False, **options: Any
) -> Any:
    """Losses, weights and confusion matrix of a short run on the ranks there are."""
    torch.manual_seed(0)
    model: torch.nn.Module = InDouble(MLP(SIZES)) if double else MLP(SIZES)
    with join_world("cpu") as world:
        forward, measured = model, Phases(world.device) if phases else None
        if world.world_size > 1:
            forward = DistributedDataParallel(model)
        step: Step = ReplicaStep(forward, world.data_ranks)
        if measured:
            step = WatchedStep(step, world)
        test = samples(101, seed=2)
        results = training.fit(
            model,
            training.sgd(model, lr=0.3, momentum=0.9, weight_decay=1e-4),
            samples(n, seed=1),
            test,
            world,
            step=step,
            epochs=2,
            batch_size=batch_size,
            phases=measured,
            **options,
        )
        _, outputs = training.evaluate(step, test, world, "cross-entropy")
        confusion = torch.zeros(10, 10, dtype=torch.int64)
        confusion.index_put_((test.labels, outputs.argmax(1)), torch.ones(1, dtype=torch.int64), True)
    losses = [(r.train_loss, r.test_loss) for r in results]
    weights = [p.detach().double().numpy() for p in model.parameters()]
    return losses, weights, confusion.tolist(), measured and measured.seconds


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

    def error(run: Any) -> tuple[float, float]:
        loss = max(
            abs(a - b) for r, e in zip(run[0], exact[0], strict=True) for a, b in zip(r, e, strict=True)
        )
        return loss, max(abs(a - b).max() for a, b in zip(run[1], exact[1], strict=True))

    # The error of a run is that of its worst weight, whose own rounding is at least half an ulp.
    for mine, ones, largest in zip(
        error(several[0]), error(one), (max(max(exact[0])), max(abs(w).max() for w in exact[1])), strict=True
    ):
        assert mine <= 2 * ones + torch.finfo(torch.float32).eps * largest


def test_the_comparison_rejects_a_mean_of_means(ranks, monkeypatch):
    """Averaging each rank's own mean, as DistributedDataParallel alone would, is not the global mean."""
    (one,) = ranks(1, train)
    wrong = ranks(2, train_on_means)[0]
    assert abs(wrong[0][-1][0] - one[0][-1][0]) > 1e-4


def train_on_means() -> Any:
    unevenly = training.batches

    def with_local_size(*args: Any, **kwargs: Any) -> Any:
        for batch in unevenly(*args, **kwargs):
            yield batch._replace(global_size=kwargs["world"].world_size * len(batch.labels))

    training.batches = with_local_size  # type: ignore[assignment]
    try:
        return train(n=203, batch_size=51)
    finally:
        training.batches = unevenly


def evaluate(n: int) -> Any:
    torch.manual_seed(0)
    with join_world("cpu") as world:
        loss, outputs = training.evaluate(ReplicaStep(MLP(SIZES)), samples(n, seed=2), world, "cross-entropy")
    return loss, outputs.numpy()


# 3 chunks: a rank of four has none; the last one is small.
@pytest.mark.parametrize("n", [101, 2 * training.EVALUATION_BATCH + 1])
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


def test_fewer_samples_in_a_batch_than_ranks():
    with pytest.raises(ConfigError, match=r"batch size 3 is smaller than the number of ranks .* 4"):
        training.fit(
            MLP(SIZES),
            torch.optim.SGD([torch.zeros(1)]),
            samples(9, 0),
            samples(9, 0),
            World(0, 0, 4, torch.device("cpu")),
            epochs=1,
            batch_size=3,
        )


OPTIMIZERS = {
    "sgd": partial(training.sgd, lr=0.3, momentum=0.9, weight_decay=1e-4),
    "muon": partial(training.muon, lr=0.1, momentum=0.9, weight_decay=0.01),
}


def run_alone(
    epochs: int,
    folder: Path | None = None,
    schedule: training.Schedule = "linear",
    optimizer: Any = OPTIMIZERS["sgd"],
    **run: Any,
) -> tuple[MLP, list[EpochResult]]:
    torch.manual_seed(0)
    model = MLP(SIZES)
    world = World(0, 0, 1, torch.device("cpu"))
    results = training.fit(
        model,
        optimizer(model),
        samples(200, 1),
        samples(50, 2),
        world,
        epochs=epochs,
        batch_size=32,
        schedule=schedule,
        saving=training.Saving(folder) if folder else None,
        run=run,
    )
    return model, results


def same_run(a: list[EpochResult], b: list[EpochResult]) -> bool:
    clocks = {"seconds": 0.0, "samples_per_s": 0.0}
    return [dataclasses.replace(r, **clocks) for r in a] == [dataclasses.replace(r, **clocks) for r in b]


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_learns_and_resumes_bit_for_bit(tmp_path, optimizer):
    run = partial(run_alone, schedule="constant", optimizer=optimizer)
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


def train_by_muon() -> tuple[float, list[Any], str]:
    """The last training loss and the weights; what is said of weights that are split."""
    torch.manual_seed(0)
    model = MLP(SIZES)
    with join_world("cpu") as world:
        forward = DistributedDataParallel(model) if world.world_size > 1 else model
        results = training.fit(
            model,
            OPTIMIZERS["muon"](model),
            samples(203, seed=1),
            samples(101, seed=2),
            world,
            step=ReplicaStep(forward, world.data_ranks),
            epochs=4,
            batch_size=50,
        )
        mesh = world.split(tp=world.world_size).mesh
        assert mesh is not None
        refused = ""
        try:
            OPTIMIZERS["muon"](parallel_mlp(MLP(SIZES), mesh["tp"]))
        except ConfigError as e:
            refused = str(e)
    return results[-1].train_loss, [p.detach().numpy() for p in model.parameters()], refused


def test_muon_on_two_ranks(ranks):
    """The ranks keep the same weights, and learn what one process does up to Muon's bfloat16."""
    (one,), several = ranks(1, train_by_muon), ranks(2, train_by_muon)
    for a, b in zip(*(weights for _, weights, _ in several), strict=True):
        assert (a == b).all()
    assert several[0][0] == several[1][0] == pytest.approx(one[0], rel=2**-8)
    assert "whole matrices" in several[0][2]
    assert one[2] == ""


def test_muon_moves_the_weights_and_sgd_the_biases():
    """As the two would alone, and after their joint state was loaded."""
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


def test_a_chain_of_optimizers_is_one():
    """Copied, given a closure, and closed to parameters that no optimizer of it would move."""
    p, q = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    chain = ChainedOptimizer(torch.optim.SGD([p], lr=0.1), torch.optim.SGD([q], lr=0.2))
    copied = copy.deepcopy(chain)
    for optimizer in (chain, copied):
        (a,), (b,) = (group["params"] for group in optimizer.param_groups)

        def closure(a: torch.Tensor = a, b: torch.Tensor = b) -> torch.Tensor:
            loss = (a + 2 * b).sum()
            loss.backward()
            return loss

        assert optimizer.step(closure).item() == 6
        torch.testing.assert_close(a, torch.full((2,), 0.9))
        torch.testing.assert_close(b, torch.full((2,), 0.6))
    with pytest.raises(NotImplementedError, match="add a group to one of its optimizers"):
        chain.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})


def test_a_chain_of_optimizers_keeps_their_state():
    p, q, r = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    members = torch.optim.SGD([p], lr=0.1, momentum=0.9), torch.optim.SGD([q], lr=0.1, momentum=0.5)
    for _ in range(2):
        for t in (p, q):
            t.grad = torch.ones(2)
        for member in members:
            member.step()
    chain = ChainedOptimizer(*members)
    torch.testing.assert_close(chain.state[p]["momentum_buffer"], torch.full((2,), 1.9))
    torch.testing.assert_close(chain.state[q]["momentum_buffer"], torch.full((2,), 1.5))
    saved = chain.state_dict()
    members[0].add_param_group({"params": [r]})
    with pytest.raises(RuntimeError, match="one of its optimizers has another group; chain anew"):
        chain.load_state_dict(saved)
    assert len(ChainedOptimizer(*members).state) == 2


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    run_alone(1, tmp_path, lr=0.3, hidden=(20,))
    with pytest.raises(ConfigError, match=r"holds a run with hidden \[20\], this one has hidden \[30\]"):
        run_alone(1, tmp_path, lr=0.3, hidden=(30,))


def test_another_number_of_epochs_is_refused(tmp_path):
    """A falling rate would have fallen otherwise; a constant one may go on, but not back."""
    run_alone(2, tmp_path / "linear")
    with pytest.raises(ConfigError, match="holds a run with epochs 2, this one has epochs 4"):
        run_alone(4, tmp_path / "linear")
    run_alone(2, tmp_path / "constant", schedule="constant")
    with pytest.raises(ConfigError, match="holds 2 epochs, more than the 1 asked for"):
        run_alone(1, tmp_path / "constant", schedule="constant")


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
    def course(schedule: training.Schedule) -> list[float]:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
        rate = training.scheduler(optimizer, schedule, 4)
        rates = []
        for _ in range(4):
            rates.append(rate.get_last_lr()[0])
            optimizer.step()
            rate.step()
        return [*rates, rate.get_last_lr()[0]]

    assert course("linear") == [2.0, 1.5, 1.0, 0.5, 0.0]
    assert course("constant") == [2.0] * 5
    assert course("cosine") == pytest.approx([1 + math.cos(math.pi * i / 4) for i in range(5)])
    with pytest.raises(ConfigError, match="schedule is 'steps', expected one of"):
        course("steps")  # type: ignore[arg-type]


def test_told_to_stop_twice(tmp_path):
    """The second time, while it leaves, does not kill the process."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with StopSignal(World(0, 0, 1, torch.device("cpu"))) as stop:
            stop.ask()
            assert not stop.answer()
            os.kill(os.getpid(), signal.SIGTERM)
            stop.ask()
            assert stop.answer()
        os.kill(os.getpid(), signal.SIGTERM)
        with StopSignal(World(0, 0, 1, torch.device("cpu"))):
            pass
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_flags_of_another_script_do_not_matter(tmp_path):
    run_alone(1, tmp_path, schedule="constant", lr=0.3)
    _, results = run_alone(2, tmp_path, schedule="constant", lr=0.3, reduction="fast")
    assert len(results) == 2
