# SPDX-License-Identifier: MIT
"""Arguments of a launch as a kernel's parameters: numbers, addresses and tensormaps."""

from collections.abc import Sequence
from typing import Any, Protocol, TypedDict

import numpy as np
import torch
from torch import Tensor

from nogpu.instructions.tma import STRIDES_END, TF32
from nogpu.machine.vector_clocks import GIVEN
from nogpu.native.encoding import FIELDS
from nogpu.triton.emulator import Emulator
from nogpu.triton.host_memory import has_host_memory
from nogpu.triton.stages import Kind

LARGEST_SIZE = 2**32 - 1  # of a dimension of a tensormap


class TensorDescriptor(Protocol):
    """A tensor descriptor that the host has made."""

    base: Tensor
    shape: Sequence[int]
    strides: Sequence[int]
    padding: str


class TensormapLayout(TypedDict):
    """How a kernel expects a tensormap."""

    swizzle: int
    elem_size: int
    elem_type: int
    block_size: Sequence[int]


def flatten(
    emulator: Emulator,
    name: str,
    kind: Kind,
    value: Any,
    maps: list[TensormapLayout] | None,
    to: list[int],
) -> None:
    """Append the bits of the parameters that an argument of ``kind`` becomes."""
    if isinstance(kind, tuple):
        for i, (one, part) in enumerate(zip(kind, value, strict=True)):
            flatten(emulator, f"{name}[{i}]", one, part, maps, to)
    elif kind == "constexpr":
        return
    elif not kind.startswith("tensordesc"):
        to.append(bits(emulator, name, kind, value))
    elif maps is None:  # a descriptor without TMA
        to.append(bits(emulator, name, "*", value.base))
        layout = [int(n) % 2**64 for n in (*value.shape, *value.strides)]
        to += [*layout, int(value.padding == "nan")]
        if hasattr(value, "round_f32_to_tf32"):
            to.append(int(value.round_f32_to_tf32))
        to += layout
    else:
        to.append(_tensormap(emulator, name, value, maps.pop(0)))
        to += [*map(int, value.shape), *map(int, value.strides)]


FORMATS = {"fp32": ("f4", "u4"), "f32": ("f4", "u4"), "fp64": ("f8", "u8"), "fp16": ("f2", "u2")}


def bits(emulator: Emulator, name: str, kind: str, value: Any) -> int:
    """Return the bits of a parameter."""
    if hasattr(value, "data_ptr"):
        base = getattr(value, "base", value)  # of triton.reinterpret
        if isinstance(base, Tensor) and base.untyped_storage().nbytes():
            if not has_host_memory(base):
                raise ValueError(f"{name} is on {base.device}, expected a tensor on the CPU")
            emulator.host_memory.place(base, name)
        return int(value.data_ptr()) % 2**64
    if value is None:
        return 0
    if kind in FORMATS:
        dtype, integer = FORMATS[kind]
        with np.errstate(over="ignore"):  # a GPU gets an infinity, too
            return int(np.array(value, dtype).view(integer)[()])
    if kind == "bf16":
        return int(torch.tensor(value, dtype=torch.bfloat16).view(torch.int16)) % 2**16
    return int(value) % 2**64


def _tensormap(
    emulator: Emulator, name: str, descriptor: TensorDescriptor, meta: TensormapLayout
) -> int:
    """Return the address of a tensormap, as the host makes it from a descriptor.

    Raises:
        ValueError: a tensormap cannot hold the shape or the strides.
    """
    shape, strides = [list(map(int, given)) for given in (descriptor.shape, descriptor.strides)]
    if not all(0 < n <= LARGEST_SIZE for n in shape):
        raise ValueError(
            f"the descriptor {name} has shape {shape}, expected sizes from 1 to "
            f"{LARGEST_SIZE:,}; give those of its tensor"
        )
    largest = (STRIDES_END - 16) // meta["elem_size"]
    if not all(0 <= n <= largest for n in strides):
        raise ValueError(
            f"the descriptor {name} has strides {strides}, expected from 0 to "
            f"{largest:,}; give those of its tensor"
        )
    bits(emulator, name, "*", descriptor.base)
    raw = bytearray(128)

    def put(field: str, values: Sequence[int]) -> None:
        start, kind = FIELDS[field]
        size = int(kind[1:]) // 8
        for n, value in enumerate(values):
            raw[start + n * size : start + (n + 1) * size] = int(value).to_bytes(size, "little")

    rank = len(shape)
    put("global_address", [descriptor.base.data_ptr()])
    put("rank", [rank - 1])
    put("box_dim", meta["block_size"][::-1])
    put("global_dim", shape[::-1])
    put("element_stride", [1] * rank)
    put("global_stride", [s * meta["elem_size"] for s in strides[:-1][::-1]])
    rounds = getattr(descriptor, "round_f32_to_tf32", False)  # Triton 3.6 has none
    put("elemtype", [TF32 if rounds else meta["elem_type"]])
    put("interleave_layout", [0])
    put("swizzle_mode", [meta["swizzle"]])
    put("fill_mode", [int(descriptor.padding == "nan")])
    place = emulator.allocate("a tensormap", 128)
    place.data[:128] = np.frombuffer(bytes(raw), np.uint8)
    place.writes[:] = GIVEN
    place.published.add(0)
    place.acquired[0] = GIVEN
    return place.base
