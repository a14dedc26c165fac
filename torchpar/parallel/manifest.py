# SPDX-License-Identifier: MIT
"""What a checkpoint is made of, by SHA-256, and the disk's confirmation that it is there."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchpar.errors import ConfigError

MANIFEST = "manifest.json"
UNSIGNED = "0" * 64  # in the place of the manifest's own SHA-256 when that is taken


def write(folder: Path, files: Sequence[str], contents: dict[str, Any]) -> None:
    """Write ``folder``'s manifest: the SHA-256 of ``files`` and of itself, and ``contents``."""
    digests = {name: _sha256(folder / name) for name in files}
    text = json.dumps({"files": digests, "sha256": UNSIGNED, **contents}, indent=1)
    write_text(folder / MANIFEST, text.replace(UNSIGNED, _digest(text)))
    sync(folder)


def verify(path: Path) -> dict[str, Any]:
    """The state of the checkpoint at ``path``.

    Raises:
        ConfigError: naming the file that is missing or damaged.
    """
    try:
        text = (path / MANIFEST).read_bytes().decode()
        manifest = json.loads(text)
        if manifest["sha256"] != _digest(text.replace(manifest["sha256"], UNSIGNED)):
            raise ValueError("its SHA-256 is not the one it says")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as e:
        raise ConfigError(f"{path / MANIFEST} is damaged ({first_line(e)})") from e
    for name, digest in manifest["files"].items():
        try:
            found = _sha256(path / name)
        except OSError as e:
            raise ConfigError(f"{path / name} is missing or cannot be read ({first_line(e)})") from e
        if found != digest:
            raise ConfigError(
                f"{path / name} is damaged: its SHA-256 is {found[:12]}…, the manifest says {digest[:12]}…"
            )
    state: dict[str, Any] = manifest["state"]
    return state


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a file and have the disk confirm it."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync(folder: Path) -> None:
    """Make the folder's names last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def first_line(error: BaseException) -> str:
    """An error's name and the first line of what it says."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]
