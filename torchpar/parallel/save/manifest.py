# SPDX-License-Identifier: MIT
"""Manifest of a checkpoint: the SHA-256 of every file, and files flushed to the disk."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchpar.errors import ConfigError

MANIFEST = "manifest.json"
UNSIGNED = "0" * 64  # stands for the manifest's own SHA-256 while that is computed


def write(folder: Path, files: Sequence[str], contents: dict[str, Any]) -> None:
    """Write the manifest of ``folder``: the SHA-256 of ``files`` and of itself, and ``contents``."""
    digests = {name: _sha256(folder / name) for name in files}
    text = json.dumps({"files": digests, "sha256": UNSIGNED, **contents}, indent=1)
    write_text(folder / MANIFEST, text.replace(UNSIGNED, _digest(text)))
    sync(folder)


def verify(path: Path) -> dict[str, Any]:
    """Check every file of the checkpoint at ``path`` and return its state.

    Raises:
        ConfigError: a file is missing or damaged; the message names it.
    """
    try:
        text = (path / MANIFEST).read_bytes().decode()
        manifest = json.loads(text)
        if manifest["sha256"] != _digest(text.replace(manifest["sha256"], UNSIGNED)):
            raise ValueError("its SHA-256 differs from the one it records")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as e:
        raise ConfigError(f"{path / MANIFEST} is damaged ({first_line(e)})") from e
    for name, digest in manifest["files"].items():
        try:
            actual = _sha256(path / name)
        except OSError as e:
            raise ConfigError(f"{path / name} is missing or cannot be read ({first_line(e)})") from e
        if actual != digest:
            raise ConfigError(
                f"{path / name} is damaged: its SHA-256 is {actual[:12]}…, the manifest says {digest[:12]}…"
            )
    state: dict[str, Any] = manifest["state"]
    return state


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a file and flush it to the disk."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync(folder: Path) -> None:
    """Flush the folder's names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def first_line(error: BaseException) -> str:
    """Return an error's name and the first line of its message."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]
