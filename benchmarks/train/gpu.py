# SPDX-License-Identifier: MIT
"""The rungs of an epoch on a GPU, and the launches and memory of a step there."""

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from benchmarks.train.epochs import Order, Train, native, run_epoch, torch_epoch, torch_step
from benchmarks.train.inputs import TrainingInputs
from torchpar.baselines.bridge import copy_weights
from torchpar.parallel.launch.world import World

PLAIN = "plain eager"
GRAPH = "each step a CUDA graph"
_LAUNCH = re.compile(r"cu(da)?(LaunchKernel|GraphLaunch|Memcpy|Memset)\w*")
WARM_UP, STEPS = 3, 10  # the steps before launches are counted, and those in which they are


def rungs(inputs: TrainingInputs, world: World, compiled: bool) -> Iterator[tuple[str, str, Train, bool]]:
    """Name, note and way of each rung, and whether it compiles; without ``compiled`` less torch.compile."""
    device = torch.device("cuda")
    sizes, dtype = inputs.training.sizes, inputs.training.dtype
    yield f"{PLAIN}, GPU", "", torch_epoch(native(sizes).to(dtype), device), False
    yield f"{PLAIN}, GPU", GRAPH, plain_graph(native(sizes).to(dtype), device), False
    if compiled:
        fast = native(sizes).to(dtype)
        fast.compile(mode="max-autotune")
        yield "torch.compile, GPU", "max-autotune", torch_epoch(fast, device), True
    on_gpu = replace(world, device=device)
    yield "torchpar, GPU", "", run_epoch(on_gpu, fused=True), False
    yield "torchpar, GPU", GRAPH, run_epoch(on_gpu, fused=True, graph=True), False


def plain_graph(model: torch.nn.Module, device: torch.device) -> Train:
    """Plain PyTorch's step, recorded as PyTorch's documentation shows."""

    def train(inputs: TrainingInputs, order: Order) -> Iterator[Tensor | None]:
        step = torch_step(inputs, model.to(device))
        batches = [torch.from_numpy(indices).to(device) for indices in order]
        graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        for indices in (batches[0], batches[-1]):
            index, stream = indices.clone(), torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step(index)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                loss = step(index)
            graphs[len(index)] = graph, index, loss
        copy_weights(inputs.start, model)  # recording has trained
        yield None
        for indices in batches:
            graph, index, loss = graphs[len(indices)]
            index.copy_(indices)
            graph.replay()
            yield loss.clone()

    return train


def figures(inputs: TrainingInputs, train: Train) -> dict[str, Any]:
    """Launches of a step, and the most memory of a GPU that a training takes beside what was there, in MB."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    losses = train(inputs, inputs.order)
    next(losses)
    list(islice(losses, WARM_UP))
    steps = min(STEPS, len(inputs.order) - WARM_UP - 1)  # of one size; the rest of the epoch is left out
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        list(islice(losses, steps))
        torch.cuda.synchronize()
    count = sum(event.count for event in profiler.key_averages() if _LAUNCH.fullmatch(event.key))
    return {"launches": count / steps, "peak_mb": (torch.cuda.max_memory_allocated() - before) / 1e6}
