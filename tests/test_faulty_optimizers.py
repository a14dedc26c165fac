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


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_where_it_belongs(ranks, fault):
    kind, situation = FAULTS[fault]
    whole, found = check_optimizer(partial(faulty.make, kind=kind), ["whole", situation], ranks=ranks)
    assert (whole.verdict, found.verdict) == ("same bits", "wrong"), found.detail


def test_tied_weights_updated_twice_are_found(ranks):
    whole, found = check_optimizer(faulty.make_by_layer, ["whole", "tied weights"], ranks=ranks)
    assert (whole.verdict, found.verdict) == ("same bits", "wrong"), found.detail


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
