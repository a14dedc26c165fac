# SPDX-License-Identifier: MIT
"""CUDA graphs on a CPU whose captures use several streams: forgotten forks, and right programs."""

import inspect
from threading import Thread

import pytest
import torch
import triton
import triton.language as tl

from nogpu import emulate
from nogpu.cuda.stand_in import cuda_is_cpu


@triton.jit
def add_one(x, out, first, n, BLOCK: tl.constexpr):
    i = first + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n) + 1, mask=i < n)


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


def read_before_written():
    """The other stream waits before the tensor is written, and not after it."""
    x, h, other, graph = ones(4), ones(4), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        other.wait_stream(torch.cuda.current_stream())
        h.copy_(x)  # earlier
        with torch.cuda.stream(other):
            h + 1  # fault
        torch.cuda.current_stream().wait_stream(other)
    graph.replay()


def written_while_read():
    x, other, graph = ones(4), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            x + 1  # earlier
        x.zero_()  # fault
        torch.cuda.current_stream().wait_stream(other)
    graph.replay()


def read_before_launched():
    x, h, other, graph = ones(4), ones(4), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            add_one[(1,)](x, h, 0, 4, BLOCK=4)  # earlier
        add_one[(1,)](h, x, 0, 4, BLOCK=4)  # fault
        torch.cuda.current_stream().wait_stream(other)
    graph.replay()


def indexed_on_two_streams():
    """The rows may be different ones."""
    x, i, other, graph = ones(4), ones(4).long(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        other.wait_stream(torch.cuda.current_stream())
        x.index_copy_(0, i, x + 1)  # earlier
        with torch.cuda.stream(other):
            x.index_copy_(0, i, ones(4))  # fault
        torch.cuda.current_stream().wait_stream(other)
    graph.replay()


def certain_after_assumed():
    x, i, other, graph = ones(4), ones(4).long(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        other.wait_stream(torch.cuda.current_stream())
        x.index_fill_(0, i, 2.0)
        x.add_(1)  # earlier
        with torch.cuda.stream(other):
            x + 1  # fault
        torch.cuda.current_stream().wait_stream(other)
    graph.replay()


def indices_written_while_read():
    """What an operator with indices uses wholly is not assumed."""
    x, i, other, graph = ones(4), ones(4).long(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        other.wait_stream(torch.cuda.current_stream())
        x.index_select(0, i)  # earlier
        with torch.cuda.stream(other):
            i.zero_()  # fault
        torch.cuda.current_stream().wait_stream(other)
    graph.replay()


def streams_of_a_loop():
    x, streams = ones(4), [torch.cuda.Stream() for _ in range(2)]
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        for one in streams:
            one.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(one):
                x.add_(1)  # fault and # earlier
        for one in streams:
            torch.cuda.current_stream().wait_stream(one)


ASSUMED = ("launches", "indices")
RACES = {
    "loop": (
        streams_of_a_loop,
        "and another stream writes it, without an order in a replay; call "
        "stream.wait_stream(other)",
    ),
    "indices": (indexed_on_two_streams, "may write a tensor of float32 [4]"),
    "certain": (certain_after_assumed, "reads a tensor of float32 [4]"),
    "whole indices": (indices_written_while_read, "writes a tensor of int64 [4]"),
    "read": (read_before_written, "call other.wait_stream(torch.cuda.current_stream()) between"),
    "written": (written_while_read, "call torch.cuda.current_stream().wait_stream(other) between"),
    "launches": (read_before_launched, "call torch.cuda.current_stream().wait_stream(other)"),
}


@pytest.mark.parametrize("name", RACES)
def test_two_streams_of_a_capture_without_an_order_are_named(name):
    function, advice = RACES[name]
    with emulate() as gpu, cuda_is_cpu(gpu):
        function()
    (fault,) = gpu.faults
    kind = "warning" if name in ASSUMED else "error"
    assert (fault.kind, fault.name) == (kind, "missing wait")
    assert [fault.source] == marked(function, "# fault")
    assert [fault.earlier[1]] == marked(function, "# earlier")
    assert advice in fault.message


def test_two_streams_of_a_capture_may_have_parts_of_one_tensor():
    """Columns, which lie between each other, and what two launches write of one operand."""
    with emulate() as gpu, cuda_is_cpu(gpu):
        z, h, x = ones(4, 4), ones(8), ones(1)
        other, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            event = torch.cuda.current_stream().record_event()
            z[:, :2].add_(x.expand(4, 2))
            add_one[(1,)](h, h, 0, 4, BLOCK=4)
            other.wait_event(event)
            with torch.cuda.stream(other):
                z[:, 2:].mul_(x.expand(4, 2))
                add_one[(1,)](h, h, 4, 8, BLOCK=4)
            torch.cuda.current_stream().wait_stream(other)
            y = z.sum() + h.sum()
        graph.replay()
        assert y == 8 + 16 + 16
    assert gpu.faults == []


def layer():
    p = ones(4).requires_grad_()
    return p, ones(4)


def kept_loss():
    p, x = layer()
    loss = (p * x).sum()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):  # earlier
        (p * x).sum().backward()  # fault
    return loss


def forward_pass_before():
    p, x = layer()
    loss = (p * x).sum()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):  # earlier
        loss.backward()  # fault


def gradient_of_an_earlier_result():
    p, x = layer()
    y = p * x
    with torch.cuda.graph(torch.cuda.CUDAGraph()):  # earlier
        torch.autograd.grad(y, p, x)  # fault


STALE = {
    "loss": (kept_loss, "AccumulateGrad on the default stream"),
    "forward pass": (forward_pass_before, "SumBackward0 on the default stream"),
    "result": (gradient_of_an_earlier_result, "MulBackward0 on the default stream"),
}


@pytest.mark.parametrize("name", STALE)
def test_a_backward_pass_by_nodes_of_the_default_stream_is_refused(name):
    """A captured stream must not let the default one wait (pytorch#180090)."""
    function, what = STALE[name]
    with (
        emulate() as gpu,
        cuda_is_cpu(gpu),
        pytest.raises(RuntimeError, match="has a stale reference to the default stream"),
    ):
        function()
    (fault,) = gpu.faults
    assert (fault.kind, fault.name) == ("error", "stale stream in a capture")
    assert [fault.source] == marked(function, "# fault")
    assert [fault.earlier[1]] == marked(function, "# earlier")
    assert what in fault.message


def deleted(p, x):
    """The nodes end with the last result of their forward pass."""
    losses = [(p * x).sum()]
    losses.clear()
    yield


def on_another_stream(p, x):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        loss = (p * x).sum()
    torch.cuda.current_stream().wait_stream(side)
    yield
    del loss


def without_gradients(p, x):
    with torch.no_grad():
        y = p * x
    z = (p * x).detach()
    yield
    del y, z


def of_another_parameter(p, x):
    loss = (p.detach().requires_grad_() * x).sum()
    yield
    del loss


def on_the_host(p, x):
    loss = torch.ones(4, requires_grad=True).sum()
    yield
    loss.backward()


def overridden(p, x):
    loss = (p * x).sum()
    torch.autograd.graph.set_override_stale_capture_stream(True)
    yield
    torch.autograd.graph.set_override_stale_capture_stream(False)
    del loss


FRESH = [deleted, on_another_stream, without_gradients, of_another_parameter, on_the_host]
if hasattr(torch.autograd.graph, "set_override_stale_capture_stream"):  # since torch 2.14
    FRESH.append(overridden)


def fresh(case):
    """Capture a backward pass after a warm-up, and return its gradient."""
    p, x = layer()
    graph, warm_up = torch.cuda.CUDAGraph(), FRESH[case](p, x)
    next(warm_up)
    with torch.cuda.graph(graph):
        (p * x).sum().backward()
    next(warm_up, None)
    graph.replay()
    return p.grad


@pytest.mark.parametrize("case", range(len(FRESH)), ids=[one.__name__ for one in FRESH])
def test_a_backward_pass_by_new_nodes_is_captured(case):
    with emulate() as gpu, cuda_is_cpu(gpu):
        assert torch.equal(fresh(case), ones(4))
    assert gpu.faults == []
