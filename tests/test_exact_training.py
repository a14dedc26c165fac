# SPDX-License-Identifier: MIT
"""Exact arithmetic: the same bits of weights and losses on every mesh, and gradients near float64's.

torch.sigmoid in the place of `torchpar.ieee.sigmoid` would pass here: on one processor its bits do not depend
on the mesh. tests/test_ieee.py compares those functions with bits of another processor.
"""

import copy
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

from torchpar import training
from torchpar.ieee import cross_entropy_sum
from torchpar.nn import MLP
from torchpar.ops import _exact
from torchpar.ops._exact import row_exponents
from torchpar.parallel import World, clip_grad_norm_, join_world, parallel_mlp
from torchpar.parallel.split import exact
from torchpar.parallel.split.exact_gradients import ExactGradients
from torchpar.parallel.split.layers import split_parameters
from torchpar.parallel.split.pipeline import Pipeline, stage_mlp
from torchpar.parallel.split.reduction import all_reduce
from torchpar.training.losses import add_orthogonality_gradient
from torchpar.training.verify import digest


class Mesh(NamedTuple):
    """Ranks, and how they train: the bits depend on none of it."""

    dp: int = 1
    tp: int = 1
    pp: int = 1
    schedule: Any = "1f1b"
    micro_batches: int = 4
    threads: int = 1

    @property
    def ranks(self) -> int:
        return self.dp * self.tp * self.pp

    @property
    def axes(self) -> dict[str, int]:
        return {"dp": self.dp, "tp": self.tp, "pp": self.pp}


# Layers wider and narrower than the ranks, an odd and an even number of them; batches that leave ranks empty.
MODELS = {
    "sigmoid": ((25, 33, 7, 5, 10), "sigmoid", (13, 14, 3)),
    "relu": ((9, 4, 130, 4), "relu", (23, 1, 6)),
}
Results = dict[str, tuple[str, list[float], list[float]]]


def split(whole: MLP, world: World, mesh: Mesh) -> tuple[MLP, Callable[..., Tensor], Any]:
    """This rank's part of ``whole``, a function that sets its gradients, and one that predicts."""
    model = stage_mlp(parallel_mlp(whole, world.mesh["tp"], "exact"), world.mesh["pp"])
    gradients = ExactGradients(model, world)
    if mesh.pp > 1:
        pipeline = Pipeline(model, world, mesh.schedule, mesh.micro_batches, gradients)
        return model, partial(pipeline.step, loss_sum=cross_entropy_sum), pipeline.predict

    def step(x: Tensor, labels: Tensor, global_size: int) -> Tensor:
        # Without a pipeline the micro-batches are those of accumulated gradients.
        parts = zip(x.tensor_split(mesh.micro_batches), labels.tensor_split(mesh.micro_batches), strict=True)
        losses = [cross_entropy_sum(model(x_i), labels_i) for x_i, labels_i in parts]
        for loss in losses:
            (loss / global_size).backward()
        gradients(mesh.micro_batches)
        return torch.stack(losses).sum().detach()

    return model, step, model


def trained(mesh: Mesh, broken: str = "", clip: float = 0.1) -> Results:
    """For each of `MODELS` the hash of the weights after some steps, and the steps' losses and norms."""
    found: Results = {}
    with join_world("cpu") as world, ExitStack() as stack:
        world = world.with_mesh(**mesh.axes)
        for one in BROKEN[broken](world.rank) if broken else ():
            stack.enter_context(one)
        torch.set_num_threads(mesh.threads)
        stack.callback(torch.set_num_threads, 1)
        for name, (sizes, hidden, batches) in MODELS.items():
            if mesh.pp > len(sizes) - 1:
                continue
            torch.manual_seed(0)
            model, step, _ = split(MLP(sizes, hidden), world, mesh)
            optimizer = training.sgd(model, lr=0.5, momentum=0.9, weight_decay=1e-2, arithmetic="exact")
            losses, norms = [], []
            for n in batches:
                x, labels, share = torch.rand(n, sizes[0]), torch.randint(sizes[-1], (n,)), world.share(n)
                loss = step(share.narrow(x, 0), share.narrow(labels, 0), n)
                losses.append(world.sum(loss.double() * world.owns_outputs).item())
                add_orthogonality_gradient(model, 1e-3, "exact")
                norms.append(clip_grad_norm_(model, clip, world, "exact").item())
                optimizer.step()
                optimizer.zero_grad()
            found[name] = digest(model, world), losses, norms
    return found


def own_exponents(rank: int) -> list[Any]:
    shared = exact._shared_exponents

    def own(matrices: list[Tensor], mesh: Any) -> list[Tensor]:
        largest = shared(matrices, mesh)  # all ranks take part
        return [row_exponents(t) for t in matrices] if rank == 1 else largest

    return [patch.object(exact, "_shared_exponents", own)]


def own_maxima(rank: int) -> list[Any]:
    """The same in the gradients of weights and biases."""
    reduce = ExactGradients._reduce

    def own(self: Any, tensors: list[Tensor], shared: Any, op: Any) -> None:
        before = [t.clone() for t in tensors]
        reduce(self, tensors, shared, op)
        if op == dist.ReduceOp.MAX and rank == 1:
            for t, mine in zip(tensors, before, strict=True):
                t.copy_(mine)

    return [patch.object(ExactGradients, "_reduce", own)]


def no_carry(rank: int) -> list[Any]:
    """Digits from 0 to 255, which do not fit in a signed byte."""
    return [patch.object(_exact, "CARRY", 0)] if rank == 1 else []


def rounded_sums(rank: int) -> list[Any]:
    """Integers rounded to float32 before ranks add them."""
    reduce, add = ExactGradients._reduce, exact.all_reduce

    def rounded(t: Tensor) -> Tensor:
        return t.copy_(t.float()) if t.dtype == torch.int64 else t

    def reduce_rounded(self: Any, tensors: list[Tensor], *args: Any) -> None:
        reduce(self, [rounded(t) for t in tensors], *args)

    return [
        patch.object(ExactGradients, "_reduce", reduce_rounded),
        patch.object(exact, "all_reduce", lambda t, *args: add(rounded(t), *args)),
    ]


def float_gradients(rank: int) -> list[Any]:
    """Gradients added in float32, first over a rank's samples, then over ranks."""

    def add(self: ExactGradients, passes: int = 1) -> None:
        for layer in self.layers:
            kept, layer.passes = layer.passes[-passes:], []
            dz, x = torch.cat([one.dz for one in kept]), torch.cat([one.x.x for one in kept])
            layer.weight.grad, layer.bias.grad = (all_reduce(t, self.mesh) for t in (dz.T @ x, dz.sum(0)))

    return [patch.object(ExactGradients, "__call__", add)]


BROKEN = {
    "own exponents": own_exponents,
    "own maxima": own_maxima,
    "no carry": no_carry,
    "rounded sums": rounded_sums,
    "float gradients": float_gradients,
}


@pytest.fixture(scope="module")
def expected(ranks) -> Results:
    """The results of one rank."""
    (found,) = ranks(1, trained, Mesh(micro_batches=1))
    for _, losses, norms in found.values():
        assert min(norms) > 0.1  # each step's gradient is clipped
        assert all(loss > 0 for loss in losses)
    return found


MESHES = [
    Mesh(micro_batches=3, threads=2),
    *(Mesh(dp=n, micro_batches=1) for n in (2, 3, 5, 7)),
    *(Mesh(tp=n, micro_batches=1) for n in (2, 3, 5)),
    Mesh(pp=2, schedule="gpipe", micro_batches=5),
    Mesh(pp=3, micro_batches=3),
    Mesh(dp=3, tp=2, micro_batches=2),
    Mesh(dp=2, tp=2, pp=2),
]
RARE = [
    *(Mesh(dp=n) for n in (4, 6, 8, 9)),  # 9 ranks share no memory
    *(Mesh(tp=n, micro_batches=2, threads=2) for n in (2, 4, 7)),
    *(Mesh(pp=4, schedule=schedule, micro_batches=7) for schedule in ("gpipe", "1f1b")),
    Mesh(tp=2, pp=2, schedule="gpipe", micro_batches=3),
    Mesh(dp=2, pp=3, threads=2),
    Mesh(dp=3, tp=3),
]
MESHES += [pytest.param(mesh, marks=pytest.mark.slow) for mesh in RARE]


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: "-".join(map(str, mesh)))
def test_every_mesh_has_the_same_bits(ranks, expected, mesh):
    models = [name for name, (sizes, *_) in MODELS.items() if mesh.pp < len(sizes)]
    for found in ranks(mesh.ranks, trained, mesh):
        assert list(found) == models
        assert all(found[name] == expected[name] for name in models)


@pytest.mark.parametrize(
    "broken, axis",
    [
        ("own exponents", "tp"),
        ("own maxima", "dp"),
        ("no carry", "tp"),
        ("no carry", "dp"),
        ("rounded sums", "tp"),
        ("rounded sums", "dp"),
        ("float gradients", "dp"),
    ],
)
def test_the_comparison_rejects(ranks, expected, broken, axis):
    ones = ranks(1, trained, Mesh(micro_batches=1), broken)[0] if broken == "float gradients" else expected
    found = ranks(2, trained, Mesh(micro_batches=1)._replace(**{axis: 2}), broken)[0]
    for name in MODELS:
        assert found[name][0] != ones[name][0]


def test_other_norms_and_steps_have_other_bits(ranks, expected):
    (found,) = ranks(1, trained, Mesh(), "", 0.1 * (1 + 1e-6))
    assert all(found[name][0] != expected[name][0] for name in MODELS)


def errors_of_gradients(mesh: Mesh) -> list[tuple[float, float]]:
    """For each of `MODELS` the error of this rank's gradient, and that of float32 autograd, over the norm."""
    errors = []
    with join_world("cpu") as world:
        world = world.with_mesh(**mesh.axes)
        for sizes, hidden, _ in MODELS.values():
            torch.manual_seed(0)
            whole = MLP(sizes, hidden)
            x, labels, share = torch.randn(65, sizes[0]), torch.randint(sizes[-1], (65,)), world.share(65)
            model, step, _ = split(whole, world, mesh)
            step(share.narrow(x, 0), share.narrow(labels, 0), 65)
            parts = {name: (axis, layer.partition) for name, axis, layer in split_parameters(model)}
            of_whole = []
            for dtype in (torch.float32, torch.float64):
                one = copy.deepcopy(whole).to(dtype)
                cross_entropy(one(x.to(dtype)), labels).backward()
                grads = {name: p.grad.double() for name, p in one.named_parameters()}
                grads |= {name: part.narrow(grads[name], axis) for name, (axis, part) in parts.items()}
                of_whole.append(torch.cat([grads[name].flatten() for name, _ in model.named_parameters()]))
            found = torch.cat([p.grad.double().flatten() for p in model.parameters()])
            norm = of_whole[1].norm().item()
            errors.append(tuple((t - of_whole[1]).norm().item() / norm for t in (found, of_whole[0])))
    return errors


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(dp=3), Mesh(tp=2), Mesh(pp=2)], ids=["1", "dp", "tp", "pp"])
def test_gradients_are_as_accurate_as_autograds(ranks, mesh):
    for errors in ranks(mesh.ranks, errors_of_gradients, mesh):
        for error, of_float32 in errors:
            assert 0 < error <= 2 * of_float32 < 1e-5
