# SPDX-License-Identifier: MIT
"""Checkpoints that are whole or absent, and that any mesh can load.

`torch.distributed.checkpoint` writes the tensors, each rank its slices; it has no checksums, and an
overwrite that is torn loads as a mixture of two. So a checkpoint is written into ``step-N.tmp`` with a
manifest of every file's SHA-256, flushed to the disk, renamed to ``step-N`` in one step, and named in
``latest``; it is checked before it is read, and a damaged one is passed over for the one before.
"""

import fcntl
import json
import os
import pickle
import re
import shutil
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from torchpar.errors import ConfigError
from torchpar.parallel import manifest
from torchpar.parallel.manifest import first_line
from torchpar.parallel.storage import Reader, Writer, staged
from torchpar.parallel.world import World


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was found whole.

    Attributes:
        state: what was saved beside the tensors.
        shapes: of the whole tensors, by name.
    """

    path: Path
    state: dict[str, Any]
    shapes: dict[str, torch.Size]
    _group: dist.ProcessGroup | None

    def read(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill ``tensors``, plain ones and `Slice`s, from the tensors of their names. Each rank calls it."""
        try:
            with _alone_is_fine():
                load(dict(tensors), storage_reader=Reader(self.path), process_group=self._group)
        except CheckpointException as e:
            raise ValueError(_cause(e)) from e


class Checkpoints:
    """The checkpoints in a folder that all ranks see.

    Every method is called by all ranks together.

    Args:
        keep: how many to keep; the older ones are removed after each save.
        asynchronous: write while training goes on. A save waits for the one before it, and raises its
            error.
    """

    def __init__(self, folder: Path, world: World, keep: int = 2, asynchronous: bool = False):
        if keep < 1:
            raise ConfigError(f"keep is {keep}, expected at least 1")
        self.folder = folder
        self.world = world
        self.keep = keep
        self.asynchronous = asynchronous
        # A group of its own: a save's messages must not mix with training's. gloo's are of CPU tensors.
        self._group = _new_group(world)
        self._pending: Future[None] | None = None
        self._locked = False  # by rank 0

    def save(self, step: int, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        """Save as ``step-N``. A process killed at any moment leaves it whole or absent.

        Args:
            tensors: plain ones, the same on every rank that has them, and `Slice`s.
            state: what JSON can hold; rank 0's is saved.

        Raises:
            ConfigError: it could not be written; what was saved before is still there. On every rank.
        """
        self.wait()
        if not self.asynchronous:
            self._save(step, tensors, state)
            return
        copies, state = {name: staged(t) for name, t in tensors.items()}, json.loads(json.dumps(state))
        self._pending = Future()
        # A daemon: at the end of a process whose peers are lost, nobody waits for it.
        threading.Thread(target=self._run, args=(self._pending, step, copies, state), daemon=True).start()

    def _run(self, future: "Future[None]", *arguments: Any) -> None:
        try:
            self._save(*arguments)
            future.set_result(None)
        except BaseException as e:
            future.set_exception(e)

    def wait(self) -> None:
        """Wait for the save in progress; raise its error."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def load(self) -> Saved | None:
        """The newest checkpoint that is whole, None where there is none; tells of those passed over.

        Raises:
            ConfigError: there are checkpoints, and all are damaged; on every rank.
        """
        self.wait()
        found = self.world.on_rank_0(self._newest_whole, self._group)
        if found is None:
            return None
        path, state = found

        def shapes() -> dict[str, torch.Size]:
            metadata = Reader(path).read_metadata()
            return {
                name: getattr(md, "size", torch.Size()) for name, md in metadata.state_dict_metadata.items()
            }

        try:
            return Saved(path, state, self.world.agree(shapes, self._group)[self.world.rank], self._group)
        except (OSError, pickle.UnpicklingError) as e:
            raise ConfigError(
                f"{path} cannot be read by every rank ({e}); all ranks must see {self.folder}"
            ) from e

    def _newest_whole(self) -> tuple[Path, dict[str, Any]] | None:
        for unfinished in self.folder.glob("step-*.tmp"):
            _say(f"{unfinished} was not finished and is passed over")
        damaged = []
        for path in reversed(self._steps()):
            try:
                return path, manifest.verify(path)
            except ConfigError as e:
                damaged.append(str(e))
                _say(f"{e}; passed over for the one before")
        if damaged:
            raise ConfigError(
                f"{damaged[0]}; no other checkpoint in {self.folder} is whole: remove them to start afresh"
            )
        return None

    def _steps(self) -> list[Path]:
        steps = [p for p in self.folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
        return sorted(steps, key=_number)

    def _save(self, step: int, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        path = self.folder / f"step-{step}"
        unfinished = path.with_suffix(".tmp")
        try:
            self.world.on_rank_0(lambda: self._clear(unfinished), self._group)
            writer = Writer(unfinished, sync_files=True)
            with _alone_is_fine():
                save(dict(tensors), storage_writer=writer, process_group=self._group)
            self.world.on_rank_0(lambda: self._publish(unfinished, path, state), self._group)
        except (CheckpointException, Exception) as e:
            if self._locked:
                shutil.rmtree(unfinished, ignore_errors=True)
            if not isinstance(e, (CheckpointException, OSError)):
                raise
            reason = _cause(e) if isinstance(e, CheckpointException) else first_line(e)
            raise ConfigError(
                f"{path} could not be saved: {reason}; the checkpoints before it are "
                "kept, make room and start again"
            ) from e

    def _take_lock(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.folder / ".lock", os.O_WRONLY | os.O_CREAT, 0o644)  # never closed:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held until the process ends, however it does
        except OSError as e:
            raise ConfigError(
                f"another run saves to {self.folder} ({e}); wait for its end, or use another folder"
            ) from e
        self._locked = True

    def _clear(self, unfinished: Path) -> None:
        if not self._locked:
            self._take_lock()
        for left in self.folder.glob("step-*.tmp"):  # by processes that were killed
            shutil.rmtree(left)
        unfinished.mkdir(parents=True)

    def _publish(self, unfinished: Path, path: Path, state: dict[str, Any]) -> None:
        metadata = Reader(unfinished).read_metadata()
        mesh = self.world.mesh
        files = sorted(p.name for p in unfinished.iterdir())
        missing = {info.relative_path for info in metadata.storage_data.values()} - set(files)
        if missing:
            raise OSError(
                f"rank 0 does not see {sorted(missing)}, which other ranks wrote: they need one folder"
            )
        contents = {
            "mesh": {"dp": self.world.world_size}
            if mesh is None
            else dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True)),
            "shapes": {
                name: list(md.size)
                for name, md in metadata.state_dict_metadata.items()
                if hasattr(md, "size")
            },
            "versions": {"torch": torch.__version__, "format": 1},
            "state": state,
        }
        manifest.write(unfinished, files, contents)
        if path.exists():  # damaged, or it would have been resumed from
            shutil.rmtree(path)
        os.replace(unfinished, path)
        manifest.sync(self.folder)
        manifest.write_text(self.folder / "latest.tmp", path.name + "\n")
        os.replace(self.folder / "latest.tmp", self.folder / "latest")
        manifest.sync(self.folder)
        # Not counting later ones, which were damaged when this run began.
        before = [p for p in self._steps() if _number(p) <= _number(path)]
        for old in before[: -self.keep]:
            os.replace(old, old.with_suffix(".tmp"))  # one that is half removed must not look damaged
            shutil.rmtree(old.with_suffix(".tmp"))


@contextmanager
def _alone_is_fine() -> Iterator[None]:
    with warnings.catch_warnings():
        if not dist.is_initialized():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _new_group(world: World) -> dist.ProcessGroup | None:
    if world.world_size == 1:
        return None
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=world.timeout))
    assert isinstance(group, dist.ProcessGroup)
    return group


def _number(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _cause(error: CheckpointException) -> str:
    return "; ".join(f"rank {rank}: {first_line(e)}" for rank, (e, _) in error.failures.items())


def _say(message: str) -> None:
    print(f"checkpoint: {message}", file=sys.stderr, flush=True)
