# SPDX-License-Identifier: MIT
"""Steps that a CUDA graph replays beside eager ones, on a GPU or on an emulated one."""

import copy
import gc
import random
import signal
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR, StepLR
from torch.optim.swa_utils import AveragedModel

from nogpu import cuda_is_cpu, emulate
from torchpar.data import Samples
from torchpar.errors import ConfigError
from torchpar.nn import MLP
from torchpar.parallel import join_world
from torchpar.training import (
    CheckpointConfig,
    Classification,
    Run,
    Stopped,
    graphed,
    muon,
)
from torchpar.training.graphed import WARMUP, count_replays
from torchpar.training.leaf_gradients import LeafGradients

graphed_module = sys.modules[graphed.__module__]

SIZES, BATCH, LAST = (12, 16, 4), 8, 3
EPOCHS, STEPS = 2, 5  # whole batches of an epoch, beside one of `LAST` samples
LR, TOTAL = 0.25, 32  # float32 holds these rates exactly
# What `graphed` would set is set here, for the plain loop.
OPTIMIZERS = {
    "muon": lambda model: muon(model, LR, momentum=0.5, weight_decay=0.125),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), LR, momentum=0.5, fused=True),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), LR / 16, capturable=True),
    "nadam": lambda model: torch.optim.NAdam(model.parameters(), LR / 16, capturable=True),
}


def batches(device: str = "cuda") -> list[tuple[Tensor, Tensor]]:
    """The batches of an epoch."""
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, SIZES[0], generator=generator).to(device),
            torch.randint(SIZES[-1], (size,), generator=generator).to(device),
        )
        for size in [BATCH] * STEPS + [LAST]
    ]


class Training:
    """A model, its optimizer, and a step."""

    def __init__(self, optimizer: str = "sgd"):
        torch.manual_seed(0)
        self.model = MLP(SIZES).to("cuda")
        self.optimizer = OPTIMIZERS[optimizer](self.model)

    def step(self, x: Tensor, labels: Tensor) -> Tensor:
        loss = cross_entropy(self.model(x), labels)
        loss.backward()
        clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


@pytest.fixture(params=["cuda"])
def gpu():
    """The GPU if there is one, else an emulated one, which must have seen no fault."""
    if torch.cuda.is_available():
        yield None
        return
    with emulate() as gpu, cuda_is_cpu(gpu):
        yield gpu
    assert gpu.faults == []


def run(training, step) -> list[Tensor]:
    """Train for `EPOCHS`, at a rate that falls after each step; the losses."""
    scheduler = LambdaLR(training.optimizer, lambda step: 1 - step / TOTAL)
    losses = []
    for _ in range(EPOCHS):
        for x, labels in batches():
            losses.append(step(x, labels))
            scheduler.step()
    return losses


@pytest.mark.parametrize(
    "optimizer",
    [pytest.param(one, marks=[pytest.mark.slow] * (one != "muon")) for one in OPTIMIZERS],
)
def test_a_graphed_step_trains_as_the_plain_one(gpu, optimizer):
    plain, ours = Training(optimizer), Training(optimizer)
    for group in plain.optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"], device="cuda")
        if "nesterov" in group and "ns_steps" not in group:  # SGD, also for Muon's biases
            group["fused"] = True
    expected = run(plain, plain.step)
    losses = run(ours, graphed(ours.step, ours.optimizer))
    assert torch.equal(torch.stack(losses), torch.stack(expected).detach())
    assert torch.equal(ours.weights(), plain.weights())
    # All but those that warm up and each epoch's last batch.
    assert count_replays(ours.optimizer) == EPOCHS * STEPS - WARMUP
    assert not any(loss.requires_grad for loss in losses)


@pytest.mark.slow
def test_settings_that_read_back_are_changed(gpu):
    """SGD would read its rate, and AdamW its count of steps."""
    sgd, adam = Training(), Training()
    sgd.optimizer = torch.optim.SGD(sgd.model.parameters(), LR, foreach=True)
    adam.optimizer = torch.optim.AdamW(adam.model.parameters(), LR)
    adam.step(*batches()[0])  # its state has a count, on the CPU
    for training in (sgd, adam):
        run(training, graphed(training.step, training.optimizer))
        assert count_replays(training.optimizer) == EPOCHS * STEPS - WARMUP
    assert sgd.optimizer.param_groups[0]["fused"]
    assert adam.optimizer.param_groups[0]["capturable"]
    assert isinstance(sgd.optimizer.param_groups[0]["lr"], float)


@pytest.mark.slow
def test_a_setting_that_changes_is_captured_again(gpu):
    """A graph holds the momentum of its capture; the arguments that are no tensors, too."""

    def train(graph: bool) -> tuple[Tensor, int]:
        training = Training()

        def step(x: Tensor, labels: Tensor, factor: float) -> Tensor:
            loss = factor * cross_entropy(training.model(x), labels)
            loss.backward()
            training.optimizer.step()
            training.optimizer.zero_grad()
            return loss

        taken = graphed(step, training.optimizer) if graph else step
        for momentum, factor in ((0.5, 1.0), (0.25, 1.0), (0.25, 0.5)):
            training.optimizer.param_groups[0]["momentum"] = momentum
            for batch in batches()[:STEPS]:
                taken(*batch, factor)
        return training.weights(), count_replays(training.optimizer)

    (expected, _), (found, replays) = train(False), train(True)
    assert torch.equal(found, expected)
    assert replays == 3 * (STEPS - WARMUP)


def test_a_rate_that_is_the_users_tensor_is_left_to_the_user(gpu):
    plain, ours = Training(), Training()
    rate = torch.tensor(LR, device="cuda")
    ours.optimizer.param_groups[0]["lr"] = rate
    step = graphed(ours.step, ours.optimizer)
    for number, batch in enumerate(batches()[:STEPS] * 2):
        value = LR / 2 ** (number % 3)
        plain.optimizer.param_groups[0]["lr"] = value
        rate.fill_(value)
        plain.step(*batch)
        step(*batch)
    assert torch.equal(ours.weights(), plain.weights())
    assert ours.optimizer.param_groups[0]["lr"] is rate


def test_inputs_and_outputs_may_be_nested(gpu):
    """The inputs may be on the host, too."""
    training = Training()

    def step(batch: dict[str, object], *, scale: float) -> dict[str, object]:
        loss = training.step(*batch["of"])  # type: ignore[misc]
        return {"loss": loss, "parts": (loss * scale, None), "scale": scale}

    plain = Training()
    taken = graphed(step, training.optimizer)
    pairs = zip(batches()[:STEPS], batches("cpu"), strict=False)
    for on_gpu, on_host in pairs:
        expected = plain.step(*on_gpu).detach()
        found = taken({"of": on_host}, scale=2.0)
        assert torch.equal(found["loss"], expected)
        assert torch.equal(found["parts"][0], 2 * expected)
        assert found["parts"][1] is None
        assert found["scale"] == 2.0
    assert count_replays(training.optimizer) == STEPS - WARMUP


def train(training: Training, step: Callable[..., object], count: int = STEPS) -> None:
    for batch in batches()[:count]:
        step(*batch)


@pytest.mark.parametrize("when", [pytest.param("before", marks=pytest.mark.slow), "after"])
def test_a_state_that_is_loaded_is_followed(gpu, when):
    """The groups and the state are other objects then."""
    weights = []
    for graph in (False, True):
        training = Training("adamw")
        step = graphed(training.step, training.optimizer) if graph else training.step
        if when == "after":
            train(training, step)
        training.optimizer.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))
        for rate in (LR / 16, LR / 32):
            training.optimizer.param_groups[0]["lr"] = rate
            train(training, step)
        weights.append(training.weights())
    assert torch.allclose(*weights, rtol=0, atol=1e-6)  # of rates that are rounded to float32
    assert count_replays(training.optimizer) > 0


@pytest.mark.slow
def test_the_last_batch_of_an_epoch_is_never_captured(gpu):
    training = Training()
    step = graphed(training.step, training.optimizer)
    for _ in range(3 * WARMUP):
        for batch in batches():
            step(*batch)
    assert count_replays(training.optimizer) == 3 * WARMUP * STEPS - WARMUP
    assert gpu is None or len(gpu.graphs) == 1


def test_gradients_and_running_statistics_are_those_of_the_last_call(gpu):
    """An eager call makes other gradients, and a capture computes none."""
    found = []
    for graph in (False, True):
        training = Training()
        training.model = torch.nn.Sequential(
            torch.nn.BatchNorm1d(12, device="cuda"), training.model
        )

        def step(x: Tensor, labels: Tensor, training: Training = training) -> None:
            training.optimizer.zero_grad()
            cross_entropy(training.model(x), labels).backward()
            training.optimizer.step()

        taken = graphed(step, training.optimizer) if graph else step
        sums = []
        for batch in batches() * 2:
            taken(*batch)
            sums += [p.grad.clone() for p in training.model[1].parameters()]
        found.append((sums, training.model[0].running_mean))
    assert all(map(torch.equal, found[0][0], found[1][0]))
    assert torch.equal(found[0][1], found[1][1])


class Loop:
    """A loop whose gradients are not those of its step alone; its weights and gradients."""

    def __init__(self, graph: bool, set_to_none: bool = True):
        self.training, self.set_to_none = Training(), set_to_none
        self.model, self.optimizer = self.training.model, self.training.optimizer
        self.critic = torch.nn.Linear(SIZES[-1], 1, device="cuda")
        self.average = AveragedModel(self.model)
        self.weight, self.number = torch.tensor(0.5), 0
        self.found: list[Tensor] = []
        self.graph = graph

    def zero(self) -> None:
        self.optimizer.zero_grad(self.set_to_none)

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(self.model(x), labels)

    def update(self, x: Tensor, labels: Tensor) -> Tensor:
        loss = self.loss(x, labels)
        loss.backward()
        self.optimizer.step()
        return loss

    def update_and_zero(self, x: Tensor, labels: Tensor) -> Tensor:
        loss = self.update(x, labels)
        self.zero()
        return loss

    def zero_and_update(self, x: Tensor, labels: Tensor) -> Tensor:
        before = [p.grad.square().sum() for p in self.model.parameters() if p.grad is not None]
        self.zero()
        self.update(x, labels)
        return torch.stack([torch.zeros((), device="cuda"), *before]).sum()

    def loss_of_critic(self, x: Tensor, labels: Tensor) -> Tensor:
        loss = self.critic(self.model(x)).mean()
        loss.backward()
        self.optimizer.step()
        self.zero()
        return loss

    def penalize(self, number: int) -> None:
        sum((p.square().sum() for p in self.model.parameters()), torch.zeros(())).backward()

    def zero_some(self, number: int) -> None:
        if number % 3 == 0:
            self.zero()

    def train_critic(self, number: int) -> None:
        """Leave other gradients where the step adds some, or none."""
        if number % 4 == 2:
            self.critic.zero_grad()
        elif number % 4:
            self.critic(torch.ones(2, SIZES[-1], device="cuda")).sum().backward()

    def replace(self, number: int) -> None:
        p = next(self.model.parameters())
        p.grad = torch.full_like(p, 0.25) if number % 4 else None

    def run(self, step: str, before: str = "", calls: int = 9) -> list[Tensor]:
        take = graphed(getattr(self, step), self.optimizer) if self.graph else getattr(self, step)
        for number in range(calls):
            if before:
                getattr(self, before)(number)
            self.found.append(take(*batches()[number % STEPS]).detach())
            both = (*self.model.parameters(), *self.critic.parameters())
            self.found += [p.grad.clone() for p in both if p.grad is not None]
        return [*self.found, self.training.weights()]


SLOW = ("added before, kept", "never zeroed", "replaced", "zeroed first", "random", "numpy")
GRADIENTS = {
    "added before": ("update_and_zero", "penalize", True),
    "added before, kept": ("update_and_zero", "penalize", False),
    "never zeroed": ("update", "", True),
    "zeroed at times": ("update", "zero_some", True),
    "zeroed first": ("zero_and_update", "", True),
    "another module's": ("loss_of_critic", "train_critic", True),
    "replaced": ("update", "replace", True),
}


# Loops of which the critic's part, or another tensor, is not the optimizer's.


def frozen(loop: Loop, x: Tensor, labels: Tensor) -> Tensor:
    loop.critic.requires_grad_(False)
    loss = loop.loss_of_critic(x, labels)
    loop.critic.requires_grad_(True)
    return loss


def clips_others(loop: Loop, x: Tensor, labels: Tensor) -> Tensor:
    """The critic's gradients are those of before the step, which scales them."""
    loss = loop.loss(x, labels)
    loss.backward()
    clip_grad_norm_([*loop.model.parameters(), *loop.critic.parameters()], 0.125)
    loop.optimizer.step()
    loop.zero()
    return loss


def teacher(loop: Loop, x: Tensor, labels: Tensor) -> Tensor:
    loss = loop.loss(x, labels) * loop.state.square().mean()
    loss.backward()
    loop.optimizer.step()
    loop.zero()
    return loss


def between(loop: Loop, step: object, number: int) -> None:
    """What the program does before a call."""
    if step is teacher and number == 6:  # once, as a teacher that is loaded
        loop.state = torch.full((3,), 0.5, device="cuda")
    if step is clips_others:
        loop.critic.zero_grad()
        loop.critic(torch.ones(2, SIZES[-1], device="cuda")).sum().backward()


@pytest.mark.parametrize(
    "step", [frozen, clips_others, pytest.param(teacher, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("is_frozen", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_tensors_beside_those_of_the_optimizer(gpu, step, is_frozen):
    """Also where the garbage collector does not list them."""
    found = []
    for graph in (False, True):
        loop = Loop(graph)
        loop.state = torch.full((3,), 2.0, device="cuda")
        loop.body = next(loop.model.parameters()).requires_grad_(step is not frozen)
        take = graphed(partial(step, loop), loop.optimizer) if graph else partial(step, loop)
        if is_frozen:
            gc.freeze()
        try:
            for number in range(12):
                between(loop, step, number)
                loop.found.append(take(*batches()[number % STEPS]).detach())
        finally:
            gc.unfreeze()
        both = (*loop.model.parameters(), *loop.critic.parameters())
        loop.found += [p.grad for p in both if p.grad is not None]
        found.append([*loop.found, loop.training.weights()])
    assert equal(*found)
    assert count_replays(loop.optimizer) > 0


def carries(loop: Loop, x: Tensor, labels: Tensor) -> None:
    """A state that is another tensor after each call."""
    loss = loop.loss(x, labels) + loop.state
    loss.backward()
    loop.optimizer.step()
    loop.zero()
    loop.state = loss.detach().clone()


@pytest.mark.parametrize("place", ["cuda", pytest.param("cpu", marks=pytest.mark.slow)])
def test_a_tensor_that_the_program_replaces_in_each_call_is_refused(gpu, place):
    loop = Loop(True)
    loop.state = torch.zeros((), device=place)

    def step(x: Tensor, labels: Tensor) -> None:
        loop.update_and_zero(x, labels)
        loop.weight = loop.weight * loop.state

    taken = graphed(partial(carries, loop) if place == "cuda" else step, loop.optimizer)
    said = r"replaces from call to call \(.*test_graphed\.py:\d+\)"

    def train_on() -> None:
        for number in range(20):
            if place == "cpu":
                loop.state = torch.tensor(1.0)
            taken(*batches()[number % STEPS])

    with pytest.raises(ConfigError, match=said):
        train_on()


def test_state_of_an_optimizer_is_made_in_an_eager_call(gpu):
    """A parameter whose first gradient comes after the warm-up, of a pass before the step."""
    weights = []
    for graph in (False, True):
        training = Training("adamw")
        late = torch.nn.Parameter(torch.ones(3, device="cuda"))
        training.optimizer.add_param_group({"params": [late]})
        for group in training.optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"], device="cuda")
        step = graphed(training.step, training.optimizer) if graph else training.step
        for number, batch in enumerate(batches()[:STEPS] * 2):
            if number >= STEPS:
                late.square().sum().backward()
            step(*batch)
        weights.append([training.weights(), late.detach()])
    assert equal(*weights)


def some_slow(cases: Iterable[str]) -> list[Any]:
    return [pytest.param(one, marks=[pytest.mark.slow] * (one in SLOW)) for one in cases]


OVERRIDES = hasattr(torch.autograd.graph, "set_override_stale_capture_stream")


@pytest.mark.skipif(not OVERRIDES, reason="PyTorch before 2.14 refuses it")
def test_a_result_of_the_model_from_before_the_step_may_be_kept(gpu):
    """Nodes of autograd stay on the default stream, which PyTorch refuses (pytorch#180090)."""
    weights = []
    for graph in (False, True):
        training, penalties = Training("adamw"), []
        step = graphed(training.step, training.optimizer) if graph else training.step
        for batch in batches()[:STEPS] * 2:
            penalties.append(sum(p.square().sum() for p in training.model.parameters()))
            penalties[-1].backward()
            step(*batch)
        weights.append([training.weights()])
    assert equal(*weights)
    assert not torch._C._override_stale_capture_stream()


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("case", some_slow(GRADIENTS))
def test_gradients_that_exist_when_the_step_begins(gpu, case):
    step, before, set_to_none = GRADIENTS[case]
    plain, ours = (Loop(graph, set_to_none).run(step, before) for graph in (False, True))
    assert equal(ours, plain)


@pytest.mark.parametrize(
    "case", ["added before", pytest.param("another module's", marks=pytest.mark.slow)]
)
def test_such_gradients_are_not_those_of_the_capture(case, monkeypatch):
    """Without the comparison the values are wrong."""
    step, before, set_to_none = GRADIENTS[case]
    with emulate() as gpu, cuda_is_cpu(gpu):
        plain = Loop(False, set_to_none).run(step, before)
        monkeypatch.setattr(LeafGradients, "fit", lambda self: True)
        monkeypatch.setattr(LeafGradients, "begin", lambda self: None)
        assert not equal(Loop(True, set_to_none).run(step, before), plain)


def test_a_sparse_gradient_is_refused(gpu):
    table = torch.nn.Embedding(4, 3, sparse=True).cuda()
    other = torch.nn.Linear(3, 1, device="cuda")
    optimizer = torch.optim.SGD(other.parameters(), LR)

    def step(x: Tensor) -> None:
        other(table(x)).sum().backward()
        optimizer.step()

    taken = graphed(step, optimizer)
    with pytest.raises(ConfigError, match=r"gradient of a parameter of shape \[4, 3\] is .*sparse"):
        [taken(torch.tensor([0, 2])) for _ in range(WARMUP + 1)]
    table.zero_grad()


def test_each_size_has_its_graph(gpu):
    """Sizes that take turns are captured once each."""
    plain, ours = Training(), Training()
    step = graphed(ours.step, ours.optimizer)
    for number in range(5 * 4):
        batch = batches()[0 if number % 4 < 2 else -1]
        assert torch.equal(step(*batch), plain.step(*batch).detach())
    assert torch.equal(ours.weights(), plain.weights())
    assert count_replays(ours.optimizer) == 5 * 4 - 2 * WARMUP
    assert gpu is None or len(gpu.graphs) == 2


@pytest.mark.slow
def test_few_graphs_are_kept(gpu, monkeypatch):
    """One that was freed is captured again, and a warning says what to do."""
    monkeypatch.setattr(graphed_module, "GRAPHS", 2)
    plain, ours = Training(), Training()

    def step(training: Training, x: Tensor, labels: Tensor, number: int) -> Tensor:
        return number * training.step(x, labels)

    taken = graphed(partial(step, ours), ours.optimizer, warmup=1)

    def compare() -> None:
        for number in (1, 1, 2, 2, 3, 3, 3, 4, 4, 1, 1, 1):
            found = taken(*batches()[0], number)
            assert torch.equal(found, step(plain, *batches()[0], number).detach())

    with pytest.warns(UserWarning, match="captured 4 times.*at most 2 of these graphs"):
        compare()
    assert torch.equal(ours.weights(), plain.weights())


@pytest.mark.slow
def test_a_state_of_sgd_that_is_loaded_is_captured(gpu):
    """The state dict of before the capture has other settings."""
    training, plain = Training(), Training()
    for one in (training, plain):
        one.optimizer = torch.optim.SGD(one.model.parameters(), LR)
    saved = copy.deepcopy(training.optimizer.state_dict())
    plain.optimizer.param_groups[0]["fused"] = True
    step = graphed(training.step, training.optimizer)
    for number, batch in enumerate(batches()[:STEPS] * 2):
        if number == STEPS:
            training.optimizer.load_state_dict(saved)
        step(*batch)
        plain.step(*batch)
    assert torch.equal(training.weights(), plain.weights())
    assert count_replays(training.optimizer) == 2 * STEPS - WARMUP


class Wrapper(torch.optim.Optimizer):
    """An optimizer that lets another one step with its groups."""

    def __init__(self, inner: torch.optim.Optimizer):
        super().__init__([torch.zeros((), device="cuda")], {})
        self.inner, self.param_groups = inner, inner.param_groups

    def step(self, closure=None):
        self.inner.step()


@pytest.mark.slow
def test_the_optimizer_of_a_wrapper_follows_its_rate(gpu):
    plain, ours = Training(), Training()
    ours.optimizer = Wrapper(ours.optimizer)
    step = graphed(ours.step, ours.optimizer)
    for number, batch in enumerate(batches()[:STEPS] * 2):
        for one in (plain, ours):
            one.optimizer.param_groups[0]["lr"] = LR / 2 ** (number % 3)
        step(*batch)
        plain.step(*batch)
    assert torch.equal(ours.weights(), plain.weights())
    # The settings of the other optimizer change after the first call, which finds it.
    assert count_replays(ours.optimizer) == 2 * STEPS - WARMUP - 1


def test_a_tensor_of_the_host_that_changes_is_captured_again(gpu):
    def weighted(self: Loop, x: Tensor, labels: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss(x, labels) * self.weight
        loss.backward()
        self.optimizer.step()
        return loss

    losses = []
    for graph in (False, True):
        loop = Loop(graph)
        take = (
            graphed(partial(weighted, loop), loop.optimizer) if graph else partial(weighted, loop)
        )
        for weight in (0.5, 0.25, 0.5):
            loop.weight.fill_(weight)
            loop.found += [take(*batch).detach() for batch in batches()[:STEPS]]
        losses.append(torch.stack(loop.found))
    assert torch.equal(*losses)
    # The first weight has its graph when it returns.
    assert count_replays(loop.optimizer) == 3 * STEPS - 2 * WARMUP


class CountsOnHost(torch.optim.SGD):
    """Steps with a rate that falls with a number of Python."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["n"] = state.get("n", 0) + 1
                p.data.sub_(p.grad * group["lr"] / state["n"])


def moves_rate(training: Training, x: Tensor, labels: Tensor) -> None:
    training.step(x, labels)
    training.optimizer.param_groups[0]["lr"] *= 0.5


def forgets_step(training: Training, x: Tensor, labels: Tensor) -> None:
    cross_entropy(training.model(x), labels).backward()


def counts(training: Training, x: Tensor, labels: Tensor) -> None:
    training.optimizer = training.counting
    training.step(x, labels)


def counter(loop: Loop, x: Tensor, labels: Tensor) -> None:
    """Accumulate, and update in each second call."""
    loop.number += 1
    loop.loss(x, labels).backward()
    if loop.number % 2 == 0:
        loop.optimizer.step()
        loop.zero()


def calls_another(loop: Loop, x: Tensor, labels: Tensor) -> None:
    loop.critics = torch.optim.SGD(loop.critic.parameters(), LR)
    loop.loss_of_critic(x, labels)
    loop.critics.step()


def averages(loop: Loop, x: Tensor, labels: Tensor) -> None:
    loop.update_and_zero(x, labels)
    loop.average.update_parameters(loop.model)


def draws(loop: Loop, x: Tensor, labels: Tensor, *, draw: Callable[[], float]) -> None:
    (loop.loss(x, labels) * draw()).backward()
    loop.optimizer.step()
    loop.zero()


@pytest.mark.parametrize(
    "step, said",
    [
        (moves_rate, "call the scheduler after the step"),
        (forgets_step, r"does not call optimizer\.step\(\)"),
        (counts, "counts its n on the host"),
        (lambda training, *batch: object(), "takes or returns a object"),
    ],
)
def test_steps_that_a_graph_would_get_wrong_are_refused(gpu, step, said):
    training = Training()
    training.counting = CountsOnHost(training.model.parameters(), LR)
    optimizers = [training.counting if step is counts else training.optimizer]
    taken = graphed(partial(step, training), optimizers)
    with pytest.raises(ConfigError, match=said):
        train(training, taken)


HOST = "the step draws random numbers on the host"
REFUSED = {
    "counter": (counter, r"called SGD\.step, and an earlier call .* no optimizer; a replay"),
    "another optimizer": (calls_another, r"calls SGD\.step, and graphed was not given that"),
    "averages": (averages, r"changes a tensor of the host \(int64 \[\], .*test_graphed\.py:\d+\)"),
    "torch": (partial(draws, draw=lambda: torch.rand(())), rf"{HOST} \(.*test_graphed\.py:\d+\)"),
    "random": (partial(draws, draw=random.random), rf"{HOST} \(by random or numpy"),
    "numpy": (partial(draws, draw=lambda: np.random.rand()), rf"{HOST} \(by random or numpy"),  # noqa: NPY002
}


@pytest.mark.parametrize("case", some_slow(REFUSED))
def test_steps_that_depend_on_the_host_are_refused(gpu, case):
    loop, (step, said) = Loop(True), REFUSED[case]
    taken = graphed(partial(step, loop), loop.optimizer)
    with pytest.raises(ConfigError, match=said) as refused:
        train(loop.training, taken)
    assert "\n" not in str(refused.value)


def test_a_step_may_ask_for_the_gradient_of_its_copy_of_an_input(gpu):
    training = Training()

    def step(x: Tensor, labels: Tensor) -> Tensor:
        training.step(x.requires_grad_(), labels)
        return x.grad

    taken = graphed(step, training.optimizer)
    for x, labels in batches()[:STEPS]:
        assert taken(x, labels).shape == x.shape
        assert not x.requires_grad
    assert count_replays(training.optimizer) == STEPS - WARMUP
    with pytest.raises(ConfigError, match="an input of the step requires a gradient"):
        taken(x.requires_grad_(), labels)


def test_a_momentum_that_changes_in_each_step_is_warned_of(gpu):
    training = Training()
    step = graphed(training.step, training.optimizer)

    def cycle() -> None:
        for number in range(41):
            training.optimizer.param_groups[0]["momentum"] = number / 64
            step(*batches()[0])

    with pytest.warns(UserWarning, match="momentum under OneCycleLR"):
        cycle()
    assert count_replays(training.optimizer) == 0


def test_dropout_draws_anew_in_each_replay(gpu):
    training = Training()

    def step(x: Tensor) -> Tensor:
        training.optimizer.step()
        return torch.nn.functional.dropout(x, 0.5)

    taken = graphed(step, training.optimizer)
    drawn = [taken(torch.ones(64)) for _ in range(WARMUP + 3)]
    assert not any(torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_a_step_that_reads_back_is_refused_in_one_line():
    """The emulator counts it as a fault, too."""
    with emulate() as gpu, cuda_is_cpu(gpu):
        training = Training()

        def step(x: Tensor, labels: Tensor) -> float:
            return training.step(x, labels).item()

        taken = graphed(step, training.optimizer)
        with pytest.raises(ConfigError, match=r"cannot be captured.*docs/graphs\.md") as refused:
            [taken(*batch) for batch in batches()]
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_a_run_with_a_graph_is_saved_in_any_step(gpu, tmp_path):
    """A step whose gradients stay is a step all the same, and is not waited for."""

    def train(folder: Path, stop_after: int = 0) -> Run:
        training = Training()
        generator = torch.Generator().manual_seed(1)
        features = torch.randn(2 * BATCH * STEPS, SIZES[0], generator=generator)
        labels = torch.randint(SIZES[-1], (len(features),), generator=generator)
        samples = Samples(features, labels, tuple("abcd")).to("cuda")

        def step(x: Tensor, labels: Tensor, global_size: int) -> Tensor:
            training.optimizer.zero_grad()
            loss = cross_entropy(training.model(x), labels, reduction="sum")
            (loss / global_size).backward()
            training.optimizer.step()
            return loss

        taken = graphed(step, training.optimizer)
        task = Classification(samples, samples[:BATCH], BATCH)
        number, checkpoint = 0, CheckpointConfig(folder, every=100)
        with (
            join_world("cuda") as world,
            Run(
                *(training.model, training.optimizer, None, world, task),
                epochs=1,
                checkpoint=checkpoint,
            ) as run,
        ):
            run.resume()
            for epoch in run.epochs():
                for batch in run.batches(epoch):
                    loss = taken(*batch)
                    number += 1
                    if number == stop_after:
                        signal.raise_signal(signal.SIGTERM)
                    run.end_step(loss_sum=loss)
                run.end_epoch()
        return run

    whole = train(tmp_path / "whole")
    assert count_replays(whole.state.optimizer) == 2 * STEPS - WARMUP
    with pytest.raises(Stopped):
        train(tmp_path / "stopped", stop_after=STEPS)
    # The ranks agree to stop in the next step.
    assert (tmp_path / "stopped" / "latest").read_text() == f"step-{STEPS + 1}\n"
    resumed = train(tmp_path / "stopped")
    pairs = zip(whole.state.model.parameters(), resumed.state.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_on_a_cpu_it_is_the_step_itself():
    model = torch.nn.Linear(3, 2)
    step = model.forward
    assert graphed(step, torch.optim.SGD(model.parameters(), LR)) is step


def test_an_input_without_strides_is_refused(gpu):
    training = Training()
    taken = graphed(training.step, training.optimizer)
    x, labels = batches()[0]
    with pytest.raises(ConfigError, match=r"an input of the step is torch\.sparse_coo"):
        taken(x.to_sparse(), labels)


def test_an_optimizer_that_no_call_steps_is_refused(gpu):
    """As one that is due in the fifth call."""
    loop = Loop(True)
    other = torch.optim.SGD(loop.critic.parameters(), LR)
    taken = graphed(loop.update_and_zero, [loop.optimizer, other])
    with pytest.raises(ConfigError, match=r"no call of the step has called SGD\.step so far"):
        train(loop.training, taken)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"optimizer": None}, "optimizer is None, expected"),
        ({"optimizer": []}, r"optimizer is \[\], expected"),
        ({"optimizer": StepLR(torch.optim.SGD(torch.nn.Linear(2, 2).parameters()), 1)}, "a StepLR"),
        ({"optimizer": torch.nn.Linear(2, 2).parameters()}, "a generator, expected the optimizer"),
        ({"optimizer": [torch.zeros(2)]}, "a list with a Tensor, expected the optimizer"),
        ({"optimizer": torch.optim.SGD([{"params": []}])}, "the optimizer has no parameters"),
        ({"warmup": 0}, "warmup is 0, expected a whole number from 1 on"),
        ({"warmup": 2.0}, r"warmup is 2\.0, expected"),
    ],
)
def test_wrong_arguments_are_named(change, named):
    optimizer = torch.optim.SGD(torch.nn.Linear(3, 2).parameters(), LR)
    with pytest.raises(ConfigError, match=named):
        graphed(lambda: None, **{"optimizer": optimizer, **change})


@pytest.mark.slow
def test_ways_to_launch_a_step_on_a_gpu_are_compared(capsys):
    from benchmarks import train

    with emulate() as gpu, cuda_is_cpu(gpu):
        assert train.main(["--device", "cuda", "--quick"]) == 0  # each loss is right
    assert gpu.faults == []
    printed = capsys.readouterr().out
    assert all(way in printed for way in (train.PLAIN, train.CALLABLES, train.GRAPH))
