# SPDX-License-Identifier: MIT
"""Checkpoints, read by PyTorch alone and compared bit for bit."""

import re
import tempfile
from pathlib import Path

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

_OTHERS = r"random\.\w+\.\d+|random\.(python|numpy)"


def latest(folder: Path) -> str:
    """Return the name of the newest checkpoint, "" if there is none yet."""
    try:
        return (folder / "latest").read_text().strip()
    except OSError:
        return ""


def steps(folder: Path) -> list[str]:
    return sorted((p.name for p in folder.glob("step-*")), key=lambda name: (len(name), name))


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Read the full tensors of a checkpoint by PyTorch's own reader.

    Of random states PyTorch's of rank 0 is taken: those of Python and NumPy begin with chance.
    """
    with tempfile.NamedTemporaryFile() as file:
        dcp_to_torch_save(checkpoint, file.name)
        found = torch.load(file.name)
    return {name: t for name, t in found.items() if not re.fullmatch(_OTHERS, name)}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether tensors have the same names, shapes and bits."""
    pairs = [(t, b[name]) for name, t in a.items() if name in b]
    return a.keys() == b.keys() and all(
        t.shape == u.shape and torch.equal(*(one.reshape(-1).view(torch.uint8) for one in (t, u)))
        for t, u in pairs
    )
