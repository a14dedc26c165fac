# SPDX-License-Identifier: MIT
"""The rule for DTensors: an operator with every placement of every operand, on simulated ranks.

All ranks live in this process, in PyTorch's LocalTensor mode, so that nothing has to be imported elsewhere.
"""

import itertools
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchpar.testing.case import Attempts, Case, Outcome, close, gradients, normal_like

RANKS = 2
MOST_COMBINATIONS = 48  # drawn from all, if there are more


def every_placement(case: Case) -> Attempts:
    from torch.distributed.tensor import Partial, Replicate, Shard

    choices = []
    for t in case.operands:
        partial_sum = [Partial("sum")] if t.is_floating_point() else []
        choices.append([Replicate(), *map(Shard, range(t.dim())), *partial_sum])
    combinations = list(itertools.product(*choices))
    if len(combinations) > MOST_COMBINATIONS:
        combinations = random.Random(0).sample(combinations, MOST_COMBINATIONS)
    leaves = case.leaves()
    ys = case.smooth(case.plain)(*leaves)
    incoming = list(map(normal_like, ys))
    of_operands: Sequence[Tensor] = ()
    with suppress(RuntimeError):  # without a derivative, which is another rule's matter
        of_operands = gradients(ys, leaves, incoming)
    expected = case.op(*case.operands), incoming, of_operands
    local: list[Any] = []
    with _simulated_ranks() as mesh:
        for placements in combinations:
            label = ", ".join(map(str, placements))
            yield label, partial(_compare, case, mesh, placements, expected, local)
    return f"{len(local)} of {len(combinations)} placements take no communication"


@contextmanager
def _simulated_ranks() -> Iterator[Any]:
    """A mesh of ranks in this process."""
    if dist.is_initialized():
        raise Outcome("not run", "this process belongs to a process group")
    from torch.distributed._local_tensor import LocalTensorMode
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    hook = sys.excepthook  # which the next call replaces by one that names the rank
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    try:
        with LocalTensorMode(RANKS):
            yield init_device_mesh("cpu", (RANKS,))
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook


def _place(whole: Tensor, mesh: Any, placement: Any) -> Any:
    """A DTensor of ``whole``; the parts of a sum differ in every element."""
    from torch.distributed._local_tensor import LocalTensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    weights = [normal_like(whole, seed) for seed in range(RANKS - 1)]
    weights.append(1 - torch.stack(weights).sum(0))
    is_sum = placement.is_partial()
    local = LocalTensor({rank: whole * w if is_sum else whole.clone() for rank, w in enumerate(weights)})
    if is_sum:
        return DTensor.from_local(local, mesh, [placement], run_check=False)
    return distribute_tensor(local, mesh, [placement], src_data_rank=None)


def _compare(
    case: Case, mesh: Any, placements: Sequence[Any], expected: tuple[Any, Any, Any], local: list[Any]
) -> None:
    """Compare results and gradients on all ranks with those of the whole operands."""
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor.debug import CommDebugMode

    results, incoming, of_operands = expected
    placed = [_place(t, mesh, p) for t, p in zip(case.operands, placements, strict=True)]
    xs = [t.requires_grad_() for t in placed if t.is_floating_point()]
    with CommDebugMode() as communication:
        ys: Sequence[Any] = case.op(*placed)
    if not all(isinstance(y, DTensor) for y in ys):
        raise Outcome("wrong", "the result is not a DTensor")
    whole: list[Any] = [y.redistribute(placements=[Replicate()]) for y in ys]
    _same_on_all_ranks(whole, results)
    if communication.get_total_counts() == 0:
        local.append(placements)
    if of_operands:
        smooth = [y for y, smooth in zip(whole, case.is_smooth, strict=True) if smooth]
        found: Sequence[Any] = gradients(smooth, xs, [_place(g, mesh, Replicate()) for g in incoming])
        _same_on_all_ranks([g.redistribute(placements=[Replicate()]) for g in found], of_operands)


def _same_on_all_ranks(actual: Sequence[Any], expected: Sequence[Tensor]) -> None:
    from torch.distributed._local_tensor import maybe_disable_local_tensor_mode

    with maybe_disable_local_tensor_mode(), torch.no_grad():
        for a, e in zip(actual, expected, strict=True):
            parts: list[Any] = [a.to_local()]
            for part in parts:
                if of_ranks := getattr(part, "_local_tensors", None):  # a sum nests them
                    parts += of_ranks.values()
                else:
                    close(part.detach(), e.detach())
