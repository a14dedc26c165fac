# SPDX-License-Identifier: MIT
"""Checkpoints in a folder: save atomically, check before loading, load on any mesh.

`torch.distributed.checkpoint` writes the tensors, each rank its own shards. It has no checksums,
and if an overwrite is interrupted, the result loads as a mixture of two checkpoints. So a
checkpoint is written to ``step-N.tmp`` with a manifest of every file's SHA-256, flushed to the
disk, renamed to ``step-N`` in one step, and named in ``latest``. A damaged checkpoint is skipped,
and the previous checkpoint is loaded. Unpickling uses allow-lists only: `torch.load` with
``weights_only`` for tensors, and `_Unpickler` for the metadata.
"""

import errno
import fcntl
import hashlib
import json
import os
import pickle
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult

from torchpar.errors import ConfigError, check_whole, first_line
from torchpar.parallel.launch.processes import shutdown_timeout
from torchpar.parallel.launch.rendezvous import run_in_daemon
from torchpar.parallel.launch.world import World

T = TypeVar("T")
MANIFEST = "manifest.json"
LOCK = ".lock"
TICK = 0.1  # seconds between two attempts to lock a folder
LINGER = 3.0  # seconds in which a run that was stopped has ended
SLACK = 5.0  # seconds in which the system ends ranks that were killed
COPY_AHEAD = 10_000_000  # bytes of a GPU's tensors, as PyTorch has it by default
# The locked files of this process, by device and inode. An flock belongs to the open file: unlike
# lockf's, it stays if the process closes another descriptor of the file, as `shutil.copytree` does.
# Linux sends it to the server of an NFS. The kernel releases it when the last process has ended
# that has the open file. A process that Python forks, such as a data loader's worker, closes it at
# once. One that compiled code forks and that starts no program holds the lock as long as it lives.
_LOCKED: dict[tuple[int, int], int] = {}
_UNSIGNED = "0" * 64  # in place of the manifest's SHA-256 while this is computed
# The classes in torch.distributed.checkpoint's metadata of tensors. BytesStorageMetadata, for other
# objects, is left out, because PyTorch would unpickle those objects without an allow-list.
_CLASSES = {
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},  # the same in Python 3.13
    "torch": {
        "Size",
        *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
    },
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
}


@dataclass(frozen=True)
class CheckpointConfig:
    """Settings of a run's checkpoints.

    Attributes:
        folder: the folder of the checkpoints, on a file system of all ranks. A run resumes from the
            newest checkpoint in it. A string becomes a path.
        every: steps between two saves; None saves after each epoch. A run is also saved at its end,
            and when a rank receives SIGTERM, SIGINT, SIGHUP or SIGQUIT.
        keep: number of checkpoints to keep; older checkpoints are removed after each save.
        asynchronous: write while training continues. A save waits for the previous save, and raises
            its error.

    Raises:
        ConfigError: ``every`` or ``keep`` is no whole number from 1 on; ``folder`` is not a
            path, or is a file.
    """

    folder: Path
    every: int | None = None
    keep: int = 2
    asynchronous: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.folder, str | os.PathLike):
            raise ConfigError(f"the checkpoints' folder is {self.folder!r}, expected a path")
        object.__setattr__(self, "folder", Path(self.folder))
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"the checkpoints' folder {self.folder} is a file; give another path")
        for name in ("every", "keep"):
            value = getattr(self, name)
            if value is not None or name == "keep":
                object.__setattr__(self, name, check_whole(name, value))


@dataclass(frozen=True)
class Checkpoint:
    """A complete, undamaged checkpoint on the disk.

    Attributes:
        state: the state that was saved with the tensors.
        shapes: unsharded shapes of the tensors, by name.
    """

    path: Path
    state: dict[str, Any]
    shapes: dict[str, torch.Size]
    _group: dist.ProcessGroup

    def read(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill ``tensors``, by name: plain tensors, and DTensors, of which this rank has a shard.

        Raises:
            ValueError: on every rank: a name, a shape or a file does not fit.
        """
        try:
            load(dict(tensors), storage_reader=_Reader(self.path), process_group=self._group)
        except CheckpointException as e:
            raise ValueError(_cause(e)) from e

    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtypes of the tensors, by name.

        Raises:
            ValueError: the metadata cannot be read.
        """
        try:
            metadata = _Reader(self.path).read_metadata().state_dict_metadata
        except Exception as e:  # of any kind: it may be forged
            raise ValueError(first_line(e)) from e
        tensors = {n: t for n, t in metadata.items() if isinstance(t, TensorStorageMetadata)}
        return {name: tensor.properties.dtype for name, tensor in tensors.items()}


class Checkpoints:
    """Checkpoints in a folder that all ranks see. All ranks call every method."""

    def __init__(self, config: CheckpointConfig, world: World):
        self.config, self.folder, self.world = config, config.folder, world
        # A separate group, so that a save's messages do not mix with training's; gloo, for CPU
        # tensors.
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=world.timeout))
        assert isinstance(group, dist.ProcessGroup)
        self._group = group
        self._pending: Future[None] | None = None
        self._locked = False  # by rank 0

    def lock(self) -> None:
        """Refuse other runs that save to this folder, until this process ends.

        The ranks of a run whose torchrun was killed are waited for. A folder with checkpoints that
        cannot be written is left as it is.

        Raises:
            ConfigError: on every rank: another run saves to the folder, or there can be no folder.
        """

        def lock() -> None:
            try:
                self._lock()
            except OSError as e:  # which the first save reports where there are checkpoints
                if not self._paths():
                    raise ConfigError(
                        f"nothing can be saved to {self.folder} ({e}); take another folder"
                    ) from e

        self._on_rank_0(lock)

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, object]) -> None:
        """Save as ``step-N``. If a process is killed, the checkpoint is complete or absent.

        Args:
            tensors: plain tensors, which are the same on every rank that has them, and DTensors.
            state: JSON, and tensors, which become numbers or lists. The state of rank 0 is saved.

        Raises:
            ConfigError: on every rank: the checkpoint could not be written. Older checkpoints are
                kept.
        """
        self.wait()
        state = json.loads(json.dumps(state, default=Tensor.tolist))
        if not self.config.asynchronous:
            self._save(step, tensors, state)
            return
        copies = {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}
        # A daemon thread, so that a process whose peers are lost can end without waiting for it.
        self._pending = run_in_daemon(lambda: self._save(step, copies, state))

    def wait(self) -> None:
        """Wait for the save in progress; raise its error."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def load(self) -> Checkpoint | None:
        """Return the newest undamaged checkpoint, or None; print the checkpoints that are skipped.

        Raises:
            ConfigError: on every rank: there are checkpoints, and all are damaged.
        """
        self.wait()
        newest = self._on_rank_0(self._newest_undamaged)
        if newest is None:
            return None
        path, manifest = newest
        shapes = {name: torch.Size(shape) for name, shape in manifest["shapes"].items()}
        return Checkpoint(path, manifest["state"], shapes, self._group)

    def _on_rank_0(self, function: Callable[[], T]) -> T | None:
        """Return the result of rank 0, or raise its error, on every rank."""
        on_this = function if self.world.rank == 0 else lambda: None
        return self.world.gather_results(on_this, self._group)[0]

    def _newest_undamaged(self) -> tuple[Path, dict[str, Any]] | None:
        for unfinished in self.folder.glob("step-*.tmp"):
            _warn(f"{unfinished} was not finished and is skipped")
        damaged = []
        for path in reversed(self._paths()):
            try:
                return path, _verify(path)
            except ConfigError as e:
                damaged.append(str(e))
                _warn(f"{e}; skipped for the previous checkpoint")
        if damaged:
            raise ConfigError(
                f"{damaged[0]}; no other checkpoint in {self.folder} is undamaged: remove them to "
                "start afresh"
            )
        return None

    def _paths(self) -> list[Path]:
        """Return the checkpoints, oldest first."""
        paths = [p for p in self.folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
        return sorted(paths, key=_step_of)

    def _save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, object]) -> None:
        path = self.folder / f"step-{step}"
        unfinished = path.with_suffix(".tmp")
        try:
            self._on_rank_0(lambda: self._make_folder(unfinished))
            # Only a GPU's tensors are copied ahead.
            from_gpu = any(t.device.type == "cuda" for t in tensors.values())
            ahead = COPY_AHEAD if from_gpu else 0
            writer = _Writer(unfinished, sync_files=True, per_thread_copy_ahead=ahead)
            save(dict(tensors), storage_writer=writer, process_group=self._group)
            self._on_rank_0(lambda: self._publish(unfinished, path, state))
        except (CheckpointException, Exception) as e:  # the first is a BaseException
            if self._locked:
                shutil.rmtree(unfinished, ignore_errors=True)
            if not isinstance(e, (CheckpointException, OSError)):
                raise
            raise ConfigError(
                f"{path} could not be saved: {_cause(e)}; the checkpoints before it are kept, make "
                "room, or take a folder that all ranks see, and start again"
            ) from e

    def _make_folder(self, unfinished: Path) -> None:
        self._lock()
        for leftover in self.folder.glob("step-*.tmp"):  # of processes that were killed
            shutil.rmtree(leftover)
        unfinished.mkdir(parents=True)

    def _lock(self) -> None:
        """Lock the folder, if this object has not."""
        if self._locked:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        # Never closed: the kernel releases the lock when the process ends, also when it is killed.
        file = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        began, is_silent = time.monotonic(), True
        while not _is_locked_by_this(file, self.folder):
            holder, waited = _Holder.of(file), time.monotonic() - began
            # The other ranks wait meanwhile.
            patience = LINGER if holder.is_at_work() else shutdown_timeout() + SLACK
            patience = min(patience, self.world.timeout / 2)
            if waited > patience:
                os.close(file)
                raise ConfigError(
                    f"another run saves to {self.folder} ({holder}); wait for its end, or use "
                    "another folder"
                )
            if is_silent and patience > LINGER:
                _warn(f"{holder} still saves to {self.folder}; waiting up to {patience:g} s")
                is_silent = False
            time.sleep(TICK)
        self._locked = True

    def _publish(self, unfinished: Path, path: Path, state: Mapping[str, object]) -> None:
        metadata = _Reader(unfinished).read_metadata()
        files = {".metadata"} | {info.relative_path for info in metadata.storage_data.values()}
        mesh = self.world.mesh
        contents = {
            "mesh": dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True)),
            "shapes": {
                name: list(tensor.size)
                for name, tensor in metadata.state_dict_metadata.items()
                if isinstance(tensor, TensorStorageMetadata)
            },
            "versions": {"torch": torch.__version__, "format": 1},
            "state": state,
        }
        write_manifest(unfinished, sorted(files), contents)
        if path.exists():  # damaged, because the run did not resume from it
            shutil.rmtree(path)
        os.replace(unfinished, path)
        _sync(self.folder)
        (self.folder / "latest").write_text(path.name + "\n")  # for people
        _sync(self.folder / "latest")
        _sync(self.folder)
        # Checkpoints of later steps were damaged when this run began: they do not count as kept.
        until_now = [p for p in self._paths() if _step_of(p) <= _step_of(path)]
        for old in until_now[: -self.config.keep]:
            # A half-removed checkpoint must not look damaged.
            os.replace(old, old.with_suffix(".tmp"))
            shutil.rmtree(old.with_suffix(".tmp"))


def _is_locked_by_this(file: int, folder: Path) -> bool:
    """Try to lock a file; return whether this process has locked it, now or earlier."""
    status = os.fstat(file)
    identity = status.st_dev, status.st_ino
    if identity in _LOCKED:
        os.close(file)
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno in (errno.EACCES, errno.EAGAIN):
            return False
        os.close(file)
        raise ConfigError(
            f"{folder} cannot be locked ({e}); use a folder of another file system"
        ) from e
    _LOCKED[identity] = file
    _Holder.this().write(file)
    return True


def _close_in_a_fork() -> None:
    """Close what the parent has locked, which stays locked by the parent."""
    for file in _LOCKED.values():
        with suppress(OSError):
            os.close(file)
    _LOCKED.clear()


os.register_at_fork(after_in_child=_close_in_a_fork)


@dataclass(frozen=True)
class _Holder:
    """The process that has locked a folder, as it has written into the file.

    Attributes:
        process: its number; 0 where it has not written yet.
        launcher: that of its torchrun, or 0.
    """

    process: int = 0
    launcher: int = 0
    host: str = ""

    @classmethod
    def this(cls) -> "_Holder":
        is_of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return cls(os.getpid(), os.getppid() if is_of_torchrun else 0, socket.gethostname())

    @classmethod
    def of(cls, file: int) -> "_Holder":
        with suppress(OSError, ValueError, TypeError):  # of an older version, or not written yet
            return cls(**json.loads(os.pread(file, 4096, 0)))
        return cls()

    def write(self, file: int) -> None:
        with suppress(OSError):  # the disk is full
            os.ftruncate(file, 0)
            os.pwrite(file, json.dumps(vars(self)).encode(), 0)

    def is_at_work(self) -> bool:
        """Whether the process is seen here, and its torchrun, if it has one, lives.

        The ranks of a torchrun that was killed end within `shutdown_timeout`.
        """
        if self.host != socket.gethostname():
            return False
        with suppress(OSError, ValueError):
            status = Path(f"/proc/{self.process}/status").read_text()
            parent = int(status.partition("PPid:")[2].split()[0])
            return self.launcher in (0, parent)
        return False

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}" if self.process else "another process"


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if name not in _CLASSES.get(module, ()):
            raise pickle.UnpicklingError(
                f"{module}.{name} is not allowed in a checkpoint's metadata"
            )
        return super().find_class(module, name)


class _Writer(FileSystemWriter):
    """PyTorch's writer, with the error of a file that could not be written."""

    def write_data(
        self, plan: SavePlan, planner: SavePlanner
    ) -> torch.futures.Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as e:
            # After a failed write PyTorch cannot close its archive, and the error of closing hides
            # the error of writing.
            if isinstance(e.__context__, OSError):
                raise e.__context__ from e
            raise


class _Reader(FileSystemReader):
    """PyTorch's reader, which unpickles the metadata by an allow-list."""

    def read_metadata(self, *_args: object, **_kwargs: object) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        assert metadata.storage_meta is not None
        metadata.storage_meta.load_id = self.load_id
        return metadata


def write_manifest(folder: Path, files: Sequence[str], contents: Mapping[str, object]) -> None:
    """Write the manifest of ``folder``: ``contents``, and SHA-256 of ``files`` and of itself."""
    digests = {name: _sha256(folder / name) for name in files}
    text = json.dumps({"files": digests, "sha256": _UNSIGNED, **contents}, indent=1)
    (folder / MANIFEST).write_text(text.replace(_UNSIGNED, _digest(text)))
    _sync(folder / MANIFEST)
    _sync(folder)


def _verify(path: Path) -> dict[str, Any]:
    """Check every file of the checkpoint at ``path`` and return its manifest.

    Raises:
        ConfigError: a file is missing or damaged; the message names it.
    """
    try:
        text = (path / MANIFEST).read_bytes().decode()
        manifest: dict[str, Any] = json.loads(text)
        if manifest["sha256"] != _digest(text.replace(manifest["sha256"], _UNSIGNED)):
            raise ValueError("its SHA-256 differs from the recorded one")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as e:
        raise ConfigError(f"{path / MANIFEST} is damaged ({first_line(e)})") from e
    for name, digest in manifest["files"].items():
        try:
            actual = _sha256(path / name)
        except OSError as e:
            raise ConfigError(
                f"{path / name} is missing or cannot be read ({first_line(e)})"
            ) from e
        if actual != digest:
            raise ConfigError(
                f"{path / name} is damaged: its SHA-256 is {actual[:12]}…, the manifest says "
                f"{digest[:12]}…"
            )
    return manifest


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _cause(error: BaseException) -> str:
    if not isinstance(error, CheckpointException):
        return first_line(error)
    return "; ".join(f"rank {rank}: {first_line(e)}" for rank, (e, _) in error.failures.items())


def _warn(message: str) -> None:
    print(f"checkpoint: {message}", file=sys.stderr, flush=True)
