# SPDX-License-Identifier: MIT
"""A GPU in name only, for rehearsals without one. Python imports this at its start if it is on
PYTHONPATH.

The process ends where it first reaches for the GPU. The module $REHEARSAL_BLOCKED cannot be
imported. $REHEARSAL_GPUS is the number of GPUs, by default one.
"""

import os
import sys
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

sys.modules[os.environ.get("REHEARSAL_BLOCKED", "nothing")] = None  # type: ignore[assignment]


def end(*_: object) -> None:
    print("the rehearsal ends at the GPU", file=sys.stderr, flush=True)
    os._exit(0)


def pretend_gpu() -> None:
    import torch

    class Generator(torch.Generator):
        def __new__(cls, device: Any = "cpu") -> Any:
            return end() if torch.device(device).type == "cuda" else torch._C.Generator(device)

    properties = SimpleNamespace(
        name="NVIDIA Test",
        uuid="0",
        major=9,
        minor=0,
        multi_processor_count=132,
        total_memory=2**37,
    )
    for function, value in {
        "is_available": True,
        "device_count": int(os.environ.get("REHEARSAL_GPUS", "1")),
        "current_device": 0,
        "get_device_name": properties.name,
        "get_device_capability": (9, 0),
        "get_device_properties": properties,
    }.items():
        setattr(torch.cuda, function, lambda *_, value=value: value)
    torch.cuda._lazy_init = end
    torch.Generator = Generator  # type: ignore[misc]


def pretend_driver() -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    driver = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    driver.get_current_device = driver.get_current_stream = lambda *_: 0
    triton.runtime.driver._active = driver


with suppress(ImportError):  # of what is blocked
    if "import importlib" not in " ".join(sys.orig_argv):  # importing packages by name needs no GPU
        pretend_gpu()
        pretend_driver()
