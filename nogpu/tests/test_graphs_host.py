# SPDX-License-Identifier: MIT
"""CUDA graphs on a CPU that take something of the host: a copy, an index, a length, or a number.

Each case is a function of a tensor of the device and of one of the host, on a line of its own.
"""

import inspect
import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nogpu import emulate
from nogpu.cuda.stand_in import cuda_is_cpu

COPY, READ = "host's copy in a capture", "read-back in a capture"
WAITS = "CUDA error: operation not permitted when stream is capturing: "
UNPINNED = (
    "Cannot copy between CPU and CUDA tensors during CUDA graph capture unless the CPU tensor is "
    "pinned: "
)
VALUES, WORK = "host's values in a graph", "host's work in a capture"
pack, pad = nn.utils.rnn.pack_padded_sequence, nn.utils.rnn.pad_packed_sequence


def floats():
    return torch.tensor([1.0, -2.0, 3.0, 0.5], device="cuda")


def one():
    return torch.tensor(0.5)


def two():
    return torch.tensor([0.5, 2.0])


def three():
    return torch.tensor(3)


def index():
    return torch.tensor([1, 2])


def mask():
    return torch.tensor([True, False, True, False])


def four():
    return torch.ones(4)


def pinned():
    return torch.arange(4.0).pin_memory()


def on_device():
    return torch.arange(2, device="cuda")


def put(x, i, value):
    x[i] = value
    return x


def weights():
    return nn.Linear(2, 2).state_dict()


def in_block():
    with torch.device("cuda"):
        return torch.tensor([1.0])


# What is refused in a capture alone: copies from or to memory that is not pinned, by PyTorch, and
# others that the program waits for, by the GPU.
REFUSED = {
    "index": (lambda x, h: x[h], index, COPY),
    "index by name": (lambda x, h: x[h], lambda: torch.tensor([1, 2], device="cpu"), COPY),
    "device": (
        lambda x, h: x[h],
        lambda: torch.ones(2, dtype=int, device=torch.device("cpu")),
        COPY,
    ),
    "copied index": (lambda x, h: x[h], lambda: on_device().to("cpu"), COPY),
    "pinned index": (lambda x, h: x[h], lambda: index().pin_memory(), COPY, WAITS),
    "two indices": (lambda x, h: x.view(2, 2)[on_device(), h - 1], index, COPY),
    "index_put_": (lambda x, h: x.index_put_((h,), x.clone()[:2]), index, COPY),
    "accumulated": (lambda x, h: x.index_put((h,), x[:2], True), index, COPY),
    "list": (lambda x, h: x[[1, 2]], None, COPY),
    "list in a tuple": (lambda x, h: x.view(2, 2)[:, [1, 0]], None, COPY),
    "range": (lambda x, h: x[range(2)], None, COPY),
    "ndarray": (lambda x, h: x[h], lambda: np.array([1, 2]), COPY),
    "put by list": (lambda x, h: put(x, [1, 2], x.clone()[:2]), None, COPY),
    "number by index": (lambda x, h: x.__setitem__(on_device(), 1.0), None, COPY),
    "host's by index": (lambda x, h: x.__setitem__(on_device(), h), one, COPY),
    "number by mask": (lambda x, h: x.__setitem__(h, 1.0), mask, COPY),
    "where": (lambda x, h: torch.where(x > 0, h, x), one, COPY),
    "condition": (lambda x, h: torch.where(h > 0, x, x + 1), one, COPY),
    "probability": (lambda x, h: x.bernoulli_(h), one, COPY),
    "probabilities": (lambda x, h: x.bernoulli_(h), four, COPY),
    "scatter": (lambda x, h: x.slice_scatter(h, 0, 0, 2), two, COPY),
    "lists": (lambda x, h: torch._foreach_copy_([x], [h]), four, COPY),
    "copy_": (lambda x, h: x.copy_(h), four, COPY),
    "pinned copy_": (lambda x, h: x.copy_(h), pinned, COPY, WAITS),
    "pinned to host": (lambda x, h: h.copy_(x), pinned, COPY, WAITS),
    "pinned copy_ of another type": (lambda x, h: x.double().copy_(h), pinned, COPY),
    # PyTorch brings these in order by memory that is not pinned.
    "pinned, every other": (lambda x, h: h[::2].to("cuda", non_blocking=True), pinned, COPY),
    "pinned, repeated": (lambda x, h: h.expand(3, 4).cuda(non_blocking=True), pinned, COPY),
    "pinned, to a row each": (
        lambda x, h: x.expand(3, 4).clone().copy_(h, non_blocking=True),
        pinned,
        COPY,
    ),
    "pinned, one number": (lambda x, h: x.copy_(h[0], non_blocking=True), pinned, COPY),
    "pinned, transposed": (
        lambda x, h: x.view(2, 2).copy_(h.view(2, 2).t(), non_blocking=True),
        pinned,
        COPY,
    ),
    "pinned, transposed, of another type": (
        lambda x, h: h.view(2, 2).t().to("cuda", torch.float64, non_blocking=True),
        pinned,
        COPY,
    ),
    "into every other": (lambda x, h: h[::2].copy_(x[:2], non_blocking=True), pinned, COPY),
    "to the host, transposed, of another type": (
        lambda x, h: x.view(2, 2).t().to("cpu", torch.float64, non_blocking=True),
        None,
        COPY,
    ),
    "one number": (lambda x, h: x.copy_(h), one, COPY),
    "module": (lambda x, h: h.cuda(), lambda: nn.Linear(2, 2), COPY),
    "module to": (lambda x, h: h.to(x.device), lambda: nn.Linear(2, 2), COPY),
    "weights": (lambda x, h: nn.Linear(2, 2, device="cuda").load_state_dict(h), weights, COPY),
    "NumPy": (lambda x, h: torch.from_numpy(h).cuda(), lambda: np.ones(2), COPY),
    "like": (lambda x, h: h.to(x), four, COPY),
    "type_as": (lambda x, h: h.type_as(x), four, COPY),
    "tensor": (lambda x, h: torch.tensor(1.0, device="cuda"), None, COPY),
    "mask in a list": (lambda x, h: x[[True, False, True, False]], None, COPY),
    "put by a mask in a list": (lambda x, h: put(x, [True] * 4, 0.0), None, COPY),
    "element of the host": (lambda x, h: put(x, 0, h[0]), two, COPY),
    "affine_grid": (
        lambda x, h: F.affine_grid(x.view(1, 2, 2).repeat(1, 1, 2)[..., :3], (1, 1, 1, 4), False),
        None,
        COPY,
    ),
    "sparse": (
        lambda x, h: torch.sparse_coo_tensor([[0, 1]], [1.0, 2.0], (3,), device="cuda"),
        None,
        COPY,
    ),
    "pageable copy_": (lambda x, h: x.copy_(h, non_blocking=True), four, COPY),
    "pageable to host": (lambda x, h: h.copy_(x, non_blocking=True), four, COPY),
    "pageable cuda": (lambda x, h: h.cuda(non_blocking=True), four, COPY),
    "to": (lambda x, h: h.to("cuda"), four, COPY),
    "slice": (lambda x, h: x.__setitem__(slice(0, 2), h), two, COPY),
    "as_tensor": (lambda x, h: torch.as_tensor(h, device="cuda"), lambda: np.ones(2), COPY),
    "new": (lambda x, h: x.new([1.0, 2.0]), None, COPY),
    "new_tensor": (lambda x, h: x.new_tensor([1.0]), None, COPY),
    "block": (lambda x, h: in_block(), None, COPY),
    "lengths": (lambda x, h: pack(x.view(2, 2, 1), h, True, False), index, COPY),
    "value": (lambda x, h: x.masked_fill(x > 0, x.sum()), None, READ, WAITS),
    "fill": (lambda x, h: x.index_fill(0, on_device(), x.sum()), None, READ, WAITS),
    "start": (lambda x, h: torch.linspace(x.sum(), 1, 4), None, READ, WAITS),
    "cpu": (lambda x, h: x.cpu(), None, READ),
    "back": (lambda x, h: x.to(h), four, READ),
    "into host": (lambda x, h: h.__setitem__(torch.tensor([0]), x[0]), two, READ),
}


# What a graph keeps as it was in the capture, and how the program changes the tensor then.
KEPT = {
    "product": (lambda x, h: x * h, one, lambda h: h.fill_(2)),
    "negative": (lambda x, h: x * (-h), one, lambda h: h.fill_(2)),
    "element": (lambda x, h: x * h[1], two, lambda h: h.fill_(3)),
    "sum": (lambda x, h: x * h.sum(), two, lambda h: h.fill_(3)),
    "item": (lambda x, h: x * h.item(), one, lambda h: h.fill_(2)),
    "tolist": (lambda x, h: x * h.tolist()[0], two, lambda h: h.fill_(2)),
    "numpy": (lambda x, h: x * float(h.numpy()[0]), two, lambda h: h.fill_(2)),
    "condition": (lambda x, h: x + 1 if h > 0 else x, one, lambda h: h.neg_()),
    "masked_fill": (lambda x, h: x.masked_fill(x > 0, h), one, lambda h: h.fill_(2)),
    "index_fill": (lambda x, h: x.index_fill(0, on_device(), h), one, lambda h: h.fill_(2)),
    "put by mask": (lambda x, h: put(x + 0, x > 0, h), one, lambda h: h.fill_(2)),
    "lerp": (lambda x, h: torch.lerp(x, x + 1, h), one, lambda h: h.fill_(2)),
    "fill_": (lambda x, h: torch.empty_like(x).fill_(h), one, lambda h: h.fill_(2)),
    "slice": (lambda x, h: put(x + 0, slice(0, 2), h), one, lambda h: h.fill_(2)),
    "alpha": (lambda x, h: x.add(x, alpha=h), one, lambda h: h.fill_(2)),
    "list": (lambda x, h: torch._foreach_mul([x], h)[0], one, lambda h: h.fill_(2)),
    "full": (lambda x, h: torch.full((4,), h, device="cuda"), one, lambda h: h.fill_(2)),
    "linspace": (lambda x, h: torch.linspace(h, 1, 4, device="cuda"), one, lambda h: h.fill_(2)),
    "position": (lambda x, h: x[h] + 0, three, lambda h: h.fill_(1)),
    "bound": (lambda x, h: x[:h] + 0, three, lambda h: h.fill_(1)),
    "narrow": (lambda x, h: x.narrow(0, h, 1) + 0, three, lambda h: h.fill_(1)),
    "roll": (lambda x, h: x.roll(h), three, lambda h: h.fill_(1)),
    "sizes": (lambda x, h: x.split([*h, 1])[0] + 0, index, lambda h: h.copy_(h.flip(0))),
    "places": (lambda x, h: x.tensor_split(h)[0] + 0, index, lambda h: h.fill_(3)),
    "mask": (lambda x, h: x[h], mask, lambda h: h.logical_not_()),
    "put by host's mask": (lambda x, h: put(x + 0, h, x[:2]), mask, lambda h: h.logical_not_()),
    "lengths": (lambda x, h: pack(x.view(2, 2, 1), h.flip(0))[0], index, lambda h: h.fill_(2)),
    "weight": (
        lambda x, h: F.binary_cross_entropy_with_logits(x, x, pos_weight=h),
        one,
        Tensor.zero_,
    ),
    "pinned": (lambda x, h: x + h.pin_memory().to("cuda", non_blocking=True), four, Tensor.zero_),
}


def make(host):
    return None if host is None else host()


def capture(function, x, h):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(x, h)
    return graph, out


def captured(case):
    """Capture what is refused."""
    function, host, *_ = REFUSED[case]
    capture(function, floats(), make(host))


def kept(case):
    """Check that replays have the values of the host that the capture had."""
    function, host, change = KEPT[case]
    x, h = floats(), host()
    expected = function(x, h)
    graph, out = capture(function, x, h)
    for _ in range(2):
        graph.replay()
        assert torch.equal(out, expected)
    yield
    change(h)
    assert not torch.equal(function(x, h), expected)
    x.mul_(2)
    graph.replay()  # changed
    assert torch.equal(out, function(x, host()))


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_what_a_capture_would_copy_is_refused_at_its_line(case):
    function, host, name, *words = REFUSED[case]
    with emulate() as gpu, cuda_is_cpu(gpu):
        function(floats(), make(host))
        with pytest.raises(RuntimeError, match=re.escape((*words, UNPINNED)[0])):
            captured(case)
    (fault,) = gpu.faults
    assert (fault.kind, fault.name) == ("error", name)
    assert fault.source[0] == __file__
    assert fault.source[1] in (line_of(function), line_of(put) + 1, line_of(in_block) + 2)


def line_of(function):
    return inspect.getsourcelines(function)[1]


@pytest.mark.parametrize("case", KEPT)
def test_what_a_graph_keeps_of_the_host_is_named_when_it_has_changed(case):
    function = KEPT[case][0]
    with emulate() as gpu, cuda_is_cpu(gpu):
        steps = kept(case)
        next(steps)
        assert gpu.faults == []
        assert next(steps, None) is None
    (fault,) = gpu.faults
    lines = inspect.getsource(kept).splitlines()
    line = line_of(kept) + next(n for n, text in enumerate(lines) if "# changed" in text)
    assert (fault.kind, fault.name, fault.source) == ("warning", VALUES, (__file__, line))
    word, place = fault.earlier
    assert (word, place[0]) == ("captured", __file__)
    assert place[1] in (line_of(function), line_of(put) + 1)


def test_a_pinned_tensor_is_read_at_each_replay():
    """Also in its type; and what the capture itself has pinned lives as long as the graph."""
    with emulate() as gpu, cuda_is_cpu(gpu):
        x, h = floats(), torch.ones(4, pin_memory=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            x.copy_(h, non_blocking=True)
            double = h.to("cuda", torch.float64, non_blocking=True)
            kept = torch.tensor([7.0, 8.0]).pin_memory().cuda(non_blocking=True)
        for number in (1.0, 5.0):
            h.fill_(number)
            graph.replay()
            assert x.tolist() == double.tolist() == [number] * 4
            assert kept.tolist() == [7.0, 8.0]
    assert gpu.faults == []


@pytest.mark.parametrize("is_empty", [False, True])
def test_a_pinned_tensor_in_the_order_of_the_device_is_copied(is_empty):
    """In either direction and to another type; each replay reads and writes it."""
    with emulate() as gpu, cuda_is_cpu(gpu):
        x, h = torch.zeros(3, 2, device="cuda"), torch.ones(2, 3, pin_memory=True).t()
        back, strided = torch.zeros(3, 2).pin_memory(), torch.zeros(3, 4, device="cuda")[:, ::2]
        if is_empty:
            x, h, back, strided = (t[:0] for t in (x, torch.ones(3, 2)[:, :1], back, strided))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            there = h.to("cuda", non_blocking=True)
            x.copy_(there * 2 if not is_empty else h, non_blocking=True)
            strided.copy_(back, non_blocking=True)
            back.copy_(x.double(), non_blocking=True)
            now = x.t().to("cpu", non_blocking=True)
        for number in (1.0, 5.0):
            before = back.clone()
            h.fill_(number)
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(x, torch.full_like(x, 2 * number))
            assert torch.equal(strided.cpu(), before)
            assert torch.equal(back, x.cpu())
            assert torch.equal(now, x.t().cpu())
    assert gpu.faults == []


def test_lengths_in_a_list_are_kept_for_a_recurrent_network():
    """PyTorch makes a tensor of the host, and it is gone after the capture."""
    with emulate() as gpu, cuda_is_cpu(gpu):
        rnn, x = nn.GRU(3, 5, batch_first=True).cuda(), torch.randn(4, 6, 3, device="cuda")

        def forward():
            out, hidden = rnn(pack(x, [6, 5, 3, 2], batch_first=True))
            padded, lengths = pad(out, batch_first=True)
            assert lengths.tolist() == out.batch_sizes.new_tensor([6, 5, 3, 2]).tolist()
            assert out.batch_sizes.tolist() == [4, 4, 3, 2, 2, 1]
            return padded * 2, out.data + 1, hidden, lengths

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = forward()
        assert found[3].tolist() == [6, 5, 3, 2]
        for _ in range(2):
            x.normal_()
            graph.replay()
            for one, other in zip(found, forward(), strict=True):
                assert torch.equal(one, other)
    assert gpu.faults == []


def test_each_use_of_a_number_of_the_host_has_its_value_then():
    with emulate() as gpu, cuda_is_cpu(gpu):
        x, h, graph = floats(), torch.tensor(2.0), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            one = x * h
            h.add_(1)
            other = x * h
            third = x * (h + 1)
        graph.replay()
        for out, factor in ((one, 2), (other, 3), (third, 4)):
            assert torch.equal(out, x * factor)
    assert gpu.faults == []


def test_what_a_capture_changes_on_the_host_is_named_from_the_second_replay_on():
    """The first replay and the host's work are one call."""
    with emulate() as gpu, cuda_is_cpu(gpu):
        x, count, same, graph = floats(), torch.tensor(0), torch.ones(2), torch.cuda.CUDAGraph()
        scratch = torch.zeros(2)
        with torch.cuda.graph(graph):
            first = inspect.currentframe().f_lineno + 1
            count += 1
            same.fill_(1.0)
            scratch = torch.tensor([1.0, 2.0])
            scratch.mul_(2)
            x.add_(1)
        graph.replay()
        assert gpu.faults == []
        line = inspect.currentframe().f_lineno + 1
        graph.replay()
        assert count == 1
    (fault,) = gpu.faults
    assert (fault.kind, fault.name, fault.source) == ("warning", WORK, (__file__, line))
    assert fault.earlier == ("captured", (__file__, first))
    assert scratch.tolist() == [2.0, 4.0]


def test_tensors_of_the_host_that_no_graph_takes_may_change():
    """Printing takes none either; nor do those that have been freed."""
    with emulate() as gpu, cuda_is_cpu(gpu):
        x, count, shape = floats(), torch.tensor(0), torch.zeros(4)
        gone, graph = torch.tensor(2.0), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            print(count)
            y = x.view_as(shape) * gone + shape.numel() + shape.dim()
        for _ in range(3):
            count += 1
            shape += 1
            gone = torch.tensor(3.0)
            graph.replay()
        assert torch.equal(y, x * 2 + 5)
        assert gone == 3
    assert gpu.faults == []


def test_an_averaged_model_is_refused_whose_count_is_on_the_host():
    """PyTorch copies the count to the device; and one there is read back."""
    with emulate() as gpu, cuda_is_cpu(gpu):
        model = nn.Linear(4, 2).cuda()
        for device in (None, "cuda"):
            average = torch.optim.swa_utils.AveragedModel(model, device=device)
            average.update_parameters(model)
            refused = pytest.raises(RuntimeError, match="call update_parameters after")
            with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
                average.update_parameters(model)
    assert [fault.name for fault in gpu.faults] == [COPY, READ]


def test_a_rate_on_the_host_is_named_once():
    with emulate() as gpu, cuda_is_cpu(gpu):
        p, rate = nn.Parameter(floats()), torch.tensor(0.1)
        optimizer = torch.optim.SGD([p], lr=rate)

        def step():
            optimizer.zero_grad()
            p.sum().backward()
            optimizer.step()

        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        graph.replay()
        rate.fill_(0.2)
        graph.replay()
    assert [fault.name for fault in gpu.faults] == ["number in a graph"]
