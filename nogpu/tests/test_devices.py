# SPDX-License-Identifier: MIT
"""Tensors of the host beside those of the device: what a GPU refuses is refused, and no more.

The line that a GPU refuses ends in ``# refused``.
"""

import copy
import inspect
import io
import re
import threading
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn import functional as F

from nogpu import emulate
from nogpu.cuda import devices
from nogpu.cuda.devices import Devices, devices_of
from nogpu.cuda.operations import OperatorKind
from nogpu.cuda.stand_in import cuda_is_cpu


@triton.jit
def scale(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, 2 * tl.load(x + i, mask=i < n), mask=i < n)


def numbers(*shape, **options):
    return torch.randn(*shape, device="cuda", **options)


# Wrong programs


def a_module():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2).cuda())
    model(numbers(3, 4))  # refused


def a_linear_layer():
    nn.Linear(4, 2)(numbers(3, 4))  # refused


def a_deep_copy():
    copy.deepcopy(torch.zeros(4)) + numbers(4)  # refused


def a_convolution():
    nn.Conv2d(3, 2, 3).cuda()(torch.zeros(1, 3, 8, 8))  # refused


def a_hidden_state():
    nn.LSTM(4, 2).cuda()(numbers(3, 1, 4), (torch.zeros(1, 1, 2), torch.zeros(1, 1, 2)))  # refused


def a_position():
    nn.Embedding(4, 2).cuda()(torch.arange(3))  # refused


def labels():
    F.cross_entropy(numbers(3, 4), torch.zeros(3, dtype=torch.long))  # refused


def labels_of_numpy():
    y = torch.from_numpy(np.zeros(3)).long()
    F.cross_entropy(numbers(3, 4), y)  # refused


def a_batch_of_a_loader():
    data = torch.utils.data.TensorDataset(torch.zeros(6, 4))
    model = nn.Linear(4, 2).cuda()
    for (x,) in torch.utils.data.DataLoader(data, 3):
        model(x)  # refused


def a_mask():
    torch.where(torch.ones(4) > 0, numbers(4), 0.0)  # refused


def a_running_sum():
    total = torch.tensor(0.0)
    total += numbers(4).sum()  # refused


def a_result():
    numbers(4).cpu() * numbers(4)  # refused


def a_list():
    torch.cat([numbers(4), torch.zeros(4)])  # refused


def out():
    torch.add(numbers(4), numbers(4), out=torch.empty(4))  # refused


def a_comparison():
    torch.equal(numbers(4), torch.zeros(4))  # refused


def an_index_of_the_device():
    x = numbers(4)
    torch.zeros(4)[x > 0]  # refused


def values_by_index():
    x = numbers(4)
    x[torch.tensor([0, 1])] = torch.zeros(2)  # refused


def inference():
    model = nn.Linear(4, 2).cuda()
    with torch.inference_mode():
        model(torch.zeros(3, 4))  # refused


def a_backward_pass():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            return gradient * torch.full(gradient.shape, 2.0)  # refused

    Double.apply(numbers(4, requires_grad=True)).sum().backward()


def a_capture():
    x, h = numbers(4), torch.zeros(4)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.add_(h)  # refused


def a_copy_that_is_forgotten():
    h, x = torch.zeros(4), numbers(4)
    h.copy_(x)
    h.add_(x)  # refused


def a_number_as_a_position():
    numbers(4).index_select(0, torch.tensor(1))  # refused


def a_number_as_a_word():
    nn.Embedding(4, 2).cuda()(torch.tensor(1))  # refused


def a_number_as_a_label():
    F.cross_entropy(numbers(4), torch.tensor(1))  # refused


def a_number_among_others():
    torch.stack([numbers(4).sum(), torch.tensor(1.0)])  # refused


def a_number_as_a_bound():
    numbers(4).clamp(min=torch.tensor(0.0))  # refused


def a_number_as_a_bias():
    torch.addmm(torch.tensor(1.0), numbers(2, 2), numbers(2, 2))  # refused


def a_number_as_a_mask():
    numbers(4).masked_fill(torch.tensor(True), 1.0)  # refused


def a_name_of_the_cpu():
    torch.zeros(4, device="cpu") + numbers(4)  # refused


def a_device():
    torch.zeros(4, device=torch.device("cpu")) + numbers(4)  # refused


def a_copy_by_name():
    numbers(4).to("cpu") + numbers(4)  # refused


TWO_DEVICES = "Expected all tensors to be on the same device, but got {} is on {}, different from"
REFUSED = {
    a_module: ("weight", "cpu"),
    a_linear_layer: ("mat1", "cuda:0"),
    a_deep_copy: ("other", "cuda:0"),
    a_convolution: ("weight", "cuda:0"),
    a_hidden_state: (".*", "cpu"),
    a_position: ("indices", "cpu"),
    labels: ("target", "cpu"),
    labels_of_numpy: ("target", "cpu"),
    a_batch_of_a_loader: (".*", ".*"),
    a_mask: ("self", "cuda:0"),
    a_running_sum: ("other", "cuda:0"),
    a_result: ("other", "cuda:0"),
    a_list: ("tensors", "cpu"),
    out: ("out", "cpu"),
    a_comparison: ("other", "cpu"),
    values_by_index: ("values", "cpu"),
    inference: ("weight", "cuda:0"),
    a_backward_pass: ("other", "cpu"),
    a_capture: ("other", "cpu"),
    a_copy_that_is_forgotten: ("other", "cuda:0"),
    a_number_as_a_position: ("index", "cpu"),
    a_number_as_a_word: ("indices", "cpu"),
    a_number_as_a_label: ("target", "cpu"),
    a_number_among_others: ("tensors", "cpu"),
    a_number_as_a_bound: ("min", "cpu"),
    a_number_as_a_bias: ("mat1", "cuda:0"),
    a_number_as_a_mask: ("mask", "cpu"),
    a_name_of_the_cpu: ("other", "cuda:0"),
    a_device: ("other", "cuda:0"),
    a_copy_by_name: ("other", "cuda:0"),
}


def refused_line(program):
    lines, first = inspect.getsourcelines(program)
    (found,) = [first + n for n, line in enumerate(lines) if "# refused" in line]
    return found


def check_refused(program, kind, message):
    with emulate() as gpu, cuda_is_cpu(gpu), pytest.raises(kind, match=message) as caught:
        program()
    frames = traceback.extract_tb(caught.value.__traceback__)
    assert [one.lineno for one in frames if one.filename == __file__][-1] == refused_line(program)


@pytest.mark.parametrize("program", REFUSED)
def test_tensors_of_two_devices_are_refused_at_their_line(program):
    check_refused(program, RuntimeError, TWO_DEVICES.format(*REFUSED[program]))


def test_indices_of_the_device_are_refused_for_a_tensor_of_the_host():
    message = r"indices should be either on cpu or on the same device as the indexed tensor \(cpu\)"
    check_refused(an_index_of_the_device, RuntimeError, message)


def a_launch():
    scale[(1,)](numbers(8), torch.zeros(8), 8, BLOCK=8)  # refused


def test_a_launch_with_a_pointer_to_the_host_is_refused():
    message = r"Pointer argument \(at 1\) cannot be accessed from Triton \(cpu tensor\?\)"
    check_refused(a_launch, ValueError, message + r"; call \.cuda\(\) [^;]*$")


def a_launch_on_the_host():
    scale[(1,)](torch.ones(8), torch.zeros(8), 8, BLOCK=8)  # refused


def test_a_launch_of_tensors_of_the_host_alone_is_told_to_leave_out_the_flag():
    message = r"Pointer argument \(at 0\) .*; or leave out --cuda-is-cpu, if the script makes all"
    check_refused(a_launch_on_the_host, ValueError, message)


def test_a_launch_takes_pinned_memory_and_empty_tensors():
    with emulate() as gpu, cuda_is_cpu(gpu):
        x = torch.arange(8.0).pin_memory()
        for out in (numbers(8), torch.empty(8, pin_memory=True)):
            scale[(1,)](x, out, 8, BLOCK=8)
            assert torch.equal(out.cpu(), 2 * x)
        scale[(1,)](torch.empty(0), torch.empty(0), 0, BLOCK=8)
        device = triton.runtime.driver.active.get_active_torch_device()
        assert device == torch.device("cuda", 0)
        x = torch.ones(8, device=device)
        scale[(1,)](x, x, 8, BLOCK=8)
        assert x.tolist() == [2.0] * 8
    assert gpu.faults == []


# Right programs


def pinned_memory_in_a_hook():
    w = torch.arange(3.0, device="cuda", requires_grad=True)
    with torch.autograd.graph.save_on_cpu(pin_memory=True):
        loss = (w * w * w).sum()
    loss.backward()
    assert w.grad.tolist() == [0.0, 3.0, 12.0]


def numbers_of_the_host():
    x, a = numbers(4), torch.tensor(2.0)
    x.mul_(a).addcmul_(a, x)
    results = (x + a, a - x, x**a, torch.where(x > a, x, a), torch.lerp(x, x, a), x == a)
    results += (torch.full_like(x, 2.0), x.masked_fill(x > 0, a), x.fill_(a), torch.maximum(x, a))
    for one in results:
        one + numbers(4)
    torch.tensor(0.0) + x.sum() + numbers(1)


def copies():
    x, h = numbers(4), torch.zeros(4)
    h.copy_(x)
    x.copy_(h)
    h[0], x[0] = x[0], h[0]
    h[:2], x[:2] = x[:2], h[:2]
    h.fill_(x[0])
    on_host = (h, x.cpu(), x.to("cpu"), x.type_as(h), torch.zeros_like(x, device="cpu"))
    on_host += (h.new_zeros(4), torch.as_tensor(x, device="cpu"), copy.deepcopy(h))
    for one in on_host:
        one + torch.ones(4)
    on_device = (h.to(x), h.to(x.device), h.cuda(), h.type_as(x), torch.as_tensor(h, device="cuda"))
    on_device += (h.new_zeros(4, device="cuda"), torch.zeros_like(h, device="cuda"), x.clone())
    for one in on_device:
        one + x
    h + torch.ones(4)
    assert torch.as_tensor(x, device="cuda") is x
    assert x.device.index == 0


def indices():
    x, h, i = numbers(4, 4), torch.zeros(4, 4), torch.tensor([0, 1])
    x[i] + numbers(2, 4)
    x[i, i], x[torch.tensor([True, False, True, False])], x[torch.tensor(1)]
    x[i], x[i, i] = 0.0, torch.tensor(1.0)
    x[x > 0] = torch.tensor([3.0])
    h[i, i], h[torch.tensor(1, device="cuda")] = x[0, 0], 1.0
    h + torch.ones(4, 4)


def types_of_the_device():
    x, kind = numbers(4), torch.accelerator.current_accelerator().type
    torch.zeros(4, device=kind) + x
    torch.zeros(4).to(x.device.type) + x
    nn.Linear(4, 2).to(kind)(x)


def default_devices():
    with torch.device("cuda"):
        made = torch.zeros(4), torch.tensor([1.0, 2, 3, 4]), nn.Linear(3, 4).bias
    torch.set_default_device("cuda")
    try:
        made += torch.ones(4), torch.tensor([1.0, 2, 3, 4])
    finally:
        torch.set_default_device(None)
    made += (torch.zeros(4).type(torch.cuda.FloatTensor),)
    torch.set_default_tensor_type(torch.cuda.FloatTensor)
    try:
        made += torch.ones(4), torch.cuda.FloatTensor([1, 2, 3, 4])
    finally:
        torch.set_default_tensor_type(torch.FloatTensor)
    for one in made:
        one + numbers(4)


def gradients_between_devices():
    first, second = nn.Linear(4, 4).cuda(), nn.Linear(4, 4)
    second(first(numbers(2, 4)).cpu()).sum().backward()
    first.weight.grad + first.weight
    second.weight.grad + second.weight
    host, losses = torch.ones(4, requires_grad=True), torch.zeros(2)
    (host.cuda() * numbers(4)).sum().backward()
    host.grad + host
    losses[1] = first(numbers(2, 4)).mean()
    losses.sum().backward()
    parameters = [*first.parameters(), *second.parameters()]
    optimizer = torch.optim.AdamW(parameters)
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def training_on_the_host():
    """What autograd allocates in C++ is on the host there."""
    model = nn.Sequential(
        nn.Embedding(5, 6), nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.MaxPool1d(2)
    )
    optimizer = torch.optim.Adam(model.parameters())
    x = torch.randn(4, 5, requires_grad=True)
    for _ in range(2):
        out = model(torch.ones(2, 3, dtype=torch.long))
        (out.max(1)[0].sum() + x.gather(1, torch.zeros(4, 1, dtype=torch.long)).sum()).backward()
        optimizer.step()
        x.grad + torch.ones(4, 5)


def threads():
    made: list[Tensor] = []
    both = ((numbers, 4), (torch.ones, 4))

    def call():
        made.extend(make(size) + 1 for make, size in both)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    for one, (make, size) in zip(made, both, strict=True):
        one + make(size)


def saved():
    buffer = io.BytesIO()
    torch.save(numbers(4), buffer)
    for options, other in (({}, numbers(4)), ({"map_location": "cpu"}, torch.ones(4))):
        buffer.seek(0)
        torch.load(buffer, **options) + other


def lengths_of_the_host():
    x, lengths = numbers(2, 5, 3), torch.tensor([5, 3])
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
    out, counts = nn.utils.rnn.pad_packed_sequence(nn.LSTM(3, 4).cuda()(packed)[0])
    out + numbers(5, 2, 4)
    counts + torch.ones(2)
    logits = numbers(6, 2, 5).log_softmax(2)
    F.ctc_loss(logits, torch.ones(2, 5, dtype=torch.long), torch.tensor([6, 6]), lengths)


def lists():
    a, b = [numbers(3), numbers(3)], [torch.ones(3), torch.ones(3)]
    torch._foreach_copy_(b, a)
    torch._foreach_mul_(a, torch.tensor(2.0))
    sums = torch._foreach_add([a[0], b[0]], [a[1], b[1]])
    sums[0] + a[0]
    sums[1] + torch.ones(3)


def other_layouts():
    x = numbers(3, 3)
    sparse = x.to_sparse()
    (sparse @ x).add(sparse.to_dense()).add(numbers(3, 3))
    sparse.coalesce().indices()[0] + torch.zeros(9, dtype=torch.long, device="cuda")
    torch.fft.fft(x).real + numbers(3, 3)


RIGHT = (
    *(numbers_of_the_host, copies, indices, types_of_the_device, default_devices, saved, lists),
    pinned_memory_in_a_hook,
    *(gradients_between_devices, training_on_the_host, threads, lengths_of_the_host),
    other_layouts,
)


@pytest.mark.parametrize("program", RIGHT)
@pytest.mark.filterwarnings("ignore:torch.set_default_tensor_type", "ignore:Sparse")
def test_what_pytorch_allows_is_not_refused(program):
    with emulate() as gpu, cuda_is_cpu(gpu):
        program()
    assert gpu.faults == []


@pytest.mark.parametrize("program", [numbers_of_the_host, copies, indices])
def test_what_pytorch_allows_is_not_refused_in_inference_mode(program):
    """Operators that PyTorch makes of others are not taken apart there."""
    with emulate() as gpu, cuda_is_cpu(gpu), torch.inference_mode():
        program()


OPTIMIZERS = {
    "foreach": lambda p: torch.optim.Adam(p, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, fused=True),
    "one by one": lambda p: torch.optim.NAdam(p, foreach=False),
    "a rate on the host": lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-3)),
    "capturable": lambda p: torch.optim.Adam(p, capturable=True, amsgrad=True),
    "Rprop": torch.optim.Rprop,
    "ASGD": torch.optim.ASGD,
    "Adafactor": torch.optim.Adafactor,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_may_count_on_the_host(name):
    with emulate() as gpu, cuda_is_cpu(gpu):
        model = nn.Linear(3, 2).cuda()
        optimizer = OPTIMIZERS[name](model.parameters())

        def loss() -> Tensor:
            optimizer.zero_grad()
            loss = model(numbers(4, 3)).square().sum()
            loss.backward()
            return loss

        for place in (None, "cpu", "cuda"):
            optimizer.step(loss)
            buffer = io.BytesIO()
            torch.save(optimizer.state_dict(), buffer)
            buffer.seek(0)
            optimizer.load_state_dict(torch.load(buffer, map_location=place, weights_only=False))
            optimizer.step(loss)
    assert gpu.faults == []


BACKWARDS = {
    "max": lambda x: x.max(1)[0],
    "sort": lambda x: x.sort(1)[0],
    "topk": lambda x: x.topk(2)[0],
    "median": lambda x: x.median(),
    "kthvalue": lambda x: x.kthvalue(2)[0],
    "cummax": lambda x: x.cummax(0)[0],
    "select": lambda x: x[1],
    "slice": lambda x: x[:, 2:],
    "index": lambda x: x[torch.tensor([1, 2])],
    "unfold": lambda x: x.unfold(0, 2, 1),
    "diagonal": lambda x: x.diagonal(),
    "take": lambda x: x.take(torch.tensor([1]).to(x.device)),
    "prod": lambda x: x.prod(),
    "norm": lambda x: x.norm(),
    "dropout": F.dropout,
    "stack": lambda x: torch.stack([x, x]),
    "distances": lambda x: torch.cdist(x, x + 1),
    "singular values": torch.linalg.svdvals,
    "interpolate": lambda x: F.interpolate(x[None], scale_factor=2),
    "mask": lambda x: x.masked_select(x > 0),
    "other type": lambda x: x.double(),
    "to the other": lambda x: x.cpu() if x.device.index == 0 else x.cuda(),
}


@pytest.mark.slow
@pytest.mark.parametrize("is_on_device", [False, True])
@pytest.mark.parametrize("name", BACKWARDS)
def test_backward_passes_stay_where_they_are(name, is_on_device):
    with emulate() as gpu, cuda_is_cpu(gpu):
        x = torch.randn(4, 5)
        x = (x.cuda() if is_on_device else x).requires_grad_()
        y = BACKWARDS[name](x)
        (y * torch.ones_like(y)).sum().backward()
        x.grad + x
    assert gpu.faults == []


# Operators of PyTorch's list that take tensors of several devices, but whose kernels, in what they
# call, ask for one; and those that no CPU has.
ASK = re.compile(r"special_.*_polynomial|all$|any$|_cudnn_rnn$")


def listed_operators():
    """Yield the operators of PyTorch's list that take two tensors, and what it says of each."""
    torchgen = pytest.importorskip("torchgen", reason="it has PyTorch's list of operators")
    listed = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    for entry in listed.read_text("utf-8").split("\n- func: ")[1:]:
        name, _, overload = entry.partition("(")[0].partition(".")
        func = getattr(getattr(torch.ops.aten, name, None), overload or "default", None)
        if func is not None and entry.partition("->")[0].count("Tensor") > 1:
            yield name, func, entry


def test_operators_that_take_several_devices_are_those_of_pytorchs_list():
    refused, checked = [], 0
    for name, func, entry in listed_operators():
        found = re.search("device_check: NoCheck(.*)", entry)
        if found is None or "TensorIterator" in found[1] or ASK.match(name):
            continue
        checked += 1
        refused += [name] if OperatorKind(func).devices is Devices.ONE else []
    assert refused == []
    assert checked > 50
    assert devices_of(torch.ops.aten.mm.default) is Devices.ONE


def test_operators_that_take_numbers_of_the_host_are_those_of_pytorchs_list():
    """Without a check of devices, and with the one of TensorIterator, which lets numbers pass."""
    checked, unchecked, asking = set(), set(), set()
    for name, func, entry in listed_operators():
        (unchecked if "device_check: NoCheck" in entry else checked).add(name)
        is_pointwise = torch.Tag.pointwise in func.tags and "out" not in func._overloadname
        has_kernel = "CUDA" in entry or "structured_delegate" in entry
        is_composed = devices_of(func) is Devices.ANY or "CompositeExplicit" in entry
        if name not in unchecked and is_pointwise and has_kernel and not is_composed:
            asking.add(name)
    assert unchecked >= devices.TAKE_NUMBERS | devices.FILLS
    assert not (devices.TAKE_NONE - unchecked) - checked
    assert {name for name in asking if takes(name)} == set()
    assert takes("add")
    assert not takes("index_select")


def takes(name):
    packet = getattr(torch.ops.aten, name)
    return any(
        devices.takes_numbers(getattr(packet, overload), "other") for overload in packet.overloads()
    )
