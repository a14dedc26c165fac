# SPDX-License-Identifier: MIT
"""The conformance kit finds each fault of `faulty_optimizers` where it belongs, and none in a plain Muon."""

from functools import partial

import faulty_optimizers as faulty
import pytest

from torchpar.testing import check_optimizer

FAULTS = {
    "slices": (faulty.OrthogonalisesSlices, "ColumnParallelLinear"),
    "shards": (faulty.OrthogonalisesShards, "Shard(0)"),
    "no iteration": (faulty.AppliesMomentum, "polar factor"),
    "shape of a shard": (faulty.LooksAtTheShard, "fully_shard on 2 ranks"),
    "micro-batches": (faulty.MomentumOfMicroBatches, "accumulation"),
    "flattened": (faulty.FlattensShards, "fully_shard, CPU offload"),
    "stale heads": (faulty.ViewsShards, "fully_shard, heads"),
    "padding": (faulty.ScalesByPaddedShape, "fully_shard, padded rows"),
    "momentum": (faulty.NormalisesMomentum, "scale of gradients, bfloat16 without Nesterov"),
    "arguments": (faulty.AcceptsAnyArguments, "Shard(0), two learning rates"),
    "empty shard": (faulty.AveragesOverShards, "fully_shard, fewer rows than ranks"),
}


MAKERS = {name: partial(faulty.make, kind=kind) for name, (kind, _) in FAULTS.items()}
MAKERS["tied weights"] = faulty.make_by_layer
SITUATIONS = {name: situation for name, (_, situation) in FAULTS.items()} | {"tied weights": "tied weights"}


@pytest.mark.parametrize("fault", MAKERS)
def test_a_fault_is_found_where_it_belongs(ranks, fault):
    (found,) = check_optimizer(MAKERS[fault], [SITUATIONS[fault]], ranks=ranks)
    assert found.verdict == "wrong", found.detail


@pytest.mark.slow
@pytest.mark.parametrize("fault", MAKERS)
def test_nothing_is_found_on_whole_matrices(ranks, fault):
    (found,) = check_optimizer(MAKERS[fault], ["whole"], ranks=ranks)
    assert found.verdict == "same bits", found.detail


REFUSED = {
    *("ColumnParallelLinear", "RowParallelLinear", "fully_shard after the optimizer"),
    *("Shard(0), no gradient on one rank", "Replicate, no gradient on one rank"),
    *("Shard(0), two learning rates", "Shard(0), a group on one rank"),
}


@pytest.mark.slow
def test_a_plain_muon_conforms(ranks):
    """It gathers whole matrices, so that updates have the same bits wherever gradients have."""
    table = check_optimizer(faulty.make, ranks=ranks)
    table.assert_conforms()
    assert {row.situation for row in table if row.verdict == "refuses"} == REFUSED
    left = {row.situation for row in table if row.verdict == "not applicable"}
    assert left == {"DDP, sharing the work"}
