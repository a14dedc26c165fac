# SPDX-License-Identifier: MIT
"""The warnings of a GPU that pyproject.toml ignores are those that the installed torch gives."""

import mmap
import re
import warnings
from pathlib import Path

import pytest
import torch

TORCH = Path(torch.__file__).parent


def is_ignored(text: str) -> bool:
    """Whether a warning of ``text`` passes under pytest's filters, pyproject's."""
    try:
        warnings.warn(text, UserWarning, stacklevel=1)
    except UserWarning:
        return False
    return True


@pytest.mark.parametrize(
    "file, start",
    [
        ("_inductor/compile_fx.py", "TensorFloat32 tensor cores for float32"),
        ("lib/libtorch_cuda.so", "Attempting to run cuBLAS, but there was no current"),
        ("lib/libtorch_cpu.so", "The AccumulateGrad node's stream does not match"),
    ],
)
def test_what_torch_says_is_ignored(file: str, start: str) -> None:
    if not (TORCH / file).exists():
        pytest.skip(f"this torch has no {file}")
    with (TORCH / file).open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as content:
        found = content.find(start.encode())
        assert found >= 0
        text = re.match(rb'[^\0"]*', content[found : found + 1000])[0].decode()
    assert is_ignored(text)
    assert not is_ignored(text[1:])
