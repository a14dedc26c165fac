# SPDX-License-Identifier: MIT
"""Facts about the device on which a kernel runs, as Triton's driver states them."""

import triton
from torch import Tensor

from .rule import Device

# The compute capability and the multiprocessors of GPUs, by NVIDIA's data sheets: A100 and H100
# (SXM), H200, HGX B200. A capability of 90 is sm_90.
GPUS = {
    name: Device(name, capability, multiprocessors)
    for name, capability, multiprocessors in (
        ("A100", 80, 108),
        ("H100", 90, 132),
        ("H200", 90, 132),
        ("B200", 100, 148),
    )
}
# The number for a GPU that is not here, for which a kernel is compiled.
MULTIPROCESSORS = GPUS["H100"].multiprocessors


def device(t: Tensor) -> Device:
    """The current device, or Triton's interpreter, on which a kernel would run for ``t``."""
    if t.is_cpu and triton.runtime.driver._active is None:
        return Device("interpreter", 0, 3)
    driver = triton.runtime.driver.active
    target = driver.get_current_target()
    capability = target.arch if target.backend == "cuda" else 0
    utils = getattr(driver, "utils", None)  # a driver that only compiles has none
    present = utils.get_device_properties(driver.get_current_device()) if utils else {}
    multiprocessors = present.get("multiprocessor_count", MULTIPROCESSORS)
    return Device(f"{target.backend} {target.arch}", capability, multiprocessors)
