# SPDX-License-Identifier: MIT
"""Data sheets of GPUs, which the estimates and the bounds read.

"NVIDIA A100 Tensor Core GPU Architecture" (SXM, 80 GB), "NVIDIA H100 Tensor Core GPU Architecture"
(SXM), and the data sheets of H200 (SXM) and HGX B200. Shared memory, registers and warps are those
of "Technical Specifications per Compute Capability" in the "CUDA C++ Programming Guide".
"""

from collections.abc import Mapping
from typing import NamedTuple


class DataSheet(NamedTuple):
    """What NVIDIA says of a GPU.

    Attributes:
        capability: 90 is sm_90.
        ghz: the highest clock.
        memory: bandwidth in TB/s.
        l2: MB of the L2 cache.
        shared: bytes of a multiprocessor's shared memory. Each program takes `RESERVED` more.
        tensor: TFLOP/s of tensor cores by format, without sparsity.
        flops: TFLOP/s of the other units, by format.
    """

    capability: int
    multiprocessors: int
    ghz: float
    memory: float
    l2: int
    shared: int
    tensor: Mapping[str, float]
    flops: Mapping[str, float]

    @property
    def shared_of_program(self) -> int:
        """The most bytes of shared memory that a program may ask for."""
        return self.shared - RESERVED


_HOPPER = {"f16": 989.4, "tf32": 494.7, "int8": 1978.9, "fp8": 1978.9, "f64": 66.9}
_HOPPER_FLOPS = {"f32": 66.9, "f16": 133.8, "f64": 33.5}
DATA_SHEETS = {
    "A100": DataSheet(
        *(80, 108, 1.41, 2.039, 40, 167_936),
        {"f16": 312.0, "tf32": 156.0, "int8": 624.0, "f64": 19.5},
        {"f32": 19.5, "f16": 78.0, "f64": 9.7},
    ),
    "H100": DataSheet(90, 132, 1.98, 3.35, 50, 233_472, _HOPPER, _HOPPER_FLOPS),
    "H200": DataSheet(90, 132, 1.98, 4.8, 50, 233_472, _HOPPER, _HOPPER_FLOPS),
    "B200": DataSheet(
        *(100, 148, 1.98, 8.0, 126, 233_472),
        {"f16": 2250.0, "tf32": 1125.0, "int8": 4500.0, "fp8": 4500.0, "f64": 40.0},
        {"f32": 80.0, "f16": 160.0, "f64": 40.0},
    ),
}
"""The data sheets by the GPUs' names: those of A100, H100, H200 and B200."""
GPUS = {80: "A100", 90: "H100", 100: "B200"}  # by capability: those that are emulated
MEMORY = {80: 80 * 2**30, 90: 80 * 2**30, 100: 180 * 2**30}  # their bytes
ARCHITECTURES = {f"sm_{one.capability}": one.capability for one in DATA_SHEETS.values()}
"""The architectures for which kernels are compiled and executed, with their capabilities."""
# Of a multiprocessor of each of these GPUs, and the bytes of shared memory that a program takes
# for the system.
REGISTERS, WARPS, PROGRAMS, RESERVED = 65_536, 64, 32, 1024
