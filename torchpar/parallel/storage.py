# SPDX-License-Identifier: MIT
"""What torch.distributed.checkpoint is given: slices of tensors, and a writer and reader that are careful.

Nothing is unpickled but by allow-lists: tensors by `torch.load` with ``weights_only``, the checkpoint's
own metadata by `_Unpickler`.
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

# What torch.distributed.checkpoint's metadata of tensors is made of. Not of objects (BytesStorageMetadata),
# which PyTorch would unpickle without an allow-list.
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


class Slice(torch.Tensor):
    """A rank's slice of a tensor that is split over ranks, as torch.distributed.checkpoint sees it.

    `torch.distributed.tensor.DTensor` would cut the tensor in another way than our layers, whose sizes
    need not divide. The attributes are `torch.distributed.checkpoint.CheckpointableTensor`'s, new in torch
    2.15; the methods are what torch 2.11 asks for.
    """

    global_shape: tuple[int, ...]
    global_offsets: tuple[tuple[int, ...], ...]
    local_offsets: tuple[tuple[int, ...], ...]
    local_sizes: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(t: Tensor, axis: int, offset: int, size: int) -> "Slice":
        """``t`` as the part from ``offset`` of a tensor whose axis ``axis`` is ``size`` long."""
        shape = tuple(size if i == axis else n for i, n in enumerate(t.shape))
        return Slice._of(t, shape, tuple(offset if i == axis else 0 for i in range(t.dim())))

    @staticmethod
    def _of(t: Tensor, shape: tuple[int, ...], offsets: tuple[int, ...]) -> "Slice":
        piece = t.detach().as_subclass(Slice)
        piece.global_shape, piece.global_offsets = shape, (offsets,)
        piece.local_offsets, piece.local_sizes = ((0,) * t.dim(),), (tuple(t.shape),)
        return piece

    def staged(self) -> "Slice":
        """A copy on the CPU."""
        return Slice._of(staged(self._plain()), self.global_shape, self.global_offsets[0])

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


def staged(t: Tensor) -> Tensor:
    return t.staged() if isinstance(t, Slice) else t.detach().to("cpu", copy=True)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is no part of a checkpoint's metadata")
        return super().find_class(module, name)


class _Disk(FileSystem):
    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        with super().create_stream(path, mode) as stream:
            try:
                yield stream
            except RuntimeError as e:
                # PyTorch's archive, which cannot be ended after a write that failed, hides the failure.
                if isinstance(e.__context__, OSError):
                    raise e.__context__ from e
                raise


class Writer(FileSystemWriter):
    """PyTorch's writer, but for its telling why a file could not be written."""

    def __init__(self, path: Path, **options: Any):
        super().__init__(path, **options)
        self.fs = _Disk()


class Reader(FileSystemReader):
    """PyTorch's reader, but for its unpickling whatever the metadata file asks for."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        assert metadata.storage_meta is not None
        metadata.storage_meta.load_id = self.load_id
        return metadata
