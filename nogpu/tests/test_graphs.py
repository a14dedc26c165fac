# SPDX-License-Identifier: MIT
"""CUDA graphs on a CPU: programs with one fault each, which is named at its line, and right ones.

The line with the fault ends in ``# fault``; that of the capture which it names, in ``# captured``.
"""

import copy
import gc
import inspect

import pytest
import torch
import triton
import triton.language as tl
from torch import nn
from torch.utils._pytree import tree_leaves

from nogpu import emulate
from nogpu.cuda import places
from nogpu.cuda.stand_in import cuda_is_cpu


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


@triton.autotune([triton.Config({"BLOCK": size}) for size in (64, 128)], key=["n"])
@triton.jit
def tuned_scale(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, 2 * tl.load(x + i, mask=i < n), mask=i < n)


def autotuner():
    """Only for n = 50 its choice is known (triton#10596)."""
    x, out = numbers(100), numbers(100)
    tuned_scale[(1,)](x, out, 50)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):  # captured
        tuned_scale[(1,)](x, out, 50)
        tuned_scale[(2,)](x, out, 100)  # fault


def wait_for_event():
    x, event = numbers(4), torch.cuda.Event()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):  # captured
        x.add_(1)
        event.record()
        event.synchronize()  # fault


def ctc_loss():
    """PyTorch copies lengths that are no tensors to the device, and others to the host."""
    x, targets = numbers(5, 2, 4).log_softmax(-1), torch.ones(2, 2, dtype=int, device="cuda")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):  # captured
        nn.functional.ctc_loss(x, targets, (5, 5), (2, 2))  # fault


def ctc_loss_of_tensors():
    x, targets = numbers(5, 2, 4).log_softmax(-1), torch.ones(4, dtype=torch.int32, device="cuda")
    lengths = torch.full((2,), 2, dtype=torch.int32, device="cuda")
    loss = nn.CTCLoss()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):  # captured
        loss(x, targets, lengths + 3, lengths)  # by cuDNN
        loss(x, targets, (lengths + 3).long(), lengths.long())  # fault


def from_host():
    x, batch = numbers(4), torch.ones(4)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):  # captured
        x.copy_(batch)  # fault


def from_one_element():
    x, host = numbers(4), torch.zeros(4)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):  # captured
        host[0] = x[0]  # fault


def into_one_element():
    """PyTorch copies the number; into a slice it puts it by a kernel."""
    x = numbers(4)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):  # captured
        x[0:1] = 1.0
        x[0] = 1.0  # fault


def from_numbers():
    x = numbers(4)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):  # captured
        x.add_(torch.tensor([1.0, 2, 3, 4], device="cuda"))  # fault


def from_a_shape():
    x = torch.arange(6, device="cuda")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):  # captured
        torch.unravel_index(x, (2, 3))  # fault


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


def optimizer_without_a_check():
    """PyTorch does not ask in its step whether there is a capture."""
    p = nn.Parameter(numbers(4))
    optimizer = torch.optim.Adagrad([p])
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
    "autotuner": (autotuner, "wait in a capture"),
    "event": (wait_for_event, "wait in a capture"),
    "ctc_loss": (ctc_loss, "read-back in a capture"),
    "ctc_loss of tensors": (ctc_loss_of_tensors, "read-back in a capture"),
    "host's memory": (from_host, "host's copy in a capture"),
    "an element of the host": (from_one_element, "host's copy in a capture"),
    "an element": (into_one_element, "host's copy in a capture"),
    "Python's numbers": (from_numbers, "host's copy in a capture"),
    "a shape": (from_a_shape, "host's copy in a capture"),
    "a function's": (clipped_by_a_condition, "read-back in a capture"),
    "optimizer": (optimizer_on_the_host, "optimizer that is not capturable"),
    "count": (optimizer_without_a_check, "optimizer that is not capturable"),
    "generator": (generator_of_its_own, "unregistered generator"),
    "unjoined": (unjoined_stream, "unjoined work"),
}


# Where PyTorch refuses a copy, before CUDA does.
NOT_PINNED = {"cpu", "tolist", "host's memory", "an element of the host", "an element"}
NOT_PINNED |= {"Python's numbers", "a shape"}


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


def gradient_before_a_replay():
    """The graph was captured where there was none, and leaves none."""
    p = nn.Parameter(numbers(4))
    optimizer = torch.optim.SGD([p], lr=0.1)

    def step():
        p.square().sum().backward()  # captured
        optimizer.step()
        optimizer.zero_grad()

    graph, _ = capture(step)
    graph.replay()
    (3 * p).sum().backward()
    graph.replay()  # fault


def gradient_of_the_capture():
    """It lives on, and the parameter has another one."""
    p = nn.Parameter(numbers(4))
    optimizer = torch.optim.SGD([p], lr=0.1)

    def step():
        p.square().sum().backward()  # captured
        optimizer.step()

    graph, _ = capture(step)
    kept = p.grad
    graph.replay()
    optimizer.zero_grad()
    p.square().sum().backward()
    graph.replay()  # fault
    return kept


def gradient_cleared_now_and_then():
    p = nn.Parameter(numbers(4))
    optimizer, graph = torch.optim.SGD([p], lr=0.1), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        p.square().sum().backward()  # captured
        optimizer.step()
    graph.replay()
    graph.replay()
    optimizer.zero_grad()
    graph.replay()  # fault


def rebound_labels():
    """Labels that have been freed are zeros: there is another class on a GPU, or a crash."""
    x, y = numbers(4, 3), torch.tensor([2, 1, 0, 2], device="cuda")
    graph, _ = capture(lambda: nn.functional.cross_entropy(x, y))  # captured
    y = torch.tensor([1, 1, 0, 2], device="cuda")
    graph.replay()  # fault
    return y


def replaced_parameter():
    model = nn.Linear(4, 1, bias=False).cuda()
    x = numbers(2, 4)
    graph, _ = capture(lambda: model(x))  # captured
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


def rate_in_another_place():
    """The tensor lives on, in the optimizer's defaults; a number that is equal is no fault."""
    p = nn.Parameter(numbers(4))
    rate = torch.tensor(0.1, device="cuda")
    optimizer = torch.optim.AdamW([p], lr=rate, capturable=True)

    def step():
        optimizer.zero_grad()
        p.sum().backward()
        optimizer.step()  # captured

    graph, _ = capture(step)
    for new in (rate, 0.1, torch.tensor(0.1, device="cuda")):
        optimizer.param_groups[0]["lr"] = new
        graph.replay()
    rate.fill_(0.05)  # as `graphed` lets its rate follow the group's number
    optimizer.param_groups[0]["lr"] = 0.05
    graph.replay()
    for new in (0.3, torch.tensor(0.2, device="cuda")):
        optimizer.param_groups[0]["lr"] = new
        graph.replay()  # fault


def read_too_early():
    x = numbers(4)
    _, out = capture(lambda: x + 1)  # captured
    assert out.isnan().all()  # fault


def second_graph_first():
    x = numbers(4)
    one, two = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(one):
        hidden = x.exp()  # captured
    with torch.cuda.graph(two, pool=one.pool()):
        hidden.log()
    two.replay()  # fault


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
    graph, _ = capture(lambda: x + 1)  # captured
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
    graph, _ = capture(lambda: x + 1)
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
    "y = new": (rebound_labels, "freed input"),
    "grad = None": (freed_gradients, "freed input"),
    "grad of the graph": (gradients_made_anew, "replaced gradient"),
    "grad before": (gradient_before_a_replay, "ignored gradient"),
    "grad of the capture": (gradient_of_the_capture, "replaced gradient"),
    "grad cleared": (gradient_cleared_now_and_then, "overwritten gradient"),
    "p.data = new": (replaced_parameter, "freed input"),
    "lr": (rate_of_python, "number in a graph"),
    "lr = new": (rate_in_another_place, "number in a graph"),
    "too early": (read_too_early, "result before a replay"),
    "two graphs": (second_graph_first, "result before a replay"),
    "momentum": (state_without_warm_up, "state made in a capture"),
    "reset": (read_after_reset, "result of a reset graph"),
    "pool": (shared_pool, "overwritten result"),
    "no wait for an input": (input_of_another_stream, "missing wait"),
    "no wait for a result": (result_on_another_stream, "missing wait"),
    "no wait for a replay": (input_written_too_early, "missing wait"),
    "empty": (nothing, "empty graph"),
}
WARNINGS = ("number in a graph", "result of a reset graph", "empty graph")
WARNINGS += ("ignored gradient", "overwritten gradient")


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
    words = "Cannot copy between CPU and CUDA" if case in NOT_PINNED else "CUDA error: "
    with emulate() as gpu, cuda_is_cpu(gpu):
        with pytest.raises(RuntimeError, match=words):
            function()
        assert not torch.cuda.is_current_stream_capturing()
    (fault,) = gpu.faults
    check(fault, function, name)
    assert ("into one element" in fault.message) == (function is into_one_element)


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty", "ignore:Detected call of")
def test_what_a_replay_does_wrong_is_named_at_its_line(case):
    function, name = WRONG[case]
    with emulate() as gpu, cuda_is_cpu(gpu):
        function()
    (fault,) = gpu.faults
    check(fault, function, name)


@pytest.mark.parametrize("has_backward", [False, True])
def test_the_advice_on_a_gradient_that_has_been_freed_is_to_zero_it_in_place(has_backward):
    with emulate() as gpu, cuda_is_cpu(gpu):
        p, kept = nn.Parameter(numbers(4)), numbers(4)
        p.grad = numbers(4)
        optimizer = torch.optim.SGD([p], lr=0.1)

        def step():
            if has_backward:
                (p * kept).sum().backward()
            optimizer.step()

        graph, _ = capture(step)
        optimizer.zero_grad()
        graph.replay()
    (fault,) = gpu.faults
    assert (fault.kind, fault.name) == ("error", "freed input")
    assert "a gradient of float32 [4], which has been freed" in fault.message
    assert "call zero_grad(set_to_none=False)" in fault.message
    assert "x.copy_(new)" not in fault.message


def step_of_scaler(x, optimizer):
    scaler = torch.amp.GradScaler("cuda")
    scaler.scale(x)
    scaler.step(optimizer)


def anomaly(x, optimizer):
    with torch.autograd.detect_anomaly():
        x.requires_grad_().sum().backward()


def clip(x, optimizer):
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0, error_if_nonfinite=True)


def norm(x, optimizer):
    nn.utils.get_total_norm([x], error_if_nonfinite=True)


def muon(x, optimizer):
    p = nn.Parameter(x.diag())
    p.grad, other = x.diag(), torch.optim.Muon([p])
    other.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
    other.step()


def sample(x, optimizer):
    # Another test may set the default.
    torch.distributions.Categorical(logits=x, validate_args=True)


def check_of_log_prob(x, optimizer):
    torch.distributions.Normal(x, x, validate_args=False)._validate_sample(x)


FUSED = "with fused=True or capturable=True"


@pytest.mark.parametrize(
    "function, advice",
    [
        (lambda x, optimizer: x[x > 0], "compute with all elements, as by torch.where"),
        (lambda x, optimizer: x.nonzero(), "compute with all elements"),
        (lambda x, optimizer: 1 if x.sum() > 0 else 2, "write torch.where for a condition"),
        (lambda x, optimizer: x.sum().item(), "read it after graph.replay()"),
        (lambda x, optimizer: optimizer.step(), FUSED),
        (lambda x, optimizer: x.add(1, alpha=x[:1].sum()), "keep the number on the device"),
        (lambda x, optimizer: x[: x.argmax()], "a tensor as the bound of a slice"),
        (lambda x, optimizer: x[x.argmax()], "x[n.reshape(1)]"),
        (lambda x, optimizer: nn.functional.one_hot(x.long()), "give num_classes"),
        (lambda x, optimizer: torch.linalg.inv(x.diag()), "torch.linalg.inv_ex"),
        (lambda x, optimizer: torch.linalg.eigh(x.diag()), "compute it before the capture"),
        (lambda x, optimizer: nn.functional.ctc_loss(x[:, None], x, x, x), "what cuDNN takes"),
        (step_of_scaler, "scaler.update() after graph.replay()"),
        (muon, "has neither fused nor capturable: give it a number"),
        (sample, "validate_args=False"),
        (check_of_log_prob, "validate_args=False"),
        (clip, "without error_if_nonfinite"),
        (norm, "without error_if_nonfinite"),
        (anomaly, "set_detect_anomaly(False)"),
    ],
)
@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:Error detected in")
def test_what_is_read_back_has_its_own_advice(function, advice):
    with emulate() as gpu, cuda_is_cpu(gpu):
        p = nn.Parameter(numbers(4))
        p.grad, x = numbers(4), numbers(4)
        optimizer = torch.optim.SGD([p], lr=torch.tensor(0.1, device="cuda"))
        read = pytest.raises(RuntimeError, match="reads values")
        with read, torch.cuda.graph(torch.cuda.CUDAGraph()):
            function(x, optimizer)
    message = gpu.faults[0].message
    assert advice in message
    assert (FUSED in message) == (advice == FUSED)


@pytest.mark.parametrize(
    "function",
    [
        *(torch.linalg.eigh, torch.linalg.eigvalsh, torch.linalg.eig, torch.linalg.eigvals),
        *(torch.linalg.svd, torch.linalg.svdvals, torch.linalg.pinv, torch.linalg.matrix_rank),
        *(torch.linalg.cond, lambda x: torch.linalg.matrix_norm(x, "nuc")),
        lambda x: torch.linalg.pinv(x, hermitian=True),
    ],
)
@pytest.mark.parametrize("has_gradient", [False, True])
def test_what_finds_eigenvalues_or_singular_values_waits_for_the_gpu(function, has_gradient):
    with emulate() as gpu, cuda_is_cpu(gpu):
        x = numbers(3, 3).requires_grad_(has_gradient)
        read = pytest.raises(RuntimeError, match="eigenvalues or singular values reads values")
        with read, torch.cuda.graph(torch.cuda.CUDAGraph()):
            function(x)


def test_the_advice_on_a_layer_that_reads_its_count_is_to_give_a_momentum():
    with emulate() as gpu, cuda_is_cpu(gpu):
        norm, x = nn.BatchNorm1d(4, momentum=None).cuda(), numbers(2, 4)
        read = pytest.raises(RuntimeError, match="a momentum that is not None")
        with read, torch.cuda.graph(torch.cuda.CUDAGraph()):
            norm(x)


@pytest.mark.parametrize("read", [torch.Tensor.item, print])
def test_a_call_that_reads_is_one_fault(read):
    """A function and the operators that it calls all read the tensor."""
    with emulate() as gpu, cuda_is_cpu(gpu):
        x = torch.ones(4, device="cuda")
        _, total = capture(lambda: x.sum())
        read(total)
    assert [(one.name, one.count) for one in gpu.faults] == [("result before a replay", 1)]


@pytest.mark.parametrize(
    "make, advice",
    [
        (torch.optim.Adagrad, "Adagrad(…, fused=True)"),
        (torch.optim.Adamax, "Adamax(…, capturable=True)"),
        (torch.optim.Adafactor, "AdamW(…, capturable=True)"),
    ],
)
def test_the_advice_on_an_optimizer_that_counts_on_the_host(make, advice):
    with emulate() as gpu, cuda_is_cpu(gpu):
        p = nn.Parameter(numbers(4, 4))
        p.grad, optimizer = numbers(4, 4), make([p])
        optimizer.step()
        refused = pytest.raises(RuntimeError, match="counts its steps on the host")
        with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
            optimizer.step()
    assert advice in gpu.faults[0].message


def test_a_seed_in_a_capture():
    """A GPU ignores the seed that it has, and refuses another one."""
    with emulate() as gpu, cuda_is_cpu(gpu):
        torch.manual_seed(-7)  # which stands for 2**64 - 7
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            torch.manual_seed(-7)
            noise = torch.rand(4, device="cuda")
        drawn = []
        for _ in range(2):
            graph.replay()
            drawn.append(noise.clone())
        assert not torch.equal(*drawn)
        other = pytest.raises(
            RuntimeError, match=r"manual_seed\(8\) in the capture is not the seed"
        )
        with other, torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.manual_seed(8)
    faults = [(one.kind, one.name) for one in gpu.faults]
    assert faults == [("warning", "seed in a capture"), ("error", "seed in a capture")]


@pytest.mark.parametrize("is_freed", [True, False])
def test_inputs_of_one_line_are_one_fault_that_names_each(is_freed):
    """A batch and its labels, which are freed or written on another stream."""
    with emulate() as gpu, cuda_is_cpu(gpu):
        x, y = torch.ones(4, device="cuda"), torch.ones(2, 4, device="cuda")
        graph, _ = capture(lambda: x + y)
        if is_freed:
            x = y = None
        else:
            with torch.cuda.stream(torch.cuda.Stream()):
                x.zero_(), y.zero_()
        graph.replay()
    (fault,) = gpu.faults
    names = "a tensor of float32 [4] {} a tensor of float32 [2, 4], which"
    assert names.format("and of" if is_freed else "and") in fault.message
    assert fault.count == 1


def test_a_capture_leaves_memory_and_random_numbers_as_they_were():
    """And its results hold no numbers: a GPU computes nothing in a capture."""
    with emulate() as gpu, cuda_is_cpu(gpu):
        p = nn.Parameter(torch.ones(4, device="cuda"))
        p.grad = torch.ones(4, device="cuda")
        optimizer = torch.optim.AdamW([p], lr=0.5, capturable=True)
        optimizer.step()
        before = copy.deepcopy((p, optimizer.state[p], torch.get_rng_state()))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
            noise = torch.rand(4, device="cuda")
        after = p, optimizer.state[p], torch.get_rng_state()
        for one, other in zip(tree_leaves(before), tree_leaves(after), strict=True):
            assert torch.equal(one, other)
        assert gpu.faults == []
        assert noise.isnan().all()
        graph.replay()
        assert optimizer.state[p]["step"] == 2
        assert not torch.equal(before[0], p)


def test_the_memory_of_a_result_may_outlive_its_graph():
    with emulate() as gpu, cuda_is_cpu(gpu):
        x = numbers(1000)
        graph, out = capture(lambda: x + 1)
        graph.replay()
        del graph
        gc.collect()
        assert torch.equal(out, x + 1)
    assert torch.equal(out, x + 1)
    assert gpu.faults == []


def test_two_replays_do_not_change_versions_of_autograd():
    """As on a GPU: what autograd has saved before is not said to be changed."""
    with emulate() as gpu, cuda_is_cpu(gpu):
        x = numbers(4)
        graph, _ = capture(lambda: x.mul_(2))
        y = torch.ones(4, device="cuda", requires_grad=True)
        product, before = (x * y).sum(), x._version
        graph.replay()
        assert x._version == before
        product.backward()
        assert torch.equal(y.grad, x)


MISUSES = {
    "the default stream": (lambda graph: graph.capture_begin(), "on a non-default stream"),
    "no capture": (lambda graph: graph.replay(), "without a preceding successful capture"),
    "no begin": (lambda graph: graph.capture_end(), r"call capture_begin\(\)"),
    "no pool": (lambda graph: graph.pool(), "has no pool before its capture"),
    "twice": (lambda graph: (capture_into(graph), capture_into(graph)), "already owns a captured"),
    "within": (
        lambda graph: capture_into(graph, torch.cuda.CUDAGraph().capture_begin),
        "under way",
    ),
    "a host's generator": (
        lambda graph: numbers(4).normal_(generator=torch.Generator()),
        "Expected a 'cuda' device type for generator but found 'cpu'",
    ),
    "mode": (lambda graph: capture_into(graph, capture_error_mode="none"), "expected one of"),
}


def capture_into(graph, function=lambda: None, **options):
    x = numbers(4)
    with torch.cuda.graph(graph, **options):
        x.add_(1)
        function()


@pytest.mark.parametrize("name", MISUSES)
def test_what_pytorch_refuses_is_refused(name):
    call, reason = MISUSES[name]
    with emulate() as gpu, cuda_is_cpu(gpu), pytest.raises(RuntimeError, match=reason):
        call(torch.cuda.CUDAGraph())


ON_DEVICE = {
    "a factory": lambda: torch.zeros(4, device="cuda"),
    "a copy": lambda: torch.zeros(4).cuda(),
    "to": lambda: torch.zeros(4).to("cuda"),
    "to another type": lambda: torch.zeros(4).to("cuda", torch.float64),
    "like another": lambda: torch.zeros(4).to(numbers(4)),
    "a module": lambda: nn.Linear(2, 2).to("cuda").weight,
    "a block": lambda: within_a_block(),
    "a result": lambda: numbers(4) + torch.ones(()),
    "a view": lambda: numbers(4)[1:],
    "a gradient": lambda: torch.autograd.grad((x := numbers(4).requires_grad_()).square().sum(), x)[
        0
    ],
    "a deep copy": lambda: copy.deepcopy(numbers(4)),
    "padded": lambda: nn.utils.rnn.pad_sequence([numbers(2), numbers(3)]),
    "a function of Python": lambda: nn.functional.one_hot(torch.arange(4, device="cuda"), 4),
}
ON_HOST = {
    "a factory": lambda: torch.zeros(4),
    "a copy": lambda: numbers(4).cpu(),
    "to": lambda: numbers(4).to("cpu"),
    "NumPy": lambda: torch.from_numpy(numbers(4).numpy().copy()),
    "like another, but there": lambda: torch.zeros_like(numbers(4), device="cpu"),
}


def within_a_block():
    with torch.device("cuda"):
        return torch.zeros(4)


@pytest.mark.parametrize("name", ON_DEVICE)
def test_tensors_of_the_device_are_known(name):
    with emulate() as gpu, cuda_is_cpu(gpu):
        assert ON_DEVICE[name]().device == torch.device("cuda", 0)


@pytest.mark.parametrize("name", ON_HOST)
def test_tensors_of_the_host_are_known(name):
    with emulate() as gpu, cuda_is_cpu(gpu):
        assert ON_HOST[name]().device == torch.device("cpu")


def test_what_no_function_of_pytorch_has_called_is_on_the_device():
    """Such as what DistributedDataParallel allocates in C++; a function has what it was given.

    It is a guess: a backward pass on the host allocates memory, too.
    """
    plain = torch.device("cpu")
    assert places.of_results(set(), plain) is places.GUESS
    before = places.enter_function([torch.ones(2)])
    assert places.of_results(set(), plain) is None
    places.leave_function(before)
    assert places.of_results(set(), plain) is places.GUESS


def test_a_tensor_of_the_device_shares_no_memory_with_the_host():
    with emulate() as gpu, cuda_is_cpu(gpu):
        data = torch.ones(4)
        x = data.cuda()
        x.zero_()
        assert data.sum() == 4
        x.cpu().fill_(3)
        assert x.sum() == 0
        assert x.to("cuda") is x
        assert x.to("cuda", copy=True) is not x


# Right programs


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 4)).cuda()


def batches(count=4):
    torch.manual_seed(1)
    return [(numbers(6, 8), torch.randint(4, (6,), device="cuda")) for _ in range(count)]


def warm_up(step, times=3):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(times):
            step()
    torch.cuda.current_stream().wait_stream(side)


def train(model, optimizer, data, is_graphed, after=lambda: None):
    """Whole-network capture, as in PyTorch's documentation; or the plain loop with the same steps.

    Returns:
        the losses.
    """
    x, y = (t.clone() for t in data[0])

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    warm_up(step, 11 if isinstance(model, nn.parallel.DistributedDataParallel) else 3)
    if is_graphed:
        graph = torch.cuda.CUDAGraph()
        optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            loss = step()
    losses = []
    for new in data:
        x.copy_(new[0])
        y.copy_(new[1])
        if is_graphed:
            graph.replay()
        else:
            loss = step()
        after()
        losses.append(loss.item())
    return losses


def whole_network(is_graphed):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return train(model, optimizer, batches(), is_graphed), model.state_dict()


def capturable_with_scheduler(is_graphed):
    model = network()
    rate = torch.tensor(0.1, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, capturable=True)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    return train(model, optimizer, batches(), is_graphed, scheduler.step), model.state_dict()


def partial(is_graphed):
    """Parts of a network, one of which is chosen by a value, as in PyTorch's documentation."""
    torch.manual_seed(0)
    first, second, third = nn.Linear(8, 8).cuda(), nn.Linear(8, 8).cuda(), nn.Linear(8, 8).cuda()
    parts = [first, second, third]
    optimizer = torch.optim.SGD([p for one in parts for p in one.parameters()], lr=0.1)
    x = numbers(6, 8)
    hidden = torch.randn(6, 8, device="cuda", requires_grad=True)
    if is_graphed:
        first = torch.cuda.make_graphed_callables(first, (x,))
        second = torch.cuda.make_graphed_callables(second, (hidden,))
        third = torch.cuda.make_graphed_callables(third, (hidden,))
    losses = []
    for data, _ in batches():
        optimizer.zero_grad(set_to_none=True)
        between = first(data)
        chosen = second if between.sum().item() > 0 else third
        loss = chosen(between).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {str(n): one.weight for n, one in enumerate(parts)}


def positions_from_forward(is_graphed):
    """The capture of the backward pass runs on positions that the forward pass has found."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.MaxPool1d(2)).cuda()
    called = model
    if is_graphed:
        called = torch.cuda.make_graphed_callables(model, (numbers(4, 2, 9),))
    torch.manual_seed(1)
    called(numbers(4, 2, 9)).square().sum().backward()
    return [], {name: p.grad for name, p in model.named_parameters()}


def mixed_precision(is_graphed):
    """The forward and the backward pass are captured; the scaler's step reads values back."""
    model, data = network(), batches()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=256.0)
    x, y = (t.clone() for t in data[0])

    def backward():
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        return loss

    def again():
        optimizer.zero_grad(set_to_none=True)
        return backward()

    warm_up(again)
    if is_graphed:
        optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = backward()
    losses = []
    for new in data:
        x.copy_(new[0])
        y.copy_(new[1])
        if is_graphed:
            graph.replay()
        else:
            loss = again()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return losses, model.state_dict()


def distributed(is_graphed):
    torch.cuda.set_device(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as PyTorch's documentation has it
        model = nn.parallel.DistributedDataParallel(network())
    torch.cuda.current_stream().wait_stream(side)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return train(model, optimizer, batches(), is_graphed), model.state_dict()


def shared_by_two(is_graphed):
    """Inference for two sizes of batches; the graphs share a pool, and results are read at once."""
    model = network().eval()
    sizes = (2, 6)
    graphs, pool = {}, torch.cuda.graph_pool_handle()
    with torch.inference_mode():
        for size in sizes if is_graphed else ():
            x = torch.zeros(size, 8, device="cuda")
            warm_up(lambda x=x: model(x))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                out = model(x)
            graphs[size] = graph, x, out
        found = {}
        for n, (data, _) in enumerate(batches()):
            part = data[: sizes[n % 2]]
            if is_graphed:
                graph, x, out = graphs[len(part)]
                x.copy_(part)
                graph.replay()
            else:
                out = model(part)
            found[str(n)] = out.clone()
    return [], found


def added_to_by_another(is_graphed):
    """A second graph adds to a result of the first one; its capture adds nothing."""
    x, sums = torch.ones(4, device="cuda"), {}

    def first():
        return x + 1

    def second(total):
        return total.add_(x)

    warm_up(lambda: second(first()))
    if is_graphed:
        one, two = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(one):
            total = first()
        one.replay()
        with torch.cuda.graph(two, pool=one.pool()):
            second(total)
    for n in range(3):
        x.copy_(torch.arange(4.0) + n)
        if not is_graphed:
            total = torch.full((4,), 2.0, device="cuda") if n == 0 else total
            second(total)
        else:
            two.replay()
        sums[str(n)] = total.clone()
    return [], sums


def own_kernel(is_graphed):
    x = torch.zeros(100, device="cuda")

    def twice():
        out = torch.empty_like(x)
        scale[(1,)](x, out, 100, BLOCK=128)
        scale[(1,)](out, out, 100, BLOCK=128)
        return out + 1

    warm_up(twice)
    if is_graphed:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = twice()
    found = {}
    for n in range(3):
        x.copy_(torch.arange(100.0) + n)
        if is_graphed:
            graph.replay()
        else:
            out = twice()
        assert torch.equal(out.cpu(), 4 * (torch.arange(100.0) + n) + 1)
        found[str(n)] = out.clone()
    return [], found


def random_numbers(is_graphed):
    """Of the device's generator, and of another one that is registered."""
    generator = torch.Generator(device="cuda")
    x = torch.ones(64, device="cuda")

    def draw():
        other = torch.rand(64, device="cuda", generator=generator)
        return nn.functional.dropout(x) + other

    warm_up(draw)
    generator.manual_seed(1)
    torch.cuda.manual_seed(2)
    if is_graphed:
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(generator)
        with torch.cuda.graph(graph):
            out = draw()
    found = {}
    for n in range(3):
        if is_graphed:
            graph.replay()
        else:
            out = draw()
        found[str(n)] = out.clone()
    assert not torch.equal(found["0"], found["1"])
    return [], found


def joined_stream(is_graphed):
    """A branch on another stream, which the captured one waits for."""
    x, side = torch.zeros(8, device="cuda"), torch.cuda.Stream()

    def both():
        current = torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            other = x * 3
        here = x.exp()
        current.wait_event(side.record_event())
        return here + other

    warm_up(both)
    if is_graphed:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = both()
    found = {}
    for n in range(3):
        x.copy_(torch.linspace(-1, 1, 8) + n)
        if is_graphed:
            graph.replay()
        else:
            out = both()
        found[str(n)] = out.clone()
    return [], found


def pinned_copies(is_graphed):
    """Copies from and to pinned memory, and numbers put into elements and where a mask is true."""
    pinned, host = torch.zeros(8).pin_memory(), torch.zeros(8).pin_memory()
    x = torch.zeros(8, device="cuda")

    def step():
        x.copy_(pinned, non_blocking=True)
        other = x * 3
        here = x.exp()
        here[0:1] = 1.0
        here[here > 2] = 0.5
        host.copy_(other, non_blocking=True)
        return here + other

    warm_up(step)
    if is_graphed:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
    found = {}
    for n in range(3):
        pinned.copy_(torch.linspace(-1, 1, 8) + n)
        if is_graphed:
            graph.replay()
        else:
            out = step()
        torch.cuda.synchronize()
        found[str(n)], found[f"host {n}"] = out.clone(), host.clone()
    return [], found


def weights_and_data():
    torch.manual_seed(3)
    p = nn.Parameter(numbers(5, 3))
    return p, torch.optim.SGD([p], lr=0.01), numbers(4, 5)


def call_of(function, is_graphed):
    """Capture a function where that is asked for, and return what calls it."""
    if not is_graphed:
        return function
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def eager_steps_between(is_graphed):
    """As the last batch of an epoch, which is smaller; their gradients are stale in a replay."""
    p, optimizer, x = weights_and_data()

    def step():
        (x @ p).square().sum().backward()
        optimizer.step()

    call = call_of(step, is_graphed)
    for number in range(6):
        if number == 3 or not is_graphed:
            optimizer.zero_grad()
            step()
        else:
            call()
    return [], {"p": p}


def cleared_within(is_graphed):
    """The step clears gradients at its begin, and so those of another loss."""
    p, optimizer, x = weights_and_data()

    def step():
        optimizer.zero_grad()
        (x @ p).square().sum().backward()
        optimizer.step()

    step()
    call = call_of(step, is_graphed)
    for _ in range(3):
        p.square().sum().backward()
        call()
    return [], {"p": p}


def cleared_before_each(is_graphed):
    p, optimizer, x = weights_and_data()

    def step():
        (x @ p).square().sum().backward()
        optimizer.step()

    call = call_of(step, is_graphed)
    for _ in range(3):
        optimizer.zero_grad()
        call()
    return [], {"p": p}


def added_up(is_graphed):
    """The graph adds to gradients that there were before, and zeros them in place."""
    p, optimizer, x = weights_and_data()
    p.grad = torch.zeros_like(p)
    call = call_of(lambda: (x @ p).square().sum().backward(), is_graphed)
    for number in range(6):
        p.square().sum().backward()
        call()
        if number % 2:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    return [], {"p": p}


def zeroed_within(is_graphed):
    """A gradient that the graph itself zeroes needs not be the parameter's any more."""
    p, optimizer, x = weights_and_data()
    kept = p.grad = torch.ones_like(p)

    def step():
        p.grad.zero_()
        (x @ p).square().sum().backward()
        optimizer.step()

    call = call_of(step, is_graphed)
    for number in range(3):
        if number == 1:
            p.grad = torch.ones_like(p)
        call()
    return [], {"p": p, "kept": kept * 0}


RIGHT = (
    *(whole_network, capturable_with_scheduler, partial, mixed_precision),
    *(shared_by_two, added_to_by_another, own_kernel, random_numbers, joined_stream),
    *(pinned_copies, positions_from_forward, eager_steps_between, cleared_within),
    *(cleared_before_each, added_up, zeroed_within),
)


def test_the_gradient_of_a_number_put_by_a_mask_is_captured():
    """PyTorch calls masked_fill also for the zero that autograd puts there."""
    with emulate() as gpu, cuda_is_cpu(gpu):
        x, causal = numbers(4, 4).requires_grad_(), numbers(4, 4).triu(1) != 0

        def step():
            x.grad = None
            scores = x * 2
            scores[causal] = float("-inf")
            scores.softmax(1).square().sum().backward()
            return x.grad

        graph, grad = capture(step)
        x.data.copy_(numbers(4, 4))
        graph.replay()
        assert torch.equal(grad, step())
    assert gpu.faults == []


def test_sequences_are_padded_in_a_capture():
    with emulate() as gpu, cuda_is_cpu(gpu):
        x = numbers(5, 2)
        graph, padded = capture(lambda: nn.utils.rnn.pad_sequence(x.split([2, 3])))
        x.fill_(3)
        graph.replay()
        assert padded.sum() == 30
    assert gpu.faults == []


# tests/training/test_graphed.py trains by our operators in a graph, too.
@pytest.mark.parametrize(
    "program",
    RIGHT,
)
def test_right_programs_have_no_faults_and_the_values_of_the_plain_loop(program):
    check_right(program)


def test_a_step_of_distributed_data_parallel_has_the_values_of_the_plain_loop(world):
    check_right(distributed)


@pytest.mark.parametrize("is_view", [False, True])
def test_collectives_of_distributed_data_parallel_are_captured(world, tmp_path, is_view):
    with emulate() as gpu, cuda_is_cpu(gpu):
        with torch.cuda.stream(torch.cuda.Stream()):
            model = nn.parallel.DistributedDataParallel(
                nn.Linear(4, 4).cuda(), device_ids=[0], gradient_as_bucket_view=is_view
            )
        x = numbers(2, 4)

        def backward():
            model.zero_grad()
            model(x).sum().backward()

        graph, _ = capture(backward)
        graph.replay()
        graph.debug_dump(str(tmp_path / "graph"))
    assert "c10d.allreduce_" in (tmp_path / "graph").read_text("utf-8")
    assert gpu.faults == []


def test_distributed_data_parallel_that_is_made_on_the_default_stream_is_refused(world):
    """It keeps the nodes that accumulate its gradients (pytorch#180090)."""
    with emulate() as gpu, cuda_is_cpu(gpu):
        model, x = nn.parallel.DistributedDataParallel(nn.Linear(4, 4).cuda()), numbers(2, 4)
        with (
            pytest.raises(RuntimeError, match="has a stale reference to the default stream"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            model(x).sum().backward()
    (fault,) = gpu.faults
    assert fault.name == "stale stream in a capture"
    assert "make that on another stream" in fault.message


def check_right(program):
    found = []
    with emulate() as gpu, cuda_is_cpu(gpu):
        for is_graphed in (False, True):
            torch.manual_seed(0)
            losses, state = program(is_graphed)
            found.append((losses, {name: t.detach().cpu() for name, t in state.items()}))
    assert gpu.faults == []
    (plain_losses, plain), (losses, graphed) = found
    assert losses == plain_losses
    assert plain.keys() == graphed.keys()
    assert [name for name in plain if not torch.equal(plain[name], graphed[name])] == []


def test_a_graph_whose_neighbour_on_the_stream_is_gone_replays():
    """On a GPU it was left without the memory of its products (pytorch#193402)."""
    with emulate() as gpu, cuda_is_cpu(gpu):
        stream = torch.cuda.Stream()
        x, y = torch.ones(8, 8, device="cuda"), torch.ones(8, 8, device="cuda")
        kept, other = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(kept, stream=stream):
            product = x @ y
        with torch.cuda.graph(other, stream=stream):
            y @ x
        other.replay()
        other.reset()
        del other
        gc.collect()
        filler = torch.full((8, 8), 5.0, device="cuda")
        x.fill_(3.0)
        kept.replay()
        assert product.eq(24).all()
        assert filler.eq(5).all()
    assert gpu.faults == []


def test_a_graph_whose_capture_an_error_has_ended_captures_again():
    """On a GPU its memory stayed reserved (pytorch#190308)."""
    with emulate() as gpu, cuda_is_cpu(gpu):
        x, graph = torch.ones(4, device="cuda"), torch.cuda.CUDAGraph()

        def fails():
            x.mul_(2)
            raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"), torch.cuda.graph(graph):
            fails()
        assert not torch.cuda.is_current_stream_capturing()
        assert x.eq(1).all()
        with torch.cuda.graph(graph):
            y = 3 * x
        x.fill_(2.0)
        graph.replay()
        assert y.eq(6).all()
    assert gpu.faults == []


def test_the_advice_on_a_wait_names_the_stream_of_the_program():
    with emulate() as gpu, cuda_is_cpu(gpu):
        x, loader = numbers(4), torch.cuda.Stream()
        graph, _ = capture(lambda: x + 1)
        with torch.cuda.stream(loader):  # written
            x.zero_()
        graph.replay()
        with torch.cuda.stream(torch.cuda.Stream()):
            x.zero_()
    line = min(marked(test_the_advice_on_a_wait_names_the_stream_of_the_program, "# written"))
    written, replayed = (fault.message for fault in gpu.faults)
    assert f"test_graphs.py:{line} may still write" in written
    assert "wait_stream(loader)" in written
    assert "may still run on the default stream" in replayed
    assert "wait_stream(torch.cuda.default_stream())" in replayed
