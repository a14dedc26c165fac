# SPDX-License-Identifier: MIT
"""Checkpoints that are whole or absent."""

import os
from pathlib import Path
from typing import Any

import torch

from torchpar.errors import ConfigError

NAME = "checkpoint.pt"


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write ``state`` into ``folder``, replacing what was there in one step.

    A process killed at any moment leaves the old checkpoint or the new one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{NAME}.tmp"
    with unfinished.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, folder / NAME)
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)  # the new name itself
    finally:
        os.close(directory)


def load(folder: Path) -> dict[str, Any] | None:
    """The state that `save` left in ``folder``, its tensors on the CPU; None where there is none.

    Raises:
        ConfigError: the file is damaged, or not a checkpoint.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        reason = f"{type(e).__name__}: {e}".partition("\n")[0]
        raise ConfigError(f"{path} cannot be read ({reason}); remove it to start afresh") from e
    return state
