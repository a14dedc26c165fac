# SPDX-License-Identifier: MIT
"""Extensions of torch.distributed.checkpoint: shards of tensors, a writer with clear errors, a safe reader.

Unpickling uses allow-lists only: `torch.load` with ``weights_only`` for tensors, and `_Unpickler` for the
checkpoint's metadata.
"""

import io
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from torchpar.parts import Part

# The classes in torch.distributed.checkpoint's metadata of tensors. BytesStorageMetadata, for other objects,
# is left out, because PyTorch would unpickle those objects without an allow-list.
_CLASSES = {
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},  # the same in Python 3.13
    "torch": {"Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool"},
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


class LocalShard(torch.Tensor):
    """A rank's slice of a tensor that is split over ranks, for torch.distributed.checkpoint.

    If the number of ranks does not divide an axis, a `torch.distributed.tensor.DTensor` would cut it at other
    places than our layers do. torch 2.15 reads the attributes
    (`torch.distributed.checkpoint.CheckpointableTensor`), and torch 2.11 calls the methods.
    """

    global_shape: tuple[int, ...]
    global_offsets: tuple[tuple[int, ...], ...]
    local_offsets: tuple[tuple[int, ...], ...]
    local_sizes: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(t: Tensor, part: Part) -> "LocalShard":
        """Return ``t``, which is ``part`` of a tensor."""
        piece = t.detach().as_subclass(LocalShard)
        piece.global_shape, piece.global_offsets = part.whole, (part.start,)
        piece.local_offsets, piece.local_sizes = ((0,) * t.dim(),), (part.size,)
        return piece

    def _plain(self) -> Tensor:
        return self.as_subclass(torch.Tensor)

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        offsets, sizes = torch.Size(self.global_offsets[0]), torch.Size(self.local_sizes[0])
        return [ChunkStorageMetadata(offsets=offsets, sizes=sizes)]

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        (chunk,) = self.__create_chunk_list__()
        properties = TensorProperties.create_from_tensor(self._plain())
        data = TensorWriteData(chunk=chunk, properties=properties, size=torch.Size(self.global_shape))
        return [WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)]

    def __get_tensor_shard__(self, _: MetadataIndex) -> Tensor:
        return self._plain()


def copy_to_cpu(t: Tensor) -> Tensor:
    """Return a copy of ``t`` on the CPU, a `LocalShard` of a `LocalShard`."""
    if isinstance(t, LocalShard):
        part = Part(t.global_shape, t.global_offsets[0], t.local_sizes[0])
        return LocalShard.of(copy_to_cpu(t._plain()), part)
    return t.detach().to("cpu", copy=True)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a checkpoint's metadata")
        return super().find_class(module, name)


class _Disk(FileSystem):
    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        with super().create_stream(path, mode) as stream:
            try:
                yield stream
            except RuntimeError as e:
                # After a failed write PyTorch cannot close its archive, and that error hides the first one.
                if isinstance(e.__context__, OSError):
                    raise e.__context__ from e
                raise


class Writer(FileSystemWriter):
    """PyTorch's writer, with the error of a file that could not be written."""

    def __init__(self, path: Path, **options: Any):
        super().__init__(path, **options)
        self.fs = _Disk()


class Reader(FileSystemReader):
    """PyTorch's reader, which unpickles the metadata by an allow-list."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        assert metadata.storage_meta is not None
        metadata.storage_meta.load_id = self.load_id
        return metadata
