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
    "empty shard": (faulty.AveragesOverShards, "fully_shard on 3 ranks"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_where_it_belongs(fault):
    kind, situation = FAULTS[fault]
    whole, found = check_optimizer(partial(faulty.make, kind=kind), ["whole", situation])
    assert (whole.verdict, found.verdict) == ("same bits", "wrong"), found.detail


def test_tied_weights_updated_twice_are_found():
    whole, found = check_optimizer(faulty.make_by_layer, ["whole", "tied weights"])
    assert (whole.verdict, found.verdict) == ("same bits", "wrong"), found.detail


@pytest.mark.slow
def test_a_plain_muon_conforms():
    results = check_optimizer(faulty.make)
    results.assert_conforms()
    refused = {row.situation for row in results if row.verdict == "refuses"}
    assert "fully_shard on 3 ranks" not in refused, str(results)
