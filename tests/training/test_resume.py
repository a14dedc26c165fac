# SPDX-License-Identifier: MIT
"""Resumed runs: optimizers of all kinds and dtypes, and what a loop keeps beside its run."""

import collections
import contextlib
import copy
import json
import os
import random
import signal
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from resumed import FEATURES, OPTIMIZERS, SCHEDULES, Counting, Net, TwoModes, first_difference
from saved import tensors
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from torchpar.data import Samples
from torchpar.errors import ConfigError
from torchpar.parallel import GradScaler, join_world, parallel_mlp
from torchpar.parallel.save.checkpoint import MANIFEST, write_manifest
from torchpar.training import CheckpointConfig, Classification, Run, Stopped, state
from torchpar.training.optimizer_state import evaluation_weights


def samples(n: int, seed: int) -> Samples:
    x = torch.randn(n, FEATURES, generator=torch.Generator().manual_seed(seed))
    return Samples(x, x[:, :3].argmax(1), classes=("a", "b", "c"))


def make_run(
    model: nn.Module, optimizer: Any, world: Any, folder: Path | None, **options: Any
) -> Run:
    own = {name: options.pop(name) for name in ("predict",) if name in options}
    task = Classification(samples(20, 1), samples(9, 2), 8, **own)
    options = {"epochs": 2, "checkpoint": folder and CheckpointConfig(folder, keep=9)} | options
    scheduler = options.pop("scheduler", None)
    return Run(model, optimizer, scheduler, world, task, **options)


def take_steps(
    run: Run, last: int | None = None, before: Any = None, after: Any = None
) -> list[float]:
    """Train to the end, or to the end of an epoch; return the test losses of all epochs.

    Args:
        before: called with the inputs of each step, which it returns changed.
        after: called after each step of the optimizer.
    """
    model, optimizer = run.state.model, run.state.optimizer
    with run:
        run.resume()
        for epoch in run.epochs():
            for x, labels, size in run.batches(epoch):
                y = model(before(x) if before else x)
                loss = cross_entropy(y, labels, reduction="sum")
                (loss * run.world.dp_size / size).backward()
                for p in model.parameters() if run.world.dp_size > 1 else ():
                    torch.distributed.all_reduce(p.grad, group=run.world.mesh.get_group("dp"))
                    p.grad /= run.world.dp_size
                optimizer.step()
                optimizer.zero_grad()
                if after:
                    after(model)
                run.end_step(loss_sum=loss.detach())
            run.end_epoch()
            if epoch == last:
                break
    return [result.test_loss for result in run.results]


def test_every_optimizer_resumes_in_every_dtype(world):
    """State in the dtype that the optimizer chose, also of a parameter without dimensions."""

    def step(model: Net, optimizer: Any) -> None:
        x, labels = samples(5, 1).features, samples(5, 1).labels

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(model(x), labels)
            loss.backward()
            return loss.detach()

        optimizer.step(closure)

    wrong = []
    for name, make in OPTIMIZERS.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            torch.manual_seed(0)
            model = Net("Sparse" in name, dropout=False).to(dtype)
            again = Net("Sparse" in name, dropout=False).to(dtype)
            optimizer, optimizer_again = make(model), make(again)
            saved: Any = InMemory()
            step(model, optimizer)
            step(model, optimizer)
            state.save(make_run(model, optimizer, world, None).state, saved, 2)
            state.resume(make_run(again, optimizer_again, world, None).state, saved)
            for one in ((model, optimizer), (again, optimizer_again)):
                step(*one)
            found = [
                {
                    "weights": dict(m.state_dict()),
                    "state": [dict(o.state[p]) for p in m.parameters() if p in o.state],
                }
                for m, o in ((model, optimizer), (again, optimizer_again))
            ]
            if difference := first_difference(*found):
                wrong.append(f"{name} in {dtype}{difference}")
    assert not wrong, "\n".join(wrong)
    assert first_difference([torch.ones(1)], [torch.ones(1, dtype=torch.float64)])
    assert first_difference([torch.zeros(1)], [-torch.zeros(1)])


def test_every_schedule_resumes(world):
    wrong = []
    for name, make in SCHEDULES.items():
        if make is None:
            continue
        parts: list[Any] = []
        for _ in range(2):
            model = nn.Linear(FEATURES, 3)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            parts.append((model, optimizer, make(optimizer, 6)))

        def rates(optimizer: Any, schedule: Any, steps: int) -> list[float]:
            found = []
            for _ in range(steps):
                optimizer.step()
                schedule.step()
                found.append(optimizer.param_groups[0]["lr"])
            return found

        (model, optimizer, schedule), (again, optimizer_again, schedule_again) = parts
        saved: Any = InMemory()
        rates(optimizer, schedule, 3)
        of = partial(make_run, world=world, folder=None)
        state.save(of(model, optimizer, scheduler=schedule).state, saved, 3)
        state.resume(of(again, optimizer_again, scheduler=schedule_again).state, saved)
        whole, resumed = rates(optimizer, schedule, 3), rates(optimizer_again, schedule_again, 3)
        if whole != resumed:
            wrong.append(f"{name}: {whole} and {resumed}")
    assert not wrong, "\n".join(wrong)


def trained_with_average(
    folder: Path, last: int | None = None, name: str | None = "average", judged: str = "average"
) -> Any:
    """Train with an average of the weights, with which the model is judged."""
    torch.manual_seed(0)
    with join_world("cpu") as world:
        world = world.with_mesh(tp=world.world_size) if "split" in judged else world
        if "split" in judged:
            from torchpar.nn import MLP

            model: nn.Module = parallel_mlp(MLP([FEATURES, 8, 3]), world.mesh["tp"])
        else:
            model = nn.Sequential(nn.Linear(FEATURES, 8), nn.Dropout(0.5), nn.Linear(8, 3))
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        predict: Any = {"function": lambda x: average(x)}.get(judged, average)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run = make_run(
            model,
            optimizer,
            world,
            folder,
            predict=predict,
            stateful={name: average} if name else None,
        )
        losses = take_steps(run, last, after=average.update_parameters)
        return losses, [t.detach().clone() for t in average.state_dict().values()]


@pytest.mark.parametrize("judged", ["average", "function"])
def test_an_average_resumes_and_is_judged_in_evaluation_mode(tmp_path, judged):
    train = partial(trained_with_average, judged=judged)
    whole = train(tmp_path / "whole")
    train(tmp_path / "parts", 1)
    assert not first_difference(whole, train(tmp_path / "parts"))
    with pytest.raises(ConfigError, match=r"lose the average of the weights: (predict|average),"):
        train(tmp_path / "refused", name=None)
    with pytest.raises(
        ConfigError, match=r"holds the state of average, of type AveragedModel, which this run wo"
    ):
        train(tmp_path / "parts", name=None)
    with pytest.raises(ConfigError, match="does not hold the state of ema, which this run was giv"):
        train(tmp_path / "parts", name="ema")


@pytest.mark.parametrize("judged", ["average", "average of a split model"])
def test_an_average_on_two_ranks(ranks, tmp_path, judged):
    """Of a split model each rank has a shard, although copies have no marks."""
    train = partial(trained_with_average, judged=judged)
    whole = ranks(2, train, tmp_path / "whole")
    ranks(2, train, tmp_path / "parts", 1)
    resumed = ranks(2, train, tmp_path / "parts")
    assert not first_difference([losses for losses, _ in whole], [x for x, _ in resumed])
    if "split" in judged:
        assert not first_difference(whole, resumed)
        saved = tensors(tmp_path / "parts" / "step-6")
        assert saved["stateful.average.module.layers.0.weight"].shape == (8, FEATURES)


class ScheduleOfItsOwn:
    """A loop's own object with a state dict."""

    def __init__(self, rank: int = 0):
        self.rank, self.drawn = rank, [(1, None)]

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn, "array": np.arange(3) + self.rank}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert (state_dict["array"] == np.arange(3) + self.rank).all()
        self.drawn = state_dict["drawn"]


def trained_with_objects(folder: Path, last: int | None, differ: bool) -> Any:
    """Train with a scaler, generators and an object whose states are those of each rank."""
    with join_world("cpu") as world:
        torch.manual_seed(0)
        rank = world.rank if differ else 0
        model = nn.Linear(FEATURES, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = GradScaler(world, init_scale=8.0, growth_interval=1)
        own, numpy = torch.Generator().manual_seed(rank), np.random.default_rng(3)
        python, mine = random.Random(rank), ScheduleOfItsOwn(rank)
        stateful = {"scaler": scaler, "own": own, "of_numpy": numpy, "python": python, "mine": mine}
        run = make_run(model, optimizer, world, folder, stateful=stateful)

        def before(x: Tensor) -> Tensor:
            mine.drawn.append((len(mine.drawn), python.random()))
            return x + numpy.random() + torch.rand((), generator=own)

        def after(_: nn.Module) -> None:
            scaler.scale(torch.ones(()))
            scaler.unscale_(optimizer)
            scaler.update()

        losses = take_steps(run, last, before, after)
        return losses, mine.drawn, scaler.state_dict(), model.weight.detach().clone()


def test_scalers_generators_and_other_objects_resume(tmp_path, ranks):
    train = partial(trained_with_objects, differ=True)
    whole = ranks(2, train, tmp_path / "whole", None)
    ranks(2, train, tmp_path / "parts", 1)
    assert not first_difference(whole, ranks(2, train, tmp_path / "parts", None))
    assert whole[0][1] != whole[1][1]  # each rank has its own
    ranks(2, train, tmp_path / "more", 1)
    with pytest.raises(ConfigError, match=r"of each of its 2 ranks, and this run has 1; start 2"):
        ranks(1, train, tmp_path / "more", None)
    same = partial(trained_with_objects, differ=False)
    ranks(2, same, tmp_path / "same", 1)
    assert len(ranks(1, same, tmp_path / "same", None)[0][1]) == 7


def test_the_process_s_generators_resume_unasked(world, tmp_path, capsys):
    def train(folder: Path, last: int | None = None) -> tuple[Tensor, list[float]]:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002  # a program's global generator
        model = nn.Linear(FEATURES, 3)
        run = make_run(model, torch.optim.SGD(model.parameters(), lr=0.1), world, folder)

        def noise(x: Tensor) -> Tensor:
            return x + random.random() + np.random.rand() + np.random.randn()  # noqa: NPY002

        take_steps(run, last, noise)
        return model.weight.detach(), [random.random(), np.random.randn()]  # noqa: NPY002

    whole = train(tmp_path / "whole")
    train(tmp_path / "parts", 1)
    assert not first_difference(whole, train(tmp_path / "parts"))
    # A checkpoint of an earlier version has PyTorch's alone.
    train(tmp_path / "old", 1)
    without(tmp_path / "old" / "step-3", "random.numpy", "random.python", "stateful", "device")
    assert not capsys.readouterr().err
    assert first_difference(whole, train(tmp_path / "old"))
    assert "of an earlier version, which saved no random numbers of Pyth" in capsys.readouterr().err


def without(checkpoint: Path, *names: str) -> None:
    """Take what an earlier version did not save out of a manifest."""
    contents = json.loads((checkpoint / MANIFEST).read_text())
    for name in names:
        contents["state"].pop(name, None)
        contents["shapes"].pop(name, None)
    del contents["sha256"]
    write_manifest(checkpoint, list(contents.pop("files")), contents)


class InMemory:
    """A checkpoint that is copied to memory, and read as PyTorch reads files: with a cast."""

    folder, shapes, state = Path("memory"), {}, {}

    def save(self, _: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        self.tensors = {name: t.detach().clone() for name, t in tensors.items()}
        self.shapes = {name: t.shape for name, t in tensors.items()}
        self.state = json.loads(json.dumps(facts, default=Tensor.tolist))

    def load(self) -> "InMemory":
        return self

    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: t.dtype for name, t in self.tensors.items()}

    def read(self, tensors: dict[str, Tensor]) -> None:
        for name, t in tensors.items():
            t.copy_(self.tensors[name])


class Holder:
    """A program's trainer."""

    def __init__(self, **parts: Any):
        self.parts, self.epoch = [parts], 0


def teacher() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 3).requires_grad_(False))


def follows(copy: nn.Module) -> Callable[[], None]:
    def update() -> None:
        for p in copy.parameters():
            p.data.mul_(0.5)

    return update


def changing(_: nn.Module) -> dict[str, Any]:
    copy = teacher()
    return {"teacher": copy, "update": follows(copy)}


def within(_: nn.Module) -> dict[str, Any]:
    copy = teacher()
    return {"holder": Holder(teacher=copy), "update": partial(follows(copy))}


def adversary(_: nn.Module) -> dict[str, Any]:
    other = nn.Linear(2, 1)
    second = torch.optim.SGD(other.parameters(), lr=0.1)

    def update() -> None:
        other(torch.ones(1, 2)).sum().backward()
        second.step()

    return {"update": update}


def scaled(enabled: bool, _: nn.Module) -> dict[str, Any]:
    scaler = torch.amp.GradScaler("cpu", enabled=enabled)

    def update() -> None:
        scaler.scale(torch.ones(()))
        if enabled:
            scaler.update(2.0)

    return {"update": update, "scaler": scaler}


def earlier(model: nn.Module) -> dict[str, Any]:
    average = AveragedModel(model)
    average.update_parameters(model)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    return {"average": average, "scaler": scaler}


Kept = Callable[[nn.Module], dict[str, Any]]
# What a loop keeps, and what is said of it; "" if nothing is.
REFUSALS: dict[str, tuple[Kept, str]] = {
    "an average that is not updated yet": (
        lambda model: {"average": AveragedModel(model)},
        "the average of the weights: kept['average'], of type AveragedModel",
    ),
    "an average within a module": (
        lambda model: {"judge": nn.Sequential(AveragedModel(model), nn.Softmax(-1))},
        "the average of the weights",
    ),
    "a teacher that changes": (changing, "the values of a module, which the loop changes: "),
    "a teacher within an object": (within, "the values of a module, which the loop changes: "),
    "a second model and its optimizer": (adversary, "the "),
    "a scaler": (partial(scaled, True), "the scale of the gradients: "),
    "a scaler that is off": (partial(scaled, False), ""),
    "a teacher that stays": (lambda _: {"teacher": teacher()}, ""),
    "what is left of an earlier run": (earlier, ""),
    "a scaler that is not used": (lambda _: {"scaler": torch.amp.GradScaler("cpu")}, ""),
    "a wrapper of the model": (lambda model: {"wrapper": nn.Sequential(model)}, ""),
}


def test_what_a_resumed_run_would_lose_is_refused_at_the_first_save(world, tmp_path):
    wrong = []
    for name, (make, said) in REFUSALS.items():
        model = nn.Linear(FEATURES, 3)
        kept = make(model)
        update = kept.get("update") or (lambda: None)
        run = make_run(model, torch.optim.SGD(model.parameters(), lr=0.1), world, tmp_path / name)
        error = ""
        try:
            take_steps(run, after=lambda _, update=update, kept=kept: update())
        except ConfigError as e:
            error = str(e)
        if (not said and error) or (said and f"a resumed run would lose {said}" not in error):
            wrong.append(f"{name}: {error!r}")
        if said and [*(tmp_path / name).glob("step-*")]:
            wrong.append(f"{name}: was saved")
    assert not wrong, "\n".join(wrong)


def test_a_schedule_that_was_not_given_is_refused(world, tmp_path):
    model = nn.Linear(FEATURES, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    run = make_run(model, optimizer, world, tmp_path)
    with pytest.raises(ConfigError, match="would lose the state of a learning-rate scheduler: sch"):
        take_steps(run, after=lambda _: schedule.step())


def test_objects_that_cannot_be_saved_are_refused(world, tmp_path):
    model = nn.Linear(FEATURES, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    class Holds:
        def state_dict(self) -> object:
            return {"function": test_every_schedule_resumes, "sparse": torch.eye(2).to_sparse()}

        def load_state_dict(self, _: object) -> None: ...

    class HoldsObject(Holds):
        def state_dict(self) -> object:
            return [Path("a")]

    for given, message in (
        ([model], "stateful is of type list, expected objects by name"),
        ({"a b": model}, "has the name 'a b', expected a name as of Python"),
        ({"a": 3}, r"stateful\['a'\] is of type int, expected a module, a generator, or an object"),
        ({"a": Holds()}, "^a holds a tensor that is torch.sparse_coo, which would not be loaded"),
        (
            {"a": HoldsObject()},
            r"^a holds what would not be loaded \(of type pathlib.*expected",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            make_run(model, optimizer, world, tmp_path, stateful=given)


def test_a_run_goes_on_with_and_without_torch_compile(world, tmp_path):
    """Names in a checkpoint are those of the model's own parameters."""

    def train(compiles: bool, last: int | None) -> list[float]:
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Linear(FEATURES, 4), nn.ReLU(), nn.Linear(4, 3))
        model[0] = torch.compile(model[0], backend="eager") if compiles else model[0]
        model = torch.compile(model, backend="eager") if compiles else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        return take_steps(make_run(model, optimizer, world, tmp_path, epochs=4), last)

    for last, compiles in enumerate((False, True, False, True), 1):
        losses = train(compiles, last)
    assert len(losses) == 4
    assert {"model.0.bias", "model.0.weight"} <= tensors(tmp_path / "step-12").keys()


def test_weights_of_another_dtype_are_refused(world, tmp_path):
    def train(dtype: torch.dtype) -> None:
        model = nn.Sequential(nn.Linear(FEATURES, 3)).to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        take_steps(make_run(model, optimizer, world, tmp_path), 1, lambda x: x.to(dtype))

    train(torch.float32)
    with pytest.raises(
        ConfigError, match=r"holds 0.weight in float32, this run has it in float64; train in flo"
    ):
        train(torch.float64)


def test_an_optimizer_of_two_modes_is_judged_and_saved_in_its_evaluation_mode(world, tmp_path):
    def train(last: int | None, folder: str) -> tuple[list[float], Any]:
        torch.manual_seed(0)
        model = nn.Linear(FEATURES, 3)
        optimizer = TwoModes(model.parameters())
        modes = []
        model.register_forward_pre_hook(
            lambda m, _: modes.append((m.training, optimizer.param_groups[0]["train_mode"]))
        )
        run = make_run(model, optimizer, world, tmp_path / folder)
        losses = take_steps(run, last)
        assert set(modes) == {(True, True), (False, False)}
        trained = model.weight.detach().clone()
        optimizer.eval()
        judged = model.weight.detach().clone()
        assert run.evaluate().loss == losses[-1]  # in the mode in which it is already
        assert torch.equal(model.weight, judged)
        return losses, (trained, judged)

    whole = train(None, "whole")
    train(1, "parts")
    assert not first_difference(whole, train(None, "parts"))
    saved = tensors(tmp_path / "parts" / "step-6")
    trained, judged = whole[1]
    assert not torch.equal(trained, judged)
    assert torch.equal(saved["model.weight"], judged)
    assert torch.equal(saved["trained.weight"], trained)


def test_state_in_other_kinds_than_tensors_of_a_split_layer(world, tmp_path):
    """Numbers resume; a list of shards would be one rank's."""
    from torchpar.nn import MLP

    model = parallel_mlp(MLP([FEATURES, 4, 3]), world.mesh["tp"])
    optimizer = Counting(model.parameters(), lr=0.1)
    run = make_run(model, optimizer, world, tmp_path)
    with pytest.raises(ConfigError, match=r"history of layers.0.weight is a list, expected a tens"):
        take_steps(run)


class Attribute(torch.optim.SGD):
    """Two modes, of which an attribute holds the present one, as wrappers of optimizers have."""

    train_mode = False

    def step(self, closure: Any = None) -> Any:
        assert self.train_mode
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            self.state[p].setdefault("mean", p.detach().clone()).lerp_(p.detach(), 0.3)

    @torch.no_grad()
    def _switch(self, trains: bool, weight: float) -> None:
        for p in self.param_groups[0]["params"] if self.train_mode != trains else ():
            if "mean" in self.state[p]:
                p.lerp_(self.state[p]["mean"], weight)
        self.train_mode = trains

    def eval(self) -> None:
        self._switch(False, 0.9)

    def train(self) -> None:
        self._switch(True, 1 - 1 / 0.1)


@pytest.mark.parametrize("kind", [Attribute, TwoModes])
@pytest.mark.parametrize("early", [False, True])
def test_the_mode_of_an_optimizer_is_found_however_it_is_kept(world, tmp_path, kind, early):
    """A loop may call ``eval()`` itself, before an epoch ends."""

    def train(folder: str, last: int | None) -> list[float]:
        torch.manual_seed(0)
        model = nn.Linear(FEATURES, 3)
        optimizer = kind(model.parameters(), lr=0.1)
        run = make_run(model, optimizer, world, tmp_path / folder, epochs=3)

        def after(_: nn.Module) -> None:
            if early and run.state.step == 2:
                optimizer.eval()

        return take_steps(run, last, after=after)

    whole = train("whole", None)
    train("parts", 1)
    assert train("parts", None) == whole
    assert len({*whole}) == 3


def test_weights_return_from_an_evaluation_that_fails_to_begin():
    class Fails(TwoModes):
        def eval(self) -> None:
            super().eval()
            raise RuntimeError("no evaluation")

    p = nn.Parameter(torch.ones(3))
    optimizer = Fails([p])
    p.grad = torch.ones(3)
    optimizer.step()
    before = p.detach().clone()
    optimizer.state[p]["mean"].fill_(7.0)
    with pytest.raises(RuntimeError, match="no evaluation"), evaluation_weights(optimizer):
        pytest.fail("the block runs")
    assert torch.equal(p, before)
    assert optimizer.param_groups[0]["train_mode"]


class Late(torch.optim.SGD):
    """Settings that the first step makes, state under a number, and a tuple."""

    def step(self, closure: Any = None) -> Any:
        group = self.param_groups[0]
        group.setdefault("scale", torch.ones(2, dtype=torch.float64)).mul_(0.9)
        group["pair"] = (1, 2.0)
        group["dtype"] = torch.float32
        for p in group["params"]:
            state = self.state[p]
            state[0] = state.get(0, torch.zeros(p.shape)) * 0.9 + p.grad
            p.grad = state[0] * group["scale"][0].float()
        return super().step(closure)


def test_settings_that_a_step_makes_come_back_as_they_were(world, tmp_path):
    def train(folder: str, last: int | None) -> Any:
        torch.manual_seed(0)
        model = nn.Linear(FEATURES, 3)
        optimizer = Late(model.parameters(), lr=0.1)
        losses = take_steps(make_run(model, optimizer, world, tmp_path / folder), last)
        group = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
        return losses, group, optimizer.state[model.weight]

    whole = train("whole", None)
    train("parts", 1)
    assert not first_difference(whole, train("parts", None))


def test_an_optimizer_whose_state_dict_has_more_is_refused(world, tmp_path):
    class Total(torch.optim.SGD):
        def state_dict(self) -> dict[str, Any]:
            return {**super().state_dict(), "total_step": 3}

    model = nn.Linear(FEATURES, 3)
    with pytest.raises(ConfigError, match="the state dict of Total has total_step, which would n"):
        make_run(model, Total(model.parameters(), lr=0.1), world, tmp_path)


class WideMomentum(torch.optim.SGD):
    """A momentum in float32, whatever the dtype of the weights."""

    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            momentum = self.state[p].setdefault("wide", torch.zeros(p.shape))
            p.grad = momentum.mul_(0.9).add_(p.grad.float()).to(p.dtype)
        return super().step(closure)


class CountsInPython(nn.Module):
    """An average whose number of updates is an attribute, which its state dict has."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.copy, self.updates = copy.deepcopy(model), 0

    def forward(self, x: Tensor) -> Tensor:
        return self.copy(x)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        for mean, p in zip(self.copy.parameters(), model.parameters(), strict=True):
            mean.lerp_(p, 1 / self.updates)

    def state_dict(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        return {"copy": self.copy.state_dict(), "updates": self.updates}

    def load_state_dict(self, state_dict: Any, *arguments: Any, **options: Any) -> Any:
        self.updates = state_dict["updates"]
        return self.copy.load_state_dict(state_dict["copy"])


def test_modules_and_optimizers_of_the_loop_come_back_by_their_own_methods(world, tmp_path):
    """A second optimizer keeps float32 state of bfloat16 weights, which PyTorch's loading casts. A
    generator goes on where the body of a resumed epoch has drawn from it again."""

    def train(folder: str, stop: int | None) -> Any:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(FEATURES, 3))
        mean, own = CountsInPython(model), torch.Generator().manual_seed(0)
        other = nn.Linear(2, 1).bfloat16()
        second = WideMomentum(other.parameters(), lr=0.01)
        stateful = {"rank0": own, "mean": mean, "other": other, "second": second}
        options = {"predict": nn.Sequential(mean, nn.Identity()), "stateful": stateful}
        run = make_run(
            model, torch.optim.SGD(model.parameters(), lr=0.1), world, tmp_path / folder, **options
        )
        with contextlib.suppress(Stopped), run:
            run.resume()
            for epoch in run.epochs():
                torch.rand(3, generator=own)
                for x, labels, size in run.batches(epoch):
                    x = x + torch.rand((), generator=own)
                    loss = cross_entropy(model(x), labels, reduction="sum")
                    (loss / size + other(x[:, :2].bfloat16()).float().mean()).backward()
                    for one in (run.state.optimizer, second):
                        one.step()
                        one.zero_grad()
                    mean.update(model)
                    if run.total_steps + 1 == stop:
                        os.kill(os.getpid(), signal.SIGTERM)
                    run.end_step(loss_sum=loss.detach())
                run.end_epoch()
        state = [{**second.state[p]} for p in other.parameters()]
        return [r.test_loss for r in run.results], dict(other.state_dict()), state

    whole = train("whole", None)
    train("parts", 4)
    assert not first_difference(whole, train("parts", None))


class Slotted:
    __slots__ = ("average",)

    def __init__(self, average: nn.Module):
        self.average = average


class Trainer(nn.Module):
    """A module that holds the model and, as a plain attribute, a scaler."""

    def __init__(self, model: nn.Module, kept: Any):
        super().__init__()
        self.model, self.kept = model, [kept]


class Early:
    """A program's object with a state dict, such as one that stops early."""

    def __init__(self) -> None:
        self.steps = 0

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.steps = state_dict["steps"]


def in_a_hook(model: nn.Module) -> dict[str, Any]:
    average = AveragedModel(model)
    return {"hook": lambda *_: average.update_parameters(model)}


def stops_early(_: nn.Module) -> dict[str, Any]:
    early = Early()

    def update() -> None:
        early.steps += 1

    return {"update": update}


HIDDEN: dict[str, Kept] = {
    "in slots": lambda model: {"holder": Slotted(AveragedModel(model))},
    "in a class": lambda model: {"holder": type("Class", (), {"average": AveragedModel(model)})()},
    "in a namespace": lambda model: {"holder": types.SimpleNamespace(a=[AveragedModel(model)])},
    "in a queue": lambda model: {"holder": collections.deque([AveragedModel(model)])},
    "in a trainer": lambda model: {"trainer": Trainer(model, AveragedModel(model))},
    "deep": lambda model: {"a": [{"b": [{"c": {"d": AveragedModel(model)}}]}]},
    "behind a list": lambda model: {"many": [*range(99_999)], "average": AveragedModel(model)},
    "in a hook of the optimizer": in_a_hook,
    "an object with a state dict": stops_early,
}


def test_what_would_be_lost_is_found_where_programs_keep_it(world, tmp_path):
    wrong = []
    for name, make in HIDDEN.items():
        model = nn.Linear(FEATURES, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        kept = make(model)
        if hook := kept.pop("hook", None):
            optimizer.register_step_post_hook(hook)
        update = kept.get("update") or (lambda: None)
        run = make_run(model, optimizer, world, tmp_path / name)
        try:
            take_steps(run, after=lambda _, update=update, kept=kept: update())
            wrong.append(f"{name}: was taken")
        except ConfigError as e:
            if "a resumed run would lose" not in str(e):
                wrong.append(f"{name}: {e}")
    assert not wrong, "\n".join(wrong)


class Caches(nn.Module):
    """A helper that computes a table when it is needed, as of rotary positions."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(1), persistent=False)
        self.lazy = nn.LazyLinear(3)

    def forward(self) -> None:
        self.table = self.table + 1


def test_a_cache_of_a_module_is_no_state(world, tmp_path):
    helper, model = Caches(), nn.Linear(FEATURES, 3)
    run = make_run(model, torch.optim.SGD(model.parameters(), lr=0.1), world, tmp_path)
    assert len(take_steps(run, after=lambda _: helper())) == 2


def buffers_that_differ(folder: Path, same: bool) -> str:
    with join_world("cpu") as world:
        torch.manual_seed(0)
        model, queue = nn.Linear(FEATURES, 3), nn.Module()
        queue.register_buffer("rows", torch.full((2,), 0.0 if same else float(world.rank)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run = make_run(model, optimizer, world, folder, stateful={"queue": queue})
        try:
            take_steps(run, 1)
        except ConfigError as e:
            return str(e)
        return str(queue.rows.tolist())


def test_values_beside_the_model_that_differ_between_ranks_are_refused(ranks, tmp_path):
    for error in ranks(2, buffers_that_differ, tmp_path / "differ", False):
        assert error.startswith("queue.rows differs between ranks, and one rank's values would be")
    assert ranks(2, buffers_that_differ, tmp_path / "same", True) == ["[0.0, 0.0]"] * 2
