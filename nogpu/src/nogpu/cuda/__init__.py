# SPDX-License-Identifier: MIT
"""The stand-in for `torch.cuda`, CUDA graphs, and kernels of CUDA C++: `load` and `compile`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os

    from nogpu.cpp.launching import Module


def load(path: str | os.PathLike[str], options: Sequence[str] = ()) -> Module:
    """Return the kernels of a file of CUDA C++, by their names.

        kernels = nogpu.cuda.load("gemm.cu")
        kernels["gemm"][grid, block, shared_bytes](x, y, n)

    ``grid`` and ``block`` are an integer or up to three. Arguments are NumPy arrays, tensors on the
    CPU, numbers, and tuples, which are structures. Where nothing is emulated, the call launches on
    a GPU, and arrays are tensors there. A template is named with its arguments:
    ``kernels["gemm<float, 16>"]``.

    Args:
        options: further ones of NVRTC, such as "-DN=16".

    Raises:
        nogpu.cpp.nvrtc.CompileError: NVRTC refuses the file; each line of the message names one.
    """
    from nogpu.cpp.launching import compile_source

    file = Path(path).absolute()
    return compile_source(file.read_text("utf-8"), str(file), options)


def compile(source: str, options: Sequence[str] = ()) -> Module:  # nogpu.cuda.compile
    """Return the kernels of CUDA C++ that is given as text, as `load` does for a file."""
    from nogpu.cpp.launching import compile_source

    return compile_source(source, "", options)
