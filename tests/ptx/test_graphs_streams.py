# SPDX-License-Identifier: MIT
"""CUDA graphs on a CPU whose captures use several streams: forgotten forks, and right programs."""

import inspect
from threading import Thread

import pytest
import torch

from torchpar.ptx import emulate
from torchpar.ptx.cuda.stand_in import cuda_is_cpu


def ones(*shape):
    return torch.ones(*shape, device="cuda")


def marked(function, mark):
    lines, first = inspect.getsourcelines(function)
    return [(__file__, first + n) for n, line in enumerate(lines) if mark in line]


def forgotten_fork():
    """A wait before the replay, as for a missing one there, does not mend it."""
    x, other, graph = ones(4), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with torch.cuda.stream(other):
            z = x.sin()  # fault
        z.sum()  # earlier
    for _ in range(2):
        graph.replay()


def forgotten_fork_of_a_temporary():
    x, other, graph = ones(4), torch.cuda.Stream(), torch.cuda.CUDAGraph()

    def step():
        with torch.cuda.stream(other):
            z = x.sin()  # fault
        return x + z  # earlier

    with torch.cuda.graph(graph):
        step()
    graph.replay()


def forgotten_fork_in_place():
    x, z, other, graph = ones(4), ones(4), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with torch.cuda.stream(other):
            z.copy_(x)  # fault
        z + 1  # earlier
    graph.replay()


def forgotten_fork_without_use():
    x, other, graph = ones(4), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # earlier
        x + 1
        with torch.cuda.stream(other):
            x.sin().cos()  # fault
    graph.replay()


FORGOTTEN = {
    "read": (forgotten_fork, "error"),
    "freed": (forgotten_fork_of_a_temporary, "error"),
    "in place": (forgotten_fork_in_place, "error"),
    "unused": (forgotten_fork_without_use, "warning"),
}


@pytest.mark.parametrize("name", FORGOTTEN)
def test_work_beside_a_capture_is_named_once_at_its_line(name):
    function, kind = FORGOTTEN[name]
    with emulate() as gpu, cuda_is_cpu(gpu):
        function()
    (fault,) = gpu.faults
    assert (fault.kind, fault.name) == (kind, "work that is not captured")
    assert [fault.source] == marked(function, "# fault")
    assert [fault.earlier[1]] == marked(function, "# earlier")
    assert "other.wait_stream(torch.cuda.current_stream()) before it" in fault.message


def test_a_join_without_a_fork_has_advice_on_the_fork():
    with emulate() as gpu, cuda_is_cpu(gpu):
        x, other = ones(4), torch.cuda.Stream()

        def join():
            with torch.cuda.stream(other):
                x.sin()
            torch.cuda.current_stream().wait_stream(other)

        fork = r"call other\.wait_stream\(torch\.cuda\.current_stream\(\)\) before that work"
        with pytest.raises(RuntimeError, match=fork), torch.cuda.graph(torch.cuda.CUDAGraph()):
            join()
    assert [one.name for one in gpu.faults] == ["wait in a capture"]


def test_a_loader_beside_a_capture_is_right():
    """It works in a thread of its own, or copies by a stream of its own."""
    with emulate() as gpu, cuda_is_cpu(gpu):
        x, kept, other = ones(4), [], torch.cuda.Stream()
        host, on_device = torch.full((4,), 3.0).pin_memory(), ones(4)

        def load():
            with torch.cuda.stream(torch.cuda.Stream()):
                kept.append(host.cuda(non_blocking=True) / 2)

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            thread = Thread(target=load)
            thread.start()
            thread.join()
            with torch.cuda.stream(other):
                x.copy_(host, non_blocking=True)
                kept += [host.cuda(non_blocking=True), on_device.clone()]
            y = x + 1
        torch.cuda.current_stream().wait_stream(other)
        graph.replay()
        assert y.eq(4).all()
    assert gpu.faults == []
