# SPDX-License-Identifier: MIT
"""Rule of DTensors, on simulated ranks."""

import itertools
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchpar.testing.operators.attempts import AttemptsAndRemark, OutcomeException
from torchpar.testing.operators.case import Case
from torchpar.testing.operators.compare import close
from torchpar.testing.operators.gradients import gradients
from torchpar.testing.operators.tensors import Tensors, is_differentiable, normal_like

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement


RANKS = 2
_meshes = itertools.count()
MOST_COMBINATIONS = 48  # drawn from all, if there are more


def dtensor(case: Case) -> AttemptsAndRemark:
    """Try every placement of every operand, on simulated ranks.

    All ranks are in this process, in PyTorch's LocalTensor mode: no other process has to import the
    operator.
    """
    from torch.distributed.tensor import Partial, Replicate, Shard

    choices = []
    for t in case.operands:
        partial_sum = [Partial("sum")] if is_differentiable(t) else []
        choices.append([Replicate(), *map(Shard, range(t.dim())), *partial_sum])
    combinations = list(itertools.product(*choices))
    if len(combinations) > MOST_COMBINATIONS:
        combinations = random.Random(0).sample(combinations, MOST_COMBINATIONS)
    leaves = case.leaves()
    ys = case.smooth(case.plain)(*leaves)
    incoming = list(map(normal_like, ys))
    every = range(len(ys))
    chosen = [every, *([i] for i in every if len(every) > 1 and ys[i].requires_grad)]
    of_operands = []
    with suppress(RuntimeError):  # without a derivative, which is another rule's matter
        for some in chosen:
            given = [ys[i] for i in some], leaves, [incoming[i] for i in some]
            of_operands.append((some, gradients(*given, retain_graph=True)))
    expected = case.op(*case.operands), incoming, of_operands
    local: list[tuple[Placement, ...]] = []
    with _simulated_ranks() as mesh:
        for placements in combinations:
            label = ", ".join(map(str, placements))
            yield label, partial(_compare_on_ranks, case, mesh, placements, expected, local)
    return f"{len(local)} of {len(combinations)} placements take no communication"


@contextmanager
def _simulated_ranks() -> Iterator["DeviceMesh"]:
    """A mesh of ranks in this process, unequal to all meshes before it.

    DTensor caches what it finds for a mesh, and takes meshes of two process groups for equal. With
    an equal mesh, DTensor would ask for a group that was destroyed. So the dimension of each mesh
    has a name of its own.
    """
    if dist.is_initialized():
        raise OutcomeException("not run", "this process belongs to a process group")
    from torch.distributed._local_tensor import LocalTensorMode
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    hook = sys.excepthook  # the next call replaces it by a hook that names the rank
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    try:
        with LocalTensorMode(RANKS):
            yield init_device_mesh("cpu", (RANKS,), mesh_dim_names=(f"ranks {next(_meshes)}",))
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook


def _distributed(t: Tensor, mesh: "DeviceMesh", placement: "Placement") -> "DTensor":
    """A DTensor of ``t``. The terms of a partial sum differ in every element."""
    from torch.distributed._local_tensor import LocalTensor, maybe_disable_local_tensor_mode
    from torch.distributed.tensor import DTensor, distribute_tensor

    is_sum = placement.is_partial()
    with maybe_disable_local_tensor_mode():  # the mode would draw the weights once for each rank
        if is_sum:
            weights = [normal_like(t, seed) for seed in range(RANKS - 1)]
            weights.append(1 - torch.stack(weights).sum(0))
            of_ranks = [t * weight for weight in weights]
        else:
            of_ranks = [t.clone() for _ in range(RANKS)]
    local = LocalTensor(dict(enumerate(of_ranks)))
    if is_sum:
        return DTensor.from_local(local, mesh, [placement], run_check=False)
    return distribute_tensor(local, mesh, [placement], src_data_rank=None)


def _compare_on_ranks(
    case: Case,
    mesh: "DeviceMesh",
    placements: tuple["Placement", ...],
    expected: tuple[Tensors, list[Tensor], list[tuple[Sequence[int], Tensors]]],
    local: list[tuple["Placement", ...]],
) -> None:
    """Compare results and gradients on all ranks with those of the unsharded operands."""
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor.debug import CommDebugMode

    values, incoming, of_operands = expected
    placed = [_distributed(t, mesh, p) for t, p in zip(case.operands, placements, strict=True)]
    xs = [t.requires_grad_() for t in placed if is_differentiable(t)]
    with CommDebugMode() as communication, _way_to_register():
        ys = case.op(*placed)
    results = [y for y in ys if isinstance(y, DTensor)]
    if len(results) < len(ys):
        raise OutcomeException("wrong", "the result is not a DTensor")
    replicated = [y.redistribute(placements=[Replicate()]) for y in results]
    _same_on_all_ranks(replicated, values)
    if communication.get_total_counts() == 0:
        local.append(placements)
    smooth = [y for y, smooth in zip(replicated, case.is_smooth, strict=True) if smooth]
    placed = [_distributed(g, mesh, Replicate()) for g in incoming]
    for some, right in of_operands:
        given = [smooth[i] for i in some], xs, [placed[i] for i in some]
        with _way_to_register():  # the backward may call another operator
            found: Sequence[Any] = gradients(*given, retain_graph=True)
        _same_on_all_ranks([g.redistribute(placements=[Replicate()]) for g in found], right)


@contextmanager
def _way_to_register() -> Iterator[None]:
    """Add to DTensor's error for an operator without a rule how its author registers one."""
    try:
        yield
    except NotImplementedError as e:
        if "sharding strategy" not in str(e):
            raise
        way = "register one by op.register_sharding of torchpar.library"
        raise NotImplementedError(f"{str(e).rstrip('.')}; {way}") from e


def _same_on_all_ranks(actual: Sequence["DTensor"], expected: Sequence[Tensor]) -> None:
    from torch.distributed._local_tensor import maybe_disable_local_tensor_mode

    with maybe_disable_local_tensor_mode(), torch.no_grad():
        for a, e in zip(actual, expected, strict=True):
            parts: list[Any] = [a.to_local()]
            for part in parts:
                if of_ranks := getattr(part, "_local_tensors", None):  # a sum nests them
                    parts += of_ranks.values()
                else:
                    close(part.detach(), e.detach())
