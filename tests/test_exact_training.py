# SPDX-License-Identifier: MIT
"""Exact arithmetic: the recorded bits of weights on every mesh of ranks.

torch.sigmoid in the place of `torchpar.exact.ieee.sigmoid` would pass here: on one processor its bits do
not depend on the mesh. tests/test_exact_matmul.py compares them with recorded bits.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from exact_bits import made_of_integers
from torch import Tensor

from torchpar import training
from torchpar.exact import ExactGradients, ExactSGD, clip_grad_norm_, parallel_mlp, tensor_parallel
from torchpar.exact.loss import cross_entropy_sum
from torchpar.exact.verify import digest
from torchpar.nn import MLP
from torchpar.ops import exact_matmul_t
from torchpar.parallel import World, join_world
from torchpar.parallel.split import shared_memory
from torchpar.parallel.split.pipeline import Pipeline, stage_mlp
from torchpar.training.losses import add_orthogonality_gradient


class Mesh(NamedTuple):
    """Ranks, and how they train: the bits depend on none of it."""

    dp: int = 1
    tp: int = 1
    pp: int = 1
    micro_batches: int = 1
    schedule: Any = "1f1b"
    threads: int = 1
    sharing: int = 8  # the most ranks that may share memory

    @property
    def ranks(self) -> int:
        return self.dp * self.tp * self.pp


# Sizes, batches, and a factor of the inputs. Layers wider and narrower than the ranks, an odd and an even
# number of them; batches that leave ranks empty.
MODELS = {
    "sigmoid": ((20, 13, 7, 5), (33, 33, 33), 1.0),
    "relu": ((9, 4, 130, 5, 4), (23, 1, 6), 2.0**-22),
}
RECORDED = "93f4d05df8f2e59fffb059043aef0fa4b0cd2a2016260823b5caafa6466b1d91"  # of the first one's weights


def split(whole: MLP, world: World, mesh: Mesh) -> tuple[MLP, Callable[..., Tensor]]:
    """This rank's part of ``whole``, and a function that sets its gradients and returns the loss."""
    model = stage_mlp(parallel_mlp(whole, world.mesh["tp"]), world.mesh["pp"])
    with patch.object(shared_memory, "MAX_RANKS", mesh.sharing):
        gradients = ExactGradients(model, world)
    if mesh.pp > 1:
        pipeline = Pipeline(model, world, mesh.schedule, mesh.micro_batches, gradients)
        return model, partial(pipeline.step, loss_sum=cross_entropy_sum)

    def step(x: Tensor, labels: Tensor, global_size: int) -> Tensor:
        # Without a pipeline the micro-batches are those of accumulated gradients.
        parts = zip(x.tensor_split(mesh.micro_batches), labels.tensor_split(mesh.micro_batches), strict=True)
        losses = [cross_entropy_sum(model(x_i), labels_i) for x_i, labels_i in parts]
        for loss in losses:
            (loss / global_size).backward()
        gradients(mesh.micro_batches)
        return torch.stack(losses).sum().detach()

    return model, step


def trained(mesh: Mesh, rounded: bool = False) -> dict[str, tuple[str, list[float], list[float]]]:
    """For each of `MODELS` the hash of the weights after some steps, and the steps' losses and norms.

    If ``rounded``, ranks add float32 instead of integers.
    """
    add, found = tensor_parallel.all_reduce, {}

    def add_rounded(t: Tensor, *args: Any) -> Tensor:
        return add(t.float() if t.dtype == torch.int64 else t, *args)

    torch.set_num_threads(mesh.threads)
    with (
        join_world("cpu") as world,
        patch.object(tensor_parallel, "all_reduce", add_rounded if rounded else add),
    ):
        world = world.with_mesh(**{axis: getattr(mesh, axis) for axis in ("dp", "tp", "pp")})
        for name, (sizes, batches, scale) in MODELS.items():
            torch.manual_seed(0)
            model, step = split(MLP(sizes, name), world, mesh)
            decays = name == "sigmoid"
            optimizer = training.sgd(model, 0.5, 0.9, 1e-2, decay_biases=decays, kind=ExactSGD)
            losses, norms = [], []
            for i, n in enumerate(batches):
                x, labels = made_of_integers(n, sizes[0], seed=i) * scale, torch.arange(n) % sizes[-1]
                share = world.share(n)
                loss = step(share.narrow(x, 0), share.narrow(labels, 0), n)
                losses.append(world.sum(loss.double() * world.owns_outputs).item())
                if name == "relu":
                    add_orthogonality_gradient(model, 1e-3, exact_matmul_t)
                norms.append(clip_grad_norm_(model, 0.1, world).item())
                optimizer.step()
                optimizer.zero_grad()
            found[name] = digest(model, world), losses, norms
    return found


@pytest.fixture(scope="module")
def expected(ranks) -> dict[str, tuple[str, list[float], list[float]]]:
    (found,) = ranks(1, trained, Mesh())
    for _, losses, norms in found.values():
        assert min(norms) > 0.1  # each step's gradient is clipped
        assert all(loss > 0 for loss in losses)
    return found


def test_the_weights_have_the_recorded_bits(expected):
    assert expected["sigmoid"][0] == RECORDED


MESHES = [
    Mesh(micro_batches=3, threads=2),
    Mesh(dp=2, sharing=1),
    Mesh(tp=3, micro_batches=2),
    Mesh(tp=5),
    Mesh(pp=3, micro_batches=5, schedule="gpipe"),
    Mesh(dp=3, tp=2, micro_batches=2),
    Mesh(dp=2, tp=2, pp=2, micro_batches=4),
]


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: "-".join(map(str, mesh)))
def test_every_mesh_has_the_same_bits(ranks, expected, mesh):
    assert all(found == expected for found in ranks(mesh.ranks, trained, mesh))


def test_the_comparison_rejects_sums_of_float32(ranks, expected):
    for name, (bits, *_) in ranks(2, trained, Mesh(tp=2), True)[0].items():
        assert bits != expected[name][0]
