# SPDX-License-Identifier: MIT
"""CUDA graphs on a CPU: programs with one fault each, which is named at its line, and right ones.

The line with the fault ends in ``# fault``; that of the capture which it names, in ``# captured``.
"""

import copy
import inspect
import os

import pytest
import torch
import triton
import triton.language as tl
from torch import nn

import torchpar
from torchpar.ptx import emulate
from torchpar.ptx.cuda import cuda_is_cpu

RAISES = "operation not permitted when stream is capturing"


@triton.jit
def scale(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, 2 * tl.load(x + i, mask=i < n), mask=i < n)


def numbers(*shape):
    return torch.randn(*shape, device="cuda")


def capture(function):
    """Capture a function as PyTorch's documentation does: warm-up on a side stream first."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


def item():
    x = numbers(4)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):  # captured
        x.sum().item()  # fault


def condition():
    x = numbers(4)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):  # captured
        if x.sum() > 0:  # fault
            x.add_(1)


def to_host():
    x = numbers(4)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):  # captured
        x.cpu()  # fault


def as_list():
    x = numbers(4)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):  # captured
        x.exp().tolist()  # fault


def printed():
    x = numbers(4)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):  # captured
        print(x + 1)  # fault


def mask():
    x = numbers(4)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):  # captured
        x[x > 0]  # fault


def positions():
    x = numbers(4)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):  # captured
        x.nonzero()  # fault


def synchronize():
    x = numbers(4)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):  # captured
        x.add_(1)
        torch.cuda.synchronize()  # fault


def wait_for_event():
    x, event = numbers(4), torch.cuda.Event()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):  # captured
        x.add_(1)
        event.record()
        event.synchronize()  # fault


def from_host():
    x, batch = numbers(4), torch.ones(4)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):  # captured
        x.copy_(batch)  # fault


def from_numbers():
    x = numbers(4)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):  # captured
        x.add_(torch.tensor([1.0, 2, 3, 4], device="cuda"))  # fault


def clipped_by_a_condition():
    """In a function of PyTorch's, the line is that of its call."""
    model = nn.Linear(4, 4).cuda()
    x = numbers(2, 4)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):  # captured
        model(x).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)  # fault


def optimizer_on_the_host():
    p = nn.Parameter(numbers(4))
    optimizer = torch.optim.AdamW([p])
    with torch.cuda.graph(torch.cuda.CUDAGraph()):  # captured
        p.sum().backward()
        optimizer.step()  # fault


def generator_of_its_own():
    x, generator = numbers(4), torch.Generator(device="cuda")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):  # captured
        x.normal_(generator=generator)  # fault


def unjoined_stream():
    x, other = numbers(4), torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # fault # captured
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            x.add_(1)


FORBIDDEN = {
    "item": (item, "read-back in a capture"),
    "bool": (condition, "read-back in a capture"),
    "cpu": (to_host, "read-back in a capture"),
    "tolist": (as_list, "read-back in a capture"),
    "print": (printed, "read-back in a capture"),
    "mask": (mask, "read-back in a capture"),
    "nonzero": (positions, "read-back in a capture"),
    "synchronize": (synchronize, "wait in a capture"),
    "event": (wait_for_event, "wait in a capture"),
    "host's memory": (from_host, "host's copy in a capture"),
    "Python's numbers": (from_numbers, "host's copy in a capture"),
    "a function's": (clipped_by_a_condition, "read-back in a capture"),
    "optimizer": (optimizer_on_the_host, "optimizer that is not capturable"),
    "generator": (generator_of_its_own, "unregistered generator"),
    "unjoined": (unjoined_stream, "unjoined work"),
}


def rebound_input():
    x = numbers(4)
    graph, out = capture(lambda: x * 2)  # captured
    x = numbers(4)
    graph.replay()  # fault
    return out


def freed_gradients():
    p = nn.Parameter(numbers(4))
    p.sum().backward()
    optimizer = torch.optim.SGD([p], lr=0.1, foreach=False)
    graph, _ = capture(lambda: optimizer.step())  # captured
    optimizer.zero_grad()
    p.sum().backward()
    graph.replay()  # fault


def gradients_made_anew():
    model = nn.Linear(4, 1).cuda()
    x = numbers(2, 4)

    def backward():
        model.zero_grad()
        model(x).sum().backward()  # captured

    graph, _ = capture(backward)
    model.zero_grad()
    model(x).sum().backward()
    graph.replay()  # fault


def replaced_parameter():
    model = nn.Linear(4, 1, bias=False).cuda()
    x = numbers(2, 4)
    graph, out = capture(lambda: model(x))  # captured
    model.weight.data = numbers(1, 4)
    graph.replay()  # fault


def rate_of_python():
    p = nn.Parameter(numbers(4))
    optimizer = torch.optim.SGD([p], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    def step():
        optimizer.zero_grad()
        p.sum().backward()
        optimizer.step()  # captured

    graph, _ = capture(step)
    graph.replay()
    scheduler.step()
    graph.replay()  # fault


def read_too_early():
    x = numbers(4)
    _, out = capture(lambda: x + 1)  # captured
    assert out.isnan().all()  # fault


def state_without_warm_up():
    p = nn.Parameter(numbers(4))
    optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    p.sum().backward()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()  # fault


def read_after_reset():
    x = numbers(4)
    graph, out = capture(lambda: x + 1)  # captured
    graph.replay()
    graph.reset()
    return out.clone()  # fault


def shared_pool():
    x, y = numbers(4), numbers(4)
    one, two = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(one):
        x.copy_(x * 2)  # its product is freed here
    with torch.cuda.graph(two, pool=one.pool()):
        out = y + 1
    two.replay()
    one.replay()  # captured
    return out.clone()  # fault


def input_of_another_stream():
    x, side = numbers(4), torch.cuda.Stream()
    graph, out = capture(lambda: x + 1)  # captured
    with torch.cuda.stream(side):
        x.copy_(numbers(4))
    graph.replay()  # fault


def result_on_another_stream():
    x, side = numbers(4), torch.cuda.Stream()
    graph, out = capture(lambda: x + 1)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        graph.replay()  # captured
    return out.clone()  # fault


def input_written_too_early():
    x, side = numbers(4), torch.cuda.Stream()
    graph, out = capture(lambda: x + 1)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        graph.replay()  # captured
    x.copy_(numbers(4))  # fault


def nothing():
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # fault
        pass


WRONG = {
    "x = new": (rebound_input, "freed input"),
    "grad = None": (freed_gradients, "freed input"),
    "grad of the graph": (gradients_made_anew, "replaced gradient"),
    "p.data = new": (replaced_parameter, "freed input"),
    "lr": (rate_of_python, "number in a graph"),
    "too early": (read_too_early, "result before a replay"),
    "momentum": (state_without_warm_up, "state made in a capture"),
    "reset": (read_after_reset, "result of a reset graph"),
    "pool": (shared_pool, "overwritten result"),
    "no wait for an input": (input_of_another_stream, "missing wait"),
    "no wait for a result": (result_on_another_stream, "missing wait"),
    "no wait for a replay": (input_written_too_early, "missing wait"),
    "empty": (nothing, "empty graph"),
}
WARNINGS = ("number in a graph", "result of a reset graph", "empty graph")


def marked(function, mark):
    lines, first = inspect.getsourcelines(function)
    return [first + n for n, line in enumerate(lines) if mark in line]


def check(fault, function, name):
    assert fault.name == name
    assert fault.kind == ("warning" if name in WARNINGS else "error")
    assert [fault.source] == [(__file__, line) for line in marked(function, "# fault")]
    if fault.earlier is not None or marked(function, "# captured"):
        assert [fault.earlier[1]] == [(__file__, n) for n in marked(function, "# captured")]


@pytest.mark.parametrize("case", FORBIDDEN)
def test_what_a_capture_forbids_is_named_at_its_line(case):
    """An error is raised, too, as on a GPU; and memory and random numbers are as before."""
    function, name = FORBIDDEN[case]
    with emulate() as gpu, cuda_is_cpu(gpu):
        with pytest.raises(RuntimeError, match="CUDA error: "):
            function()
        assert not torch.cuda.is_current_stream_capturing()
    (fault,) = gpu.faults
    check(fault, function, name)


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty", "ignore:Detected call of")
def test_what_a_replay_does_wrong_is_named_at_its_line(case):
    function, name = WRONG[case]
    with emulate() as gpu, cuda_is_cpu(gpu):
        function()
    (fault,) = gpu.faults
    check(fault, function, name)
