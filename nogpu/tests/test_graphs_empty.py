# SPDX-License-Identifier: MIT
"""CUDA graphs on a CPU whose operators have empty results, which have no memory to write."""

import torch
from torch import nn

from nogpu import emulate
from nogpu.cuda.stand_in import cuda_is_cpu


def test_an_operator_with_empty_results_is_replayed():
    """Batch normalisation in inference returns empty statistics beside its result."""
    with emulate() as gpu, cuda_is_cpu(gpu):
        layer = nn.BatchNorm1d(3, device="cuda").eval()
        layer.running_mean.copy_(torch.tensor([1.0, -2.0, 0.5]))
        x = torch.zeros(5, 3, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            out = layer(x)
        for n in range(2):
            x.copy_(torch.arange(15.0).reshape(5, 3) + n)
            graph.replay()
            assert torch.equal(out, layer(x))
    assert gpu.faults == []


def test_an_empty_part_of_the_results_stays_as_it_is():
    with emulate() as gpu, cuda_is_cpu(gpu):
        x, other = torch.zeros(4, device="cuda"), torch.zeros(0, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            added, none = torch._foreach_add([x, other], 1)
        x.fill_(2)
        graph.replay()
        assert added.tolist() == [3, 3, 3, 3]
        assert none.shape == (0,)
    assert gpu.faults == []
