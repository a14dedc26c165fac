# SPDX-License-Identifier: MIT
"""Questions that test suites ask of the GPU before and within their tests, under the stand-in."""

import functools
import signal

import pytest
import torch
import triton
import triton.language as tl

from nogpu import emulate
from nogpu.cuda.stand_in import cuda_is_cpu
from nogpu.triton.emulator import Emulator


@triton.jit
def double(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, 2 * tl.load(x + i))


@pytest.fixture(params=["sm_80", "sm_90"])
def gpu(request):
    with emulate(request.param) as gpu, cuda_is_cpu(gpu):
        yield gpu


def driver():
    return triton.runtime.driver.active


def infer_device():
    """The device that a library computes on, as several ask for it."""
    if torch.cuda.is_available():
        return "cuda"
    return "cpu"


def infer_by_accelerator():
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found.type if found is not None else "cpu"


def of_sm(of_80, of_90):
    return lambda gpu: of_80 if gpu.capability == 80 else of_90


CAPABILITY, MULTIPROCESSORS = of_sm((8, 0), (9, 0)), of_sm(108, 132)
NAME, SHARED = of_sm("NVIDIA A100", "NVIDIA H100"), of_sm(166_912, 232_448)


def always(value):
    return lambda gpu: value


# What is asked, and the answer.
ASKED = {
    "is_available": (lambda: torch.cuda.is_available(), always(True)),
    "device_count": (lambda: torch.cuda.device_count(), always(1)),
    "current_device": (lambda: torch.cuda.current_device(), always(0)),
    "get_device_name": (lambda: torch.cuda.get_device_name(0), NAME),
    "get_device_capability": (lambda: torch.cuda.get_device_capability(), CAPABILITY),
    "of a device": (lambda: torch.cuda.get_device_capability(torch.device("cuda")), CAPABILITY),
    "properties": (
        lambda: torch.cuda.get_device_properties(0).multi_processor_count,
        MULTIPROCESSORS,
    ),
    "properties of a tensor's device": (
        lambda: torch.cuda.get_device_properties(torch.ones(1, device="cuda").device).name,
        NAME,
    ),
    "a GPU's number for nvidia-smi": (
        lambda: f"GPU-{torch.cuda.get_device_properties(0).uuid}",
        always("GPU-00000000-0000-0000-0000-000000000000"),
    ),
    "its clock": (
        lambda: torch.cuda.get_device_properties(0).clock_rate,
        of_sm(1_410_000, 1_980_000),
    ),
    "is_bf16_supported": (lambda: torch.cuda.is_bf16_supported(), always(True)),
    "the version of CUDA": (lambda: torch.version.cuda is None, always(False)),
    "accelerator": (lambda: torch.accelerator.current_accelerator(), always(torch.device("cuda"))),
    "accelerator's index": (lambda: torch.accelerator.current_device_index(), always(0)),
    "accelerator's count": (lambda: torch.accelerator.device_count(), always(1)),
    "accelerator's memory": (lambda: len(torch.accelerator.get_memory_info()), always(2)),
    "infer_device": (infer_device, always("cuda")),
    "infer_device by the accelerator": (infer_by_accelerator, always("cuda")),
    "the module of a device": (lambda: torch.get_device_module("cuda"), always(torch.cuda)),
    "Triton's device": (
        lambda: driver().get_active_torch_device(),
        always(torch.device("cuda", 0)),
    ),
    "Triton's number": (lambda: driver().get_current_device(), always(0)),
    "Triton's stream": (lambda: driver().get_current_stream(0), always(0)),
    "Triton's interface": (lambda: driver().get_device_interface(), always(torch.cuda)),
    "Triton's backend": (lambda: driver().get_current_target().backend, always("cuda")),
    "Triton's architecture": (lambda: driver().get_current_target().arch, of_sm(80, 90)),
    "Triton's properties": (
        lambda: driver().utils.get_device_properties(0)["multiprocessor_count"],
        MULTIPROCESSORS,
    ),
    "Triton's shared memory": (
        lambda: driver().utils.get_device_properties(0)["max_shared_mem"],
        SHARED,
    ),
    "Triton's benchmarker": (
        lambda: driver().get_benchmarker()(lambda: None, quantiles=[0.5, 0.2]),
        always([1.0, 1.0]),
    ),
    "do_bench": (lambda: triton.testing.do_bench(lambda: None), always(1.0)),
    "the raw stream": (lambda: torch._C._cuda_getCurrentRawStream(0), always(0)),
}


@pytest.mark.parametrize("name", ASKED)
def test_what_suites_ask_has_the_answer_of_the_gpu(name, gpu):
    ask, answer = ASKED[name]
    assert ask() == answer(gpu)


def test_memory_is_the_gpus_and_free(gpu):
    free, total = torch.cuda.mem_get_info()
    assert free == total == torch.cuda.get_device_properties(0).total_memory > 2**35
    assert torch.cuda.memory_allocated() == torch.cuda.max_memory_allocated("cuda") == 0
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.empty_cache()


def test_events_and_streams_have_an_order(gpu):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.Stream()
    start.record()
    with torch.cuda.stream(stream):
        raw = torch._C._cuda_getCurrentRawStream(0)
        assert raw == driver().get_current_stream(0) == stream.cuda_stream != 0
        assert torch.cuda.current_stream().device == torch.device("cuda", 0)
    end.record()
    torch.cuda.synchronize()
    torch.accelerator.synchronize()
    assert end.query()
    assert start.elapsed_time(end) > 0


def test_a_state_of_the_random_numbers_is_restored(gpu):
    for states in (
        (torch.cuda.get_rng_state, torch.cuda.set_rng_state),
        (torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all),
        (lambda: torch.cuda.get_rng_state("cuda"), lambda s: torch.cuda.set_rng_state(s, "cuda")),
    ):
        get, put = states
        before = get()
        first = torch.randn(4, device="cuda")
        assert not torch.equal(torch.randn(4, device="cuda"), first)
        put(before)
        assert torch.equal(torch.randn(4, device="cuda"), first)
    torch.cuda.manual_seed_all(3)
    first = torch.rand(4, device="cuda")
    torch.cuda.manual_seed(3)
    assert torch.equal(torch.rand(4, device="cuda"), first)


def test_a_kernels_cache_has_the_number_of_the_current_device():
    """Each kind of GPU has its own kernels, although the number is 0 of each."""
    seen = []

    def hook(**given):
        seen.append(given["fn"].name)

    for arch in ("sm_80", "sm_90", "sm_80"):
        with emulate(arch) as gpu, cuda_is_cpu(gpu):
            x = torch.ones(16, device="cuda")
            kernel = double[(1,)](x, torch.empty_like(x), 16)
            assert list(double.device_caches) == [torch.cuda.current_device()] == [0]
            assert f".target {arch}" in kernel.asm["ptx"]
            assert kernel.metadata.target.arch == gpu.capability
    with emulate("sm_90") as gpu, cuda_is_cpu(gpu), triton.knobs.runtime.scope():
        triton.knobs.runtime.jit_cache_hook = hook
        double[(1,)](x, torch.empty_like(x), 16)
        assert seen == []
        double.device_caches[torch.cuda.current_device()][0].clear()
        double[(1,)](x, torch.empty_like(x), 16)
        assert len(seen) == 1


@pytest.mark.parametrize("arch", ["sm_80", "sm_100"])
def test_a_kernel_shows_its_machine_code(arch):
    with emulate(arch):
        x = torch.ones(16)
        kernel = double[(1,)](x, torch.empty_like(x), 16)
    assert "STG" in kernel.asm["sass"]
    assert "EXIT" in kernel.asm["sass"]


# Signal handlers


class TooSlow(Exception):
    """An error that a suite raises from a signal handler."""


def end(number, frame):
    raise TooSlow


class Handler:
    def __call__(self, number, frame):
        end(number, frame)

    def method(self, number, frame):
        end(number, frame)


HANDLERS = {
    "a function": end,
    "an object": Handler(),
    "a method": Handler().method,
    "a partial function": functools.partial(end),
}


@pytest.fixture
def interrupted(monkeypatch, request):
    """Let each launch be interrupted by a signal."""
    before = signal.signal(signal.SIGUSR1, HANDLERS[request.param])

    def prepare(emulator, kernel):
        signal.raise_signal(signal.SIGUSR1)

    monkeypatch.setattr(Emulator, "prepare", prepare)
    yield
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("interrupted", HANDLERS, indirect=True)
def test_an_error_of_a_signal_handler_is_the_programs(interrupted):
    x = torch.ones(16)
    with emulate() as gpu, pytest.raises(TooSlow):
        double[(1,)](x, torch.empty_like(x), 16)
    assert gpu.faults == []


def test_an_error_of_the_executor_is_still_a_fault(monkeypatch):
    def fail(emulator, kernel):
        raise TooSlow

    monkeypatch.setattr(Emulator, "prepare", fail)
    x = torch.ones(16)
    with emulate() as gpu:
        double[(1,)](x, torch.empty_like(x), 16)
    assert [fault.name for fault in gpu.faults] == ["error of the executor"]


# Products in another type than their operands


def parts(dtype):
    return [torch.randn(*shape).to(dtype) for shape in ((3, 40), (40, 5))]


PRODUCTS = {
    "mm": lambda a, b, **o: torch.mm(a, b, **o),
    "bmm": lambda a, b, **o: torch.bmm(a[None], b[None], **o),
    "addmm": lambda a, b, **o: torch.addmm(a[0, :5], a, b, beta=0.5, alpha=0.25, **o),
    "baddbmm": lambda a, b, **o: torch.baddbmm(a[:1, :5], a[None], b[None], beta=0.5, **o),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("operators", ["cpu", "float32"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_has_the_type_that_is_asked_for(name, operators, dtype):
    a, b = parts(dtype)
    exact = PRODUCTS[name](a.double(), b.double())
    with emulate(operators=operators) as gpu, cuda_is_cpu(gpu):
        found = PRODUCTS[name](a.cuda(), b.cuda(), out_dtype=torch.float32)
        out = torch.empty_like(found)
        PRODUCTS[name](a.cuda(), b.cuda(), out_dtype=torch.float32, out=out)
    assert found.dtype == torch.float32
    assert torch.equal(found, out)
    torch.testing.assert_close(found, exact.float())
    assert not torch.equal(found, exact.to(dtype).float())


def test_a_product_is_added_to_itself():
    a, b = parts(torch.bfloat16)
    total = torch.ones(3, 5)
    with emulate() as gpu, cuda_is_cpu(gpu):
        total = total.cuda()
        torch.addmm(total, a.cuda(), b.cuda(), out_dtype=torch.float32, out=total)
    torch.testing.assert_close(total, 1 + a.float() @ b.float())


def test_a_product_with_a_type_is_refused_where_a_gpu_refuses_it():
    with emulate() as gpu, cuda_is_cpu(gpu):
        a, b = parts(torch.bfloat16)
        with pytest.raises(NotImplementedError, match="on the host"):
            torch.mm(a, b, out_dtype=torch.float32)
        with pytest.raises(RuntimeError, match=r"out_dtype torch\.float16; on a GPU it is"):
            torch.mm(a.cuda(), b.cuda(), out_dtype=torch.float16)
    with pytest.raises(NotImplementedError, match=r"aten::mm\.dtype"):
        torch.mm(a, b, out_dtype=torch.float32)
