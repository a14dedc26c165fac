# SPDX-License-Identifier: MIT
"""Scripts that say "cuda", on a CPU: the device means the CPU, and `torch.cuda` answers for a GPU.

with cuda_is_cpu(gpu):
    x = torch.randn(1000, device="cuda")  # a tensor on the CPU, whose is_cuda is True
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode

from torchpar.ptx.driver import SHARED_BYTES, Emulator

NAMES = {80: "NVIDIA A100", 90: "NVIDIA H100", 100: "NVIDIA B200"}
GIB, MIB = 2**30, 2**20
# By the data sheets: bytes of memory, of the L2 cache, and of a multiprocessor's shared memory.
MEMORY = {80: 80 * GIB, 90: 80 * GIB, 100: 180 * GIB}
L2_CACHE = {80: 40 * MIB, 90: 50 * MIB, 100: 126 * MIB}
SHARED = {80: 167_936, 90: 233_472, 100: 233_472}


def _on_cpu(value: Any) -> Any:
    """Return the CPU for a CUDA device, by whatever name; other values unchanged."""
    if isinstance(value, str) and value.partition(":")[0] == "cuda":
        return "cpu"
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return value


class _OnCpu(TorchFunctionMode):
    """Functions of PyTorch whose device is CUDA take the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        if func == torch.Tensor.cuda:
            return args[0]
        given = {name: _on_cpu(value) for name, value in (kwargs or {}).items()}
        if isinstance(given.get("device"), int):
            given["device"] = "cpu"
        if func == torch.Tensor.to and len(args) > 1 and type(args[1]) is int:
            args = (args[0], "cpu", *args[2:])
        if func == torch.Tensor.pin_memory:
            return args[0]
        return func(*map(_on_cpu, args), **given)


class _Generator(torch.Generator):
    """A generator of the CPU, also where one of the device is asked for."""

    def __new__(cls, device: Any = "cpu") -> "_Generator":
        return super().__new__(cls, device=_on_cpu(device))  # type: ignore[call-arg]  # its stub has no arguments


class _Stream:
    """A stream of a device that does everything at once."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any): ...

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *error: object) -> None: ...

    def synchronize(self) -> None: ...

    def wait_stream(self, other: Any) -> None: ...


class _Event(_Stream):
    """An event; no time passes between two of them."""

    def record(self, stream: Any = None) -> None: ...

    def elapsed_time(self, other: Any) -> float:
        return 1e-3


def _answers(emulator: Emulator) -> dict[str, Any]:
    """Return what `torch.cuda` says about the GPU."""
    major, minor = divmod(emulator.capability, 10)
    properties = SimpleNamespace(
        name=NAMES[emulator.capability],
        major=major,
        minor=minor,
        multi_processor_count=emulator.multiprocessors,
        total_memory=MEMORY[emulator.capability],
        shared_memory_per_block=49_152,
        shared_memory_per_block_optin=SHARED_BYTES[emulator.capability],
        shared_memory_per_multiprocessor=SHARED[emulator.capability],
        regs_per_multiprocessor=65_536,
        max_threads_per_multi_processor=2048,
        warp_size=32,
        L2_cache_size=L2_CACHE[emulator.capability],
        gcnArchName="",
    )

    def always(value: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: value

    return {
        "is_available": always(True),
        "device_count": always(1),
        "current_device": always(0),
        "get_device_capability": always((major, minor)),
        "get_device_name": always(properties.name),
        "get_device_properties": always(properties),
        "set_device": always(None),
        "synchronize": always(None),
        "empty_cache": always(None),
        "is_bf16_supported": always(True),
        "memory_allocated": always(0),
        "max_memory_allocated": always(0),
        "memory_reserved": always(0),
        "reset_peak_memory_stats": always(None),
        "manual_seed": lambda seed: torch.manual_seed(seed) and None,
        "current_stream": always(_Stream()),
        "default_stream": always(_Stream()),
        "stream": lambda stream: nullcontext(),
        "device": lambda device: nullcontext(),
        "Stream": _Stream,
        "Event": _Event,
        "_lazy_init": always(None),
    }


@contextmanager
def cuda_is_cpu(emulator: Emulator) -> Iterator[None]:
    """Let the block's "cuda" be the CPU, on which ``emulator`` executes the launches."""
    import triton

    def bench(call: Callable[[], Any], *args: Any, quantiles: Any = None, **kwargs: Any) -> Any:
        call()
        return [1.0] * len(quantiles) if quantiles else 1.0

    with ExitStack() as stack:
        for name, answer in _answers(emulator).items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        stack.enter_context(patch.object(torch, "Generator", _Generator))
        stack.enter_context(patch.object(triton.testing, "do_bench", bench))
        stack.enter_context(_OnCpu())
        yield
