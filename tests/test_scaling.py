# SPDX-License-Identifier: MIT
"""The scaling benchmarks: what their checks reject, and what many ranks send."""

from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from ranks import fork_context
from torch import Tensor

pytest.importorskip("rich", reason="rich prints the tables")
from benchmarks import scale_model, scaling
from benchmarks.timing import Rejected
from torchpar.profile.collectives import Call
from torchpar.training.cost import Expected


def test_a_rank_of_many_sends_what_is_predicted():
    """In another process, whose fake process group disturbs nobody."""
    width, plan = 4096, scale_model.MESHES[1]
    batch = 2**10 * plan.dp * plan.micro_batches
    with ProcessPoolExecutor(1, fork_context()) as worker:
        calls, different = worker.submit(scale_model.count, width, 16, batch, plan).result()
    assert different == ""
    sent = Counter((call.dimension, call.operation, call.bytes) for call in calls)
    # By hand: bfloat16, a rank's 1024 samples a micro-batch; the busiest stage is inside the pipeline.
    activations, pairs = 2 * 2**10 * width, 8 // plan.pp
    expected = {("tp", "all_reduce", activations): plan.micro_batches * 2 * pairs}
    expected |= {("pp", op, activations): 2 * plan.micro_batches for op in ("send", "recv")}
    assert {kind: number for kind, number in sent.items() if kind[0] != "dp"} == expected
    parameters = pairs * (2 * width**2 // 8 + width // 8 + width)
    assert sum(kind[2] * number for kind, number in sent.items() if kind[0] == "dp") == 2 * parameters


def test_other_sizes_or_another_number_of_calls_are_a_difference():
    calls, right = [Call("tp", "all_reduce", 8, 100, 0.0)] * 2, Expected("tp", "all_reduce", 8, 100)
    assert scale_model.difference(calls, [right] * 2) == ""
    other = [Expected("tp", "all_reduce", 8, 96), Expected("tp", "all_reduce", 8, 104)]  # as much in all
    for wrong in ([right], other, [Expected("dp", "all_reduce", 8, 100)] * 2):
        assert scale_model.difference(calls, wrong)


def test_a_wrong_gradient_and_a_wrong_loss_are_rejected():
    torch.manual_seed(0)
    exact = torch.randn(1000, dtype=torch.float64)
    single, other = (exact + 1e-7 * torch.randn(1000).double() for _ in range(2))

    def error(grad: Tensor, loss: float) -> float:
        return scaling.compare_with_one_rank(grad, (single, exact), loss, (2.3, 2.3), 100)

    one_off = other.clone()
    one_off[7] += 1e-4
    assert error(other, 2.3) == pytest.approx(1e-7, rel=0.1)
    for wrong in (2 * other, one_off, other * torch.nan):  # summed and not averaged; one; all
        with pytest.raises(Rejected, match="gradient"):
            error(wrong, 2.3)
    for loss in (2.3001, torch.nan):
        with pytest.raises(Rejected, match="loss"):
            error(other, loss)
