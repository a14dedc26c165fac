# SPDX-License-Identifier: MIT
"""A Muon of matrices that lie on the ranks in different ways, beside one of whole matrices."""

import copy
import logging
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.optim import SGD, Optimizer

from torchpar import exact
from torchpar.errors import ConfigError
from torchpar.ops.matrix import ordinary
from torchpar.optim import Muon
from torchpar.parallel.split.layers import ColumnParallelLinear, RowParallelLinear
from torchpar.parallel.split.parts import part_of

# Placements of one weight, along each dimension of its mesh.
WEIGHTS: dict[str, list[Placement]] = {
    "rows": [Shard(0), Shard(0)],
    "columns": [Shard(1), Shard(1)],
    "rows and columns": [Shard(0), Shard(1)],
    "copies": [Replicate(), Replicate()],
    "copies of columns": [Replicate(), Shard(1)],
}
REFUSED = "refused"
STYLES = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
SPLIT = {"column layer": ColumnParallelLinear, "row layer": RowParallelLinear}
# By `parallelize_module` over "tp", then by `fully_shard` over "dp".
BOTH = "fully_shard over colwise"
# Names of weights that hold several matrices, and the least multiple of the columns in their rows.
FUSED = {"qkv": 3, "c_attn": 2, "gate_up_proj": 2}
HOW = ("whole", *WEIGHTS, *STYLES, *SPLIT, "fully_shard")


class Layer(NamedTuple):
    """A linear layer, and how it lies on the ranks.

    Attributes:
        how: one of `HOW`, or `BOTH`.
        mesh: "dp", "tp" or "all", the dimension of the mesh that it lies on; other ranks have
            copies.
        twin: the index of the layer whose weight it shares, or None.
        name: one of `FUSED`, or "" for a number.
    """

    inputs: int
    outputs: int
    how: str
    mesh: str = "all"
    twin: int | None = None
    name: str = ""


class Program(NamedTuple):
    """What to train.

    Attributes:
        mesh: the sizes of the mesh.
        order: the order of the matrices in the optimizer, as indices.
        cut: the number of matrices in the first of two groups; 0 for one group.
        of_model: whether `Muon.for_model` chooses the matrices, in the model's order.
        group: "", "world" or "mesh": the optimizer's process group.
        edits: what happens before each step but the first: "lr", "decay", "resume", "lose" a
            gradient, "zeros" in place of one, or "".
        exact: whether all is computed in `torchpar.exact.mode`.
    """

    mesh: tuple[int, ...]
    layers: tuple[Layer, ...]
    order: tuple[int, ...]
    cut: int
    of_model: bool
    group: str
    named: bool
    dtype: torch.dtype
    nesterov: bool
    edits: tuple[str, ...]
    seed: int
    exact: bool = False


def train(program: Program, fault: str = "") -> str:
    """Take steps on this rank. Return what differs from the steps on whole matrices, or "".

    If `Muon.for_model` finds no matrix in the whole model, it must not find one in the other.

    Args:
        fault: "exchange" plants a fault: parameters of one rank alone get the results of all.
    """
    logging.disable(logging.WARNING)  # PyTorch advises on the meshes
    with (
        patch.object(Muon, "_exchanges", results_of_all) if fault else nullcontext(),
        exact.mode() if program.exact else nullcontext(),
    ):
        return _Training(program).run()


def results_of_all(self: Muon) -> Any:
    """The parameters of this rank alone get the results of all exchanges, also of shards."""
    exchanges, alone = EXCHANGES(self)

    def gather(parts: Any, facts: Any) -> Any:
        return {info: parts[info].contiguous() for info in alone if info in parts}

    own = SimpleNamespace(params=alone, gather=gather, scatter=dict)
    return ([*exchanges, own] if alone else exchanges), []


EXCHANGES = Muon._exchanges


class _Training:
    def __init__(self, program: Program):
        self.program = program
        self.generator = torch.Generator().manual_seed(program.seed)
        torch.manual_seed(program.seed)
        names = ("dp", "tp")[: len(program.mesh)]
        self.mesh = init_device_mesh("cpu", program.mesh, mesh_dim_names=names)
        self.whole = nn.Sequential(
            OrderedDict(
                (layer.name or str(i), nn.Linear(*layer[:2], dtype=program.dtype))
                for i, layer in enumerate(program.layers)
            )
        )
        self.model = copy.deepcopy(self.whole)
        for i, layer in enumerate(program.layers):
            self.place(i, layer)
        for model in self.whole, self.model:
            for i, layer in enumerate(program.layers):
                if layer.twin is not None:
                    model[i].weight = model[layer.twin].weight
        shards = dict(self.model.named_parameters())
        self.pairs = [(name, shards[name], q) for name, q in self.whole.named_parameters()]
        self.matrices = [pair for pair in self.pairs if pair[2].dim() == 2]

    def place(self, i: int, layer: Layer) -> None:
        mesh = self.mesh if layer.mesh == "all" else self.mesh[layer.mesh]
        name = layer.name or str(i)
        if layer.how in WEIGHTS:
            placements = WEIGHTS[layer.how][-mesh.ndim :]
            weight = self.model[i].weight.detach()
            placed = distribute_tensor(weight, mesh, placements, src_data_rank=None)
            self.model[i].weight = nn.Parameter(placed)
        elif layer.how in STYLES:
            parallelize_module(self.model, mesh, {name: STYLES[layer.how]()})
        elif layer.how in SPLIT:
            self.model[i] = SPLIT[layer.how].from_linear(self.model[i], mesh=mesh)
        elif layer.how == BOTH:
            parallelize_module(self.model, self.mesh["tp"], {name: ColwiseParallel()})
            fully_shard(self.model[i], mesh=self.mesh["dp"])
        elif layer.how == "fully_shard":
            fully_shard(self.model[i], mesh=mesh)

    def make(self, model: nn.Module) -> Optimizer:
        program = self.program
        options: dict[str, Any] = {"ns": "standard", "nesterov": program.nesterov, "lr": 0.05}
        if program.group and model is self.model:
            options["process_group"] = dist.group.WORLD if program.group == "world" else self.mesh
        if program.of_model:
            return Muon.for_model(model, others=partial(SGD, lr=0.1), **options)
        given = [(name, p if model is self.model else q) for name, p, q in self.matrices]
        given = [given[i] for i in program.order]
        params = given if program.named else [p for _, p in given]
        if not program.cut:
            return Muon(params, **options)
        first, second = params[: program.cut], params[program.cut :]
        return Muon([{"params": first}, {"params": second, "lr": 0.02, "momentum": 0.5}], **options)

    def run(self) -> str:
        try:
            self.expected = self.make(self.whole)
        except ConfigError as error:
            with suppress(ConfigError):
                self.make(self.model)
                return f"takes what is refused of whole matrices: {error}"
            return REFUSED
        self.ours = self.make(self.model)
        for step, edit in enumerate(("", *self.program.edits)):
            if edit in ("lr", "decay", "resume"):
                self.edit(edit)
            self.give_gradients(edit)
            self.ours.step()
            self.expected.step()
            with ordinary():
                if found := next(self.differences(), None):
                    return f"step {step}: {found}"
        return ""

    def edit(self, edit: str) -> None:
        if edit == "resume":
            for name in ("ours", "expected"):
                state = copy.deepcopy(getattr(self, name).state_dict())
                made = self.make(self.model if name == "ours" else self.whole)
                made.load_state_dict(state)
                setattr(self, name, made)
            return
        key, value = ("lr", 0.01) if edit == "lr" else ("weight_decay", 0.5)
        for optimizer in self.ours, self.expected:
            optimizer.param_groups[-1][key] = value

    def give_gradients(self, edit: str) -> None:
        for number, (_, p, q) in enumerate(self.pairs):
            gradient = torch.randn(q.shape, generator=self.generator).to(q.dtype)
            if edit == "zeros" and not number:
                gradient.zero_()
            q.grad, p.grad = gradient, placed_like(p, gradient)
        # Another matrix of its group keeps its gradient.
        if edit == "lose" and len(self.matrices) > 2 and not self.program.cut:
            _, p, q = self.matrices[1]
            p.grad = q.grad = None

    def differences(self) -> Iterator[str]:
        """The matrices whose bits differ, and the others that differ by more than rounding."""
        of_muon = {
            p
            for optimizer in getattr(self.expected, "optimizers", [self.expected])
            if isinstance(optimizer, Muon)
            for group in optimizer.param_groups
            for p in group["params"]
        }
        for name, p, q in self.pairs:
            found, expected = (
                (p.full_tensor(), q)
                if isinstance(p, DTensor)
                else (p, part_of(p).narrow(q.detach()))
            )
            # SGD's elements, near 1, round three times in a step.
            rounding = 0.0 if q in of_muon else 16 * torch.finfo(q.dtype).eps
            if not torch.allclose(found, expected, rtol=rounding, atol=rounding):
                off = (found - expected).abs().max().item()
                yield f"{name} is off by {off:.2g}"


def placed_like(p: Tensor, t: Tensor) -> Tensor:
    """This rank's part of ``t``, as that of the parameter ``p``."""
    part = part_of(p).narrow(t).clone()
    if not isinstance(p, DTensor):
        return part
    return DTensor.from_local(
        part, p.device_mesh, p.placements, run_check=False, shape=t.shape, stride=t.stride()
    )


def meshes_of(mesh: tuple[int, ...], how: str) -> tuple[str, ...]:
    """The dimensions of a mesh that a layer may lie on."""
    if how == BOTH or len(mesh) == 1:
        return ("all",)
    return ("dp", "tp") if how in (*STYLES, *SPLIT) else ("dp", "tp", "all")
